"""Styles as adapters of a face generator that this project did not train: 64 by 64 pixels, transposed convolutions.

python -m experiments.image.faces compare      each mask's loss on unseen faces at three learning rates; several may run at once
python -m experiments.image.faces styles       trains bluefire and paintings, adds them up in several ways, draws faces.png
python -m experiments.image.faces table        both as Markdown
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

import shira
from shira.data.grids import grid
from shira.data.packages import cache_folder
from shira.errors import DataError, ShiraError

from ..intervals import half_width
from ..store import Key, Store, number, work
from . import face_styles
from .dcgan import drawn, load
from .face_styles import LOW_RANK, STYLES, Faces

RESULTS = Path(__file__).parent / "faces.jsonl"
MASKS = ("snip", "wm", "rand", "struct", LOW_RANK)
RATES = (2e-3, 6e-3, 2e-2)
FURTHER = (2e-4, 6e-4, 2e-3, 6e-3, 2e-2, 6e-2, 2e-1)  # the next one is tried while the lowest or highest is the best
REACHES = (0.01, 0.1)  # of stay_near
SEEDS = (1, 2)  # of batches and masks: the best rate again. A key without a seed is of seed 0
TRAIN, HELD_OUT, SHOWN = 200, 40, 4  # faces
TRAIN_SEED, HELD_OUT_SEED = 0, 1
A, B = STYLES


def compare_keys(store: Store, steps: int, batch: int) -> list[Key]:
    """Each mask and style at three rates, and one more while the best is at an end; then the best again with other seeds."""
    found: list[Key] = []
    for mask in MASKS:
        for style in STYLES:
            key = {"what": "compare", "mask": mask, "style": style, "steps": steps, "batch": batch}
            tried = {rate: line["loss"] for rate in FURTHER if (line := store.get(key | {"rate": rate}))}
            rates = {*RATES, *tried}
            if rates == {*tried}:
                lowest = min(tried, key=lambda rate: tried[rate])
                at = FURTHER.index(lowest)
                rates |= {*FURTHER[max(0, at - 1) : at + 2]}
                if rates == {*tried}:
                    found += [key | {"rate": lowest, "seed": seed} for seed in SEEDS]
            found += [key | {"rate": rate} for rate in sorted(rates)]
    return found


def path_of(key: Key) -> Path:
    """Where the adapter of a run is kept. It is not in git, and is trained again when it is missing."""
    return cache_folder() / "images" / "faces" / f"{key['mask']}-{key['style']}-{number(key)}.safetensors"


def train_run(key: Key, train: Faces, held_out: Faces) -> dict[str, Any]:
    """Trains a style as the key says, and keeps the adapter."""
    style, rate, seed = key["style"], key["rate"], key.get("seed", 0)
    data = face_styles.batches(train, style, key["steps"], key["batch"], seed)
    result = {"base_loss": face_styles.held_out_loss(load(), held_out, style)}
    if key["mask"] == LOW_RANK:
        return result | face_styles.low_rank(load(), style, data, held_out, rate, seed)
    avoid = [adapter_of(key["avoid"], train, held_out)] if "avoid" in key else []
    adapter, found = face_styles.trained(load(), style, data, held_out, key["mask"], rate, avoid, key.get("reach"), seed)
    path_of(key).parent.mkdir(parents=True, exist_ok=True)
    adapter.save(path_of(key))
    return result | found


def adapter_of(key: Key, train: Faces, held_out: Faces) -> shira.Adapter:
    """The adapter of a run."""
    if not path_of(key).exists():
        train_run(key, train, held_out)
    return shira.load(path_of(key))


def best(store: Store, mask: str, style: str) -> Key:
    """The run of the lowest loss on held-out faces. Raises DataError if there is no result of this mask."""
    lines = [line for line in store.lines() if line["key"]["what"] == "compare"]
    found = [
        line for line in lines if (line["key"]["mask"], line["key"]["style"]) == (mask, style) and "seed" not in line["key"]
    ]
    if not found:
        raise DataError(f"no result of {mask} on {style} in {store.path}; first: python -m experiments.image.faces compare")
    return dict(min(found, key=lambda line: line["result"]["loss"])["key"])


def keys_to_add(store: Store, mask: str) -> dict[str, Key]:
    """Both styles at their best rates, B without the entries of A, and both held near the base: name -> run."""
    a, b = (best(store, mask, style) for style in STYLES)
    found = {A: a, B: b, f"{B}-apart": b | {"what": "extra", "avoid": a}}
    return found | {
        f"{key['style']}-near-{reach:g}": key | {"what": "extra", "reach": reach} for reach in REACHES for key in (a, b)
    }


def both_faces() -> tuple[Faces, Faces]:
    """The faces that are trained on, and others."""
    return face_styles.kept_faces(load(), TRAIN, TRAIN_SEED), face_styles.kept_faces(load(), HELD_OUT, HELD_OUT_SEED)


def ways() -> dict[str, tuple[dict[str, float], dict[str, Any]]]:
    """How both styles are had at once: label -> what Switcher.use is given."""
    both = {A: 1.0, B: 1.0}
    found: dict[str, tuple[dict[str, float], dict[str, Any]]] = {
        A: ({A: 1.0}, {}),
        B: ({B: 1.0}, {}),
        "sum": (both, {}),
        "sum at 0.5": ({A: 0.5, B: 0.5}, {}),
        f"sum, {A} at 0.4": ({A: 0.4, B: 1.0}, {}),
        "mean": (both, {"method": "mean"}),
        "max": (both, {"method": "max"}),
        "ties": (both, {"method": "ties", "density": 1.0}),
        "dare": (both, {"method": "dare"}),
        "avoid, sum": ({A: 1.0, f"{B}-apart": 1.0}, {}),
        f"avoid, sum, {A} at 0.4": ({A: 0.4, f"{B}-apart": 1.0}, {}),
        f"{B}, avoid": ({f"{B}-apart": 1.0}, {}),
    }
    for reach in REACHES:
        for style in STYLES:
            found[f"{style}, stay_near {reach:g}"] = ({f"{style}-near-{reach:g}": 1.0}, {})
        found[f"stay_near {reach:g}, sum"] = ({f"{style}-near-{reach:g}": 1.0 for style in STYLES}, {})
    return found


def styles_command(options: argparse.Namespace) -> None:
    """Trains what is missing, measures each way of adding the styles, and draws the grid."""
    store, model = Store(options.results), load()
    train, held_out = both_faces()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    switcher = shira.Switcher(model)
    adapters = {name: adapter_of(key, train, held_out) for name, key in keys_to_add(store, options.mask).items()}
    for name, adapter in adapters.items():
        switcher.add(name, adapter)
    overlap = shira.compare(adapters[A], adapters[B], base=model, spectra=False).total.pairs[0].overlap
    print(f"{overlap:.1%} of the weights of {A} are weights of {B}")
    store.forget(lambda line: (line["key"]["what"], line["key"]["mask"]) == ("sum", options.mask))
    for label, (selection, method) in ({"base": (None, {})} | ways()).items():
        switcher.use(selection, **method)
        key, start = {"what": "sum", "mask": options.mask, "way": label}, time.monotonic()
        result = face_styles.measured(model, held_out) | {"overlap": overlap}
        store.add(key, result, time.monotonic() - start)
    columns: dict[str, tuple[dict[str, float] | None, dict[str, Any]]] = {"base": (None, {})}
    columns |= {f"{style} {strength:g}": ({style: strength}, {}) for style in STYLES for strength in (0.5, 1.0, 1.5)}
    columns |= {f"A + B, {label}": ways()[label] for label in options.ways}
    columns["base again"] = (None, {})
    shown = []
    for selection, method in columns.values():
        switcher.use(selection, **method)
        shown.append([Image.fromarray(picture) for picture in drawn(model, held_out.latents[:SHOWN])])
    same = same_bits(model.state_dict(), before)
    print(f"base again bit for bit: {'yes' if same else 'NO'}")
    titles = [*columns][:-1] + ["base again, " + ("same bits" if same else "OTHER BITS")]
    rows = [list(row) for row in zip(*shown, strict=True)]
    # 6 bits a colour make the file a third smaller
    ImageOps.posterize(grid(rows, [""] * SHOWN, titles), 6).save(options.out, optimize=True)


def same_bits(state: dict[str, Tensor], before: dict[str, Tensor]) -> bool:
    return all(
        torch.equal(tensor.view(-1).view(torch.uint8), before[name].view(-1).view(torch.uint8))
        for name, tensor in state.items()
    )


def compare_command(options: argparse.Namespace) -> None:
    store, (train, held_out) = Store(options.results), both_faces()

    def wanted() -> list[Key]:
        compared = compare_keys(store, options.steps, options.batch)
        first = [key for key in compared if key["mask"] == options.mask]
        extra = [] if any(store.get(key) is None for key in first) else list(keys_to_add(store, options.mask).values())
        return first + extra + [key for key in compared if key not in first]

    work(
        wanted,
        lambda key: train_run(key, train, held_out),
        store,
        lambda key, left: print(f"{left} left: {json.dumps(key)}", flush=True),
        lambda key, error: print(f"failed: {json.dumps(key)}: {error}", flush=True),
    )


def table_command(options: argparse.Namespace) -> None:
    lines = [(line["key"], line["result"]) for line in Store(options.results).lines()]
    compared = [key | result for key, result in lines if key["what"] == "compare"]
    rates = sorted({row["rate"] for row in compared})
    print("base: " + ", ".join(sorted({f"{row['style']} {row['base_loss']:.4f}" for row in compared})))
    has_seeds = any("seed" in row for row in compared)
    columns = ["style", "mask", "parameters", *(f"{rate:g}" for rate in rates), *[f"{1 + len(SEEDS)} seeds"] * has_seeds]
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    for style in STYLES:
        for mask in MASKS:
            every = [row for row in compared if (row["mask"], row["style"]) == (mask, style)]
            found = {row["rate"]: row for row in every if "seed" not in row}
            best_loss = min((row["loss"] for row in found.values()), default=0)
            cells = [f"{found[rate]['loss']:.4f}" if rate in found else "" for rate in rates]
            cells = [f"**{cell}**" if cell == f"{best_loss:.4f}" else cell for cell in cells]
            again = [row["loss"] for row in every if "seed" in row]
            cells += [over_seeds([best_loss, *again]) if again else ""] * has_seeds
            count = max((row["parameters"] for row in found.values()), default=0)
            print(f"| {style} | {mask} | {count:,} | " + " | ".join(cells) + " |")
    print(f"\n| mask | way | colours from {A} | colours from {B} | structure |\n|---|---|---|---|---|")
    for key, row in lines:
        if key["what"] == "sum":
            print(f"| {key['mask']} | {key['way']} | {row[f'to_{A}']:.1f} | {row[f'to_{B}']:.1f} | {row['structure']:.2f} |")


def over_seeds(losses: Sequence[float]) -> str:
    """The mean and its 95 % interval: '0.1364 ± 0.0012'."""
    return f"{statistics.fmean(losses):.4f} ± {half_width(losses):.4f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    comparing = commands.add_parser("compare", help="train each mask at each rate, as far as it is not in the results")
    comparing.add_argument("--steps", type=int, default=100, help="of training (100)")
    comparing.add_argument("--batch", type=int, default=6, help="faces a step (6)")
    drawing = commands.add_parser("styles", help="add up both styles at their best rates, measure that, draw the grid")
    drawing.add_argument(
        "--ways", nargs="*", default=["sum", "avoid, sum", f"sum, {A} at 0.4"], help="of adding the styles, to be drawn"
    )
    drawing.add_argument("--out", type=Path, default=Path("faces.png"))
    tables = commands.add_parser("table", help="print the results")
    for command in (comparing, drawing):
        command.add_argument("--mask", default="snip", help="of the styles that are added up (snip)")
    for command in (comparing, drawing, tables):
        command.add_argument("--results", type=Path, default=RESULTS, help="file of results")
    options = parser.parse_args(arguments)
    try:
        {"compare": compare_command, "styles": styles_command, "table": table_command}[options.command](options)
    except ShiraError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
