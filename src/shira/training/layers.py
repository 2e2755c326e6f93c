"""The forward and backward passes of modules while entries of their parameters train.

Every forward pass computes what it did before and names its arguments so; gradients are kept for the trained positions only.
Linear layers, convolutions and embeddings get a backward pass that samples the weight's gradient. At most one layer's whole
gradient exists at a time, where a dense product is faster than sampling. Any other module keeps its own forward. While that
runs, a tensor over the same storage replaces the parameter, and its gradient is sampled as soon as autograd has computed it.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import TuningError
from ..weights.distributed import is_partitioned
from ..weights.model_tensors import is_own, python_modules
from ..weights.owners import claimed_with
from ..weights.targets import Use
from ..weights.undo import Undo
from .convolutions import SparseConv2d, is_plain
from .derivatives import check_no_transform, first_only
from .following import value_name
from .masters import Masters
from .processes import is_of_peft

__all__ = ["SparseConv1D", "SparseLinear", "forget_copies", "install", "is_installed"]

KNOWN = (*(f"torch.nn.modules.{name}" for name in ("linear", "conv", "sparse")), "transformers.pytorch_utils")


class Tap(NamedTuple):
    """A parameter that a module computes with and some of whose entries train."""

    holder: nn.Module
    attribute: str
    masters: Masters


def install(uses: Iterable[tuple[Use, Masters]], undo: Undo) -> None:
    """Let modules compute with masters, until `undo`. The masters become their parameters, so that any trainer finds them."""
    taps: dict[int, tuple[nn.Module, list[Tap]]] = {}
    for use, masters in uses:
        taps.setdefault(id(use.module), (use.module, []))[1].append(Tap(use.holder, use.attribute, masters))
    for module, its_taps in taps.values():
        for holder, attribute, masters in its_taps:
            name = value_name(attribute)
            for ending, parameter in masters.parameters.items():
                undo.callback(_forget, holder, name + ending)
                if is_partitioned(masters.weight):  # ZeRO-3 expects every registered parameter to be partitioned
                    holder.__dict__[name + ending] = parameter
                else:
                    holder.register_parameter(name + ending, parameter)
        usual = _usual_forward(module)
        if usual is None:
            module.__dict__.pop("forward", None)
        forward = _forward_of(module, its_taps)
        undo.callback(_reset_forward, module, forward, usual)
        module.forward = forward


def _forget(holder: nn.Module, name: str) -> None:
    holder.__dict__.pop(name, None)
    holder._parameters.pop(name, None)


def forget_copies(model: nn.Module) -> None:
    """Remove a tuner's parameters, buffers and forwards from a model. Copies of modules in training bring them into it."""
    for module in python_modules(model):
        for registered in (module._parameters, module._buffers):
            for name in [name for name in registered if is_own(name)]:
                registered.pop(name)
                module._non_persistent_buffers_set.discard(name)
        forward, usual = module.__dict__.get("forward"), _usual_forward(module)
        if forward is not None and usual is not forward:
            _reset_forward(module, forward, usual)


def _usual_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The forward that other code has set on a module; None if the class's own forward is the usual one.

    Forwards of earlier tuners are skipped: another library may have set one again after its tuner was detached.
    """
    forward = module.__dict__.get("forward")
    while isinstance(forward, functools.partial) and forward.func in (
        _linear,
        _conv1d,
        _conv2d,
        _embedding,
        _tapped,
        _with_added,
    ):
        forward = forward.args[0] if forward.func in (_tapped, _with_added) else None
    return None if getattr(forward, "__func__", None) is type(module).forward else forward


def is_installed(module: nn.Module, forward: Any) -> bool:
    """Whether a module's forward is the tuner's or calls it, as far as that can be seen."""
    current = module.__dict__.get("forward")
    return current is forward or module.__dict__.get("_old_forward") is forward  # Accelerate's name for a wrapped forward


def _reset_forward(module: nn.Module, forward: Callable[..., Any], usual: Callable[..., Any] | None) -> None:
    """Give a module its usual forward again, unless other code has wrapped the tuner's forward in the meantime.

    Then the wrapper stays, and the tuner's forward does what the usual one does.
    """
    if module.__dict__.get("forward") is not forward:
        return
    if usual is not None:
        module.forward = usual
    else:
        del module.forward


def _forward_of(module: nn.Module, taps: list[Tap]) -> Callable[..., Any]:
    forward: Callable[..., Any] = module.forward
    own = OWN_BACKWARD.get(_kind(module))
    rest = []
    for tap in taps:
        if not tap.masters.in_place:
            continue
        if own is not None and tap.attribute == "weight":
            forward = functools.partial(own, module, tap.masters)
        else:
            rest.append(tap)
    forward = functools.partial(_tapped, forward, rest) if rest else forward
    for tap in taps:
        if tap.masters.added is not None:
            forward = functools.partial(_with_added, forward, tap.masters, tap.masters.added, tap.holder)
    return forward


def _with_added(
    forward: Callable[..., Any],
    masters: Masters,
    added: Callable[[Tensor], Tensor],
    module: nn.Module,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The output of the module's own forward, plus what the masters add to it. The input is the first argument."""
    _ready(masters, module)
    output = forward(*args, **kwargs)
    if masters.ignored or masters.detached:  # the model must be its base
        return output
    input = args[0] if args else next(iter(kwargs.values()))
    return output + added(input).to(output.dtype)  # the two dtypes differ under autocast


def _kind(module: nn.Module) -> str:
    """The name of the module's class if its forward is known, else "".

    Not known are subclasses, whose forward may do anything; modules on which other code has set a forward, which must be
    called; embeddings with scale_grad_by_freq, which scale their gradients; and convolutions in groups or with other padding.
    """
    unlike = isinstance(module, nn.Embedding) and module.scale_grad_by_freq
    unlike = unlike or (isinstance(module, nn.Conv2d) and not is_plain(module))
    return type(module).__name__ if type(module).__module__ in KNOWN and "forward" not in module.__dict__ and not unlike else ""


def _ready(masters: Masters, module: nn.Module) -> bool:
    """Write the masters to the weight; return whether its entries need a gradient from this forward pass.

    Raises TuningError if the base is no longer known (`Masters.look`), if the masters were frozen, or inside torch.func.
    """
    if masters.ignored or masters.detached:
        return False
    if not torch.compiler.is_compiling():  # compiled code only reads the weight; optimizer steps write to it
        masters.calls += 1
        for each in (masters, *masters.sharing):  # a later write would count as one to this weight, too
            if each.piece is None:
                each.write()
    if not torch.is_grad_enabled():
        return False
    if module.training and not any(parameter.requires_grad for parameter in masters.parameters.values()):
        raise TuningError(
            "the trained values were frozen (requires_grad=False) after attach(), so nothing would train; freeze what you "
            "want frozen before it, or call requires_grad_(True) on tuner.parameters()"
            + ("" if torch.compiler.is_compiling() else _if_by_peft(module))
        )
    if not torch.compiler.is_compiling():
        check_no_transform()
        masters.calls_with_gradients += 1
    return True


def _if_by_peft(module: nn.Module) -> str:
    """What to add to an error about frozen values if the model of a module has layers of PEFT."""
    model = claimed_with(module)
    if model is None or not any(map(is_of_peft, model.modules())):
        return ""
    return "; this model has layers of PEFT, which freezes all else: leave out peft_config= or get_peft_model()"


def _tapped(forward: Callable[..., Any], taps: list[Tap], *args: Any, **kwargs: Any) -> Any:
    """The module's own forward. Tensors whose gradients are sampled replace the parameters."""
    ready = [tap for tap in taps if _ready(tap.masters, tap.holder)]
    with _in_place_of_parameters(ready):
        return forward(*args, **kwargs)


@contextlib.contextmanager
def _in_place_of_parameters(taps: list[Tap]) -> Iterator[None]:
    try:
        for holder, attribute, masters in taps:  # Python finds an instance attribute before a registered parameter
            weight = holder._parameters[attribute]
            holder.__dict__[attribute] = _Sampled.apply(weight, masters.current(), masters)  # type: ignore[no-untyped-call]
        yield
    finally:
        for holder, attribute, _ in taps:
            holder.__dict__.pop(attribute, None)


class _Sampled(torch.autograd.Function):
    """The unchanged parameter. Its gradient goes to the masters."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, masters: Masters) -> Tensor:
        ctx.masters = masters
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.masters.sample(gradient), None


def _linear(module: nn.Linear, masters: Masters, input: Tensor) -> Tensor:
    if not _ready(masters, module):
        return nn.functional.linear(input, module.weight, module.bias)
    output: Tensor = SparseLinear.apply(input, module.weight, module.bias, masters.current(), masters)  # type: ignore[no-untyped-call]
    return output


class SparseLinear(torch.autograd.Function):
    """A linear layer whose weight has a gradient at the trained positions only (Appendix E)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, masters: Masters) -> Tensor:
        ctx.save_for_backward(masters.keep(input) if ctx.needs_input_grad[3] else None, weight)
        ctx.masters, ctx.input_dtype = masters, input.dtype
        return _unviewed(nn.functional.linear(input, weight, bias))

    @staticmethod
    @first_only
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight = ctx.saved_tensors
        grad_input = grad_bias = grad_values = None
        if ctx.needs_input_grad[0]:  # under autocast grad_output has another dtype than input and weight
            grad_input = (grad_output @ weight.to(grad_output.dtype)).to(ctx.input_dtype)
        flat = grad_output.reshape(-1, grad_output.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias = flat.sum(0)
        if ctx.needs_input_grad[3]:
            grad_values = ctx.masters.gradient(flat, kept.reshape(-1, kept.shape[-1]).to(grad_output.dtype))
        return grad_input, None, grad_bias, grad_values, None


def _unviewed(output: Tensor) -> Tensor:
    """The same memory, but not as a view: later code may change it in place, as it may the output of torch's layers."""
    if torch.compiler.is_compiling() or not output._is_view():
        return output
    plain: Tensor = torch.ops.aten._unsafe_view(output, output.shape)
    return plain


def _conv1d(module: Any, masters: Masters, x: Tensor) -> Tensor:
    if not _ready(masters, module):
        return _product(x, module.weight, module.bias)
    output: Tensor = SparseConv1D.apply(x, module.weight, module.bias, masters.current(), masters)  # type: ignore[no-untyped-call]
    return output


def _product(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """input · weight + bias with a weight [in, out]. The same operators as in Transformers' Conv1D give the same bits."""
    return torch.addmm(bias, input.reshape(-1, input.shape[-1]), weight).view(*input.shape[:-1], weight.shape[1])


class SparseConv1D(torch.autograd.Function):
    """A linear layer with a weight [in, out], as in GPT-2. The weight's gradient is inputᵀ · grad_output."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, values: Tensor, masters: Masters) -> Tensor:
        ctx.save_for_backward(input if ctx.needs_input_grad[3] else None, weight)
        ctx.masters, ctx.input_dtype = masters, input.dtype
        return _unviewed(_product(input, weight, bias))

    @staticmethod
    @first_only
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        grad_input = grad_bias = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_input = (grad_output @ weight.to(grad_output.dtype).T).to(ctx.input_dtype)
        flat = grad_output.reshape(-1, grad_output.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias = flat.sum(0)
        if ctx.needs_input_grad[3]:
            inputs = input.reshape(-1, input.shape[-1]).to(grad_output.dtype)
            grad_values = ctx.masters.gradient(inputs, ctx.masters.keep(flat))
        return grad_input, None, grad_bias, grad_values, None


def _conv2d(module: nn.Conv2d, masters: Masters, input: Tensor) -> Tensor:
    if input.dim() == 3:  # one image
        return _conv2d(module, masters, input[None])[0]
    if not _ready(masters, module):
        usual: Tensor = module._conv_forward(input, module.weight, module.bias)
        return usual
    output: Tensor = SparseConv2d.apply(input, module.weight, module.bias, masters.current(), masters, module)  # type: ignore[no-untyped-call]
    return output


def _embedding(module: nn.Embedding, masters: Masters, input: Tensor) -> Tensor:
    if not _ready(masters, module):
        return nn.functional.embedding(input, module.weight, module.padding_idx)
    output: Tensor = _Embedding.apply(input, module.weight, masters.current(), masters, module.padding_idx)  # type: ignore[no-untyped-call]
    return output


class _Embedding(torch.autograd.Function):
    """An embedding some of whose entries train. Only the batch's rows have gradients, and only these are computed."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, values: Tensor, masters: Masters, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.masters, ctx.padding = masters, padding
        return _unviewed(nn.functional.embedding(ids, weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        flat = grad_output.reshape(-1, grad_output.shape[-1]).float()
        if ctx.padding is not None:
            flat = flat * (ids.reshape(-1, 1) != ctx.padding)
        return None, None, ctx.masters.gradient_of_rows(ids.reshape(-1), flat), None, None


OWN_BACKWARD: dict[str, Callable[..., Tensor]] = {
    "Linear": _linear,
    "Conv1D": _conv1d,
    "Conv2d": _conv2d,
    "Embedding": _embedding,
}
