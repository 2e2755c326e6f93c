"""The rule of `lr_scale="auto"` beside searches for the best learning rate that were made with lr_scale 1.

For each search in the results: the scale that attach chooses for this mask, budget and data, and the learning rate that it
gives at LoRA's best one on the same data, beside the best one of the search.

    python -m experiments.language.rule table2-gpu table2-short density-arc table4-short table4-gpu fusions-even fusions-gemma
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import shira
from experiments.store import Key, Store

from .runs import Lab
from .tables import markdown

RESULTS = Path(__file__).parent / "results"
HEAD = ["results", "data", "mask", "budget", "scale", "LoRA's best", "given", "best", "octaves", "loss, given", "loss, best"]
Tried = dict[float, float]  # learning rate -> validation loss


def searches(store: Store) -> Iterator[tuple[Key, Tried, Tried]]:
    """(key of a run, what was tried, what LoRA of rank 10 tried on the same data) for each search of three or more rates."""
    found: dict[str, tuple[Key, Tried]] = {}
    for line in store.lines():
        key, options = line["key"], line["key"].get("method", {}).get("options", {})
        plain = "reach" not in key.get("method", {}) and not key.get("avoid") and {"decompose", "lr_scale"}.isdisjoint(options)
        if key["kind"] == "train" and key.get("seed") == 0 and plain:
            about = json.dumps([key["data"], key["method"]], sort_keys=True)
            found.setdefault(about, (key, {}))[1][key["rate"]] = line["result"]["validation_loss"]
    whole = [each for each in found.values() if len(each[1]) > 2]
    loras = {key["data"]: tried for key, tried in whole if is_lora(key["method"])}
    yield from (
        (key, tried, loras[key["data"]]) for key, tried in whole if "peft" not in key["method"] and key["data"] in loras
    )


def is_lora(method: dict[str, Any]) -> bool:
    """A LoRA of rank 10, and no other kind."""
    options = method["options"]
    return method.get("peft") == "LoraConfig" and options.keys() == {"r", "lora_alpha", "lora_dropout"} and options["r"] == 10


def row(name: str, key: Key, tried: Tried, lora: Tried, scale: float) -> list[str]:
    """A line of the table, with the columns of HEAD, for a mask that attach gives this scale."""
    options = key["method"]["options"]
    of_lora, best = min(lora, key=lora.__getitem__), min(tried, key=tried.__getitem__)
    given = of_lora * scale
    loss = next((f"{tried[rate]:.3f}" for rate in tried if math.isclose(rate, given)), "not tried")
    size = f"rank {options['rank']}" if "rank" in options else f"{options['density']:.1%}"
    cells = [name, key["data"], options["mask"], size, *(f"{number:g}" for number in (scale, of_lora, given, best))]
    return [*cells, f"{abs(math.log2(given / best)):.1f}", loss, f"{tried[best]:.3f}"]


def main(names: list[str]) -> None:
    lines = []
    for name in names:
        store = Store(RESULTS / f"{name}.jsonl")
        lab = Lab(store)
        for key, tried, lora in searches(store):
            given = {"targets": key["targets"], "calibration": lab.calibration(key, lab.rows(key)), "seed": key["seed"]}
            model = lab.model(key["model"], key["dtype"])[0]
            with shira.attach(model, **given | key["method"]["options"] | {"lr_scale": "auto"}) as tuner:
                lines.append(row(name, key, tried, lora, tuner.lr_scale))
            print(*lines[-1], file=sys.stderr)
    print(markdown(HEAD, lines))


if __name__ == "__main__":
    main(sys.argv[1:])
