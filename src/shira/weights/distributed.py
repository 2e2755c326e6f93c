"""Weights that are sharded over several processes, by PyTorch's FSDP2 or DeepSpeed's ZeRO-3.

In FSDP2 (`fully_shard`) each process has some rows of every tensor. In ZeRO-3 it has a span of the flat entries. So a piece is
always a span of flat entries. Positions are sorted, so the positions in a piece are a span of all positions. Trained values and
positions are few, and every process has all of them. Only reading from weights and writing to weights works by pieces.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import TargetError

__all__ = [
    "Piece",
    "check_pieces",
    "full",
    "gather_pieces",
    "groups_of",
    "is_partitioned",
    "is_sharded",
    "local_of",
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
    return Piece(local_of(weight), start, stop)


def local_of(weight: Any) -> Tensor:
    """The memory in which this process holds its piece of a sharded weight at the moment. A cast or a move replaces it."""
    held: Tensor = weight.ds_tensor if is_partitioned(weight) else weight.to_local()
    return held.detach()


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
