"""Where the tensors of a checkpoint are in a running model, which packs them (qkv_proj) and cuts them for several processes.

The model's own `load_weights` is run on tensors without data, and each copy into a parameter is written down instead of done.
So nothing here knows names of layers. What was found is then compared with the checkpoint at some rows, since an engine may
rearrange weights after loading them.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...errors import BaseMismatch, CheckpointError
from ...files.tensorfiles import Form
from ...sparse.tensor import SparseTensor, dtype_name
from ..cpu_linear import linear

__all__ = ["Block", "Mapped", "Surface", "check", "cut", "landings", "local_positions", "verified"]

MOST_FAILURES = 16  # tensors whose loading may raise, before the whole model is refused
ROWS = 8  # of each tensor that are compared with the checkpoint
# Their values are there, but the model computes with a copy that is made once, so a change of them has no effect.
COPIED = ("kv_b_proj.weight",)


class Block(NamedTuple):
    """A block of a checkpoint's tensor. start, shape: its coordinates there. offset: of its first entry in the landing."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int


class Landing(NamedTuple):
    """Where this process's part of a checkpoint's tensor lies in a parameter: without gaps, in C order.

    parameter: its name. whole: the shape of the checkpoint's tensor. shape: of the part. offset: of the part's first entry in
    the parameter. blocks: of the checkpoint's tensor, in this order; more than one if the checkpoint itself is packed.
    """

    parameter: str
    whole: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int
    blocks: tuple[Block, ...]

    @property
    def is_whole(self) -> bool:
        return self.shape == self.whole


class Mapped(NamedTuple):
    """landings: by the checkpoint's name. refused: name -> why an adapter cannot change this tensor.

    tied: a further name of a tensor -> its name in the checkpoint, which has it once. Both are in `landings`.
    """

    landings: dict[str, Landing]
    refused: dict[str, str]
    tied: dict[str, str]


class _Copy(NamedTuple):
    """One copy of a block of a checkpoint's tensor into a parameter: where it begins in each, in entries, and the strides."""

    parameter: str
    to: int
    to_stride: tuple[int, ...]
    source: int
    source_stride: tuple[int, ...]
    shape: tuple[int, ...]


class _Recorder(TorchFunctionMode):
    """Writes down each `copy_` of a tensor without data into a parameter, in place of doing it."""

    def __init__(self, parameters: Mapping[int, tuple[str, Tensor]]) -> None:
        super().__init__()
        self._parameters = parameters
        self._names: dict[int, str] = {}
        self._held: list[Tensor] = []  # so that no other tensor gets the number of their memory
        self.now = ""
        self.copies: dict[str, list[_Copy]] = {}
        self.refused: dict[str, str] = {}

    def source(self, name: str, form: Form) -> Tensor:
        """A tensor without data that stands for the checkpoint's."""
        tensor = torch.empty(form.shape, dtype=form.dtype, device="meta")
        self._held.append(tensor)
        self._names[tensor.untyped_storage()._cdata] = self.now = name
        return tensor

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.Tensor.copy_ or not args[1].is_meta:
            return function(*args, **(kwargs or {}))
        to, source = args[0], args[1]
        name = self._names.get(source.untyped_storage()._cdata)
        found = self._parameters.get(to.untyped_storage().data_ptr()) if not to.is_meta else None
        if name is None or found is None:
            what = "is computed from the checkpoint's tensor" if name is None else "is copied to a place that is no parameter"
            self.refused[name or self.now] = what
        elif to.shape != source.shape:
            self.refused[name] = f"has shape {list(source.shape)} where it is loaded to {list(to.shape)}"
        else:
            label, parameter = found
            begin = int(to.storage_offset()) - int(parameter.storage_offset())
            made = _Copy(label, begin, to.stride(), int(source.storage_offset()), source.stride(), tuple(to.shape))
            self.copies.setdefault(name, []).append(made)
        return to


def landings(model: nn.Module, forms: Mapping[str, Form], load: Callable[[Iterable[tuple[str, Tensor]]], Any]) -> Mapped:
    """Where the checkpoint's tensors lie in a model. Nothing in the model is changed.

    forms: name -> shape and dtype of each tensor of the checkpoint. load: the model's `load_weights`.
    Raises CheckpointError if the model cannot be loaded from these.
    """
    named = dict(model.named_parameters())
    parameters = {each.untyped_storage().data_ptr(): (name, each) for name, each in named.items() if each.numel()}
    recorder = _Recorder(parameters)
    failed: dict[str, str] = {}

    def feed() -> Iterator[tuple[str, Tensor]]:
        for name, form in forms.items():
            if name not in failed:
                yield name, recorder.source(name, form)

    while True:
        recorder.copies.clear()
        try:
            with recorder:
                load(feed())
            break
        except Exception as error:  # any model's own code
            failed[recorder.now] = f"cannot be loaded again ({type(error).__name__}: {error})"
            if len(failed) > MOST_FAILURES:
                raise CheckpointError(
                    f"this model's weights cannot be mapped: '{recorder.now}' {failed[recorder.now]}"
                ) from error
    copied = {id(module._parameters.get("weight")) for module in model.modules() if _computes_with_a_copy(module)}
    empty = sorted(name for name, each in named.items() if not each.numel())
    packed = f" ('{empty[0]}' of the model has no data, so the engine has packed it)" if empty else ""
    found: dict[str, Landing] = {}
    refused: dict[str, str] = {}
    for name, form in forms.items():
        landed = _landing(form.shape, recorder.copies.get(name, []))
        why = failed.get(name) or recorder.refused.get(name)
        if why is None and isinstance(landed, Landing):
            why = _unusable(landed.parameter, named[landed.parameter], copied)
        if why is None and isinstance(landed, Landing):
            found[name] = landed
        else:
            refused[name] = why or f"{landed}{packed}"
    tied = _tied(model, found)
    return Mapped(found | {name: found[other] for name, other in tied.items()}, refused, tied)


def _computes_with_a_copy(module: nn.Module) -> bool:
    """Whether vLLM has packed a copy of a layer's weight, on CPUs. The weight itself may still be there."""
    product = getattr(module, "cpu_linear", None)
    return product not in (None, linear, nn.functional.linear)


def _unusable(label: str, parameter: Tensor, copied: set[int]) -> str | None:
    """Why an adapter cannot change a parameter of the running model; None if it can."""
    if id(parameter) in copied:
        return f"was packed into a copy with which the engine computes ('{label}'): name 'shira' in VLLM_PLUGINS"
    if not parameter.is_floating_point() or parameter.itemsize < 2:
        return f"is quantized: '{label}' is {dtype_name(parameter.dtype)}"
    if label.endswith(COPIED):
        return f"is copied into another form when the model is loaded ('{label}' of latent attention)"
    if ".experts." in label or label.rpartition(".")[2].startswith(("w13_", "w2_")):
        return f"is one of a mixture of experts, whose weights are rearranged ('{label}')"
    return None


def _tied(model: nn.Module, found: Mapping[str, Landing]) -> dict[str, str]:
    """The output layer's own name, if it is the same memory as a tensor that has landed -> the name of that tensor."""
    every = dict(model.named_parameters(remove_duplicate=False))
    first = {id(each): name for name, each in reversed(every.items())}
    landed = {landing.parameter: name for name, landing in found.items()}
    output = [name for name in every if name.endswith("lm_head.weight") and name not in found]
    return {name: landed[first[id(every[name])]] for name in output if first[id(every[name])] in landed}


def _landing(whole: tuple[int, ...], copies: list[_Copy]) -> Landing | str:
    """A landing, or why there is none. whole: the shape of the checkpoint's tensor."""
    if not copies:
        return "is not loaded into this model"
    strides = _strides(whole)
    copies = sorted(copies, key=lambda copy: copy.source)
    if len({copy.parameter for copy in copies}) > 1 or len(copies) != len({copy.source for copy in copies}):
        return "is loaded into two places"
    begin, shape, offset = min(copy.to for copy in copies), copies[0].shape, 0
    for copy in copies:
        if copy.source_stride != strides or len(copy.shape) != len(whole):
            return "is loaded in another order (transposed or reshaped)"
        if copy.to_stride != _strides(copy.shape) or copy.to != begin + offset or copy.shape[1:] != shape[1:]:
            return "is loaded into places with gaps between them"
        offset += math.prod(copy.shape)
    blocks, offset = [], 0
    for copy in copies:
        blocks.append(Block(_coordinates(copy.source, strides), copy.shape, offset))
        offset += math.prod(copy.shape)
    for one, other in itertools.pairwise(blocks):
        if other.start[0] < one.start[0] + one.shape[0] or other.start[1:] != one.start[1:]:
            return "is loaded in pieces that are not rows"
    rows = sum(copy.shape[0] for copy in copies) if whole else 0
    return Landing(copies[0].parameter, whole, (rows, *shape[1:]) if whole else (), begin, tuple(blocks))


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))


def _coordinates(offset: int, strides: tuple[int, ...]) -> tuple[int, ...]:
    place = []
    for stride in strides:
        place.append(offset // stride)
        offset %= stride
    return tuple(place)


class Surface(nn.Module):
    """A model's weights under the checkpoint's names, as views of its parameters: what a `Switcher` is for.

    Storages and addresses stay what they are, so compiled code sees each change.
    """

    def __init__(self, model: nn.Module, mapped: Mapped) -> None:
        super().__init__()
        parameters = dict(model.named_parameters())
        for name, landing in mapped.landings.items():
            weight = parameters[landing.parameter].detach()
            view = weight.as_strided(landing.shape, _strides(landing.shape), int(weight.storage_offset()) + landing.offset)
            self._parameters[name] = nn.Parameter(view, requires_grad=False)  # a name with dots is fine here


def verified(surface: Surface, mapped: Mapped, rows: Callable[[str, int], Tensor]) -> Mapped:
    """The same without tensors whose values in the model are not the checkpoint's at some rows.

    rows: (name, number) -> a row of the checkpoint's tensor.
    """
    names = mapped.landings.keys() - mapped.tied.keys()
    refused = {name: why for name in sorted(names) if (why := _differs(surface, mapped.landings[name], name, rows))}
    refused |= {name: refused[other] for name, other in mapped.tied.items() if other in refused}
    landings = {name: each for name, each in mapped.landings.items() if name not in refused}
    return Mapped(landings, mapped.refused | refused, {name: other for name, other in mapped.tied.items() if name in landings})


def _differs(surface: Surface, landing: Landing, name: str, rows: Callable[[str, int], Tensor]) -> str:
    weight = surface._parameters[name]
    assert weight is not None
    flat = weight.detach().view(-1)
    for block in landing.blocks:
        count, width = block.shape[0], math.prod(block.shape[1:])
        for number in sorted({round(place * (count - 1) / (ROWS - 1)) for place in range(ROWS)}) if count else ():
            inside = tuple(slice(begin, begin + size) for begin, size in zip(block.start[1:], block.shape[1:], strict=True))
            expected = rows(name, block.start[0] + number)[inside].to(weight.dtype).reshape(-1)
            begin = block.offset + number * width
            if not torch.equal(flat[begin : begin + width].cpu(), expected):
                return "has other values in this model than in the checkpoint: the engine has rearranged or changed them"
    return ""


def local_positions(landing: Landing, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the sorted flat positions [k] of a checkpoint's tensor this process has, and where.

    Returns their numbers [n] among the k, and their flat positions [n] in the landing, sorted. Both int64.
    """
    if landing.is_whole:
        return torch.arange(indices.numel(), device=indices.device), indices.long()
    coordinates = torch.unravel_index(indices.long(), landing.whole)
    numbers, places = [], []
    for block in landing.blocks:
        local = [axis - start for axis, start in zip(coordinates, block.start, strict=True)]
        inside = torch.ones_like(indices, dtype=torch.bool)
        for axis, size in zip(local, block.shape, strict=True):
            inside &= (axis >= 0) & (axis < size)
        numbers.append(inside.nonzero().view(-1))
        flat = torch.zeros_like(indices, dtype=torch.int64)
        for axis, stride in zip(local, _strides(block.shape), strict=True):
            flat += axis * stride
        places.append(flat[numbers[-1]] + block.offset)
    return torch.cat(numbers), torch.cat(places)


def cut(name: str, tensor: SparseTensor, mapped: Mapped) -> tuple[SparseTensor, Tensor]:
    """This process's part of an adapter's tensor, bit for bit; and the numbers [n] of its positions among those of the whole.

    The tensor has passed `check`.
    """
    landing = mapped.landings[name]
    numbers, places = local_positions(landing, tensor.indices)
    return SparseTensor(landing.shape, places, tensor.values[numbers], tensor.kind), numbers


def check(label: str, name: str, shape: tuple[int, ...], mapped: Mapped) -> None:
    """Raise BaseMismatch if a tensor is not in this model, in another shape, or cannot be changed in it."""
    if name in mapped.refused:
        raise BaseMismatch(f"{label} cannot be used here: '{name}' {mapped.refused[name]}")
    if name not in mapped.landings:
        raise BaseMismatch(f"{label} does not belong to this model: its checkpoint has no tensor '{name}'")
    if mapped.landings[name].whole != tuple(shape):
        raise BaseMismatch(
            f"{label} does not belong to this model: '{name}' has shape {list(mapped.landings[name].whole)}, the adapter "
            f"expects {list(shape)}"
        )
