"""Entries of a weight that train as a magnitude and a direction: SHiRA-WM-DoRA (§5.3.1, Table 2, arXiv 2406.13175).

DoRA (arXiv 2402.09353) writes a weight as m · V / ‖V‖, with one magnitude m for each output. In the backward pass the norms of
V's rows are constants. The paper trains "by masking a high-rank DoRA with a WM mask …, thus changing only 1 % of the model
during both training and inference": at the mask's positions the weight has DoRA's entries, everywhere else its own. So the
result is a plain adapter, and nothing that was trained is lost.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ... import kernels
from ...weights.targets import Target
from ..following import Entries
from ..masters import Masters
from .factors import Factors, row_blocks

__all__ = ["Decomposed"]


class Decomposed(Masters):
    """The entries m · V / ‖V‖ at the mask's positions.

    With a rank, V = W + upᵀ · down. Without one, V = W except at the mask's positions, where V's entries train freely. That
    costs about as much as a plain adapter.
    """

    def __init__(self, target: Target, indices: Tensor, rank: int | None, seed: int) -> None:
        super().__init__(target, indices)
        self.factors = Factors(self.matrix_shape, rank, seed, self.weight.device) if rank is not None else None
        if self.factors is None:
            self.parameters = {"": nn.Parameter(self.base.to(torch.float32, copy=True))}
        else:  # no free entries: the direction is the base's entries plus the product
            self.parameters = self.factors.parameters()
        self.followed()
        self.magnitude = self.parameters["_magnitude"] = nn.Parameter(self.norms.clone())

    def current(self) -> Tensor:
        return self._direction() * (self.magnitude / self.norms)[self._line()]  # the quotient is exactly 1 until m changes

    @torch.no_grad()
    def entries_of(self, parameters: Mapping[str, Tensor]) -> Tensor | None:
        if self.factors is not None:
            return None
        other = copy.copy(self)
        other.parameters = {ending: parameter.float() for ending, parameter in parameters.items()}  # type: ignore[misc]
        other.magnitude = other.parameters["_magnitude"]
        other.norms = other._norms()
        return other.current()

    def write(self) -> None:
        self.look()
        if self.version != self.written or self.may_have_stepped:
            self.norms = self._norms()
        super().write()

    def _check_entries(self, weight: Tensor, entries: Entries) -> None:
        if self.version != self.written:  # as after loading a state_dict that holds weights and masters
            self.norms = self._norms()
        super()._check_entries(weight, entries)

    def followed(self) -> None:
        self.fixed = self._squares(self.weight.new_zeros(self.indices.numel())) if self.factors is None else None
        self.norms = self._norms()

    def _line(self) -> Tensor:
        """The output that each position belongs to, int64 [k]."""
        positions, columns = self.indices.long(), self.matrix_shape[1]
        return positions % columns if self.output_dim else positions // columns

    def _direction(self) -> Tensor:
        return self.parameters[""] if self.factors is None else self.base.float() + self.factors.at(self.indices)

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
        """Σ (W + upᵀ · down)² of each output, float64. W has the entries `there` [k] at the mask's positions."""
        squares = torch.zeros(self.matrix_shape[self.output_dim], dtype=torch.float64, device=self.weight.device)
        whole = self.weight.detach().reshape(self.matrix_shape)
        for rows, places in row_blocks(self.matrix_shape, self.indices):
            block = whole[rows].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            kernels.overwrite_(block, self.indices[places] - rows.start * self.matrix_shape[1], there[places].float())
            if self.factors is not None:
                block += self.factors.up[:, rows].T @ self.factors.down
            if self.output_dim:
                squares += block.double().square_().sum(0)
            else:
                squares[rows] = block.double().square_().sum(1)
        return squares
