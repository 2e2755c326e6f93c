"""A model in training: what `attach` has made of it, how it is put back, and what was trained.

Whatever is done to the model is written down first (`undoing`), so that an interrupt at any line, of `attach` or `detach` or of
what undoes them, leaves a state that the next call takes up. The model itself holds its tuner, as `model.shira_tuner`.
"""

import contextlib
import functools
import itertools
import os
import threading
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..errors import AdapterError, TuningError
from ..masks.calibration import LossFn, Progress
from ..masks.selection import Indices, Selector
from ..sparse.tensor import Kind, SparseTensor, fingerprint
from ..weights.buffers import Buffers
from ..weights.model_tensors import OWN
from ..weights.owners import Claim, claim
from ..weights.quantized import keep_differentiable, shape_of
from ..weights.targets import Target
from ..weights.undoing import Undo
from . import refresh, resuming, stay_near, steps
from .following import Held
from .layers import forget_copies, let_checkpoints_see_gradients
from .masters import Masters, swapped
from .trainable import describe_base
from .tuned_weight import Hooked, TunedWeight
from .variants import hybrid
from .variants.choosing import Make

__all__ = ["Tuner"]

TUNER = OWN + "tuner"  # the attribute of a model under which its tuner is found
MAKING, ATTACHED, LEAVING, GONE = "being attached", "attached", "being detached", "detached"


class Trained(NamedTuple):
    """What was trained of one weight or buffer."""

    shape: tuple[int, ...]
    held: Held
    kind: Kind


class Tuner:
    """A model in training, from `attach` to `detach`. Also a context manager that detaches at its end.

    model: what it was attached to. at_detach: steps that are taken when it is detached (`undoing.Undo`): each must bear to be
    taken again, after an interrupt.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take the model, which nobody else may have. Raises TuningError if somebody has."""
        self.model = model
        self.at_detach = Undo()
        self._stage, self._thread = MAKING, threading.get_ident()
        self._entries: list[TunedWeight] = []
        self._masters: dict[str, Masters] = {}  # the same by name; with the hook, none
        self._training: steps.Training | None = None
        self._whole: tuple[str, ...] = ()
        self._mask: dict[str, Any] = {}
        self._trained: dict[str, Trained] | None = None
        self._torn, self._restore = False, True
        self._places: list[tuple[dict[str, Any], str, bool]] = []
        self._buffers = Buffers(nn.Module())
        self._claim: Claim | None = claim(model, functools.partial(_owner, weakref.ref(self)), TuningError)
        names = (name for name, _ in itertools.chain(model.named_parameters(), model.named_buffers()))
        copied = next((name for name in names if f".{OWN}" in f".{name}"), None)
        if copied is not None:
            self._stage = GONE
            raise TuningError(
                f"this model is a copy of one in training, it holds '{copied}'; copy a model before attach() or after detach()"
            )
        self._places = [
            (module._parameters, key, parameter.requires_grad)
            for module in model.modules()
            for key, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._buffers = Buffers(model)
        model.__dict__[TUNER] = self
        self._buffers.go_along(self.at_detach)

    def begin(
        self,
        chosen: list[Target],
        indices: Indices,
        mask: dict[str, Any],
        method: str,
        selector: Selector,
        make: Make,
        whole: Collection[str] = (),
    ) -> None:
        """Make these entries trainable, and nothing else. whole: names of the targets that no mask was asked for."""
        self._mask, self._selector, self._whole = mask, selector, tuple(whole)
        self._base = describe_base(self.model, chosen)
        model, undo = self.model, self.at_detach
        self._holders = steps.Holders(model, chosen)
        model.requires_grad_(False)
        let_checkpoints_see_gradients(model, (use.module for target in chosen for use in target.uses), undo)
        keep_differentiable(model, undo)
        for target in chosen:
            entry: TunedWeight
            if method == "hook":
                entry = Hooked(target, indices[target.name])
            else:
                entry = self._masters[target.name] = make(target, indices[target.name])
            entry.live_in(target.uses, undo)
            self._entries.append(entry)
        if method != "hook":
            self._training = steps.Training(model, chosen, self._masters, undo, self._holders.check)
        self._stage = ATTACHED

    @property
    def attached(self) -> bool:
        """Whether it has the model; until `detach` is done."""
        return self._stage in (ATTACHED, LEAVING)

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer trains: one float32 tensor [k] a target (or a variant's; with the hook, the weights)."""
        return [parameter for entry in self._entries for parameter in entry.parameters().values()]

    @property
    def nnz(self) -> int:
        """How many entries of the model train."""
        return sum(entry.indices.numel() for entry in self._entries)

    @torch.enable_grad()
    def refresh(self, optimizer: torch.optim.Optimizer, *, calibration: Iterable[Any] | None = None, cap: float = 1.0) -> int:
        """Select again, on the weights as they are now, and train those entries from here on; returns how many are new.

        Call it after an optimizer's step. Each tensor keeps its number of entries, and the optimizer its parameters: the
        masters and moments of the entries that stay move with them bit for bit; new entries start at the base's values,
        their moments at zero. If the mask has not moved, nothing changes.

        calibration: batches, if the mask needs gradients. They leave torch's random numbers as they were.
        cap: how many entries the adapter may hold, in budgets, tensor by tensor. Entries that leave keep their trained values
            while there is room, those that changed the most first; others are set back to the base. With 1 all of them are.

        Raises TuningError, or what `attach` raises for a mask, before anything has changed.
        """
        masters = self.masters("refreshed")
        if "stay_near" in self._mask:
            raise TuningError("a mask cannot move after stay_near, which knows the entries that trained when it was called")
        moves = refresh.select(self.model, masters, self._whole, self._selector, optimizer, calibration, cap, self.at_detach)
        self._torn = True
        moved = sum(refresh.move(*each, cap) for each in moves)
        self._torn = False
        times = self._mask.get("refresh", {}).get("times", 0) + 1
        self._mask = self._mask | {"refresh": {"times": times, "cap": cap}}
        return moved

    @torch.enable_grad()
    def stay_near(
        self,
        batches: Iterable[Any],
        *,
        reach: float = 0.01,
        passes: int = 1,
        loss_fn: LossFn | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Pull the entries that train back to the base, the more the more these batches, of general text, are sensitive to them
        (elastic weight consolidation, arXiv 1612.00796). Adapters that are added disturb each other less then
        (docs/masks/README.md).

        To be called once, before training; it leaves torch's random numbers as they were.
        reach: the change, in units of the weights, at which an entry of the tensor's mean sensitivity is pulled as much as a
            typical gradient of the batches pulls. passes: backward passes a step of the optimizer (gradient accumulation).
        loss_fn, progress: as for `attach`.

        Raises TuningError or MaskError before anything has changed.
        """
        masters = self.masters("held near its base")
        if "stay_near" in self._mask or "refresh" in self._mask:
            raise TuningError("stay_near is called once, before any refresh")
        loss_fn, base = loss_fn or self._selector.loss_fn, self.reference()
        done = stay_near.hold(self.model, masters, batches, base, reach, passes, loss_fn, progress, self.at_detach)
        self._mask = self._mask | {"stay_near": done}

    def masters(self, wish: str) -> dict[str, Masters]:
        """Tensor name -> its entries in training. Raises TuningError, which says what was wished, if none may change now."""
        masters = self._masters
        self.at_detach.finish_parts()
        if self._stage != ATTACHED or len(masters) < len(self._entries) or any(each.dense for each in masters.values()):
            raise TuningError(f"only an attached tuner with method='values' can be {wish}, and not inside its reference()")
        self._check_whole()
        self._holders.check()
        for each in masters.values():
            each.look()
        return masters

    def _check_whole(self) -> None:
        if self._torn:
            raise TuningError(
                "a refresh was interrupted half way, and values stand at other entries than theirs; call detach()"
            )

    def state_dict(self) -> dict[str, Tensor]:
        """What must be kept of a run, beside the optimizer's state, to resume it: the masters, and whose they are.

        Raises TuningError if the mask has moved: positions are not kept.
        """
        return resuming.state_of(self.masters("saved"), moved="refresh" in self._mask)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up the masters of a `state_dict`, bit for bit; checked before anything has changed.

        Raises TuningError if it belongs to another mask or density, BaseMismatch if to another model.
        """
        resuming.load_state(self.masters("resumed"), state)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the model is its base, bit for bit: the reference of preference training, without a second copy.

        Afterwards weights and buffers are what they were; a backward pass through an earlier forward pass may follow.
        Raises TuningError if the tuner is detached, has method="hook", or is inside already.

            with tuner.reference(), torch.no_grad():
                reference = model(**batch).logits
        """
        with swapped(self.masters("switched off").values(), lambda: self._stage == ATTACHED, self.at_detach) as steps:
            moved = self._buffers.moved()
            steps.callback(lambda: self._buffers.put(moved) if self._stage == ATTACHED else None)
            self._buffers.put_back()
            yield

    def adapter(
        self, name: str | None = None, *, training: dict[str, Any] | None = None, license: str | None = None
    ) -> Adapter:
        """What was trained so far, as an overwrite adapter in the weights' dtype, or deltas where they are quantized; and the
        floating-point buffers that have moved, such as BatchNorm's statistics.

        Before or after `detach`. training: a summary for the file, anything that can be written as JSON.
        Warns (`NotTrained`) of targets that got no gradient.
        Raises TuningError if a trained value is not finite, or a weight was changed by others (docs/guarantees.md).
        """
        self._check_whole()
        if self._trained is None:
            self._holders.check()
            for entry in self._entries:
                entry.look()
            if self._training is not None:
                self._training.watch.at_the_end()
        tensors, prints = {}, {}
        for tensor, (shape, held, kind) in (self._trained or self._so_far()).items():
            try:
                tensors[tensor] = SparseTensor(shape, held.indices.cpu(), held.values.detach().cpu().clone(), kind)
            except AdapterError as error:
                raise TuningError(f"training of '{tensor}' went wrong: {error}; try a lower learning rate") from error
            if tensor not in self._whole:  # what is new at each load has no base
                prints[tensor] = fingerprint(held.base)
        metadata = {"name": name, "mask": self._mask, "base": self._base, "training": training, "license": license}
        metadata |= {"fingerprints": prints, "low_rank": hybrid.kept(self._masters)}
        return Adapter(tensors, {key: value for key, value in metadata.items() if value is not None})

    def _so_far(self) -> dict[str, Trained]:
        """What was trained, by tensor name."""
        found = {}
        for entry in self._entries:
            held = entry.held()
            found[entry.name] = Trained(shape_of(entry.weight), held._replace(values=held.values.detach().clone()), entry.kind)
        for name, (before, now) in self._buffers.changed().items():
            indices = torch.arange(now.numel(), device=now.device)
            found[name] = Trained(tuple(now.shape), Held(indices, before.reshape(-1), now.reshape(-1).clone()), "overwrite")
        return found

    def save_hybrid(self, folder: str | os.PathLike[str]) -> None:
        """Write both parts of what was trained with low_rank: adapter.safetensors, and lora/ as PEFT loads it.

        Raises TuningError without low_rank, or what `adapter` raises; OSError.
        """
        if hybrid.kept(self._masters) is None:
            raise TuningError("there is no low-rank part: attach(..., low_rank=8) trains one; save adapter() instead")
        hybrid.save(Path(folder), self.adapter(), self._masters)

    def detach(self) -> None:
        """Give the model back its base, bit for bit: weights, buffers, and `requires_grad` flags. Doing it twice is harmless;
        after an interrupt it goes on where it was.

        Raises TuningError, before anything is written, if a weight was changed by others so that its base is not known
        (docs/guarantees.md). Put it right, or call `release`.
        """
        self._leave(restore=True)

    def release(self) -> None:
        """Let go of the model as it is: weights and buffers stay, all else is as after `detach`.

        For a model whose base is not known any more, after an error has said so; or to keep what was trained in the weights.
        """
        self._leave(restore=False)

    @torch.inference_mode(False)
    def _leave(self, *, restore: bool, quiet: bool = False) -> None:
        if self._stage == ATTACHED:
            if restore:
                self._holders.check()
            for entry in self._entries if restore else ():
                entry.look()
            with contextlib.nullcontext() if restore else contextlib.suppress(TuningError, RuntimeError, IndexError):
                self._trained = self._so_far()
            self._restore, self._thread = restore, threading.get_ident()
            self._stage = LEAVING
        if self._stage == GONE:
            return
        self.undo()
        if self._training is not None and not quiet:
            self._training.watch.at_the_end()

    @torch.inference_mode(False)
    def undo(self) -> None:
        """Take back all that was done to the model. Can itself be interrupted, and called again."""
        if self._restore:
            for entry in self._entries:
                entry.restore()
        self.at_detach.close()
        if self._restore:
            self._buffers.put_back()  # last: a calibration that was interrupted puts back those of training
        for parameters, key, flag in self._places:
            parameter = parameters.get(key)
            if parameter is not None and (parameter.is_floating_point() or not flag) and not parameter.is_inference():
                parameter.requires_grad_(flag)
        forget_copies(self.model)
        if self.model.__dict__.get(TUNER) is self:
            self.model.__dict__.pop(TUNER, None)
        self._stage = GONE
        self._claim = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._leave(restore=True, quiet=error is not None)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model, with which its tuner is copied, is nobody's: the copy only tells what was trained."""
        told = {"at_detach": Undo(), "_places": [], "_stage": GONE}
        return self.__dict__ | dict.fromkeys(("_claim", "_training", "_selector")) | told


def _owner(reference: "weakref.ref[Tuner]") -> str:
    """What is said to others who want its model. Who was interrupted in making or leaving it, has left that to them."""
    tuner = reference()
    if tuner is None or tuner._stage == GONE:
        return ""
    if tuner._stage in (MAKING, LEAVING) and tuner._thread == threading.get_ident():
        tuner.undo()
        return ""
    first = f" already, to '{tuner._entries[0].name}'" if tuner._stage == ATTACHED else ""
    return f"a tuner is {tuner._stage}{first}; call its detach() first (model.{TUNER})"
