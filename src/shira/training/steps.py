"""Keep weights up to date while a tuner is attached: after optimizer steps, and for state_dict and other libraries."""

import contextlib
import functools
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TuningError
from ..weights import optimizers
from ..weights.distributed import groups_of, is_sharded, reshard
from ..weights.model_tensors import ModuleTree, is_own
from ..weights.random_numbers import same_random_numbers
from ..weights.targets import Target
from ..weights.undo import Undo, hooks_of, set_hook
from .checkpoint_watch import CheckpointWatch
from .following import know_shared_counters, value_name
from .layers import install
from .loaded_states import before_load
from .masters import Masters
from .processes import average_after_backward, check_same_positions
from .untrained import GradientWatch

__all__ = ["Holders", "Training", "ignoring"]

ENCODERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)


class Holders:
    """The modules that hold a tuner's parameters and buffers. While they are in the model, its base is known."""

    def __init__(self, model: nn.Module, chosen: Collection[Target]) -> None:
        holders = {id(use.holder) for target in chosen for use in target.uses}
        self._model = model
        self._held = [(name, module) for name, module in model.named_modules() if id(module) in holders]
        self._tree = ModuleTree(model)

    def check(self) -> None:
        """Raise TuningError unless all these modules are still somewhere in the model."""
        if self._tree.same():
            return
        inside = {id(module) for module in self._model.modules()}
        gone = next((name for name, module in self._held if id(module) not in inside), None)
        if gone is not None:
            raise TuningError(
                f"the module '{gone}' was replaced or taken out while a tuner is attached, and its base with it; put it back, "
                "or call tuner.release(), which detaches and leaves the weights as they are"
            )


class Training:
    """Lets modules compute with masters, and writes the masters to the weights after each step of an optimizer, until `undo`.

    check: called before a step; raises an error if modules are gone (`Holders.check`). watch: warns of untrained targets.
    """

    def __init__(
        self,
        model: nn.Module,
        chosen: Collection[Target],
        masters: Mapping[str, Masters],
        undo: Undo,
        check: Callable[[], None],
    ) -> None:
        self._masters, self._check, self._model = masters, check, model
        know_shared_counters(masters.values())
        install(((use, masters[target.name]) for target in chosen for use in target.uses), undo)
        forwards = {id(use.module): use.module.__dict__["forward"] for target in chosen for use in target.uses}
        ours = {id(parameter) for each in masters.values() for parameter in each.parameters.values()}
        self._base: dict[int, tuple[str, weakref.ref[nn.Module], str]] = {}  # id of a parameter -> its name, module and key
        for prefix, module in model.named_modules():  # torch cannot swap a parameter to which there is a weak reference
            for key, parameter in module._parameters.items():
                if id(parameter) not in ours:
                    self._base.setdefault(id(parameter), (f"{prefix}.{key}".lstrip("."), weakref.ref(module), key))
        self.watch = GradientWatch(masters, forwards, {target.name: target.modules for target in chosen})
        _leave_out(model, chosen, masters, undo)
        computing = {id(use.module) for target in chosen for use in target.uses}
        for part in model.modules():
            if isinstance(part, ENCODERS) and any(id(below) in computing for below in part.modules()):
                _leave_fast_path(part, undo)
        undo.callback(optimizers.unsubscribe, self)
        optimizers.subscribe(self)
        self._unchecked = [True]
        pieces = [each for each in masters.values() if each.piece is not None]
        if not pieces:
            positions = functools.partial(_positions, list(masters.values()))
            check_same_positions(model, positions, self._unchecked, undo)
            return
        held = [weakref.ref(each) for each in model.parameters() if is_sharded(each)]  # torch casts and moves no such parameter
        undo.callback(held.clear)
        undo.callback(reshard, model)
        parameters = [parameter for each in masters.values() for parameter in each.parameters.values()]
        average_after_backward(parameters, groups_of(pieces[0].weight), undo)
        first = functools.partial(model.register_forward_pre_hook, prepend=True)  # before fully_shard's own, which gathers
        set_hook(undo, hooks_of(model, "_forward_pre_hooks"), first, functools.partial(_write_pieces, pieces))

    def positions_moved(self) -> None:
        """To be called when the positions that train were selected again."""
        self._unchecked.append(True)

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before a step. Raises what `check` and `Masters.look` raise, before masters change that cannot be written.

        Raises TuningError if the step would change the base.
        """
        self._check_base(optimizer)
        stepped = self._stepped(optimizer)
        if stepped:
            self._check()
        for each in stepped:
            each.look()

    def _check_base(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            parameter: nn.Parameter
            for parameter in group["params"]:
                if parameter.grad is None or id(parameter) not in self._base:
                    continue
                name, holder, key = self._base[id(parameter)]
                if (module := holder()) is None or module._parameters.get(key) is not parameter:
                    continue  # others have added it later
                if parameter.requires_grad:
                    found = "trains, since requires_grad was turned on after attach()"
                    remedy = (
                        "turn it off, or attach with it among the targets or in whole=[…]; add PEFT's layers after attach()"
                    )
                else:
                    found = "has a gradient from before attach()"
                    remedy = "call zero_grad(set_to_none=True) first, or make the optimizer with tuner.parameters()"
                raise TuningError(
                    f"'{name}' {found}: this step of {type(optimizer).__name__} would change the base, which detach() "
                    f"could not restore; {remedy}"
                )

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after a step. Writes the masters that the optimizer trains."""
        stepped = self._stepped(optimizer)
        for each in stepped:
            each.write_step()
        if any(each.piece is not None for each in self._masters.values()):
            reshard(self._model)
        if stepped:
            self.watch.of_ours()
        else:
            self.watch.of_another(optimizer, self._model)

    def _stepped(self, optimizer: torch.optim.Optimizer) -> list[Masters]:
        """The masters that an optimizer trains."""
        its = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        found = self._masters.values()
        return [each for each in found if any(id(p) in its for p in each.parameters.values()) and not each.detached]


def _leave_fast_path(encoder: Any, undo: Undo) -> None:
    """Let torch call the modules of an encoder, until `undo`. Its fast path reads their weights, and calls none of them.

    A layer with a hook does not take it. Nor may the encoder make nested tensors then, which only the fast path understands.
    """
    if isinstance(encoder, nn.TransformerEncoderLayer):
        set_hook(undo, hooks_of(encoder, "_forward_pre_hooks"), encoder.register_forward_pre_hook, _nothing)
    else:
        undo.callback(setattr, encoder, "use_nested_tensor", encoder.use_nested_tensor)
        encoder.use_nested_tensor = False


def _nothing(*_: Any) -> None:
    """A hook."""


def _positions(masters: list[Masters]) -> Iterator[Tensor]:
    return (each.indices for each in masters)


def _write_pieces(pieces: list[Masters], module: nn.Module, _inputs: Any) -> None:
    """Before a forward pass: write masters to sharded weights."""
    changed = any(each.version != each.written for each in pieces)
    for each in pieces:
        each.write()
    if changed:  # by other code: after an optimizer's step, `after` has already written and resharded
        reshard(module)


def _leave_out(model: nn.Module, chosen: Collection[Target], masters: Mapping[str, Masters], undo: Undo) -> None:
    """Prepare the model for state_dict, save_pretrained and DDP, until `undo`.

    Saving a state_dict writes the masters to the weights first. Loading one checks it (`before_load`). Transformers'
    save_pretrained leaves out the masters. DDP leaves out the tuner's buffers; otherwise it would send copies of the base to
    all processes in each step.
    """
    check = functools.partial(before_load, list(masters.values()))
    holders = {id(use.holder): use.holder for target in chosen for use in target.uses}
    for module in (holders | {id(model): model}).values():
        set_hook(undo, hooks_of(module, "_load_state_dict_pre_hooks"), module.register_load_state_dict_pre_hook, check)
    write = functools.partial(_write_all, list(masters.values()))
    set_hook(undo, hooks_of(model, "_state_dict_pre_hooks"), model.register_state_dict_pre_hook, write)
    entries = sum(each.indices.numel() for each in masters.values())
    watch = CheckpointWatch(entries, low_rank=any(each.low_rank is not None for each in masters.values()))
    set_hook(undo, hooks_of(model, "_state_dict_pre_hooks"), model.register_state_dict_pre_hook, watch)
    names = {id(module): name for name, module in model.named_modules()}
    saved = [
        f"{names[id(use.holder)]}.{value_name(use.attribute)}{ending}".lstrip(".")
        for target in chosen
        for use in target.uses
        for ending in masters[target.name].parameters
    ]
    sent = [name for name, _ in model.named_buffers() if is_own(name.rpartition(".")[2])]
    for attribute, own in (("_keys_to_ignore_on_save", saved), ("_ddp_params_and_buffers_to_ignore", sent)):
        if attribute.startswith("_keys") and not hasattr(model, attribute):
            continue
        there, before = attribute in model.__dict__, getattr(model, attribute, None)
        undo.callback(_reset_attribute, model, attribute, there, before)
        model.__dict__[attribute] = type(before or [])([*(before or ()), *own])


def _write_all(masters: list[Masters], _module: nn.Module, _prefix: str, _keep_vars: bool) -> None:
    for each in masters:
        if not (each.ignored or each.detached or each.piece is not None):
            each.may_have_stepped = True  # `parameter.data.copy_()` changes masters without any sign
            each.write()


def _reset_attribute(model: nn.Module, attribute: str, there: bool, before: Any) -> None:
    if there:
        model.__dict__[attribute] = before
    else:
        model.__dict__.pop(attribute, None)


@contextlib.contextmanager
def ignoring(masters: Collection[Masters], undo: Undo) -> Iterator[Undo]:
    """Inside, layers compute with their whole weights, which are up to date and can get gradients.

    Yields an Undo for further steps, which run at the end. Torch's random numbers stay as before.
    """
    for each in masters:
        each.write()
    with undo.inner() as steps, same_random_numbers(each.weight for each in masters):
        steps.callback(_set_ignored, masters, False)
        _set_ignored(masters, True)
        yield steps


def _set_ignored(masters: Collection[Masters], ignored: bool) -> None:
    for each in masters:
        each.ignored = ignored
