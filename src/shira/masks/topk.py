"""Exact, deterministic top-k over the entries of one tensor, without sorting it."""

import torch
from torch import Tensor

from ..errors import MaskError

__all__ = ["top_k"]


def top_k(scores: Tensor, k: int) -> Tensor:
    """Positions of the k largest scores; among equal scores the first positions win.

    scores: any shape, floating point, no NaN. Returns int64 [k], sorted, flat in C order.
    Raises MaskError if k exceeds the number of entries, or if a score is NaN.
    """
    flat = scores.detach().reshape(-1)
    if not 0 <= k <= flat.numel():
        raise MaskError(f"{k} positions asked of {flat.numel()} entries")
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=flat.device)
    if bool(flat.isnan().any()):
        raise MaskError("scores hold NaN: the weights or their gradients do, check the model and the calibration data")
    threshold = flat.kthvalue(flat.numel() - k + 1).values
    above = (flat > threshold).nonzero().view(-1)
    equal = (flat == threshold).nonzero().view(-1)
    return torch.cat([above, equal[: k - above.numel()]]).sort().values
