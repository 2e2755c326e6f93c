"""Whole rows or columns among the positions of one matrix, whose gradient is cheaper to compute.

The gradient of whole rows or columns is a thin dense product. The gradient of each other entry, if there are few, is the sum
of an elementwise product of two columns. Positions without whole lines use `sampled_gradient`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..sparse.positions import Direction

__all__ = ["WholeLines", "find_whole_lines"]


@dataclass(frozen=True, eq=False)
class WholeLines:
    """The positions of a matrix [out, in]: whole lines, and the rest.

    direction: whether lines are rows or columns.
    lines: int64 [l], the numbers of the whole rows or columns, at least one.
    rest_rows, rest_columns: int64 [d], the coordinates of the other positions. on_diagonal: whether the two are equal.
    order: [k], in the dtype of the positions: the place of each position in a list of all positions in lines, then the rest.
    """

    direction: Direction
    lines: Tensor
    rest_rows: Tensor
    rest_columns: Tensor
    on_diagonal: bool
    order: Tensor

    @property
    def keeps_columns_only(self) -> bool:
        """Whether the gradient needs only the columns `lines` of the input."""
        return self.direction == "columns" and not self.rest_rows.numel()

    def keep(self, input: Tensor) -> Tensor:
        """The part of an input [..., in] that the gradient needs."""
        return input.index_select(-1, self.lines) if self.keeps_columns_only else input

    def gradient(self, grad_output: Tensor, input: Tensor) -> Tensor:
        """The weight gradient at the positions: (grad_outputᵀ · input) there, float32 [k].

        grad_output: [tokens, out]. input: what `keep` returns for the input [tokens, in].
        """
        if self.direction == "rows":
            product = grad_output.index_select(1, self.lines).T @ input  # [l, in]
        else:
            columns = input if self.keeps_columns_only else input.index_select(1, self.lines)
            product = grad_output.T @ columns  # [out, l]
        if not self.rest_rows.numel():
            return product.reshape(-1).float()
        return torch.cat([product.reshape(-1).float(), self._rest(grad_output, input)]).index_select(0, self.order)

    def _rest(self, grad_output: Tensor, input: Tensor) -> Tensor:
        if self.on_diagonal:  # slices are views, so neither input is copied
            length = min(grad_output.shape[1], input.shape[1])
            products = grad_output[:, :length] * input[:, :length]
            return products.sum(0, dtype=torch.float32)[self.rest_rows]
        products = grad_output.index_select(1, self.rest_rows) * input.index_select(1, self.rest_columns)
        return products.sum(0, dtype=torch.float32)

    def to(self, device: torch.device) -> "WholeLines":
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("lines", "rest_rows", "rest_columns", "order")}
        return replace(self, **moved)


def find_whole_lines(indices: Tensor, rows: int, columns: int) -> WholeLines | None:
    """The whole lines among sorted flat positions [k] in a matrix [rows, columns]; None if they do not pay.

    They pay if they hold at least half of the positions, and at most max(rows, columns) positions are outside them.
    """
    row, column = indices.long() // columns, indices.long() % columns
    ways: tuple[tuple[Direction, Tensor, int, int], ...] = (("rows", row, rows, columns), ("columns", column, columns, rows))
    for direction, line, count, length in ways:
        whole = torch.bincount(line, minlength=count) == length
        lines = whole.nonzero().view(-1)
        in_lines = whole[line]
        others = indices.numel() - lines.numel() * length
        if lines.numel() and others <= min(max(rows, columns), indices.numel() // 2):
            rest = in_lines.logical_not().nonzero().view(-1)
            rest_rows, rest_columns = row[rest], column[rest]
            order = torch.cat([in_lines.nonzero().view(-1), rest]).argsort().to(indices.dtype)
            return WholeLines(direction, lines, rest_rows, rest_columns, torch.equal(rest_rows, rest_columns), order)
    return None
