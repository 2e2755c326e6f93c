"""Table 4: one adapter for each benchmark, trained separately, then all on one model: the loss by method and fusion."""

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.palette import look
from experiments.store import Key, Store, number

from .plots import figure
from .runs import compare_key, score_key, train_key
from .search import best_rate, losses, rates
from .settings import Recipe
from .tables import Answers, answers, average, difference, markdown, probability, share

__all__ = ["report", "wanted"]


def wanted(recipe: Recipe, store: Store) -> Iterator[Key]:
    """The wanted runs: the base; each method's search for its learning rate, on the first seed; then each seed and method.

    For a seed and method: the adapters, their scores alone and added, and on some seeds with other fusions and strengths.
    """
    first = recipe["seeds"][0]
    for task in recipe["data"]:
        yield score_key(recipe, [], task)
    for method in recipe["methods"].values():
        for rate in rates(recipe, method, store, a_benchmark_each):
            yield from a_benchmark_each(recipe, method, rate, first)
    for seed in recipe["seeds"]:
        for method in recipe["methods"].values():
            runs = trained(recipe, store, method, seed)
            yield from (run for run in runs if all(store.line(before) for before in run.get("avoid", ())))
            if not runs or any(store.get(run) is None for run in runs):
                continue
            adapters = [number(run) for run in runs]
            if seed == first:
                yield compare_key(recipe, adapters)
            for task, adapter in zip(recipe["data"], adapters, strict=True):
                yield score_key(recipe, [adapter], task)
            for how in ways(recipe, method, seed):
                for task in recipe["data"]:
                    yield score_key(recipe, adapters, task, **how)


def ways(recipe: Recipe, method: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """The ways to combine a method's adapters: added; on some seeds also other fusions, and added at other strengths."""
    fusions = [{"fusion": name} | ({"options": options} if options else {}) for name, options in method["fusions"].items()]
    strengths = [{"fusion": "sum", "strength": strength} for strength in recipe["strengths"]]
    return fusions + strengths if seed in recipe["other_seeds"] else [{"fusion": "sum"}]


def a_benchmark_each(recipe: Recipe, method: Mapping[str, Any], rate: float, seed: int) -> list[Key]:
    """The runs that train a method's adapters, one for each benchmark, independent of each other."""
    return [train_key(recipe | {"data": task}, method, rate, seed) for task in recipe["data"]]


def trained(recipe: Recipe, store: Store, method: Mapping[str, Any], seed: int) -> list[Key]:
    """The runs that train a method's adapters, at the learning rate that is best for all of them together.

    None before that learning rate is known. With the setting "apart", each adapter avoids the entries of those before it.
    """
    rate = best_rate(recipe, method, store, a_benchmark_each)
    if rate is None:
        return []
    runs: list[Key] = []
    for run in a_benchmark_each(recipe, method, rate, seed):
        runs.append(run | ({"avoid": [number(before) for before in runs]} if method.get("apart") and runs else {}))
    return runs


def of_seeds(recipe: Recipe, store: Store, adapters: Sequence[Sequence[Sequence[str]]], **how: Any) -> Answers | None:
    """Benchmark -> its answers, a mean over seeds. adapters: for each seed and benchmark, the runs with the active adapters."""
    keys = [[score_key(recipe, runs, t, **how) for t, runs in zip(recipe["data"], each, strict=True)] for each in adapters]
    return answers(store, keys)


def report(recipe: Recipe, store: Store, plots: Path | None) -> str:
    """Tables in per cent with 95 % intervals over questions: alone, added and the loss; then other fusions and strengths."""
    tasks = recipe["data"]
    base = of_seeds(recipe, store, [[[]] * len(tasks)])
    if base is None:
        return "no results yet"
    head = ["method", "rate (tried)", "seeds", *tasks, "alone"]
    head += [*(f"{task}, fused" for task in tasks), "fused", "lost", "lost, % of alone"]
    rows = [["base", "", "1", *cells(base), share(*average(base)), *[""] * len(tasks), "", "", ""]]
    other: list[list[str]] = []
    drops: dict[str, Answers] = {}
    strengths: dict[str, dict[float, Answers]] = {}
    for name, method in recipe["methods"].items():
        rate = best_rate(recipe, method, store, a_benchmark_each)
        if rate is None:
            continue
        made = [[number(run) for run in trained(recipe, store, method, seed)] for seed in recipe["seeds"]]
        apart = [[[run] for run in runs] for runs in made]
        together = [[runs] * len(tasks) for runs in made]
        seeds = [
            n
            for n in range(len(made))
            if of_seeds(recipe, store, apart[n : n + 1]) and of_seeds(recipe, store, together[n : n + 1], fusion="sum")
        ]
        if not seeds:
            continue
        alone = of_seeds(recipe, store, [apart[n] for n in seeds])
        fused = of_seeds(recipe, store, [together[n] for n in seeds], fusion="sum")
        assert alone is not None and fused is not None
        lost = difference(alone, fused)
        drops[name] = {task: [a - b for a, b in zip(alone[task], fused[task], strict=True)] for task in tasks}
        tried = losses(recipe, method, store, a_benchmark_each)
        row = [name, f"{rate:g} ({len(tried)})", str(len(seeds))]
        row += [*cells(alone), share(*average(alone)), *cells(fused), share(*average(fused))]
        apiece = [lost_on(recipe, store, apart[n], together[n]) for n in seeds]
        over_seeds = f"; seeds {', '.join(f'{100 * each:.1f}' for each in apiece)}" if len(apiece) > 1 else ""
        rows.append([*row, share(*lost) + over_seeds, f"{100 * lost[0] / average(alone)[0]:.1f}"])
        for how in ways(recipe, method, recipe["other_seeds"][0]):
            asked = [together[recipe["seeds"].index(seed)] for seed in recipe["other_seeds"]]
            there = [runs for runs in asked if of_seeds(recipe, store, [runs], **how)]
            found = of_seeds(recipe, store, there, **how)
            if found is None:
                continue
            if how["fusion"] == "sum":
                strengths.setdefault(name, {})[how.get("strength", 1.0)] = found
            if "strength" not in how:
                text = how["fusion"] + "".join(f", {key} {value}" for key, value in how.get("options", {}).items())
                other.append([name, text, str(len(there)), *cells(found), share(*average(found))])
    text = [markdown(head, rows)]
    if recipe["compare_with"] in drops:
        for name in (name for name in drops if name != recipe["compare_with"]):
            mean, error = difference(drops[recipe["compare_with"]], drops[name])
            text.append(
                f"{recipe['compare_with']} loses {share(mean, error)} points more than {name} ({probability(mean, error)})."
            )
    text.append(markdown(["method", "fusion", "seeds", *tasks, "average"], other))
    at = sorted({1.0, *recipe["strengths"]})
    if len(at) > 1:
        head = ["method, added", *(f"α = {strength:g}" for strength in at)]
        text.append(markdown(head, [[name, *averages(found, at)] for name, found in strengths.items()]))
    text.append(markdown(["method (first seed)", *apart_head(tasks)], apart_rows(recipe, store)))
    if plots is not None and any(len(found) > 1 for found in strengths.values()):
        plot(strengths, average(base)[0], plots / f"{store.path.stem}.png")
    return "\n\n".join(text)


def lost_on(recipe: Recipe, store: Store, apart: Sequence[Sequence[str]], together: Sequence[Sequence[str]]) -> float:
    """The accuracy that is lost on one seed when all adapters are added, as a share of 1."""
    alone, fused = of_seeds(recipe, store, [apart]), of_seeds(recipe, store, [together], fusion="sum")
    assert alone is not None and fused is not None
    return average(alone)[0] - average(fused)[0]


def averages(found: Mapping[float, Answers], strengths: Sequence[float]) -> list[str]:
    return [share(*average(found[strength])) if strength in found else "" for strength in strengths]


def apart_head(tasks: Sequence[str]) -> list[str]:
    pairs = [" and ".join(pair) for pair in itertools.combinations(tasks, 2)]
    return [*(f"base to {task}" for task in tasks), *(f"{pair}{what}" for what in ("", ", AWOR") for pair in pairs)]


def apart_rows(recipe: Recipe, store: Store) -> list[list[str]]:
    """One row for each method: L2 distances (Table 13) and, for sparse adapters, AWOR, the share of zeros in A₁ᵀA₂."""
    rows = []
    for name, method in recipe["methods"].items():
        runs = [number(run) for run in trained(recipe, store, method, recipe["seeds"][0])]
        found = store.get(compare_key(recipe, runs))
        if found is not None:
            awor = [f"{share:.3f}" for share in found.get("awor", ())] or [""] * len(found["distance"])
            rows.append([name, *(f"{length:.2f}" for length in found["to_base"] + found["distance"]), *awor])
    return rows


def cells(found: Answers) -> list[str]:
    return [f"{100 * statistics.fmean(found[task]):.1f}" for task in found]


def plot(strengths: dict[str, dict[float, Answers]], base: float, path: Path) -> None:
    """Plot the average accuracy of the added adapters over their strength."""
    with figure(path, figsize=(7.5, 4.5)) as axes:
        axes.axhline(100 * base, color="0.6", linewidth=0.8)
        axes.annotate("base", (1, 100 * base), (-4, 3), ("axes fraction", "data"), "offset points", ha="right", color="0.4")
        for name, found in strengths.items():
            at = sorted(found)
            means = [100 * average(found[strength])[0] for strength in at]
            axes.plot([0.0, *at], [100 * base, *means], **look(name))
        axes.set(xlabel="strength α of each of three adapters, added", ylabel="average accuracy, %")
        axes.legend(frameon=False, fontsize=9)
