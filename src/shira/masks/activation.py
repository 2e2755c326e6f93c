"""Wanda: the entries of largest magnitude times what flows through them."""

from torch import Tensor

from ..errors import MaskError
from ..sparse.topk import top_k

__all__ = ["wanda", "wanda_scores"]


def wanda(weight: Tensor, activations: Tensor, k: int, bottom: bool = False) -> Tensor:
    """Positions of the k entries with the largest |weight| · ‖input‖₂ (Wanda, arXiv 2306.11695; Super-Tuning, 2607.09287).

    The best are taken of the whole matrix, not of each row as Wanda prunes: a row may train more than another.

    weight: [out, in]. activations: [in], the 2-norm of each input feature over the calibration tokens; or [in, 1] for a
        weight [in, out].
    bottom: take the smallest instead. Returns int64 [k], sorted, flat in C order.
    Raises MaskError if the shapes do not belong together, or k exceeds the number of entries.
    """
    return top_k(wanda_scores(weight, activations, bottom), k)


def wanda_scores(weight: Tensor, activations: Tensor, bottom: bool = False) -> Tensor:
    """|weight[i, j]| · activations[j], negative for `bottom`, float32."""
    if weight.ndim != 2 or activations.shape not in (weight.shape[1:], (weight.shape[0], 1)):
        raise MaskError(
            f"wanda needs a matrix and one activation for each of its input features, found shapes {list(weight.shape)} and "
            f"{list(activations.shape)}"
        )
    scores = weight.detach().abs().float() * activations.to(weight.device).float()
    return -scores if bottom else scores
