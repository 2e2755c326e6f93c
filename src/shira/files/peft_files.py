"""A folder that PEFT wrote for one of its sparse methods, SHiRA or Super-Tuning, read as an adapter's tensors.

PEFT's SHiRA (0.21) adds values to the weights of `nn.Linear` layers. Its file has no shapes, which the base gives. For each
layer it has `shira_weight` [r · (out + in)], float32, and `shira_indices` [2, r · (out + in)], int32, rows and columns; r is
the same in all layers. Super-Tuning has `supertuning_values` [n] and flat `supertuning_indices` [n], or none: they are then
those of the largest |W|. Nothing in a file is used before it is checked.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import AdapterError, BaseMismatch, CheckpointError, FormatError, did_you_mean
from ..sparse.tensor import SparseTensor, dtype_name, fingerprint
from ..texts import shown, strict_json
from .bases import named_base
from .checkpoint import form_of, prefix_swaps
from .metadata import base_facts
from .paths import State, open_regular, state_of
from .reading import unchanged
from .suggestions import PEFT_PREFIX
from .tensorfiles import malformed, read_header, read_tensor, whole_file

__all__ = ["CONFIG", "WEIGHTS", "StoredPeft", "check_tied", "is_sparse", "named_in", "read_config", "stored_peft"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYER = {"SHIRA": ("shira_weight", "shira_indices"), "SUPERTUNING": ("supertuning_values", "supertuning_indices")}
INTEGERS = (torch.int32, torch.int64)

Tensors = Mapping[str, Tensor]


class StoredPeft(dict[str, SparseTensor]):
    """The tensors of a folder, each read and checked against the base now; the files stay open, so that a change is seen.

    path: the folder, or the file of weights in it. base: the tensors of the base. On the meta device they give shapes alone.
    metadata: what an adapter's metadata says of it.
    Raises FormatError for another method of PEFT or a malformed file, and BaseMismatch for another base.
    """

    def __init__(self, path: Path, stack: contextlib.ExitStack, base: Tensors) -> None:
        super().__init__()
        folder, weights = (path, path / WEIGHTS) if path.is_dir() else (path.parent, path)
        files = [stack.enter_context(open_regular(each, FormatError)) for each in (weights, folder / CONFIG)]
        self._states = {file: state_of(file) for file in files}
        _, config = read_config(path)
        if not is_sparse(config):
            raise FormatError(f"{folder} is of PEFT's method {shown(config['peft_type'])}; expected SHiRA or Super-Tuning")
        values_name, indices_name = LAYER[config["peft_type"]]
        stored = _stored(weights, files[0])
        layers = [name.rpartition(".")[0] for name in stored if name.endswith(f".{values_name}")]
        whole = {name: value for name, value in stored.items() if not name.endswith((f".{values_name}", f".{indices_name}"))}
        names = [*(f"{layer}.weight" for layer in layers), *whole]
        if not layers or len(set(names)) < len(names):
            found = "a weight that is in it in part and whole" if layers else "none"
            raise FormatError(f"{weights}: expected a {values_name} for each layer, found {found}")
        name_of = _names_in_base(folder, names, whole, base)
        check_tied(folder, set(name_of.values()), base)
        prints, dtypes = {}, set()
        for layer in layers:
            name = name_of[f"{layer}.weight"]
            weight = base[name]
            with _checked(weights, layer):
                self[name] = _layer(config, weight, stored[f"{layer}.{values_name}"], stored.get(f"{layer}.{indices_name}"))
            dtypes.add(dtype_name(weight.dtype))
            if not weight.is_meta:
                prints[name] = fingerprint(weight.detach().reshape(-1)[self[name].indices.to(weight.device)])
        for file_name, value in whole.items():
            name = name_of[file_name]
            form = form_of(base, name)
            if form is None or form.shape != tuple(value.shape):
                there = list(form.shape) if form else "none"
                raise BaseMismatch(f"{folder}: '{name}' has shape {list(value.shape)}, in the base it has {there}")
            with _checked(weights, file_name):
                positions = torch.arange(value.numel(), device="cpu")
                self[name] = SparseTensor(form.shape, positions, value.reshape(-1).to(form.dtype))
        mask, version = config.get("mask_type"), config.get("peft_version")
        metadata = {
            "name": folder.absolute().name,
            "mask": {"name": f"PEFT's {mask if isinstance(mask, str) and mask else 'magnitude'}"},
            "base": base_facts(named_in(config), dtypes),
            "training": {"peft": config["peft_type"], "peft_version": version if isinstance(version, str) else None},
            "fingerprints": prints,
        }
        self.metadata: dict[str, Any] = {key: value for key, value in metadata.items() if value}

    def state(self) -> tuple[State, ...]:
        """See `adapter.check_unchanged`."""
        return unchanged(self._states)


def stored_peft(path: Path, stack: contextlib.ExitStack, model: Callable[[], Tensors] | None = None) -> StoredPeft | None:
    """A folder of a sparse method, or the file in it, as an adapter's tensors; None if it is another, or its base is not found.

    model: the tensors of the model that it is for, on the meta device, if there is one. Otherwise, and for positions that come
        from the base's weights, the base is the one that the configuration names.
    Raises FormatError for a malformed file, and for a base that is not the one it was trained on; BaseMismatch for the model.
    """
    try:
        folder, config = read_config(path)
    except (FormatError, OSError):
        return None
    if not is_sparse(config) or not (path.is_file() or (folder / WEIGHTS).is_file()):
        return None
    if model is not None and config["peft_type"] == "SHIRA":
        return StoredPeft(path, stack, model())
    named = named_in(config)
    try:
        base = named_base(named) if named else None
        if base is not None:
            return StoredPeft(path, stack, base)
    except (BaseMismatch, CheckpointError, OSError) as error:
        raise FormatError(
            f"{path}: {CONFIG} says that its base, which gives the shapes, is {shown(named)} (with another one: `shira convert "
            f"{path} --base MODEL -o adapter.safetensors`): {error}"
        ) from error
    return StoredPeft(path, stack, model()) if model is not None else None


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


def named_in(config: Mapping[str, Any]) -> str | None:
    """The base that a configuration of PEFT names; None if it names none."""
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def check_tied(folder: Path, names: Collection[str], base: Tensors) -> None:
    """Raise BaseMismatch if one of these weights is tied in the base to another one, from which PEFT has untied it.

    base: of a model. A checkpoint on disk holds one of several tied tensors.
    """
    if not isinstance(base, dict):
        return

    def place(name: str) -> tuple[int, int]:
        return base[name].untyped_storage()._cdata, base[name].storage_offset()

    first = {place(name): name for name in names}
    for other in base.keys() - names:
        if name := first.get(place(other)):
            raise BaseMismatch(
                f"{folder}: PEFT trained '{name}' alone, and in this base it is one tied tensor with '{other}', which would "
                "change as well; give each its own first, as PEFT did: "
                f"model.{name} = torch.nn.Parameter(model.{name}.detach().clone())"
            )


def _stored(path: Path, file: BinaryIO) -> dict[str, Tensor]:
    """The tensors of a file, without PEFT's prefix in their names. Raises FormatError."""
    with whole_file(path):
        entries, _ = read_header(file, any_dtype=False)
        return {
            name.removeprefix(PEFT_PREFIX).replace("_orig_mod.", ""): read_tensor(file, entry)
            for name, entry in entries.items()
        }


def _names_in_base(folder: Path, names: list[str], whole: Tensors, base: Tensors) -> dict[str, str]:
    """Name in the file -> name in the base. Raises BaseMismatch if they do not belong together."""

    def fits(name: str, other: str) -> bool:
        form = form_of(base, other)
        if name in whole:
            return form is not None and whole[name].shape == form.shape
        return form is not None and len(form.shape) == 2

    missing = next((name for name in names if name not in base), None)
    if missing is None:
        return {name: name for name in names}
    ending = ".".join(names[0].split(".")[-2:])
    found = prefix_swaps(names, [each for each in base if f".{each}".endswith(f".{ending}")], base, fits)
    if len(found) != 1:
        raise BaseMismatch(
            f"{folder} does not belong to this model: it has no tensor '{missing}'; {did_you_mean(missing, base)}"
        )
    return found[0]


def _layer(config: Mapping[str, Any], weight: Tensor, values: Tensor, places: Tensor | None) -> SparseTensor:
    """What PEFT adds to one weight. Raises AdapterError if the positions are not in it."""
    if weight.ndim != 2 or values.ndim != 1 or not values.is_floating_point():
        raise AdapterError(
            f"expected a list of values for a matrix, found {values.dtype} {list(values.shape)} for a weight of shape "
            f"{list(weight.shape)} in the base"
        )
    if places is not None and places.dtype not in INTEGERS:
        raise AdapterError(f"expected positions as int32 or int64, found {places.dtype}")
    of_shira = config["peft_type"] == "SHIRA"
    indices = (_of_shira if of_shira else _of_super_tuning)(config, weight, values.numel(), places)
    order = indices.argsort()
    keep = order[~torch.logical_and(values[order] == 0, values[order].signbit())]  # -0.0 adds nothing: `save` pads with it
    given = values[keep].to(torch.float32 if of_shira else weight.dtype)  # as PEFT adds them
    return SparseTensor(tuple(weight.shape), indices[keep], given, "delta")


def _of_shira(config: Mapping[str, Any], weight: Tensor, count: int, places: Tensor | None) -> Tensor:
    """Flat positions in the file's order, int64."""
    rows, columns = weight.shape
    if places is None or places.shape != (2, count):
        raise AdapterError(f"expected shira_indices of shape [2, {count}], found {_shape(places)}")
    if type(config.get("r")) is not int or not 0 < count == config["r"] * (rows + columns):
        raise AdapterError(
            f"{count} values are not r · (out + in), with r {shown(config.get('r'))} and the base's shape "
            f"[{rows}, {columns}]; give the base that it was trained on"
        )
    row, column = places[0].long(), places[1].long()
    if int(places.min()) < 0 or int(row.max()) >= rows or int(column.max()) >= columns:
        raise AdapterError(f"positions up to [{int(row.max())}, {int(column.max())}] in a weight of shape [{rows}, {columns}]")
    return torch.add(row * columns, column)


def _of_super_tuning(config: Mapping[str, Any], weight: Tensor, count: int, flat: Tensor | None) -> Tensor:
    """The same. Without positions in the file, PEFT chooses them again from the weight, by the calls here."""
    if flat is None:
        sparsity = config.get("sparsity")
        if not isinstance(sparsity, int | float) or not 0 <= sparsity <= 1:
            raise AdapterError(f"the file holds no positions, and sparsity in {CONFIG} is {shown(sparsity)}")
        if weight.is_meta:
            raise AdapterError(
                "the file holds no positions, they come from the base's weights: give a model or its folder, as in "
                "switcher.add('x', shira.integrations.peft.load(folder, model))"
            )
        if count != int(weight.numel() * (1 - sparsity)):
            raise AdapterError(f"{count} values in a weight of shape {list(weight.shape)} at sparsity {sparsity}")
        flat = torch.topk(weight.detach().abs().flatten(), k=count, largest=bool(config.get("select_top", True))).indices
    if flat.shape != (count,):
        raise AdapterError(f"expected {count} supertuning_indices, found shape {_shape(flat)}")
    positions: Tensor = flat.long().cpu()
    return positions


@contextlib.contextmanager
def _checked(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except AdapterError as error:
        raise FormatError(f"{path}: '{name}': {error}") from None


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else str(list(tensor.shape))
