"""Train adapters and apply them to a model, with shira and with PEFT. One live model is used, and always restored."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import shira
from shira import masks
from shira.data.tokens import Row
from shira.integrations.transformers_training import train as hf_train
from shira.switching.on_inputs import fuse_on_inputs

from . import near, regmean

__all__ = ["OURS", "adapted", "checksum", "distances", "fused_on_inputs", "train"]

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
    fit: Callable[..., dict[str, Any]] = hf_train,
    **settings: Any,
) -> dict[str, Any]:
    """Train an adapter and save it in a folder. Returns the summary of `fit`, which takes the settings, like `hf_train`.

    method: {"options": …}, the options of `shira.attach`; or, with "peft", of that config class of PEFT. With "reach", the
        weights are pulled to the base, with this reach and the batches of general(): by `Tuner.stay_near`, or LoRA's by `near`.
        "refresh": settings of `hf_train` by which the mask is selected again.
    """
    options = dict(method["options"])
    if "peft" not in method:
        chosen = {"targets": targets, "avoid": list(avoid), "calibration": calibration, "seed": settings["seed"], "lr_scale": 1}
        chosen |= options
        chosen["mask"] = MASKS.get(chosen["mask"], chosen["mask"])
        if "refresh" in method:
            settings |= method["refresh"] | {"calibration": calibration}
        with shira.attach(model, **chosen) as tuner:
            if "reach" in method:
                tuner.stay_near(general(), reach=method["reach"])
            summary = fit(tuner, model, rows, **settings)
            tuner.adapter().save(folder / OURS)
        return summary | {"lr_scale": tuner.lr_scale}
    import peft

    torch.manual_seed(settings["seed"])
    with _peft_on(
        model, lambda: peft.get_peft_model(model, getattr(peft, method["peft"])(target_modules=targets, **options))
    ) as tuned:
        if "reach" in method:
            near.hold(tuned, general(), method["reach"])
        count = SimpleNamespace(nnz=sum(p.numel() for p in tuned.parameters() if p.requires_grad))
        # the model itself, with PEFT's layers in it: its forward can compute logits at the last positions only
        summary = fit(count, tuned.get_base_model(), rows, **settings)
        tuned.save_pretrained(folder)
    return summary


def steady_snip(weight: Tensor, gradient: Tensor, squared_gradient: Tensor, k: int) -> Tensor:
    """SNIP's score times how far the batches' gradients agree in sign and size: 1 if all are equal, near 0 if they cancel."""
    agreement = gradient.abs() / squared_gradient.sqrt().clamp_(min=torch.finfo(torch.float32).tiny)
    return masks.top_k((weight.float() * gradient.float()).abs() * agreement, k)


MASKS: Mapping[Any, masks.Mask] = {"steady-snip": steady_snip}  # our own, for recipes


@contextlib.contextmanager
def adapted(
    model: nn.Module,
    folders: Sequence[Path],
    *,
    strength: float = 1.0,
    fusion: str = "sum",
    options: Mapping[str, Any] | None = None,
) -> Iterator[nn.Module]:
    """Inside, the model has these adapters, each at this strength.

    fusion: a method of `shira.fuse`, or a combination_type of PEFT. options: of that method.
    """
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


def fused_on_inputs(model: nn.Module, folders: Sequence[Path], inputs: Sequence[Sequence[Any]]) -> shira.Adapter:
    """One adapter with the effect of several, each on the batches of its inputs: `fuse_on_inputs`, or LoRA's by `regmean`."""
    names = [str(number) for number in range(len(folders))]
    if (folders[0] / OURS).exists():
        switcher = shira.Switcher(model)
        for name, folder in zip(names, folders, strict=True):
            switcher.add(name, folder / OURS)
        return fuse_on_inputs(switcher, dict(zip(names, inputs, strict=True)))
    with _with_peft(model, folders) as (tuned, _):
        return regmean.of_loras(tuned, names, inputs)


def distances(model: nn.Module, folders: Sequence[Path]) -> dict[str, list[float]]:
    """The distances of adapters from the base, and of all pairs from each other (Table 13): L2 norms over all weights.

    For shira's adapters, also AWOR (§4.2) and the share of positions that both have.
    """
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
    """PEFT's model with these adapters loaded and the first of them active, and the adapters' names."""
    import peft

    names = [str(number) for number in range(len(folders))]
    with _peft_on(model, lambda: peft.PeftModel.from_pretrained(model, folders[0], adapter_name=names[0])) as tuned:
        for name, folder in zip(names[1:], folders[1:], strict=True):
            tuned.load_adapter(folder, adapter_name=name)
        yield tuned, names


@contextlib.contextmanager
def _peft_on(model: nn.Module, make: Callable[[], Any]) -> Iterator[Any]:
    """PEFT's model, as `make` makes it of the model. Afterwards the model has its own modules and `requires_grad` flags again.

    PEFT's unload() alone is not enough: it leaves the trained copies of `modules_to_save` in the model.
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
