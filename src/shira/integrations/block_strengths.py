"""Strengths by component and block of a pipeline, as Diffusers' users write them, as patterns of tensor names."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import AdapterError, SwitchError, did_you_mean
from ..fusion.strengths import Strength, check_strengths, finite_number, number_of
from ..texts import described, shown
from ..weights.model_tensors import unwrapped

__all__ = ["UNET_BLOCKS", "by_block", "copied", "paired"]

UNET_BLOCKS = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}  # short name -> Diffusers' own
NUMBERED = ("attentions", "resnets")  # the layers of a block that a list of strengths counts


def by_block(name: str, given: Any, components: Mapping[str, nn.Module], tensors: Sequence[str]) -> Strength:
    """A strength as `Switcher.use` takes it: a number, or patterns of tensor names, of which the last that matches counts.

    name: of the adapter. given: a number; or component -> number or, as deep as the modules go, name of a module -> number,
    or a list of numbers for the layers of a block. "*" is for all that is not named, 1.0 by default.
    tensors: the names of the adapter's tensors. Parts in which it changes nothing are left out.
    Raises AdapterError for a part that is not there, for two names of one part, and for a strength that is not a finite number.
    """
    label = f"the strength of {shown(name)}"
    if not isinstance(given, Mapping):
        return finite_number(label, given)
    found: dict[str, Any] = {"*": given.get("*", 1.0)}
    for component, below in given.items():
        if component == "*":
            continue
        if component not in components:
            raise AdapterError(
                f"{label}: the pipeline has no component {shown(component)}; {did_you_mean(str(component), components)}"
            )
        if not any(tensor.startswith(f"{component}.") for tensor in tensors):
            changed = sorted({repr(tensor.partition(".")[0]) for tensor in tensors})
            raise AdapterError(f"{label}: the adapter changes nothing in {component!r}, only in {', '.join(changed)}")
        found |= _spread(label, component, components[component], below)
    checked: Any = check_strengths({name: found})[name]
    patterns = sorted(checked, key=lambda item: item[0].count("."))  # so the deepest counts
    return {pattern: value for pattern, value in patterns if any(tensor.startswith(pattern[:-1]) for tensor in tensors)}


def _spread(label: str, path: str, module: nn.Module, given: Any) -> dict[str, Any]:
    """Pattern -> number, for a part of a pipeline and the modules in it."""
    module = unwrapped(module)
    if isinstance(given, Mapping):
        found: dict[str, Any] = {}
        said: dict[str, Any] = {}  # pattern -> the name that it comes from
        for word, below in given.items():
            inner, part = (path, module) if word == "*" else _part(label, path, module, word)
            if word == "*" and isinstance(below, Mapping | list | tuple):
                raise AdapterError(f"{label}: '*' in {path!r} must be a number, found {described(below)}")
            more = _spread(label, inner, part, below)
            if (twice := next((pattern for pattern in more if pattern in said), None)) is not None:
                raise AdapterError(
                    f"{label}: {shown(said[twice])} and {shown(word)} in {path!r} both set {twice!r}; give one of them"
                )
            found |= more
            said |= dict.fromkeys(more, word)
        return found
    if not isinstance(given, list | tuple):
        return {f"{path}.*": given}
    if len(given) == 1:
        return _spread(label, path, module, given[0])
    if path.endswith((".down_blocks", ".up_blocks")):  # as in Diffusers, the list is for each block
        return {
            pattern: value
            for number, block in module.named_children()
            for pattern, value in _spread(label, f"{path}.{number}", block, given).items()
        }
    layers = list(_numbered(path, module))
    count = max((int(inner.rpartition(".")[2]) + 1 for inner, _ in layers), default=0)
    if len(given) != count:
        raise AdapterError(f"{label}: {path!r} has {count} numbered layers, found a list of {len(given)}: {shown(given)}")
    return {
        pattern: value
        for inner, part in layers
        for pattern, value in _spread(label, inner, part, given[int(inner.rpartition(".")[2])]).items()
    }


def _numbered(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts that a list of strengths counts: of a list of modules its own, of a block its attentions and resnets."""
    holders: list[tuple[str, nn.Module]] = [(path, module)] if isinstance(module, nn.ModuleList | nn.Sequential) else []
    holders = holders or [(f"{path}.{name}", part) for name, part in module.named_children() if name in NUMBERED]
    for holder, part in holders:
        for number, layer in part.named_children():
            yield f"{holder}.{number}", layer


def _part(label: str, path: str, module: nn.Module, words: Any) -> tuple[str, nn.Module]:
    """The module of this name in a part of a pipeline, "up.block_0" or "up_blocks.0", and its path."""
    for word in str(words).split("."):
        children: dict[str, nn.Module] = {name: unwrapped(child) for name, child in module.named_children()}
        name = next((each for each in (word, UNET_BLOCKS.get(word), word.removeprefix("block_")) if each in children), None)
        if name is None:
            short = {value: key for key, value in UNET_BLOCKS.items()}
            known = [short.get(each, f"block_{each}" if each.isdigit() else each) for each in children]
            raise AdapterError(f"{label}: {path!r} has no part {shown(word)}; {did_you_mean(word, known)}")
        path, module = f"{path}.{name}", children[name]
    return path, module


def copied(given: Any) -> Any:
    """A strength in mappings, lists and numbers of its own, so that it stays what it was when it was given.

    What is no number stays as it is, for `by_block` to refuse.
    """
    if isinstance(given, Mapping):
        return {name: copied(below) for name, below in given.items()}
    if isinstance(given, list | tuple):
        return [copied(below) for below in given]
    return number_of(given)  # that of an array or a tensor may be another one later


def paired(names: Any, strengths: Any) -> dict[str, Any]:
    """Name -> strength as given to `PipelineAdapters.set`: names, and one strength for all or a list of as many."""
    if isinstance(names, Mapping) and strengths is None:
        return dict(names)
    several = [names] if isinstance(names, str) else names
    if not isinstance(several, list | tuple) or not all(isinstance(name, str) for name in several):
        raise SwitchError(
            f'expected a name, set("bluefire"), several, set(["bluefire", "paintings"], [1.0, 0.5]); found {shown(names)}'
        )
    if isinstance(strengths, list | tuple):
        if len(strengths) != len(several):
            raise AdapterError(
                f"expected a strength for each of {len(several)} adapters, found {len(strengths)}: {shown(strengths)}"
            )
    else:
        strengths = [1.0 if strengths is None else strengths] * len(several)
    if len(set(several)) < len(several):
        raise SwitchError(f"one adapter is named twice: {shown(several)}")
    return dict(zip(several, strengths, strict=True))
