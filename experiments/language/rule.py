"""The rule of `lr_scale="auto"` beside searches for the best learning rate that were made with lr_scale 1.

For each search in the results: the scale that attach chooses for this mask, budget and data, and the learning rate that it
gives at LoRA's best one on the same data, beside the best one of the search.

    python -m experiments.language.rule table2-gpu table2-short density-arc table4-short table4-gpu fusions
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
GIVEN = "lr_scale"


def searches(store: Store) -> Iterator[tuple[Key, dict[float, float]]]:
    """(key of a run, learning rate -> validation loss) for each method and data that three or more rates were tried on."""
    found: dict[str, tuple[Key, dict[float, float]]] = {}
    for line in store.lines():
        key, method = line["key"], line["key"].get("method", {})
        plain = {"reach", GIVEN}.isdisjoint(method) and not key.get("avoid") and "decompose" not in method.get("options", {})
        if key["kind"] == "train" and key.get("seed") == 0 and plain:
            about = json.dumps([key["data"], method], sort_keys=True)
            found.setdefault(about, (key, {}))[1][key["rate"]] = line["result"]["validation_loss"]
    yield from (each for each in found.values() if len(each[1]) > 2)


def is_lora(method: dict[str, Any]) -> bool:
    return method.get("peft") == "LoraConfig" and set(method["options"]) == {"r", "lora_alpha", "lora_dropout"}


def compared(name: str) -> Iterator[list[str]]:
    """A line for each search of a sparse mask, where LoRA of rank 10 was searched on the same data."""
    store = Store(RESULTS / f"{name}.jsonl")
    lab, all_found = Lab(store), list(searches(store))
    loras = {key["data"]: tried for key, tried in all_found if is_lora(key["method"]) and key["method"]["options"]["r"] == 10}
    for key, tried in all_found:
        options = key["method"]["options"]
        if "peft" in key["method"] or key["data"] not in loras:
            continue
        model = lab.model(key["model"], key["dtype"])[0]
        given = {"targets": key["targets"], "calibration": lab.calibration(key, lab.rows(key)), "seed": key["seed"]}
        with shira.attach(model, **given | options | {GIVEN: "auto"}) as tuner:
            scale = tuner.lr_scale
        lora = loras[key["data"]]
        of_lora, best = min(lora, key=lora.__getitem__), min(tried, key=tried.__getitem__)
        chosen = of_lora * scale
        size = f"rank {options['rank']}" if "rank" in options else f"{options['density']:.1%}"
        cells = [name, key["data"], options["mask"], size, f"{scale:g}", f"{of_lora:g}", f"{chosen:g}", f"{best:g}"]
        loss = next((tried[rate] for rate in tried if math.isclose(rate, chosen)), None)
        yield [
            *cells,
            f"{abs(math.log2(chosen / best)):.1f}",
            "not tried" if loss is None else f"{loss:.3f}",
            f"{tried[best]:.3f}",
        ]


def main(names: list[str]) -> None:
    lines = []
    for name in names:
        for line in compared(name):
            print(*line, file=sys.stderr)
            lines.append(line)
    head = [
        "results",
        "data",
        "mask",
        "budget",
        "scale",
        "LoRA's best",
        "given",
        "best",
        "apart, octaves",
        "loss, given",
        "loss, best",
    ]
    print(markdown(head, lines))


if __name__ == "__main__":
    main(sys.argv[1:])
