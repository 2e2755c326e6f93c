"""The `Tuner`: a model in training. It makes adapters of what was trained, and restores the model.

Every change to the model is recorded (`undo`) before it is made. So an interrupt at any line of `attach`, `detach` or their
undo steps leaves a state from which the next call continues. The model holds its tuner as `model.shira_tuner`.
"""

import contextlib
import functools
import math
import os
import threading
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..errors import AdapterError, TuningError
from ..files.metadata import base_facts, check_metadata
from ..masks.calibration import LossFn, Progress
from ..masks.selector import Indices, Selector
from ..sparse.tensor import SparseTensor, fingerprint
from ..texts import shown
from ..weights.buffers import Buffers
from ..weights.model_tensors import OWN
from ..weights.owners import Claim, claim
from ..weights.quantized import dtype_label, keep_differentiable, shape_of
from ..weights.targets import Target
from ..weights.undo import Undo
from . import refresh, resuming, stay_near, steps
from .checkpoint_watch import warn_of_low_rank
from .following import Touched, Trained
from .gradient_checkpointing import let_gradients_into_blocks
from .layers import forget_copies
from .masters import Masters, swapped
from .tuned_weight import Hooked, TunedWeight
from .untrained import say
from .variants import hybrid
from .variants.choosing import Make

__all__ = ["Tuner"]

TUNER = OWN + "tuner"  # the attribute of a model that holds its tuner
MAKING, ATTACHED, LEAVING, GONE = "being attached", "attached", "being detached", "detached"
COPY = "of a copy"


class Tuner:
    """A model in training, from `attach` to `detach`. Also a context manager that detaches at its end.

    model: the model that it is attached to. lr_scale: what `attach` was given, or has chosen.
    at_detach: steps that `detach` runs (`undo.Undo`). After an interrupt a step may run again, which must be harmless.
    """

    def __init__(self, model: nn.Module) -> None:
        """Claim the model. Raises TuningError if a tuner or switcher holds it."""
        self.model = model
        self.at_detach = Undo()
        self.lr_scale = 1.0
        self._stage, self._thread = MAKING, threading.get_ident()
        self._tuned: list[TunedWeight] = []
        self._masters: dict[str, Masters] = {}  # the tuned weights by tensor name; empty with method="hook"
        self._training: steps.Training | None = None
        self._whole: tuple[str, ...] = ()
        self._mask: dict[str, Any] = {}
        self._trained: dict[str, Trained] | None = None
        self._torn, self._restore = False, True
        self._grad_flags: list[tuple[dict[str, Any], str, bool]] = []
        self._buffers = Buffers(nn.Module())
        self._claim: Claim | None = claim(model, functools.partial(_owner, weakref.ref(self)), TuningError)
        self._grad_flags = [
            (module._parameters, key, parameter.requires_grad)
            for module in model.modules()
            for key, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._buffers = Buffers(model)
        model.__dict__[TUNER] = self
        self._buffers.move_with_model(self.at_detach)

    def begin(
        self,
        chosen: list[Target],
        indices: Indices,
        mask: dict[str, Any],
        method: str,
        selector: Selector,
        make: Make,
        whole: Collection[str] = (),
        lr_scale: float = 1.0,
    ) -> None:
        """Make these entries trainable, and nothing else. whole: names of the targets that train whole, without a mask."""
        self.lr_scale = lr_scale
        self._mask, self._selector, self._whole = mask, selector, tuple(whole)
        identity = str(getattr(getattr(self.model, "config", None), "_name_or_path", "") or type(self.model).__name__)
        self._base = base_facts(identity, [dtype_label(target.weight) for target in chosen])
        model, undo = self.model, self.at_detach
        self._holders = steps.Holders(model, chosen)
        model.requires_grad_(False)
        let_gradients_into_blocks(model, (use.module for target in chosen for use in target.uses), undo)
        keep_differentiable(model, undo)
        for target in chosen:
            tuned: TunedWeight
            if method == "hook":
                tuned = Hooked(target, indices[target.name])
            else:
                tuned = self._masters[target.name] = make(target, indices[target.name], lr_scale)
            tuned.live_in(target.uses, undo)
            self._tuned.append(tuned)
        if method != "hook":
            self._training = steps.Training(model, chosen, self._masters, undo, self._holders.check)
        self._stage = ATTACHED

    @property
    def attached(self) -> bool:
        """Whether the tuner holds the model: from the end of `attach` to the end of `detach`."""
        return self._stage in (ATTACHED, LEAVING)

    def __repr__(self) -> str:
        """Two lines: what trains, on which model."""
        whole = sum(math.prod(shape_of(tuned.weight)) for tuned in self._tuned)
        what = f"{self.nnz:,} of {whole:,} entries ({self.nnz / max(1, whole):.2%}) in {len(self._tuned):,} tensors"
        mask = shown(self._mask.get("name", "not chosen yet"))
        base = f", base {shown(self._base.get('id'))}" if self._tuned else ""
        return f"<shira.Tuner {self._stage}: {what}\n  mask {mask}, model {type(self.model).__name__}{base}>"

    if not TYPE_CHECKING:  # type checkers would take any name

        def __getattr__(self, name: str):
            raise AttributeError(f"a Tuner has no {name!r}, it is no model; pass tuner.model", name=name, obj=self)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters for an optimizer: one float32 tensor [k] for each target, its entries divided by `lr_scale`.

        Modules that train whole are not divided. A quantized target has differences to the base in place of entries.
        A variant of training has its own parameters (docs/variants.md). With method="hook" they are the weights.
        """
        return [parameter for tuned in self._tuned for parameter in tuned.parameters.values()]

    @property
    def nnz(self) -> int:
        """The number of the model's entries that train."""
        return sum(tuned.indices.numel() for tuned in self._tuned)

    @torch.enable_grad()
    def refresh(self, optimizer: torch.optim.Optimizer, *, calibration: Iterable[Any] | None = None, cap: float = 1.0) -> int:
        """Select again on the present weights, and train the selected entries from now on; returns the number of new entries.

        Call it after an optimizer's step. Each tensor keeps its number of entries, and the optimizer keeps its parameters.
        Masters and moments of the entries that stay move with them, bit for bit. New entries start at the weight's present
        values: the base's, or trained values that an entry kept when it left. Their moments start at zero. If the selection is
        the same, nothing changes.

        calibration: batches, if the mask needs gradients or activations. Torch's random numbers stay as they were.
        cap: the entries that the adapter may hold, as a multiple of each tensor's budget. Entries that leave keep their trained
            values while there is room, those that changed most first. The others get the base's values again. With cap=1 all
            entries that leave do.

        Raises TuningError, or what `attach` raises for a mask, before anything has changed.
        """
        masters = self.masters("refreshed")
        if "stay_near" in self._mask:
            raise TuningError("a mask cannot move after stay_near, which knows the entries that trained when it was called")
        moves = refresh.select(self.model, masters, self._whole, self._selector, optimizer, calibration, cap, self.at_detach)
        self._torn = True
        moved = sum(refresh.move(*each, cap) for each in moves)
        self._torn = False
        if self._training is not None:
            self._training.positions_moved()
        self._mask = self._mask | {"refresh": {"times": self._mask.get("refresh", {}).get("times", 0) + 1, "cap": cap}}
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
        """Pull the trained entries back to the base in training, by elastic weight consolidation (arXiv 1612.00796).

        The more sensitive the loss of `batches`, of general text, is to an entry, the stronger the pull. Adapters that are
        added interfere less with each other then (docs/masks/README.md). Call it once, before training. Torch's random numbers
        stay as they were.

        reach: a change in units of the weights. At this change, an entry of the tensor's mean sensitivity is pulled as strongly
            as a typical gradient of the batches pulls.
        passes: backward passes for each step of the optimizer (gradient accumulation).
        loss_fn, progress: as in `attach`.

        Raises TuningError or MaskError before anything has changed.
        """
        masters = self.masters("held near its base")
        if "stay_near" in self._mask or "refresh" in self._mask:
            raise TuningError("stay_near is called once, before any refresh")
        loss_fn, base = loss_fn or self._selector.loss_fn, self.reference()
        done = stay_near.hold(self.model, masters, batches, base, reach, passes, loss_fn, progress, self.at_detach)
        self._mask = self._mask | {"stay_near": done}

    def masters(self, wish: str) -> dict[str, Masters]:
        """Tensor name -> its masters. Raises TuningError if they may not change now; `wish` completes the message."""
        masters = self._masters
        self.at_detach.finish_inner()
        problem = ""
        if self._stage != ATTACHED:
            problem = f"only an attached tuner can be {wish}, and this one is {self._stage}; call shira.attach again"
        elif len(masters) < len(self._tuned):
            problem = f"only a tuner with method='values' can be {wish}; attach with that"
        elif any(each.ignored for each in masters.values()):
            problem = f"a tuner can be {wish}, but not inside its reference(); do it after the block"
        if problem:
            raise TuningError(problem)
        self._check_not_torn()
        self._holders.check()
        for each in masters.values():
            each.look()
        return masters

    def _check_not_torn(self) -> None:
        if self._torn:
            raise TuningError("a refresh was interrupted half way, and some values are at the wrong entries; call detach()")

    def state_dict(self) -> dict[str, Tensor]:
        """The state to save, beside the optimizer's, to resume a run: the masters, with marks of their positions and base.

        It also has the buffers that training has changed, such as BatchNorm's statistics, unless their dtype or shape is new.
        Raises TuningError if the mask has moved, since positions are not saved.
        """
        return resuming.state_of(self.masters("saved"), self._buffers, moved="refresh" in self._mask)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the masters of a `state_dict`, bit for bit. The whole state is checked before anything changes.

        Raises TuningError if the state belongs to another mask or density, BaseMismatch if it belongs to another model.
        """
        resuming.load_state(self.masters("resumed"), self._buffers, state, whole=self._whole)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the model is its base, bit for bit: the reference of preference training, without a second copy.

        Afterwards weights and buffers are as before, and a backward pass through an earlier forward pass works. Inside, that is
        a TuningError. Gradients of what is computed inside are right inside only.
        Raises TuningError if the tuner is detached, has method="hook", has sharded weights, or is inside reference() already.

            with tuner.reference(), torch.no_grad():
                reference = model(**batch).logits
        """
        with swapped(self.masters("switched off").values(), lambda: self._stage == ATTACHED, self.at_detach) as steps:
            steps.callback(lambda: self._buffers.put_back() if self._stage == ATTACHED else None)
            self._buffers.set_aside()
            yield

    def adapter(
        self, name: str | None = None, *, training: dict[str, Any] | None = None, license: str | None = None
    ) -> Adapter:
        """An adapter of what was trained so far, before or after `detach`.

        It overwrites entries with values in the weights' dtype; for quantized weights it has deltas. It also overwrites the
        floating-point buffers that have changed, such as BatchNorm's statistics.
        training: a summary for the file, of anything that JSON can hold, by name.
        Warns (`NotTrained`) of targets that got no gradient.
        Raises AdapterError for a name, summary or licence of another type; TuningError if a trained value is not finite, or if
        other code has changed a weight (docs/guarantees.md).
        """
        self._check_not_torn()
        if self._trained is None:
            self._holders.check()
            for tuned in self._tuned:
                tuned.look()
            if self._training is not None:
                say(self._training.watch.at_the_end())
        tensors, prints = {}, {}
        for tensor, (shape, touched, kind) in (self._trained or self._so_far()).items():
            values = touched.values.detach().cpu().clone()
            try:
                tensors[tensor] = SparseTensor(shape, touched.indices.cpu().clone(), values, kind)
            except AdapterError as error:
                raise TuningError(f"training of '{tensor}' went wrong: {error}; try a lower learning rate") from error
            if tensor not in self._whole:  # a module that trains whole has new values at each load: no base to compare with
                prints[tensor] = fingerprint(touched.base)
        metadata = {"name": name, "mask": self._mask, "base": self._base, "training": training, "license": license}
        metadata |= {"fingerprints": prints, "low_rank": hybrid.record(self._masters)}
        metadata = {key: value for key, value in metadata.items() if value is not None}
        check_metadata(metadata)
        return Adapter(tensors, metadata)

    def _so_far(self) -> dict[str, Trained]:
        """Tensor name -> its trained entries."""
        found = {}
        for tuned in self._tuned:
            touched = tuned.touched()
            copied = touched._replace(values=touched.values.detach().clone())
            found[tuned.name] = Trained(shape_of(tuned.weight), copied, tuned.kind)
        for name, (before, now) in self._buffers.changed().items():
            indices = torch.arange(now.numel(), device=now.device)
            found[name] = Trained(tuple(now.shape), Touched(indices, before.reshape(-1), now.reshape(-1).clone()), "overwrite")
        return found

    def save_hybrid(self, folder: str | os.PathLike[str]) -> None:
        """Write both parts of training with low_rank: adapter.safetensors, and lora/, which PEFT can load.

        All files are written before the first of them replaces an older one.
        Raises TuningError without low_rank or for what is no path, or what `adapter` raises; OSError.
        """
        if hybrid.record(self._masters) is None:
            raise TuningError("there is no low-rank part: attach(..., low_rank=8) trains one; save adapter() instead")
        hybrid.save(folder, self.adapter(), self._masters)

    def detach(self) -> None:
        """Restore the base bit for bit: weights, buffers, and `requires_grad` flags.

        A second call is harmless. After an interrupt the next call continues.
        Raises TuningError, before anything is written, if other code has changed a weight so that its base is not known
        (docs/guarantees.md). Put the weight right, or call `release`.
        """
        self._leave(restore=True)

    def release(self) -> None:
        """Let go of the model as it is: weights and buffers keep their values; everything else is as after `detach`.

        Use it after an error that says that the base is no longer known, or to keep the trained values in the weights. Warns
        (`LowRankLeftOut`) if a low-rank part trains, which is in no weight.
        """
        if self._stage == ATTACHED and hybrid.record(self._masters) is not None:
            warn_of_low_rank("release() keeps")
        self._leave(restore=False)

    @torch.inference_mode(False)
    def _leave(self, *, restore: bool, quiet: bool = False) -> None:
        if self._stage == ATTACHED:
            if restore:
                self._holders.check()
            for tuned in self._tuned if restore else ():
                tuned.look(to_leave=True)
            with contextlib.nullcontext() if restore else contextlib.suppress(TuningError, RuntimeError, IndexError):
                self._trained = self._so_far()
            self._restore, self._thread, self._stage = restore, threading.get_ident(), LEAVING
        if self._stage == GONE:
            return
        if self._stage == COPY:
            raise TuningError(
                "this tuner is of a copy of a model in training, and only that of the model itself knows how to leave it; "
                "put the copy's adapter() on a base (docs/guarantees.md)"
            )
        messages = [] if self._training is None or quiet else self._training.watch.at_the_end()
        self.undo()
        say(messages)

    @torch.inference_mode(False)
    def undo(self) -> None:
        """Undo everything that was done to the model. After an interrupt it can be called again."""
        if self._restore:
            for tuned in self._tuned:
                tuned.restore()
        self.at_detach.close()
        if self._restore:
            self._buffers.restore()  # last: undoing an interrupted calibration restores the buffers of training
        for parameters, key, flag in self._grad_flags:
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
        """A tuner that is copied together with its model holds no model. It only knows what was trained."""
        gone = {"at_detach": Undo(), "_grad_flags": [], "_stage": GONE if self._stage == GONE else COPY}
        return self.__dict__ | dict.fromkeys(("_claim", "_training", "_selector")) | gone


def _owner(reference: "weakref.ref[Tuner]") -> str:
    """The error text for another would-be owner of the model; "" if the model is free.

    If this thread was interrupted while it attached or detached the tuner, that is undone here first.
    """
    tuner = reference()
    if tuner is None or tuner._stage == GONE:
        return ""
    if tuner._stage in (MAKING, LEAVING) and tuner._thread == threading.get_ident():
        tuner.undo()
        return ""
    first = f" already, to '{tuner._tuned[0].name}'" if tuner._stage == ATTACHED else ""
    return f"a tuner is {tuner._stage}{first}; call its detach() first (model.{TUNER})"
