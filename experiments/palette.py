"""How a method looks in the plots of experiments, benchmarks and docs: its colour, its marker and its name.

The first colours are of Okabe and Ito (2008). Those that share a plot differ for readers without red, green or blue cones, too.
"""

import re
from typing import Any

__all__ = ["LOOKS", "look"]

LOOKS = {  # method -> colour, marker
    "base": ("#A0A0A0", "o"),
    "lora": ("#222222", "s"),
    "dora": ("#666666", "D"),
    "wm": ("#0072B2", "o"),
    "wm-apart": ("#56B4E9", "D"),
    "wm-near": ("#009E73", "^"),
    "wm-snip": ("#0B2A5C", "p"),
    "snip": ("#D55E00", "X"),
    "snip-near": ("#E69F00", "v"),
    "snip-class": ("#9C2A52", "P"),
    "snip-rows": ("#B9A44C", "<"),
    "snip-columns": ("#A497F5", ">"),
    "rand": ("#A53BEF", "P"),
    "struct": ("#744821", "h"),
    "grad": ("#F0A58F", "d"),
    "dense": ("#C0C0C0", "."),
    "sparse lora": ("#808080", "."),
}
OTHER = ("#666666", ".")
OTHER_NAMES = {"wm-non-overlap": "wm-apart", "lora7": "lora"}
WORDS = {"apart": "masks apart", "near": "held near the base"}
DASHES = {"1e-3": ":", "4e-3": "-."}  # of learning rates


def look(name: str) -> dict[str, Any]:
    """Keywords of matplotlib's `plot` for a method, whose name is as in a recipe, in large or small letters.

    A variant, such as lora-2e-3, has the colour of its method, a dashed line and hollow markers.
    """
    plain = OTHER_NAMES.get(name.lower(), name.lower())
    method = plain
    while method not in LOOKS and "-" in method:
        method = method.rpartition("-")[0]
    colour, marker = LOOKS.get(method, OTHER)
    found: dict[str, Any] = {"color": colour, "marker": marker, "label": _label(name)}
    if method in LOOKS and method != plain:
        found |= {"linestyle": DASHES.get(plain.removeprefix(f"{method}-"), "--"), "markerfacecolor": "white"}
    return found


def _label(name: str) -> str:
    """The name with what it stands for: "wm-near" is "wm, held near the base", "lora-2e-3" is "lora, rate 2e-3"."""
    method, _, way = name.partition("-")
    return f"{method}, {WORDS[way]}" if way in WORDS else re.sub(r"-(\d+e-\d+)$", r", rate \1", name)
