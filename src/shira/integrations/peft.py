"""PEFT: its checkpoints of sparse adapters (SHiRA, Super-Tuning) as ours, and ours as its SHiRA. This needs no PEFT.

`peft_merging.convert` makes a sparse adapter of any other that PEFT can merge: LoRA, DoRA, LoKr, …

`files.peft_files` reads them, and says what is in them. `shira.load`, `Switcher.add`, `fuse`, `compare` and `merge` take such a
folder as it is where its base is found. `load` here takes any base.
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..data.models import model_path
from ..errors import AdapterError, BaseMismatch, FormatError
from ..files.bases import named_base
from ..files.checkpoint import Checkpoint
from ..files.metadata import base_facts
from ..files.paths import AnyPath, new_folder, path_of, temporary_folder
from ..files.peft_files import CONFIG, WEIGHTS, StoredPeft, is_sparse, named_in, read_config
from ..files.suggestions import PEFT_PREFIX
from ..files.tensorfiles import spooled, write_whole
from ..sparse.tensor import SparseTensor
from ..texts import described, shown
from ..weights.belonging import check_base, values_at
from ..weights.model_tensors import named_tensors, plain_model
from ..weights.owners import claim

__all__ = ["Base", "load", "save", "tensors_of"]

PADDING = -0.0  # w + (-0.0) is w, also for w = -0.0; `load` leaves it out
Base = nn.Module | AnyPath


def load(path: AnyPath, base: Base | None = None) -> Adapter:
    """A checkpoint of PEFT's SHiRA or Super-Tuning as an adapter of deltas: the same positions and values.

    path: the folder that PEFT saved, or the `adapter_model.safetensors` in it.
    base: the model, or its folder, file or hub id, which PEFT's file says nothing of: the shapes of its weights and its names.
        By default the one that `adapter_config.json` names. Of a hub id only the configuration is read.
    Modules that PEFT saved whole (`modules_to_save`) become tensors that are overwritten whole.

    Raises FormatError for another method of PEFT (`peft_merging.convert` takes it) or a malformed file, BaseMismatch for
    another base or one with an adapter active in it, and what reading the base raises.

        shira.integrations.peft.load("my-peft-shira", base=model).save("mine.safetensors")
    """
    found = path_of(path, "load('my-peft-shira', base=model)", FormatError)
    folder, config = read_config(found)
    if not is_sparse(config):
        of_low_rank = config["peft_type"] == "SUPERTUNING"
        what = "Super-Tuning with a low-rank part" if of_low_rank else f"method {shown(config['peft_type'])}"
        raise FormatError(
            f"{folder} is of PEFT's {what}, whose change is not sparse; expected SHiRA or Super-Tuning. Take its largest "
            f"entries: `shira convert {folder} --base MODEL --density 0.01 -o adapter.safetensors`, or --keep 0.9"
        )
    if found.is_dir() and not (folder / WEIGHTS).is_file():
        pickled = " (adapter_model.bin is a pickle, which may run code: load it with PEFT, and save it again)"
        has = f"found none{pickled if (folder / 'adapter_model.bin').is_file() else ''}"
        raise FormatError(f"{folder}: expected {WEIGHTS}, {has}")
    given = base if base is not None else named_in(config)
    if not isinstance(given, nn.Module | str | os.PathLike) or not given:
        raise BaseMismatch(
            f"{folder} does not say which model it is for, and PEFT's files hold no shapes: give the base, base=model (--base)"
        )
    tensors = named_base(given) if base is None and isinstance(given, str) else None
    with contextlib.ExitStack() as stack:
        stored = StoredPeft(found, stack, tensors_of(given) if tensors is None else tensors)
        metadata = stored.metadata
        if isinstance(base, str | os.PathLike):
            metadata["base"]["id"] = base_facts(os.fspath(base), [])["id"]
        return Adapter(dict(stored), metadata)


def save(adapter: Adapter, folder: AnyPath, base: Base | None = None) -> int:
    """Write an adapter as a checkpoint of PEFT's SHiRA: a folder for `peft.PeftModel.from_pretrained(model, folder)`.

    folder: one that does not exist, or is empty.
    base: the model, or its folder or file. An adapter of new values needs it, since PEFT adds differences. It is checked.
    PEFT gives each layer r · (out + in) entries, with one r for all layers. Layers with fewer get further entries that add
    nothing. Tensors that are overwritten whole are saved as `modules_to_save`.

    Returns how many entries PEFT will give another value than the adapter: differences in float32 cannot give every float32,
    and the error is of the last bits. It is 0 for an adapter of deltas in float32 or less.
    Raises AdapterError for what PEFT's SHiRA cannot hold, BaseMismatch for another base, CheckpointError if the folder is not
    empty, and OSError. Then nothing is left there.

        shira.integrations.peft.save(shira.load("mine.safetensors"), "mine-peft", base=model)
    """
    if not isinstance(adapter, Adapter):
        raise AdapterError(
            f"expected an adapter, as in save(shira.load('mine.safetensors'), 'folder'); found {described(adapter)}"
        )
    adapter.check()
    out = new_folder(path_of(folder, "save(adapter, 'mine-peft')", AdapterError))
    label = adapter.name or "the adapter"
    whole = {name: each for name, each in adapter.tensors.items() if each.kind == "overwrite" and each.nnz == each.numel}
    sparse = {name: each for name, each in adapter.tensors.items() if name not in whole}
    if not sparse:
        raise AdapterError(f"{label} overwrites whole tensors alone; PEFT's SHiRA needs a layer with a part of its entries")
    r = _rank_of(label, sparse)
    known = tensors_of(base) if base is not None else {}
    if base is not None:
        check_base(label, adapter, known, values_at)
        _check_linear(label, base, sparse)
    elif any(each.kind == "overwrite" for each in sparse.values()):
        raise AdapterError(
            f"{label} holds new values, and PEFT adds differences: give the model that it was trained on (base=)"
        )
    with temporary_folder(out.parent) as temporary:
        made = temporary / out.name
        made.mkdir()
        lost = 0
        with spooled(made / WEIGHTS, {"format": "pt"}) as add:
            for name, each in sparse.items():
                values, wrong = _deltas(each, known[name] if each.kind == "overwrite" else None)
                lost += wrong
                indices, values = _padded(each, values, r)
                module = PEFT_PREFIX + name.removesuffix(".weight")
                add(f"{module}.shira_indices", torch.stack([indices // each.shape[1], indices % each.shape[1]]).int())
                add(f"{module}.shira_weight", values)
            for name, each in whole.items():
                add(PEFT_PREFIX + name, each.values.reshape(each.shape))
        write_whole(made / CONFIG, json.dumps(_config(adapter, r, sparse, whole), indent=2).encode())
        if out.is_dir():
            out.rmdir()
        made.rename(out)
    return lost


def tensors_of(base: Base) -> Mapping[str, Tensor]:
    """The tensors of a model in memory or on the disk; of a hub id without data, from its configuration."""
    if isinstance(base, nn.Module):
        plain = plain_model(base, BaseMismatch, "load('my-peft-shira', base=model)")
        claim(plain, "", BaseMismatch)  # with an adapter in it, it is not the base
        return named_tensors(plain)
    path = model_path(os.fspath(base))
    if os.path.exists(path):
        return Checkpoint(path)
    from .transformers import skeleton

    return named_tensors(skeleton(path))


def _rank_of(label: str, tensors: Mapping[str, SparseTensor]) -> int:
    """The smallest r that PEFT's SHiRA can have for these tensors. Raises AdapterError if it cannot hold them."""
    r, densest = 1, ""
    for name, each in tensors.items():
        if len(each.shape) != 2 or not name.endswith(".weight"):
            raise AdapterError(
                f"{label}: '{name}' has shape {list(each.shape)}, and PEFT's SHiRA adapts the weights of linear layers alone; "
                "train without this target, or keep the adapter's own file"
            )
        needed = math.ceil(each.nnz / sum(each.shape))
        r, densest = (needed, name) if needed > r else (r, densest)
    for name, each in tensors.items():
        if r * sum(each.shape) > each.numel:
            raise AdapterError(
                f"{label}: PEFT's SHiRA gives all layers r · (out + in) entries with one r. '{densest}' needs r {r}, which is "
                f"more than the {each.numel} entries of '{name}'; save fewer entries, or fewer targets"
            )
    return r


def _check_linear(label: str, base: Base, tensors: Mapping[str, SparseTensor]) -> None:
    modules = dict(base.named_modules()) if isinstance(base, nn.Module) else {}
    for name in tensors:
        module = modules.get(name.removesuffix(".weight"))
        if module is not None and not isinstance(module, nn.Linear):
            raise AdapterError(f"{label}: '{name}' is of a {type(module).__name__}; PEFT's SHiRA adapts nn.Linear alone")


def _deltas(tensor: SparseTensor, weight: Tensor | None) -> tuple[Tensor, int]:
    """What PEFT has to add, float32; and how many sums are not the adapter's values. weight: the base's, for new values."""
    if weight is None:
        given = tensor.values.float()
        return given, int((given.to(tensor.values.dtype) != tensor.values).sum())
    under = values_at(weight, tensor.indices).cpu()
    wanted = tensor.values.to(under.dtype)
    delta = (wanted.double() - under.double()).float()
    for way in (-torch.inf, torch.inf):  # the nearest difference may round to a neighbour: try those beside it
        other = torch.nextafter(delta, torch.tensor(way, device="cpu"))
        delta = torch.where(_sum(under, delta) == wanted, delta, torch.where(_sum(under, other) == wanted, other, delta))
    return delta, int((_sum(under, delta) != wanted).sum())


def _sum(under: Tensor, delta: Tensor) -> Tensor:
    """A base value and a difference, added as PEFT does: in float32 or wider, then rounded to the base's dtype."""
    return torch.add(under, delta).to(under.dtype)


def _padded(tensor: SparseTensor, values: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Positions, int64, and values of a layer, with as many further entries as r asks for. They add nothing."""
    free = torch.ones(tensor.numel, dtype=torch.bool, device="cpu")
    free[tensor.indices.long()] = False
    more = free.nonzero().view(-1)[: r * sum(tensor.shape) - tensor.nnz]
    indices, order = torch.cat([tensor.indices.long(), more]).sort()
    return indices, torch.cat([values, torch.full((more.numel(),), PADDING, device="cpu")])[order]


def _config(adapter: Adapter, r: int, sparse: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    layers = [re.escape(name.removesuffix(".weight")) for name in sparse]
    identity = (adapter.metadata.get("base") or {}).get("id")
    return {
        "peft_type": "SHIRA",
        "task_type": None,
        "base_model_name_or_path": None if identity == "unknown" else identity,
        "inference_mode": True,
        "r": r,
        "mask_type": "shira",  # not "random": PEFT would draw a mask for each layer, and then drop it
        "fan_in_fan_out": False,
        "target_modules": "|".join(layers),  # a regular expression on whole names: in a list, names match endings, too
        "modules_to_save": sorted({name.rpartition(".")[0] for name in whole}) or None,
    }
