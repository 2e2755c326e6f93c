"""The style experiment's tables, its grids of pictures, and one HTML page with both."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from jinja2 import Environment
from PIL import Image

from experiments.language.tables import markdown
from experiments.store import Key, Store
from shira.data.grids import grid

from .style_runs import Lab, Recipe, added, best_rate, chosen, fusions_of, judges_key, losses, pair, score_key, train_seeds
from .styles import SEEN, UNSEEN, VALIDATED

CONCEPTS = (*SEEN[1::3], *UNSEEN[2:16:4])  # rows of the grids
SIZES = {"few": "8 concepts, 64 pictures", "many": "300 concepts, 300 pictures"}


def share(value: Sequence[float]) -> str:
    """A share and its interval, in percent."""
    return f"{100 * value[0]:.0f} ± {100 * value[1]:.0f}"


class Table(NamedTuple):
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(recipe: Recipe, store: Store) -> list[Table]:
    """All tables, as far as their runs are there."""
    styles = (*recipe["styles"], *recipe["more_styles"])
    found = [*(alone(recipe, store, style) for style in styles), sums(recipe, store), over_seeds(recipe, store)]
    last = (ways(recipe, store), strengths(recipe, store), searched(recipe, store), judged(recipe, store))
    return [table for table in (*found, *last) if table.rows]


def in_markdown(found: Sequence[Table]) -> str:
    return "\n\n".join(f"**{table.title}**\n\n{markdown(table.head, table.rows)}" for table in found)


def alone(recipe: Recipe, store: Store, style: str) -> Table:
    """Each method's adapter of a style, at strength 1."""
    rows = []
    base = store.get(score_key(recipe, [], None))
    if base:
        rows.append(["base", "", "", "", *_both(base, style), "", ""])
    for size in recipe["sizes"]:
        for name in recipe["methods"]:
            key = chosen(recipe, store, style, size, name)
            made, found = (store.get(key), store.get(score_key(recipe, [(key, 1.0)], style))) if key else (None, None)
            if key and made and found:
                groups = [found[group] for group in ("seen", "unseen")]
                distance = " / ".join(f"{group['distance'][0]:.1f}" for group in groups)
                similar = " / ".join(f"{group['similarity'][0]:.2f}" for group in groups)
                rows.append(
                    [name, size, f"{key['rate']:g}", f"{made['parameters']:,}", *_both(found, style), distance, similar]
                )
    head = ["method", "pictures", "learning rate", "parameters", f"{style}, seen", "unseen", "named, seen", "unseen"]
    return Table(f"{style}, at strength 1", [*head, "distance, seen / unseen", "similarity"], rows if len(rows) > 1 else [])


def _both(found: dict[str, Any], look: str) -> list[str]:
    return [share(found[group][what]) for what in (look, "recognised") for group in ("seen", "unseen")]


def sums(recipe: Recipe, store: Store) -> Table:
    """What is left of two styles when they are added, for each method and size."""
    one, other = recipe["styles"]
    rows = []
    for size in recipe["sizes"]:
        for name in recipe["methods"]:
            keys = pair(recipe, store, size, name, {})
            row = keys and _sum_row(recipe, store, keys, {})
            if row:
                rows.append([name, size, *row])
    head = ["method", "pictures", one, other, "base", "named, seen", "unseen", "lost by adding, seen", "unseen"]
    return Table(f"{one} + {other}, both at strength 1", head, rows)


def over_seeds(recipe: Recipe, store: Store) -> Table:
    """The sums again for each seed of training, as far as they are there: a mean, and the single ones."""
    one, other = recipe["styles"]
    rows = []
    seeds = train_seeds(recipe)
    for size in recipe["sizes"] if len(seeds) > 1 else ():
        for name in recipe["methods"]:
            pairs = [pair({**recipe, "seed": seed}, store, size, name, {}) for seed in seeds]
            found = [left for keys in pairs if keys and (left := _left(recipe, store, keys, {}))]
            if len(found) > 1:
                single = [[*each.alone, *(named for named, _ in each.named), *each.lost] for each in found]
                rows.append([name, size, *(_mean_of(values) for values in zip(*single, strict=True))])
    head = ["method", "pictures", f"named alone: {one}", other, "named together, seen", "unseen"]
    return Table(f"{one} + {other}, each seed of training", [*head, "lost by adding, seen", "unseen"], rows)


def _mean_of(shares: Sequence[float]) -> str:
    return f"{100 * fmean(shares):.0f} ({', '.join(f'{100 * each:.0f}' for each in shares)})"


class Left(NamedTuple):
    """What two styles leave of each other. The shares are of the looks, of all concepts; the pairs are (seen, unseen)."""

    looks: list[float]
    named: list[Sequence[float]]  # each a share and its interval
    alone: list[float]  # share of the unseen concepts named with each style alone
    lost: list[float]  # how much less is named than by the mean of the two alone


def _left(recipe: Recipe, store: Store, keys: Sequence[Key], fusion: Recipe) -> Left | None:
    both = store.get(added(recipe, keys, fusion))
    single = [found for key in keys if (found := store.get(score_key(recipe, [(key, 1.0)], key["style"])))]
    if both is None or len(single) < len(keys):
        return None
    weights = {"seen": len(SEEN), "unseen": len(UNSEEN)}
    looks = [
        sum(both[g][look][0] * weights[g] for g in weights) / sum(weights.values()) for look in (*recipe["styles"], "base")
    ]
    lost = [fmean(s[g]["recognised"][0] for s in single) - both[g]["recognised"][0] for g in weights]
    return Left(looks, [both[g]["recognised"] for g in weights], [s["unseen"]["recognised"][0] for s in single], lost)


def _sum_row(recipe: Recipe, store: Store, keys: Sequence[Key], fusion: Recipe) -> list[str] | None:
    """Looks of all concepts; how many are named; and how much less that is than the mean of the two alone, in points."""
    left = _left(recipe, store, keys, fusion)
    if left is None:
        return None
    looks, lost = ([f"{100 * each:.0f}" for each in shares] for shares in (left.looks, left.lost))
    return [*looks, *map(share, left.named), *lost]


def ways(recipe: Recipe, store: Store) -> Table:
    """The ways to add two styles, after training on many concepts."""
    one, other = recipe["styles"]
    rows = []
    for name in recipe["fused"]:
        for how, fusion in fusions_of(recipe, name).items():
            keys = pair(recipe, store, recipe["sizes"][-1], name, fusion)
            row = keys and _sum_row(recipe, store, keys, fusion)
            if row:
                rows.append([name, how, *row])
    head = ["method", "how", one, other, "base", "named, seen", "unseen", "lost by adding, seen", "unseen"]
    return Table(f"Ways to add {one} and {other}, trained on many concepts", head, rows)


def strengths(recipe: Recipe, store: Store) -> Table:
    """One style at several strengths."""
    style = recipe["styles"][0]
    rows = []
    for name in recipe["swept"]:
        key = chosen(recipe, store, style, recipe["sizes"][-1], name)
        for strength in recipe["sweep"] if key else ():
            adapters = [(key, strength)] if strength else []
            found = store.get(score_key(recipe, adapters, style if strength else None))
            if found:
                rows.append([name, f"{strength:g}", *_both(found, style)])
    head = ["method", "strength", f"{style}, seen", "unseen", "named, seen", "unseen"]
    return Table(f"{style} at several strengths, trained on many concepts", head, rows)


def searched(recipe: Recipe, store: Store) -> Table:
    """Every learning rate that was tried, and its loss on concepts that were not trained."""
    rows = []
    for size in recipe["sizes"]:
        for name in recipe["methods"]:
            found, best = losses(recipe, store, size, name), best_rate(recipe, store, size, name)
            tried = [f"{loss:.4f} at {rate:g}{' (lowest)' * (rate == best)}" for rate, loss in sorted(found.items())]
            rows += [[name, size, ", ".join(tried)]] if tried else []
    return Table("Learning rates", ["method", "pictures", f"loss on {VALIDATED} unseen concepts"], rows)


def judged(recipe: Recipe, store: Store) -> Table:
    """How often the judges are right about real pictures that they were not trained on."""
    found = store.get(judges_key(recipe)) or {}
    shares = {what: found[what] for what in ("style", "concept") if found}
    rows = [[what, *(f"{100 * share:.0f} %" for share in of.values())] for what, of in shares.items()]
    looks = list(shares["style"]) if shares else []
    return Table("How often the judges are right about real pictures that were held out", ["judge of the", *looks], rows)


def pictures(lab: Lab, recipe: Recipe, into: Path) -> list[tuple[str, Path]]:
    """Draw all grids whose adapters are trained: (what a grid shows, its file) of each."""
    store = lab.store
    one, other = recipe["styles"]
    found: list[tuple[str, Path]] = []

    def draw(file: str, about: str, columns: Sequence[tuple[str, Key | None]]) -> None:
        shown = [(title, key) for title, key in columns if key is not None and _trained(store, key)]
        if len(shown) > 1:
            made = [lab.pictures(key, CONCEPTS, [0]) for _, key in shown]
            rows = [[Image.fromarray(each[name][0]) for each in made] for name in CONCEPTS]
            titles = [f"{name} (unseen)" if name in UNSEEN else name for name in CONCEPTS]
            grid(rows, titles, [title for title, _ in shown], smallest=96).save(into / f"{file}.png", optimize=True)
            found.append((about, into / f"{file}.png"))

    base = ("base", score_key(recipe, [], None))
    for size in recipe["sizes"]:
        for style in recipe["styles"]:
            columns = [(name, _single(recipe, store, style, size, name)) for name in recipe["methods"]]
            draw(f"styles-{style}-{size}", f"{style}, trained on {SIZES[size]}", [base, *columns])
        sums_of = [
            (name, keys and added(recipe, keys, {}))
            for name in recipe["methods"]
            for keys in [pair(recipe, store, size, name, {})]
        ]
        draw(f"styles-sum-{size}", f"{one} + {other} at strength 1, trained on {SIZES[size]}", [base, *sums_of])
    size = recipe["sizes"][-1]
    for name in recipe["swept"]:
        key = chosen(recipe, store, one, size, name)
        columns = [(f"{s:g}", score_key(recipe, [(key, s)] if s else [], one if s else None)) for s in recipe["sweep"] if key]
        draw(f"styles-strength-{name.lower()}", f"{name}: {one} at several strengths", columns)
    for name in recipe["fused"]:
        columns = [(style, _single(recipe, store, style, size, name)) for style in recipe["styles"]]
        columns += [
            (how, keys and added(recipe, keys, fusion))
            for how, fusion in fusions_of(recipe, name).items()
            for keys in [pair(recipe, store, size, name, fusion)]
        ]
        draw(f"styles-ways-{name.lower()}", f"{name}: ways to add {one} and {other}", [base, *columns])
    for style in recipe["more_styles"]:
        columns = [(name, _single(recipe, store, style, size, name)) for name in recipe["more_methods"]]
        draw(f"styles-{style.lower()}", f"{style}, trained on {SIZES[size]}", [base, *columns])
    return found


def _single(recipe: Recipe, store: Store, style: str, size: str, name: str) -> Key | None:
    key = chosen(recipe, store, style, size, name)
    return key and score_key(recipe, [(key, 1.0)], style)


def _trained(store: Store, key: Key) -> bool:
    return all(store.line(each["run"]) is not None for each in key["adapters"])


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Styles</title>
<style>
body { font: 16px sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em }
img { max-width: 100% } figure { margin: 2em 0 } figcaption, caption { font-weight: bold; text-align: left; padding: .5em 0 }
table { border-collapse: collapse; margin: 2em 0; display: block; overflow: auto }
td, th { padding: .3em .7em; text-align: right }
td:first-child, th:first-child { text-align: left } tr { border-bottom: 1px solid #ccc }
</style>
<h1>Styles on the emoji model</h1>
{% for about, path in grids %}<figure><figcaption>{{ about }}</figcaption><img src="{{ path.name }}" alt="{{ about }}"></figure>
{% endfor %}{% for table in tables %}<table><caption>{{ table.title }}</caption>
<tr>{% for cell in table.head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}</html>
"""


def page(found: Sequence[Table], grids: Sequence[tuple[str, Path]]) -> str:
    """One HTML page: the grids, then the tables. It lies beside the PNG files that it shows."""
    return Environment(autoescape=True).from_string(PAGE).render(tables=found, grids=grids)
