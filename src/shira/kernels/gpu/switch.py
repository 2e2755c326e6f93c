"""The Triton kernel that switches a model on a GPU. Importing this module imports Triton. ops.py calls it.

One program handles one window of one weight: WINDOW consecutive entries, with any number of positions. First it restores the
entries of the leaving plan in the window, and waits for its own threads. Then it copies the old values of the coming plan's
entries to the stash, and writes that plan's values. Windows do not overlap, so the second step finds the base. Entries that
both plans have are therefore right, without a search and in one launch.

A plan is a table of addresses, int64 [weights, COLUMNS]:
    0 the weight   1 positions   2 values   3 stash
    4 where the positions of each window begin, int64 [windows + 1]; 0: the plan does not write this weight
    5 bytes of a position   6 bytes of an entry
    7 the parts of a sum (`_sum`), 0: the values are ready   8 the weight's dtype (ops.KINDS)

Each plan has a flag, int64 [1]: the number of the switch whose old values its stash holds. A launch runs completely or not at
all. An interrupted host may not know which of the two happened, but a later launch can read it here.
"""

import triton
import triton.language as tl

__all__ = ["BLOCK", "COLUMNS", "WINDOW", "change", "overwrite"]

WINDOW = 2**16
BLOCK = 1024
COLUMNS = 9
FLOAT16 = 2  # ops.KINDS

_COLUMNS, _FLOAT16 = tl.constexpr(COLUMNS), tl.constexpr(FLOAT16)


@triton.jit
def _positions(address, at, mask, wide):
    """Positions as int64, from int32 or int64 ones."""
    if wide == 8:
        found = tl.load(address.to(tl.pointer_type(tl.int64)) + at, mask=mask, other=0)
    else:
        found = tl.load(address.to(tl.pointer_type(tl.int32)) + at, mask=mask, other=0).to(tl.int64)
    return found


@triton.jit
def _begin_end(row, window):
    """The span of a plan's positions in a window; empty if the plan does not write this weight."""
    starts = tl.load(row + 4)
    held = starts != 0
    starts = starts.to(tl.pointer_type(tl.int64)) + window
    return tl.load(starts, mask=held, other=0), tl.load(starts + 1, mask=held, other=0)


@triton.jit
def _put_back(row, window, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Copy the stash to the weight."""
    begin, end = _begin_end(row, window)
    weight = tl.load(row).to(tl.pointer_type(BITS))
    stash = tl.load(row + 3).to(tl.pointer_type(BITS))
    positions, wide = tl.load(row + 1), tl.load(row + 5)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        mask = at < end
        where = _positions(positions, at, mask, wide)
        tl.store(weight + where, tl.load(stash + at, mask=mask), mask=mask)


@triton.jit
def _put(row, window, overflow, BITS: tl.constexpr, KEEP: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr):
    """Write values to the weight. KEEP: copy the old values to the stash first. SUMS: if the weight has a sum, it becomes the
    values."""
    begin, end = _begin_end(row, window)
    weight = tl.load(row).to(tl.pointer_type(BITS))
    values = tl.load(row + 2).to(tl.pointer_type(BITS))
    stash = tl.load(row + 3).to(tl.pointer_type(BITS))
    parts = tl.load(row + 7)
    positions, wide = tl.load(row + 1), tl.load(row + 5)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        mask = at < end
        where = _positions(positions, at, mask, wide)
        if KEEP:
            old = tl.load(weight + where, mask=mask, other=0)
            tl.store(stash + at, old, mask=mask)
        new = tl.load(values + at, mask=mask, other=0)
        if SUMS:
            if parts != 0:
                new = _sum(parts, at, mask, old, tl.load(row + 8), overflow, BITS)
                tl.store(values + at, new, mask=mask)
        tl.store(weight + where, new, mask=mask)


@triton.jit
def _wide(bits, kind, BITS: tl.constexpr):
    """The float32 value of the bits of a dtype."""
    if BITS == tl.int32:
        number = bits.to(tl.float32, bitcast=True)
    elif kind == _FLOAT16:
        number = bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        number = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return number


@triton.jit
def _rounded(number, kind, BITS: tl.constexpr):
    """The bits of a float32 in a dtype, rounded to nearest, ties to even."""
    if BITS == tl.int32:
        bits = number.to(tl.int32, bitcast=True)
    elif kind == _FLOAT16:
        bits = number.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        whole = number.to(tl.uint32, bitcast=True)
        half = (whole + 0x7FFF + ((whole >> 16) & 1)) >> 16
        bits = tl.where(number != number, 0x7FC0, half).to(tl.uint16).to(tl.int16, bitcast=True)
    return bits


@triton.jit
def _sum(parts, at, mask, old, kind, overflow, BITS: tl.constexpr):
    """base + Σ α · (value − base), in float32, in the order of the adapters, rounded once (`reference.write_sums_`).

    Where only one adapter has an entry, with strength 1, the result has the bits of its value.
    parts: the address of int64 [1 + 4 * adapters]: the number of adapters; then for each adapter the address of its values, the
    address of its places (int32: where an entry's value is among them; -1: nowhere), the bits of α, and whether α is 1.
    overflow: set to 1 if a result is not finite.
    """
    parts = parts.to(tl.pointer_type(tl.int64))
    base = _wide(old, kind, BITS)
    total = tl.zeros_like(base)
    count = tl.zeros_like(at)
    exact = count != 0
    alone = old
    for number in range(tl.load(parts)):
        part = parts + 1 + 4 * number
        place = tl.load(tl.load(part + 1).to(tl.pointer_type(tl.int32)) + at, mask=mask, other=-1)
        holds = place >= 0
        value = tl.load(tl.load(part).to(tl.pointer_type(BITS)) + place, mask=holds, other=0)
        strength = tl.load(part + 2).to(tl.int32).to(tl.float32, bitcast=True)
        total = tl.where(holds, total + strength * (_wide(value, kind, BITS) - base), total)
        alone = tl.where(holds, value, alone)
        exact = tl.where(holds, tl.load(part + 3) != 0, exact)
        count += holds.to(tl.int64)
    new = tl.where((count == 1) & exact, alone, _rounded(base + total, kind, BITS))
    result = _wide(new, kind, BITS)
    if tl.max((mask & ((result != result) | (tl.abs(result) == float("inf")))).to(tl.int32), 0) != 0:
        tl.store(overflow, 1)
    return new


@triton.jit
def _window(
    leaving, coming, window, live, overflow, BITS: tl.constexpr, MODE: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr
):
    if MODE == "restore":
        if live:
            _put_back(leaving, window, BITS, BLOCK)
    else:
        if MODE == "change":
            _put_back(leaving, window, BITS, BLOCK)
            tl.debug_barrier()  # every thread of this program must see the restored base
        _put(coming, window, overflow, BITS, MODE != "write", SUMS, BLOCK)


@triton.jit(do_not_specialize=["switch"])
def change(
    leaving,
    coming,
    windows,
    leaving_flag,
    coming_flag,
    overflow,
    switch,
    MODE: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One window of a switch.

    leaving, coming: tables of two plans, with the same weights in the same order.
    windows: int32 [programs, 2], the row and the window of each program.
    switch: the number that the coming plan's flag gets. With "restore": the number that the leaving plan's flag must have.
    MODE: "swap" fills the stash of the coming plan and writes it; "change" restores the leaving plan first; "write" only
    writes; "restore" only restores.
    """
    program = tl.program_id(0)
    row = tl.load(windows + 2 * program).to(tl.int64)
    window = tl.load(windows + 2 * program + 1).to(tl.int64)
    live = True
    if MODE == "restore":
        live = tl.load(leaving_flag) == switch
    elif MODE != "write":
        if program == 0:
            tl.store(coming_flag, switch)
            if MODE == "change":
                tl.store(leaving_flag, -1)
    leaving += row * _COLUMNS
    coming += row * _COLUMNS
    entry = tl.maximum(tl.load(leaving + 6), tl.load(coming + 6))
    if entry == 2:
        _window(leaving, coming, window, live, overflow, tl.int16, MODE, SUMS, BLOCK)
    elif entry == 4:
        _window(leaving, coming, window, live, overflow, tl.int32, MODE, SUMS, BLOCK)
    elif entry == 8:
        _window(leaving, coming, window, live, overflow, tl.int64, MODE, False, BLOCK)
    else:
        _window(leaving, coming, window, live, overflow, tl.int8, MODE, False, BLOCK)


@triton.jit
def overwrite(weight, indices, values, count, BLOCK: tl.constexpr):
    """weight[indices[i]] = values[i] for i < count."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    tl.store(weight + tl.load(indices + at, mask=mask, other=0), tl.load(values + at, mask=mask), mask=mask)
