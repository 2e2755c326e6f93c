"""What an adapter for one benchmark does to the others, and to its own when its strength grows from 0 to 2."""

from collections.abc import Iterator
from pathlib import Path

from experiments.palette import look
from experiments.store import Key, Store, number

from .plots import figure
from .runs import score_key, train_key
from .search import best_rate, losses, rates
from .settings import Recipe
from .tables import Answers, answers, average, difference, markdown, points, share

__all__ = ["report", "wanted"]


def wanted(recipe: Recipe, store: Store) -> Iterator[Key]:
    """The base's scores; each method's search for its learning rate; its scores on its own benchmark and on the others."""
    yield score_key(recipe, [], recipe["data"])
    yield others(recipe, [])
    for method in recipe["methods"].values():
        for rate in rates(recipe, method, store):
            yield train_key(recipe, method, rate, recipe["seeds"][0])
        best = best_rate(recipe, method, store)
        if best is None:
            continue
        for seed in recipe["seeds"]:
            trained = train_key(recipe, method, best, seed)
            yield trained
            if store.get(trained) is not None:
                yield from (own(recipe, trained, strength) for strength in recipe["strengths"])
                yield others(recipe, [number(trained)])


def own(recipe: Recipe, trained: Key, strength: float) -> Key:
    """The score of an adapter on its own benchmark."""
    how = {} if strength == 1 else {"strength": strength}
    return score_key(recipe, [number(trained)], recipe["data"], **how)


def others(recipe: Recipe, adapters: list[str]) -> Key:
    """The score on the other benchmarks, with as many questions each as `others_test` says."""
    return score_key(recipe | {"test": recipe["others_test"]}, adapters, "+".join(recipe["others"]))


def report(recipe: Recipe, store: Store, plots: Path | None) -> str:
    """Two tables in %, with 95 % intervals over questions: the other benchmarks; the own one at growing strength."""
    base_own, base_others = answers(store, [[score_key(recipe, [], recipe["data"])]]), answers(store, [[others(recipe, [])]])
    if base_own is None or base_others is None:
        return "no results yet"
    other_rows = [
        [
            "base",
            "",
            share(*average(base_own)),
            *cells(base_others),
            share(*average(base_others)),
            "",
            text(store, [others(recipe, [])]),
        ]
    ]
    strength_rows = []
    curves: dict[str, dict[float, Answers]] = {}
    effects: dict[str, tuple[float, float]] = {}
    for name, method in recipe["methods"].items():
        rate = best_rate(recipe, method, store)
        if rate is None:
            continue
        runs = [train_key(recipe, method, rate, seed) for seed in recipe["seeds"]]
        found = {strength: answers(store, [[own(recipe, run, strength)] for run in runs]) for strength in recipe["strengths"]}
        curves[name] = {0.0: base_own} | {strength: each for strength, each in found.items() if each is not None}
        at_rate = f"{rate:g} ({len(losses(recipe, method, store))})"
        strength_rows.append(
            [name, *(share(*average(curves[name][s])) if s in curves[name] else "" for s in recipe["strengths"])]
        )
        alone, rest = found.get(1), answers(store, [[others(recipe, [number(run)])] for run in runs])
        if alone is None or rest is None:
            continue
        change = difference(rest, base_others)
        effects[name] = (100 * difference(alone, base_own)[0], 100 * change[0])
        loss = text(store, [others(recipe, [number(run)]) for run in runs])
        other_rows.append([name, at_rate, share(*average(alone)), *cells(rest), share(*average(rest)), points(*change), loss])
    head = ["method", "rate (tried)", recipe["data"], *recipe["others"], "the others", "minus the base", "text loss"]
    tables = [markdown(head, other_rows)]
    if strength_rows:
        tables.append(markdown([f"{recipe['data']}, strength", *(f"{s:g}" for s in recipe["strengths"])], strength_rows))
    if plots is not None and effects:
        plot(recipe, curves, effects, plots / f"{store.path.stem}.png")
    return "\n\n".join(tables)


def cells(found: Answers) -> list[str]:
    return [f"{100 * sum(each) / len(each):.1f}" for each in found.values()]


def text(store: Store, keys: list[Key]) -> str:
    """The mean loss on unrelated text."""
    found = [result["text_loss"] for key in keys if (result := store.get(key)) is not None]
    return f"{sum(found) / len(found):.3f}" if found else ""


def plot(recipe: Recipe, curves: dict[str, dict[float, Answers]], effects: dict[str, tuple[float, float]], path: Path) -> None:
    """Accuracy over strength; and the change on the other benchmarks over the gain on the own one."""
    with figure(path, 1, 2, figsize=(10, 4.4)) as (left, right):
        for name, found in curves.items():
            at = sorted(found)
            left.plot(at, [100 * average(found[s])[0] for s in at], **look(name))
            if name in effects:
                right.plot(*effects[name], **look(name))
                right.annotate(look(name)["label"], effects[name], (8, -4), textcoords="offset points")
        right.axhline(0, color="0.6", linewidth=0.8)
        left.set(xlabel="strength", ylabel=f"accuracy on {recipe['data']}, %")
        right.set(xlabel=f"gain on {recipe['data']}, points", ylabel="change on the other benchmarks, points")
        right.margins(0.2)
        left.legend(frameon=False)
