"""LIFT: the entries that are largest in the best low-rank approximation of the weight."""

import torch
from torch import Tensor

from ..errors import MaskError
from ..sparse.topk import top_k

__all__ = ["best_of_rank", "lift", "lift_scores"]

OVERSAMPLED = 16  # columns that the sketch has in addition to the rank
ROUNDS = 4  # power iterations; several, because the singular values of trained weights fall slowly


def lift(weight: Tensor, k: int, seed: int = 0, rank: int | None = None) -> Tensor:
    """Positions of the k entries with the largest |best rank-r approximation of weight| (LIFT, arXiv 2506.00772).

    weight: [out, in], any floating dtype.
    seed: that of the randomized SVD. The same seed gives the same positions on the same machine, and nearly the same on others.
    rank: r. The default is the authors' 128, but at most an eighth of the shorter side.
    Returns int64 [k], sorted, flat in C order.
    Raises MaskError unless the weight is a finite matrix, the rank is from 1 to its shorter side, and k entries exist.
    """
    return top_k(lift_scores(weight, seed, rank), k)


def lift_scores(weight: Tensor, seed: int = 0, rank: int | None = None) -> Tensor:
    """|best rank-r approximation of weight|, float32."""
    if weight.ndim != 2 or not bool(torch.isfinite(weight).all()):
        kind = "matrix" if weight.ndim != 2 else "finite matrix: the weight holds NaN or infinity"
        raise MaskError(f"lift needs a {kind}, found shape {list(weight.shape)}")
    shorter = min(weight.shape)
    rank = max(1, min(128, shorter // 8)) if rank is None else rank
    if not 1 <= rank <= shorter:
        raise MaskError(f"rank must be from 1 to {shorter} for shape {list(weight.shape)}, found {rank}")
    return best_of_rank(weight.detach().float(), rank, seed).abs()


def best_of_rank(weight: Tensor, rank: int, seed: int) -> Tensor:
    """The best approximation of that rank, by randomized SVD with power iterations (Halko et al., arXiv 0909.4061).

    weight: float32 [out, in]. If the sketch would be as wide as its shorter side, a full SVD gives the exact result.
    Returns float32 [out, in].
    """
    if rank + OVERSAMPLED >= min(weight.shape):
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        best: Tensor = (left[:, :rank] * values[:rank]) @ right[:rank]
        return best
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(weight.shape[1], rank + OVERSAMPLED, generator=generator, dtype=torch.float32, device="cpu").to(
        weight.device
    )
    basis = torch.linalg.qr(weight @ sketch).Q  # [out, rank + OVERSAMPLED]
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    best = (basis @ (left[:, :rank] * values[:rank])) @ right[:rank]
    return best
