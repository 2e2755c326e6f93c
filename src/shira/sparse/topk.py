"""Exact, deterministic top-k over the entries of one tensor, without a sort of the tensor."""

import torch
from torch import Tensor

from ..errors import MaskError

__all__ = ["top_k"]

SAMPLE = 2**16  # entries for a first guess of the threshold; smaller tensors need no guess


def top_k(scores: Tensor, k: int) -> Tensor:
    """Positions of the k largest scores. Among equal scores, the first positions are taken.

    scores: any shape, floating point, no NaN. Returns int64 [k], sorted, flat in C order.
    Raises MaskError if k exceeds the number of entries, or if a score is NaN.
    """
    flat = scores.detach().reshape(-1)
    if not 0 <= k <= flat.numel():
        raise MaskError(f"{k} positions asked of {flat.numel()} entries")
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=flat.device)
    if bool(flat.max().isnan()):
        raise MaskError("scores hold NaN: the weights or their gradients do, check the model and the calibration data")
    positions = _candidates(flat, k)
    candidates = flat[positions]
    threshold = candidates.kthvalue(candidates.numel() - k + 1).values
    above = positions[candidates > threshold]
    equal = positions[candidates == threshold]
    return torch.cat([above, equal[: k - above.numel()]]).sort().values


def _candidates(flat: Tensor, k: int) -> Tensor:
    """Sorted positions, at least k: those of the k largest scores, and of all scores equal to the smallest of these.

    They are those of all scores from a level on, which a sample suggests. If the sample misleads, they are all positions.
    """
    if flat.numel() > SAMPLE:
        sample = flat[:: flat.numel() // SAMPLE]
        rank = int(1.2 * k * sample.numel() / flat.numel()) + 16  # for somewhat more than k: the sample is not exact
        if rank < sample.numel() // 2:
            level = sample.kthvalue(sample.numel() - rank + 1).values
            positions = (flat >= level).nonzero().view(-1)
            if positions.numel() >= k:
                return positions
    return torch.arange(flat.numel(), device=flat.device)
