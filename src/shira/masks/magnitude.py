"""WM: the entries of largest (or smallest) magnitude."""

from torch import Tensor

from ..sparse.topk import top_k

__all__ = ["wm", "wm_scores"]


def wm(weight: Tensor, k: int, bottom: bool = False) -> Tensor:
    """Positions of the k entries with the largest |weight| (SHiRA §3.1, B.3, arXiv 2406.13175).

    bottom: take the smallest instead (as Super-Tuning does, arXiv 2607.09287).
    weight: any shape, any floating dtype. Returns int64 [k], sorted, flat in C order.
    Raises MaskError if k exceeds the number of entries.
    """
    return top_k(wm_scores(weight, bottom), k)


def wm_scores(weight: Tensor, bottom: bool = False) -> Tensor:
    """|weight|, or −|weight| for `bottom`, float32."""
    magnitude = weight.detach().abs().float()
    return -magnitude if bottom else magnitude
