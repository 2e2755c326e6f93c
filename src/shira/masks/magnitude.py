"""WM: the entries of largest magnitude."""

from torch import Tensor

from .topk import top_k

__all__ = ["wm"]


def wm(weight: Tensor, k: int) -> Tensor:
    """Positions of the k entries with the largest |weight| (SHiRA §3.1, B.3, arXiv 2406.13175).

    weight: any shape, any floating dtype. Returns int64 [k], sorted, flat in C order.
    Raises MaskError if k exceeds the number of entries.
    """
    return top_k(weight.detach().abs(), k)
