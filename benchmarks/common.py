"""Shared by all benchmarks: alternating runs, one JSON line for each setup, and a table and a plot at the end."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from experiments.palette import look
from rich.console import Console
from rich.table import Table

import shira

__all__ = ["TARGETS", "alternate", "busy_clock", "machine", "print_row", "show"]

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]  # the paper's, Table 9


def alternate(
    runs: dict[str, Callable[[], Any]],
    repeats: int,
    *,
    between: Callable[[str], Any] = lambda name: None,
    warmup: int = 1,
    wait: Callable[[], Any] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """The median time of each run, in seconds. The runs alternate, so that a slow period of the machine affects all of them.

    between(name) is called before each run and is not timed. wait() is called before the clock starts and before it stops.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(warmup + repeats):
        for name, run in runs.items():
            between(name)
            wait()
            start = clock()
            run()
            wait()
            seconds = clock() - start
            if repeat >= warmup:
                times[name].append(seconds)
    return {name: statistics.median(taken) for name, taken in times.items()}


def busy_clock() -> Callable[[], float]:
    """The clock for a machine that other work shares: this process's processor time, if torch has one thread.

    It stops while other programs run. With more threads it would count each of them, so then it is the usual clock.
    """
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def machine() -> dict[str, Any]:
    """The machine and the versions, on which all figures depend."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "shira": shira.__version__,
        "python": platform.python_version(),
    }


def print_row(bench: str, **figures: Any) -> dict[str, Any]:
    """Print the figures of one setup as one JSON line, and return them."""
    row = {"bench": bench, **figures}
    print(json.dumps(row | {"machine": machine()}), flush=True)
    return row


def show(title: str, rows: Sequence[dict[str, Any]], label: Callable[[dict[str, Any]], str], plot: Path | None) -> None:
    """Print a table of milliseconds, each with its ratio to the first figure of the row. plot: where to save a plot of them."""
    names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
    table = Table("setup", *names, title=f"{title}: ms (ratio to a row's first)")
    for row in rows:
        first = next(iter(row["ms"].values()))
        cells = [f"{row['ms'][n]:.2f} ({row['ms'][n] / first:.2f})" if n in row["ms"] else "" for n in names]
        table.add_row(label(row), *cells)
    Console(width=max(100, 22 + 18 * len(names))).print(table)
    if plot is not None:
        _plot(title, rows, label, plot)


def _plot(title: str, rows: Sequence[dict[str, Any]], label: Callable[[dict[str, Any]], str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = sum(len(row["ms"]) for row in rows)
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.2 * (bars + len(rows))), layout="constrained")
    place, ticks = 0.0, []
    for row in rows:
        ticks.append((place + (len(row["ms"]) - 1) / 2, label(row)))
        for name, length in row["ms"].items():
            method = "wm" if name.startswith("shira") else "lora" if "LoRA" in name else "base"
            axes.barh(place, length, 0.85, color=look(method)["color"])
            axes.text(length, place, f" {name}, {length:.3g}", va="center", fontsize=8)
            place += 1
        place += 1.5
    axes.set_yticks([middle for middle, _ in ticks], [text for _, text in ticks])
    shortest = min(length for row in rows for length in row["ms"].values())
    axes.set(xscale="log", xlabel="milliseconds (log scale)", title=title, xlim=(shortest / 2, None))
    axes.invert_yaxis()
    axes.margins(x=0.35, y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    print(f"plot: {path}")
