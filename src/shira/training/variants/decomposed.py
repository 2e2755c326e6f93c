"""Entries of a weight that train as those of a magnitude and a direction: SHiRA-WM-DoRA (§5.3.1, Table 2, arXiv 2406.13175).

DoRA (arXiv 2402.09353) writes a weight as m · V / ‖V‖, with a magnitude m for each output and the norms of V's rows taken for
constants in the backward pass. The paper trains "by masking a high-rank DoRA with a WM mask …, thus changing only 1 % of the
model during both training and inference": where the mask is, the weight has DoRA's entries, everywhere else its own. So the
outcome is a plain adapter, and nothing is lost on the way.
"""

import torch
from torch import Tensor, nn

from ... import kernels
from ...weights.targets import Target
from ..masters import Masters
from .factors import Factors, row_blocks

__all__ = ["Decomposed"]


class Decomposed(Masters):
    """The entries m · V / ‖V‖ at the mask's positions, V = W + upᵀ · down; or, without a rank, V = W except at the mask's
    positions, where its entries are free, at the price of a plain adapter."""

    def __init__(self, target: Target, indices: Tensor, rank: int | None, seed: int) -> None:
        super().__init__(target, indices)
        self.factors = Factors(self.matrix, rank, seed, self.weight.device) if rank is not None else None
        if self.factors is None:
            self.own = {"": nn.Parameter(self.base.to(torch.float32, copy=True))}
        else:  # the base's entries and the product take their place
            self.own = self.factors.parameters()
        self.followed()
        self.magnitude = self.own["_magnitude"] = nn.Parameter(self.norms.clone())

    def current(self) -> Tensor:
        return self._direction() * (self.magnitude / self.norms)[self._line()]  # exactly the base's while nothing has changed

    def write(self) -> None:
        self.look()
        if self.version != self.written or self.may_have_stepped:
            self.norms = self._norms()
        super().write()

    def followed(self) -> None:
        self.fixed = self._squares(self.weight.new_zeros(self.indices.numel())) if self.factors is None else None
        self.norms = self._norms()

    def _line(self) -> Tensor:
        """The output of each position."""
        positions, columns = self.indices.long(), self.matrix[1]
        return positions % columns if self.outputs else positions // columns

    def _direction(self) -> Tensor:
        return self.own[""] if self.factors is None else self.base.float() + self.factors.at(self.indices)

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """‖V‖ of each output, float32."""
        if self.fixed is None:
            squares = self._squares(self.base)
        else:
            squares = self.fixed.index_add(0, self._line(), self._direction().detach().double().square())
        return squares.sqrt().float().clamp_(min=torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def _squares(self, there: Tensor) -> Tensor:
        """Σ (W + upᵀ · down)² of each output, W with the entries `there` at the mask's positions, float64."""
        squares = torch.zeros(self.matrix[self.outputs], dtype=torch.float64, device=self.weight.device)
        whole = self.weight.detach().view(self.matrix)
        for rows, places in row_blocks(self.matrix, self.indices):
            block = whole[rows].float().contiguous() if whole.dtype != torch.float32 else whole[rows].clone()
            kernels.overwrite_(block, self.indices[places] - rows.start * self.matrix[1], there[places].float())
            if self.factors is not None:
                block += self.factors.up[:, rows].T @ self.factors.down
            if self.outputs:
                squares += block.double().square_().sum(0)
            else:
                squares[rows] = block.double().square_().sum(1)
        return squares
