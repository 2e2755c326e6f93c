"""Is a difference more than chance? Intervals of an accuracy and of a change of the loss, and McNemar's test."""

import math
from collections.abc import Sequence

__all__ = ["interval", "mcnemar", "paired_change"]

Z = 1.96  # half the width of a 95 % interval, in standard deviations


def paired_change(ours: Sequence[tuple[float, int]], others: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """How far our mean loss is from others' on the same examples, and half the width of its 95 % interval; nan for one example.

    Each example is (the sum of its tokens' losses, the number of tokens). The tokens of an example depend on each other, so
    the interval counts examples: it is that of a ratio of two sums.
    """
    tokens = sum(count for _, count in ours)
    apart = [(mine - theirs, count) for (mine, count), (theirs, _) in zip(ours, others, strict=True)]
    change = math.fsum(difference for difference, _ in apart) / tokens
    if len(apart) < 2:
        return change, math.nan
    square = math.fsum((difference - change * count) ** 2 for difference, count in apart)
    return change, Z * math.sqrt(square * len(apart) / (len(apart) - 1)) / tokens


def interval(right: int, asked: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of the share right / asked: (low, high)."""
    share, square = right / asked, Z * Z
    middle = (share + square / (2 * asked)) / (1 + square / asked)
    half = Z / (1 + square / asked) * math.sqrt(share * (1 - share) / asked + square / (4 * asked * asked))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(ours: Sequence[bool], others: Sequence[bool]) -> float:
    """The p-value of McNemar's exact test, two-sided: whether two methods differ on the same questions.

    It is the probability of a difference at least this large if both are equally good. Only questions count that exactly one of
    the two methods answers correctly.
    """
    ours_only = sum(a and not b for a, b in zip(ours, others, strict=True))
    others_only = sum(b and not a for a, b in zip(ours, others, strict=True))
    apart = ours_only + others_only
    tail = sum(math.comb(apart, n) for n in range(min(ours_only, others_only) + 1))
    return min(1.0, 2 * tail / (1 << apart))
