"""shira eval: measure a model with and without adapters: accuracy, or the loss."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..data.commonsense import COMMONSENSE
from ..data.tasks import TASKS
from ..errors import DataError
from .adapters import Adapters, given_adapters
from .options import Density, Drop, Dtype, MethodName, Seed, check_new, method_options
from .output import cell, console, print_json, progress, waiting

if TYPE_CHECKING:
    from ..data.tasks import Example
    from ..fusion.strengths import Strength
    from ..runs.measuring import Measured

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder, a hub id, or SmolLM2-135M-Instruct-Q4_1.")],
    data: Annotated[
        list[str],
        typer.Option(
            help="Anything that `shira train --data` takes, or a built-in task: "
            f"{', '.join([*TASKS, *COMMONSENSE])}. May be given more than once."
        ),
    ],
    adapter: Adapters = None,
    method: MethodName = "sum",
    density: Density = None,
    drop: Drop = None,
    seed: Seed = None,
    harness: Annotated[
        bool,
        typer.Option("--harness", help="Let EleutherAI's lm-eval score; a choice of several words then counts by its length."),
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Use this many examples at most.", show_default="all", min=1)] = None,
    max_length: Annotated[int, typer.Option(help="For losses, an example has this many tokens at most.", min=2)] = 512,
    batch_size: Annotated[int, typer.Option(help="The number of examples or answers that are scored at a time.", min=1)] = 32,
    predictions: Annotated[
        Path | None,
        typer.Option(
            help="A new file, out.jsonl: what was asked, expected and found, one line for each example.", show_default=False
        ),
    ] = None,
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure held-out examples without adapters and, if adapters are given, with them.

    Where every example has choices: accuracy with its 95 % interval; p is McNemar's exact test against the base.

    Other data: the mean loss of a token in nats, its change from the base with a 95 % interval, and perplexity, e^loss.

    Example: shira eval SmolLM2-135M-Instruct-Q4_1 --data spam -a spam.safetensors -a film.safetensors=0.5 --method mean
    """
    from ..files.tensorfiles import write_whole
    from ..runs.live import check_files, load_live
    from ..runs.measuring import finite, measure, prediction_lines, read, summary

    options = method_options(method, density=density, drop=drop, seed=seed)
    strengths = given_adapters(adapter or [])
    files = {file: file for file in strengths}
    check_files(files, strengths)
    if len(set(data)) < len(data):
        raise DataError("--data: the same data are given twice")
    if predictions is not None:
        check_new(predictions, "--predictions")
    if harness:
        from ..integrations import lm_eval

        lm_eval.library()  # raises its error before a model is loaded
        lm_eval.hide_output()
    from ..integrations.transformers import load_tokenizer

    tokenizer = load_tokenizer(model)
    found = []
    for name in data:
        with progress(f"reading {name}"[:28], None) as update:
            found.append(
                read(name, tokenizer, limit=limit, max_length=max_length, on_read=lambda done: update(done, "examples"))  # noqa: B023
            )
    for each in found:
        if harness and each.rows is not None:
            raise DataError(f"--harness asks questions: {each.name} needs 'choices' and 'label' in every example")
    with waiting("loading the model"):
        loaded, switcher = load_live(model, files, dtype)
    states: dict[str, dict[str, Strength]] = {"base": {}} | ({"adapted": strengths} if strengths else {})
    labels = {"base": "base", "adapted": " + ".join(adapter or [])}
    outcomes: dict[str, dict[str, Any]] = {each.name: {} for each in found}
    for state, selection in states.items():
        switcher.use(selection, method, **options)
        for each in found:
            total = sum(len(example.choices) for example in each.examples) if harness else each.total
            with progress(f"{state}: {each.name}"[:28], total) as update:
                outcomes[each.name][state] = measure(
                    loaded, tokenizer, each, batch_size=batch_size, score=_by_harness if harness else None, on_progress=update
                )
    results = [
        {"active": labels[state], "data": each.name, "examples": len(each.examples)}
        | summary(outcomes[each.name][state], outcomes[each.name]["base"] if state != "base" else None)
        for state in states
        for each in found
    ]
    if predictions is not None:
        lines = [line for each in found for line in prediction_lines(each, outcomes[each.name])]
        write_whole(predictions, ("\n".join(lines) + "\n").encode())
    if as_json:
        print_json({"model": model, "method": switcher.method, "results": list(map(finite, results))})
        return
    _print(results, found, method)
    if predictions is not None:
        console.print(f"{cell(predictions)}: {len(lines):,} examples", highlight=False)


def _print(results: Sequence[dict[str, Any]], found: "Sequence[Measured]", method: str) -> None:
    fused = "" if method == "sum" else f"; fused by {method}"
    _print_table(f"accuracy, %{fused}", [row for row in results if "accuracy" in row], _accuracy)
    _print_table(f"mean loss of a token, nats{fused}", [row for row in results if "loss" in row], _loss)
    for each in found:
        if each.rows is not None and each.rows.dropped:
            console.print(
                f"{cell(each.name)}: {each.rows.dropped:,} examples have no token that counts: left out", highlight=False
            )
        if each.rows is not None and each.rows.shortened:
            console.print(
                f"{cell(each.name)}: {each.rows.shortened:,} examples lost their beginning (--max-length)", highlight=False
            )


def _print_table(title: str, results: Sequence[dict[str, Any]], told: Callable[[dict[str, Any]], str]) -> None:
    """One row for each state, one column for each data set; nothing if there are no results of this kind."""
    columns = dict.fromkeys(f"{cell(row['data'])} ({row['examples']})" for row in results)
    if columns:
        table = Table("active", *columns, title=title)
        for start in range(0, len(results), len(columns)):
            state = results[start : start + len(columns)]
            table.add_row(cell(state[0]["active"]), *map(told, state))
        console.print(table)


def _accuracy(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{100 * row['accuracy']:.1f} ({100 * low:.0f}-{100 * high:.0f})" + (f", p {row['p']:.2g}" if "p" in row else "")


def _loss(row: dict[str, Any]) -> str:
    change = f"\nchange {row['change']:+.3f}" if "change" in row else ""
    interval = f" ± {row['change_95']:.3f}" if change and math.isfinite(row["change_95"]) else ""
    return f"{row['loss']:.3f} (perplexity {row['perplexity']:.4g}){change}{interval}"


def _by_harness(model: Any, tokenizer: Any, examples: "Sequence[Example]", **options: Any) -> Sequence[bool]:
    from ..integrations import lm_eval

    (score,) = lm_eval.evaluate(model, tokenizer, [lm_eval.task_of("data", examples)], **options)
    return score.right
