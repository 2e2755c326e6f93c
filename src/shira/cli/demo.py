"""shira demo: train, save, switch and fuse two adapters on a real model, in a few minutes."""

import dataclasses
import hashlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..data.models import SMOLLM2, model_path
from ..errors import ShiraError
from ..runs.recipes import PAPERS, Recipe, save_recipe, train_adapter
from .options import avoid_cudnn_attention
from .output import bytes_text, console, print_json, progress, waiting

if TYPE_CHECKING:
    from torch import nn

    from ..switching.ready import Selection
    from ..switching.switcher import Switcher

__all__ = ["demo"]

PAIR = ("spam", "questions")
# the examples, 960, have balanced labels
RECIPE = Recipe(
    model=SMOLLM2, targets=PAPERS, density=0.02, batch_size=4, steps=40, warmup=0.15, limit=960, license="Apache-2.0"
)
SWITCHES = 9  # timings of each switch; their median is shown


def demo(
    folder: Annotated[Path, typer.Option("--output", "-o", help="Where the adapters are saved.")] = Path("demo"),
    steps: Annotated[int, typer.Option(help="Training steps for each adapter.", min=1)] = RECIPE.steps,
    examples: Annotated[int, typer.Option(help="Held-out examples for each task.", min=1, max=300)] = 300,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train two adapters on SmolLM2-135M-Instruct-Q4_1; then switch one live model to each, to both, and back to the base.

    Example: shira demo --output /tmp/shira-demo
    """
    from ..adapter import load
    from ..data.tasks import TASKS
    from ..integrations.transformers import load_model, load_tokenizer
    from ..runs.evaluation import accuracy
    from ..switching.switcher import Switcher

    avoid_cudnn_attention()
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)

    with waiting("fetching model and data"):
        model_path(SMOLLM2)
        held_out = {task: TASKS[task].test()[:examples] for task in PAIR}
    model, tokenizer = load_model(SMOLLM2), load_tokenizer(SMOLLM2)
    before = digest(model)
    files = {task: folder / f"{task}.safetensors" for task in PAIR}
    for task, file in files.items():
        recipe = dataclasses.replace(RECIPE, data=task, steps=steps)
        with progress(f"training on {task}", steps) as update:
            adapter = train_adapter(recipe, model, tokenizer, on_step=lambda step, loss, _: update(step, f"loss {loss:.3f}"))  # noqa: B023
        adapter.save(file)
        save_recipe(recipe, file.with_suffix(".yaml"))
    if digest(model) != before:
        raise ShiraError("training left the base changed: this is a bug in shira, please report it")

    switcher = Switcher(model)
    for task, file in files.items():
        switcher.add(task, file)
    states: list[tuple[str, Selection]] = [("base", None), *((task, task) for task in PAIR)]
    states += [("both, fused", dict.fromkeys(PAIR, 1.0)), ("base again", None)]
    rows: list[dict[str, Any]] = []
    with progress("measuring accuracy", len(states) * len(PAIR) * examples) as update:
        done = 0
        for label, selection in states:
            other = None if selection is not None else switcher.active or None
            row: dict[str, Any] = {"active": label, "switch_ms": switch_milliseconds(switcher.use, selection, other)}
            row["changed"] = changed_entries(model, switcher, selection)
            for task in PAIR:
                row[task] = accuracy(
                    model,
                    tokenizer,
                    held_out[task],
                    on_progress=lambda n: update(done + n, label),  # noqa: B023
                )
                done += examples
            rows.append(row)
    for row in rows:
        if row["active"] in files:
            file = files[row["active"]]
            row["file_bytes"] = file.stat().st_size
            row["lora_bytes"] = 4 * load(file).nnz  # PEFT keeps and saves its parameters in float32
    base, both = rows[0], rows[len(PAIR) + 1]
    result = {
        "examples": examples,
        "rows": rows,
        "gains": {task: [row[task] - base[task], both[task] - base[task]] for task, row in zip(PAIR, rows[1:], strict=False)},
        "weights": sum(p.numel() for p in model.parameters()),
        "restored": digest(model) == before,
        "seconds": time.perf_counter() - started,
        "peak_memory_gb": peak_memory_gb(),
    }
    print_json(result) if as_json else print_result(result)
    if not result["restored"]:
        raise typer.Exit(1)


def switch_milliseconds(use: Callable[[Any], object], wanted: Any, before: Any) -> float:
    """The median time of `use(wanted)` after `use(before)`, in milliseconds."""
    times = []
    for _ in range(SWITCHES):
        use(before)
        start = time.perf_counter()
        use(wanted)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def changed_entries(model: "nn.Module", switcher: "Switcher", selection: "Selection") -> int:
    """The number of the model's weights that differ from the base's, on the live model. Afterwards the selection is active."""
    switcher.use(selection)
    now = {name: p.detach().clone() for name, p in model.named_parameters()}
    switcher.use(None)
    changed = sum(int((now[name] != p).sum()) for name, p in model.named_parameters())
    switcher.use(selection)
    return changed


def digest(model: "nn.Module") -> str:
    """SHA-256 over the bits of all parameters."""
    from ..sparse.tensor import bytes_of

    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        sha.update(name.encode())
        sha.update(bytes_of(parameter).cpu().numpy().data)
    return sha.hexdigest()


def print_result(result: dict[str, Any]) -> None:
    """Print the results as a table, and a few lines about them."""
    rows = result["rows"]
    table = Table(title=f"{SMOLLM2}, one live model, {result['examples']} held-out examples a task", title_justify="left")
    table.add_column("active", no_wrap=True)
    for column in (*(f"{task}\n%" for task in PAIR), "switch\nms", "weights\nchanged", "file\nsize", "LoRA\nfile"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["active"],
            *(f"{100 * row[task]:.1f}" for task in PAIR),
            "" if row is rows[0] else f"{row['switch_ms']:.1f}",
            f"{row['changed']:,}",
            bytes_text(row["file_bytes"]) if "file_bytes" in row else "",
            bytes_text(row["lora_bytes"]) if "lora_bytes" in row else "",
        )
    console.print(table)
    console.print(f"changed: weights that differ from the base, of {result['weights']:,}", highlight=False)
    half = bytes_text(rows[1]["lora_bytes"] // 2)
    console.print(f"LoRA file: as many parameters in float32, as PEFT saves them; in bfloat16 {half}", highlight=False)
    for task, (alone, fused) in result["gains"].items():
        kept = f", {fused / alone:.0%} of it" if alone > 0 else ""
        console.print(f"{task}: {100 * alone:+.1f} points alone, {100 * fused:+.1f} fused{kept}", highlight=False)
    print_end(result["restored"], result["seconds"])


def print_end(restored: bool, seconds: float) -> None:
    """Print whether the base is back, and what the run cost."""
    console.print(f"base back bit for bit: {'yes' if restored else 'NO, this is a bug'} (SHA-256 of all weights)")
    console.print(f"{seconds:.0f} s, peak memory {peak_memory_gb():.1f} GB", highlight=False)


def peak_memory_gb() -> float:
    """The peak memory of this process, in GB."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
