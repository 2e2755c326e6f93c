"""Training in several processes: gradients are averaged, positions must be the same, wrappers are refused."""

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TuningError
from ..weights.model_tensors import is_own
from ..weights.undo import Undo, hooks_of, set_hook

__all__ = ["average_after_backward", "check_no_copy", "check_same_positions", "check_unwrapped", "is_of_peft"]


def average_after_backward(parameters: Sequence[nn.Parameter], groups: Sequence[Any], undo: Undo) -> None:
    """At the end of every backward pass, replace the parameters' gradients by their mean over process groups, until `undo`.

    One message holds them all, four bytes an entry. Every process must run the same number of backward passes.
    """
    waiting = False

    def send() -> None:
        nonlocal waiting
        waiting = False
        _average(parameters, groups)

    def ask(_: Tensor) -> None:
        nonlocal waiting
        if not waiting:
            waiting = True
            torch.autograd.Variable._execution_engine.queue_callback(send)

    for parameter in parameters:
        kept = hooks_of(parameter, "_post_accumulate_grad_hooks")
        set_hook(undo, kept, parameter.register_post_accumulate_grad_hook, ask)


def _average(parameters: Sequence[nn.Parameter], groups: Sequence[Any]) -> None:
    """Average gradients. A process without a gradient counts as zeros, and gets the mean if any process has a gradient."""
    import torch.distributed as dist

    device = parameters[0].device
    here = torch.tensor([float(p.grad is not None) for p in parameters], dtype=torch.float32, device=device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    message = torch.cat([*(gradient.detach().view(-1) for gradient in gradients), here])
    for group in groups:
        dist.all_reduce(message, group=group)
    processes = math.prod(dist.get_world_size(group) for group in groups)
    *means, anywhere = message.split([*(parameter.numel() for parameter in parameters), len(parameters)])
    for parameter, mean, count in zip(parameters, means, anywhere.tolist(), strict=True):
        if count:
            parameter.grad = (mean / processes).view_as(parameter)


def check_same_positions(
    model: nn.Module, positions: Callable[[], Iterable[Tensor]], unchecked: list[bool], undo: Undo
) -> None:
    """Make a forward pass in DDP raise TuningError in all processes if they train different positions, until `undo`.

    DDP would then average entries that have nothing to do with each other. positions: those that train now. unchecked: while it
    holds anything, which must be so in every process alike, passes compare. It is cleared when the positions are the same.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        hook = functools.partial(torch.compiler.disable(_compare_positions), positions, unchecked)
        set_hook(undo, hooks_of(model, "_forward_pre_hooks"), model.register_forward_pre_hook, hook)


def _compare_positions(
    positions: Callable[[], Iterable[Tensor]], unchecked: list[bool], model: nn.Module, _inputs: Any
) -> None:
    wrapper: Any = nn.parallel.DistributedDataParallel._active_ddp_module  # None outside of DDP's forward pass
    if wrapper is None or not unchecked:
        return
    digest = hashlib.sha256()
    for indices in positions():
        digest.update(indices.cpu().long().numpy().tobytes())
    own = torch.tensor([int.from_bytes(digest.digest()[:7], "big")], device=next(model.parameters()).device)
    every = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(wrapper.process_group))]
    torch.distributed.all_gather(every, own, wrapper.process_group)
    others = [rank for rank, each in enumerate(every) if not torch.equal(each, every[0])]
    if others:
        raise TuningError(
            f"process {others[0]} chose other positions to train than the first; give all of them the same seed, and the same "
            "calibration batches, also for a refresh"
        )
    unchecked.clear()


def check_unwrapped(model: nn.Module) -> None:
    """Raise TuningError if a model is a wrapper to which a tuner cannot attach; the message says what to do."""
    kind = type(model).__name__
    if kind in ("DistributedDataParallel", "DataParallel"):
        raise TuningError(f"attach to the model first, then wrap it in {kind}, which must know what trains")
    if kind == "DeepSpeedEngine":
        raise TuningError("attach to engine.module, and call that; the engine only holds the weights (docs/distributed.md)")
    if kind == "FullyShardedDataParallel":
        raise TuningError("FSDP1 flattens weights; shard with torch.distributed.fsdp.fully_shard (FSDP2), then attach")
    wrapped = next((name for name, part in model.named_modules() if is_of_peft(part) and hasattr(part, "base_layer")), None)
    if wrapped is not None:
        raise TuningError(
            f"PEFT has wrapped '{wrapped}', and an adapter of this model would fit no plain one; take its adapters out first, "
            "by merge_and_unload() or unload() (of a pipeline: unload_lora_weights()), and attach to what it returns"
        )
    if is_of_peft(model):
        raise TuningError(f"this is a {kind} of PEFT, whose names no plain model has; attach to model.get_base_model()")


def check_no_copy(model: nn.Module) -> None:
    """Raise TuningError if a model that nobody owns is a copy of one in training."""
    names = (name for name, _ in itertools.chain(model.named_parameters(), model.named_buffers()))
    copied = next((name for name in names if is_own(name.rpartition(".")[2])), None)
    if copied is not None:
        raise TuningError(
            f"this model is a copy of one in training, it holds '{copied}'; copy a model before attach() or after detach()"
        )


def is_of_peft(module: nn.Module) -> bool:
    """Whether a module is PEFT's: a layer around another one, or the model around all."""
    return any(base.__module__.startswith("peft.") for base in type(module).__mro__)
