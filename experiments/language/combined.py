"""Tables 2 and 3: one adapter for all benchmarks. Every method has as many parameters, and its own learning rate."""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.palette import look
from experiments.store import Key, Store, number

from .plots import figure
from .runs import score_key, train_key
from .search import best_rate, losses, rates
from .settings import Recipe
from .tables import average, difference, markdown, mean_answers, points, share

__all__ = ["report", "wanted"]


def wanted(recipe: Recipe, store: Store) -> Iterator[Key]:
    """The wanted runs: the base's score; each method's learning rate search and score, on the first seed; then more seeds."""
    yield score_key(recipe, [], recipe["data"])
    first = recipe["seeds"][0]
    for name, method in recipe["methods"].items():
        searched = [train_key(recipe, method, rate, first) for rate in rates(recipe, method, store)]
        yield from searched
        if any(store.get(key) is None for key in searched):
            continue
        yield from scored(recipe, store, name, first)
    for seed in sorted({seed for seeds in recipe["more_seeds"].values() for seed in seeds}):
        for name in (name for name, seeds in recipe["more_seeds"].items() if seed in seeds):
            if best_rate(recipe, recipe["methods"][name], store) is not None:
                yield from scored(recipe, store, name, seed)


def scored(recipe: Recipe, store: Store, name: str, seed: int) -> Iterator[Key]:
    """The run of a method at its best learning rate, and its score."""
    rate = best_rate(recipe, recipe["methods"][name], store)
    assert rate is not None
    trained = train_key(recipe, recipe["methods"][name], rate, seed)
    yield trained
    if store.get(trained) is not None:
        yield score_key(recipe, [number(trained)], recipe["data"])


class Row(NamedTuple):
    """The results of a method over its seeds."""

    name: str
    rate: float
    tried: int  # learning rates
    seeds: int
    parameters: int
    file_bytes: int
    answers: dict[str, list[float]]
    averages: list[float]  # one for each seed
    validation_loss: float | None  # on the first seed; the learning rate was chosen by it
    text_loss: float


def summary(recipe: Recipe, store: Store) -> list[Row]:
    """A row for the base, and for each method that has been scored."""
    result = store.get(score_key(recipe, [], recipe["data"]))
    base = mean_answers([result["right"]]) if result else {}
    rows = [Row("base", 0, 0, 1, 0, 0, base, [average(base)[0]], None, result["text_loss"])] if result else []
    for name, method in recipe["methods"].items():
        rate = best_rate(recipe, method, store)
        if rate is None:
            continue
        trained = [train_key(recipe, method, rate, seed) for seed in recipe["seeds"] + recipe["more_seeds"].get(name, [])]
        scores = [store.get(score_key(recipe, [number(key)], recipe["data"])) for key in trained]
        made, scored = store.get(trained[0]), [score for score in scores if score is not None]
        if made is None or not scored:
            continue
        answers, loss = mean_answers([score["right"] for score in scored]), statistics.fmean(s["text_loss"] for s in scored)
        averages = [average(mean_answers([score["right"]]))[0] for score in scored]
        tried, sizes = losses(recipe, method, store), (made["parameters"], made["file_bytes"])
        rows.append(Row(name, rate, len(tried), len(scored), *sizes, answers, averages, tried[rate], loss))
    return rows


def report(recipe: Recipe, store: Store, plots: Path | None) -> str:
    """The table, in per cent with 95 % intervals, with each method's difference to the method compared with."""
    rows = summary(recipe, store)
    if not rows:
        return "no results yet"
    if plots is not None:
        path = plots / f"{store.path.stem}.png"
        if any(len(curve) > 1 for curve in curves(rows).values()):
            plot_curves(rows, path)
        else:
            plot(rows, path)
    against = next((row for row in rows if row.name == recipe["compare_with"]), None)
    tasks = list(rows[0].answers)
    head = [
        "method",
        "rate (tried)",
        "seeds",
        "millions",
        "file, MB",
        *tasks,
        "average",
        f"minus {recipe['compare_with']}",
        *(
            f"{what} without {left_out}"
            for left_out in recipe["without"]
            for what in ("average", f"minus {recipe['compare_with']}")
        ),
        "validation loss",
        "text loss",
    ]
    lines = []
    for row in rows:
        over_seeds = f"; seeds ± {100 * statistics.stdev(row.averages):.1f}" if row.seeds > 1 else ""
        lines.append(
            [
                row.name,
                f"{row.rate:g} ({row.tried})" if row.tried else "",
                str(row.seeds),
                f"{row.parameters / 1e6:.2f}",
                f"{row.file_bytes / 1e6:.1f}",
                *(f"{100 * statistics.fmean(row.answers[task]):.1f}" for task in tasks),
                share(*average(row.answers)) + over_seeds,
                more_than(against, row, tasks),
                *(cell for left_out in recipe["without"] for cell in on_the_rest(against, row, tasks, left_out)),
                "" if row.validation_loss is None else f"{row.validation_loss:.3f}",
                f"{row.text_loss:.3f}",
            ]
        )
    return markdown(head, lines)


def more_than(against: Row | None, row: Row, tasks: Sequence[str]) -> str:
    """The difference of two methods on some benchmarks, in points, and its probability by chance."""
    if against is None or row is against:
        return ""
    return points(*difference({task: row.answers[task] for task in tasks}, against.answers))


def on_the_rest(against: Row | None, row: Row, tasks: Sequence[str], left_out: str) -> list[str]:
    rest = [task for task in tasks if task != left_out]
    return [share(*average({task: row.answers[task] for task in rest})), more_than(against, row, rest)]


def plot(rows: list[Row], path: Path) -> None:
    """Plot each method's average accuracy with its interval; and accuracy over the text loss."""
    rows = sorted(rows, key=lambda row: average(row.answers)[0])
    with figure(path, 1, 2, figsize=(10, 1.2 + 0.3 * len(rows))) as (left, right):
        for place, row in enumerate(rows):
            mean, error = average(row.answers)
            left.errorbar(100 * mean, place, xerr=196 * error, capsize=3, **look(row.name))
            right.plot(row.text_loss, 100 * mean, **look(row.name))
        for place, row in enumerate(sorted(rows, key=lambda row: row.text_loss)):
            away = 7 if place % 2 else -15  # so that the names of neighbouring points do not overlap
            at = (row.text_loss, 100 * average(row.answers)[0])
            right.annotate(row.name, at, (0, away), textcoords="offset points", ha="center", fontsize=9)
        left.set_yticks(range(len(rows)), [row.name for row in rows])
        left.set(xlabel="average accuracy, %, and its 95 % interval over questions")
        right.set(xlabel="loss on unrelated text", ylabel="average accuracy, %")
        right.margins(0.1)


def curves(rows: list[Row]) -> dict[str, list[Row]]:
    """Methods that differ only in size, by name. Their full names are a name, a dash and a number."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        name, dash, size = row.name.rpartition("-")
        if dash and size.replace(".", "").isdigit():
            found.setdefault(name, []).append(row)
    return found


def plot_curves(rows: list[Row], path: Path) -> None:
    """Plot average accuracy, and the loss on the validation questions, over parameters and over the file's bytes."""
    with figure(path, 2, 2, figsize=(9.5, 6.5), sharex="col", sharey="row") as axes:
        for size, (top, bottom) in zip(("parameters", "file_bytes"), axes.T, strict=True):
            for name, found in curves(rows).items():
                found = sorted(found, key=lambda row: row.parameters)
                at = [getattr(row, size) / 1e6 for row in found]
                means, errors = zip(*(average(row.answers) for row in found), strict=True)
                heights, bars = [100 * mean for mean in means], [196 * error for error in errors]
                top.errorbar(at, heights, bars, capsize=3, **look(name))
                bottom.plot(at, [row.validation_loss for row in found], **look(name))
            for row in rows:
                if row.name == "base":
                    height = 100 * average(row.answers)[0]
                    top.axhline(height, color="0.6", linewidth=0.8)
                    top.annotate("base", (0.02, height), (0, 3), ("axes fraction", "data"), "offset points", color="0.4")
            bottom.set(xscale="log", xlabel="parameters, millions" if size == "parameters" else "file, MB")
            bottom.xaxis.set_major_formatter("{x:g}")
        axes[0, 0].set_ylabel("average accuracy, %")
        axes[1, 0].set_ylabel("loss on validation questions")
        handles, names = axes[0, 0].get_legend_handles_labels()
        axes[0, 0].figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
