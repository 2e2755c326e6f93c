"""Training and switching on several processes: PyTorch's DDP and FSDP2, and DeepSpeed's ZeRO-3.

In DDP each process has the whole model. In FSDP2 (`fully_shard`) it has some rows of every tensor. In ZeRO-3 it has a span of
the flat entries of every tensor.
So a piece of a sharded tensor is always a span of its flat entries. Positions are sorted, so the positions in a piece are a
span of all positions. Trained values and positions are few, and every process has all of them. Only reading from weights and
writing to weights works by pieces.
"""

import functools
import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import TargetError, TuningError
from .undo import Undo, hooks_of, set_hook

__all__ = [
    "Piece",
    "average_after_backward",
    "check_pieces",
    "check_plain",
    "check_positions",
    "full",
    "gather_pieces",
    "groups_of",
    "is_partitioned",
    "is_sharded",
    "piece_of",
    "reshard",
    "same_everywhere",
]


class Piece(NamedTuple):
    """This process's piece of a weight: flat entries start to stop. local: the tensor from which the model gathers them."""

    local: Tensor
    start: int
    stop: int

    def span(self, indices: Tensor) -> slice:
        """The span of sorted positions [k] that are in this piece."""
        ends = torch.tensor([self.start, self.stop], dtype=indices.dtype, device=indices.device)
        first, last = torch.searchsorted(indices, ends).tolist()
        return slice(first, last)


def is_partitioned(weight: Tensor) -> bool:
    """Whether ZeRO-3 holds a weight. Between forward passes the parameter itself is empty; `ds_tensor` is the piece."""
    return hasattr(weight, "ds_tensor")


def is_sharded(weight: Tensor) -> bool:
    """Whether a weight is in pieces: a DTensor, or in ZeRO-3. Attributes decide, so that neither module has to be imported."""
    return hasattr(weight, "device_mesh") or is_partitioned(weight)


def groups_of(weight: Any) -> list[Any]:
    """The process groups that hold a sharded weight: one for each dimension of a DTensor's mesh, one in ZeRO-3."""
    if is_partitioned(weight):
        return [weight.ds_process_group]
    return [weight.device_mesh.get_group(dim) for dim in range(weight.device_mesh.ndim)]


def full(weight: Any) -> Tensor:
    """The whole weight. Every process must call this."""
    if is_partitioned(weight):
        import torch.distributed as dist

        parts = [torch.empty_like(weight.ds_tensor) for _ in range(dist.get_world_size(weight.ds_process_group))]
        dist.all_gather(parts, weight.ds_tensor.detach(), group=weight.ds_process_group)
        return torch.cat(parts)[: weight.ds_numel].view(weight.ds_shape)
    whole: Tensor = weight.detach().full_tensor() if is_sharded(weight) else weight.detach()
    return whole


def piece_of(name: str, weight: Any) -> Piece:
    """This process's piece of a sharded weight. Raises what `check_pieces` raises."""
    check_pieces(name, weight)
    group, starts = _starts(weight)
    rank = torch.distributed.get_rank(group)
    start, stop = starts[rank], starts[rank + 1]
    if is_partitioned(weight):
        return Piece(weight.ds_tensor.detach()[: stop - start], start, stop)  # the last pieces are padded
    return Piece(weight.to_local().detach(), start, stop)


def check_pieces(name: str, weight: Tensor) -> None:
    """Raise TargetError if a weight is sharded in a way that is not supported.

    A DTensor must be sharded by rows only, as `fully_shard` does. ZeRO-3 must partition a weight over all processes, on its own
    device, without quantization or copies for each node.
    """
    (_check_partition if is_partitioned(weight) else _check_rows)(name, weight)


def _check_rows(name: str, weight: Any) -> None:
    placements = weight.placements
    by_rows = [dim for dim, placement in enumerate(placements) if type(placement).__name__ == "Shard" and placement.dim == 0]
    others = [placement for placement in placements if type(placement).__name__ not in ("Shard", "Replicate")]
    if len(by_rows) != 1 or others or any(placement.is_shard() for d, placement in enumerate(placements) if d not in by_rows):
        raise TargetError(f"'{name}' must be sharded by rows, as fully_shard does by default, found placements {placements}")


def _check_partition(name: str, weight: Any) -> None:
    here, everywhere = torch.distributed.get_world_size(weight.ds_process_group), torch.distributed.get_world_size()
    found = {
        f"partitioned over {here} of {everywhere} processes": here != everywhere,
        "quantized (zero_quantized_weights)": hasattr(weight.ds_tensor, "ds_quant_scale"),
        "copied to each node (zero_hpz_partition_size)": weight.ds_secondary_tensor is not None,
        "offloaded (offload_param)": weight.ds_tensor.numel() == 0 or weight.ds_tensor.device != weight.device,
    }
    for what, is_so in found.items():
        if is_so:
            raise TargetError(f"'{name}' is {what} by ZeRO-3; leave that out of the DeepSpeed config, or use fully_shard")


def _starts(weight: Any) -> tuple[Any, list[int]]:
    """The process group that holds the pieces of a sharded weight; the first flat entry of each piece, then the end."""
    if is_partitioned(weight):
        group, entries, end = weight.ds_process_group, weight.ds_tensor.ds_numel, weight.ds_numel
    else:
        (dim,) = (dim for dim, placement in enumerate(weight.placements) if placement.is_shard())
        group, end, rows = weight.device_mesh.get_group(dim), weight.numel(), weight.shape[0]
        entries = -(-rows // weight.device_mesh.size(dim)) * (end // max(1, rows))
    return group, [min(end, rank * entries) for rank in range(torch.distributed.get_world_size(group) + 1)]


def gather_pieces(weight: Any, indices: Tensor, values: Tensor) -> Tensor:
    """Values [k] at sorted positions [k] of a sharded weight, gathered from all processes. Every process must call this.

    values: the values at those positions that are in this process's piece.
    """
    import torch.distributed as dist

    group, starts = _starts(weight)
    ends = torch.searchsorted(indices, torch.tensor(starts, dtype=indices.dtype, device=indices.device)).tolist()
    counts = [stop - start for start, stop in zip(ends[:-1], ends[1:], strict=True)]
    padded = values.new_zeros(max(counts))
    padded[: values.numel()] = values
    parts = [torch.empty_like(padded) for _ in counts]
    bits = [part.view(torch.uint8) for part in parts]
    dist.all_gather(bits, padded.view(torch.uint8), group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


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


def same_everywhere(indices: Tensor, groups: Sequence[Any]) -> Tensor:
    """The positions that the first process chose. Every process must call this."""
    import torch.distributed as dist

    for group in groups:
        first = dist.get_global_rank(group, 0)
        count = torch.tensor([indices.numel()], device=indices.device)
        dist.broadcast(count, first, group=group)
        indices = indices if indices.numel() == int(count) else indices.new_empty(int(count))
        dist.broadcast(indices, first, group=group)
    return indices


def check_positions(model: nn.Module, positions: Iterable[Tensor], undo: Undo) -> None:
    """Make the first forward pass in DDP raise TuningError if processes train different positions, until `undo`.

    DDP would then average entries that have nothing to do with each other.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    digest = hashlib.sha256()
    for indices in positions:
        digest.update(indices.cpu().long().numpy().tobytes())
    unchecked = [int.from_bytes(digest.digest()[:7], "big")]
    hook = functools.partial(torch.compiler.disable(_compare_checksum), unchecked)
    set_hook(undo, hooks_of(model, "_forward_pre_hooks"), model.register_forward_pre_hook, hook)


def _compare_checksum(unchecked: list[int], model: nn.Module, _inputs: Any) -> None:
    wrapper: Any = nn.parallel.DistributedDataParallel._active_ddp_module  # None outside of DDP's forward pass
    if wrapper is None or not unchecked:
        return
    own = unchecked.pop()
    first = torch.tensor([own], device=next(model.parameters()).device)
    torch.distributed.broadcast(first, torch.distributed.get_global_rank(wrapper.process_group, 0), wrapper.process_group)
    if int(first) != own:
        raise TuningError(
            f"process {torch.distributed.get_rank()} chose other positions to train than the first; give all of them "
            "the same seed, and the same calibration batches"
        )


def check_plain(model: nn.Module) -> None:
    """Raise TuningError if a model is a wrapper to which a tuner cannot attach; the message says what to do."""
    kind = type(model).__name__
    if kind in ("DistributedDataParallel", "DataParallel"):
        raise TuningError(f"attach to the model first, then wrap it in {kind}, which must know what trains")
    if kind == "DeepSpeedEngine":
        raise TuningError("attach to engine.module, and call that; the engine only holds the weights (docs/distributed.md)")
    if kind == "FullyShardedDataParallel":
        raise TuningError("FSDP1 flattens weights; shard with torch.distributed.fsdp.fully_shard (FSDP2), then attach")


def reshard(model: nn.Module) -> None:
    """Drop gathered weights, so that the next forward pass gathers the current pieces."""
    module: Any
    for module in model.modules():
        if hasattr(module, "set_reshard_after_forward"):  # fully_shard adds this method
            module.reshard()
    parameter: Any
    partitioned = [parameter for parameter in model.parameters() if is_partitioned(parameter)]
    if partitioned and partitioned[0].is_cuda:  # ZeRO-3 gathers on its own stream, which does not wait for our writes
        torch.cuda.current_stream().synchronize()
    for parameter in partitioned:
        if parameter.numel():  # still gathered: small weights, and those of modules whose inputs need no gradient
            parameter.ds_active_sub_modules.clear()
            parameter.partition()
