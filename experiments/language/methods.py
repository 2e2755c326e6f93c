"""How an adapter is made and put on a model: ours, and PEFT's, on one live model that comes back as it was."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import shira
from shira.data.tokens import Row
from shira.integrations import transformers as hf

__all__ = ["OURS", "adapted", "checksum", "train"]

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
    **settings: Any,
) -> dict[str, Any]:
    """Train an adapter and leave it in a folder; returns Trainer's summary. settings: those of `hf.train`.

    method: {"options": …}, what `shira.attach` takes; or with "peft": a class of PEFT's configurations, and its options.
    """
    options = dict(method["options"])
    if "peft" not in method:
        chosen = {"targets": targets, "avoid": list(avoid), "calibration": calibration, "seed": settings["seed"]} | options
        with shira.attach(model, **chosen) as tuner:
            summary = hf.train(tuner, model, rows, **settings)
            tuner.adapter().save(folder / OURS)
        return summary
    import peft

    torch.manual_seed(settings["seed"])
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tuned: Any = peft.get_peft_model(model, getattr(peft, method["peft"])(target_modules=targets, **options))
    try:
        count = SimpleNamespace(nnz=sum(p.numel() for p in tuned.parameters() if p.requires_grad))
        # the model itself, whose layers are PEFT's now: what takes logits at the last places only
        summary = hf.train(count, tuned.get_base_model(), rows, **settings)  # type: ignore[arg-type]
        tuned.save_pretrained(folder)
    finally:
        tuned.unload()
        for parameter in trainable:
            parameter.requires_grad_(True)
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
        import peft

        tuned: Any = peft.PeftModel.from_pretrained(model, folders[0], adapter_name="0")
        try:
            for number, folder in enumerate(folders[1:], start=1):
                tuned.load_adapter(folder, adapter_name=str(number))
            if len(folders) > 1 or strength != 1:
                names = [str(number) for number in range(len(folders))]
                given = {"combination_type": "cat" if fusion == "sum" else fusion} | dict(options or {})
                tuned.add_weighted_adapter(names, [strength] * len(names), "fused", **given)
                tuned.set_adapter("fused")
            yield tuned.get_base_model().eval()
        finally:
            tuned.unload()
