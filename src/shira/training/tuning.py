"""Training: `attach` makes a few entries of a model's own weights trainable. Any loop or trainer can then train them.

The paper has two ways (§3.3):

"values" (Appendix E, the default). Float32 masters of the chosen entries are the only parameters. Adapted layers still compute
with their own weights; changed masters are written to the weights before the forward pass. The backward pass computes the
weight's gradient for one layer at a time, and keeps only its values at the chosen positions.

"hook" (Appendix D, "any trainer"). The weights are the parameters; a hook clears their gradients off the mask. It needs a copy
of the base, full-size gradients and full-size optimizer state. It is here as readable code, and to check the other way.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from .. import masks
from ..errors import TuningError
from ..masks import Mask
from ..masks.avoiding import Avoid, positions_to_avoid
from ..masks.calibration import LossFn, Progress, check_arguments
from ..masks.selector import Selected, Selector
from ..sparse.positions import index_dtype
from ..texts import is_several, plain_number
from ..weights import targets as target_names
from ..weights.distributed import is_sharded
from ..weights.model_tensors import plain_model
from ..weights.owners import claim
from ..weights.targets import Target
from ..weights.undo import Undo
from . import starting
from .foreign_names import knows_foreign_names
from .lr_scale import allowed, scale_for
from .processes import check_no_copy, check_unwrapped
from .starting import Start, StartFrom
from .trainable import check_trainable
from .tuner import Tuner
from .variants import choosing

__all__ = ["attach"]


@knows_foreign_names("docs/peft.md")
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
    whole: str | Iterable[str] = "auto",
    lr_scale: float | Literal["auto"] = 1.0,
    start: StartFrom | None = None,
) -> Tuner:
    """Make a few entries of the model's weights trainable, and nothing else.

    mask: a name from `shira.masks.available()`, or a mask function of your own (docs/masks/README.md).
    density: share of each target's entries, above 0 and at most 1. It is 0.01 if density, rank and total are not given.
    rank: instead, as many entries for each target as a LoRA of this rank has parameters: rank · (out + in).
    total: instead, this many entries in all targets together, in proportion to their sizes.
    scope: "tensor" ranks the scores of each target by themselves. "model" ranks those of all targets in one list. Then a target
        keeps at least the share `floor` (0 to 1) of its own budget. A target that gets no entry does not train.
    overrides: name pattern -> its own budget, `{"down_proj": 0.02, "layers.0.*": {"rank": 4}}` (docs/masks/budgets.md).
    targets: a list of names of modules or parameters, or suffixes of names; "all-linear", "attention", "mlp" or "auto"; or a
        regular expression (docs/targets.md). Layers of any kind can be targets, and embeddings, experts, norms and biases.
    exclude: names; targets with one of them as a part of their name are left out. layers: numbers of the layers to take, 3 or
        range(4, 12).
    avoid: adapters, or files of adapters. None of their entries trains.
    calibration: batches for masks that need gradients or activations, read into a list. Several batches run more than once if
        the sums of all gradients would take more memory than training does. The model's mode (train or eval) does not change.
    loss_fn(model, batch): by default `model(**batch).loss`. progress(done, total): called after each batch of the calibration.
    seed: seeds the mask, together with each tensor's name.
    method: "values" trains float32 masters of the entries (the paper's Appendix E); "hook" trains the whole weights, and clears
        their gradients off the mask (Appendix D). It takes a copy of the base, and full-size gradients and optimizer state.
    decompose: a rank trains the entries as those of a DoRA of this rank (the paper's SHiRA-WM-DoRA). True trains them as those
        of a DoRA whose direction is free at the mask's positions.
    low_rank: the rank of a low-rank product that trains beside the entries (docs/variants.md).
    whole: modules that train whole, beside the targets and without a mask, and are part of the adapter: a list of names; () for
        none; or "auto", the head of Transformers' classification models, which has new values at each load.
    lr_scale: a step of Adam changes the entries by this much times the learning rate; a power of two. "auto" chooses it so
        that a learning rate that suits LoRA suits the mask (docs/masks/README.md#one-learning-rate). Modules that train whole
        have 1.
    start: an adapter, or a file of one, whose training goes on: its entries train, from its values. The new adapter belongs to
        the same base. Nothing that chooses entries can be given beside it. "auto" for lr_scale is that of the training before,
        or what follows from the share of entries if the file holds none.

    The tuner holds the model until `detach`. If the model is compiled, it holds the original model inside.
    Raises TargetError, MaskError, BaseMismatch or TuningError; DataError for calibration; AdapterError, FormatError, HubError
    or OSError for a file; all before anything in the model has changed.

        tuner = shira.attach(model, mask="snip", density=0.01, calibration=batches)
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=5e-4)
    """
    given = dict(locals())
    density, rank, total, floor, overrides = map(plain_number, (density, rank, total, floor, overrides))
    seed, decompose, low_rank, lr_scale = map(plain_number, (seed, decompose, low_rank, lr_scale))
    model = plain_model(model, TuningError, "shira.attach(model)")
    check_unwrapped(model)
    held = itertools.chain(model.named_parameters(), model.named_buffers())
    lazy = next((name for name, each in held if nn.parameter.is_lazy(each)), None)
    if lazy is not None:
        raise TuningError(f"'{lazy}' is of a lazy module that has not been called yet; run one forward pass, then attach")
    claim(model, "", TuningError)  # this also undoes an attach() or detach() that was interrupted
    check_no_copy(model)
    _check_kinds(mask, seed, overrides, calibration, loss_fn, progress)
    if method not in ("values", "hook"):
        raise TuningError(f"method must be 'values' or 'hook', found {method!r}")
    if start is not None:
        starting.refuse_beside(given, {name: each.default for name, each in inspect.signature(attach).parameters.items()})
        return _going_on(model, starting.read_start(start, model), loss_fn, seed, allowed(lr_scale, "values", False))
    if density is None and rank is None and total is None:
        density = 0.01
    targets, exclude, whole = _names("targets", targets), _names("exclude", exclude), _names("whole", whole)
    exclude = [exclude] if isinstance(exclude, str) else exclude
    layers = _layers(layers)
    chosen = target_names.resolve(model, targets, exclude=exclude, layers=layers)
    whole_targets = target_names.whole_modules(model, whole, exclude=exclude)
    if whole == "auto":
        whole_targets = _unless_meant_otherwise(whole_targets, chosen, targets)
    weights_of_whole = {id(target.weight) for target in whole_targets}
    chosen = [target for target in chosen if id(target.weight) not in weights_of_whole]
    check_trainable(chosen)
    check_trainable(whole_targets)
    if method == "hook" and any(is_sharded(target.weight) for target in (*chosen, *whole_targets)):
        raise TuningError("method='hook' needs whole weights; on sharded ones train with method='values'")
    make, variant = choosing.choose(chosen, mask, method, decompose, low_rank, seed)
    lr_scale = allowed(lr_scale, method, decompose)
    weights = {target.name: target.weight for target in chosen}
    avoided, avoided_names = positions_to_avoid(avoid, model, weights)
    plan = masks.plan(
        {target.name: target.budget_shape for target in chosen},
        density=density,
        rank=rank,
        total=total,
        scope=scope,
        floor=floor,
        overrides=target_names.by_pattern(weights, overrides or {}),
        avoided={name: indices.numel() for name, indices in avoided.items()},
    )
    selector = Selector(mask, seed, {target.name: target.matrix_shape for target in chosen}, avoided, loss_fn)
    label, function = masks.resolve(mask)
    settings: dict[str, Any] = {"name": label, "options": masks.options_of(function) or None, "density": density}
    settings |= {"rank": rank, "total": total, "scope": scope if scope != "tensor" else None, "floor": floor or None}
    settings |= {"overrides": dict(overrides or {}) or None, "avoid": avoided_names or None, "seed": seed, "targets": targets}
    settings |= {"calibration": None, "exclude": exclude or None, "layers": layers, **variant}
    settings |= {"whole": [target.name for target in whole_targets] or None}
    with_share = lr_scale == "auto" and not whole_targets
    select = functools.partial(selector.select, model, weights, plan, calibration, progress, with_share=with_share)
    return _begun(model, chosen, whole_targets, settings, method, make, selector, select, lr_scale)


def _going_on(model: nn.Module, start: Start, loss_fn: LossFn | None, seed: int, lr_scale: float | Literal["auto"]) -> Tuner:
    """Train the entries of an adapter, from its values."""
    names = start.parameters.keys()
    targets = [target for target in target_names.resolve(model, list(names)) if target.name in names]
    check_trainable(targets)
    whole, chosen = ([target for target in targets if (target.name in start.whole) == is_whole] for is_whole in (True, False))
    make, _ = choosing.choose(chosen, "wm", "values", False, None, seed)
    selector = Selector(starting.cannot_move, seed, {target.name: target.matrix_shape for target in chosen}, {}, loss_fn)
    if lr_scale == "auto" and start.lr_scale is not None:
        lr_scale = start.lr_scale
    select = functools.partial(start.select, chosen)
    return _begun(model, chosen, whole, start.settings(), "values", make, selector, select, lr_scale, start)


@torch.inference_mode(False)
def _begun(
    model: nn.Module,
    chosen: list[Target],
    whole_targets: list[Target],
    settings: dict[str, Any],
    method: str,
    make: choosing.Make,
    selector: Selector,
    select: Callable[[Undo], Selected],
    lr_scale: float | Literal["auto"],
    start: Start | None = None,
) -> Tuner:
    """Choose the entries and start training. After an interrupt the caller has no tuner, so the model is restored here."""
    tuner = Tuner(model)
    try:
        try:
            indices, calibrated, share = select(tuner.at_detach)
            scale = lr_scale if lr_scale != "auto" else 1.0 if whole_targets else scale_for(share)
            settings |= {"calibration": calibrated, "lr_scale": scale if scale != 1 else None}
            record = {key: value for key, value in settings.items() if value is not None}
            taken = [target for target in chosen if target.name in indices] + whole_targets
            for target in whole_targets:
                entries = target.weight.numel()
                indices[target.name] = torch.arange(entries, dtype=index_dtype(entries), device=target.weight.device)
            tuner.begin(taken, indices, record, method, selector, make, [target.name for target in whole_targets], scale)
            if start is not None:
                start.give(tuner)
            return tuner
        except BaseException:
            tuner.undo()
            raise
    except BaseException:  # a second interrupt, in undo(): undo again, as the next call does so only for an unfinished tuner
        tuner.undo()
        raise


def _unless_meant_otherwise(head: list[Target], chosen: list[Target], targets: str | Iterable[str]) -> list[Target]:
    """The parameters of a new head that train whole.

    Those of modules named among the targets are left out, since the mask decides on them. None train if the head was frozen
    while other targets were not.
    """
    if not isinstance(targets, str):
        named = {id(use.holder) for target in chosen for use in target.uses}
        head = [target for target in head if not any(id(use.holder) in named for use in target.uses)]
    frozen = all(not target.weight.requires_grad for target in head) and any(target.weight.requires_grad for target in chosen)
    return [] if frozen else head


def _names(option: str, given: Any) -> Any:
    """The given name, or names as a list. Raises TuningError for anything else."""
    if isinstance(given, str):
        return given
    if isinstance(given, nn.Module) or not is_several(given):
        raise TuningError(f'{option} must be names, {option}=["q_proj", "mlp"], found {type(given).__name__} {given!r:.60}')
    names = list(given)
    wrong = next((name for name in names if not isinstance(name, str) or not name), None)
    if wrong is not None:
        kind = type(wrong).__name__
        raise TuningError(f'{option} must be names, {option}=["q_proj", "mlp"], found {kind} {wrong!r:.60} among them')
    return names


def _layers(given: Any) -> list[int] | None:
    layers = [given] if isinstance(plain_number(given), int) else given
    if layers is None:
        return None
    numbers = [plain_number(layer) for layer in layers] if is_several(layers) else []
    if not is_several(layers) or any(isinstance(layer, bool) or not isinstance(layer, int) for layer in numbers):
        raise TuningError(f"layers must be numbers of layers, layers=range(4, 12) or layers=3, found {given!r:.60}")
    return numbers


def _check_kinds(mask: Any, seed: Any, overrides: Any, calibration: Any, loss_fn: Any, progress: Any) -> None:
    """Raise TuningError, with an example of what is expected, for arguments of a wrong type."""
    if not isinstance(mask, str) and not callable(mask):
        raise TuningError(f'mask must be a name or a function, mask="wm", found {type(mask).__name__} {mask!r:.60}')
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TuningError(f"seed must be a whole number, seed=0, found {seed!r:.60}")
    if overrides is not None and not isinstance(overrides, Mapping):
        raise TuningError(f'overrides must be a mapping, overrides={{"down_proj": 0.02}}, found {type(overrides).__name__}')
    for pattern in overrides or ():
        if not isinstance(pattern, str) or not pattern:
            raise TuningError(f'overrides must have names as keys, overrides={{"down_proj": 0.02}}, found {pattern!r:.60}')
    check_arguments(calibration, loss_fn, progress)
