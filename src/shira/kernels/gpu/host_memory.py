"""Plans that wait in host memory until they are needed on a GPU.

The memory is pinned if the weights are on a GPU. So the copy to the GPU runs on its own stream, beside a forward pass.
"""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from ..plan import Write, WritePlan
from . import ops

__all__ = ["Waiting", "arrived"]

_Key = tuple[torch.device, torch.dtype]  # tensors for one device, of one dtype, share one piece of memory
_Place = tuple[_Key, slice]


class Waiting:
    """A plan's positions and values on the host, without a stash."""

    def __init__(self, plan: WritePlan) -> None:
        """Copy a plan from its devices to the host. Its sums must be computed already."""
        self._written = [write.weight for write in plan.writes]
        self._weights, self._memories = plan.weights, plan.memories
        self._pieces: dict[_Key, Tensor] = {}
        sizes: dict[_Key, int] = {}
        held: list[tuple[_Place, Tensor]] = []
        self._places: list[tuple[_Place, _Place, _Place | None]] = []  # of each write: positions, values, starts of windows
        for write in plan.writes:
            found = (write.indices, write.values, ops.known_starts(write.indices))
            places = [None if tensor is None else _place(sizes, tensor) for tensor in found]
            held += [(place, tensor) for place, tensor in zip(places, found, strict=True) if place and tensor is not None]
            self._places.append((places[0], places[1], places[2]))  # type: ignore[arg-type]
        for key, size in sizes.items():
            self._pieces[key] = torch.empty(size, dtype=key[1], device="cpu", pin_memory=key[0].type == "cuda")
        for (key, span), tensor in held:
            self._pieces[key][span].copy_(tensor)

    def arrive(self) -> WritePlan:
        """A plan on the devices, ready for use after `arrived`. The copies are queued; the host does not wait for them."""
        with contextlib.ExitStack() as streams:
            for device in {device for device, _ in self._pieces if device.type == "cuda"}:
                streams.enter_context(torch.cuda.stream(_stream(device)))
            here = {key: torch.empty_like(piece, device=key[0], pin_memory=False) for key, piece in self._pieces.items()}
            writes = []
            for weight, (indices, values, starts) in zip(self._written, self._places, strict=True):
                writes.append(Write(weight, here[indices[0]][indices[1]], here[values[0]][values[1]]))
                if starts is not None:
                    ops.remember_starts(writes[-1].indices, weight.numel(), here[starts[0]][starts[1]])
            plan = WritePlan.of(writes, weights=self._weights)
            plan.memories = self._memories  # the values are for the weights as they were then
            if all(starts is not None for _, _, starts in self._places):
                ops.prepare(plan)  # it needs addresses only; before the copies, since it waits for its own transfers
            for key, piece in self._pieces.items():
                here[key].copy_(piece, non_blocking=True)
        made = [*here.values(), *plan.stash]
        made += [tensor for launch in plan.launches.values() for tensor in (launch.table, launch.flag, launch.windows)]
        pieces = {tensor.untyped_storage().data_ptr(): tensor for tensor in made if tensor.is_cuda}
        events = {device: _stream(device).record_event() for device in {tensor.device for tensor in pieces.values()}}
        plan.arrival = [(tensor, events[tensor.device]) for tensor in pieces.values()]
        return plan


def arrived(plan: WritePlan) -> WritePlan:
    """Make all work that is queued from now on wait until a plan has arrived. The host does not wait."""
    for tensor, event in plan.arrival:
        stream = torch.cuda.current_stream(tensor.device)
        stream.wait_event(event)
        tensor.record_stream(stream)  # allocated on the copy's stream, which must not reuse it before this stream is done
    plan.arrival = []
    return plan


def _place(sizes: dict[_Key, int], tensor: Tensor) -> _Place:
    """A place for a tensor after the others of its device and dtype, aligned to 16 bytes."""
    key = (tensor.device, tensor.dtype)
    start = sizes.get(key, 0)
    sizes[key] = start + -(-tensor.nbytes // 16) * 16 // tensor.itemsize
    return key, slice(start, start + tensor.numel())


@functools.cache
def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)
