"""Training: `attach` makes a few entries of a model's own weights trainable; any loop or trainer does the rest.

Both ways of the paper (§3.3):

"values" (Appendix E, the default). The chosen entries, as float32 masters, are the only parameters. While attached, the
adapted layers compute with their weights as they are, into which changed masters are written before the forward
pass; in the backward pass the weight's gradient is formed one layer at a time and only its sample survives.

"hook" (Appendix D, "any trainer"). The weights are the parameters; a hook clears their gradients off the mask. It needs
a copy of the base, full-size gradients and full-size optimizer state: it is here to be read, and to check the other.
"""

import contextlib
import os
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import consolidation, hybrid, masks, refresh, resuming, variants
from . import targets as target_names
from .adapter import Adapter, SparseTensor, fingerprint
from .calibration import LossFn, Progress, same_random_numbers
from .distributed import average_after_backward, check_plain, check_positions, groups_of, is_sharded, reshard
from .entries import Entry, with_hook, with_values
from .errors import AdapterError, TuningError
from .layers import install, let_checkpoints_see_gradients
from .masks import Mask
from .masters import Masters, swapped
from .quantized import keep_differentiable, label, shape_of
from .selection import Avoid, Selector, count_of, entries_of
from .targets import VALUES

__all__ = ["Tuner", "attach"]


def attach(
    model: nn.Module,
    *,
    mask: str | Mask = "wm",
    density: float | None = None,
    rank: int | None = None,
    total: int | None = None,
    scope: Literal["tensor", "model"] = "tensor",
    floor: float = 0.0,
    overrides: Mapping[str, Any] | None = None,
    targets: str | Iterable[str] = "all-linear",
    exclude: str | Iterable[str] = (),
    layers: int | Iterable[int] | None = None,
    avoid: Avoid | Iterable[Avoid] = (),
    calibration: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    method: Literal["values", "hook"] = "values",
    decompose: bool | int = False,
    low_rank: int | None = None,
) -> "Tuner":
    """Make a few entries of the model's weights trainable, and nothing else.

    mask: a name from `shira.masks.available()` or a function of that form.
    density: share of each target's entries, above 0 and at most 1 (0.01 if none of the three is given).
    rank: gives each target the rank·(out + in) entries of a LoRA of that rank instead.
    total: so many entries in all targets together, in proportion to their sizes.
    scope: "model" ranks the scores of all targets in one list, instead of each target's by themselves; then a target keeps at
        least `floor` (0 to 1) of what it would have had by itself. One that gets no entry is not trained.
    overrides: name pattern -> a budget of its own, {"down_proj": 0.02, "layers.0.*": {"rank": 4}} (docs/masks/budgets.md).
    targets: a list of names of modules or parameters, or suffixes of them; "all-linear", "attention", "mlp", "auto"; or a
        regular expression (docs/targets.md). Layers of any kind, embeddings, mixtures' experts, norms and biases.
    exclude: names none of which may be part of a target's name. layers: numbers of the layers to take, 3 or range(4, 12).
    avoid: adapters, or files of them, none of whose entries may train.
    calibration: batches for masks that need gradients or activations, read into a list; several are run more than once
        where the sums of their gradients would take more memory than training does. The model runs in the mode it is in.
    loss_fn(model, batch): by default `model(**batch).loss`. progress(done, total): called after each batch of the calibration.
    seed: with each tensor's name it seeds the mask.
    method: "values" or "hook", see the module's docstring.
    decompose: train the entries as those of a DoRA of this rank (the paper's SHiRA-WM-DoRA), or True: of one whose direction is
        free at the mask's positions. low_rank: train a low-rank product beside the entries (docs/variants.md).

    Raises TargetError, MaskError, BaseMismatch or TuningError before anything in the model has changed.

        tuner = shira.attach(model, mask="snip", density=0.01, calibration=batches)
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=5e-4)
    """
    check_plain(model)
    if method not in ("values", "hook"):
        raise TuningError(f"method must be 'values' or 'hook', found {method!r}")
    if density is None and rank is None and total is None:
        density = 0.01
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    layers = [layers] if isinstance(layers, int) else layers if layers is None else list(layers)
    chosen = target_names.resolve(model, targets, exclude=exclude, layers=layers)
    target_names.check_trainable(chosen)
    if method == "hook" and any(is_sharded(target.weight) for target in chosen):
        raise TuningError("method='hook' needs whole weights; on sharded ones train with method='values'")
    for target in chosen:
        if any(name.startswith(VALUES) for use in target.uses for name in (*use.holder._parameters, *use.holder.__dict__)):
            raise TuningError(f"a tuner is attached already, to '{target.name}'; call its detach() first")
    make, variant = variants.choose(chosen, mask, method, decompose, low_rank, seed)
    weights = {target.name: target.weight for target in chosen}
    avoided, avoided_names = entries_of(avoid, dict(model.named_parameters(remove_duplicate=False)), weights)
    plan = masks.plan(
        {target.name: target.sides for target in chosen},
        density=density,
        rank=rank,
        total=total,
        scope=scope,
        floor=floor,
        overrides=target_names.by_pattern(weights, overrides or {}),
        avoided=count_of(avoided),
    )
    selector = Selector(mask, seed, {target.name: target.matrix for target in chosen}, avoided, loss_fn)
    indices, calibrated = selector.select(model, weights, plan, calibration, progress)
    label, function = masks.resolve(mask)
    settings: dict[str, Any] = {"name": label, "options": masks.options_of(function) or None, "density": density, "rank": rank}
    settings |= {"total": total, "scope": scope if scope != "tensor" else None, "floor": floor or None}
    settings |= {"overrides": dict(overrides or {}) or None, "avoid": avoided_names or None, "seed": seed}
    settings |= {"targets": targets if isinstance(targets, str) else list(targets), "calibration": calibrated}
    settings |= {"exclude": exclude or None, "layers": layers, **variant}
    record = {key: value for key, value in settings.items() if value is not None}
    return Tuner(model, [target for target in chosen if target.name in indices], indices, record, method, selector, make)


class Tuner:
    """A model in training, from `attach` to `detach`. Also a context manager that detaches at its end.

    model, attached: what it was attached to, and whether it still is. at_detach: closed when it is detached.
    """

    def __init__(
        self,
        model: nn.Module,
        chosen: list[target_names.Target],
        indices: dict[str, Tensor],
        mask: dict[str, Any],
        method: str,
        selector: Selector,
        make: variants.Make,
    ) -> None:
        self.model, self._mask, self._selector = model, mask, selector
        self._base = _describe_base(model, chosen)
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        self.attached = True
        model.requires_grad_(False)
        self.at_detach = contextlib.ExitStack()
        self.at_detach.callback(let_checkpoints_see_gradients(model))
        self.at_detach.callback(keep_differentiable(model))
        self._entries: list[Entry] = []
        try:
            if method == "hook":
                self._entries += [with_hook(target, indices[target.name]) for target in chosen]
            else:
                self._entries += [with_values(target, make(target, indices[target.name])) for target in chosen]
                self._install(chosen)
        except BaseException:
            self.detach()
            raise

    def _install(self, chosen: list[target_names.Target]) -> None:
        """Let the modules compute with the masters, and every optimizer write what it has stepped on into the weights."""
        masters = {target.name: entry.masters for target, entry in zip(chosen, self._entries, strict=True) if entry.masters}
        self.at_detach.callback(install((use, masters[target.name]) for target in chosen for use in target.uses))

        # torch holds this hook, for all optimizers: it must not hold the model, which may be dropped without detach()
        known = [weakref.ref(each) for each in masters.values()]
        model = weakref.ref(self.model)

        def write(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
            stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            alive = [each for each in (reference() for reference in known) if each is not None]
            for each in alive:
                if any(id(parameter) in stepped for parameter in each.parameters().values()):
                    each.write_step()
            whole = model()
            if whole is not None and any(each.piece is not None for each in alive):
                reshard(whole)

        hook = register_optimizer_step_post_hook(write)
        self.at_detach.callback(hook.remove)
        weakref.finalize(self.model, hook.remove)
        pieces = [each for each in masters.values() if each.piece is not None]
        if not pieces:
            self.at_detach.callback(check_positions(self.model, (each.indices for each in masters.values())))
            return
        self.at_detach.callback(reshard, self.model)
        self.at_detach.callback(average_after_backward(self.parameters(), groups_of(pieces[0].weight)))

        def write_pieces(module: nn.Module, _inputs: Any) -> None:
            changed = any(each.version != each.written for each in pieces)
            for each in pieces:
                each.write()
            if changed:  # not by an optimizer's step
                reshard(module)

        # before fully_shard's own, which gathers the pieces
        self.at_detach.callback(self.model.register_forward_pre_hook(write_pieces, prepend=True).remove)

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer trains: one float32 tensor [k] a target (or a variant's; with the hook, the weights)."""
        return [p for e in self._entries for p in (e.masters.parameters().values() if e.masters else [e.parameter])]

    @property
    def nnz(self) -> int:
        """How many entries of the model train."""
        return sum(entry.count for entry in self._entries)

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
        if any(type(each) is not Masters for each in masters.values()):
            raise TuningError("a tuner with decompose, low_rank or a quantized base cannot be refreshed")
        if any(each.piece is not None for each in masters.values()):
            raise TuningError("a mask cannot move on weights that are sharded; train without refresh, or with DDP")
        if "stay_near" in self._mask:
            raise TuningError("a mask cannot move after stay_near, which knows the entries that trained when it was called")
        refresh.check_cap(cap)
        states = refresh.movable(optimizer, masters)
        weights = {entry.name: entry.weight for entry in self._entries}
        counts = {entry.name: entry.count for entry in self._entries}
        with _dense(masters.values()):
            chosen, _ = self._selector.select(self.model, weights, masks.Plan(counts, 0, {}), calibration)
        for name, indices in chosen.items():
            if indices.numel() != counts[name]:
                raise TuningError(
                    f"the mask now chose {indices.numel()} entries of '{name}', and {counts[name]} train; a mask that is to be "
                    "refreshed must always return as many"
                )
        moved = sum(refresh.move(masters[name], indices, states[name], cap) for name, indices in chosen.items())
        times = self._mask.get("refresh", {}).get("times", 0) + 1
        self._mask = self._mask | {"refresh": {"times": times, "cap": cap}}
        return moved

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
        (elastic weight consolidation, arXiv 1612.00796). Adapters that are added disturb each other less then (docs/masks.md).

        To be called once, before training; it leaves torch's random numbers as they were.
        reach: the change, in units of the weights, at which an entry of the tensor's mean sensitivity is pulled as much as a
            typical gradient of the batches pulls. passes: backward passes a step of the optimizer (gradient accumulation).
        loss_fn, progress: as for `attach`.

        Raises TuningError or MaskError before anything has changed.
        """
        masters = self.masters("held near its base")
        if "stay_near" in self._mask or "refresh" in self._mask:
            raise TuningError("stay_near is called once, before any refresh")
        consolidation.check(masters, reach, passes)
        with self.reference():
            loss_fn = loss_fn or self._selector.loss_fn
            pull, done = consolidation.pulls(self.model, masters, batches, reach, loss_fn=loss_fn, progress=progress)
        self.at_detach.callback(consolidation.hold(masters, pull, passes))
        self._mask = self._mask | {"stay_near": {"reach": reach, "calibration": done}}

    def masters(self, wish: str) -> dict[str, Masters]:
        """Tensor name -> its entries in training. Raises TuningError, which says what was wished, if none may change now."""
        masters = self._masters()
        if not self.attached or len(masters) < len(self._entries) or any(each.dense for each in masters.values()):
            raise TuningError(f"only an attached tuner with method='values' can be {wish}, and not inside its reference()")
        return masters

    def state_dict(self) -> dict[str, Tensor]:
        """What must be kept of a run, beside the optimizer's state, to resume it: the masters, and whose they are.

        Raises TuningError if the mask has moved: positions are not kept.
        """
        return resuming.state_of(self.masters("saved"), moved="refresh" in self._mask)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up the masters of a `state_dict`, bit for bit; checked before anything has changed.

        Raises TuningError if it belongs to another mask or density, BaseMismatch if to another model.
        """
        resuming.load_state(self.masters("resumed"), state)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the model is its base, bit for bit: the reference of preference training, without a second copy.

        Afterwards the weights are what they were; a backward pass through an earlier forward pass may follow.
        Raises TuningError if the tuner is detached, has method="hook", or is inside already.

            with tuner.reference(), torch.no_grad():
                reference = model(**batch).logits
        """
        with swapped(self.masters("switched off").values(), lambda: self.attached):
            yield

    def adapter(
        self, name: str | None = None, *, training: dict[str, Any] | None = None, license: str | None = None
    ) -> Adapter:
        """What was trained so far, as an overwrite adapter in the weights' dtype, or deltas where they are quantized.

        Before or after `detach`. training: a summary for the file, anything that can be written as JSON.
        Raises TuningError if a trained value is not finite.
        """
        tensors, prints = {}, {}
        for entry in self._entries:
            held = entry.held()
            try:
                tensors[entry.name] = SparseTensor(
                    shape_of(entry.weight),
                    held.indices.cpu(),
                    held.values.detach().cpu().clone(),
                    entry.masters.kind if entry.masters else "overwrite",
                )
            except AdapterError as error:
                raise TuningError(f"training of '{entry.name}' went wrong: {error}; try a lower learning rate") from error
            prints[entry.name] = fingerprint(held.base)
        metadata = {"name": name, "mask": self._mask, "base": self._base, "training": training, "license": license}
        metadata |= {"fingerprints": prints, "low_rank": hybrid.kept(self._masters())}
        return Adapter(tensors, {key: value for key, value in metadata.items() if value is not None})

    def save_hybrid(self, folder: str | os.PathLike[str]) -> None:
        """Write both parts of what was trained with low_rank: adapter.safetensors, and lora/ as PEFT loads it.

        Raises TuningError without low_rank, or what `adapter` raises; OSError.
        """
        if hybrid.kept(self._masters()) is None:
            raise TuningError("there is no low-rank part: attach(..., low_rank=8) trains one; save adapter() instead")
        hybrid.save(Path(folder), self.adapter(), self._masters())

    def _masters(self) -> dict[str, Masters]:
        return {entry.name: entry.masters for entry in self._entries if entry.masters is not None}

    def detach(self) -> None:
        """Give the model back its base weights, bit for bit, and its `requires_grad` flags. Doing it twice is harmless."""
        if not self.attached:
            return
        self.attached = False
        for entry in self._entries:
            held = entry.held()
            snapshot = held._replace(values=held.values.detach().clone())
            entry.held = lambda snapshot=snapshot: snapshot  # type: ignore[misc]
            for undo in entry.undo:
                undo()
        self.at_detach.close()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()


@contextlib.contextmanager
def _dense(masters: Collection[Masters]) -> Iterator[None]:
    """Let the layers compute with their whole weights, up to date, which then have gradients; keep the random numbers."""
    for each in masters:
        each.write()
        each.dense = True
    try:
        with same_random_numbers(each.weight for each in masters):
            yield
    finally:
        for each in masters:
            each.dense = False


def _describe_base(model: nn.Module, chosen: list[target_names.Target]) -> dict[str, Any]:
    """What is known of the base model: its id (of a local folder just the name) and the dtype of the adapted weights."""
    identity = str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
    if Path(identity).exists():
        identity = Path(identity).resolve().name
    dtypes = sorted({label(target.weight) for target in chosen})
    return {"id": identity, "dtype": dtypes[0] if len(dtypes) == 1 else dtypes}
