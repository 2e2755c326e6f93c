"""Restore the base under an adapter whose weights were cast, moved or replaced while the adapter was active.

A switcher keeps the base values of the entries that it has written (the stash). After a cast of the weights these values may
no longer be the base. The entries themselves show what has happened: each must be what one and the same cast, or sequence of
two casts, makes of the adapter's value or of the base's value. Then the same casts are applied to the stash. The result is the
base as the user's casts have changed it. Anything else is an error.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import SwitchError
from ..kernels import WritePlan
from ..weights.distributed import is_sharded, local_of
from ..weights.model_tensors import ModelTensors, is_buffer

__all__ = ["recover_base"]

BETWEEN = (torch.float16, torch.bfloat16, torch.float64)  # dtypes through which a weight may have been cast


class _ChangedPlaces(NamedTuple):
    """Some entries of a weight as it is now, [k] each: positions, present values, written values, and the old base values."""

    name: str
    weight: Tensor
    indices: Tensor
    live: Tensor
    written: Tensor
    stash: Tensor

    @property
    def kind(self) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes (before, now). One call, such as `model.half()`, casts all weights of a kind in the same way."""
        return self.stash.dtype, self.live.dtype


Bases = dict[torch.dtype | None, Tensor]  # the dtype in between, None for a single cast -> the base's entries [k]


def recover_base(
    plans: Sequence[WritePlan], names: Mapping[int, list[str]], tensors: ModelTensors, active: str, *, only_lost: bool = False
) -> None:
    """Write the base under these plans into the weights as they are now.

    names: id of a plan's weight -> its names. tensors: the model's tensors as they are now. active: the active adapters, for
    messages. only_lost: nothing new is in the model. So a weight that is not there was taken out, and nothing was made of it.
    Raises SwitchError, before anything is written, if the base values under the adapter are not known any more.
    """
    found: list[tuple[_ChangedPlaces, Bases]] = []
    present = tensors.first_of.keys()
    moved = {
        key
        for key, its in names.items()
        if key in present and all(tensors.by_name.get(name) is not tensors.first_of[key] for name in its)
    }
    for plan in plans:
        for number in range(int(plan.begun[0])):
            write, stash, shape, own = plan.writes[number], plan.stash[number], plan.shapes[number], plan.weights[number]
            positions = plan.positions(number)
            now = {id(own): (names[id(own)][0], own)}
            there = [(name, tensors.by_name.get(name, own)) for name in names[id(own)]]
            if any(is_sharded(weight) for _, weight in there):  # then the plan is for the local pieces
                now = {id(weight): (name, _piece(weight)) for name, weight in there}
            has_moved = id(own) in moved
            for name, weight in there:  # several weights, if they were tied before
                is_known = id(weight) in names or (has_moved and is_buffer(weight))
                if not (is_known and (has_moved or only_lost)):  # otherwise it is another one, which has this one's name now
                    now.setdefault(id(weight), (name, weight))
            is_gone = not present & now.keys() or (moved and is_buffer(own) and id(own) not in present)
            if is_gone and not only_lost:  # a buffer's entries do not show whether what has its name now is a cast of it
                raise _unknown(names[id(own)][0], None, active)
            for key, (name, weight) in now.items():
                entries = _entries(name, weight, shape, positions, write.values, stash)
                bases = {} if entries is None else _bases(entries)
                if entries is not None and bases:
                    found.append((entries, bases))
                elif len(now) == 1 or (key in present and (key == id(own) or not has_moved)):
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
    torch.clear_autocast_cache()  # it may hold casts of the old values


def _piece(weight: Tensor) -> Tensor:
    """This process's piece of a sharded weight, a buffer or a parameter as the weight is."""
    piece = local_of(weight) if is_sharded(weight) else weight
    return piece if is_buffer(weight) else nn.Parameter(piece, requires_grad=False)


def _unknown(name: str, weight: Tensor | None, active: str) -> SwitchError:
    found = "nothing of that name" if weight is None else f"{weight.dtype} {list(weight.shape)} on {weight.device}"
    return SwitchError(
        f"'{name}' was changed by somebody else while {active} was active in it: found {found}, and the base values under the "
        "adapter cannot be determined from its entries any more. Load the base's weights into the model, then call release(), "
        "which makes the present weights the base; next time call use(None) first"
    )


def _entries(
    name: str, weight: Tensor, shape: torch.Size, indices: Tensor, written: Tensor, stash: Tensor
) -> _ChangedPlaces | None:
    """The entries as they are now; None if they cannot be read or written. shape: the weight's when they were written."""
    if weight.ndim != len(shape) or weight.shape[1:] != shape[1:] or weight.is_meta or not weight.is_floating_point():
        return None
    memory = weight.untyped_storage().nbytes()  # others may have freed it
    if torch._debug_has_internal_overlap(weight) == 1 or memory < weight.numel() * weight.itemsize:
        return None
    indices = indices.long().to(weight.device)
    there = indices < weight.numel()  # rows may be missing, for example if an embedding was made smaller
    indices, written, stash = indices[there], written.to(weight.device)[there], stash.to(weight.device)[there]
    return _ChangedPlaces(name, weight, indices, _with_dimensions(weight)[_places(weight, indices)], written, stash)


def _with_dimensions(weight: Tensor) -> Tensor:
    """The weight, detached, with at least one dimension."""
    return weight.detach() if weight.ndim else weight.detach().view(1)


def _places(weight: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
    """Flat positions as coordinates in the weight's shape, which are right for any layout in memory."""
    return torch.unravel_index(indices, weight.shape or (1,))


def _bases(entries: _ChangedPlaces) -> Bases:
    """The base's entries for each sequence of casts that explains the weight as it is now; empty if none does."""
    if is_buffer(entries.weight):  # forward passes change it, so its entries show nothing; the stash is the base
        return {None: entries.stash.to(entries.live.dtype)}
    found: Bases = {}
    for between in _ways(entries.weight):
        written, base = (_cast(tensor, between, entries.live.dtype) for tensor in (entries.written, entries.stash))
        if bool((_same(entries.live, written) | _same(entries.live, base)).all()):
            found[between] = base
    return found


def _ways(weight: Tensor) -> list[torch.dtype | None]:
    """The casts that a weight may have gone through: a single one (None), or one through each of these dtypes.

    A cast through another dtype is possible only if that dtype holds every value that the weight has now.
    """
    whole = weight.detach()
    others = [between for between in BETWEEN if between != weight.dtype]
    return [None, *(each for each in others if bool(_same(_cast(whole, each, weight.dtype), whole).all()))]


def _cast(tensor: Tensor, between: torch.dtype | None, dtype: torch.dtype) -> Tensor:
    return (tensor if between is None else tensor.to(between)).to(dtype)


def _same(one: Tensor, other: Tensor) -> Tensor:
    """Where two tensors of one dtype are equal, bit for bit; all NaNs count as equal."""
    if one.element_size() == 1 and one.is_floating_point():  # torch cannot compare float8
        one, other = one.float(), other.float()
    return ((one == other) & (one.signbit() == other.signbit())) | (one.isnan() & other.isnan())


def _write(entries: _ChangedPlaces, base: Tensor) -> None:
    with torch.inference_mode(entries.weight.is_inference()):
        _with_dimensions(entries.weight)[_places(entries.weight, entries.indices)] = base
