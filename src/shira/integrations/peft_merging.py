"""A sparse adapter of whatever PEFT can merge (LoRA, DoRA, rsLoRA, LoKr, VeRA, OFT, IA3, …): the largest entries of its ΔW.

PEFT puts the adapter beside the base. Then one layer at a time is merged, on a float32 copy of its weight, and gets its own
weight back. So the model is in memory once, with one layer more, and is the base again at the end.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..checkpoints import extraction
from ..checkpoints.sources import LazyTensors, identity
from ..errors import CheckpointError, DataError, FormatError, MissingExtra
from ..files.metadata import base_facts
from ..files.paths import AnyPath, path_of
from ..files.peft_files import check_tied, read_config
from ..files.tensorfiles import Form
from ..sparse.tensor import SparseTensor, dtype_name, fingerprint
from ..texts import described, shown
from ..weights.model_tensors import plain_model
from ..weights.modes import modes_kept
from ..weights.owners import claim
from ..weights.quantized import is_quantized
from ..weights.undo import Undo
from .peft import Base

__all__ = ["convert"]

NAME = "default"  # PEFT's name for the adapter
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # of `init_lora_weights`: PEFT rewrites the base's weights
TOKENS = ".token_adapter"  # where PEFT puts the layer of `trainable_token_indices` into an embedding
MISMATCH = re.compile(  # in torch's error for a state dict
    r"size mismatch for (\S+): copying a param with shape torch.Size\((\[.*?\])\) from checkpoint, "
    r"the shape in current model is torch.Size\((\[.*?\])\)"
)
Vectors = dict[str, tuple[nn.Parameter, Tensor]]


def convert(
    folder: AnyPath,
    base: Base | None = None,
    *,
    density: float | None = None,
    keep: float | None = None,
    scope: extraction.Scope = "tensor",
    name: str | None = None,
    license: str | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Adapter:
    """The largest entries of what a PEFT adapter adds to the weights of its base, as an adapter of deltas in float32.

    folder: the folder that PEFT saved. base: the model, or the folder or hub id of a causal language model; by default the one
        that `adapter_config.json` names. A model is the same afterwards, bit for bit.
    density, keep, scope: as in `shira.extract`: the share of entries to take, or the share of ‖ΔW‖ to keep. One of the first
        two is needed, since the change of a LoRA is dense.
    What PEFT trained whole (`modules_to_save`, biases) is taken whole, as new values. It does not count in the shares.

    `extraction.summary(adapter)` says what is kept: `kept` of the whole, and of each tensor.
    Raises MaskError without density or keep, DataError or CheckpointError for what PEFT cannot load or merge, and MissingExtra.

        shira.integrations.peft_merging.convert("my-lora", model, keep=0.9).save("mine.safetensors")
    """
    path = path_of(folder, "convert('my-lora', model, density=0.01)", FormatError)
    where, config = read_config(path)
    extraction.check_options(density, keep, scope, "delta", name, license, dense=f"{where} is a {config['peft_type']}")
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(CHANGE_THE_BASE):
        raise DataError(
            f"{where} was trained with init_lora_weights={shown(initial)}, with which PEFT changes the base when it loads: "
            "save it as a plain LoRA first (PEFT's `path_initial_model_for_weight_conversion`)"
        )
    if config.get("layer_replication"):
        raise DataError(
            f"{where} was trained with layer_replication={shown(config['layer_replication'])}: its model has more layers than "
            "the base, and an adapter changes only weights that are there; merge it with PEFT, by merge_and_unload"
        )
    library = _library()
    model, loaded = _model(where, config, base)
    own = dict(model.named_parameters(remove_duplicate=False))
    with _beside(library, model, where) as vectors:
        before, after, whole = _weights(library, model, vectors)
        check_tied(where, {*before, *whole}, own)
        if not before:
            raise CheckpointError(f"{where}: PEFT's {config['peft_type']} changes no matrix of a layer; nothing to take")
        options: dict[str, Any] = {"density": density, "keep": keep, "scope": scope, "name": name, "license": license}
        extracted = extraction.extract(before, after, kind="delta", on_progress=on_progress, **options)
        dtypes = before.dtypes()
    facts = extracted.metadata
    tuned = where.absolute().name
    prints = {each: fingerprint(under) for each, (under, _) in whole.items()}
    metadata = facts | {
        "name": name or tuned,
        "base": base_facts(loaded or config.get("base_model_name_or_path"), dtypes),
        "training": {"peft": config["peft_type"], "peft_version": config.get("peft_version")},
        "extraction": facts["extraction"] | {"tuned": tuned, "whole": sorted(whole)},
        "fingerprints": facts["fingerprints"] | prints,
    }
    tensors = dict(extracted.tensors)
    for each, (_, value) in whole.items():
        tensors[each] = SparseTensor(tuple(value.shape), torch.arange(value.numel(), device="cpu"), value.reshape(-1))
    return Adapter(tensors, metadata)


def _library() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingExtra(f"to merge what PEFT trained needs peft: pip install peft ({error})") from error
    return peft


def _model(where: Path, config: Mapping[str, Any], base: Base | None) -> tuple[nn.Module, str | None]:
    """The base in memory, and its name if it was loaded."""
    given = base if base is not None else config.get("base_model_name_or_path")
    if isinstance(given, nn.Module):
        plain = plain_model(given, DataError, "convert('my-lora', model, density=0.01)")
        claim(plain, "", DataError)  # with an adapter in it, it is not the base
        return plain, None
    if not isinstance(given, str | os.PathLike) or not given:
        found = f"found {described(base)}" if base is not None else "and adapter_config.json names none"
        raise DataError(f"{where}: give the model that it was trained on, base=, a folder or a hub id; {found}")
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise DataError(f"{where} is for the task {shown(task)}: load its model as for PEFT, and pass the model in Python")
    from .transformers import load_model

    return load_model(os.fspath(given)), identity(given) if os.path.exists(given) else os.fspath(given)


@contextlib.contextmanager
def _beside(library: Any, model: nn.Module, where: Path) -> Iterator[Vectors]:
    """Put PEFT's adapter into the model. Afterwards it is the model that it was.

    Yields the model's vectors: name -> (parameter, its values before). PEFT may have written other biases into them.
    """
    for name, parameter in model.named_parameters():
        if is_quantized(parameter) or parameter.is_meta:
            state = "quantized" if is_quantized(parameter) else "on the meta device"
            raise DataError(f"'{name}' is {state} in the base; give a plain model, loaded with its weights")
    if any(isinstance(module, library.tuners.tuners_utils.BaseTunerLayer) for module in model.modules()):
        raise DataError("the base holds an adapter of PEFT already; give the plain model, as from_pretrained loads it")
    vectors = {name: (each, each.detach().clone()) for name, each in model.named_parameters() if each.ndim < 2}
    flags = [(each, each.requires_grad) for each in model.parameters()]
    tree = [(module, key, child) for module in model.modules() for key, child in module._modules.items()]
    with modes_kept(model), Undo().inner() as undo:
        undo.callback(_take_out, model, tree, vectors, flags)
        try:
            library.PeftModel.from_pretrained(model, str(where), adapter_name=NAME)
        except Exception as error:  # of another library
            raise DataError(f"PEFT cannot load {where} into this base: {_said(error)}") from error
        yield vectors


def _said(error: Exception) -> str:
    """What an error of PEFT says, in one line. Of many shapes that do not fit, the first."""
    text = " ".join(str(error).split())
    if found := MISMATCH.search(text):
        name, theirs, ours = found.groups()
        return (
            f"this base has other shapes: {name} is {theirs} in the file, {ours} for this base; give the base that it was "
            "trained on"
        )
    return f"{type(error).__name__}: {text[:300]}"


@torch.no_grad()
def _take_out(
    model: nn.Module,
    tree: list[tuple[nn.Module, str, nn.Module | None]],
    vectors: Vectors,
    flags: list[tuple[nn.Parameter, bool]],
) -> None:
    """Give a model its own modules, vectors and flags back. Harmless if it has them."""
    for module, key, child in tree:
        module._modules[key] = child
    model.__dict__.pop("peft_config", None)
    for parameter, value in vectors.values():
        parameter.copy_(value)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


class _Weights(LazyTensors):
    """Weights of adapted layers in float32 (float64 stays), before or after the merge. The last layer's are kept.

    places: name -> (the layer of PEFT, the weight's name in its base layer).
    """

    def __init__(self, places: Mapping[str, tuple[Any, str]], merged: bool) -> None:
        self._places, self._merged = places, merged
        self._last: tuple[Any, dict[str, Tensor]] = (None, {})

    def __getitem__(self, name: str) -> Tensor:
        layer, key = self._places[name]
        if not self._merged:
            return _wide(_parameters(layer)[key].detach())
        if self._last[0] is not layer:
            self._last = (None, {})  # frees it first
            self._last = (layer, _merge(layer, name))
        return self._last[1][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def form(self, name: str) -> Form:
        parameter = self._parameter(name)
        return Form(tuple(parameter.shape), torch.promote_types(parameter.dtype, torch.float32))

    def dtypes(self) -> list[str]:
        """The dtypes of the weights in the model."""
        return sorted({dtype_name(self._parameter(name).dtype) for name in self})

    def _parameter(self, name: str) -> Tensor:
        layer, key = self._places[name]
        return _parameters(layer)[key]


def _weights(library: Any, model: nn.Module, vectors: Vectors) -> tuple[_Weights, _Weights, dict[str, tuple[Tensor, Tensor]]]:
    """The weights of layers before and after a merge; and name -> (before, after) of what PEFT trained whole."""
    places: dict[str, tuple[Any, str]] = {}
    now: dict[str, Tensor] = {name: parameter.detach() for name, (parameter, _) in vectors.items()}
    whole: dict[str, tuple[Tensor, Tensor]] = {}
    for path, module in model.named_modules():
        if isinstance(module, library.utils.ModulesToSaveWrapper):
            saved = dict(module.modules_to_save[NAME].named_parameters())
            for key, old in module.original_module.named_parameters():
                whole[f"{path}.{key}"] = (old.detach(), saved[key].detach().to(old.dtype))
        elif isinstance(module, library.tuners.tuners_utils.BaseTunerLayer):
            if ".base_layer" in path:
                raise DataError(f"'{path}' has two adapters of PEFT, one in the other; merge this one with PEFT, then extract")
            path, held = path.removesuffix(TOKENS), _parameters(module)
            places |= {f"{path}.{key}": (module, key) for key, each in held.items() if each.ndim >= 2}
            if any(each.ndim < 2 for each in held.values()):
                now |= {f"{path}.{key}": each.clone() for key, each in _merge(module, path).items() if each.ndim < 2}
    for name, (parameter, old) in vectors.items():
        if name not in whole and not torch.equal(now[name].to(old.dtype), old):
            whole[name] = (old, now[name].to(parameter.dtype, copy=True))
    return _Weights(places, merged=False), _Weights(places, merged=True), whole


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _parameters(layer: Any) -> dict[str, nn.Parameter]:
    return dict(layer.get_base_layer().named_parameters())


@torch.no_grad()
def _merge(layer: Any, name: str) -> dict[str, Tensor]:
    """The parameters of a layer, in float32, after PEFT has merged its adapter. The layer gets its own back."""
    base = layer.get_base_layer()
    places = [(module, key, each) for module in base.modules() for key, each in module._parameters.items()]
    held = [(module, key, each, each.data) for module, key, each in places if each is not None]
    with Undo().inner() as undo:
        undo.callback(_unmerge, layer, base, held)
        try:
            for _, _, parameter, data in held:
                parameter.data = data.to(torch.promote_types(data.dtype, torch.float32), copy=True)
            layer.merge(adapter_names=[NAME])
            return {key: each.data for key, each in _parameters(layer).items()}
        except Exception as error:  # of another library
            raise CheckpointError(f"PEFT cannot merge its adapter into '{name}': {type(error).__name__}: {error}") from error


def _unmerge(layer: Any, base: nn.Module, held: list[tuple[nn.Module, str, nn.Parameter, Tensor]]) -> None:
    """Give a layer its own parameters back. Harmless if it has them."""
    for module, key, parameter, data in held:
        parameter.data = data
        module._parameters[key] = parameter
    if layer.get_base_layer() is not base:  # PEFT swaps whole modules
        layer.unmerge()
    layer.merged_adapters.clear()
