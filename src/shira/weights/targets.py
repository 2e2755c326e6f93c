"""Which weights of a model an adapter may change, their names, and which modules compute with them."""

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..errors import TargetError, did_you_mean
from ..texts import shown
from .model_tensors import COMPILED, ModelTensors, is_buffer, is_own
from .quantized import shape_of

__all__ = ["KEYWORDS", "Target", "Use", "by_pattern", "is_conv1d", "resolve", "whole_modules"]

Value = TypeVar("Value")
Layers = int | Iterable[int]

KEYWORDS = {
    "all-linear": re.compile(r""),
    "attention": re.compile(r"attn|attention", re.IGNORECASE),
    "mlp": re.compile(r"mlp|ffn|feed_?forward", re.IGNORECASE),
}
# "auto": names of the query and value projections, or of what packs them, in different model families; the first that exist
QUERY_AND_VALUE = (
    ("q_proj", "v_proj"),
    ("query_key_value",),
    ("c_attn",),
    ("qkv_proj",),
    ("Wqkv",),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("to_q", "to_v"),
    ("q", "v"),
    ("in_proj_weight",),
)


class Use(NamedTuple):
    """Where a forward pass reads a weight: `module.forward` reads `holder.attribute`.

    The holder is the module itself, except for the output projection of nn.MultiheadAttention, whose own forward is never
    called.
    """

    module: nn.Module
    holder: nn.Module
    attribute: str


@dataclass(frozen=True, eq=False)
class Target:
    """A weight to adapt: its checkpoint name, and every module that computes with it (several if it is tied)."""

    name: str
    weight: nn.Parameter
    uses: tuple[Use, ...]
    stacked: bool = False  # the weight is a stack of matrices, one for each expert

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return tuple(use.module for use in self.uses)

    @property
    def budget_shape(self) -> tuple[int, ...]:
        """The shape that budgets use: [out, in]; [out, in · kernel] of a convolution; [experts, out, in]; [n] of a vector."""
        shape = shape_of(self.weight)
        return shape if self.stacked or len(shape) < 3 else (shape[0], math.prod(shape[1:]))

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The shape [rows, columns] of the matrix that masks see; its entries have the weight's order.

        A vector has rows of one entry. The matrices of experts are stacked.
        """
        shape = self.budget_shape
        return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)


def resolve(
    model: nn.Module,
    targets: str | Iterable[str],
    *,
    exclude: str | Iterable[str] = (),
    layers: Layers | None = None,
) -> list[Target]:
    """The weights that `targets` means, in the model's order.

    targets, a list: each is the whole name of a module or parameter, or its suffix after a dot, as in PEFT. Each must
        match: "q_proj", "wte", "input_layernorm", "q_proj.bias", "bias". A module means its matrices: the weight of a
        linear, convolution or embedding layer, the packed projection of nn.MultiheadAttention, the 3-D weights of a mixture's
        experts. A module without matrices means its vectors.
    targets, a string: one of
        "all-linear": every linear map except the output embedding; experts and packed projections are linear maps.
        "attention", "mlp": the linear maps with attention, mlp or the like in a part of their name.
        "auto": query and value projections, PEFT's choice for most model families.
        a regular expression on the whole name of a module with a matrix; if none matches, on the whole name of a parameter.
    exclude: a name or several: "lm_head", "vision_tower", "layers.0". Weights with such a part in their name are left out.
    layers: the numbers of the layers to take: 3, or range(4, 12). The layer of a weight is the first number in its name.

    Raises TargetError if anything matches nothing, or if a weight cannot be trained in place.
    """
    weights = _Weights(model)
    names = [targets] if isinstance(targets, str) else list(targets)
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    for given in (*names, *exclude):
        if not isinstance(given, str) or not given:
            raise TargetError(f'a target must be a name, targets=["q_proj", "mlp.up_proj"], found {given!r}')
    _check_parametrized(model, targets if isinstance(targets, str) else names, exclude)
    chosen = _by_string(weights, targets) if isinstance(targets, str) else _by_names(weights, names)
    included = _without(weights, chosen, exclude)
    kept = _in_layers(included, layers)
    for given in names if not isinstance(targets, str) and layers is not None else ():
        meant = _meant(weights, given).intersection(included)
        if meant and not meant.intersection(kept):
            raise TargetError(f"target {given!r} is in none of the layers {shown(layers)}: '{min(meant)}'; leave one out")
    return _targets(model, weights, kept)


def whole_modules(model: nn.Module, wanted: str | Iterable[str], *, exclude: str | Iterable[str] = ()) -> list[Target]:
    """Every parameter of the modules that train whole, in the model's order.

    wanted: names of modules, or suffixes of names. "auto": the modules of a Transformers model for classification that are not
        its base model. Such a head is random unless it was loaded.

    Raises TargetError if a name matches nothing, or if a weight cannot be trained in place.
    """
    asked = _heads(model) if wanted == "auto" else [wanted] if isinstance(wanted, str) else list(wanted)
    if not asked:
        return []
    weights = _Weights(model)
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    found = {_plain_name(name): module for name, module in model.named_modules()}
    chosen = []
    for given in asked:
        meant = [name for name in found if isinstance(given, str) and given and _matches(name, given)]
        below = [name for name in weights.owners if any(name.startswith(f"{module}.") for module in meant)]
        if not below:
            known = _suffixes(name for name in found if name)
            raise TargetError(f"whole={given!r} matches no module with parameters; {did_you_mean(str(given), known)}")
        chosen += below
    kept = {name for name in chosen if not _has_any(name, exclude)}
    return _targets(model, weights, [name for name in weights.owners if name in kept])


def _heads(model: nn.Module) -> list[str]:
    """The modules of a model for classification that are not its base model, and have parameters."""
    kinds = [kind.__name__ for kind in type(model).__mro__]
    base = model._modules.get(str(getattr(model, "base_model_prefix", "")))
    if base is None or not any("For" in name and name.endswith("Classification") for name in kinds):
        return []
    return [name for name, part in model.named_children() if part is not base and next(part.parameters(), None) is not None]


def _targets(model: nn.Module, weights: "_Weights", chosen: Iterable[str]) -> list[Target]:
    """The weights of these names, each with every module that computes with its memory."""
    now = ModelTensors(model)
    first = now.first_of
    tensor_names = {id(tensor): name for name, tensor in reversed(now.by_name.items())}  # the first of its names
    users: dict[int, list[Use]] = {}
    for module in model.modules():
        for attribute, parameter in _own(module):
            use = Use(weights.callers.get(id(module), module), module, attribute)
            users.setdefault(id(first[id(parameter)]), []).append(use)
    resolved: dict[int, Target] = {}
    for name in chosen:
        module, attribute = weights.owners[name]
        weight: Any = first[id(module._parameters[attribute])]
        uses, tensor_name = users[id(weight)], tensor_names[id(weight)]
        other = now.overlapping.get(tensor_name)
        if other is not None or is_buffer(weight):
            raise TargetError(
                f"'{name}' shares a part of its memory with '{other or tensor_name}', so no entry of it can be trained by "
                "itself; give each a tensor of its own, or leave it out of the targets"
            )
        why = next(filter(None, (_why_not(use.module, use.attribute) for use in uses)), None)
        if why:
            raise TargetError(f"'{name}' belongs to a {why}; leave it out of the targets")
        stacked = _is_stack_of_experts(module, weight)
        resolved.setdefault(id(weight), Target(tensor_name, weight, tuple(uses), stacked))
    return list(resolved.values())


def _check_parametrized(model: nn.Module, wanted: str | list[str], exclude: list[str]) -> None:
    """Raise TargetError if a wanted weight is computed from other parameters before each forward pass."""
    for full_name, module in model.named_modules():
        name = _plain_name(full_name)
        for attribute in getattr(module, "parametrizations", None) or () if is_parametrized(module) else ():
            path = f"{name}.{attribute}".lstrip(".")
            if _has_any(path, exclude) or not _wants(wanted, module, name, path):
                continue
            originals: Any = module.parametrizations[attribute]
            below = [f"{name}.parametrizations.{attribute}.{key}".lstrip(".") for key, _ in _own(originals)]
            raise TargetError(
                f"'{path}' is parametrized, computed from {' and '.join(map(repr, below))}; name those, "
                f"or remove the parametrization first, or exclude '{name}'"
            )


def _wants(wanted: str | list[str], module: nn.Module, name: str, path: str) -> bool:
    if isinstance(wanted, list):
        return any(_matches(each, entry) for entry in wanted for each in (name, path))
    if wanted in KEYWORDS:
        linear = isinstance(module, nn.Linear | nn.MultiheadAttention) or is_conv1d(module)
        return linear and any(KEYWORDS[wanted].search(part) for part in path.split("."))
    with contextlib.suppress(re.error):
        return wanted != "auto" and any(re.fullmatch(wanted, each) for each in (name, path))
    return False


def by_pattern(names: Iterable[str], patterns: Mapping[str, Value]) -> dict[str, Value]:
    """Tensor name -> the value of the last pattern that matches it.

    A pattern matches the whole name of a module or tensor, or its suffix after a dot, as in `resolve`. *, ? and [] work as
    in fnmatch: "down_proj", "layers.0.*", "model.layers.[0-3].mlp.up_proj.weight".
    Raises TargetError for a pattern that matches nothing.
    """
    names = list(names)
    found: dict[str, Value] = {}
    for pattern, value in patterns.items():
        meant = [name for name in names if any(_fits(n, pattern) for n in (name, name.removesuffix(".weight")))]
        if not meant:
            modules = _suffixes(name.removesuffix(".weight") for name in names)
            raise TargetError(f"pattern {pattern!r} matches none of {len(names)} tensors; {did_you_mean(pattern, modules)}")
        found |= dict.fromkeys(meant, value)
    return {name: found[name] for name in names if name in found}


def _why_not(module: nn.Module, attribute: str) -> str | None:
    """Why a module's weight cannot be trained in place; None if it can."""
    for hook in module._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils.") and attribute.startswith(
            f"{getattr(hook, 'name', None) or getattr(hook, '_tensor_name', '')}_"
        ):
            kind = type(hook).__module__.rpartition(".")[2]
            return f"{type(module).__name__} under torch.nn.utils.{kind}, which computes with copies of it; remove that first"
    if isinstance(module, nn.RNNBase):
        return f"{type(module).__name__}, which computes with copies of its weights"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return f"{type(module).__name__} with max_norm, which changes its weights in the forward pass"
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is Transformers' Conv1D: a linear layer with a weight [in, out]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


class _Weights:
    """A model's parameters by name, and the parameters that each module name means."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.owners: dict[str, tuple[nn.Module, str]] = {}  # each name of a parameter -> the module and attribute there
        self.modules: dict[str, list[str]] = {}  # module name -> names of the parameters that it means
        self.matrices: set[str] = set()  # names of modules that have a matrix
        self.linear: list[str] = []  # names of parameters that are linear maps, without the output embedding
        self.callers: dict[int, nn.Module] = {}  # id of a module whose forward is never called -> the module that uses it
        get_output = getattr(model, "get_output_embeddings", None)
        output = get_output() if callable(get_output) else None
        for full_name, module in model.named_modules():
            name = _plain_name(full_name)
            own = dict(_own(module))
            matrices = [a for a, parameter in own.items() if len(shape_of(parameter)) > 1 and not a.startswith("bias")]
            paths = {attribute: f"{name}.{attribute}".lstrip(".") for attribute in own}
            self.owners |= {path: (module, attribute) for attribute, path in paths.items()}
            if own:
                self.modules[name] = [paths[attribute] for attribute in matrices or own]
            if matrices:
                self.matrices.add(name)
            if isinstance(module, nn.MultiheadAttention):
                self.callers[id(module.out_proj)] = module
            for child in module.children():
                if isinstance(child, nn.ParameterList | nn.ParameterDict):
                    self.callers[id(child)] = self.callers.get(id(module), module)
            if module is not output and not isinstance(module, nn.RNNBase):
                self.linear += [paths[a] for a in matrices if _is_linear(module, own[a])]


def _own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's own parameters, without those of a tuner."""
    return ((name, parameter) for name, parameter in module._parameters.items() if parameter is not None and not is_own(name))


def _is_linear(module: nn.Module, weight: nn.Parameter) -> bool:
    return isinstance(module, nn.Linear | nn.MultiheadAttention) or is_conv1d(module) or _is_stack_of_experts(module, weight)


def _is_stack_of_experts(module: nn.Module, weight: nn.Parameter) -> bool:
    """Whether a weight is how Transformers stores a mixture's experts: [experts, out, in], in a module called ...Experts."""
    return len(shape_of(weight)) == 3 and "expert" in type(module).__name__.lower()


def _plain_name(name: str) -> str:
    """The checkpoint name of a module or tensor, without the parts that torch.compile adds."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def _by_string(weights: _Weights, wanted: str) -> list[str]:
    if wanted == "auto":
        for names in QUERY_AND_VALUE:
            chosen = [p for p in weights.linear if any(_matches(n, e) for n in (p, p.rpartition(".")[0]) for e in names)]
            if chosen:
                return chosen
        raise TargetError("targets 'auto' finds no query and value projections; use 'all-linear' or a list of names")
    if wanted in KEYWORDS:
        chosen = [name for name in weights.linear if any(KEYWORDS[wanted].search(part) for part in name.split("."))]
        if not chosen:
            raise TargetError(f"targets {wanted!r} match no linear layer; {did_you_mean(wanted, _suffixes(weights.modules))}")
        return chosen
    try:
        compiled = re.compile(wanted)
    except re.error as error:
        raise TargetError(f"targets {wanted!r} is not a regular expression: {error}") from error
    chosen = [
        p for name, meant in weights.modules.items() if name in weights.matrices and compiled.fullmatch(name) for p in meant
    ]
    chosen = chosen or [name for name in weights.owners if compiled.fullmatch(name)]
    if not chosen:
        parts = [part.strip() for part in wanted.split(",")]
        if all(_meant(weights, part) for part in parts):
            raise TargetError(f"targets {wanted!r} is a text; names of layers stand in a list: {parts}")
        raise TargetError(
            f"targets {wanted!r} is neither a keyword (auto, {', '.join(KEYWORDS)}) nor a regular expression that matches the "
            f"whole name of a layer or parameter; {did_you_mean(wanted, _suffixes(weights.modules))}"
        )
    return chosen


def _by_names(weights: _Weights, wanted: list[str]) -> list[str]:
    if not wanted:
        raise TargetError(f"targets is empty; {did_you_mean('', _suffixes(weights.modules))}")
    chosen: set[str] = set()
    for entry in wanted:
        meant = _meant(weights, entry)
        if not meant:
            path, module = next(((n, m) for n, m in weights.model.named_modules() if _matches(n, entry)), ("", None))
            if module is not None:
                below = ", ".join(_suffixes(n.removeprefix(f"{path}.") for n in weights.modules if n.startswith(path)))
                kind = type(module).__name__
                remedy = f"name what is in it: {below}" if below else "leave it out"
                raise TargetError(f"target {entry!r} is a {kind} without weights of its own; {remedy}")
            raise TargetError(f"target {entry!r} matches no layer; {did_you_mean(entry, _suffixes(weights.modules))}")
        chosen |= meant
    return [name for name in weights.owners if name in chosen]


def _meant(weights: _Weights, given: str) -> set[str]:
    """The names of the weights that one name in a list of targets means."""
    meant = {p for name, parameters in weights.modules.items() if _matches(name, given) for p in parameters}
    return meant | {name for name in weights.owners if _matches(name, given)}


def _without(weights: _Weights, chosen: list[str], exclude: list[str]) -> list[str]:
    for given in exclude:
        if not any(_has_any(name, [given]) for name in weights.owners):
            raise TargetError(f"exclude {given!r} matches nothing; {did_you_mean(given, _suffixes(weights.modules))}")
    included = [name for name in chosen if not _has_any(name, exclude)]
    if not included:
        raise TargetError(f"exclude={exclude} leaves none of {len(chosen)} targets")
    return included


def _in_layers(chosen: list[str], layers: Layers | None) -> list[str]:
    if layers is None:
        return chosen
    wanted = {layers} if isinstance(layers, int) else set(layers)
    numbers = {name: next((int(part) for part in name.split(".") if part.isdigit()), None) for name in chosen}
    known = sorted({number for number in numbers.values() if number is not None})
    missing = sorted(wanted - set(known))
    if missing or not wanted:
        span = f"{known[0]} to {known[-1]}" if known else "no numbered layer"
        raise TargetError(f"layers={sorted(wanted)} must be numbers of layers with targets; the model has them in {span}")
    return [name for name in chosen if numbers[name] in wanted]


def _matches(name: str, given: str) -> bool:
    """Whether this is the name, or its suffix after a dot."""
    return name == given or name.endswith("." + given)


def _fits(name: str, pattern: str) -> bool:
    """`_matches` for a pattern of fnmatch."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _has_any(name: str, parts: Iterable[str]) -> bool:
    """Whether one of these, between dots, is a part of the name."""
    return any(f".{part}." in f".{name}." for part in parts)


def _suffixes(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names if name))
