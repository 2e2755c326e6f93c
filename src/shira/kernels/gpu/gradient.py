"""The weight gradient at a mask's positions on a GPU, in Triton. Importing this module imports Triton. ops.py calls it.

There are two ways, neither of which holds the whole gradient. products.py says when each is faster.
"""

import triton
import triton.language as tl

__all__ = ["blocks", "sampled"]


@triton.jit
def sampled(grad_rows, input_rows, indices, out, tokens, columns, count, POSITIONS: tl.constexpr, TOKENS: tl.constexpr):
    """One dot product for each position: out[i] = Σ_t grad_rows[row, t] · input_rows[column, t], in float32.

    grad_rows: [rows, tokens], input_rows: [columns, tokens], both contiguous: the transposed inputs, so that a dot product
    reads consecutive memory. indices: [count], sorted, so that the positions of one program mostly share a row.
    """
    at = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    mask = at < count
    where = tl.load(indices + at, mask=mask, other=0).to(tl.int64)
    row = where // columns
    left = grad_rows + (row * tokens)[:, None]
    right = input_rows + ((where - row * columns) * tokens)[:, None]
    total = tl.zeros([POSITIONS, TOKENS], dtype=tl.float32)
    for first in range(0, tokens, TOKENS):
        token = first + tl.arange(0, TOKENS)[None, :]
        inside = mask[:, None] & (token < tokens)
        a = tl.load(left + token, mask=inside, other=0.0).to(tl.float32)
        total += a * tl.load(right + token, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, tl.sum(total, 1), mask=mask)


@triton.jit
def blocks(
    grad_output,
    input,
    indices,
    starts,
    out,
    tokens,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of the dense product. The tile stays in registers, and only the positions in it are stored.

    grad_output: [tokens, rows], input: [tokens, columns], contiguous.
    starts: int64 [blocks of rows + 1], where the positions of each block begin among the sorted indices. A block without
    positions is skipped.
    WIDEN: multiply in float32. Triton's interpreter needs it, because its product reads the bits of bfloat16 as integers.
    """
    block = tl.program_id(1)
    begin, end = tl.load(starts + block), tl.load(starts + block + 1)
    if begin < end:
        row = block * ROWS + tl.arange(0, ROWS)[None, :]
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for first in range(0, tokens, TOKENS):
            token = first + tl.arange(0, TOKENS)[:, None]
            inside = token < tokens
            token = token.to(tl.int64)
            a = tl.load(grad_output + token * rows + row, mask=inside & (row < rows), other=0.0)
            b = tl.load(input + token * columns + column, mask=inside & (column < columns), other=0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
        tile = tl.reshape(total, [ROWS * COLUMNS])
        corner = block.to(tl.int64) * ROWS * columns
        for first in range(begin, end, CHUNK):
            at = first + tl.arange(0, CHUNK)
            mask = at < end
            where = (tl.load(indices + at, mask=mask, other=0).to(tl.int64) - corner).to(tl.int32)
            in_row = where // columns
            in_column = where - in_row * columns - tl.program_id(0) * COLUMNS
            mine = mask & (in_column >= 0) & (in_column < COLUMNS)
            place = tl.where(mine, in_row * COLUMNS + in_column, 0)
            tl.store(out + at, tl.gather(tile, place, 0), mask=mine)
