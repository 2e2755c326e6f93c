"""EleutherAI's evaluation harness on a live model: every method gets the same questions, prompts and scores.

Built-in data become tasks of the harness, read from local files. The harness's own tasks are taken by name, where a hub can be
reached.
"""

import functools
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data.batches import answer_logprobs
from ..data.packages import cache_folder
from ..data.tasks import Example
from ..errors import DataError, MissingExtra
from ..files.tensorfiles import write_whole
from ..weights.modes import evaluating

__all__ = ["TaskScore", "evaluate", "hide_output", "library", "task_of"]

KINDS = ("likelihood", "generated")
FEW = 26  # the most choices that are searched for in what a model writes


@dataclass(frozen=True)
class TaskScore:
    """The result for one task: for each question, in order, whether it was answered correctly."""

    task: str
    right: tuple[bool, ...]


def task_of(name: str, examples: Sequence[Example], *, kind: str = "likelihood") -> dict[str, Any]:
    """A task of the harness, made from examples with choices. Its questions are written to a file in the user cache.

    kind: "likelihood": the answer is the most probable choice (the harness's acc). If choices have several words, it is the
        most probable one for its length in characters (acc_norm). "generated": the answer is what the model writes up to the
        end of the line. If all questions have the same few choices, the first choice that the line mentions counts; otherwise
        the line must be the choice.
    Raises DataError if an example has no choices, or for another kind.
    """
    if kind not in KINDS:
        raise DataError(f"kind must be one of {', '.join(KINDS)}, found {kind!r}")
    if not examples or any(len(e.choices) < 2 or not 0 <= e.label < len(e.choices) for e in examples):
        raise DataError(f"task {name!r} needs examples with 'choices' and 'label'")
    rows = [
        {"prompt": e.prompt, "choices": list(e.choices), "label": e.label, "answer": e.choices[e.label].strip()}
        for e in examples
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    folder = cache_folder() / "harness"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
    if not path.exists():
        write_whole(path, text.encode())
    common = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "target_delimiter": "",
        "metadata": {"version": 1},
    }
    if kind == "likelihood":
        metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
        return common | {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "label",
            "metric_list": metrics,
        }
    choices = {choice.strip() for example in examples for choice in example.choices}
    found = {"function": "regex", "regex_pattern": _mentioned(choices) if len(choices) <= FEW else r"\S.*"}
    return common | {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": min(64, max(16, *map(len, choices))), "do_sample": False},
        "filter_list": [{"name": "answer", "filter": [found, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}],
    }


def _mentioned(choices: Iterable[str]) -> str:
    """A pattern for any of these as whole words. Case counts only if one is a single letter, because "A" is not "a"."""
    longest_first = sorted(choices, key=lambda choice: (-len(choice), choice))
    either_case = "" if len(longest_first[-1]) == 1 else "(?i)"
    return rf"{either_case}(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)"


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[dict[str, Any] | str],
    *,
    limit: int | None = None,
    batch_size: int = 16,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[TaskScore]:
    """Scores of a model in evaluation mode, with its active adapters: one a task, from `task_of` or by the harness's name.

    limit: the number of questions of each task. on_progress is called with the number of sequences scored.
    Raises MissingExtra; or DataError if a task does not score each question as right or wrong.
    """
    harness = library()
    with evaluating(model):
        live = _live()(model, tokenizer, batch_size, on_progress)
        # not simple_evaluate, because that runs pip and git for seconds to describe the machine
        manager = harness.tasks.TaskManager(include_defaults=any(isinstance(task, str) for task in tasks))
        loaded = manager.load(list(tasks))
        found = harness.evaluator.evaluate(live, loaded, limit=limit, bootstrap_iters=0, log_samples=True, verbosity="ERROR")
    return [TaskScore(task, _right(task, samples)) for task, samples in found["samples"].items()]


def _right(task: str, samples: list[dict[str, Any]]) -> tuple[bool, ...]:
    single = all(len(str(choice).split()) == 1 for sample in samples for choice in sample["doc"].get("choices", [""]))
    for metric in ("acc", "acc_norm", "exact_match") if single else ("acc_norm", "acc", "exact_match"):
        if metric in samples[0]:
            return tuple(bool(sample[metric]) for sample in sorted(samples, key=lambda sample: sample["doc_id"]))
    raise DataError(f"task {task!r} has none of the metrics acc, acc_norm and exact_match")


def _live() -> Any:
    """A subclass of the harness's model that computes logits only at the answers' places."""
    from lm_eval.models.huggingface import HFLM

    class Live(HFLM):  # type: ignore[misc]
        def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int, on_progress: Callable[[int], None]) -> None:
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
            self.on_progress = on_progress

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
            """The log-probability of each continuation, and whether greedy decoding gives it.

            Continuations of one token after the same context are read from one forward pass.
            """
            groups: dict[tuple[Any, ...], list[int]] = {}
            for number, (_texts, context, continuation) in enumerate(requests):
                groups.setdefault((*context, None, *(continuation if len(continuation) > 1 else ())), []).append(number)
            passes = sorted(groups.values(), key=lambda members: -len(requests[members[0]][1]) - len(requests[members[0]][2]))
            answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
            done = 0
            for start in range(0, len(passes), self.batch_size):
                batch = passes[start : start + self.batch_size]
                chances = answer_logprobs(self.model, [requests[members[0]][1:] for members in batch], longest=self.max_length)
                totals, greedy = [], []
                for members, after in zip(batch, chances, strict=True):
                    wanted = torch.tensor([requests[number][2] for number in members], device=after.device)
                    totals.append(after.gather(-1, wanted.T).sum(0))
                    greedy.append((after.argmax(-1) == wanted).all(1))
                found = zip(torch.cat(totals).tolist(), torch.cat(greedy).tolist(), strict=True)  # waits for a GPU once
                for number, answer in zip(itertools.chain(*batch), found, strict=True):
                    answers[number] = answer
                done += sum(map(len, batch))
                self.on_progress(done)
            return answers

    return Live


def hide_output() -> None:
    """Hide the bars of the harness and of datasets, and the harness's warnings, which do not apply.

    For commands, which show progress of their own: it holds for the whole process, to its end.
    """
    import tqdm

    tqdm.tqdm.__init__ = functools.partialmethod(vars(tqdm.tqdm)["__init__"], disable=True)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def library() -> Any:
    """The harness. Raises MissingExtra if it is not installed."""
    try:
        import lm_eval
        import lm_eval.evaluator
        import lm_eval.tasks
    except ImportError as error:
        raise MissingExtra(f"this needs lm-eval: pip install 'shira-adapters[eval]' ({error})") from error
    return lm_eval
