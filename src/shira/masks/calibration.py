"""Calibration: gradients, squared gradients and activations of a model on data, handed out one tensor at a time.

Sums over several batches are float32, whatever the model's dtype. In bfloat16 a sum stops growing once a gradient is less
than 1/512 of the sum.

The sums of all targets together would take as much memory as a model. So the targets are divided into groups, and the batches
run again for each group. The sums of a group may take the memory that a training step takes and calibration does not: the
optimizer's state, and the inputs of all linear layers outside of the group. (Autograd keeps a layer's input for the backward
pass only if the layer's weight trains.) With one batch nothing is summed, and one pass is enough.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, MaskError, TuningError
from ..weights.buffers import Buffers, same_form
from ..weights.distributed import full, is_sharded
from ..weights.quantized import shape_of
from ..weights.random_numbers import same_random_numbers
from ..weights.targets import is_conv1d
from ..weights.undo import Undo, hooks_of, set_hook

__all__ = ["LossFn", "Progress", "calibrate", "check_arguments", "linear_layers", "nan_advice"]

LossFn = Callable[[nn.Module, Any], Tensor]
Progress = Callable[[int, int], None]  # (batches done, batches in all)
Receive = Callable[[str, dict[str, Tensor]], None]


def check_arguments(batches: Any, loss_fn: Any = None, progress: Any = None, *, option: str = "calibration") -> None:
    """Raise TuningError, with an example of what is expected, for arguments of a wrong type. option: the name of `batches`."""
    single = isinstance(batches, nn.Module | Mapping | str | bytes | Tensor)
    if batches is not None and (single or not isinstance(batches, Iterable)):
        raise TuningError(f"{option} must be batches, {option}=[batch, batch], found {type(batches).__name__}")
    for name, function in (("loss_fn", loss_fn), ("progress", progress)):
        if function is not None and (not callable(function) or isinstance(function, nn.Module)):
            raise TuningError(f"{name} must be a function, found {type(function).__name__}")


def nan_advice(device: torch.device) -> str:
    """The end of a message about what is NaN though it need not be. Empty where cuDNN's attention does not compute."""
    if device.type != "cuda" or not torch.backends.cuda.cudnn_sdp_enabled():
        return ""
    return ". cuDNN's attention fails on some GPUs: before, call torch.backends.cuda.enable_cudnn_sdp(False) (docs/gpu.md)"


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a Transformers-style model: `model(**batch).loss`. The batch's tensors are moved to the model's device.

    Raises DataError if the batch is not a mapping or the model returns no loss.
    """
    loss = getattr(_output(model, batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise DataError("the model returned no loss; put 'labels' into the batch, or pass loss_fn=")
    return loss


def calibrate(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    receive: Receive,
    *,
    statistics: Sequence[str] = ("gradient",),
    loss_fn: LossFn | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
    undo: Undo | None = None,
) -> dict[str, Any]:
    """Call `receive(tensor name, {statistic: Tensor})` once for each weight. What `receive` does not keep is freed.

    statistics, any of
        "gradient": the gradient of the loss summed over the batches, float32, the weight's shape;
        "squared_gradient": the square of each batch's gradient, mean over the batches, float32, the weight's shape;
        "activations": for each input feature of the linear layers that compute with the weight, the 2-norm over all tokens,
            float32 [in], or [in, 1] where the weight is [in, out] (Transformers' Conv1D). Tokens that a batch's
            "attention_mask" hides do not count;
        "products": of the same tokens x the mean of x xᵀ, float32 [in, in]. It takes the place of "activations".
    batches: read once into a list, and run once for each group of weights.
    loss_fn(model, batch): by default `model(**batch).loss`. Activations and products need no loss.
    memory: bytes that training takes for parameters and optimizer. The sums of a group may take these bytes, and the bytes of
        the inputs that training keeps of the first batch for other weights. A group holds at least one weight. None: all
        weights are one group.
    progress(done, total): called after each batch.
    undo: where the steps that restore the model are recorded, if the caller can take them after an interrupt.

    Returns what was done, for an adapter's metadata. The model stays in its mode (train or eval), and dropout is the same in
    every pass. Afterwards gradients, buffers, `requires_grad` flags and torch's random numbers are as before.
    Raises MaskError if there is no batch, a loss is not finite, or a weight gets no gradient or no input; DataError for a batch
    that the model cannot take or that gives no loss.
    """
    batches = list(batches)
    if not batches:
        raise MaskError("calibration holds no batch")
    of_gradients = [name for name in statistics if name not in ("activations", "products")]
    of_inputs = next((name for name in statistics if name not in of_gradients), None)
    done = 0

    def batch_done() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, passes * len(batches))

    with (undo or Undo()).inner() as steps:
        _freeze(model, steps)
        steps.callback(Buffers(model).restore)
        sums = {name: 4 * len(of_gradients) * math.prod(shape_of(weight)) for name, weight in weights.items()}
        groups = [list(sums)] if of_gradients else []
        if of_gradients and len(batches) > 1 and memory is not None and sum(sums.values()) > memory:
            groups = _groups(sums, memory, _inputs_kept(model, weights, batches[0], loss_fn or _model_loss, steps))
        passes = len(groups) + (of_inputs is not None)
        seen = _inputs(model, weights, batches, loss_fn, batch_done, steps, of_inputs == "products") if of_inputs else {}
        for group in groups:
            _gradients(
                model,
                {name: weights[name] for name in group},
                batches,
                lambda name, found: receive(name, found | ({of_inputs: seen[name]} if of_inputs else {})),
                of_gradients,
                loss_fn or _model_loss,
                batch_done,
                steps,
            )
    if not of_gradients and of_inputs:
        for name in weights:
            receive(name, {of_inputs: seen.pop(name)})
    return {"statistics": list(statistics), "batches": len(batches)} | _size(batches)


def _gradients(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Sequence[Any],
    receive: Receive,
    statistics: Sequence[str],
    loss_fn: LossFn,
    batch_done: Callable[[], None],
    steps: Undo,
) -> None:
    """Hand out the gradients of these weights.

    With one batch, each gradient is handed out as soon as the backward pass has it. With several, all are handed out at the
    end: ranking takes memory, too, and by then the backward pass has freed its own.
    """
    sums: dict[str, dict[str, Tensor]] = {}
    waiting = set(weights)

    def hand_out(name: str) -> None:
        if name not in waiting:
            raise MaskError(
                f"tensor '{name}' got two gradients from one batch: loss_fn called backward(), or layers that share the tensor "
                "are checkpointed with use_reentrant=True; return the loss alone, or use_reentrant=False"
            )
        waiting.remove(name)
        found = sums.pop(name)
        if any(bool(total.max().isnan()) for total in found.values()):
            advice = nan_advice(weights[name].device)
            raise MaskError(f"tensor '{name}': its gradient is NaN; check the model and the calibration data{advice}")
        if "squared_gradient" in found:
            found["squared_gradient"] /= len(batches)
        receive(name, found)

    def take(weight: Tensor, name: str) -> None:
        gradient, weight.grad = weight.grad, None
        if gradient is not None:
            gradient = gradient.to_dense() if gradient.is_sparse else full(gradient)
            _add(sums.setdefault(name, {}), gradient, statistics)
            if len(batches) == 1:
                hand_out(name)

    # the state of the random numbers is restored, so that dropout is the same for every group
    with same_random_numbers(weights.values()), steps.inner() as undo:
        for name, weight in weights.items():
            undo.callback(weight.requires_grad_, False)
            weight.requires_grad_(True)
            kept = hooks_of(weight, "_post_accumulate_grad_hooks")
            set_hook(undo, kept, weight.register_post_accumulate_grad_hook, partial(take, name=name))
        for number, batch in enumerate(batches, start=1):
            with torch.enable_grad():
                loss = loss_fn(model, batch)
                if not isinstance(loss, Tensor) or loss.numel() != 1 or not bool(torch.isfinite(loss)):
                    found = f"{loss!r:.60}, which is no tensor"
                    if isinstance(loss, Tensor):
                        found = str(loss.item()) if loss.numel() == 1 else f"a tensor of shape {list(loss.shape)}"
                    raise MaskError(f"the loss of calibration batch {number} must be one finite number, found {found}")
                if loss.requires_grad:  # otherwise the batch reaches none of these weights
                    loss.backward()
            del loss
            batch_done()
    for name in list(sums):
        hand_out(name)
    if waiting:
        raise MaskError(f"{len(waiting)} tensors got no gradient from the calibration batches, the first is '{min(waiting)}'")


def _add(sums: dict[str, Tensor], gradient: Tensor, statistics: Sequence[str]) -> None:
    """Add one batch's gradient, and its square, to float32 sums. `gradient` may become the sum itself: do not use it again."""
    if "squared_gradient" in statistics:
        wide = gradient.float()
        if "squared_gradient" in sums:
            sums["squared_gradient"].addcmul_(wide, wide)
        else:
            sums["squared_gradient"] = wide.square()
    if "gradient" in statistics:
        sums["gradient"] = sums["gradient"].add_(gradient) if "gradient" in sums else gradient.float()


@torch.no_grad()
def _inputs(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Sequence[Any],
    loss_fn: LossFn | None,
    batch_done: Callable[[], None],
    steps: Undo,
    products: bool,
) -> dict[str, Tensor]:
    """The 2-norm of each input feature of the layers that compute with these weights, squares in float64; or the products."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    shown: Tensor | None = None  # which tokens of the batch count, bool [batch, tokens]

    def look(_module: nn.Module, inputs: tuple[Any, ...], name: str) -> None:
        tokens = inputs[0].detach()
        hidden = shown is not None and shown.shape == tokens.shape[:-1]
        tokens = tokens[shown] if hidden else tokens.reshape(-1, tokens.shape[-1])
        counts[name] = counts.get(name, 0) + len(tokens)
        if products:
            wide = tokens.float()
            sums[name] = sums[name].addmm_(wide.T, wide) if name in sums else wide.T @ wide
        else:
            norms = torch.linalg.vector_norm(tokens, dim=0, dtype=torch.float32)
            sums[name] = sums.get(name, 0) + norms.double().square()

    transposed: set[str] = set()
    with steps.inner() as undo, same_random_numbers(weights.values()):
        for name, module in linear_layers(model, weights):
            transposed |= {name} if is_conv1d(module) else set()
            hook = partial(look, name=name)
            set_hook(undo, hooks_of(module, "_forward_pre_hooks"), module.register_forward_pre_hook, hook)
        for batch in batches:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            shown = mask.to(next(model.parameters()).device).bool() if isinstance(mask, Tensor) else None
            loss_fn(model, batch) if loss_fn is not None else _output(model, batch)
            batch_done()
    missing = sorted(weights.keys() - sums.keys())
    if missing:
        raise MaskError(
            f"{len(missing)} tensors saw no input of a linear layer in the calibration batches, the first is '{missing[0]}'; "
            "leave them out, or take a mask without activations"
        )
    if products:
        return {name: total.div_(max(1, counts[name])) for name, total in sums.items()}
    norms = {name: total.sqrt().float() for name, total in sums.items()}
    return {name: norm[:, None] if name in transposed else norm for name, norm in norms.items()}


def _inputs_kept(
    model: nn.Module, weights: Mapping[str, nn.Parameter], batch: Any, loss_fn: LossFn, steps: Undo | None = None
) -> dict[str, dict[int, int]]:
    """The inputs that a training step keeps only for the gradients of linear layers' weights: tensor name -> {address: bytes}.

    There are none with gradient checkpointing, or with sharded weights, which are gathered for each layer and freed again.
    """
    if any(is_sharded(weight) for weight in weights.values()):
        return {name: {} for name in weights}
    parameters = {_address(parameter) for parameter in model.parameters()}
    kept: dict[str, dict[int, int]] = {name: {} for name in weights}
    elsewhere: set[int] = set()
    running: list[str] = []
    held = []  # storages, kept alive so that no address is reused; tensors would keep the graph and each other alive

    def keep(tensor: Tensor) -> None:
        held.append(tensor.untyped_storage())
        address = _address(tensor)
        if not running:
            elsewhere.add(address)
        elif address and address not in parameters:
            kept[running[-1]][address] = held[-1].nbytes()

    def begin(_module: nn.Module, _inputs: Any, name: str) -> None:
        running.append(name)

    def end(*_: Any) -> None:
        running.clear()

    with (steps or Undo()).inner() as undo, torch.enable_grad(), same_random_numbers(weights.values()):
        for name, module in linear_layers(model, weights):
            hook = partial(begin, name=name)
            set_hook(undo, hooks_of(module, "_forward_pre_hooks"), module.register_forward_pre_hook, hook)
            set_hook(undo, hooks_of(module, "_forward_hooks"), module.register_forward_hook, end)
        for weight in weights.values():
            undo.callback(weight.requires_grad_, False)
            weight.requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss_fn(model, batch)
    return {name: {at: size for at, size in found.items() if at not in elsewhere} for name, found in kept.items()}


def linear_layers(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers that compute with these weights, each with its weight's name."""
    names = {id(weight): name for name, weight in weights.items()}
    for module in model.modules():
        name = names.get(id(module._parameters.get("weight")))
        if name is not None and (isinstance(module, nn.Linear) or is_conv1d(module)):
            yield name, module


def _address(tensor: Tensor) -> int:
    """The address of a tensor's storage; 0 if it has none of its own, such as a quantized weight made of other tensors."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return 0


def _groups(sums: Mapping[str, int], memory: int, kept: Mapping[str, dict[int, int]]) -> list[list[str]]:
    """The weights in their order, divided into groups of at least one weight.

    The sums of a group, and the inputs kept for its weights, take at most `memory` plus what training keeps for all weights.
    sums: tensor name -> bytes. kept: tensor name -> {address: bytes}; several weights may have the same input.
    """
    room = memory + sum({at: size for found in kept.values() for at, size in found.items()}.values())
    groups: list[list[str]] = []
    held, inputs = 0, dict[int, int]()
    for name, needed in sums.items():
        if not groups or held + needed + sum((inputs | kept[name]).values()) > room:
            groups.append([])
            held, inputs = 0, {}
        groups[-1].append(name)
        held += needed
        inputs |= kept[name]
    return groups


def _output(model: nn.Module, batch: Any) -> Any:
    """What the model returns for a batch, a mapping of its arguments, whose tensors are moved to its device."""
    if not isinstance(batch, Mapping):
        raise DataError(f"a batch must be a mapping of the model's arguments, found {type(batch).__name__}; or pass loss_fn=")
    ids = batch.get("input_ids")
    if not (ids is None or isinstance(ids, Tensor)):
        raise DataError(
            f"'input_ids' of a batch must be a tensor, found {type(ids).__name__}: tokenizer(texts, return_tensors='pt', "
            "padding=True)"
        )
    device = next(model.parameters()).device
    return model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})


def _size(batches: Sequence[Any]) -> dict[str, int]:
    """How many examples and tokens the batches hold; empty if not all of them have "input_ids"."""
    if not all(isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor) for batch in batches):
        return {}
    masks = [batch.get("attention_mask") for batch in batches]
    tokens = [
        int(mask.sum()) if isinstance(mask, Tensor) else batch["input_ids"].numel()
        for batch, mask in zip(batches, masks, strict=True)
    ]
    return {"examples": sum(len(batch["input_ids"]) for batch in batches), "tokens": sum(tokens)}


def _freeze(model: nn.Module, undo: Undo) -> None:
    """Let no parameter require or have a gradient, until `undo` restores both."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]

    def thaw() -> None:
        for parameter, flag, gradient in before:
            parameter.grad = None
            parameter.requires_grad_(flag)
            if gradient is None or same_form(gradient, parameter):  # the parameter may have been cast meanwhile
                parameter.grad = gradient

    undo.callback(thaw)
    model.requires_grad_(False)
    for parameter, _, _ in before:
        parameter.grad = None
