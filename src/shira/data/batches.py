"""Rows of tokens as batches for a language model: all rows end together, and logits are computed only where they count."""

import inspect
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from ..errors import DataError
from ..weights.modes import evaluating
from .tokens import IGNORED, Row

__all__ = [
    "BatchOrder",
    "answer_logprobs",
    "batches",
    "check_packing",
    "collate",
    "left_padded",
    "mean_loss",
    "random_batches",
    "row_losses",
    "to_device",
]


def left_padded(rows: Sequence[list[int]], pad: int) -> dict[str, Any]:
    """Token ids [rows, longest], padded on the left, with their attention mask and position ids.

    All rows end together, so logits are needed only at the last few places.
    """
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def last_places(count: int) -> Tensor:
    """The last places of a sequence, int64 [count], for `logits_to_keep`.

    With a number instead, Transformers slices, and the CPU copies the output layer's weight once for each row of the batch.
    """
    return torch.arange(-count, 0)


def check_places(model: nn.Module, needed: int) -> None:
    """Raise DataError if a model with learned places of tokens, such as GPT-2, has fewer than an example needs."""
    places = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(places, int) or needed <= places:
        return
    words = getattr(model, "get_input_embeddings", lambda: None)()
    learned = (each.num_embeddings for each in model.modules() if isinstance(each, nn.Embedding) and each is not words)
    if any(places <= count <= places + 2 for count in learned):  # the places of some begin at 2
        raise DataError(
            f"an example has {needed} tokens, and {type(model).__name__} has learned {places} places; shorten it, or "
            f"give max_length={places}"
        )


def takes(model: nn.Module, argument: str) -> bool:
    """Whether a model's forward names an argument. It may ignore an argument that it takes as **kwargs."""
    return argument in inspect.signature(model.forward).parameters


@torch.no_grad()
def answer_logprobs(model: nn.Module, rows: Sequence[tuple[list[int], ...]], pad: int = 0, longest: int = 0) -> list[Tensor]:
    """For each (prompt, answer) the log-probabilities at the answer's tokens, float32 [len(answer), vocabulary].

    A row that is longer than `longest` tokens, if given, loses its beginning.
    """
    inputs = left_padded([(prompt + answer[:-1])[-longest:] for prompt, answer in rows], pad)
    check_places(model, inputs["input_ids"].shape[1])
    kept = last_places(max(len(answer) for _, answer in rows))
    arguments = inputs | {"logits_to_keep": kept, "use_cache": False}
    logits = model(**to_device({key: value for key, value in arguments.items() if takes(model, key)}, model)).logits
    return [logits[row, -len(answer) :].float().log_softmax(-1) for row, (_, answer) in enumerate(rows)]


def collate(rows: Sequence[Row], model: nn.Module, pad: int = 0) -> dict[str, Any]:
    """One batch for a model.

    If the model can, logits and labels begin at the place before the first completion. Otherwise a small model would spend most
    of a step on logits over the prompts, which the loss does not count.
    Rows of several examples have position ids and no attention mask. Then Transformers does not let one example attend to
    another (`check_packing`).
    """
    batch: dict[str, Any] = left_padded([row["input_ids"] for row in rows], pad)
    longest = kept = batch["input_ids"].shape[1]
    # a row's first token cannot be predicted, because only padding comes before it
    labels = [[IGNORED] * (longest - len(row["labels"]) + 1) + row["labels"][1:] for row in rows]
    if takes(model, "logits_to_keep"):
        first = min((number for row in labels for number, label in enumerate(row) if label != IGNORED), default=longest)
        kept = min(kept, longest - first + 1)
        batch["logits_to_keep"] = last_places(kept)
    if any("position_ids" in row for row in rows):
        positions = [row["position_ids"] for row in rows]
        batch["position_ids"] = torch.tensor([[0] * (longest - len(row)) + row for row in positions])
        del batch["attention_mask"]
        batch["use_cache"] = False  # with a cache, position ids have another meaning
    check_places(model, max(max(row.get("position_ids", ()), default=len(row["input_ids"]) - 1) for row in rows) + 1)
    if not takes(model, "position_ids"):
        del batch["position_ids"]
    batch["labels"] = torch.tensor([row[longest - kept :] for row in labels])
    return batch


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Raise DataError if the first example of a packed row changes what the model computes for the next one."""
    rows = [[1, 2, 3, 4, 4, 4], [3, 1, 2, 4, 4, 4]]
    packed = [{"input_ids": row, "labels": row, "position_ids": [0, 1, 2, 0, 1, 2]} for row in rows]
    with evaluating(model):
        batch = to_device(collate(packed, model), model)
        one, other = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, 3:].float()
    tolerance = 1e-5 if next(model.parameters()).dtype == torch.float32 else 1e-2
    if not takes(model, "position_ids") or float((one - other).abs().max()) > tolerance * float(one.abs().max()):
        raise DataError(f"{type(model).__name__} mixes the examples of a packed row; train it without packing")


def batches(rows: Sequence[Row], model: nn.Module, size: int, pad: int = 0) -> list[dict[str, Any]]:
    """All rows in their order, as batches of `size` for a model. Calibration takes such a list."""
    return [collate(rows[start : start + size], model, pad) for start in range(0, len(rows), size)]


def random_batches(lengths: Sequence[int], size: int, drawn: random.Random) -> list[list[int]]:
    """All rows once, as numbers in batches of `size`: of similar length, which needs less padding, and in a random order.

    An order by length would be worse: in short trainings all long rows, often of one class, would come first.
    """
    order = drawn.sample(range(len(lengths)), len(lengths))
    pieces = [sorted(order[start : start + 8 * size], key=lengths.__getitem__) for start in range(0, len(order), 8 * size)]
    made = [piece[start : start + size] for piece in pieces for start in range(0, len(piece), size)]
    drawn.shuffle(made)
    return made


class BatchOrder(Sampler[int]):
    """The numbers of all rows, batch after batch as `random_batches` has them. Each pass over the data has a new order.

    lengths: tokens of each row. seed: every process of a distributed training gives the same one.
    passes: says how many passes were made before, by which a training that goes on gets the order that it had. Without it
        those of this object count.
    """

    def __init__(self, lengths: Sequence[int], size: int, seed: int, passes: Callable[[], int] | None = None) -> None:
        self._lengths, self._size, self._seed, self._passes = lengths, size, seed, passes
        self._drawn, self._done = random.Random(seed), 0  # passes that were drawn

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        before = self._done if self._passes is None else self._passes()
        if before < self._done:
            self._drawn, self._done = random.Random(self._seed), 0
        for _ in range(before + 1 - self._done):
            made = random_batches(self._lengths, self._size, self._drawn)
        self._done = before + 1
        made.sort(key=len, reverse=True)  # an incomplete batch comes last
        return itertools.chain.from_iterable(made)


def to_device(batch: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The batch with its tensors on the model's device."""
    device = next(model.parameters()).device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def mean_loss(
    model: nn.Module, rows: Sequence[Row], size: int, pad: int = 0, on_batch: Callable[[int, int], None] | None = None
) -> float:
    """The mean loss of all tokens that count, in nats; see `row_losses`."""
    found = row_losses(model, rows, size, pad, on_batch)
    return math.fsum(loss for loss, _ in found) / sum(count for _, count in found)


@torch.no_grad()
def row_losses(
    model: nn.Module, rows: Sequence[Row], size: int, pad: int = 0, on_batch: Callable[[int, int], None] | None = None
) -> list[tuple[float, int]]:
    """For each row (the sum of its tokens' losses in nats, the number of tokens that count), in evaluation mode.

    Batches have `size` rows of similar length, which need less padding. on_batch(rows done, rows in all) is called after each.
    """
    found = [(0.0, 0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"]))
    with evaluating(model):
        for start in range(0, len(rows), size):
            numbers = order[start : start + size]
            batch = to_device(collate([rows[number] for number in numbers], model, pad), model)
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1].float()
            losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
            sums, counts = losses.sum(1).tolist(), (labels != IGNORED).sum(1).tolist()
            for number, total, count in zip(numbers, sums, counts, strict=True):
                found[number] = total, count
            if on_batch is not None:
                on_batch(min(start + size, len(rows)), len(rows))
    return found
