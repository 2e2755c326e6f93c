"""Many adapters on one model: one for each task, trained apart, then 2, 5, 10 or all of them at once.

The question of Arnob et al., "Exploring Sparse Adapters for Scalable Merging of Parameter Efficient Experts" (2025, arXiv
2507.07140). The tasks are in one order. A set of n adapters has those of the first n tasks.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.store import Key, Store, number

from .runs import score_key, train_key
from .search import best_rate, losses, rates
from .settings import Recipe
from .tables import Answers, average, difference, markdown, mean_answers, points, share

__all__ = ["report", "wanted"]

Method = Mapping[str, Any]


def wanted(recipe: Recipe, store: Store) -> Iterator[Key]:
    """The base; then method after method: the search for its learning rate, and its `runs_of` each seed."""
    yield score_key(recipe, [], "+".join(recipe["data"]))
    for name, method in recipe["methods"].items():
        for rate in rates(recipe, method, store, a_task_each):
            yield from a_task_each(recipe, method, rate, recipe["seeds"][0])
        for seed in recipe["seeds"]:
            yield from runs_of(recipe, store, name, seed)


def runs_of(recipe: Recipe, store: Store, name: str, seed: int) -> Iterator[Key]:
    """A method's adapters; their scores alone and at once; and, for the methods of "together", one adapter for all tasks."""
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
    for count in recipe["sizes"] if name in recipe["together"] else ():
        run = together(recipe, store, method, count, seed)
        if run is not None:
            yield run
            if store.get(run) is not None:
                yield score_key(recipe, [number(run)], "+".join(tasks[:count]))


def a_task_each(recipe: Recipe, method: Method, rate: float, seed: int) -> list[Key]:
    """The runs by which a method's learning rate is chosen: one for each of the first tasks."""
    return [train_key(recipe | {"data": task}, method, rate, seed) for task in recipe["data"][: recipe["searched"]]]


def trained(recipe: Recipe, store: Store, method: Method, seed: int) -> list[Key]:
    """The runs of a method's adapters, one for each task; none before its learning rate is known.

    With the setting "apart", each adapter avoids the entries of those before it.
    """
    rate = best_rate(recipe, method, store, a_task_each)
    runs: list[Key] = []
    for task in recipe["data"] if rate is not None else ():
        avoid = {"avoid": [number(run) for run in runs]} if method.get("apart") and runs else {}
        runs.append(train_key(recipe | {"data": task}, method, rate, seed, **avoid))
    return runs


def together(recipe: Recipe, store: Store, method: Method, count: int, seed: int) -> Key | None:
    """The run of one adapter for the first tasks, with as many steps and examples as their own adapters have in all."""
    rate = best_rate(recipe, method, store, a_task_each)
    if rate is None:
        return None
    of_all = {"data": "+".join(recipe["data"][:count])} | {name: count * recipe[name] for name in ("examples", "steps")}
    return train_key(recipe | of_all, method, rate, seed)


def merged(recipe: Recipe, runs: list[Key], count: int, how: Mapping[str, Any]) -> Key:
    """The score of the first adapters at once, on their own tasks."""
    return score_key(recipe, [number(run) for run in runs[:count]], "+".join(recipe["data"][:count]), **how)


def held_out(recipe: Recipe, runs: list[Key]) -> Key:
    """The score of the second largest set, added, on the tasks that are not in it."""
    count = recipe["sizes"][-2]
    return score_key(recipe, [number(run) for run in runs[:count]], "+".join(recipe["data"][count:]), fusion="sum")


def answers(store: Store, keys: list[list[Key]]) -> Answers | None:
    """The answers of scores, each seed's in one list; a mean over the seeds that are complete."""
    found = []
    for of_seed in keys:
        results = [store.get(key) for key in of_seed]
        if results and all(results):
            found.append({task: digits for result in results if result for task, digits in result["right"].items()})
    return mean_answers(found) if found else None


def report(recipe: Recipe, store: Store, plots: Path | None) -> str:
    """Tables in %, with 95 % intervals over questions: each task alone; sets of adapters; tasks that are not in the set."""
    tasks, sizes = recipe["data"], recipe["sizes"]
    base = answers(store, [[score_key(recipe, [], "+".join(tasks))]])
    if base is None:
        return "no results yet"
    alone: dict[str, Answers] = {}
    fused: dict[tuple[str, str], dict[int, Answers]] = {}
    held: dict[str, Answers] = {}
    for name, method in recipe["methods"].items():
        made = [trained(recipe, store, method, seed) for seed in recipe["seeds"]]
        keys = [[score_key(recipe, [number(r)], t) for t, r in zip(tasks, runs, strict=bool(runs))] for runs in made]
        found = answers(store, keys)
        if found is None:
            continue
        alone[name] = found
        for how in method["fusions"]:
            curve = {n: answers(store, [[merged(recipe, runs, n, how)] for runs in made]) for n in sizes}
            fused[name, named(how)] = {n: each for n, each in curve.items() if each is not None}
        rest = answers(store, [[held_out(recipe, runs)] for runs in made])
        if rest is not None:
            held[name] = rest
    one = {name: joint_curve(recipe, store, name) for name in recipe["together"]}
    if plots is not None and alone:
        plot(recipe, base, alone, fused, one, plots / f"{store.path.stem}.png")
    parts = [of_tasks(recipe, store, base, alone), of_sets(recipe, base, alone, fused, one)]
    rows = [[name, share(*average(of)), points(*difference(of, base))] for name, of in held.items()]
    if rows:
        parts.append(markdown([f"{sizes[-2]} adapters added", "accuracy on the other tasks", "minus the base"], rows))
    return "\n\n".join(parts)


def named(how: Mapping[str, Any]) -> str:
    """A way to combine adapters, in words."""
    options = [f"{name} {value}" for name, value in how.get("options", {}).items()]
    return ", ".join([how["fusion"], *options, *([f"strength {how['strength']:g}"] if "strength" in how else [])])


def joint_curve(recipe: Recipe, store: Store, name: str) -> dict[int, Answers]:
    """Number of tasks -> the answers of one adapter that was trained on them all."""
    found = {}
    for count in recipe["sizes"]:
        runs = [together(recipe, store, recipe["methods"][name], count, seed) for seed in recipe["seeds"]]
        on = "+".join(recipe["data"][:count])
        each = answers(store, [[score_key(recipe, [number(run)], on)] for run in runs if run is not None])
        if each is not None:
            found[count] = each
    return found


def of_tasks(recipe: Recipe, store: Store, base: Answers, alone: Mapping[str, Answers]) -> str:
    """Each task's accuracy with its own adapter."""
    head = ["task, its own adapter", "base", *alone]
    rows = [[t, *(f"{100 * sum(of[t]) / len(of[t]):.1f}" for of in (base, *alone.values()))] for t in recipe["data"]]
    rows.append(["average", *(share(*average(of)) for of in (base, *alone.values()))])
    tried = [(best_rate(recipe, recipe["methods"][n], store, a_task_each), recipe["methods"][n]) for n in alone]
    counts = [len(losses(recipe, method, store, a_task_each)) for _, method in tried]
    rows.append(["learning rate (tried)", "", *(f"{rate:g} ({n})" for (rate, _), n in zip(tried, counts, strict=True))])
    return markdown(head, rows)


def of_sets(
    recipe: Recipe,
    base: Answers,
    alone: Mapping[str, Answers],
    fused: Mapping[tuple[str, str], Mapping[int, Answers]],
    one: Mapping[str, Mapping[int, Answers]],
) -> str:
    """The accuracy of sets of adapters on their own tasks, and what they lose against the adapters alone."""
    sizes = recipe["sizes"]
    head = ["method", "at once", *(f"{n} tasks: accuracy, lost" for n in sizes)]

    def cell(found: Answers | None, of: Answers | None = None) -> str:
        if found is None:
            return ""
        lost = "" if of is None else f", {share(*difference({t: of[t] for t in found}, found))}"
        return share(*average(found)) + lost

    rows = [["base", "", *(cell({t: base[t] for t in recipe["data"][:n]}) for n in sizes)]]
    for name, of in alone.items():
        rows.append([name, "alone", *(cell({t: of[t] for t in recipe["data"][:n]}) for n in sizes)])
        rows += [
            [name, way, *(cell(curve.get(n), of) for n in sizes)] for (whose, way), curve in fused.items() if whose == name
        ]
    rows += [
        [name, "one adapter trained on all", *(cell(curve.get(n), alone.get(name)) for n in sizes)]
        for name, curve in one.items()
        if curve
    ]
    return markdown(head, rows)


def plot(
    recipe: Recipe,
    base: Answers,
    alone: Mapping[str, Answers],
    fused: Mapping[tuple[str, str], Mapping[int, Answers]],
    one: Mapping[str, Mapping[int, Answers]],
    path: Path,
) -> None:
    """Accuracy, and the share of the accuracy alone that is kept, over the number of adapters; each method's best way."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    sizes, tasks = recipe["sizes"], recipe["data"]

    def mean(found: Answers, count: int) -> float:
        return 100 * average({task: found[task] for task in tasks[:count]})[0]

    left.plot(sizes, [mean(base, n) for n in sizes], color="0.6", label="base")
    for name, of in alone.items():
        ways = {way: curve for (whose, way), curve in fused.items() if whose == name and set(sizes) <= set(curve)}
        if not ways:
            continue
        best = max(ways, key=lambda way: average(ways[way][sizes[-1]])[0])
        kept = [mean(ways[best][n], n) for n in sizes]
        dashes = "--" if name.startswith("lora") else "-"
        (line, *_) = left.plot(sizes, kept, f"o{dashes}", label=f"{name}: {best}")
        shares = [100 * value / mean(of, n) for value, n in zip(kept, sizes, strict=True)]
        right.plot([1, *sizes], [100, *shares], f"o{dashes}", color=line.get_color())
    for (name, curve), style in zip(one.items(), (":", "-."), strict=False):
        if curve:
            left.plot(list(curve), [mean(of, n) for n, of in curve.items()], style, color="black", label=f"{name}: one for all")
    left.set(xlabel="adapters at once", ylabel="average accuracy on their tasks, %", xticks=sizes)
    right.set(xlabel="adapters at once", ylabel="kept of the accuracy alone, %", xticks=[1, *sizes])
    left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
