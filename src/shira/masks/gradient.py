"""Grad, SNIP and Fisher: the entries that the calibration loss is most sensitive to."""

from torch import Tensor

from ..sparse.topk import top_k

__all__ = ["fisher", "fisher_scores", "grad", "grad_scores", "snip", "snip_scores"]


def grad(gradient: Tensor, k: int) -> Tensor:
    """Positions of the k entries with the largest |gradient| (SHiRA §3.1, B.4, arXiv 2406.13175).

    gradient: that of the loss summed over the calibration batches, any shape, any floating dtype.
    Returns int64 [k], sorted, flat in C order. Raises MaskError if k exceeds the number of entries.
    """
    return top_k(grad_scores(gradient), k)


def grad_scores(gradient: Tensor) -> Tensor:
    """|gradient|, float32."""
    return gradient.detach().abs().float()


def snip(weight: Tensor, gradient: Tensor, k: int) -> Tensor:
    """Positions of the k entries with the largest |weight · gradient| (SHiRA §3.1, B.5, arXiv 2406.13175; SNIP, 1810.02340).

    weight, gradient: the same shape, any floating dtype; scores are computed in float32.
    Returns int64 [k], sorted, flat in C order. Raises MaskError if k exceeds the number of entries.
    """
    return top_k(snip_scores(weight, gradient), k)


def snip_scores(weight: Tensor, gradient: Tensor) -> Tensor:
    """|weight · gradient|, float32."""
    return (weight.detach().float() * gradient.detach().float()).abs_()


def fisher(squared_gradient: Tensor, k: int) -> Tensor:
    """Positions of the k entries with the largest mean squared gradient (FISH, arXiv 2111.09839; RoSA, 2401.04679).

    The score is the empirical Fisher information. Unlike in `grad`, gradients of different sign do not cancel. FISH takes the
    mean over single examples: pass batches of one example for that. Larger batches are cheaper, and noise cancels within each
    batch.

    squared_gradient: the square of each calibration batch's gradient, mean over the batches; float32, any shape.
    Returns int64 [k], sorted, flat in C order. Raises MaskError if k exceeds the number of entries.
    """
    return top_k(fisher_scores(squared_gradient), k)


def fisher_scores(squared_gradient: Tensor) -> Tensor:
    """The mean squared gradient, float32."""
    return squared_gradient.detach().float()
