"""Weight patches of RL trainers: TRL's, slime's and verl's. They are read as adapters, and adapters are written as they are.

`shira.load`, `Switcher.add`, `fuse` and `merge` take a patch as it is, if it holds the shapes of its tensors: slime's, verl's,
and TRL's if it was written here. `load` here adds what a patch lacks: shapes, the base's fingerprints, and the names in memory.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..checkpoints.loading import Loaded, loaded_as, ways_to_load
from ..checkpoints.renaming import names_in, renamed
from ..checkpoints.sources import Checkpoint, LazyTensors, form_of, identity
from ..errors import AdapterError, BaseMismatch, FormatError, did_you_mean
from ..files.checkpoint import prefix_swaps
from ..files.metadata import base_facts
from ..files.patches import POSITIONS, SHAPES, SPEC, TRL, VALUES, StoredPatch, checksum_of
from ..files.paths import AnyPath, path_of
from ..files.tensorfiles import Form, spooled
from ..fusion.fusing import fuse
from ..sparse.tensor import SparseTensor, bytes_of, dtype_name, fingerprint
from ..texts import described
from ..weights.belonging import check_base, values_at
from .peft import Base, tensors_of

__all__ = ["LAYOUTS", "Layout", "load", "save"]

Layout = Literal["trl", "slime", "verl"]
LAYOUTS = ("trl", "slime", "verl")


def load(path: AnyPath, base: Base | None = None) -> Adapter:
    """A weight patch as an adapter: the same positions and values, kind "overwrite".

    path: a file; or a folder with the files of one sync, as slime writes it.
    base: the model that the patch is for, or its folder, file or hub id. It gives the shapes, which TRL's files lack, the
        fingerprints of the values that are overwritten, and the names in memory where a patch has those of the checkpoint. The
        weights must be those before the patch. Of a hub id only the configuration is read, so there are no fingerprints.

    Raises FormatError for a malformed patch, or one without shapes and no base; BaseMismatch for another base; and what reading
    the base raises.

        shira.integrations.rl_patches.load("patch.safetensors", base=model).save("step7.safetensors")
    """
    file = path_of(path, "load('patch.safetensors', base=model)", FormatError)
    with contextlib.ExitStack() as stack:
        if base is None:
            stored = StoredPatch(file, stack)
            return Adapter(dict(stored), stored.metadata)
        weights, names_of = _base_of(file, base)
        stored = StoredPatch(
            file, stack, lambda names: {name: _shape(weights, there) for name, there in names_of(names).items()}
        )
        tensors, prints, dtypes = {}, {}, set()
        for name, there in names_of(list(stored)).items():
            weight, tensor = weights[there], stored[name]
            if tensor.shape != tuple(weight.shape):
                raise BaseMismatch(
                    f"{file} does not belong to this model: '{there}' has shape {list(weight.shape)}, the patch has "
                    f"{list(tensor.shape)}"
                )
            tensors[there] = tensor
            dtypes.add(dtype_name(weight.dtype))
            if not weight.is_meta:
                prints[there] = fingerprint(values_at(weight, tensor.indices))
        known = identity(base) if isinstance(base, str | os.PathLike) else None
        metadata = stored.metadata | {"base": base_facts(known, dtypes)}
        return Adapter(tensors, metadata | ({"fingerprints": prints} if prints else {}))


def save(
    adapter: Adapter,
    path: AnyPath,
    layout: Layout,
    *,
    positions: Literal["gap", "raw"] | None = None,
    base: Base | None = None,
    version: int = 1,
) -> None:
    """Write an adapter as a weight patch.

    layout: "trl", "slime" or "verl". verl sends patches and writes no file; ours holds what it sends.
    positions: "raw": int32; "gap": the gaps between them, uint16, or uint32 for a tensor with a gap above 65,535. The default
        is "gap"; verl takes raw positions alone.
    base: the model, or its folder or file: it is needed for an adapter of deltas, because patches hold new values. A folder
        also gives the names in the checkpoint, which slime and verl use. The adapter is checked against it.
    version: of the weights after the patch, as the trainer counts.
    Values keep the adapter's dtype. What a patch has no place for is lost: the adapter's metadata and fingerprints.

    Raises AdapterError for what the layout cannot hold; BaseMismatch for another base; OSError. Then nothing is written.

        shira.integrations.rl_patches.save(shira.load("poet.safetensors"), "patch.safetensors", "trl")
    """
    if not isinstance(adapter, Adapter):
        raise AdapterError(
            f"expected an adapter, as in save(shira.load('a.safetensors'), 'patch', 'trl'); {described(adapter)}"
        )
    adapter.check()
    if layout not in LAYOUTS or positions not in (None, "gap", "raw"):
        what = did_you_mean(str(layout), LAYOUTS) if layout not in LAYOUTS else "positions are 'gap' or 'raw'"
        raise AdapterError(f"unknown layout {layout!r} or positions {positions!r}: {what}")
    if layout == "verl" and positions == "gap":
        raise AdapterError("verl takes raw positions alone: positions='raw' (--positions raw)")
    positions = positions or ("raw" if layout == "verl" else "gap")
    out = path_of(path, "save(adapter, 'patch.safetensors', 'trl')", AdapterError)
    held = _overwrites(adapter, base, layout)
    for name, tensor in held.items():
        if positions == "raw" and tensor.numel >= 2**31:
            raise AdapterError(f"'{name}' has {tensor.numel} entries, more than int32 positions can tell apart; use gaps")
        if positions == "gap" and tensor.nnz and int(_gaps(tensor).max()) >= 2**32:
            raise AdapterError(f"'{name}' has a gap of 2^32 or more between two positions, which {layout} cannot hold")
    if layout == "trl":
        _save_trl(held, out, positions, version)
    else:
        _save_blobs(held, out, layout, positions, version)


def _save_trl(held: Mapping[str, SparseTensor], out: Path, positions: str, version: int) -> None:
    changed, total = sum(tensor.nnz for tensor in held.values()), sum(tensor.numel for tensor in held.values())
    facts: dict[str, Any] = {
        "sparse": True,
        "model_version": version,
        "num_changed_params": len(held),
        "total_changed_elements": changed,
        "total_elements": total,
        "sparsity": 1.0 - changed / max(1, total),
        "encoding": "raw" if positions == "raw" else "gap_delta",
        SHAPES: json.dumps({name: list(tensor.shape) for name, tensor in held.items()}),
    }
    with spooled(out, TRL | {key: str(value) for key, value in facts.items()}) as add:
        for name, tensor in held.items():
            add(f"{name}.idx", _encoded(tensor, positions))
            add(f"{name}.val", tensor.values)


def _save_blobs(held: Mapping[str, SparseTensor], out: Path, layout: str, positions: str, version: int) -> None:
    """slime's layout, and verl's: the same content, and the manifest in another place."""
    dtype = torch.bfloat16
    if held:
        dtypes = [tensor.values.dtype for tensor in held.values()]
        dtype = dtypes[0]
        for other in dtypes[1:]:
            dtype = torch.promote_types(dtype, other)
    blobs = [_encoded(tensor, positions) for tensor in held.values()]
    params: list[dict[str, Any]] = []
    at = value_at = 0
    for (name, tensor), blob in zip(held.items(), blobs, strict=True):
        ends = at + blob.nbytes, value_at + tensor.nnz
        form = {"name": name, "dtype": dtype_name(tensor.values.dtype), "shape": list(tensor.shape)}
        places = {"pos_start": at, "pos_end": ends[0], "pos_width": blob.element_size()}
        params.append(form | places | {"val_start": value_at, "val_end": ends[1]})
        at, value_at = ends
    empty = torch.empty(0, dtype=torch.uint8, device="cpu")
    all_positions = torch.cat([empty, *map(bytes_of, blobs)])
    values = torch.cat([empty.to(dtype), *(tensor.values.cpu().to(dtype) for tensor in held.values())])
    encoding = "indices" if positions == "raw" else "deltas"
    checksum = checksum_of(iter(all_positions.split(2**20)), iter(values.split(2**20)))
    if layout == "slime":
        facts = {"encoding": encoding, "params": json.dumps(params), "current_version": str(version), "checksum": str(checksum)}
    else:
        facts = {}
    with spooled(out, facts) as add:
        add(POSITIONS, all_positions)
        add(VALUES, values)
        if layout == "verl":
            spec = json.dumps({"encoding": encoding, "params": params, "checksum": checksum})
            add(SPEC, torch.frombuffer(bytearray(spec.encode()), dtype=torch.uint8))


def _overwrites(adapter: Adapter, base: Base | None, layout: str) -> dict[str, SparseTensor]:
    """The adapter's tensors as new values, by the names that the layout uses."""
    label = adapter.name or "the adapter"
    if base is None:
        delta = next((name for name, tensor in adapter.tensors.items() if tensor.kind == "delta"), None)
        if delta is not None:
            raise AdapterError(f"{label}: '{delta}' holds differences, and a patch holds new values: give the model (--base)")
        return dict(adapter.tensors)
    weights = tensors_of(base)
    names = names_in(weights, {label: adapter}) if isinstance(weights, Checkpoint) else {}
    there = renamed(adapter, names)
    check_base(label, there, weights, values_at)
    if any(tensor.kind == "delta" for tensor in there.tensors.values()):
        there = fuse({label: (there, 1.0)}, weights)
    back = {other: name for name, other in names.items()} if layout == "trl" else {}
    return {back.get(name, name): tensor for name, tensor in there.tensors.items()}


def _encoded(tensor: SparseTensor, positions: str) -> Tensor:
    if positions == "raw":
        return tensor.indices.cpu().int()
    gaps = _gaps(tensor)
    return gaps.to(torch.uint16 if not gaps.numel() or int(gaps.max()) <= 65535 else torch.uint32)


def _gaps(tensor: SparseTensor) -> Tensor:
    """int64 [nnz]: how many entries lie between a position and the one before, or the tensor's beginning."""
    indices = tensor.indices.cpu().long()
    return torch.diff(indices, prepend=torch.tensor([-1], device="cpu")) - 1


class _AsLoaded(LazyTensors):
    """A checkpoint's tensors under the names in memory."""

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
        self._checkpoint, self._names = checkpoint, names

    def __getitem__(self, name: str) -> Tensor:
        return self._checkpoint[self._names[name]]

    def form(self, name: str) -> Form:
        return self._checkpoint.form(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _base_of(file: Path, base: Base) -> tuple[Mapping[str, Tensor], Callable[[list[str]], dict[str, str]]]:
    """The base's tensors by their names in memory; and a function: names in the patch -> names in memory, or BaseMismatch."""
    weights = tensors_of(base)
    if isinstance(weights, Checkpoint):
        loaded = next(ways_to_load(weights.path, list(weights)), None)
        if loaded is not None:
            single = {name: parts[0] for name, parts in loaded.sources.items() if name not in loaded.changed}
            return _AsLoaded(weights, single), lambda names: _names_of(file, names, _AsLoaded(weights, single), loaded)
    model = base if isinstance(base, nn.Module) else None
    return weights, lambda names: _names_of(file, names, weights, loaded_as(model, names) if model is not None else None)


def _names_of(file: Path, names: list[str], weights: Mapping[str, Tensor], loaded: Loaded | None) -> dict[str, str]:
    aliases: dict[str, str] = {}
    for there, parts in (loaded.sources if loaded is not None else {}).items():
        for part in parts:
            if loaded is not None and there in loaded.changed and part in names:
                raise BaseMismatch(
                    f"{file}: {loaded.kind} in memory has no tensor '{part}': it is a part of '{there}'. Merge the patch into "
                    "the checkpoint as it is: `shira merge MODEL PATCH -o merged`"
                )
            aliases[part] = there
    mapped = {name: name if name in weights else aliases.get(name, name) for name in names}
    if all(there in weights for there in mapped.values()):
        return mapped
    ending = ".".join(names[0].split(".")[-2:])
    alike = [each for each in weights if f".{each}".endswith(f".{ending}")]
    found = prefix_swaps(names, alike, weights, lambda name, other: True)
    if len(found) == 1:
        return found[0]
    missing = next(name for name, there in mapped.items() if there not in weights)
    raise BaseMismatch(f"{file} does not belong to this model: it has no tensor '{missing}'; {did_you_mean(missing, weights)}")


def _shape(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    form = form_of(weights, name)
    return form.shape if form is not None else ()
