"""Several adapters' changes to tensors, combined in C (combine.c): a whole model in one call, on torch's number of threads."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from ...sparse.tensor import has_memory
from ..plan import Combination, Combined, Contribution
from .extension import extension, plain_c

__all__ = ["combine", "combine_all", "takes_gaps"]

CHANGE = np.dtype(  # as in combine.c
    [
        *[("positions", "u8"), ("values", "u8"), ("under", "u8"), ("count", "i8"), ("done", "i8")],
        *[("units", "i8"), ("read", "i8"), ("least", "i8")],
        *[("strength", "f4"), ("is_delta", "i4"), ("is_exact", "i4"), ("unit_bytes", "i4")],
    ]
)
TENSOR = np.dtype(  # Combination in combine.c
    [
        *[("changes", "u8"), ("weight", "u8"), ("elsewhere", "u8"), ("there", "u8"), ("others", "i8"), ("done", "i8")],
        *[("positions", "u8"), ("values", "u8"), ("base", "u8"), ("count", "i8"), ("end", "i8"), ("found", "i8")],
        *[("value_bytes", "i4"), ("base_bytes", "i4"), ("is_finite", "i8")],
    ]
)
WRONG_POSITIONS = -2  # as in combine.c, in place of the number of entries; so is -1 for gaps
MODES = {"sum": 0, "mean": 1, "max": 2}
GAPS = (torch.uint8, torch.uint16)  # dtypes of gaps, which stand for positions in a file
LINE = 64  # bytes of a cache line
MOST_CHANGES = 255  # to one tensor: C counts them in a byte
SLACK = 16  # entries that C may write beyond the last one
PIECE = 2**22  # bytes from which on a tensor has a piece of memory of its own


def takes_gaps(weight: Tensor | None, entries: int) -> bool:
    """Whether `combine` is as fast without positions to prefetch by.

    It is if there is no base, or if the changes have so many entries that every cache line of the base is fetched in order.
    """
    return weight is None or LINE * entries > weight.nbytes


def combine(
    weight: Tensor | None,
    changes: Sequence[Contribution],
    dtype: torch.dtype,
    method: str,
    numel: int,
    *,
    hidden: tuple[Tensor, Tensor] | None = None,
    with_base: bool = True,
) -> Combined | None:
    """`combine_all` for one tensor."""
    return combine_all([Combination(weight, changes, dtype, method, numel, hidden)], with_base=with_base)[0]


def combine_all(combinations: Sequence[Combination], *, with_base: bool = True) -> list[Combined | None]:
    """See `kernels.combine_all`: one window of positions at a time, without computing the union first.

    For "sum", "mean" and "max", at most 255 changes, and a float32 or bfloat16 base below 2³¹ entries. Values of deltas may
    have any dtype. Raises IndexError for positions outside of the tensor, or tensors that do not fit each other.
    """
    found: list[Combined | None] = [None] * len(combinations)
    alike: dict[tuple[torch.dtype, str], list[int]] = {}
    for number, each in enumerate(combinations):
        if _is_known(each):
            alike.setdefault((each.dtype, each.method), []).append(number)
    for (dtype, method), numbers in alike.items():
        numbers.sort(key=lambda number: -sum(change.values.numel() for change in combinations[number].changes))
        results = _combine_alike([combinations[number] for number in numbers], dtype, MODES[method], with_base)
        for number, result in zip(numbers, results, strict=True):
            found[number] = result
    return found


def _is_known(each: Combination) -> bool:
    kinds = (torch.int32, *GAPS)
    return (
        each.method in MODES
        and each.dtype in (torch.float32, torch.bfloat16)
        and len(each.changes) <= MOST_CHANGES
        and each.numel < 2**31
        and all(change.indices.dtype in kinds for change in each.changes)
        and (each.hidden is None or each.hidden[0].dtype == torch.int32)
    )


def _combine_alike(tensors: Sequence[Combination], dtype: torch.dtype, mode: int, with_base: bool) -> list[Combined | None]:
    """Combinations of one dtype and method, in one call of C, in this order."""
    changes = [change for each in tensors for change in each.changes]
    first = [0, *accumulate(len(each.changes) for each in tensors)]  # number of each tensor's first change
    spans = [slice(begin, end) for begin, end in pairwise(first)]
    kinds = [_common(each) for each in tensors]
    positions = [change.indices.contiguous() for change in changes]  # or gaps
    wide = [kind for kind, each in zip(kinds, tensors, strict=True) for _ in each.changes]
    values = [change.values.to(kind).contiguous() for change, kind in zip(changes, wide, strict=True)]
    for each, span in zip(tensors, spans, strict=True):
        _check_addresses(each, positions[span], values[span])
    sizes = [own.numel() for own in values]
    rooms = [sum(sizes[span]) + SLACK for span in spans]
    indices, fresh = _memory(rooms, torch.int32), _memory(rooms, dtype)
    has_base = [with_base and each.weight is not None for each in tensors]
    has_under = [wanted for wanted, each in zip(has_base, tensors, strict=True) for _ in each.changes]
    base = _memory([room * wanted for room, wanted in zip(rooms, has_base, strict=True)], dtype)
    under = _memory([size * wanted for size, wanted in zip(sizes, has_under, strict=True)], dtype)

    table = np.zeros(len(changes), dtype=CHANGE)
    table["positions"], table["values"], table["count"] = _addresses(positions), _addresses(values), sizes
    table["under"] = np.array(_addresses(under), dtype=np.uint64) * has_under
    table["unit_bytes"] = [own.itemsize if own.dtype in GAPS else 0 for own in positions]
    table["units"] = [own.numel() if own.dtype in GAPS else 0 for own in positions]
    for field in ("strength", "is_delta", "is_exact"):
        table[field] = [getattr(change, field) for change in changes]
    whole = np.zeros(len(tensors), dtype=TENSOR)
    whole["changes"] = table.ctypes.data + CHANGE.itemsize * np.array(first[:-1], dtype=np.uint64)
    whole["weight"] = [0 if each.weight is None else each.weight.data_ptr() for each in tensors]
    hidden = [each.hidden or (indices[0][:0], fresh[0][:0]) for each in tensors]
    whole["elsewhere"], whole["there"] = (_addresses(part) for part in zip(*hidden, strict=True))
    whole["others"] = [where.numel() for where, _ in hidden]
    whole["positions"], whole["values"] = _addresses(indices), _addresses(fresh)
    whole["base"] = np.array(_addresses(base), dtype=np.uint64) * has_base
    whole["count"], whole["end"] = np.diff(first), [each.numel for each in tensors]
    whole["value_bytes"], whole["base_bytes"] = [kind.itemsize for kind in kinds], dtype.itemsize
    extension.combine(whole.ctypes.data, len(tensors), mode, plain_c.get(), torch.get_num_threads())

    found = whole["found"].tolist()
    if WRONG_POSITIONS in found:
        raise IndexError(f"positions that do not rise from 0 to {tensors[found.index(WRONG_POSITIONS)].numel - 1}")
    is_full = 8 * sum(found) > 7 * sum(rooms)  # if less is used, what is kept is copied
    results: list[Combined | None] = []
    for count, span, is_finite, *pieces in zip(found, spans, whole["is_finite"].tolist(), indices, fresh, base, strict=True):
        own, new, old = (piece[:count] for piece in pieces)
        kept = (own, new) if is_full else (own.clone(), new.clone())
        results.append(None if count < 0 else Combined(*kept, old, under[span], bool(is_finite)))
    return results


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _common(each: Combination) -> torch.dtype:
    """The dtype in which C gets the values of all changes to a tensor."""
    narrow = each.dtype == torch.bfloat16 and all(change.values.dtype == each.dtype for change in each.changes)
    return torch.bfloat16 if narrow else torch.float32


def _check_addresses(each: Combination, positions: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Raise IndexError for arguments that C does not check, and that would corrupt memory. C checks positions and gaps."""
    weight, dtype = each.weight, each.dtype
    if each.hidden is not None:
        if weight is None or each.hidden[1].dtype != dtype or not all(part.is_contiguous() for part in each.hidden):
            raise IndexError(
                f"what the weight hides must be of its dtype, {dtype}, and contiguous; found {each.hidden[1].dtype}"
            )
        positions, values = [*positions, each.hidden[0]], [*values, each.hidden[1]]
    for own, new in zip(positions, values, strict=True):
        if own.shape != new.shape and own.dtype not in GAPS:
            raise IndexError("there must be as many values as positions")
        if not (has_memory(own) and has_memory(new)):
            raise IndexError("a tensor whose memory was freed")
    if weight is None:
        return
    if not (weight.is_contiguous() and weight.dtype == dtype and weight.numel() == each.numel and has_memory(weight)):
        raise IndexError(
            f"the base must be contiguous, {dtype}, of {each.numel} entries, found {weight.dtype}, {weight.numel()}"
        )


def _memory(counts: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Uninitialized tensors of these lengths. Small ones share a piece of memory, so that hundreds of them take little time.

    The memory is from numpy, which requests large pages for large arrays: many small pages take longer to map than to fill. A
    piece is not larger than needed, because the C library keeps only smaller ones for the next call.
    """
    found: list[Tensor] = []
    group: list[int] = []
    size = 0
    for number, count in enumerate(counts, start=1):
        group.append(count)
        size += count
        if size * dtype.itemsize >= PIECE or number == len(counts):
            piece = torch.from_numpy(np.empty(max(1, size) * dtype.itemsize, dtype=np.uint8)).view(dtype)
            found += piece[:size].split(group)
            group, size = [], 0
    return found
