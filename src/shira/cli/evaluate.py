"""shira eval: accuracy with and without adapters."""

from itertools import islice
from typing import Annotated, Any

import typer
from rich.table import Table

from ..data.reading import examples_of
from ..evaluation import accuracy
from ..format import load
from ..strengths import Strength
from ..switching import Switcher
from .output import console, parse_adapter, print_json, progress, waiting

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder, a hub id, or SmolLM2-135M-Instruct.")],
    data: Annotated[
        list[str],
        typer.Option(help="JSONL or Parquet (prompt, choices, label), a data set, or a built-in task: spam, questions, film."),
    ],
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", "-a", help="FILE or FILE=STRENGTH; several are fused.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use this many examples at most (all).", min=1)] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Accuracy on held-out examples, of the base and, if adapters are given, with them.

    Example: shira eval SmolLM2-135M-Instruct --data spam --adapter spam.safetensors
    """
    from ..integrations.transformers import load_model, load_tokenizer

    adapters = {path: (load(path), strength) for path, strength in map(parse_adapter, adapter or [])}
    examples = {name: list(islice(examples_of(name, "test"), limit)) for name in data}
    with waiting("loading the model"):
        loaded, tokenizer = load_model(model, dtype), load_tokenizer(model)
    switcher = Switcher(loaded)
    for path, (content, _) in adapters.items():
        switcher.add(path, content)
    states: dict[str, dict[str, Strength] | None] = {"base": None}
    if adapters:
        states[" + ".join(adapter or [])] = {path: strength for path, (_, strength) in adapters.items()}
    results: list[dict[str, Any]] = []
    for label, selection in states.items():
        switcher.use(selection)
        row: dict[str, Any] = {"active": label}
        for name, chosen in examples.items():
            with progress(f"{label}: {name}"[-28:], len(chosen)) as update:
                row[name] = accuracy(loaded, tokenizer, chosen, batch_size=batch_size, on_progress=lambda n: update(n, ""))  # noqa: B023
        results.append(row)
    if as_json:
        print_json({"model": model, "examples": {name: len(chosen) for name, chosen in examples.items()}, "accuracy": results})
        return
    table = Table("active", *(f"{name} ({len(chosen)})" for name, chosen in examples.items()), title="accuracy, %")
    for row in results:
        table.add_row(row["active"], *(f"{100 * row[name]:.1f}" for name in examples))
    console.print(table)
