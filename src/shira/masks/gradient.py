"""Grad and SNIP: the entries that the calibration loss is most sensitive to."""

from torch import Tensor

from .topk import top_k

__all__ = ["grad", "grad_scores", "snip", "snip_scores"]


def grad(gradient: Tensor, k: int) -> Tensor:
    """Positions of the k entries with the largest |gradient| (SHiRA §3.1, B.4, arXiv 2406.13175).

    gradient: of the loss summed over the calibration batches, any shape, any floating dtype.
    Returns int64 [k], sorted, flat in C order. Raises MaskError if k exceeds the number of entries.
    """
    return top_k(grad_scores(gradient), k)


def grad_scores(gradient: Tensor) -> Tensor:
    """|gradient|, float32."""
    return gradient.detach().abs().float()


def snip(weight: Tensor, gradient: Tensor, k: int) -> Tensor:
    """Positions of the k entries with the largest |weight · gradient| (SHiRA §3.1, B.5, arXiv 2406.13175; SNIP, 1810.02340).

    weight, gradient: one shape, any floating dtype; scores are taken in float32.
    Returns int64 [k], sorted, flat in C order. Raises MaskError if k exceeds the number of entries.
    """
    return top_k(snip_scores(weight, gradient), k)


def snip_scores(weight: Tensor, gradient: Tensor) -> Tensor:
    """|weight · gradient|, float32."""
    return (weight.detach().float() * gradient.detach().float()).abs_()
