"""The change of a weight for some rows of a batch: the data of `kernels.add_products_`, and the checks of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import AdapterError
from ..sparse.tensor import FLOAT_DTYPES, dtype_name
from ..texts import described

__all__ = ["Group", "RowChange", "check_groups", "row_change"]

MOST = 2**31 - 1  # entries, and features on each side: starts and columns are int32


@dataclass(frozen=True, eq=False, slots=True)
class RowChange:
    """The change of one weight [out, in], in compressed rows. `row_change` makes it from flat positions.

    shape: (out, in).
    starts: int32 [out + 1], where the entries of each row of the weight begin.
    columns: int32 [k], each from 0 to in - 1.
    changes: float32 [k].

    It holds copies of these tensors, and is checked once, when it is made. The copies must not be written to:
    `kernels.add_products_` refuses a change whose positions have another version counter than then.
    Raises AdapterError if any of this is not so.
    """

    shape: tuple[int, int]
    starts: Tensor
    columns: Tensor
    changes: Tensor
    device: torch.device = field(init=False)
    version: int = field(init=False)  # the version counter that starts and columns share
    addresses: tuple[int, ...] = field(init=False)  # of starts, columns and changes, for C; empty on other devices than the CPU
    memory: tuple[Any, ...] = field(init=False, repr=False)  # holds what is at the addresses: nothing can resize it

    def __post_init__(self) -> None:
        _check_shape(self.shape)
        for name, dtype in (("starts", torch.int32), ("columns", torch.int32), ("changes", torch.float32)):
            _check_plain(name, getattr(self, name), (dtype,))
        _check_compressed_rows(*self.shape, self.starts, self.columns, self.changes)
        (outs, ins), device = self.shape, self.starts.device
        memory: tuple[np.ndarray[Any, Any], ...] = ()
        with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode have no version counters
            none = torch.tensor([ins], dtype=torch.int32, device=device)  # the column of an entry of 0 after all others, for C
            positions = torch.cat([self.starts, self.columns, none])
            values = torch.cat([self.changes, torch.zeros(1, dtype=torch.float32, device=device)])
            if device.type == "cpu":
                memory = (np.array(positions.numpy()), np.array(values.numpy()))
                positions, values = map(torch.from_numpy, memory)
            starts, columns = positions[: outs + 1], positions[outs + 1 : -1]
        addresses = [array.ctypes.data for array in memory]
        made = {
            "shape": (outs, ins),
            "starts": starts,
            "columns": columns,
            "changes": values[:-1],
            "device": device,
            "version": columns._version,
            "addresses": (addresses[0], addresses[0] + starts.nbytes, addresses[1]) if memory else (),
            "memory": memory,
        }
        for name, value in made.items():
            object.__setattr__(self, name, value)

    def __reduce__(self) -> Any:
        return RowChange, (self.shape, self.starts, self.columns, self.changes)  # a copy has addresses of its own


Group = tuple[int, int, RowChange]  # the change for the rows first to end - 1


def row_change(indices: Tensor, changes: Tensor, shape: tuple[int, int]) -> RowChange:
    """The change of a weight, for `kernels.add_products_`.

    indices: int32 or int64 [k], flat positions in C order, strictly increasing. changes: float32 [k], what is added to the
    weight there, on the same device. shape: (out, in) of the weight, each below 2³¹; k is below 2³¹, too.
    Raises AdapterError if any of this is not so.
    """
    _check_shape(shape)
    _check_plain("indices", indices, (torch.int32, torch.int64))
    _check_plain("changes", changes, (torch.float32,))
    outs, ins = shape
    if indices.numel() > MOST:
        raise AdapterError(f"a change must have fewer than 2^31 entries, found {indices.numel()}")
    flat = indices.long()
    if flat.numel() and not bool((flat[1:] > flat[:-1]).all()):
        where = int((flat[1:] <= flat[:-1]).nonzero()[0])
        raise AdapterError(f"indices must be sorted and unique, found {int(flat[where])}, then {int(flat[where + 1])}")
    if flat.numel() and not 0 <= int(flat[0]) <= int(flat[-1]) < outs * ins:
        raise AdapterError(
            f"indices must be from 0 to {outs * ins - 1} (shape {list(shape)}), found {int(flat[0])} to {int(flat[-1])}"
        )
    begins = torch.arange(outs + 1, device=flat.device) * ins
    starts = torch.searchsorted(flat, begins, out_int32=True)
    return RowChange((outs, ins), starts, (flat % max(1, ins)).int(), changes)


def _check_shape(shape: Any) -> None:
    sides = tuple(shape) if isinstance(shape, (tuple, list)) else ()
    if len(sides) != 2 or not all(type(side) is int and 0 <= side <= MOST for side in sides):
        raise AdapterError(f"shape must be (out, in), two whole numbers from 0 to 2^31 - 1, found {described(shape)}")


def _check_plain(name: str, tensor: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise AdapterError(f"{name} must be a tensor, found {described(tensor)}")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.ndim != 1 or tensor.dtype not in dtypes:
        expected = " or ".join(map(dtype_name, dtypes))
        raise AdapterError(
            f"{name} must be {expected}, 1-D, with data, found {dtype_name(tensor.dtype)} {list(tensor.shape)}, "
            f"{tensor.layout} on {tensor.device}"
        )


def _check_compressed_rows(outs: int, ins: int, starts: Tensor, columns: Tensor, changes: Tensor) -> None:
    if not starts.device == columns.device == changes.device:
        raise AdapterError(f"starts, columns and changes are on {starts.device}, {columns.device} and {changes.device}")
    if starts.numel() != outs + 1 or columns.numel() != changes.numel():
        raise AdapterError(
            f"there must be {outs + 1} starts and as many changes as columns, found {starts.numel()} starts, "
            f"{columns.numel()} columns and {changes.numel()} changes"
        )
    ordered = bool((starts[1:] >= starts[:-1]).all())
    if not ordered or int(starts[0]) != 0 or int(starts[-1]) != columns.numel():
        raise AdapterError(
            f"starts must increase from 0 to the number of entries, {columns.numel()}, found {int(starts[0])} to "
            f"{int(starts[-1])}{'' if ordered else ', not in order'}"
        )
    if columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < ins:
        raise AdapterError(f"columns must be from 0 to {ins - 1}, found {int(columns.min())} to {int(columns.max())}")


def check_groups(output: Tensor, input: Tensor, groups: Sequence[Group]) -> None:
    """Raise IndexError, or AdapterError for a change that was written to, unless these fit `kernels.add_products_`.

    It takes a fraction of a microsecond for each group: a server calls it for every layer of every step.
    """
    device, shape = output.device, (output.shape[-1], input.shape[-1]) if output.ndim and input.ndim else None
    fits = shape is not None and output.shape[:-1] == input.shape[:-1] and output.is_contiguous() and input.device == device
    if not fits or output.dtype not in FLOAT_DTYPES or input.dtype not in FLOAT_DTYPES:
        raise IndexError(
            "the output [..., out] must be contiguous, the input [..., in] with the same rows on the same device, both "
            f"floating point, found {_shown(output)} and {_shown(input)}"
        )
    before = 0
    for first, end, change in groups:
        if not (type(first) is type(end) is int and before <= first <= end):
            raise IndexError(f"rows of groups must be in order and must not overlap, found {first} to {end} after {before}")
        if change.shape != shape or change.device != device:
            raise IndexError(f"a change {list(change.shape)} on {change.device} for a product {list(shape or ())} on {device}")
        if change.columns._version != change.version:
            raise AdapterError("the positions of a change were written to after it was made")
        before = end
    rows = output.shape[:-1].numel()
    if before > rows:
        raise IndexError(f"a group of rows up to {before} in an output of {rows} rows")


def _shown(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
