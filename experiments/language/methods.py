"""How an adapter is made and put on a model: ours, and PEFT's, on one live model that comes back as it was."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import shira
from shira.data.tokens import Row
from shira.integrations import transformers as hf

__all__ = ["OURS", "adapted", "checksum", "distances", "train"]

OURS = "adapter.safetensors"


def checksum(model: nn.Module) -> int:
    """A sum over the bits of all weights."""
    return sum(int(p.detach().view(torch.int16).long().sum()) for p in model.parameters())


def train(
    method: Mapping[str, Any],
    model: nn.Module,
    rows: Sequence[Row],
    calibration: Sequence[Any],
    folder: Path,
    *,
    targets: Any,
    avoid: Sequence[Path] = (),
    general: Callable[[], Sequence[Any]] = lambda: (),
    fit: Callable[..., dict[str, Any]] = hf.train,
    **settings: Any,
) -> dict[str, Any]:
    """Train an adapter and leave it in a folder; returns the summary of `fit`, which takes settings, as `hf.train` does.

    method: {"options": …}, what `shira.attach` takes; or with "peft": a class of PEFT's configurations, and its options.
        "reach": hold the entries near the base (`Tuner.stay_near`), by what the batches of general() are sensitive to.
    """
    options = dict(method["options"])
    if "peft" not in method:
        chosen = {"targets": targets, "avoid": list(avoid), "calibration": calibration, "seed": settings["seed"]} | options
        with shira.attach(model, **chosen) as tuner:
            if "reach" in method:
                tuner.stay_near(general(), reach=method["reach"])
            summary = fit(tuner, model, rows, **settings)
            tuner.adapter().save(folder / OURS)
        return summary
    import peft

    torch.manual_seed(settings["seed"])
    with _peft_on(
        model, lambda: peft.get_peft_model(model, getattr(peft, method["peft"])(target_modules=targets, **options))
    ) as tuned:
        count = SimpleNamespace(nnz=sum(p.numel() for p in tuned.parameters() if p.requires_grad))
        # the model itself, whose layers are PEFT's now: what takes logits at the last places only
        summary = fit(count, tuned.get_base_model(), rows, **settings)
        tuned.save_pretrained(folder)
    return summary


@contextlib.contextmanager
def adapted(
    model: nn.Module,
    folders: Sequence[Path],
    *,
    strength: float = 1.0,
    fusion: str = "sum",
    options: Mapping[str, Any] | None = None,
) -> Iterator[nn.Module]:
    """The model with these adapters, each at this strength. fusion: a method of `shira.fuse`, or PEFT's combination_type."""
    if not folders:
        yield model
    elif (folders[0] / OURS).exists():
        switcher = shira.Switcher(model)
        names = [str(number) for number in range(len(folders))]
        for name, folder in zip(names, folders, strict=True):
            switcher.add(name, folder / OURS)
        with switcher.using(dict.fromkeys(names, strength), fusion, **(options or {})):
            yield model
    else:
        with _with_peft(model, folders) as (tuned, names):
            if len(folders) > 1 or strength != 1:
                given = {"combination_type": "cat" if fusion == "sum" else fusion} | dict(options or {})
                tuned.add_weighted_adapter(names, [strength] * len(names), "fused", **given)
                tuned.set_adapter("fused")
            yield tuned.get_base_model().eval()


def distances(model: nn.Module, folders: Sequence[Path]) -> dict[str, list[float]]:
    """How far adapters are from the base, one after another, and from each other, in pairs (Table 13): L2 norms of all weights;
    of ours also AWOR (§4.2) and the share of positions that both hold."""
    pairs = list(itertools.combinations(range(len(folders)), 2))
    if (folders[0] / OURS).exists():
        found = shira.compare(*(folder / OURS for folder in folders), base=model, spectra=False).total
        to_base = [change.l2 for change in found.changes.values()]
        return {"to_base": to_base} | {
            name: [getattr(p, name) for p in found.pairs] for name in ("distance", "awor", "overlap")
        }
    squares, apart = [0.0] * len(folders), [0.0] * len(pairs)
    with _with_peft(model, folders) as (tuned, names):
        for module in tuned.modules():
            if hasattr(module, "get_delta_weight"):
                changes = [module.get_delta_weight(name).detach().double() for name in names]
                squares = [total + float(change.square().sum()) for total, change in zip(squares, changes, strict=True)]
                apart = [
                    total + float((changes[a] - changes[b]).square().sum()) for total, (a, b) in zip(apart, pairs, strict=True)
                ]
    return {"to_base": [total**0.5 for total in squares], "distance": [total**0.5 for total in apart]}


@contextlib.contextmanager
def _with_peft(model: nn.Module, folders: Sequence[Path]) -> Iterator[tuple[Any, list[str]]]:
    """PEFT's model with these adapters loaded, the first of them on, and their names."""
    import peft

    names = [str(number) for number in range(len(folders))]
    with _peft_on(model, lambda: peft.PeftModel.from_pretrained(model, folders[0], adapter_name=names[0])) as tuned:
        for name, folder in zip(names[1:], folders[1:], strict=True):
            tuned.load_adapter(folder, adapter_name=name)
        yield tuned, names


@contextlib.contextmanager
def _peft_on(model: nn.Module, make: Callable[[], Any]) -> Iterator[Any]:
    """PEFT's model, as it is made of ours; afterwards modules and `requires_grad` flags are ours again.

    PEFT unloads with its trained copies of `modules_to_save` left in place of the model's own.
    """
    own = {name: module for name, module in model.named_modules() if name}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tuned = make()
    try:
        yield tuned
    finally:
        tuned.unload()
        for name, module in own.items():
            if model.get_submodule(name) is not module:
                model.set_submodule(name, module)
        for parameter in trainable:
            parameter.requires_grad_(True)
