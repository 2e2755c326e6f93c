"""Files: bytes per entry, the speed of decoding positions, and the time from a file to an active adapter."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import shira
from shira.files import encoding

from .common import alternate, print_row, show
from .switch import LLAMA2_7B, adapter_for, model_of, random_positions


def sizes(plot: Path | None, quick: bool) -> list[dict[str, Any]]:
    """Bytes per entry for one 4096² bfloat16 weight. PEFT's files have float32 values and two int32 coordinates."""
    rows = []
    side = 512 if quick else 4096
    with tempfile.TemporaryDirectory() as folder:
        for density in (0.001, 0.01, 0.05):
            where = random_positions(side * side, density, 1)
            values = torch.randn(where.numel()).bfloat16()
            figures = {"shira": bytes_an_entry(folder, where, values, side, {})}
            for mask in ("rand", "struct"):
                if mask == "struct" and density < 0.01:
                    continue  # fewer entries than struct's diagonal and one row
                model = model_of([(side, side)], torch.bfloat16)
                drawn = shira.masks.select(mask, "w0", model.w0, round(density * side * side))  # type: ignore[arg-type]
                settings = {"mask": {"name": mask, "seed": 0}}
                figures[f"shira {mask}"] = bytes_an_entry(folder, drawn, torch.randn(drawn.numel()).bfloat16(), side, settings)
            coordinates = torch.stack([where // side, where % side])
            save_file({"values": values.float(), "indices": coordinates}, f"{folder}/peft")
            figures["PEFT SHiRA"] = Path(f"{folder}/peft").stat().st_size / where.numel()
            stored = encoding.encode(where, (side, side), [])
            seconds = alternate({"decode": functools.partial(encoding.decode, stored, (side, side), where.numel())}, 9)
            rate = where.numel() / seconds["decode"] / 1e6
            rows.append(print_row("files", density=density, bytes_an_entry=figures, decode_million_a_second=rate))
    return rows


def bytes_an_entry(folder: str, where: torch.Tensor, values: torch.Tensor, side: int, metadata: dict[str, Any]) -> float:
    """The file size of one weight's adapter, divided by its number of entries."""
    path = Path(folder) / "a.safetensors"
    shira.Adapter({"w0": shira.SparseTensor((side, side), where, values)}, metadata).save(path)
    return path.stat().st_size / where.numel()


def loading(plot: Path | None, quick: bool) -> list[dict[str, Any]]:
    """The time from a file in the page cache to an active adapter, on LLaMA2-7B's target weights in bfloat16 (9 GB of memory).

    Also: the time of switching with 1 000 adapters registered, compared with two.
    """
    rows = []
    shapes = LLAMA2_7B[: 5 if quick else len(LLAMA2_7B)]
    model = model_of(shapes, torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        for name, seed in (("a", 1), ("b", 2)):
            adapter_for(dict(model.named_parameters()), seed).save(f"{folder}/{name}")
        switcher = shira.Switcher(model, ready=1)
        for name in "ab":
            switcher.add(name, f"{folder}/{name}")

        def only_b_ready(_: str) -> None:
            switcher.use("b")
            switcher.use(None)

        runs = {"shira file to active": functools.partial(switcher.use, "a")}
        seconds = alternate(runs, 1 if quick else 5, between=only_b_ready)
        ms = {name: 1e3 * value for name, value in seconds.items()}
        rows.append(print_row("load", setup=f"{len(shapes)} tensors of LLaMA2-7B", ms=ms))
        switcher.use(None)
    rows.append(many_registered(10 if quick else 1000, quick))
    show("from file to active; many registered", rows, lambda row: str(row["setup"]), plot)
    return rows


def many_registered(count: int, quick: bool) -> dict[str, Any]:
    """The time of `use` with `count` adapters registered and with two. All adapters are files; eight are held ready."""
    model = model_of([(512, 512)] * 8, torch.bfloat16)
    switchers = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, registered in (("shira, 2 registered", 2), (f"shira, {count} registered", count)):
            switchers[name] = shira.Switcher(model)
            for number in range(registered):
                path = Path(folder) / str(number)
                if not path.exists():
                    adapter_for(dict(model.named_parameters()), number).save(path)
                switchers[name].add(str(number), path)

        def there_and_back(switcher: shira.Switcher) -> None:
            switcher.use("0")
            switcher.use("1")
            switcher.use(None)

        runs = {name: functools.partial(there_and_back, switcher) for name, switcher in switchers.items()}
        seconds = alternate(runs, 3 if quick else 100)
    return print_row("load", setup=f"{count} registered", ms={name: 1e3 * value for name, value in seconds.items()})
