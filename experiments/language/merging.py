"""Many adapters on one model: one for each task, trained apart, then 2, 5, 10 or all of them at once.

The question of Arnob et al., "Exploring Sparse Adapters for Scalable Merging of Parameter Efficient Experts" (2025, arXiv
2507.07140). The tasks are in one order. A set of n adapters has those of the first n tasks.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.palette import look
from experiments.store import Key, Store, number

from .plots import figure
from .runs import score_key, train_key
from .search import best_rate, losses, rates
from .settings import Recipe
from .tables import Answers, answers, average, difference, markdown, points, share

__all__ = ["report", "wanted"]

Method = Mapping[str, Any]


def wanted(recipe: Recipe, store: Store) -> Iterator[Key]:
    """The base; method after method the search for its learning rate and its `runs_of` each seed; last one for all."""
    yield score_key(recipe, [], "+".join(recipe["data"]))
    for name, method in recipe["methods"].items():
        for rate in rates(recipe, method, store, a_task_each):
            yield from a_task_each(recipe, method, rate, recipe["seeds"][0])
        for seed in recipe["seeds"]:
            yield from runs_of(recipe, store, name, seed)
    for seed in recipe["seeds"]:
        for name in recipe["together"]:
            run = together(recipe, store, name, seed)
            if run is not None:
                yield run
                if store.get(run) is not None:
                    yield score_key(recipe, [number(run)], "+".join(recipe["data"]))


def runs_of(recipe: Recipe, store: Store, name: str, seed: int) -> Iterator[Key]:
    """A method's adapters, and their scores alone and at once."""
    tasks, method = recipe["data"], recipe["methods"][name]
    runs = trained(recipe, store, method, seed)
    yield from (run for run in runs if all(store.line(before) for before in run.get("avoid", ())))
    if not runs or any(store.get(run) is None for run in runs):
        return
    for task, run in zip(tasks, runs, strict=True):
        yield score_key(recipe, [number(run)], task)
    for how in method["fusions"]:
        for count in recipe["sizes"]:
            yield merged(recipe, runs, count, how)
    yield held_out(recipe, runs)


def a_task_each(recipe: Recipe, method: Method, rate: float, seed: int) -> list[Key]:
    """The runs by which a method's learning rate is chosen: one for each of the first tasks."""
    return [train_key(recipe | {"data": task}, method, rate, seed) for task in recipe["data"][: recipe["searched"]]]


def trained(recipe: Recipe, store: Store, method: Method, seed: int) -> list[Key]:
    """The runs of a method's adapters, one for each task; none before its learning rate is known.

    With the setting "apart", each adapter avoids the entries of those before it.
    """
    rate = best_rate(recipe, method, store, a_task_each)
    if rate is None:
        return []
    runs: list[Key] = []
    for task in recipe["data"]:
        avoid = {"avoid": [number(run) for run in runs]} if method.get("apart") and runs else {}
        runs.append(train_key(recipe | {"data": task}, method, rate, seed, **avoid))
    return runs


def together(recipe: Recipe, store: Store, name: str, seed: int) -> Key | None:
    """The run of one adapter for all tasks, with as many steps and examples as their own adapters have in all."""
    tasks, method = recipe["data"], recipe["methods"][name]
    rate = best_rate(recipe, method, store, a_task_each)
    if rate is None:
        return None
    of_all = {"data": "+".join(tasks)} | {setting: len(tasks) * recipe[setting] for setting in ("examples", "steps")}
    return train_key(recipe | of_all, method, rate, seed)


def merged(recipe: Recipe, runs: list[Key], count: int, how: Mapping[str, Any]) -> Key:
    """The score of the first adapters at once, on their own tasks."""
    return score_key(recipe, [number(run) for run in runs[:count]], "+".join(recipe["data"][:count]), **how)


def held_out(recipe: Recipe, runs: list[Key]) -> Key:
    """The score of the second largest set, added, on the tasks that are not in it."""
    count = recipe["sizes"][-2]
    return score_key(recipe, [number(run) for run in runs[:count]], "+".join(recipe["data"][count:]), fusion="sum")


class Found(NamedTuple):
    """The answers so far: of the base; of each method's adapters alone, at once in each way, and of one adapter for all."""

    base: Answers
    alone: dict[str, Answers]
    merged: dict[tuple[str, str], dict[int, Answers]]  # (method, way) -> number of adapters -> answers
    together: dict[str, Answers]


def report(recipe: Recipe, store: Store, plots: Path | None) -> str:
    """Tables in %, with 95 % intervals over questions: each task alone; sets of adapters; tasks that are not in the set."""
    tasks, sizes = recipe["data"], recipe["sizes"]
    base = answers(store, [[score_key(recipe, [], "+".join(tasks))]])
    if base is None:
        return "no results yet"
    found = Found(base, {}, {}, {n: of for n in recipe["together"] if (of := for_all(recipe, store, n)) is not None})
    held: dict[str, Answers] = {}
    for name, method in recipe["methods"].items():
        made = [trained(recipe, store, method, seed) for seed in recipe["seeds"]]
        keys = [[score_key(recipe, [number(r)], t) for t, r in zip(tasks, runs, strict=bool(runs))] for runs in made]
        alone = answers(store, keys)
        if alone is None:
            continue
        found.alone[name] = alone
        for how in method["fusions"]:
            curve = {n: answers(store, [[merged(recipe, runs, n, how)] for runs in made]) for n in sizes}
            found.merged[name, named(how)] = {n: each for n, each in curve.items() if each is not None}
        rest = answers(store, [[held_out(recipe, runs)] for runs in made])
        if rest is not None:
            held[name] = rest
    if plots is not None and found.alone:
        plot(recipe, found, plots / f"{store.path.stem}.png")
    parts = [of_tasks(recipe, store, found), of_sets(recipe, found)]
    rows = [[name, share(*average(of)), points(*difference(of, base))] for name, of in held.items()]
    if rows:
        parts.append(markdown([f"{sizes[-2]} adapters added", "accuracy on the other tasks", "minus the base"], rows))
    return "\n\n".join(parts)


def named(how: Mapping[str, Any]) -> str:
    """A way to combine adapters, in words."""
    options = [f"{name} {value}" for name, value in how.get("options", {}).items()]
    return ", ".join([how["fusion"], *options, *([f"strength {how['strength']:g}"] if "strength" in how else [])])


def for_all(recipe: Recipe, store: Store, name: str) -> Answers | None:
    """The answers of one adapter that was trained on all tasks."""
    runs = [together(recipe, store, name, seed) for seed in recipe["seeds"]]
    return answers(store, [[score_key(recipe, [number(run)], "+".join(recipe["data"]))] for run in runs if run is not None])


def of_tasks(recipe: Recipe, store: Store, found: Found) -> str:
    """Each task's accuracy with its own adapter."""
    shown = {"base": found.base, **found.alone}
    rows = [[t, *(f"{100 * sum(of[t]) / len(of[t]):.1f}" for of in shown.values())] for t in recipe["data"]]
    rows.append(["average", *(share(*average(of)) for of in shown.values())])
    rates_tried = ["learning rate (tried)", ""]
    for name in found.alone:
        method = recipe["methods"][name]
        rates_tried.append(
            f"{best_rate(recipe, method, store, a_task_each):g} ({len(losses(recipe, method, store, a_task_each))})"
        )
    return markdown(["task, its own adapter", *shown], [*rows, rates_tried])


def of_sets(recipe: Recipe, found: Found) -> str:
    """The accuracy of sets of adapters on their own tasks, and what they lose against the adapters alone."""
    sizes = recipe["sizes"]

    def cell(of: Answers | None, alone: Answers | None = None) -> str:
        if of is None:
            return ""
        lost = "" if alone is None else f", {share(*difference({task: alone[task] for task in of}, of))}"
        return share(*average(of)) + lost

    def whole(of: Answers) -> list[str]:
        return [cell({task: of[task] for task in recipe["data"][:n]}) for n in sizes]

    rows = [["base", "", *whole(found.base)]]
    for name, alone in found.alone.items():
        rows.append([name, "alone", *whole(alone)])
        curves = {way: curve for (whose, way), curve in found.merged.items() if whose == name}
        if name in found.together:
            curves["one adapter trained on all"] = {sizes[-1]: found.together[name]}
        rows += [[name, way, *(cell(curve.get(n), alone) for n in sizes)] for way, curve in curves.items()]
    return markdown(["method", "at once", *(f"{n} tasks: accuracy, lost" for n in sizes)], rows)


def best_sums(recipe: Recipe, found: Found, name: str) -> dict[int, tuple[float, Answers]]:
    """For each number of adapters, the strength, of those run, at which a method's sum is most accurate, and its answers."""
    best: dict[int, tuple[float, Answers]] = {}
    for how in (how for how in recipe["methods"][name]["fusions"] if how["fusion"] == "sum"):
        for count, of in found.merged.get((name, named(how)), {}).items():
            if count not in best or average(of)[0] > average(best[count][1])[0]:
                best[count] = how.get("strength", 1.0), of
    return best


def plot(recipe: Recipe, found: Found, path: Path) -> None:
    """Accuracy of the sum, and the share of the accuracy alone that it keeps, for each number of adapters; see `best_sums`."""
    sizes, tasks, methods = recipe["sizes"], recipe["data"], list(found.alone)

    def mean(of: Answers, count: int) -> float:
        return 100 * average({task: of[task] for task in tasks[:count]})[0]

    with figure(path, 1, 2, figsize=(10, 4.8)) as (left, right):
        base, places = look("base")["color"], range(len(sizes))
        ends = [place - 0.4 for place in places], [place + 0.4 for place in places]
        left.hlines([mean(found.base, n) for n in sizes], *ends, color=base, label="base")
        right.axhline(100, color=base, linewidth=0.8)
        for order, name in enumerate(methods, 1):
            best = best_sums(recipe, found, name)
            if not set(sizes) <= set(best):
                continue
            style, beside = look(name) | {"linestyle": "none"}, order / (len(methods) + 1) - 0.5
            outwards = math.copysign(1, beside)
            at = [place + beside for place in places]
            sums, alone = [mean(best[n][1], n) for n in sizes], [mean(found.alone[name], n) for n in sizes]
            shares = [100 * fused / single for fused, single in zip(sums, alone, strict=True)]
            hollow = {"markerfacecolor": "white", "label": f"{style['label']}, each alone"}
            left.plot([place - 0.08 * outwards for place in at], alone, **style | hollow)
            left.errorbar(
                at,
                sums,
                [196 * average(best[n][1])[1] for n in sizes],
                capsize=3,
                **style | {"label": f"{style['label']}, added"},
            )
            right.plot(at, shares, **style)
            for axis, heights in ((left, sums), (right, shares)):
                for n, *point in zip(sizes, at, heights, strict=True):
                    side, away = ("left", 7) if outwards > 0 else ("right", -7)
                    axis.annotate(f"{best[n][0]:g}", point, (away, -4), textcoords="offset points", ha=side, fontsize=9)
        for name, of in found.together.items():
            label = f"{name}, one adapter for all"
            left.plot(places[-1], mean(of, sizes[-1]), "_", markersize=20, color=look(name)["color"], label=label)
        left.set(ylabel="average accuracy on their tasks, %", ylim=(None, left.get_ylim()[1] + 2))
        right.set(ylabel="kept of the accuracy alone, %")
        for axis in (left, right):
            axis.set(xlim=(-0.6, len(sizes) - 0.4), xlabel="adapters added")
            axis.set_xticks(places, [f"{n}\ntasks 1–{n}" for n in sizes])
        words = "Each point has the strength, written beside it, with the highest accuracy of those that were run."
        left.figure.suptitle(f"{words}\nThe groups differ in their tasks: compare methods within a group.", fontsize=10)
        left.figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
