"""Training and switching on several processes: PyTorch's DDP, where each has the whole model, and FSDP2 (`fully_shard`), where
each has some rows of every tensor.

A piece of a sharded tensor is a span of its flat entries. Positions are sorted, so those in a piece are a span of them. Trained
values and positions are few and whole on every process; only what is written to weights, and read of them, goes by pieces.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import TargetError, TuningError

__all__ = [
    "Piece",
    "average_after_backward",
    "check_plain",
    "check_positions",
    "full",
    "gather_pieces",
    "is_sharded",
    "mesh_of",
    "piece_of",
    "reshard",
    "same_everywhere",
]

CHECKSUM = "shira_positions"


class Piece(NamedTuple):
    """Flat entries start to stop of a weight, which lie here; local: their tensor, which the model gathers from."""

    local: Tensor
    start: int
    stop: int

    def span(self, indices: Tensor) -> slice:
        """Which of sorted positions [k] lie here."""
        ends = torch.tensor([self.start, self.stop], dtype=indices.dtype, device=indices.device)
        first, last = torch.searchsorted(indices, ends).tolist()
        return slice(first, last)


def mesh_of(weight: Any) -> Any:
    """The processes that a sharded weight lies on."""
    return weight.device_mesh


def is_sharded(weight: Tensor) -> bool:
    """Whether a weight is a DTensor; whoever has none need not load its module."""
    return hasattr(weight, "device_mesh")


def full(weight: Tensor) -> Tensor:
    """The whole weight. Every process must ask for it."""
    sharded: Any = weight.detach()
    whole: Tensor = sharded.full_tensor() if is_sharded(weight) else sharded
    return whole


def piece_of(name: str, weight: Any) -> Piece:
    """What lies here of a sharded weight. Raises TargetError unless it is sharded by rows alone, as `fully_shard` does."""
    mesh, placements = weight.device_mesh, weight.placements
    by_rows = [dim for dim, placement in enumerate(placements) if type(placement).__name__ == "Shard" and placement.dim == 0]
    others = [placement for placement in placements if type(placement).__name__ not in ("Shard", "Replicate")]
    if len(by_rows) != 1 or others or any(placement.is_shard() for d, placement in enumerate(placements) if d not in by_rows):
        raise TargetError(f"'{name}' must be sharded by rows, as fully_shard does by default, found placements {placements}")
    local = weight.to_local().detach()
    rows, size = weight.shape[0], mesh.size(by_rows[0])
    entries_a_row = weight.numel() // max(1, rows)
    start = min(rows, mesh.get_local_rank(by_rows[0]) * -(-rows // size)) * entries_a_row
    return Piece(local, start, start + local.numel())


def gather_pieces(weight: Any, indices: Tensor, values: Tensor) -> Tensor:
    """Values [k] at sorted positions of a sharded weight, from each process those of its own piece. Every process must ask."""
    import torch.distributed as dist

    (dim,) = (dim for dim, placement in enumerate(weight.placements) if placement.is_shard())
    size, rows = weight.device_mesh.size(dim), weight.shape[0]
    starts = torch.tensor([min(rows, rank * -(-rows // size)) for rank in range(size + 1)]) * (weight.numel() // max(1, rows))
    ends = torch.searchsorted(indices, starts.to(indices.device, indices.dtype)).tolist()
    counts = [stop - start for start, stop in zip(ends[:-1], ends[1:], strict=True)]
    padded = values.new_zeros(max(counts))
    padded[: values.numel()] = values
    parts = [torch.empty_like(padded) for _ in counts]
    bits = [part.view(torch.uint8) for part in parts]
    dist.all_gather(bits, padded.view(torch.uint8), group=weight.device_mesh.get_group(dim))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def average_after_backward(parameters: Sequence[nn.Parameter], mesh: Any) -> Callable[[], None]:
    """At the end of every backward pass, make the parameters' gradients their mean over the processes of a mesh, in one message
    of four bytes an entry; returns what undoes it. Every process must run as many backward passes."""
    waiting = False

    def send() -> None:
        nonlocal waiting
        waiting = False
        _average(parameters, mesh)

    def ask(_: Tensor) -> None:
        nonlocal waiting
        if not waiting:
            waiting = True
            torch.autograd.Variable._execution_engine.queue_callback(send)

    undo = contextlib.ExitStack()
    for parameter in parameters:
        undo.callback(parameter.register_post_accumulate_grad_hook(ask).remove)
    return undo.close


def _average(parameters: Sequence[nn.Parameter], mesh: Any) -> None:
    """Average gradients in place; a process that has none of a parameter counts as zeros, and gets the mean if any has one."""
    import torch.distributed as dist

    device = parameters[0].device
    here = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    message = torch.cat([*(gradient.detach().view(-1) for gradient in gradients), here])
    for dim in range(mesh.ndim):
        dist.all_reduce(message, group=mesh.get_group(dim))
    *means, anywhere = message.split([*(parameter.numel() for parameter in parameters), len(parameters)])
    for parameter, mean, count in zip(parameters, means, anywhere.tolist(), strict=True):
        if count:
            parameter.grad = (mean / mesh.size()).view_as(parameter)


def same_everywhere(indices: Tensor, mesh: Any) -> Tensor:
    """The positions that the first process of a mesh chose, on all of them."""
    import torch.distributed as dist

    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        first = dist.get_global_rank(group, 0)
        count = torch.tensor([indices.numel()], device=indices.device)
        dist.broadcast(count, first, group=group)
        indices = indices if indices.numel() == int(count) else indices.new_empty(int(count))
        dist.broadcast(indices, first, group=group)
    return indices


def check_positions(model: nn.Module, positions: Iterable[Tensor]) -> Callable[[], None]:
    """Where several processes have the whole model each, make the first forward pass after DDP has begun raise TuningError if
    they train other positions: DDP would average entries that have nothing to do with each other. Returns what undoes it.

    DDP copies the first process's buffers to all; here one holds a checksum.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return lambda: None
    digest = hashlib.sha256()
    for indices in positions:
        digest.update(indices.cpu().long().numpy().tobytes())
    own = int.from_bytes(digest.digest()[:7], "big")
    device = next(model.parameters()).device
    model.register_buffer(CHECKSUM, torch.tensor([own], device=device), persistent=False)
    seen = [getattr(model, CHECKSUM)._version]

    def compare(module: nn.Module, _inputs: Any) -> None:
        buffer = getattr(module, CHECKSUM)
        if buffer._version != seen[0]:
            seen[0] = buffer._version
            if int(buffer) != own:
                raise TuningError(
                    f"process {torch.distributed.get_rank()} chose other positions to train than the first; give all of them "
                    "the same seed, and the same calibration batches"
                )

    handle = model.register_forward_pre_hook(compare)

    def undo() -> None:
        handle.remove()
        model._buffers.pop(CHECKSUM, None)
        model._non_persistent_buffers_set.discard(CHECKSUM)

    return undo


def check_plain(model: nn.Module) -> None:
    """Raise TuningError for a model in a wrapper that must be told of the values before it is made."""
    kind = type(model).__name__
    if kind in ("DistributedDataParallel", "DataParallel"):
        raise TuningError(f"attach to the model first, then wrap it in {kind}, which must know what trains")
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise TuningError(
            "DeepSpeed's ZeRO-3 holds this model's weights; shard it with torch.distributed.fsdp.fully_shard instead"
        )
    if kind == "FullyShardedDataParallel":
        raise TuningError("FSDP1 flattens weights; shard with torch.distributed.fsdp.fully_shard (FSDP2), then attach")


def reshard(model: nn.Module) -> None:
    """Let go of gathered weights, so that the next forward pass gathers what is in the pieces now."""
    module: Any
    for module in model.modules():
        if hasattr(module, "set_reshard_after_forward"):  # what fully_shard makes of a module
            module.reshard()
