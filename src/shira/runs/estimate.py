"""Predict the peak memory of a training step from a model's shapes, by running the step on tensors without data.

Torch's fake tensors have shapes, dtypes, a device, and storages that are created and freed like real ones, but no memory. The
same operators run on them, forward and backward, so this module need not know any model's layers. (Plain meta tensors would
choose other kernels: attention that keeps all its weights.) A log of storages records how much memory was in use at each
moment, and for what. torch.distributed._tools.mem_tracker does the same for distributed training.
"""

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import masks
from ..errors import DataError, TuningError
from ..integrations.transformers import checkpointing_of, one_example_a_row
from ..kernels import WholeLines, find_whole_lines, torch_ops
from ..kernels.cpu import native
from ..sparse.positions import index_dtype
from ..training.layers import SparseConv1D, SparseLinear
from ..weights import targets as target_names

__all__ = ["WAYS", "Estimate", "estimate"]

WAYS = ("shira", "lora", "full")
Category = Literal["activations", "logits", "gradients", "temporaries"]


@dataclass(frozen=True)
class Estimate:
    """parts: bytes of each part at the moment of the peak. parameters: the number of entries that train."""

    parts: dict[str, int]
    parameters: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def estimate(
    build: Callable[[], nn.Module],
    *,
    method: str = "shira",
    mask: str = "wm",
    density: float | None = None,
    rank: int | None = None,
    targets: str | Iterable[str] = "all-linear",
    batch_size: int = 1,
    length: int = 512,
    checkpointing: bool = False,
    dropout: float = 0.0,
) -> Estimate:
    """The peak memory of a training step with AdamW, in bytes, from the second step on (the optimizer's state exists).

    build: creates the model, a causal language model of Transformers, in its training dtype. It is called in a mode in which
        tensors take no memory, so it must not read any data.
    method: "shira"; "lora", as in PEFT, with float32 parameters and dropout; or "full".
    density, rank: as in `attach`; density is 0.01 if neither is given. A LoRA has only a rank, 16 if it is not given.
    batch_size, length: rows, and tokens in each row. All tokens count in the loss; no row is padded.
    checkpointing: whether Transformers' gradient checkpointing is on.

    Not counted: the memory of Python, torch and its libraries; work space inside operators; memory that an allocator does not
    return. Selecting a mask is not part of the step; masks that need gradients run a backward pass of their own before it.
    Raises DataError or TuningError for values that are not possible, and what `attach` raises for targets and budgets.
    """
    if method not in WAYS:
        raise TuningError(f"method must be one of {', '.join(WAYS)}, found {method!r}")
    if batch_size < 1 or length < 2:
        raise DataError(f"a step needs a row of at least 2 tokens, found batch_size={batch_size}, length={length}")
    if density is None and rank is None:
        density, rank = (None, 16) if method == "lora" else (0.01, None)
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake: Any = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model = build().train()
    parts = {"weights": _bytes([*model.parameters(), *model.buffers()])}
    log = _Log([*model.parameters(), *model.buffers()])
    if method == "full":
        trained = list({id(p): p for p in model.parameters()}.values())
    else:
        model.requires_grad_(False)
        chosen = target_names.resolve(model, targets)
        for target in chosen:
            if other := next((module for module in target.modules if not _is_linear(module)), None):
                raise TuningError(
                    f"only the training of nn.Linear and Conv1D can be estimated, and '{target.name}' belongs to a layer "
                    f"{type(other).__name__}; choose other targets, or leave it out"
                )
        if method == "lora":
            if rank is None:
                raise TuningError("a LoRA has a rank, not a density")
            with fake:
                trained = _lora(chosen, rank, dropout)
            parts["adapter"] = _bytes(trained)
        else:
            shapes = {target.name: tuple(target.weight.shape) for target in chosen}
            counts = masks.plan(shapes, density=density, rank=rank).counts
            stand_ins = [_StandIn(target, counts[target.name], mask, fake, log) for target in chosen]
            trained = [stand_in.values for stand_in in stand_ins]
            parts["masters"] = _bytes(trained)
            parts["positions"] = sum(stand_in.position_bytes for stand_in in stand_ins)
            parts["base values"] = sum(each.values.numel() * each.weight.itemsize for each in stand_ins)
    parts["optimizer"] = 2 * _bytes(trained)
    log.forget(trained)
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    with one_example_a_row(), fake, log:
        try:
            _step(model, batch_size, length, checkpointing and method != "full", checkpointing)
        except (NotImplementedError, RuntimeError) as error:
            what = str(error).strip().partition("\n")[0]
            raise DataError(f"a step of {type(model).__name__} cannot be run without data in this dtype: {what}") from error
        return Estimate(parts | log.peak(trained, vocabulary), sum(p.numel() for p in trained))


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or target_names.is_conv1d(module)


def _step(model: Any, batch_size: int, length: int, frozen: bool, checkpointing: bool) -> None:
    """One forward and backward pass. frozen: checkpointing on a frozen embedding, whose output must then need a gradient."""
    if checkpointing:
        checkpointing_of(model)[0]()
    if frozen:
        model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output.requires_grad_(True))
    ids = torch.zeros(batch_size, length, dtype=torch.int64)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


class _Log(TorchDispatchMode):
    """Records when each storage was created and freed, and its category."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: dict[int, int] = {}  # address of a storage -> its number; -1 if it is counted elsewhere
        self.events: list[tuple[int, int]] = []  # (number, bytes; negative when freed)
        self.kinds: list[Category] = []
        self.last: list[int] = []  # for each storage, the last dimension of the tensor that it was created for
        self.forward = 0  # the number of trained layers that are in their forward pass
        self.scratch: Tensor | None = None  # the buffer that the native kernel keeps between calls
        self.forget(known)

    def forget(self, known: Iterable[Tensor]) -> None:
        """Leave these tensors out of the log: they are counted elsewhere."""
        self.live |= {tensor.untyped_storage()._cdata: -1 for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.live:
            return
        number = self.live[storage._cdata] = len(self.kinds)
        # gradients are off in a backward pass, but on while checkpointing computes a layer again in it
        forward = self.forward or torch.is_grad_enabled() or torch._C._current_graph_task_id() == -1
        self.kinds.append("activations" if forward else "temporaries")
        self.last.append(tensor.shape[-1] if tensor.ndim else 0)
        self.events.append((number, storage.nbytes()))
        weakref.finalize(storage, self._freed, storage._cdata, number, storage.nbytes()).atexit = False

    def _freed(self, address: int, number: int, size: int) -> None:
        del self.live[address]
        self.events.append((number, -size))

    def peak(self, trained: Iterable[Tensor], vocabulary: int) -> dict[Category, int]:
        """Bytes of each category at the moment when most memory was in use."""
        for parameter in trained:
            if parameter.grad is not None:
                self.kinds[self.live[parameter.grad.untyped_storage()._cdata]] = "gradients"
        now = most = best = 0
        for place, (_, size) in enumerate(self.events):
            now += size
            if now > most:
                most, best = now, place
        found: dict[Category, int] = dict.fromkeys(("activations", "logits", "gradients", "temporaries"), 0)
        for number, size in self.events[: best + 1]:
            kind = self.kinds[number]
            found["logits" if self.last[number] == vocabulary and kind != "gradients" else kind] += size
        return found


class _StandIn:
    """Takes the place of `Masters` for a weight without data: creates masters and positions, and what their gradient needs.

    The positions have the right number and dtype, but no values.
    """

    def __init__(self, target: target_names.Target, count: int, mask: str, fake: Any, log: _Log) -> None:
        self.weight, self.log = target.weight, log
        self.whole_lines = _whole_lines(mask, tuple(target.weight.shape), count)
        if self.whole_lines is not None:
            count = self.whole_lines.order.numel()
        with fake:
            self.values = nn.Parameter(torch.empty(count))
            self.indices = torch.empty(count, dtype=index_dtype(self.weight.numel()))
        self.position_bytes = self.indices.numel() * self.indices.itemsize
        if self.whole_lines is not None:
            held = (self.whole_lines.lines, self.whole_lines.rest_rows, self.whole_lines.rest_columns, self.whole_lines.order)
            self.position_bytes += sum(tensor.numel() * tensor.itemsize for tensor in held)
        log.forget([self.values, self.indices])
        for module in target.modules:
            module.forward = functools.partial(self.forward, module)

    def forward(self, module: Any, input: Tensor) -> Tensor:
        kind: Any = SparseConv1D if target_names.is_conv1d(module) else SparseLinear
        with _counted(self.log):
            output: Tensor = kind.apply(input, module.weight, module.bias, self.values, self)
        return output

    def keep(self, input: Tensor) -> Tensor:
        return input if self.whole_lines is None else self.whole_lines.keep(input)

    def gradient(self, grad_output: Tensor, kept: Tensor) -> Tensor:
        if self.whole_lines is not None:
            return self.whole_lines.gradient(grad_output, kept)
        rows, columns = self.weight.shape
        if not (native.available() and native.sampling_wins(grad_output.dtype, rows, columns, self.values.numel())):
            return torch_ops.sampled_gradient(grad_output, kept, self.indices)
        grad_output, kept = grad_output.contiguous(), kept.contiguous()
        size = native.BLOCK * (rows + columns) + 2 * columns
        if self.log.scratch is None or self.log.scratch.numel() < size:
            self.log.scratch = torch.empty(size)
        return torch.zeros(self.values.numel())


@contextlib.contextmanager
def _counted(log: _Log) -> Iterator[None]:
    log.forward += 1
    try:
        yield
    finally:
        log.forward -= 1


@functools.lru_cache(maxsize=64)
def _whole_lines(mask: str, shape: tuple[int, int], count: int) -> WholeLines | None:
    """The whole lines of a mask that depends on the shape only (struct); None for other masks."""
    if mask.partition(":")[0] != "struct":
        return None
    indices = masks.resolve(mask)[1](torch.empty(1).expand(shape), count)
    return find_whole_lines(indices.to(index_dtype(math.prod(shape))), *shape)


def _lora(chosen: Iterable[target_names.Target], rank: int, dropout: float) -> list[nn.Parameter]:
    """Add low-rank branches to linear layers, in PEFT's order of operations and dtypes. Returns their parameters."""
    trained = []
    for target in chosen:
        out, into = target.weight.T.shape if target_names.is_conv1d(target.modules[0]) else target.weight.shape
        down, up = nn.Parameter(torch.empty(rank, into)), nn.Parameter(torch.empty(out, rank))
        trained += [down, up]
        for module in target.modules:
            module.forward = functools.partial(_lora_forward, module.forward, down, up, dropout)
    return trained


def _lora_forward(plain: Callable[[Tensor], Tensor], down: Tensor, up: Tensor, dropout: float, input: Tensor) -> Tensor:
    base = plain(input)
    dropped = nn.functional.dropout(input.to(down.dtype), dropout) if dropout else input.to(down.dtype)
    return (base + nn.functional.linear(nn.functional.linear(dropped, down), up) * 2.0).to(base.dtype)
