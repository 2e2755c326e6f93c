"""Where the positions of one matrix lie, and the cheapest way to their gradient: whole rows or columns are a thin dense
product, a few scattered entries are sums of products of two columns, all else is `sampled_gradient`."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Pattern", "find_pattern"]


@dataclass(frozen=True, eq=False)
class Pattern:
    """The positions of a matrix [out, in] as whole lines and the rest.

    lines: int64 [l], the whole rows, or the whole columns; empty if there are none.
    rest_rows, rest_columns: int64 [d], the coordinates of the other positions; on_diagonal: whether these agree.
    order: int64 [k], where each position is among first the lines', then the rest's.
    """

    direction: Literal["rows", "columns"]
    lines: Tensor
    rest_rows: Tensor
    rest_columns: Tensor
    on_diagonal: bool
    order: Tensor

    @property
    def keeps_columns_only(self) -> bool:
        """Whether the gradient needs no more of the input than the columns `lines`."""
        return self.direction == "columns" and not self.rest_rows.numel()

    def gradient(self, grad_output: Tensor, input: Tensor) -> Tensor:
        """The weight gradient at the positions: (grad_outputᵀ · input) there, float32 [k].

        grad_output: [tokens, out]; input: [tokens, in], or [tokens, l] where `keeps_columns_only`.
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
        if self.on_diagonal:  # views of both, no copy
            length = min(grad_output.shape[1], input.shape[1])
            products = grad_output[:, :length] * input[:, :length]
            return products.sum(0, dtype=torch.float32)[self.rest_rows]
        products = grad_output.index_select(1, self.rest_rows) * input.index_select(1, self.rest_columns)
        return products.sum(0, dtype=torch.float32)

    def to(self, device: torch.device) -> "Pattern":
        """The same on another device."""
        rest_rows, rest_columns = self.rest_rows.to(device), self.rest_columns.to(device)
        return Pattern(self.direction, self.lines.to(device), rest_rows, rest_columns, self.on_diagonal, self.order.to(device))


def find_pattern(indices: Tensor, rows: int, columns: int) -> Pattern | None:
    """The pattern of sorted flat positions [k] in a matrix [rows, columns], if whole lines make up most of it and the rest
    is at most about a diagonal; else None."""
    row, column = indices.long() // columns, indices.long() % columns
    for direction, own, sides, length in (("rows", row, rows, columns), ("columns", column, columns, rows)):
        whole = torch.bincount(own, minlength=sides) == length
        lines = whole.nonzero().view(-1)
        in_lines = whole[own]
        others = indices.numel() - lines.numel() * length
        if lines.numel() and others <= min(max(rows, columns), indices.numel() // 2):
            rest = in_lines.logical_not().nonzero().view(-1)
            rest_rows, rest_columns = row[rest], column[rest]
            order = torch.cat([in_lines.nonzero().view(-1), rest]).argsort().to(indices.dtype)
            kind: Literal["rows", "columns"] = "rows" if direction == "rows" else "columns"
            return Pattern(kind, lines, rest_rows, rest_columns, torch.equal(rest_rows, rest_columns), order)
    return None
