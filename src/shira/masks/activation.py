"""Wanda: the entries whose magnitude times the norm of their input is largest."""

from torch import Tensor

from ..errors import MaskError
from ..sparse.topk import top_k

__all__ = ["wanda", "wanda_scores"]


def wanda(weight: Tensor, activations: Tensor, k: int, bottom: bool = False) -> Tensor:
    """Positions of the k entries with the largest |weight| · ‖input‖₂ (Wanda, arXiv 2306.11695; Super-Tuning, 2607.09287).

    The k best are chosen from the whole matrix, so one row may train more entries than another. (Wanda prunes row by row.)

    weight: [out, in]. activations: [in], the 2-norm of each input feature over the calibration tokens; or [in, 1] for a
        weight [in, out].
    bottom: take the smallest instead. Returns int64 [k], sorted, flat in C order.
    Raises MaskError if the shapes do not match, or if k exceeds the number of entries.
    """
    return top_k(wanda_scores(weight, activations, bottom), k)


def wanda_scores(weight: Tensor, activations: Tensor, bottom: bool = False) -> Tensor:
    """|weight| times the norm of each entry's input feature, float32, the weight's shape; negated for `bottom`."""
    if weight.ndim != 2 or activations.shape not in (weight.shape[1:], (weight.shape[0], 1)):
        raise MaskError(
            f"wanda needs a matrix and one activation for each of its input features, found shapes {list(weight.shape)} and "
            f"{list(activations.shape)}"
        )
    scores = weight.detach().abs().float() * activations.to(weight.device).float()
    return -scores if bottom else scores
