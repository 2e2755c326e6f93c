"""Gradients of the calibration loss, handed out one tensor at a time."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DataError, MaskError

__all__ = ["LossFn", "model_loss", "stream_gradients"]

LossFn = Callable[[nn.Module, Any], Tensor]


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a Transformers-style model: `model(**batch).loss`, the batch's tensors moved to the model's device.

    Raises DataError if the batch is no mapping or the model returns no loss.
    """
    if not isinstance(batch, Mapping):
        raise DataError(f"a batch must be a mapping of the model's arguments, found {type(batch).__name__}; or pass loss_fn=")
    device = next(model.parameters()).device
    output = model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise DataError("the model returned no loss; put 'labels' into the batch, or pass loss_fn=")
    return loss


def stream_gradients(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    receive: Callable[[str, Tensor], None],
    loss_fn: LossFn | None = None,
) -> None:
    """Call `receive(name, gradient)` once for each weight: the gradient of the loss summed over all batches.

    During the last backward pass each gradient is handed out as soon as it is whole and dropped right after. With one
    batch no two full gradients exist at a time; with several, those of the earlier batches add up in the weights' dtype,
    as in any backward pass. No optimizer state, no copy of a weight. The model runs in the mode (train or eval) it is in,
    and afterwards has its gradients and `requires_grad` flags as before.

    Raises MaskError if there is no batch, a loss is not finite, or a weight gets no gradient.
    """
    loss_fn = loss_fn or model_loss
    waiting = {id(weight): name for name, weight in weights.items()}

    def hand_out(weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        if gradient is not None and id(weight) in waiting:
            receive(waiting.pop(id(weight)), gradient)

    with _only_these_train(model, weights), contextlib.ExitStack() as hooks:
        for number, (batch, is_last) in enumerate(_mark_last(batches), start=1):
            if is_last:
                for weight in weights.values():
                    hooks.callback(weight.register_post_accumulate_grad_hook(hand_out).remove)
            with torch.enable_grad():
                loss = loss_fn(model, batch)
                if loss.numel() != 1 or not bool(torch.isfinite(loss)):
                    raise MaskError(f"the loss of calibration batch {number} must be one finite number, found {loss.tolist()}")
                loss.backward()
        for weight in weights.values():  # one that the last batch did not reach, as an expert may be
            hand_out(weight)
    if waiting:
        names = sorted(waiting.values())
        raise MaskError(f"{len(names)} tensors got no gradient from the calibration batches, the first is '{names[0]}'")


def _mark_last(batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Each batch with whether it is the last."""
    iterator = iter(batches)
    try:
        current = next(iterator)
    except StopIteration:
        raise MaskError("calibration holds no batch") from None
    for following in iterator:
        yield current, False
        current = following
    yield current, True


@contextlib.contextmanager
def _only_these_train(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Require gradients of these weights alone; put flags and gradients back afterwards."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        for parameter, _, _ in before:
            parameter.grad = None
        for weight in weights.values():
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, flag, gradient in before:
            parameter.grad = None
            parameter.requires_grad_(flag)
            parameter.grad = gradient
