"""While a tuner is attached, optimizers, state_dict and other libraries find the weights up to date."""

import contextlib
import functools
import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import optimizer as optimizers

from .calibration import same_random_numbers
from .distributed import reshard
from .following import value_name
from .masters import Masters
from .model_tensors import OWN
from .targets import Target
from .undoing import Undo, hooks_of, set_hook
from .untrained import Watch

__all__ = ["Training", "computing_dense", "leave_out", "write_pieces_before"]


class Training:
    """Lets every optimizer of torch write what it has stepped on into the weights, until `undo`."""

    def __init__(self, model: nn.Module, masters: Mapping[str, Masters], watch: Watch, undo: Undo) -> None:
        self._masters, self._watch = masters, watch
        self._model = model
        # torch holds these hooks, for all optimizers: they must not hold the model, which may be dropped without detach()
        for kind, register, hook in (
            ("_global_optimizer_pre_hooks", optimizers.register_optimizer_step_pre_hook, _before),
            ("_global_optimizer_post_hooks", optimizers.register_optimizer_step_post_hook, _after),
        ):
            gone = undo.part()
            undo.callback(weakref.finalize(model, gone.close).detach)
            set_hook(gone, functools.partial(getattr, optimizers, kind), register, functools.partial(hook, weakref.ref(self)))

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise what `Masters.look` raises, before a step is taken on what cannot be written."""
        for each in self._stepped(optimizer):
            each.look()

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """Write what was stepped on."""
        stepped = self._stepped(optimizer)
        for each in stepped:
            each.write_step()
        if any(each.piece is not None for each in self._masters.values()):
            reshard(self._model)
        if stepped:
            self._watch.of_ours()
        else:
            self._watch.of_another(optimizer, self._model)

    def _stepped(self, optimizer: torch.optim.Optimizer) -> list[Masters]:
        """The masters that an optimizer trains."""
        its = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        found = self._masters.values()
        return [each for each in found if any(id(p) in its for p in each.parameters().values()) and not each.over]


def _before(reference: "weakref.ref[Training]", optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    training = reference()
    if training is not None:
        training.before(optimizer)


def _after(reference: "weakref.ref[Training]", optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    training = reference()
    if training is not None:
        training.after(optimizer)


def write_pieces_before(model: nn.Module, pieces: list[Masters], undo: Undo) -> None:
    """Before each forward pass bring sharded weights up to date; before fully_shard's own hook, which gathers them."""
    register = functools.partial(model.register_forward_pre_hook, prepend=True)
    set_hook(undo, hooks_of(model, "_forward_pre_hooks"), register, functools.partial(_write_pieces, pieces))


def _write_pieces(pieces: list[Masters], module: nn.Module, _inputs: Any) -> None:
    changed = any(each.version != each.written for each in pieces)
    for each in pieces:
        each.write()
    if changed:  # not by an optimizer's step
        reshard(module)


def leave_out(model: nn.Module, chosen: Collection[Target], masters: Mapping[str, Masters], undo: Undo) -> None:
    """Let a state_dict have weights that are up to date; and keep what modules hold for the tuner out of Transformers'
    save_pretrained, and out of DDP's hands, which would send copies of the base to all processes in each step."""
    write = functools.partial(_write_all, list(masters.values()))
    set_hook(undo, hooks_of(model, "_state_dict_pre_hooks"), model.register_state_dict_pre_hook, write)
    names = {id(module): name for name, module in model.named_modules()}
    saved = [
        f"{names[id(use.holder)]}.{value_name(use.attribute)}{ending}".lstrip(".")
        for target in chosen
        for use in target.uses
        for ending in masters[target.name].parameters()
    ]
    sent = [name for name, _ in model.named_buffers() if f".{OWN}" in f".{name}"]
    for attribute, own in (("_keys_to_ignore_on_save", saved), ("_ddp_params_and_buffers_to_ignore", sent)):
        if attribute.startswith("_keys") and not hasattr(model, attribute):
            continue
        there, before = attribute in model.__dict__, getattr(model, attribute, None)
        undo.callback(_reset_attribute, model, attribute, there, before)
        model.__dict__[attribute] = type(before or [])([*(before or ()), *own])


def _write_all(masters: list[Masters], _module: nn.Module, _prefix: str, _keep_vars: bool) -> None:
    for each in masters:
        if not (each.dense or each.over or each.piece is not None):
            each.write()


def _reset_attribute(model: nn.Module, attribute: str, there: bool, before: Any) -> None:
    if there:
        model.__dict__[attribute] = before
    else:
        model.__dict__.pop(attribute, None)


@contextlib.contextmanager
def computing_dense(masters: Collection[Masters], undo: Undo) -> Iterator[Undo]:
    """Let the layers compute with their whole weights, up to date, which then have gradients; keep the random numbers."""
    for each in masters:
        each.write()
    with undo.part() as steps, same_random_numbers(each.weight for each in masters):
        steps.callback(_set_dense, masters, False)
        _set_dense(masters, True)
        yield steps


def _set_dense(masters: Collection[Masters], dense: bool) -> None:
    for each in masters:
        each.dense = dense
