"""Fusion: the time of fusing ten adapters of LLaMA2-7B's shape, compared with reading their ten files."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch

import shira
from shira.fusion.fusing import Base
from shira.fusion.methods import METHODS

from .common import alternate, print_row, show
from .switch import LLAMA2_7B, adapter_for, model_of

ADAPTERS = 10
LAYERS = 4  # of 32, so that base, adapters and result take less than 3 GB


def main(plot: Path | None, quick: bool) -> list[dict[str, Any]]:
    """Each method, from files in the page cache to an adapter in memory: overwrites with a base, and deltas without one."""
    shapes = [(512, 512)] * 3 if quick else LLAMA2_7B[: 5 * LAYERS]
    model = model_of(shapes, torch.bfloat16)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("overwrite", "delta"):
            paths = [f"{folder}/{kind}{number}.safetensors" for number in range(ADAPTERS)]
            entries = 0
            for number, path in enumerate(paths):
                entries += save(model, number, kind, path)
            figures = measure(paths, model if kind == "overwrite" else None, 1 if quick else 5)
            setup = f"{len(paths)} {kind} adapters, {len(shapes)} tensors"
            rows.append(print_row("fusion", setup=setup, million_entries=round(entries / 1e6, 1), ms=figures))
    show("fusion", rows, lambda row: str(row["setup"]), plot)
    return rows


def save(model: torch.nn.Module, number: int, kind: str, path: str) -> int:
    """Write a random adapter with fingerprints; returns its number of entries."""
    weights = dict(model.named_parameters())
    tensors, prints = {}, {}
    for name, tensor in adapter_for(weights, number).tensors.items():
        tensors[name] = shira.SparseTensor(tensor.shape, tensor.indices, tensor.values, kind)
        prints[name] = shira.sparse.tensor.fingerprint(shira.kernels.gather(weights[name], tensor.indices))
    adapter = shira.Adapter(tensors, {"fingerprints": prints})
    adapter.save(path)
    return adapter.nnz


def measure(paths: list[str], base: Base | None, repeats: int) -> dict[str, float]:
    """Milliseconds for reading the files one after the other, and for fusing them by each method."""

    def read() -> None:
        for path in paths:
            shira.load(path)

    runs: dict[str, Any] = {"read": read}
    for method in METHODS:
        runs[f"shira {method}"] = functools.partial(shira.fuse, dict.fromkeys(paths, 1.0), base, method)
    return {name: 1e3 * seconds for name, seconds in alternate(runs, repeats).items()}
