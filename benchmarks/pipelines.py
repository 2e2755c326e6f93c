"""A whole pipeline, as in the paper's Table 5: load, switch in, switch out; and five of many adapters, as in a service."""

import functools
import random
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import shira
from shira.integrations.diffusers import PipelineAdapters

from .common import alternate, busy_clock, print_row, show
from .unets import ATTENTION, SD15, SDXL, SMALL, SMALL_XL, inputs, lora_file, pipeline, shira_file, weights

LORA = "Diffusers LoRA"
RANK = 64  # the paper's, Table 9
DENSITY = 0.01
ACTIVE, SERVED_RANK = 5, 16
TABLE5 = ("load", "into the weights", "out of the weights", "unload")

Stages = dict[str, Callable[[], Any]]


def main(plot: Path | None, quick: bool) -> list[dict[str, Any]]:
    """SD-1.5 in float32 and SDXL in bfloat16 (8 GB of memory); then SD-1.5 in bfloat16 with 3 to 57 adapters registered."""
    diffusers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # PEFT's notes on adapters that are merged
    rank, repeats = (4, 1) if quick else (RANK, 5)
    with torch.no_grad():
        rows = table5("SD-1.5", SMALL if quick else SD15, torch.float32, rank, repeats)
        rows += table5("SDXL", SMALL_XL if quick else SDXL, torch.bfloat16, rank, repeats)
        served: tuple[Any, ...] = (SMALL, (2, 6), 4) if quick else (SD15, (3, 10, 30, 57), SERVED_RANK)
        rows += many_registered(*served, repeats)
    show("pipelines", rows, lambda row: str(row["setup"]), plot)
    return rows


def about() -> dict[str, str]:
    """What all figures depend on, besides `common.machine`."""
    return {"clock": busy_clock().__name__, "diffusers": diffusers.__version__, "peft": peft.__version__}


def table5(title: str, config: dict[str, Any], dtype: torch.dtype, rank: int, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of each stage on one pipeline, the bytes of the files, and how many base values differ afterwards.

    All kinds work on the same pipeline in turn. After each turn its base is compared with a copy, and restored if it differs.
    """
    pipe = pipeline(config, dtype)
    base = {path: weight.clone() for path, weight in weights(pipe.unet, ATTENTION)}
    kinds = (LORA, "shira", f"shira {DENSITY:.0%}")
    numbers, changed = {}, dict.fromkeys(kinds, 0)
    took: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {kind: [Path(folder) / f"{kind}-{name}.safetensors" for name in "ab"] for kind in kinds}
        for seed in (0, 1):
            numbers[LORA] = lora_file(pipe.unet, rank, seed, files[LORA][seed])
            for kind, density in zip(kinds[1:], (None, DENSITY), strict=True):
                numbers[kind] = shira_file(pipe.unet, rank, density, seed, files[kind][seed])
        mib = {kind: paths[0].stat().st_size / 2**20 for kind, paths in files.items()}
        for turn in range(1 + repeats):
            for kind, paths in files.items():
                stages = lora_stages(pipe, paths) if kind == LORA else our_stages(pipe, paths)
                times = {stage: seconds(run) for stage, run in stages.items()}
                times["from a file and back"] = sum(times[stage] for stage in TABLE5)
                changed[kind] = restored(pipe, base)
                for stage in times:
                    if turn and not stage.startswith("not timed"):  # the first turn warms up
                        took.setdefault(stage, {}).setdefault(kind, []).append(1e3 * times[stage])
    title = f"{title} {str(dtype)[6:]}"
    sizes = {"weights": sum(map(Tensor.numel, pipe.unet.parameters())), "targeted": sum(map(Tensor.numel, base.values()))}
    print_row("pipelines", setup=title, rank=rank, **sizes, numbers=numbers, mib=mib, base_values_changed=changed, **about())
    table = Table(title, *kinds)
    table.add_row("numbers in the adapter", *(f"{numbers[kind]:,}" for kind in kinds))
    table.add_row("MiB of the file", *(f"{mib[kind]:.2f}" for kind in kinds))
    table.add_row(f"values changed, of {sizes['targeted']:,} targeted", *(f"{changed[kind]:,}" for kind in kinds))
    Console(width=120).print(table)
    medians = {stage: {kind: statistics.median(times) for kind, times in kept.items()} for stage, kept in took.items()}
    return [print_row("pipelines", setup=f"{title}: {stage}", ms=ms, **about()) for stage, ms in medians.items()]


def seconds(run: Callable[[], Any]) -> float:
    """How long a call takes, by `busy_clock`."""
    clock = busy_clock()
    start = clock()
    run()
    return clock() - start


def lora_stages(pipe: Any, files: list[Path]) -> Stages:
    """Diffusers' calls on LoRAs, in order: one from its file into the weights and out again; then two that are loaded."""
    load_a, load_b = (
        functools.partial(pipe.load_lora_weights, path.parent, weight_name=path.name, adapter_name=name)
        for path, name in zip(files, "ab", strict=True)
    )
    fuse_a, fuse_b = (functools.partial(pipe.fuse_lora, components=["unet"], adapter_names=[name]) for name in "ab")
    unfuse = functools.partial(pipe.unfuse_lora, components=["unet"])
    first = (load_a, fuse_a, unfuse, pipe.unload_lora_weights)
    return dict(zip(TABLE5, first, strict=True)) | {
        "not timed: load a": load_a,
        "not timed: load b": load_b,
        "loaded: base to a": fuse_a,
        "loaded: a to b": lambda: (unfuse(), fuse_b()),
        "loaded: b to base": unfuse,
        "not timed: unload": pipe.unload_lora_weights,
    }


def our_stages(pipe: Any, files: list[Path]) -> Stages:
    """The same with `PipelineAdapters`, from a new one on. The two that are loaded have been used before."""
    ours: list[PipelineAdapters] = []

    def load_a() -> None:
        ours.append(PipelineAdapters(pipe))
        ours[0].load(files[0], "a")

    def use_both() -> None:
        load_a()
        ours[0].load(files[1], "b")
        for name in "ab":
            ours[0].set(name)
        ours[0].disable()

    first = (load_a, lambda: ours[0].set("a"), lambda: ours[0].disable(), ours.clear)
    return dict(zip(TABLE5, first, strict=True)) | {
        "not timed: use both": use_both,
        "loaded: base to a": lambda: ours[0].set("a"),
        "loaded: a to b": lambda: ours[0].set("b"),
        "loaded: b to base": lambda: ours[0].disable(),
    }


def restored(pipe: Any, base: dict[str, Tensor]) -> int:
    """Compare the base's bits with a copy, restore the base where they differ, and return how many values did."""
    changed = 0
    for path, weight in weights(pipe.unet, ATTENTION):
        integers = torch.int32 if weight.dtype == torch.float32 else torch.int16
        differ = int((weight.view(integers) != base[path].view(integers)).sum())
        if differ:
            weight.copy_(base[path])
        changed += differ
    return changed


def many_registered(config: dict[str, Any], counts: tuple[int, ...], rank: int, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds to register one adapter, and of a request for five of those registered, by how many are registered."""
    lora, on_disk, in_memory = (pipeline(config, torch.bfloat16) for _ in range(3))
    base = {path: weight.clone() for path, weight in weights(on_disk.unet, ATTENTION)}
    ours = {"shira, files": PipelineAdapters(on_disk), "shira, in memory": PipelineAdapters(in_memory)}
    draw, rows, names = random.Random(0), [], list[str]()
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            loads: dict[str, list[float]] = {kind: [] for kind in (LORA, *ours)}
            for number in range(len(names), count):
                names.append(str(number))
                for kind, load in register(lora, on_disk.unet, ours, Path(folder), number, rank).items():
                    loads[kind].append(1e3 * seconds(load))
            ms = {kind: statistics.median(times[-3:]) for kind, times in loads.items()}
            rows.append(print_row("pipelines", setup=f"register one, {count} registered", ms=ms, **about()))
            rows.append(requests(lora, ours, names, draw, 2 * repeats))
        given = inputs(on_disk.unet, 8 if repeats == 1 else 16)
        runs = {LORA: lambda: lora.unet(**given), "shira, files": lambda: on_disk.unet(**given)}
        ms = {kind: 1e3 * value for kind, value in alternate(runs, repeats, clock=busy_clock()).items()}
        rows.append(print_row("pipelines", setup=f"a call of the UNet, {ACTIVE} active", ms=ms, **about()))
        for adapters in ours.values():
            adapters.disable()
    changed = {kind: restored(pipe, base) for kind, pipe in zip(ours, (on_disk, in_memory), strict=True)}
    print_row("pipelines", setup="many registered", rank=rank, base_values_changed=changed, **about())
    return rows


def register(lora: Any, unet: Any, ours: dict[str, PipelineAdapters], folder: Path, number: int, rank: int) -> Stages:
    """Write the files of one more adapter. Returns what loads them, by kind."""
    name, lora_path, path = str(number), folder / f"lora{number}.safetensors", folder / f"{number}.safetensors"
    for adapters in ours.values():
        adapters.disable()  # so that the file is made for the base
    lora_file(unet, rank, number, lora_path)  # not of the one in which LoRAs have renamed the layers
    shira_file(unet, rank, None, number, path)
    return {
        LORA: lambda: lora.load_lora_weights(folder, weight_name=lora_path.name, adapter_name=name),
        "shira, files": lambda: ours["shira, files"].load(path, name),
        "shira, in memory": lambda: ours["shira, in memory"].load(shira.load(path), name),
    }


def requests(
    lora: Any, ours: dict[str, PipelineAdapters], names: list[str], draw: random.Random, repeats: int
) -> dict[str, Any]:
    """Milliseconds of a request for five adapters, or all if there are fewer, at strengths that no request before had.

    "used before": for five at strengths that are held ready, after five others that are held ready, too.
    """
    files, memory = ours.values()
    ready = dict.fromkeys(names[:ACTIVE], 0.5)
    wanted: dict[str, float] = {}

    def between(kind: str) -> None:
        wanted.clear()
        wanted.update({name: draw.uniform(0.3, 1.0) for name in draw.sample(names, min(ACTIVE, len(names)))})
        if kind == "shira, used before":
            memory.set(dict.fromkeys(names[-ACTIVE:], 1.0))

    runs = {
        LORA: lambda: lora.set_adapters(list(wanted), list(wanted.values())),
        "shira, files": lambda: files.set(dict(wanted)),
        "shira, in memory": lambda: memory.set(dict(wanted)),
        "shira, used before": lambda: memory.set(ready),
    }
    found = alternate(runs, repeats, between=between, warmup=2, clock=busy_clock())
    ms = {kind: 1e3 * value for kind, value in found.items()}
    return print_row("pipelines", setup=f"a request, {len(names)} registered", ms=ms, **about())
