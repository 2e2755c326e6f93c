"""Rand: positions drawn uniformly, without replacement, from a seed alone."""

import torch
from torch import Tensor

from ..sparse.positions import draw

__all__ = ["rand"]


def rand(weight: Tensor, k: int, seed: int = 0, avoid: Tensor | None = None) -> Tensor:
    """k positions drawn uniformly without replacement (SHiRA §3.1, B.2, arXiv 2406.13175).

    The paper draws each entry independently (Bernoulli). For a given number of entries both distributions are the same; here
    that number is exactly k.
    Position i is the image of i under a keyed permutation of the entries: a Feistel network, applied again while the image is
    out of range. So time and memory grow with k and not with the tensor. Only integer arithmetic is used, so the same seed
    gives the same positions on every machine and in every release of torch.

    weight: any shape; only its shape matters. avoid: sorted flat positions that are not drawn. The draw is then among the
        others, numbered without gaps.
    Returns int64 [k], sorted, flat in C order.
    Raises MaskError if k exceeds the number of entries that may be drawn.
    """
    if avoid is None or avoid.numel() == 0:
        return draw(weight.numel(), k, seed).to(weight.device)
    drawn = draw(weight.numel() - avoid.numel(), k, seed).to(weight.device)
    before = avoid - torch.arange(avoid.numel(), device=avoid.device)  # how many entries that may be drawn come before each
    return drawn + torch.searchsorted(before, drawn, right=True)
