"""Which weights of a model an adapter may touch, what they are called, and which modules compute with them."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeVar

from torch import nn

from .distributed import check_pieces, is_sharded
from .errors import TargetError, did_you_mean
from .quantized import is_quantized, label, shape_of

__all__ = ["KEYWORDS", "Target", "Use", "by_pattern", "check_trainable", "is_conv1d", "resolve"]

Value = TypeVar("Value")
Layers = int | Iterable[int]

VALUES = "shira_values"  # the beginning of the names under which modules hold masters while a tuner is attached
KEYWORDS = {
    "all-linear": re.compile(r""),
    "attention": re.compile(r"attn|attention", re.IGNORECASE),
    "mlp": re.compile(r"mlp|ffn|feed_?forward", re.IGNORECASE),
}
# "auto": the query and value projections, or what they are packed in, whatever a family calls them; the first that are there
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
    """Where a forward pass finds a weight: `module.forward` reads `holder.attribute`. The holder is the module, but for
    the output projection of nn.MultiheadAttention, whose own forward is never called."""

    module: nn.Module
    holder: nn.Module
    attribute: str


@dataclass(frozen=True, eq=False)
class Target:
    """A weight to adapt: its checkpoint name, and every place that computes with it (several if it is tied)."""

    name: str
    weight: nn.Parameter
    uses: tuple[Use, ...]
    stacked: bool = False  # the weight is a stack of matrices, one an expert

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return tuple(use.module for use in self.uses)

    @property
    def sides(self) -> tuple[int, ...]:
        """The shape that budgets are for: [out, in]; [out, in · kernel] of a convolution; [experts, out, in]; or [n]."""
        shape = shape_of(self.weight)
        return shape if self.stacked or len(shape) < 3 else (shape[0], math.prod(shape[1:]))

    @property
    def matrix(self) -> tuple[int, int]:
        """The matrix [rows, columns] that masks see, its entries in the weight's order: a vector has rows of one entry, experts
        are stacked."""
        sides = self.sides
        return (math.prod(sides[:-1]), sides[-1]) if len(sides) > 1 else (math.prod(sides), 1)


def resolve(
    model: nn.Module,
    targets: str | Iterable[str],
    *,
    exclude: str | Iterable[str] = (),
    layers: Layers | None = None,
) -> list[Target]:
    """The weights that `targets` means, in the model's order.

    A list matches a module's or a parameter's whole name or its suffix after a dot, as in PEFT; each entry must match. A
    module means its matrices (the weight of a linear, convolution or embedding layer, the packed projection of
    nn.MultiheadAttention, the 3-D weights of a mixture's experts), or, if it has none, its vectors: "q_proj", "wte",
    "input_layernorm", "q_proj.bias", "bias".
    A string is "all-linear" (every linear map but the output embedding; experts and packed projections are some), "attention",
    "mlp" (those under a part of that name), "auto" (query and value projections, PEFT's choice for most families), or a
    regular expression on the whole name of a module that has a matrix, or else of a parameter.
    exclude: a name, or names, none of whose parts may be in a weight's name: "lm_head", "vision_tower", "layers.0".
    layers: the numbers of the layers to take, the first number in a weight's name: 3, or range(4, 12).

    Raises TargetError if anything matches nothing or is computed with in a way that cannot be followed.
    """
    weights = _Weights(model)
    names = [targets] if isinstance(targets, str) else list(targets)
    chosen = _by_string(weights, targets) if isinstance(targets, str) else _by_names(weights, names)
    chosen = _in_layers(_without(weights, chosen, [exclude] if isinstance(exclude, str) else list(exclude)), layers)
    users: dict[int, list[Use]] = {}
    for module in model.modules():
        for attribute, parameter in _own(module):
            users.setdefault(id(parameter), []).append(Use(weights.callers.get(id(module), module), module, attribute))
    tensor_names = {id(parameter): name for name, parameter in model.named_parameters()}
    resolved: dict[int, Target] = {}
    for name in chosen:
        module, attribute = weights.owners[name]
        weight = module._parameters[attribute]
        assert weight is not None  # _own leaves empty ones out
        uses = users[id(weight)]
        why = next(filter(None, (_why_not(use.module) for use in uses)), None)
        if why:
            raise TargetError(f"'{name}' belongs to a {why}; leave it out of the targets")
        stacked = _is_stack_of_experts(module, weight)
        resolved.setdefault(id(weight), Target(tensor_names[id(weight)], weight, tuple(uses), stacked))
    return list(resolved.values())


def check_trainable(targets: Iterable[Target]) -> None:
    """Raise TargetError, with its name, for a weight whose entries cannot be overwritten, or that alone was frozen.

    Quantized weights of linear layers pass: deltas train beside them.
    """
    targets = list(targets)
    for target in targets:
        weight = target.weight
        if is_quantized(weight):
            other = next((use.module for use in target.uses if not isinstance(use.module, nn.Linear)), None)
            if other is not None:
                raise TargetError(
                    f"'{target.name}' is {label(weight)} and used by a {type(other).__name__}; of quantized weights only those "
                    "of linear layers can be trained, leave it out of the targets"
                )
            continue
        if is_sharded(weight):
            check_pieces(target.name, weight)
        if not weight.is_floating_point() or weight.is_meta or not weight.is_contiguous():
            raise TargetError(
                f"'{target.name}' must be a contiguous floating-point tensor with data, found {weight.dtype} on "
                f"{weight.device}{'' if weight.is_contiguous() else ', not contiguous'}"
            )
    plain = [target for target in targets if not is_quantized(target.weight)]
    frozen = [target.name for target in plain if not target.weight.requires_grad]
    if 0 < len(frozen) < len(plain):  # who freezes the whole model means the base; who freezes a part of it means it
        raise TargetError(
            f"{len(frozen)} of {len(plain)} targets were frozen (requires_grad=False), the first is '{frozen[0]}'; exclude "
            "them, or unfreeze them before attach()"
        )


def by_pattern(names: Iterable[str], patterns: Mapping[str, Value]) -> dict[str, Value]:
    """Tensor name -> the value of the last pattern that means it.

    A pattern means a module's or tensor's whole name or its suffix after a dot, as in `resolve`; *, ? and [] stand for
    what they do in fnmatch: "down_proj", "layers.0.*", "model.layers.[0-3].mlp.up_proj.weight".
    Raises TargetError for a pattern that matches nothing.
    """
    names = list(names)
    found: dict[str, Value] = {}
    for pattern, value in patterns.items():
        meant = [name for name in names if any(_means(pattern, n) for n in (name, name.removesuffix(".weight")))]
        if not meant:
            modules = _suffixes(name.removesuffix(".weight") for name in names)
            raise TargetError(f"pattern {pattern!r} matches none of {len(names)} tensors; {did_you_mean(pattern, modules)}")
        found |= dict.fromkeys(meant, value)
    return {name: found[name] for name in names if name in found}


def _why_not(module: nn.Module) -> str | None:
    """What keeps a module's weights from being trained in place."""
    if isinstance(module, nn.RNNBase):
        return f"{type(module).__name__}, which computes with copies of its weights"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return f"{type(module).__name__} with max_norm, which changes its weights in the forward pass"
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is Transformers' Conv1D, a linear layer with a weight [in, out]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


class _Weights:
    """A model's parameters by name, and what its modules' names stand for."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.owners: dict[str, tuple[nn.Module, str]] = {}  # a parameter's name, any of several -> where it is
        self.modules: dict[str, list[str]] = {}  # module name -> the parameters it means
        self.matrices: set[str] = set()  # names of modules that have one
        self.linear: list[str] = []  # parameters that are linear maps, but the output embedding
        self.callers: dict[int, nn.Module] = {}  # a module whose forward is never called -> the one that computes with it
        get_output = getattr(model, "get_output_embeddings", None)
        output = get_output() if callable(get_output) else None
        for name, module in model.named_modules():
            own = {attribute: parameter for attribute, parameter in _own(module)}
            matrices = [a for a, parameter in own.items() if len(shape_of(parameter)) > 1 and not a.startswith("bias")]
            paths = {attribute: f"{name}.{attribute}".lstrip(".") for attribute in own}
            self.owners |= {path: (module, attribute) for attribute, path in paths.items()}
            if own:
                self.modules[name] = [paths[attribute] for attribute in matrices or own]
            if matrices:
                self.matrices.add(name)
            if isinstance(module, nn.MultiheadAttention):
                self.callers[id(module.out_proj)] = module
            if module is not output and not isinstance(module, nn.RNNBase):
                self.linear += [paths[a] for a in matrices if _is_linear(module, own[a])]


def _own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's own parameters, without what a tuner put there."""
    return (
        (name, parameter)
        for name, parameter in module._parameters.items()
        if parameter is not None and not name.startswith(VALUES)
    )


def _is_linear(module: nn.Module, weight: nn.Parameter) -> bool:
    return isinstance(module, nn.Linear | nn.MultiheadAttention) or is_conv1d(module) or _is_stack_of_experts(module, weight)


def _is_stack_of_experts(module: nn.Module, weight: nn.Parameter) -> bool:
    """Transformers keeps the experts of a mixture as 3-D parameters [experts, out, in] of a module called ...Experts."""
    return len(shape_of(weight)) == 3 and "expert" in type(module).__name__.lower()


def _means(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


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
        meant = {p for name, parameters in weights.modules.items() if _matches(name, entry) for p in parameters}
        meant |= {name for name in weights.owners if _matches(name, entry)}
        if not meant:
            others = [(n, m) for n, m in weights.model.named_modules() if _matches(n, entry)]
            if others:
                below = _suffixes(
                    name.removeprefix(others[0][0] + ".") for name in weights.modules if name.startswith(others[0][0])
                )
                kind = type(others[0][1]).__name__
                raise TargetError(
                    f"target {entry!r} is a {kind} without weights of its own; name what is in it: {', '.join(below)}"
                )
            raise TargetError(f"target {entry!r} matches no layer; {did_you_mean(entry, _suffixes(weights.modules))}")
        chosen |= meant
    return [name for name in weights.owners if name in chosen]


def _without(weights: _Weights, chosen: list[str], exclude: list[str]) -> list[str]:
    for entry in exclude:
        if not any(f".{entry}." in f".{name}." for name in weights.owners):
            raise TargetError(f"exclude {entry!r} matches nothing; {did_you_mean(entry, _suffixes(weights.modules))}")
    left = [name for name in chosen if not any(f".{entry}." in f".{name}." for entry in exclude)]
    if not left:
        raise TargetError(f"exclude={exclude} leaves none of {len(chosen)} targets")
    return left


def _in_layers(chosen: list[str], layers: Layers | None) -> list[str]:
    if layers is None:
        return chosen
    wanted = {layers} if isinstance(layers, int) else set(layers)
    numbers = {name: next((int(part) for part in name.split(".") if part.isdigit()), None) for name in chosen}
    known = sorted({number for number in numbers.values() if number is not None})
    missing = sorted(wanted - set(known))
    if missing or not wanted:
        span = f"{known[0]} to {known[-1]}" if known else "no numbered layer"
        raise TargetError(f"layers={sorted(wanted)} must be numbers of layers with targets, found {span}")
    return [name for name in chosen if numbers[name] in wanted]


def _matches(name: str, entry: str) -> bool:
    return name == entry or name.endswith("." + entry)


def _suffixes(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names if name))
