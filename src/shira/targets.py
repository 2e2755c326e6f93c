"""Which weights of a model an adapter may touch, and what they are called."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar, cast

from torch import nn

from .errors import TargetError, did_you_mean

__all__ = ["KEYWORDS", "Target", "by_pattern", "resolve"]

Value = TypeVar("Value")

KEYWORDS = {
    "all-linear": re.compile(r""),
    "attention": re.compile(r"attn|attention", re.IGNORECASE),
    "mlp": re.compile(r"mlp|ffn|feed_?forward", re.IGNORECASE),
}


@dataclass(frozen=True, eq=False)
class Target:
    """A weight to adapt: its checkpoint name, and every module that computes with it (several if it is tied)."""

    name: str
    weight: nn.Parameter
    modules: tuple[nn.Linear, ...]


def resolve(model: nn.Module, targets: str | Iterable[str]) -> list[Target]:
    """The linear weights that `targets` means, in the model's order.

    A list matches a module's whole name or its suffix after a dot, as in PEFT; each entry must match. A string is
    "all-linear" (all but the output embedding), "attention", "mlp" (those under a part of that name), or a regular
    expression on the whole module name.

    Raises TargetError if anything matches nothing, is no plain torch.nn.Linear, or shares its weight with another kind
    of layer.
    """
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    if isinstance(targets, str):
        chosen = _by_keyword(model, linears, targets) if targets in KEYWORDS else _by_regex(linears, targets)
    else:
        chosen = _by_names(model, linears, list(targets))
    tensor_names = {id(parameter): name for name, parameter in model.named_parameters()}
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(module)
    resolved: dict[int, Target] = {}
    for name in chosen:
        weight = cast(nn.Parameter, linears[name].weight)
        modules = [module for module in users[id(weight)] if type(module) is nn.Linear]
        others = [module for module in users[id(weight)] if type(module) is not nn.Linear]
        if others:
            raise TargetError(f"'{name}' shares its weight with a {type(others[0]).__name__}; leave it out of the targets")
        if not weight.is_floating_point() or weight.is_meta or not weight.is_contiguous():
            raise TargetError(
                f"'{name}.weight' must be a contiguous floating-point tensor with data, found {weight.dtype} on "
                f"{weight.device}{'' if weight.is_contiguous() else ', not contiguous'}"
            )
        resolved.setdefault(id(weight), Target(tensor_names[id(weight)], weight, tuple(modules)))
    return list(resolved.values())


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


def _means(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _by_keyword(model: nn.Module, linears: dict[str, nn.Linear], keyword: str) -> list[str]:
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    pattern = KEYWORDS[keyword]
    chosen = [n for n, module in linears.items() if module is not output and any(pattern.search(p) for p in n.split("."))]
    if not chosen:
        raise TargetError(f"targets {keyword!r} match no linear layer; {did_you_mean(keyword, _suffixes(linears))}")
    return chosen


def _by_regex(linears: dict[str, nn.Linear], pattern: str) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise TargetError(f"targets {pattern!r} is not a regular expression: {error}") from error
    chosen = [name for name in linears if compiled.fullmatch(name)]
    if not chosen:
        raise TargetError(
            f"targets {pattern!r} is neither a keyword ({', '.join(KEYWORDS)}) nor a regular expression that matches the "
            f"whole name of a linear layer; {did_you_mean(pattern, _suffixes(linears))}"
        )
    return chosen


def _by_names(model: nn.Module, linears: dict[str, nn.Linear], wanted: list[str]) -> list[str]:
    if not wanted:
        raise TargetError(f"targets is empty; {did_you_mean('', _suffixes(linears))}")
    for entry in wanted:
        if not any(_matches(name, entry) for name in linears):
            others = [m for name, m in model.named_modules() if _matches(name, entry)]
            if others:
                raise TargetError(f"target {entry!r} is a {type(others[0]).__name__}; only torch.nn.Linear can be trained")
            raise TargetError(f"target {entry!r} matches no linear layer; {did_you_mean(entry, _suffixes(linears))}")
    return [name for name in linears if any(_matches(name, entry) for entry in wanted)]


def _matches(name: str, entry: str) -> bool:
    return name == entry or name.endswith("." + entry)


def _suffixes(linears: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in linears))
