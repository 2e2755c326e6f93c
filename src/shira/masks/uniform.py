"""Rand: positions drawn uniformly, without replacement, from a seed alone."""

import torch
from torch import Tensor

from ..errors import MaskError

__all__ = ["coin", "draw", "rand"]

ROUNDS = 6


def rand(weight: Tensor, k: int, seed: int = 0, avoid: Tensor | None = None) -> Tensor:
    """k positions drawn uniformly without replacement (SHiRA §3.1, B.2, arXiv 2406.13175).

    The paper draws each entry by itself (Bernoulli); given its count that is this draw, and the budget is kept exactly.
    Position i is the image of i under a keyed permutation of the entries (a Feistel network that walks its cycle back
    into range), so time and memory grow with k and not with the tensor, and only integer arithmetic is used: the same
    seed gives the same positions on every machine and in every release of torch.

    weight: any shape; only its shape matters. avoid: sorted flat positions that are not drawn; the draw is then of the
    others, numbered without gaps. Returns int64 [k], sorted, flat in C order.
    Raises MaskError if k exceeds the number of entries that may be drawn.
    """
    if avoid is None or avoid.numel() == 0:
        return draw(weight.numel(), k, seed).to(weight.device)
    drawn = draw(weight.numel() - avoid.numel(), k, seed).to(weight.device)
    before = avoid - torch.arange(avoid.numel(), device=avoid.device)  # how many that may be drawn lie before each
    return drawn + torch.searchsorted(before, drawn, right=True)


def draw(numel: int, k: int, seed: int) -> Tensor:
    """The positions of `rand` in a tensor of `numel` entries, int64 [k]."""
    if not 0 <= k <= numel:
        raise MaskError(f"{k} positions asked of {numel} entries")
    half = max(1, ((max(1, numel - 1)).bit_length() + 1) // 2)
    keys = _mix(torch.arange(1, ROUNDS + 1, device="cpu") * 0x632BE59BD9B4E019 + seed)
    drawn = _permute(torch.arange(k, device="cpu"), half, keys)
    outside = (drawn >= numel).nonzero().view(-1)
    while outside.numel():
        drawn[outside] = _permute(drawn[outside], half, keys)
        outside = outside[drawn[outside] >= numel]
    return drawn.sort().values


def coin(positions: Tensor, probability: float, seed: int) -> Tensor:
    """For each position [k], an integer, whether a coin falls on its head, with this probability, 0 to 1; bool [k].

    Position i gets the i-th word of SplitMix64 begun at `seed`; in integers only, so the same on every machine.
    """
    words = _mix(positions.long() * -0x61C8864680B583EB + seed)
    return _shift(words, 1) < round(probability * 2**63) if probability < 1 else torch.ones_like(words, dtype=torch.bool)


def _permute(position: Tensor, half: int, keys: Tensor) -> Tensor:
    """A keyed permutation of 0 … 2^(2·half) - 1."""
    low = (1 << half) - 1
    left, right = position >> half, position & low
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & low)
    return (left << half) | right


def _mix(word: Tensor) -> Tensor:
    """Scramble 64-bit words: the finalizer of SplitMix64 (Steele et al., 2014), on wrapping int64."""
    word = (word ^ _shift(word, 30)) * -0x40A7B892E31B1A47
    word = (word ^ _shift(word, 27)) * -0x6B2FB644ECCEEE15
    return word ^ _shift(word, 31)


def _shift(word: Tensor, bits: int) -> Tensor:
    """Logical shift right of int64 words."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)
