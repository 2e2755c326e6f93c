"""Sparse matrices in compressed rows: the data of `kernels.add_products_` and `kernels.row_products`, and their checks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import AdapterError
from ..sparse.tensor import FLOAT_DTYPES, dtype_name
from ..texts import described

__all__ = ["Group", "RowChange", "RowPositions", "check_groups", "row_change", "row_positions"]

MOST = 2**31 - 1  # entries, and features on each side: starts and columns are int32


@dataclass(frozen=True, eq=False, slots=True)
class RowPositions:
    """Positions in a matrix [out, in], in compressed rows.

    shape: (out, in).
    starts: int32 [out + 1], where the positions of each row begin.
    columns: int32 [k], each from 0 to in - 1.

    It holds copies of these tensors, and is checked once, when it is made. The copies must not be written to: `check` finds
    another version counter than then.
    Raises AdapterError if any of this is not so.
    """

    shape: tuple[int, int]
    starts: Tensor
    columns: Tensor
    device: torch.device = field(init=False)
    version: int = field(init=False)  # the version counter that starts and columns share
    addresses: tuple[int, ...] = field(init=False)  # of starts and columns, for C; empty on other devices than the CPU
    memory: tuple[Any, ...] = field(init=False, repr=False)  # holds what is at the addresses: nothing can resize it

    def __post_init__(self) -> None:
        _check_shape(self.shape)
        for name in ("starts", "columns"):
            _check_plain(name, getattr(self, name), (torch.int32,))
        _check_compressed_rows(*self.shape, self.starts, self.columns)
        outs, ins = self.shape
        none = torch.tensor([ins], dtype=torch.int32, device=self.starts.device)  # the column of an entry of 0 after all others
        positions, addresses, memory = _owned(self.starts, self.columns, none)
        starts, columns = positions[: outs + 1], positions[outs + 1 : -1]
        made = {
            "shape": (outs, ins),
            "starts": starts,
            "columns": columns,
            "device": starts.device,
            "version": columns._version,
            "addresses": tuple(address + at for address in addresses for at in (0, starts.nbytes)),
            "memory": memory,
        }
        for name, value in made.items():
            object.__setattr__(self, name, value)

    def __reduce__(self) -> Any:
        return RowPositions, (self.shape, self.starts, self.columns)  # a copy has addresses of its own

    def check(self) -> None:
        """Raises AdapterError if the positions were written to."""
        if self.columns._version != self.version:
            raise AdapterError("the positions of a change were written to after it was made")


@dataclass(frozen=True, eq=False, slots=True)
class RowChange(RowPositions):
    """The change of one weight [out, in], in compressed rows. `row_change` makes it from flat positions.

    changes: float32 [k], at the positions. The rest is as in `RowPositions`, with one more address.
    """

    changes: Tensor

    def __post_init__(self) -> None:
        _check_plain("changes", self.changes, (torch.float32,))
        RowPositions.__post_init__(self)
        if self.changes.device != self.device or self.changes.numel() != self.columns.numel():
            raise AdapterError(
                f"there must be as many changes as columns, on one device, found {self.columns.numel()} columns and "
                f"{self.changes.numel()} changes, on {self.device} and {self.changes.device}"
            )
        none = torch.zeros(1, dtype=torch.float32, device=self.device)
        values, address, memory = _owned(self.changes, none)
        for name, value in (
            ("changes", values[:-1]),
            ("addresses", self.addresses + address),
            ("memory", self.memory + memory),
        ):
            object.__setattr__(self, name, value)

    def __reduce__(self) -> Any:
        return RowChange, (self.shape, self.starts, self.columns, self.changes)


def _owned(*tensors: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[Any, ...]]:
    """(copy, addresses, memory): the tensors one after the other; on the CPU in memory of numpy, which nothing can resize."""
    with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode have no version counters
        copy = torch.cat(tensors)
        if copy.device.type != "cpu":
            return copy, (), ()
        memory = np.array(copy.numpy())
        return torch.from_numpy(memory), (memory.ctypes.data,), (memory,)


Group = tuple[int, int, RowChange]  # the change for the rows first to end - 1


def row_change(indices: Tensor, changes: Tensor, shape: tuple[int, int]) -> RowChange:
    """The change of a weight, for `kernels.add_products_`.

    indices: int32 or int64 [k], flat positions in C order, strictly increasing. changes: float32 [k], what is added to the
    weight there, on the same device. shape: (out, in) of the weight, each below 2³¹; k is below 2³¹, too.
    Raises AdapterError if any of this is not so.
    """
    return RowChange(shape, *_compressed(indices, shape), changes)


def row_positions(indices: Tensor, shape: tuple[int, int]) -> RowPositions:
    """Positions for `kernels.row_products`. The arguments are those of `row_change`; raises what it raises."""
    return RowPositions(shape, *_compressed(indices, shape))


def _compressed(indices: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(starts, columns) of flat positions."""
    _check_shape(shape)
    _check_plain("indices", indices, (torch.int32, torch.int64))
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
    return starts, (flat % max(1, ins)).int()


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


def _check_compressed_rows(outs: int, ins: int, starts: Tensor, columns: Tensor) -> None:
    if starts.device != columns.device:
        raise AdapterError(f"starts and columns are on {starts.device} and {columns.device}")
    if starts.numel() != outs + 1:
        raise AdapterError(f"there must be {outs + 1} starts, found {starts.numel()}")
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
        change.check()
        before = end
    rows = output.shape[:-1].numel()
    if before > rows:
        raise IndexError(f"a group of rows up to {before} in an output of {rows} rows")


def _shown(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
