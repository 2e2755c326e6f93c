"""A model as a switcher has found it: its tensors, whether they are still the same, and whether an adapter fits them."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import kernels
from ..adapter import Adapter
from ..errors import AdapterError, BaseMismatch, SwitchError, did_you_mean
from ..kernels import WeightChanged, WeightMemory, WritePlan
from ..sparse.memory_order import MemoryOrder, memory_order
from ..sparse.positions import overlap
from ..sparse.tensor import SparseTensor, dtype_name
from ..texts import described, shown
from ..weights.belonging import check_base
from ..weights.diffusers_modules import UNREAD, unread_projections
from ..weights.distributed import gather_pieces, is_sharded, local_of, piece_of, reshard
from ..weights.model_tensors import ModelTensors, has_own_memory, is_buffer
from ..weights.optimizers import watch
from ..weights.owners import claim
from ..weights.quantized import is_quantized, is_wrapper, shape_of
from .quantized_layers import QuantizedLayers
from .ready import InWeights
from .recovery import recover_base

__all__ = ["ModelState"]


class ModelState:
    """What is known about a model. It is valid until the model changes.

    weights: every name of each tensor -> the tensor; tensors with the same memory are one object.
    pieces: id of a sharded weight -> the piece of it in this process.
    orders: id of a weight that is not contiguous -> the order of its entries in memory, and its contiguous view.
    quantized: the quantized layers. claim: a claim on the whole model; `owner` says who owns it at the moment.
    """

    def __init__(self, model: nn.Module, owner: Callable[[], str]) -> None:
        reshard(model)  # after a forward pass a sharded model may hold gathered weights, which are not its own tensors
        self._model, self._owner = model, owner
        self.tensors = ModelTensors(model)
        self.weights = self.tensors.by_name
        self.pieces = {id(weight): piece_of(name, weight) for name, weight in self.weights.items() if is_sharded(weight)}
        self.quantized = QuantizedLayers(model)
        self.claim = claim(model, owner, None)
        watch()
        known = {id(weight): weight for weight in self.weights.values() if has_own_memory(weight)}
        self._memories = [(weight, WeightMemory.of(weight)) for weight in known.values()]
        sharded = [weight for weight in self.weights.values() if is_sharded(weight)]
        self._piece_memories = [(weight, WeightMemory.of(local_of(weight))) for weight in sharded]
        self.orders: dict[int, tuple[MemoryOrder, Tensor]] = {}
        for key, weight in known.items():
            if not weight.is_contiguous() and (order := memory_order(weight.shape, weight.stride())) is not None:
                self.orders[key] = order, order.view(weight)
        self._watched: list[Tensor] = []  # the weights that any adapter has been checked against
        self._versions: list[int] = []  # their version counters after our own last write
        self._buffers: frozenset[str] = frozenset()  # the names of buffers that adapters hold

    def has_changed(self) -> bool:
        """Whether a module or tensor of the model was replaced, or torch wrote to a watched weight, since our last write.

        A sharded weight that was cast or moved counts as replaced.
        """
        self.free_gathered()
        same = self.tensors.same() and self._versions == [weight._version for weight in self._watched]
        return not same or not all(memory.is_of(local_of(weight)) for weight, memory in self._piece_memories)

    def free_gathered(self) -> None:
        """Free the gathered weights of a sharded model. They are out of date when its pieces were written."""
        if self.pieces:
            reshard(self._model)

    def has_moved(self) -> bool:
        """Whether a weight has other memory than when this was made: so it is after `weight.data = …`."""
        return not all(memory.is_of(weight) for weight, memory in self._memories)

    def check_memory(self) -> None:
        """Raise WeightChanged if `has_moved`."""
        if self.has_moved():
            raise WeightChanged("a weight was moved since the model was read")

    def note_writes(self) -> None:
        """Record that all writes until now were our own."""
        self._versions = [weight._version for weight in self._watched]
        torch.clear_autocast_cache()  # it may hold casts of the old values

    def checked(self, label: str, adapter: Adapter, plans: Sequence[WritePlan], *, is_new: bool) -> dict[str, SparseTensor]:
        """An adapter's tensors, ready to be written to this model: on its devices, overwrites in its dtypes.

        There is one tensor for each tied weight. label: the adapter's name in messages. plans: what is active over the base.
        is_new: whether the content is new; then the base is compared. Raises BaseMismatch.
        """
        plain = self.quantized.without_quantized(label, adapter, self.weights)
        if is_new:
            shared = next((name for name in adapter.tensors if name in self.tensors.overlapping), None)
            if shared is not None:
                other = self.tensors.overlapping[shared]
                raise BaseMismatch(f"{label}: '{shared}' shares a part of its memory with '{other}' here; give each its own")
            self._check_kept(label, plain)
            self._watch(plain)
            self._buffers |= {name for name in plain.tensors if name in self.weights and is_buffer(self.weights[name])}
            check_base(label, plain, self.weights, lambda weight, indices: self.base_at(weight, indices, plans))
        tensors: dict[str, SparseTensor] = {}
        owners: dict[int, str] = {}
        for name, tensor in adapter.tensors.items():
            weight = self.weights[name]
            other = owners.setdefault(id(weight), name)
            if other == name:
                tensors[name] = _moved_to(weight, name, tensor)
            elif not _same(tensor, adapter.tensors[other]):
                raise BaseMismatch(f"{label}: '{name}' and '{other}' are one tied tensor here, two in the adapter")
        return tensors

    def _check_kept(self, label: str, adapter: Adapter) -> None:
        """Raise BaseMismatch for a weight that its module changes in each forward pass, or that no module reads any more."""
        changing = {
            id(module.weight)
            for module in self._model.modules()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
        }
        wrong = next((name for name in adapter.tensors if id(self.weights.get(name)) in changing), None)
        if wrong is not None:
            raise BaseMismatch(
                f"{label}: '{wrong}' belongs to an embedding with max_norm, which changes its weights in each forward pass, so "
                "that its base could not be restored; set max_norm=None"
            )
        unread = {id(weight) for module in unread_projections(self._model) for weight in module.parameters()}
        wrong = next((name for name in adapter.tensors if id(self.weights.get(name)) in unread), None)
        if wrong is not None:
            raise BaseMismatch(f"{label}: '{wrong}' belongs to a {UNREAD}")

    def _watch(self, adapter: Adapter) -> None:
        """Watch from now on whether others write to these weights.

        Buffers are left out, because forward passes write to them; so are tensors without a usable version counter.
        """
        known = {id(weight) for weight in self._watched}
        for weight in self.tensors.objects([name for name in adapter.tensors if name in self.weights]):
            if id(weight) not in known and not (is_buffer(weight) or weight.is_inference() or is_sharded(weight)):
                self._watched = [*self._watched, weight]
                self._versions = [*self._versions, weight._version]

    def base_values(self, name: str, indices: Tensor, plans: Sequence[WritePlan]) -> Tensor:
        """`base_at` for a tensor by its name. Raises SwitchError for a tensor or positions that the model does not have."""
        weight = self.weights.get(name) if isinstance(name, str) else None
        if weight is None:
            raise SwitchError(f"this model has no tensor {shown(name)}; {did_you_mean(str(name), self.weights)}")
        if is_quantized(weight) or is_wrapper(weight) or weight.is_meta:
            kind = f"no plain tensor but a {type(weight).__name__}"
            state = "quantized" if is_quantized(weight) else "on the meta device" if weight.is_meta else kind
            raise SwitchError(f"'{name}' is {state} in this model, and has no base values; load the model with plain weights")
        _check_positions(name, weight, indices)
        return self.base_at(weight, indices, plans)

    def base_at(self, weight: Tensor, indices: Tensor, plans: Sequence[WritePlan]) -> Tensor:
        """The base values at positions [k] of a weight: those in the weight, or in the stash of a plan that is active there."""
        indices = indices.to(weight.device)
        if id(weight) in self.orders:
            order, view = self.orders[id(weight)]
            return _base_here(view, order.places(indices), plans)
        piece = self.pieces.get(id(weight))
        if piece is None:
            return _base_here(weight, indices, plans)
        here = _base_here(piece.local, indices[piece.span(indices)] - piece.start, plans)
        return gather_pieces(weight, indices, here)

    def reread(self) -> "ModelState":
        """The model as it is now. Replaced buffers that adapters hold are copied, since they may be the user's tensors."""
        self.tensors.replace_new_buffers(self._model, self._buffers)
        now = ModelState(self._model, self._owner)
        now._buffers = self._buffers
        return now

    def recover_base(self, state: InWeights) -> None:
        """Restore the base in the model as it is now, although it was changed under what is active. Raises SwitchError."""
        self.tensors.replace_new_buffers(self._model, self._buffers)
        now = ModelTensors(self._model)
        recover_base(state.plans, self.names(), now, state.label(), only_lost=self.tensors.only_lost(now))

    def names(self) -> dict[int, list[str]]:
        """id of a weight, or of its local piece -> the weight's names."""
        names: dict[int, list[str]] = {}
        for name, weight in self.weights.items():
            names.setdefault(id(weight), []).append(name)
        return names | {id(piece.local): names[key] for key, piece in self.pieces.items()}


def _check_positions(name: str, weight: Tensor, indices: Tensor) -> None:
    """Raise SwitchError unless these are sorted positions in a weight."""
    shape = shape_of(weight)
    wanted = f"positions in '{name}' (shape {list(shape)}) are sorted, from 0 to {math.prod(shape) - 1}, int32 or int64 [k]"
    if not isinstance(indices, Tensor):
        raise SwitchError(f"{wanted}; found {described(indices)}")
    if indices.ndim != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise SwitchError(f"{wanted}; found {dtype_name(indices.dtype)} {list(indices.shape)}")
    if not indices.numel():
        return
    falls = indices[1:] < indices[:-1]
    if bool(falls.any()):
        here = int(falls.nonzero()[0])
        raise SwitchError(f"{wanted}; found {int(indices[here + 1])} after {int(indices[here])}")
    for end in (int(indices[0]), int(indices[-1])):
        if not 0 <= end < math.prod(shape):
            raise SwitchError(f"{wanted}; found {end}")


def _base_here(weight: Tensor, indices: Tensor, plans: Sequence[WritePlan]) -> Tensor:
    values = kernels.gather(weight, indices)
    for plan in plans:
        number = plan.numbers.get(id(weight))
        if number is not None:
            written, stash = plan.writes[number].indices, plan.stash[number]
            wanted = indices.to(written.dtype)
            if wanted.shape == written.shape and torch.equal(wanted, written):  # another strength of the same
                values.copy_(stash)
                continue
            there, here = overlap(written, wanted)
            values[here] = stash[there]
    return values


def _moved_to(weight: Tensor, name: str, tensor: SparseTensor) -> SparseTensor:
    """A sparse tensor ready to be written: on the weight's device; an overwrite in the weight's dtype. Raises BaseMismatch."""
    dtype = weight.dtype if tensor.kind == "overwrite" else tensor.values.dtype  # a quantized weight has only deltas
    if (tensor.values.device, tensor.values.dtype) == (weight.device, dtype):
        return tensor
    try:
        return SparseTensor(tensor.shape, tensor.indices.to(weight.device), tensor.values.to(weight.device, dtype), tensor.kind)
    except AdapterError as error:
        raise BaseMismatch(
            f"'{name}' is {weight.dtype} in this model, which does not hold the adapter's values: {error}"
        ) from error


def _same(one: SparseTensor, other: SparseTensor) -> bool:
    """Whether two sparse tensors are equal, bit for bit."""
    return (
        (one.shape, one.kind, one.values.dtype) == (other.shape, other.kind, other.values.dtype)
        and torch.equal(one.indices, other.indices)
        and kernels.same_bits(one.values, other.values)
    )
