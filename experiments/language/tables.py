"""Accuracies, their intervals and p-values, and Markdown tables."""

import math
import statistics
from collections.abc import Mapping, Sequence

from experiments.store import Key, Store

__all__ = [
    "Answers",
    "answers",
    "average",
    "chance",
    "difference",
    "markdown",
    "mean_answers",
    "points",
    "probability",
    "share",
]

Answers = Mapping[str, Sequence[float]]  # benchmark -> for each question, the share of seeds that answered it correctly


def mean_answers(scores: Sequence[Mapping[str, str]]) -> dict[str, list[float]]:
    """Benchmark -> for each question, the share of seeds that answered it correctly.

    scores: for each seed, benchmark -> one digit for each question, 1 if it was answered correctly.
    """
    return {
        task: [statistics.mean(map(int, digits)) for digits in zip(*(s[task] for s in scores), strict=True)]
        for task in scores[0]
    }


def answers(store: Store, scores: Sequence[Sequence[Key]]) -> Answers | None:
    """The answers of scores, those of each seed in a list of their own: a mean over the seeds whose scores are all there."""
    found = []
    for of_seed in scores:
        results = [store.get(key) for key in of_seed]
        if results and all(results):
            found.append({task: digits for result in results if result for task, digits in result["right"].items()})
    return mean_answers(found) if found else None


def average(answers: Answers) -> tuple[float, float]:
    """The mean of the benchmarks' means, all with the same weight, and its standard error over questions."""
    means = [statistics.fmean(found) for found in answers.values()]
    errors = [statistics.variance(found) / len(found) for found in answers.values()]
    return statistics.fmean(means), math.sqrt(sum(errors)) / len(means)


def difference(ours: Answers, others: Answers) -> tuple[float, float]:
    """The same as `average` for the difference of two methods, question by question (a paired test)."""
    return average({task: [a - b for a, b in zip(ours[task], others[task], strict=True)] for task in ours})


def chance(mean: float, error: float) -> float:
    """The probability of a mean this far from zero if the true mean is zero (two-sided z test; McNemar's for yes and no)."""
    return math.erfc(abs(mean) / error / math.sqrt(2)) if error else float(mean == 0)


def points(mean: float, error: float) -> str:
    """A difference in points, its 95 % interval, and its probability by chance: '+3.1 ± 1.0 (p 0.02)'."""
    return f"{100 * mean:+.1f} ± {196 * error:.1f} ({probability(mean, error)})"


def probability(mean: float, error: float) -> str:
    found = chance(mean, error)
    return "p < 0.001" if found < 0.001 else f"p {found:.3f}" if found < 0.01 else f"p {found:.2f}"


def share(mean: float, error: float) -> str:
    """A share in per cent with its 95 % interval: '45.1 ± 2.9'."""
    return f"{100 * mean:.1f} ± {196 * error:.1f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
