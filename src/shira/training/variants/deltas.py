"""A sparse product beside a layer: y = Q(x) + x · Sᵀ, for weights whose entries cannot be overwritten.

S holds the trained differences at the mask's positions. The quantized weight itself never changes.
"""

import torch
from torch import Tensor, nn

from ...kernels.sparse_product import SparseLayout
from ...sparse.tensor import Kind
from ...weights.quantized import shape_of
from ...weights.targets import Target
from ..following import Touched
from ..masters import Masters

__all__ = ["Deltas"]


class Deltas(Masters):
    """Differences [k], float32, divided by `scale`, that start at 0 and train beside a quantized weight."""

    kind: Kind = "delta"
    in_place = False

    def __init__(self, target: Target, indices: Tensor, scale: float = 1.0) -> None:
        super().__init__(target, indices)
        self.scale = scale
        self.values = nn.Parameter(torch.zeros(indices.numel(), dtype=torch.float32, device=indices.device))
        self.parameters = {"": self.values}
        self.layout = SparseLayout(indices, self.matrix_shape)

    def current(self) -> Tensor:
        return self.base.float() + self.differences()

    def differences(self) -> Tensor:
        return self.values if self.scale == 1 else self.values * self.scale

    def added(self, input: Tensor) -> Tensor:
        output: Tensor = self.layout.product(input, self.differences())
        return output

    def touched(self) -> Touched:
        return Touched(self.indices, self.base, self.differences().detach())

    def look(self, *, to_leave: bool = False) -> None:
        """Follow the weight: check its shape, and move positions and base values to its device.

        The weight may be stored in another way than before, since the kept base values do not depend on that.
        Raises TuningError if the weight was removed or has another shape.
        """
        if self.detached:
            return
        for holder, attribute, _ in self.uses:
            found = holder._parameters.get(attribute)
            if found is None or shape_of(found) != self.matrix_shape:
                self._refuse("was replaced", "put it back")
            self.weight = found
        if self.values.dtype is not torch.float32:
            self.put_back_to_float32()
        if self.indices.device != self.weight.device:
            entries, device = self.entries, self.weight.device
            self.entries = entries._replace(
                indices=entries.indices.to(device), earlier=entries.earlier.to(device), bits=entries.bits.to(device)
            )
            self.layout = SparseLayout(self.indices, self.matrix_shape)

    def write(self) -> None:
        """Nothing is written to the weight."""
        self.look()

    def restore(self) -> None:
        """There is nothing to restore: the weight has not changed."""
