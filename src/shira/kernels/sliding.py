"""How a convolution's kernel slides over images."""

import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Sliding"]


class Sliding(NamedTuple):
    """The kernel's size, and its steps, all as (down, across), as in torch.nn.Conv2d."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def places(self, sides: Sequence[int]) -> list[int]:
        """The sides of the output of images with these sides."""
        each = zip(sides, *self, strict=True)
        return [(side + 2 * padding - far * (kernel - 1) - 1) // stride + 1 for side, kernel, stride, padding, far in each]

    def phases(self) -> tuple[int, ...]:
        """How many parts of the input, of every stride-th place, the kernel's places meet."""
        return tuple(min(kernel, stride // math.gcd(stride, far)) for kernel, stride, _, far in zip(*self, strict=True))

    def reach(self) -> tuple[int, ...]:
        """How many places of such a part lie between the kernel's first and last place."""
        return tuple((kernel - 1) * far // stride for kernel, stride, _, far in zip(*self, strict=True))
