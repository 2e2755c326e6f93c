"""Measure a live model on data of any kind: accuracy where every example has choices, otherwise mean loss and perplexity."""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..data.batches import row_losses
from ..data.reading import examples_of
from ..data.tasks import Example
from ..data.tokens import Rows, encode
from .evaluation import predicted
from .significance import interval, mcnemar, paired_change

__all__ = ["Measured", "finite", "measure", "prediction_lines", "read", "summary"]

Outcome = dict[str, Any]  # of one example: "predicted" and "correct"; or "loss" (nan without tokens) and "tokens"
Score = Callable[..., Sequence[bool]]  # (model, tokenizer, examples, batch_size=, on_progress=) -> which are answered correctly


@dataclass(frozen=True)
class Measured:
    """Data to measure on. rows: their tokens; None if every example has choices."""

    name: str
    examples: Sequence[Example]
    rows: Rows | None

    @property
    def total(self) -> int:
        """How many steps of progress one measurement has."""
        return len(self.examples if self.rows is None else self.rows)


def read(
    name: str,
    tokenizer: Any,
    *,
    limit: int | None = None,
    max_length: int = 512,
    on_read: Callable[[int], None] = lambda done: None,
) -> Measured:
    """Data as `shira train` takes them, of a built-in task the held-out examples, ready to be measured on.

    on_read(done) is called after each example that is read, and again after each that is encoded.
    Raises what `data.reading.examples_of` and `data.tokens.encode` raise.
    """
    examples = []
    for done, example in enumerate(itertools.islice(examples_of(name, "test"), limit), start=1):
        examples.append(example)
        on_read(done)
    if all(example.choices for example in examples):
        return Measured(name, examples, None)
    return Measured(name, examples, encode(tokenizer, examples, max_length, on_read=on_read))


def measure(
    model: nn.Module,
    tokenizer: Any,
    data: Measured,
    *,
    batch_size: int = 32,
    score: Score | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Outcome]:
    """What the model, as it is now, makes of each example.

    score: another way to say which questions are answered correctly; nothing is then known of the answers.
    on_progress is called with the steps done, of `data.total`.
    """
    if data.rows is not None:
        pad = tokenizer.pad_token_id or 0
        found = row_losses(model, data.rows, batch_size, pad, lambda done, _: on_progress(done))
        sums, counts = [0.0] * len(data.examples), [0] * len(data.examples)
        for number, (loss, count) in zip(data.rows.examples.tolist(), found, strict=True):
            sums[number] += loss
            counts[number] += count
        return [
            {"loss": loss / count if count else math.nan, "tokens": count} for loss, count in zip(sums, counts, strict=True)
        ]
    options: dict[str, Any] = {"batch_size": batch_size, "on_progress": on_progress}
    if score is not None:
        return [{"correct": right} for right in score(model, tokenizer, data.examples, **options)]
    numbers = predicted(model, tokenizer, data.examples, **options)
    return [
        {"predicted": example.choices[number], "correct": number == example.label}
        for example, number in zip(data.examples, numbers, strict=True)
    ]


def summary(found: Sequence[Outcome], base: Sequence[Outcome] | None = None) -> dict[str, Any]:
    """What the outcomes of all examples say together, and how far they are from the base's.

    {"accuracy", "interval" (95 %), "p" (McNemar)}, accuracies from 0 to 1; or {"loss" (the mean of all tokens that count, in
    nats), "perplexity" (e to that power), "tokens", "change" (of the loss), "change_95" (half of its 95 % interval, nan for one
    example)}.
    """
    if "correct" in found[0]:
        right = [outcome["correct"] for outcome in found]
        told = {"accuracy": sum(right) / len(right), "interval": list(interval(sum(right), len(right)))}
        return told if base is None else told | {"p": mcnemar(right, [outcome["correct"] for outcome in base])}
    parts = _sums(found)
    tokens = sum(count for _, count in parts)
    loss = math.fsum(total for total, _ in parts) / tokens
    told = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "tokens": tokens}
    if base is not None:
        told["change"], told["change_95"] = paired_change(parts, _sums(base))
    return told


def _sums(found: Sequence[Outcome]) -> list[tuple[float, int]]:
    return [(outcome["loss"] * outcome["tokens"], outcome["tokens"]) for outcome in found if outcome["tokens"]]


def finite(outcome: Outcome) -> Outcome:
    """The same for JSON, which has no infinity and no nan: None in their place."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in outcome.items()}


def prediction_lines(data: Measured, found: Mapping[str, Sequence[Outcome]]) -> Iterator[str]:
    """One JSON line for each example: what was asked and expected, and what came out in each state ("base", "adapted")."""
    for number, example in enumerate(data.examples):
        line: dict[str, Any] = {
            "data": data.name,
            "number": number + 1,
            "prompt": example.prompt,
            "expected": example.completion,
        }
        if example.messages:
            line["prompt"], line["expected"] = example.messages[: example.first], example.messages[example.first :]
        if example.choices:
            line["choices"] = example.choices
        yield json.dumps(line | {state: finite(outcomes[number]) for state, outcomes in found.items()}, ensure_ascii=False)
