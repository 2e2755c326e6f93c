"""Block and N:M: a regular pattern, within which any score chooses."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import MaskError
from ..sparse.topk import top_k
from .scores import Score, call_score, find_score

__all__ = ["block", "nm"]


def block(weight: Tensor, k: int, size: int = 16, by: str | Score = "wm", **inputs: Any) -> Tensor:
    """Positions of the size × size blocks with the largest mean score (SMT, arXiv 2405.15525).

    SMT scores by |gradient|: by="grad". Blocks are taken from the best one down, until the next does not fit. So the mask has
    more than k − size² and at most k entries. Blocks at the right and lower edge may be smaller. Among equals the first win.

    weight: [out, in]. by: a name from `masks.SCORES` or a function like them, which gets the inputs that it names.
    Returns int64 [at most k], sorted, flat in C order. Raises MaskError if the first block exceeds the budget.
    """
    if weight.ndim != 2 or size < 1:
        raise MaskError(f"block needs a matrix and a size of at least 1, found shape {list(weight.shape)} and size {size}")
    size = min(size, max(weight.shape))
    scores = _scores(by, weight, inputs)
    counts = _block_sums(torch.ones(weight.shape, dtype=torch.float32, device=weight.device), size)
    means = _block_sums(scores, size) / counts
    order = means.view(-1).sort(descending=True, stable=True).indices
    sizes = counts.view(-1)[order].long()
    within = order[sizes.cumsum(0) <= k]
    if not within.numel():
        first = int(sizes[0])
        raise MaskError(
            f"the first block of {size} x {size} has {first} entries, but the budget is {k}; use a smaller size, or a density "
            f"of at least {first / weight.numel():.4f}"
        )
    chosen = torch.zeros(means.numel(), dtype=torch.bool, device=weight.device)
    chosen[within] = True
    whole = chosen.view(means.shape).repeat_interleave(size, 0).repeat_interleave(size, 1)
    return whole[: weight.shape[0], : weight.shape[1]].reshape(-1).nonzero().view(-1)


def nm(weight: Tensor, k: int, n: int = 2, m: int = 4, by: str | Score = "wm", **inputs: Any) -> Tensor:
    """Positions of the k largest scores with at most n in each m consecutive entries of a row (N:M, arXiv 2104.08378).

    Groups are entries 0 … m−1, m … 2m−1, … of a row; the last group may be shorter. If n / m is near the density, the budget
    is spread evenly. If it is far above the density, the pattern hardly limits the choice. Among equal scores the first
    positions win.

    weight: at least one dimension; the last is the row. by: a name from `masks.SCORES` or a function like them.
    Returns int64 [k], sorted, flat in C order. Raises MaskError if the pattern has no room for k.
    """
    if not 1 <= n <= m or weight.ndim < 1:
        raise MaskError(f"an N:M mask needs 1 ≤ n ≤ m and a tensor with rows, found n={n}, m={m}, shape {list(weight.shape)}")
    scores = _scores(by, weight, inputs)
    columns = scores.shape[-1]
    groups = pad(scores.reshape(-1, columns), (0, -columns % m), value=-torch.inf).view(-1, m)
    rank = groups.sort(descending=True, stable=True).indices
    kept = torch.zeros(groups.shape, dtype=torch.bool, device=weight.device).scatter_(1, rank[:, :n], True)
    candidates = kept.view(-1, columns + -columns % m)[:, :columns].reshape(-1).nonzero().view(-1)
    if k > candidates.numel():
        raise MaskError(
            f"{n}:{m} has room for {candidates.numel()} of {weight.numel()} entries, but the budget is {k}; use a density "
            f"of at most {candidates.numel() / weight.numel():.4f}, or a larger n"
        )
    return candidates[top_k(scores.reshape(-1)[candidates], k)]


def _scores(by: str | Score, weight: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Scores of the weight's shape, float32. Raises MaskError if they have another shape or type, or hold NaN."""
    scores = call_score(find_score(by), {"weight": weight} | inputs)
    if not isinstance(scores, Tensor) or scores.shape != weight.shape or not scores.is_floating_point():
        found = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise MaskError(f"a score must be floating point and of the weight's shape {list(weight.shape)}, found {found}")
    scores = scores.detach().float()
    if bool(scores.max().isnan()):
        raise MaskError("scores hold NaN: the weights or their gradients do, check the model and the calibration data")
    return scores


def _block_sums(scores: Tensor, size: int) -> Tensor:
    """Sums over size × size blocks of a matrix, smaller at the edges: float32 [rows of blocks, columns of blocks]."""
    rows, columns = scores.shape
    padded = pad(scores, (0, -columns % size, 0, -rows % size))
    return padded.view(-1, size, padded.shape[1] // size, size).sum((1, 3))
