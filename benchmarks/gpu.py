"""On a GPU: switching, training, and the ways to compute a gradient. A switch is compared with the time of moving its bytes.

    shira bench switch --device cuda        one weight
    shira bench scale --device cuda         the target weights of LLaMA2-7B's shape
    shira bench train --device cuda         a training step of that model, and its peak memory
    shira bench products --device cuda      dense, in blocks, sampled; and the constants for kernels/gpu/products.py

Every run is timed with the device idle before it and after it. Every function also takes "cpu", so that a machine without a GPU
can check that it runs; such figures mean nothing.
"""

import contextlib
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import shira
from shira import kernels
from shira.kernels.gpu import ops as triton_ops
from shira.kernels.gpu import products

from .common import TARGETS, alternate, print_row, show
from .switch import DENSITY, LLAMA2_7B, RANK, adapter_for, lora_fuses, model_of, random_positions, sparse_delta
from .train import NO_DROPOUT, prepare

SECTOR = 32  # bytes: the smallest unit that a GPU reads from or writes to its memory


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def card(device: str, *, quick: bool = False) -> dict[str, Any]:
    """What figures depend on: the GPU's name, and the bytes per second of a long copy, reads and writes together."""
    source = torch.zeros(2**20 if quick else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = alternate({"copy": lambda: target.copy_(source)}, 3 if quick else 20, wait=lambda: wait(device))["copy"]
    name = torch.cuda.get_device_name() if device == "cuda" else "none"
    return {"gpu": name, "copied_bytes_a_second": 2 * source.numel() / seconds}


def sectors(indices: Tensor, itemsize: int) -> int:
    """The number of memory sectors that sorted positions [k] touch."""
    touched = indices.long() * itemsize // SECTOR
    return int((touched[1:] != touched[:-1]).sum()) + bool(touched.numel())


def floor(adapter: shira.Adapter) -> int:
    """The fewest bytes that a switch can move: touched sectors are read and written; positions, values and stash move once."""
    moved = sum(2 * SECTOR * sectors(tensor.indices, tensor.values.itemsize) for tensor in adapter.tensors.values())
    return moved + sum(t.indices.nbytes + 2 * t.values.nbytes for t in adapter.tensors.values())


def measure_switches(
    shapes: list[tuple[int, int]], dtype: torch.dtype, repeats: int, device: str, *, all_peers: bool
) -> dict[str, Any]:
    """Milliseconds of each change of adapters; the bytes that a switch must move, and the time of copying as many bytes."""
    model = model_of(shapes, dtype)
    weights = dict(model.named_parameters())
    a, b = adapter_for(weights, 1), adapter_for(weights, 2)
    a2 = adapter_for(weights, 3, indices_of=a)
    model.to(device)
    weights = dict(model.named_parameters())
    switchers = {"ready": shira.Switcher(model), "host": shira.Switcher(model, ready=1, host=2)}
    for switcher in switchers.values():
        for name, adapter in (("a", a), ("b", b), ("a2", a2)):
            switcher.add(name, adapter)
    before: dict[str, tuple[str, str | None]] = {}
    runs: dict[str, Callable[[], Any]] = {}

    def use(label: str, start: str | None, end: Any, which: str = "ready") -> None:
        before[label] = (which, start)
        runs[label] = lambda: switchers[which].use(end)

    long = [(w.view(-1), a.tensors[n].indices.long().to(device), a.tensors[n].values.to(device)) for n, w in weights.items()]
    same = torch.zeros(
        sum(sectors(t.indices, t.values.itemsize) for t in a.tensors.values()) * SECTOR // 8, dtype=torch.int64
    ).to(device)

    runs["index_copy_"] = lambda: [flat.index_copy_(0, where, values) for flat, where, values in long]
    runs["same sectors"] = same.bitwise_not_
    use("shira base to a", None, "a")
    use("shira a to b", "a", "b")
    use("shira a to a2", "a", "a2")
    use("shira a to base", "a", None)
    use("shira base to a + b/2", None, {"a": 1.0, "b": 0.5})
    use("shira pinned a", "b", "a", "host")  # b is ready, a is in host memory
    runs |= lora_fuses(weights.values())
    if all_peers:
        sparse = {name: sparse_delta(a.tensors[name]).to(device) for name in weights}
        runs["PEFT SHiRA merge"] = lambda: [weight.add_(sparse[name]) for name, weight in weights.items()]

    def between(name: str) -> None:
        which, start = before.get(name, ("ready", None))
        for other, switcher in switchers.items():
            if other != which:
                switcher.use(None)
        if which == "host":
            switchers[which].use("a")  # so that the next line moves a to host memory and makes b ready
        switchers[which].use(start)

    with torch.no_grad():
        seconds = alternate(runs, repeats, between=between, wait=lambda: wait(device))
    here = card(device, quick=repeats < 3)
    moved = floor(a)
    ms = {name: 1e3 * value for name, value in seconds.items()}
    return here | {
        "ms": ms,
        "entries": a.nnz,
        "floor_bytes": moved,
        "floor_ms": 1e3 * moved / here["copied_bytes_a_second"],
        "share_of_copy": moved / here["copied_bytes_a_second"] / seconds["shira base to a"],
    }


def switch(plot: Path | None, quick: bool, device: str, *, scale: bool = False) -> list[dict[str, Any]]:
    """The rows of `shira bench switch`; with `scale`, those of `shira bench scale`."""
    rows = []
    if scale:
        shapes = LLAMA2_7B if not quick else [(96, 70), (70, 96)]
        figures = measure_switches(shapes, torch.bfloat16, 1 if quick else 20, device, all_peers=False)
        rows.append(print_row("scale", side=f"{len(shapes)} tensors of LLaMA2-7B", dtype="bfloat16", **figures))
    else:
        for dtype, side in itertools.product((torch.float32, torch.bfloat16), (96,) if quick else (1024, 4096, 8192)):
            figures = measure_switches([(side, side)], dtype, 1 if quick else 50, device, all_peers=True)
            rows.append(print_row("switch", side=side, dtype=str(dtype)[6:], **figures))
    show(f"switching, {DENSITY:.0%} of the entries, {device}", rows, lambda row: f"{row['side']} {row['dtype']}", plot)
    return rows


METHODS = ["frozen", "shira wm", "shira struct", "PEFT LoRA", NO_DROPOUT, "PEFT DoRA", "PEFT SHiRA"]


def llama2_7b(quick: bool) -> Any:
    """The config of LLaMA2-7B; with quick, of a tiny model."""
    from transformers import LlamaConfig

    if quick:
        return LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, use_cache=False
        )
    return LlamaConfig(vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, use_cache=False)


Setup = tuple[int, bool]  # (tokens in a sequence, whether activations are checkpointed)


def train_method(method: str, setups: list[Setup], steps: int, device: str, quick: bool) -> dict[Setup, dict[str, float]]:
    """Train a model by a method. For each setup: the median milliseconds of a step, the peak GPU memory in GiB, and the number
    of parameters that train.

    Only one method is on the device at a time: all methods together would not fit.
    """
    from shira.integrations.transformers import untrained

    torch.manual_seed(0)
    with torch.device(device):
        base: Any = untrained(llama2_7b(quick), torch.bfloat16)
    budget = {"density": DENSITY} if method.startswith("shira") else {"rank": RANK}
    model, trained = prepare(method, base, TARGETS, **budget)
    model.train()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device == "cuda")
    figures = {}
    for tokens, checkpoint in setups:
        base.gradient_checkpointing_enable() if checkpoint else base.gradient_checkpointing_disable()
        ids = torch.randint(0, base.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        taken = []
        for _ in range(2 + steps):
            wait(device)
            start = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            wait(device)
            taken.append(1e3 * (time.perf_counter() - start))
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
        ms, parameters = statistics.median(taken[2:]), sum(p.numel() for p in trained)
        figures[tokens, checkpoint] = {"ms": ms, "peak_gib": peak, "parameters": parameters}
    return figures


def train(plot: Path | None, quick: bool, device: str) -> list[dict[str, Any]]:
    """LLaMA2-7B's shape in bfloat16 with random weights, one sequence in each step.

    shira trains 1 % of q, k, v, up and down. PEFT's methods have rank 32.
    """
    setups: list[Setup] = list(itertools.product((16,) if quick else (512, 2048), (False, True)))
    figures: dict[str, dict[Setup, dict[str, float]]] = {}
    for method in METHODS:
        figures[method] = train_method(method, setups, 1 if quick else 10, device, quick)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    rows = []
    for tokens, checkpoint in setups:
        by_figure = {
            key: {method: of[tokens, checkpoint][key] for method, of in figures.items()}
            for key in ("ms", "peak_gib", "parameters")
        }
        setup = f"LLaMA2-7B 1 x {tokens}" + ", checkpointed" * checkpoint
        rows.append(print_row("train", setup=setup, dtype="bfloat16", **card(device, quick=quick), **by_figure))
    show(f"a training step, {device}", rows, lambda row: str(row["setup"]), plot)
    return rows


def measure_products(
    dtype: torch.dtype, tokens: int, rows: int, columns: int, density: float, repeats: int, device: str
) -> dict[str, Any]:
    """Milliseconds of each way to compute one gradient, the predicted milliseconds, and the way that would be chosen."""
    grad_output, input = (torch.randn(tokens, side, device=device).to(dtype) for side in (rows, columns))
    indices = random_positions(rows * columns, density, 0).to(device)
    ways: tuple[products.Way, ...] = ("dense", "blocks", "sampled")
    runs = {way: lambda way=way: triton_ops.product(way, grad_output, input, indices) for way in ways}
    seconds = alternate(runs, repeats, wait=lambda: wait(device))
    seconds["multiply"] = alternate({"": lambda: grad_output.T @ input}, repeats, wait=lambda: wait(device))[""]
    return {
        "ms": {way: 1e3 * value for way, value in seconds.items()},
        "predicted_ms": {way: 1e3 * products.seconds(way, dtype, tokens, rows, columns, indices.numel()) for way in ways},
        "chosen": products.choose(dtype, tokens, rows, columns, indices.numel()),
    }


def products_(plot: Path | None, quick: bool, device: str) -> list[dict[str, Any]]:
    """Measure every way for the shapes of LLaMA2-7B. Prints a line to put into kernels/gpu/products.py."""
    found = []
    sides = [(96, 70)] if quick else [(4096, 4096), (11_008, 4096), (4096, 11_008)]
    sizes = itertools.product(
        (torch.bfloat16, torch.float32), (16,) if quick else (512, 2048, 8192), sides, (0.001, 0.01, 0.05)
    )
    with kernels.backend("triton") if device == "cpu" else contextlib.nullcontext():
        for dtype, tokens, (rows, columns), density in sizes:
            figures = measure_products(dtype, tokens, rows, columns, density, 1 if quick else 20, device)
            about = {"setup": f"{rows} x {columns} x {tokens}, {density:.1%}", "dtype": str(dtype)[6:], "density": density}
            found.append(print_row("products", **about, sizes=(tokens, rows, columns), **figures))
    here = card(device, quick=quick)
    print("from this run:", speed_of(found, here["copied_bytes_a_second"]))
    show(f"ways to a gradient, {device}", found, lambda row: f"{row['setup']} {row['dtype']}", plot)
    return found


def speed_of(rows: list[dict[str, Any]], memory: float) -> products.Speed:
    """A GPU's speeds according to rows of `products_`: medians over their shapes. memory: bytes per second of a copy."""
    of = {"bfloat16": [], "float32": [], "blocks": [], "packed": [], "gathered": []}  # type: dict[str, list[float]]
    for row in rows:
        of[row["dtype"]].append(2e3 * math.prod(row["sizes"]) / row["ms"]["multiply"])
        if row["dtype"] == "bfloat16":
            of["blocks"].append(row["ms"]["multiply"] / row["ms"]["blocks"])
    for (dtype, (tokens, height, width)), found in itertools.groupby(rows, lambda row: (row["dtype"], row["sizes"])):
        fewest, *_, most = ((row["density"], row["ms"]["sampled"] / 1e3) for row in found)  # (density, seconds)
        read = math.prod((tokens, height, width)) * (2 if dtype == "bfloat16" else 4)
        of["gathered"].append((most[0] - fewest[0]) * read / max(most[1] - fewest[1], 1e-9))
        of["packed"].append(tokens * (height + width) / max(fewest[1] - fewest[0] * read / of["gathered"][-1], 1e-9))
    processors = torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 1
    half, single, blocks, packed, gathered = (statistics.median(values) for values in of.values())
    return products.Speed(half, single, blocks, memory, processors, packed, gathered)
