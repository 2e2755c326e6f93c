"""PEFT: its checkpoints of sparse adapters (SHiRA, Super-Tuning) as ours, and ours as its SHiRA. This needs no PEFT.

`peft_merging.convert` makes a sparse adapter of any other that PEFT can merge: LoRA, DoRA, LoKr, …

PEFT's SHiRA (0.21) adds values to the weights of `nn.Linear` layers. Its file has no shapes. For each layer it has
`shira_weight` [r · (out + in)], float32, and `shira_indices` [2, r · (out + in)], int32, rows and columns; r is the same in all
layers. Super-Tuning has `supertuning_values` [n] and flat `supertuning_indices` [n], or none: they are then those of the
largest |W|.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..checkpoints.checkpoint import Checkpoint, form_of
from ..checkpoints.renaming import prefix_swaps
from ..data.models import model_path
from ..errors import AdapterError, BaseMismatch, CheckpointError, FormatError, did_you_mean
from ..files.metadata import base_facts
from ..files.paths import open_regular, path_of, temporary_folder
from ..files.suggestions import PEFT_PREFIX
from ..files.tensorfiles import malformed, read_header, read_tensor, spooled, write_whole
from ..sparse.tensor import SparseTensor, fingerprint
from ..texts import described, shown, strict_json
from ..weights.belonging import check_base
from ..weights.model_tensors import named_tensors, plain_model
from ..weights.owners import claim

__all__ = ["CONFIG", "Base", "Stored", "is_sparse", "load", "read_config", "save", "tensors_of"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PADDING = -0.0  # w + (-0.0) is w, also for w = -0.0
INDICES, VALUES = ("shira_indices", "supertuning_indices"), ("shira_weight", "supertuning_values")

Path_ = str | os.PathLike[str]
Base = nn.Module | Path_


class Stored(NamedTuple):
    """What a folder of PEFT holds. tensors: name in the file, without PEFT's prefix -> tensor."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def load(path: Path_, base: Base | None = None) -> Adapter:
    """A checkpoint of PEFT's SHiRA or Super-Tuning as an adapter of deltas: the same positions and values.

    path: the folder that PEFT saved, or the `adapter_model.safetensors` in it.
    base: the model, or its folder, file or hub id, which PEFT's file says nothing of: the shapes of its weights and its names.
        By default the one that `adapter_config.json` names. Of a hub id only the configuration is read.
    Modules that PEFT saved whole (`modules_to_save`) become tensors that are overwritten whole.

    Raises FormatError for another method of PEFT (`peft_merging.convert` takes it) or a malformed file, BaseMismatch for
    another base or one with an adapter active in it, and what reading the base raises.

        shira.integrations.peft.load("my-peft-shira", base=model).save("mine.safetensors")
    """
    stored = _read(path_of(path, "load('my-peft-shira', base=model)", FormatError))
    config, label = stored.config, str(stored.folder)
    method = config["peft_type"]
    if not is_sparse(config):
        what = "Super-Tuning with a low-rank part" if method == "SUPERTUNING" else f"method {shown(method)}"
        raise FormatError(
            f"{label} is of PEFT's {what}, whose change is not sparse; expected SHiRA or Super-Tuning. Take its largest "
            f"entries: `shira convert {label} --base MODEL --density 0.01 -o adapter.safetensors`, or --keep 0.9"
        )
    sparse = {name.rpartition(".")[0]: values for name, values in stored.tensors.items() if name.endswith(VALUES)}
    whole = {name: value for name, value in stored.tensors.items() if not name.endswith(VALUES + INDICES)}
    tensors_of_base = _base_of(stored, base, [*(f"{module}.weight" for module in sparse), *whole])
    tensors: dict[str, SparseTensor] = {}
    prints, dtypes = {}, set()
    for module, values in sparse.items():
        name, weight = tensors_of_base(f"{module}.weight")
        try:
            indices = _flat(stored, module, weight, values.numel())
            order = indices.argsort()
            keep = order[~_is_padding(values[order])]
            given = values[keep].to(weight.dtype if method == "SUPERTUNING" else torch.float32)  # as PEFT adds them
            tensors[name] = SparseTensor(tuple(weight.shape), indices[keep], given, "delta")
        except AdapterError as error:
            raise FormatError(f"{label}: '{module}': {error}") from None
        dtypes.add(str(weight.dtype).removeprefix("torch."))
        if not weight.is_meta:
            prints[name] = fingerprint(weight.detach().reshape(-1)[tensors[name].indices.to(weight.device)])
    for file_name, value in whole.items():
        name, weight = tensors_of_base(file_name)
        if value.shape != weight.shape:
            raise BaseMismatch(f"{label}: '{name}' has shape {list(value.shape)}, in the base it has {list(weight.shape)}")
        tensors[name] = SparseTensor(tuple(value.shape), torch.arange(value.numel()), value.reshape(-1).to(weight.dtype))
    known = os.fspath(base) if isinstance(base, str | os.PathLike) else config.get("base_model_name_or_path")
    metadata = {
        "name": stored.folder.absolute().name,
        "mask": {"name": f"PEFT's {config.get('mask_type') or 'magnitude'}"},
        "base": base_facts(known if isinstance(known, str) else None, dtypes),
        "training": {"peft": method, "peft_version": config.get("peft_version")},
        "fingerprints": prints,
    }
    return Adapter(tensors, {key: value for key, value in metadata.items() if value})


def save(adapter: Adapter, folder: Path_, base: Base | None = None) -> int:
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
    out = Path(os.path.realpath(path_of(folder, "save(adapter, 'mine-peft')", AdapterError)))
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out} exists; name a folder that does not exist, or is empty")
    label = adapter.name or "the adapter"
    whole = {name: each for name, each in adapter.tensors.items() if each.kind == "overwrite" and each.nnz == each.numel}
    sparse = {name: each for name, each in adapter.tensors.items() if name not in whole}
    if not sparse:
        raise AdapterError(f"{label} overwrites whole tensors alone; PEFT's SHiRA needs a layer with a part of its entries")
    r = _rank_of(label, sparse)
    known = tensors_of(base) if base is not None else {}
    if base is not None:
        check_base(label, adapter, known, lambda weight, at: weight.detach().reshape(-1)[at.to(weight.device)])
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


def read_config(path: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a checkpoint of PEFT, and its configuration. path: the folder, or the file of weights in it.

    Raises FormatError if it is not such a folder, or the configuration is malformed; OSError if there is nothing.
    """
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise FileNotFoundError(2, "No such file or directory", str(path))
    if not (folder / CONFIG).is_file():
        raise FormatError(f"{path} is no adapter of PEFT: expected {CONFIG} in {folder}, found none; get it as well")
    try:
        with malformed(folder / CONFIG), open_regular(folder / CONFIG) as file:
            config = dict(strict_json(file.read()))
            if not isinstance(config["peft_type"], str):
                raise ValueError(f"peft_type is {shown(config['peft_type'])}, expected a text such as 'SHIRA'")
    except CheckpointError as error:
        raise FormatError(str(error)) from None
    return folder, config


def is_sparse(config: Mapping[str, Any]) -> bool:
    """Whether a configuration of PEFT is of SHiRA, or of Super-Tuning without a low-rank part."""
    return config["peft_type"] == "SHIRA" or (config["peft_type"] == "SUPERTUNING" and config.get("r") is None)


def _read(path: Path) -> Stored:
    folder, config = read_config(path)
    file = folder / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        pickled = " (adapter_model.bin is a pickle, which may run code: load it with PEFT, and save it again)"
        found = f"found none{pickled if (folder / 'adapter_model.bin').is_file() else ''}"
        raise FormatError(f"{folder}: expected {WEIGHTS}, {found}")
    try:
        with open_regular(file) as opened:
            entries, _ = read_header(opened, any_dtype=False)
            tensors = {name: read_tensor(opened, entry) for name, entry in entries.items()}
    except CheckpointError as error:
        raise FormatError(str(error)) from None
    plain = {name.removeprefix(PEFT_PREFIX).replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    return Stored(folder, config, plain)


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


def _base_of(stored: Stored, base: Base | None, names: list[str]) -> Callable[[str], tuple[str, Tensor]]:
    """A function: name in the file -> name in the base, and its weight. Raises BaseMismatch if they do not belong together."""
    given = base if base is not None else stored.config.get("base_model_name_or_path")
    if not isinstance(given, nn.Module | str | os.PathLike) or not given:
        raise BaseMismatch(
            f"{stored.folder} does not say which model it is for, and PEFT's files hold no shapes: give the base, base=model "
            "(--base)"
        )
    tensors = tensors_of(given)

    def fits(name: str, other: str) -> bool:
        form = form_of(tensors, other)
        if name in stored.tensors:
            return form is not None and stored.tensors[name].shape == form.shape
        return form is not None and len(form.shape) == 2

    same = {name: name for name in names}
    if not all(name in tensors for name in names):
        ending = ".".join(names[0].split(".")[-2:])
        found = prefix_swaps(names, [each for each in tensors if f".{each}".endswith(f".{ending}")], tensors, fits)
        if len(found) != 1:
            missing = next(name for name in names if name not in tensors)
            raise BaseMismatch(
                f"{stored.folder} does not belong to this model: it has no tensor '{missing}'; {did_you_mean(missing, tensors)}"
            )
        same = found[0]
    return lambda name: (same[name], tensors[same[name]])


def _flat(stored: Stored, module: str, weight: Tensor, count: int) -> Tensor:
    """The flat positions of a layer, in the file's order, int64. Raises AdapterError if they are not in its weight."""
    config = stored.config
    if weight.ndim != 2 or stored.tensors[f"{module}.{_values_of(config)}"].ndim != 1:
        raise AdapterError(f"expected a list of values for a matrix, found a weight of shape {_shape(weight)} in the base")
    rows, columns = weight.shape
    if config["peft_type"] == "SHIRA":
        places = stored.tensors.get(f"{module}.shira_indices")
        if places is None or places.shape != (2, count):
            raise AdapterError(f"expected shira_indices of shape [2, {count}], found {_shape(places)}")
        if type(config.get("r")) is not int or not 0 < count == config["r"] * (rows + columns):
            raise AdapterError(
                f"{count} values are not r · (out + in), with r {shown(config.get('r'))} and the base's shape "
                f"[{rows}, {columns}]; give the base that it was trained on"
            )
        row, column = places[0].long(), places[1].long()
        if int(places.min()) < 0 or int(row.max()) >= rows or int(column.max()) >= columns:
            raise AdapterError(
                f"positions up to [{int(row.max())}, {int(column.max())}] in a weight of shape [{rows}, {columns}]"
            )
        return torch.add(row * columns, column)
    flat = stored.tensors.get(f"{module}.supertuning_indices")
    if flat is None:  # PEFT chooses them again from the weight, with these calls
        sparsity = config.get("sparsity")
        if not isinstance(sparsity, int | float):
            raise AdapterError(f"the file holds no positions, and sparsity in {CONFIG} is {shown(sparsity)}")
        if weight.is_meta:
            raise AdapterError("the file holds no positions, they come from the base's weights: give a model or its folder")
        if count != int(weight.numel() * (1 - sparsity)):
            raise AdapterError(f"{count} values in a weight of shape [{rows}, {columns}] at sparsity {sparsity}")
        flat = torch.topk(weight.detach().abs().flatten(), k=count, largest=bool(config.get("select_top", True))).indices
    if flat.shape != (count,):
        raise AdapterError(f"expected {count} supertuning_indices, found shape {_shape(flat)}")
    positions: Tensor = flat.long().cpu()
    return positions


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else str(list(tensor.shape))


def _values_of(config: Mapping[str, Any]) -> str:
    return "shira_weight" if config["peft_type"] == "SHIRA" else "supertuning_values"


def _is_padding(values: Tensor) -> Tensor:
    return torch.logical_and(values == 0, values.signbit())


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
    under = weight.detach().reshape(-1)[tensor.indices.to(weight.device)].cpu()
    wanted = tensor.values.to(under.dtype)
    delta = (wanted.double() - under.double()).float()
    for way in (-torch.inf, torch.inf):  # the nearest difference may round to a neighbour: try those beside it
        other = torch.nextafter(delta, torch.tensor(way))
        delta = torch.where(_sum(under, delta) == wanted, delta, torch.where(_sum(under, other) == wanted, other, delta))
    return delta, int((_sum(under, delta) != wanted).sum())


def _sum(under: Tensor, delta: Tensor) -> Tensor:
    """A base value and a difference, added as PEFT does: in float32 or wider, then rounded to the base's dtype."""
    return torch.add(under, delta).to(under.dtype)


def _padded(tensor: SparseTensor, values: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Positions, int64, and values of a layer, with as many further entries as r asks for. They add nothing."""
    free = torch.ones(tensor.numel, dtype=torch.bool)
    free[tensor.indices.long()] = False
    more = free.nonzero().view(-1)[: r * sum(tensor.shape) - tensor.nnz]
    indices, order = torch.cat([tensor.indices.long(), more]).sort()
    return indices, torch.cat([values, torch.full((more.numel(),), PADDING)])[order]


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
