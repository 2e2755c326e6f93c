"""shira eval: measure accuracy with and without adapters."""

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..data.commonsense import COMMONSENSE
from ..data.tasks import TASKS
from ..errors import DataError
from .fuse import Density, Drop, MethodName, Seed, method_options
from .output import cell, console, parse_adapter, print_json, progress, waiting

if TYPE_CHECKING:
    from ..data.tasks import Example
    from ..fusion.strengths import Strength

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder, a hub id, or SmolLM2-135M-Instruct.")],
    data: Annotated[
        list[str],
        typer.Option(
            help="JSONL or Parquet (prompt, choices, label), a data set, or a task: "
            f"{', '.join([*TASKS, *COMMONSENSE])}. May be given more than once."
        ),
    ],
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", "-a", help="FILE or FILE=STRENGTH; several are fused.", show_default=False)
    ] = None,
    method: MethodName = "sum",
    density: Density = None,
    drop: Drop = None,
    seed: Seed = None,
    harness: Annotated[
        bool,
        typer.Option("--harness", help="Let EleutherAI's lm-eval score; a choice of several words then counts by its length."),
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Use this many examples at most.", show_default="all", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="The number of answers that are scored at a time.", min=1)] = 32,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure accuracy on held-out examples, with a 95 % interval: without adapters and, if adapters are given, with them.

    p: the probability of so large a difference from the base by chance (McNemar's exact test, on the same questions).

    Example: shira eval SmolLM2-135M-Instruct --data spam -a spam.safetensors -a film.safetensors=0.5 --method mean
    """
    from ..adapter import load
    from ..data.reading import examples_of
    from ..integrations.transformers import load_model, load_tokenizer
    from ..runs.evaluation import answered, mcnemar
    from ..switching.switcher import Switcher

    options = method_options(method, density=density, drop=drop, seed=seed)
    adapters = {path: (load(path), strength) for path, strength in map(parse_adapter, adapter or [])}
    if len(adapters) < len(adapter or []):
        raise DataError("one adapter is given twice; give it once, with the sum of its strengths")
    examples = {name: list(islice(examples_of(name, "test"), limit)) for name in data}
    with waiting("loading the model"):
        loaded, tokenizer = load_model(model, dtype), load_tokenizer(model)
    switcher = Switcher(loaded)
    for path, (content, _) in adapters.items():
        switcher.add(path, content)
    states: dict[str, dict[str, Strength] | None] = {"base": None}
    if adapters:
        states[" + ".join(adapter or [])] = {path: strength for path, (_, strength) in adapters.items()}
    measure = _by_harness if harness else answered
    results: list[dict[str, Any]] = []
    base: dict[str, Sequence[bool]] = {}
    for label, selection in states.items():
        switcher.use(selection, method, **options)
        row: dict[str, Any] = {"active": label} | ({} if selection is None else {"p": {}})
        for name, chosen in examples.items():
            sequences = sum(len(example.choices) for example in chosen)
            with progress(f"{label}: {name}"[-28:], sequences if harness else len(chosen)) as update:
                right = measure(loaded, tokenizer, chosen, batch_size=batch_size, on_progress=update)
            row[name] = sum(right) / len(right)
            if selection is not None:
                row["p"][name] = mcnemar(right, base[name])
            base.setdefault(name, right)
        results.append(row)
    if as_json:
        counts = {name: len(chosen) for name, chosen in examples.items()}
        print_json({"model": model, "method": switcher.method, "examples": counts, "accuracy": results})
        return
    title = "accuracy, %" if method == "sum" else f"accuracy, %; fused by {method}"
    table = Table("active", *(f"{cell(name)} ({len(chosen)})" for name, chosen in examples.items()), title=title)
    for row in results:
        table.add_row(
            cell(row["active"]),
            *(_cell(row[name], len(chosen), row.get("p", {}).get(name)) for name, chosen in examples.items()),
        )
    console.print(table)


def _cell(share: float, asked: int, p: float | None) -> str:
    from ..runs.evaluation import interval

    low, high = interval(round(share * asked), asked)
    return f"{100 * share:.1f} ({100 * low:.0f}-{100 * high:.0f})" + ("" if p is None else f", p {p:.2g}")


def _by_harness(model: Any, tokenizer: Any, examples: "Sequence[Example]", **options: Any) -> Sequence[bool]:
    from ..integrations import lm_eval

    (score,) = lm_eval.evaluate(model, tokenizer, [lm_eval.task_of("data", examples)], **options)
    return score.right
