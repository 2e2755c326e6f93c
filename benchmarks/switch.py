"""Switching: shira, LoRA's fuse, PEFT's SHiRA merge and plain torch operators, on one weight or on the shape of LLaMA2-7B."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import shira

from .common import alternate, print_row, show

RANK = 32
DENSITY = 0.01


def random_positions(numel: int, density: float, seed: int) -> Tensor:
    """Sorted, unique positions, int32 [about density · numel]."""
    generator = torch.Generator().manual_seed(seed)
    gaps = torch.empty(int(numel * density * 1.2) + 50).geometric_(density, generator=generator)
    positions = gaps.cumsum(0, dtype=torch.float64) - 1
    return positions[positions < numel].to(torch.int32)


def adapter_for(weights: dict[str, Tensor], seed: int, indices_of: shira.Adapter | None = None) -> shira.Adapter:
    """An adapter with random values, at random positions or at those of another adapter."""
    tensors = {}
    for number, (name, weight) in enumerate(weights.items()):
        where = (
            indices_of.tensors[name].indices if indices_of else random_positions(weight.numel(), DENSITY, 1000 * seed + number)
        )
        values = torch.randn(where.numel(), generator=torch.Generator().manual_seed(seed)).to(weight.dtype)
        tensors[name] = shira.SparseTensor(tuple(weight.shape), where, values)
    return shira.Adapter(tensors)


def model_of(shapes: list[tuple[int, int]], dtype: torch.dtype) -> nn.Module:
    """A model with weights of these shapes. To save time, only every 4096th entry is random."""
    model = nn.Module()
    for number, shape in enumerate(shapes):
        weight = torch.full(shape, 0.01, dtype=dtype)
        weight.view(-1)[::4096].normal_()
        model.register_parameter(f"w{number}", nn.Parameter(weight, requires_grad=False))
    return model


def measure(shapes: list[tuple[int, int]], dtype: torch.dtype, repeats: int, *, all_peers: bool) -> dict[str, float]:
    """Milliseconds of each change of adapters, on a model with weights of these shapes."""
    model = model_of(shapes, dtype)
    weights = dict(model.named_parameters())
    a, b = adapter_for(weights, 1), adapter_for(weights, 2)
    switcher = shira.Switcher(model)
    switcher.add("a", a)
    switcher.add("b", b)
    switcher.add("a2", adapter_for(weights, 3, indices_of=a))
    states: dict[str, str | None] = {}

    def use(before: str | None, after: Any) -> Any:
        name = f"shira {before or 'base'} to {'a + b/2' if isinstance(after, dict) else after or 'base'}"
        states[name] = before
        return name, lambda: switcher.use(after)

    long = [(w.view(-1), a.tensors[n].indices.long(), a.tensors[n].values) for n, w in weights.items()]

    def each(change: Any) -> Any:
        return lambda: [change(*entry) for entry in long]

    touched = sum(int((a.tensors[n].indices.long() * w.itemsize // 64).unique().numel()) for n, w in weights.items())
    same_lines = torch.zeros(touched * 8, dtype=torch.int64)  # the same number of 64-byte cache lines, side by side

    runs = {
        "index_copy_": each(lambda flat, where, values: flat.index_copy_(0, where, values)),
        "same cache lines": same_lines.bitwise_not_,
        **dict([use(None, "a"), use("a", "b"), use("a", "a2"), use("a", None), use(None, {"a": 1.0, "b": 0.5})]),
        **lora_fuses(weights.values()),
    }
    if all_peers:
        sparse = {n: sparse_delta(a.tensors[n]) for n in weights}
        runs["PEFT SHiRA merge"] = lambda: [weight.add_(sparse[name]) for name, weight in weights.items()]
        runs["scatter_"] = each(lambda flat, where, values: flat.scatter_(0, where, values))

    def between(name: str) -> None:
        if name in states:
            switcher.use(states[name])
        elif switcher.active:
            switcher.use(None)

    with torch.no_grad():
        seconds = alternate(runs, repeats, between=between)
    return {name: 1e3 * value for name, value in seconds.items()}


def lora_fuses(weights: Collection[Tensor]) -> dict[str, Callable[[], Any]]:
    """Two ways to add a LoRA to each weight: in place, and W + AB as in the paper."""
    factors = {w.shape: (w.new_empty(w.shape[0], RANK).normal_(), w.new_empty(RANK, w.shape[1]).normal_()) for w in weights}

    def in_place() -> None:
        for weight in weights:
            weight.addmm_(*factors[weight.shape], alpha=1e-6)

    def as_in_paper() -> None:
        for weight in weights:
            left, right = factors[weight.shape]
            weight.copy_(weight + left @ right)

    return {"LoRA in place": in_place, "LoRA W + AB": as_in_paper}


def sparse_delta(tensor: shira.SparseTensor) -> Tensor:
    """The sparse tensor that PEFT's SHiRA adds to a weight when it merges."""
    where = tensor.indices.long()
    return torch.sparse_coo_tensor(
        torch.stack([where // tensor.shape[1], where % tensor.shape[1]]), tensor.values, tensor.shape, check_invariants=False
    )


LLAMA2_7B = ([(4096, 4096)] * 3 + [(11008, 4096), (4096, 11008)]) * 32


def main(plot: Path | None, quick: bool, scale: bool = False) -> list[dict[str, Any]]:
    """One weight of several sizes and dtypes; with `scale`, the target weights of LLaMA2-7B (9 GB of memory)."""
    rows = []
    if scale:
        shapes = LLAMA2_7B[: 5 if quick else len(LLAMA2_7B)]
        figures = measure(shapes, torch.bfloat16, 1 if quick else 5, all_peers=False)
        rows.append(print_row("scale", side=f"{len(shapes)} tensors of LLaMA2-7B", dtype="bfloat16", ms=figures))
    else:
        for dtype in (torch.float32, torch.bfloat16):
            for side in (256, 512) if quick else (1024, 4096, 8192):
                figures = measure([(side, side)], dtype, 3 if quick else 15, all_peers=True)
                rows.append(print_row("switch", side=side, dtype=str(dtype)[6:], ms=figures))
    show(f"switching, {DENSITY:.0%} of the entries", rows, lambda row: f"{row['side']} {row['dtype']}", plot)
    return rows
