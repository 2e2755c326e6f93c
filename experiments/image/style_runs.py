"""The runs of the style experiment: what a recipe wants, in which order, and how each is made."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from experiments.language.search import rates_to_try
from experiments.store import Key, Store, artefacts, number
from shira.cli.demo import digest
from shira.data.emoji import named
from shira.errors import DataError

from . import style_adapters, style_scores
from .emoji import facts_of, folder, generate, hide_library_output
from .grids import Picture as Pixels
from .parts import in_bfloat16, load
from .styles import SEEN, UNSEEN, general_pictures, training_pictures, validation_pictures

Recipe = Mapping[str, Any]
SHOWN = (*SEEN, *UNSEEN)


def train_key(recipe: Recipe, style: str, size: str, name: str, rate: float, **more: Any) -> Key:
    """A training. more: "avoid", numbers of runs whose positions the mask leaves free; "near", a reach of stay_near."""
    method = {key: value for key, value in recipe["methods"][name].items() if key != "rates"}
    if "lora" not in method:
        method["rank"] = recipe["rank"]
    own = {"style": style, "size": size, "method": method, "rate": rate, "seed": seed_of(recipe)}
    return {"kind": "train"} | own | {key: recipe[key] for key in ("concepts", "side", "steps", "batch")} | more


def seed_of(recipe: Recipe) -> int:
    """What decides the mask, LoRA's start, and the order of the pictures."""
    return recipe.get("seed", train_seeds(recipe)[0])  # type: ignore[no-any-return]


def train_seeds(recipe: Recipe) -> Sequence[int]:
    """The seeds that all methods are trained with. On the first one, the learning rates are searched."""
    return recipe.get("train_seeds", [0])  # type: ignore[no-any-return]


def score_key(recipe: Recipe, adapters: Sequence[tuple[Key, float]], style: str | None, fusion: Recipe | None = None) -> Key:
    """Pictures of all SHOWN concepts with these adapters, each at its strength. style: of the real pictures to compare with."""
    used = [{"run": number(key), "strength": strength} for key, strength in adapters]
    same = {key: recipe[key] for key in ("concepts", "side", "sampling", "seeds")}
    return {"kind": "score", "adapters": used, "style": style, "fusion": dict(fusion or {})} | same


def judges_key(recipe: Recipe) -> Key:
    """How often the judges are right about real pictures that were held out."""
    return {"kind": "judges", "concepts": recipe["concepts"], "side": recipe["side"], "steps": style_scores.STEPS}


def losses(recipe: Recipe, store: Store, size: str, name: str) -> dict[float, float]:
    """Learning rate -> loss on the pictures of concepts that were not trained, for the rates tried so far."""
    recipe = {**recipe, "seed": train_seeds(recipe)[0]}
    found: dict[float, float] = {}
    while True:
        tried = rates_to_try(recipe["methods"][name]["rates"], found, recipe["most_rates"])
        results = {r: store.get(train_key(recipe, recipe["rates_style"], size, name, r)) for r in tried if r not in found}
        found |= {rate: result["validation_loss"] for rate, result in results.items() if result is not None}
        if not results or None in results.values():
            return found


def best_rate(recipe: Recipe, store: Store, size: str, name: str) -> float | None:
    """The learning rate with the lowest loss, or None while some are not tried."""
    found = losses(recipe, store, size, name)
    if any(rate not in found for rate in rates_to_try(recipe["methods"][name]["rates"], found, recipe["most_rates"])):
        return None
    return min(found, key=lambda rate: found[rate])


def chosen(recipe: Recipe, store: Store, style: str, size: str, name: str, **more: Any) -> Key | None:
    """The training of a style at the method's best learning rate, or None while that is not known."""
    rate = best_rate(recipe, store, size, name)
    return None if rate is None else train_key(recipe, style, size, name, rate, **more)


def pair(recipe: Recipe, store: Store, size: str, name: str, fusion: Recipe) -> list[Key] | None:
    """The trainings of the two styles that are added. With "avoid" in the fusion, the second avoids the first's positions."""
    one, other = recipe["styles"]
    more = {"near": fusion["near"]} if "near" in fusion else {}
    first = chosen(recipe, store, one, size, name, **more)
    if first is None:
        return None
    second = chosen(recipe, store, other, size, name, **more, **({"avoid": [number(first)]} if "avoid" in fusion else {}))
    return None if second is None else [first, second]


def added(recipe: Recipe, keys: Sequence[Key], fusion: Recipe) -> Key:
    """The pictures of two styles at once."""
    how = {key: value for key, value in fusion.items() if key in ("method", "options", "averaged")}
    return score_key(recipe, [(key, fusion.get("strength", 1.0)) for key in keys], None, how)


def fusions_of(recipe: Recipe, name: str) -> dict[str, Recipe]:
    """What LoRA has of the ways to add two adapters: Diffusers sums them, or they take turns."""
    every: dict[str, Recipe] = recipe["fusions"]
    ours = "lora" not in recipe["methods"][name]
    return {how: each for how, each in every.items() if ours or each.keys() <= {"strength", "averaged"}}


def wanted(recipe: Recipe, store: Store) -> Iterator[Key]:
    """The judges and the base; all that is trained on many concepts; then the same trainings on few.

    Pictures are not wanted before their adapters are trained, by this process or another.
    """
    for key in _all_wanted(recipe, store):
        if all(store.line(each["run"]) for each in key.get("adapters", ())):
            yield key


def _all_wanted(recipe: Recipe, store: Store) -> Iterator[Key]:
    yield judges_key(recipe)
    yield score_key(recipe, [], None)
    *fewer, size = recipe["sizes"]
    yield from _compared(recipe, store, size)
    for name in recipe["fused"]:
        for fusion in fusions_of(recipe, name).values():
            keys = pair(recipe, store, size, name, fusion)
            if keys:
                yield from keys
                yield added(recipe, keys, fusion)
                if "avoid" in fusion or "near" in fusion:
                    yield from (score_key(recipe, [(key, 1.0)], key["style"]) for key in keys)
    for name in recipe["swept"]:
        key = chosen(recipe, store, recipe["styles"][0], size, name)
        yield from (score_key(recipe, [(key, s)], key["style"]) for s in recipe["sweep"] if key and s not in (0, 1))
    for style in recipe["more_styles"]:
        for name in recipe["more_methods"]:
            key = chosen(recipe, store, style, size, name)
            if key:
                yield key
                yield score_key(recipe, [(key, 1.0)], style)
    for size in fewer:
        yield from _compared(recipe, store, size)


def _compared(recipe: Recipe, store: Store, size: str) -> Iterator[Key]:
    """For each method its learning rates; then, for each seed, both styles alone, and their sum."""
    for name in recipe["methods"]:
        for rate in rates_to_try(recipe["methods"][name]["rates"], losses(recipe, store, size, name), recipe["most_rates"]):
            yield train_key(recipe, recipe["rates_style"], size, name, rate)
    for seed in train_seeds(recipe):
        for name in recipe["methods"]:
            keys = pair({**recipe, "seed": seed}, store, size, name, {})
            if keys:
                yield from keys
                yield from (score_key(recipe, [(key, 1.0)], key["style"]) for key in keys)
                yield added(recipe, keys, {})


class Lab:
    """Makes runs on one pipeline, whose base is the same after each."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @cache  # noqa: B019
    def pipe(self, concepts: int) -> Any:
        place = folder(concepts)
        facts = facts_of(place)
        if facts["step"] != facts["of"]:
            raise DataError(f"the model in {place} is not finished; go on: python -m experiments.image.emoji train")
        return load(place / "pipeline")

    @cache  # noqa: B019
    def base(self, concepts: int) -> str:
        """The base's weights in twelve digits: each training of it on another machine makes others.

        Raises DataError if the results are of another base.
        """
        own = digest(self.pipe(concepts).unet)[:12]
        others = {line["result"]["base"] for line in self.store.lines()} - {own}
        if others:
            raise DataError(
                f"{self.store.path} is of the base {', '.join(sorted(others))}, and the one in {folder(concepts)} is {own}: "
                "write to another file, --results mine.jsonl"
            )
        return own

    @cache  # noqa: B019
    def judges(self, concepts: int, side: int) -> dict[str, Any]:
        return {what: style_scores.judge(what, side, folder(concepts)) for what in ("style", "concept")}

    def run(self, key: Key) -> dict[str, Any]:
        hide_library_output()
        makers = {"train": self.train, "score": self.score, "judges": self.accuracies}
        base = self.base(key["concepts"])
        return makers[key["kind"]](key) | {"base": base}

    def accuracies(self, key: Key) -> dict[str, Any]:
        found = self.judges(key["concepts"], key["side"])
        return {what: style_scores.held_out_accuracy(what, model, key["side"]) for what, model in found.items()}

    def train(self, key: Key) -> dict[str, Any]:
        method = dict(key["method"])
        method |= {"near": key["near"]} if "near" in key else {}
        place = artefacts() / number(key)
        place.mkdir(parents=True, exist_ok=True)
        return style_adapters.trained(
            method,
            self.pipe(key["concepts"]),
            training_pictures(key["style"], key["size"], key["side"]),
            validation_pictures(key["style"], key["side"]),
            place,
            side=key["side"],
            steps=key["steps"],
            batch=key["batch"],
            rate=key["rate"],
            seed=key["seed"],
            general=general_pictures(key["side"]) if "near" in key else (),
            avoid=[self.adapter(run) / style_adapters.FILE for run in key.get("avoid", ())],
        )

    def adapter(self, run: str) -> Path:
        """The folder of a trained adapter. If the cache has lost it, it is trained again."""
        line = self.store.line(run)
        if line is None:
            raise DataError(f"{self.store.path}: no run {run!r}")
        place = artefacts() / run
        if not place.is_dir() or not any(place.iterdir()):
            self.train(line["key"])
        return place

    def score(self, key: Key) -> dict[str, Any]:
        made = self.pictures(key, SHOWN, range(key["seeds"]))
        targets = style_scores.target_pictures(named(SHOWN), key["style"] or "base", key["side"])
        return style_scores.scores(made, self.judges(key["concepts"], key["side"]), targets)

    def pictures(self, key: Key, names: Sequence[str], seeds: Sequence[int]) -> dict[str, list[Pixels]]:
        """Name -> one picture for each seed. The noise depends on the seed alone."""
        folders = [self.adapter(each["run"]) for each in key["adapters"]]
        how, pipe = key["fusion"], self.pipe(key["concepts"])
        strengths = [each["strength"] for each in key["adapters"]]
        given = {"fusion": how.get("method", "sum"), "averaged": how.get("averaged"), **how.get("options", {})}
        with style_adapters.adapted(pipe, folders, strengths, **given) as at_step_end:
            return drawn(pipe, names, seeds, at_step_end=at_step_end, **key["sampling"])


def drawn(
    pipe: Any,
    names: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    at_step_end: Callable[..., Any] | None = None,
) -> dict[str, list[Pixels]]:
    """Pictures in the arithmetic that the adapters were trained in: name -> one for each seed."""
    found: dict[str, list[Pixels]] = {name: [] for name in names}
    for seed in seeds:
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16()):
            made = generate(pipe, names, guidance, steps, seed, at_step_end=at_step_end)
        for name, picture in zip(names, made, strict=True):
            found[name].append(picture)
    return found
