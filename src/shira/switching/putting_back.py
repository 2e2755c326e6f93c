"""The base under an adapter whose weights were cast, moved or replaced while it was active.

A switcher knows what lay under the entries that it has written. If the weights have changed since, that may no longer be what
the base would be. What has happened is seen from the entries themselves: they must be what the adapter's values, and the
base's, become by one and the same cast. Then so does the stash, and the base is what the user's act has made of the base.
Anything else is refused.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import SwitchError
from ..kernels import WritePlan
from ..weights.distributed import is_sharded
from ..weights.model_tensors import ModelTensors, is_buffer

__all__ = ["put_back"]

BETWEEN = (torch.float16, torch.bfloat16, torch.float64)  # what a weight may have been cast to before it was cast to what it is


class _Entries(NamedTuple):
    """A few entries of a weight as it is now, [k] each: positions, what lies there, what was written, what lay there before."""

    name: str
    weight: Tensor
    indices: Tensor
    live: Tensor
    written: Tensor
    stash: Tensor

    @property
    def kind(self) -> tuple[torch.dtype, torch.dtype]:
        """What was cast to what: one call casts all of a kind in one way."""
        return self.stash.dtype, self.live.dtype


Bases = dict[torch.dtype | None, Tensor]  # by what a weight was cast to in between, or None -> the base's entries [k]


def put_back(plans: Sequence[WritePlan], names: Mapping[int, list[str]], tensors: ModelTensors, active: str) -> None:
    """Write the base under these plans into the weights as they are now.

    names: number of a plan's weight -> its names. tensors: the model's as they are now. active: what is active, for messages.
    Raises SwitchError, before anything is written, if what lies under the adapter is not known any more.
    """
    found: list[tuple[_Entries, Bases]] = []
    present = tensors.numbers
    for plan in plans:
        for number in range(int(plan.begun[0])):
            part, stash, shape = plan.parts[number], plan.stash[number], plan.shapes[number]
            now = {id(part.weight): (names[id(part.weight)][0], part.weight)}
            there = [(name, tensors.by_name.get(name, part.weight)) for name in names[id(part.weight)]]
            in_pieces = any(is_sharded(weight) for _, weight in there)  # of which the plan has what lies here
            for name, weight in there if not in_pieces else ():  # several, if it was tied; it may be no longer
                now.setdefault(id(weight), (name, weight))
            if not in_pieces and not present & now.keys():
                raise _unknown(names[id(part.weight)][0], None, active)
            for name, weight in now.values():
                entries = _entries(name, weight, shape, part.indices, part.values, stash)
                bases = {} if entries is None else _bases(entries)
                if entries is not None and bases:
                    found.append((entries, bases))
                elif id(weight) in present or len(now) == 1:
                    raise _unknown(name, weight, active)
    ways: dict[tuple[torch.dtype, torch.dtype], set[torch.dtype | None]] = {}
    for entries, bases in found:
        ways[entries.kind] = ways.get(entries.kind, set(bases)) & set(bases)
    writes = []
    for entries, bases in found:
        several = [bases[way] for way in ways[entries.kind]] or list(bases.values())
        if not all(bool(_same(several[0], other).all()) for other in several):
            raise _unknown(entries.name, entries.weight, active)
        writes.append((entries, several[0]))
    for entries, base in writes:
        _write(entries, base)


def _unknown(name: str, weight: Tensor | None, active: str) -> SwitchError:
    found = "nothing of that name" if weight is None else f"{weight.dtype} {list(weight.shape)} on {weight.device}"
    return SwitchError(
        f"'{name}' was changed by somebody else while {active} was active in it: found {found}, and what lies under the "
        "adapter cannot be told from its entries any more. Load the base's weights into the model, then call release(), which "
        "takes the model as it is for the base; next time call use(None) first"
    )


def _entries(name: str, weight: Tensor, shape: torch.Size, indices: Tensor, written: Tensor, stash: Tensor) -> _Entries | None:
    """The entries as they are now; None if they cannot be read or written. shape: of the weight when they were written."""
    if weight.ndim != len(shape) or weight.shape[1:] != shape[1:] or weight.is_meta or not weight.is_floating_point():
        return None
    memory = weight.untyped_storage().nbytes()  # which others may have given back
    if torch._debug_has_internal_overlap(weight) == 1 or memory < weight.numel() * weight.itemsize:
        return None
    indices = indices.long().to(weight.device)
    there = indices < weight.numel()  # rows may be gone, as of an embedding that was made smaller
    indices, written, stash = indices[there], written.to(weight.device)[there], stash.to(weight.device)[there]
    return _Entries(name, weight, indices, _sides(weight)[_places(weight, indices)], written, stash)


def _sides(weight: Tensor) -> Tensor:
    """The weight, detached, with a side at least."""
    return weight.detach() if weight.ndim else weight.detach().view(1)


def _places(weight: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
    """Positions in the weight's own shape, whatever its layout in memory."""
    return torch.unravel_index(indices, weight.shape or (1,))


def _bases(entries: _Entries) -> Bases:
    """The base's entries, for each way in which the weight may have become what it is; none if it has become so in another."""
    if is_buffer(entries.weight):  # which forward passes change: it is what lay there
        return {None: entries.stash.to(entries.live.dtype)}
    found: Bases = {}
    for between in _ways(entries.weight):
        written, base = (_cast(tensor, between, entries.live.dtype) for tensor in (entries.written, entries.stash))
        if bool((_same(entries.live, written) | _same(entries.live, base)).all()):
            found[between] = base
    return found


def _ways(weight: Tensor) -> list[torch.dtype | None]:
    """What may have been done to a weight of which each entry is still in its place: a cast, or two. Two are possible only if
    the dtype between holds all that it holds."""
    whole = weight.detach()
    others = [between for between in BETWEEN if between != weight.dtype]
    return [None, *(each for each in others if bool(_same(_cast(whole, each, weight.dtype), whole).all()))]


def _cast(tensor: Tensor, between: torch.dtype | None, dtype: torch.dtype) -> Tensor:
    return (tensor if between is None else tensor.to(between)).to(dtype)


def _same(one: Tensor, other: Tensor) -> Tensor:
    """Where two tensors of one dtype agree to the bit; any NaN is any other."""
    return ((one == other) & (one.signbit() == other.signbit())) | (one.isnan() & other.isnan())


def _write(entries: _Entries, base: Tensor) -> None:
    with torch.inference_mode(entries.weight.is_inference()):
        _sides(entries.weight)[_places(entries.weight, entries.indices)] = base
