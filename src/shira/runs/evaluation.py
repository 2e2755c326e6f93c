"""Accuracy on multiple choice: the model's answer is the choice with the highest probability."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..data.batches import answer_logprobs
from ..data.tasks import Example
from ..errors import DataError

__all__ = ["accuracy", "answered", "choice_scores", "predicted"]


def accuracy(model: nn.Module, tokenizer: Any, examples: Sequence[Example], **options: Any) -> float:
    """Share of examples that are answered correctly, 0 to 1; see `answered`."""
    right = answered(model, tokenizer, examples, **options)
    return sum(right) / len(right)


def answered(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    batch_size: int = 32,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[bool]:
    """For each example, whether its most probable choice is the right one; see `predicted`."""
    found = predicted(model, tokenizer, examples, batch_size=batch_size, on_progress=on_progress)
    return [number == example.label for number, example in zip(found, examples, strict=True)]


def predicted(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    batch_size: int = 32,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[int]:
    """For each example the number of its most probable choice.

    on_progress is called with the number of examples done. Raises DataError if there are no examples, or if one has fewer than
    two choices or no valid label.
    """
    if not examples:
        raise DataError("no example to evaluate on")
    if any(len(example.choices) < 2 or not 0 <= example.label < len(example.choices) for example in examples):
        raise DataError("evaluation needs examples with 'choices' and 'label'")
    # texts of similar length in one batch need less padding
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
    found = [0] * len(examples)
    done = 0
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for i, scores in zip(batch, choice_scores(model, tokenizer, [examples[i] for i in batch]), strict=True):
            found[i] = max(range(len(scores)), key=scores.__getitem__)
        done += len(batch)
        on_progress(done)
    return found


def choice_scores(model: nn.Module, tokenizer: Any, examples: Sequence[Example]) -> list[list[float]]:
    """The log-probability of each choice after its prompt: the sum over the choice's tokens. One list for each example.

    A prompt whose choices are all single tokens runs once. Any other prompt runs once for each choice.
    """
    rows: list[tuple[list[int], list[int]]] = []  # (prompt tokens, answer tokens)
    shares: list[tuple[list[int], list[list[int]]]] = []  # for each example: its rows, its choices' tokens
    for example in examples:
        prompt = tokenizer(example.prompt)["input_ids"]
        if not prompt:
            raise DataError(f"{example.origin}: the prompt has no token, after which the choices could stand")
        choices = [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in example.choices]
        if all(len(choice) == 1 for choice in choices):
            shares.append(([len(rows)], choices))
            rows.append((prompt, choices[0]))
        else:
            shares.append((list(range(len(rows), len(rows) + len(choices))), choices))
            rows += [(prompt, choice) for choice in choices]
    logprobs = answer_logprobs(model, rows, tokenizer.pad_token_id or 0)
    scores = []
    for numbers, choices in shares:
        if len(numbers) == 1:
            scores.append([float(logprobs[numbers[0]][0, choice[0]]) for choice in choices])
        else:
            scores.append(
                [
                    float(sum(logprobs[number][i, token] for i, token in enumerate(choice)))
                    for number, choice in zip(numbers, choices, strict=True)
                ]
            )
    return scores
