"""Warn of targets that do not learn: those that got no gradient, with the reason as far as it is known."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .layers import is_installed
from .masters import Masters

__all__ = ["GradientWatch", "NotTrained", "say"]

SHOWN = 4  # names in a warning


class NotTrained(UserWarning):
    """Weights that were chosen to train do not train."""


def say(messages: Iterable[str]) -> None:
    """Warn (`NotTrained`)."""
    for message in messages:
        warnings.warn(message, NotTrained, stacklevel=3)


class GradientWatch:
    """Looks at the steps of optimizers, and warns once of each target that does not train.

    A module without a forward pass may be an expert without tokens in this batch, so the watch reports it only at the end.
    """

    def __init__(
        self, masters: Mapping[str, Masters], forwards: Mapping[int, Any], modules: Mapping[str, Iterable[nn.Module]]
    ) -> None:
        self._masters, self._forwards, self._modules = masters, forwards, modules
        self._said: set[str] = set()
        self._steps = 0  # steps of optimizers that train these masters, after a backward pass that reached any of them
        self._in_vain = 0  # the same, before any backward pass reached them
        self._others = 0  # steps of other optimizers

    def of_ours(self) -> None:
        """Called after a step of an optimizer that trains these masters."""
        for each in self._masters.values():
            each.had_gradient = each.had_gradient or each.has_gradient()
        if not any(each.had_gradient for each in self._masters.values()):
            self._in_vain += 1
            return
        self._steps += 1
        if self._steps == 1:
            say(self._untrained(name for name, each in self._masters.items() if each.calls and not each.had_gradient))

    def of_another(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Called after a step of an optimizer that trains none of these masters."""
        self._others += 1
        if self._steps or "" in self._said or not any(each.had_gradient for each in self._masters.values()):
            return
        its = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(id(parameter) in its for parameter in model.parameters()):
            self._said.add("")
            warnings.warn(
                f"a step of an optimizer ({type(optimizer).__name__}) that has weights of this model, but none of "
                "tuner.parameters(): nothing trains; make the optimizer after attach(), with tuner.parameters()",
                NotTrained,
                stacklevel=2,
            )

    def at_the_end(self) -> list[str]:
        """What is to be said when an adapter is made or the tuner is detached. Call it before that changes the model."""
        if self._steps or self._in_vain:
            return self._untrained(name for name, each in self._masters.items() if not each.had_gradient)
        if not self._others or "" in self._said or not self._learned_nothing():
            return []
        self._said.add("")
        return [
            f"nothing trained: there were gradients, and {self._others:,} steps of optimizers, but none of one that has "
            "tuner.parameters(); make the optimizer after attach(), with tuner.parameters()"
        ]

    def _learned_nothing(self) -> bool:
        """Whether backward passes gave gradients, and no master has changed since `attach`."""
        found = self._masters.values()
        return any(each.had_gradient for each in found) and all(torch.equal(each.rounded(), each.base) for each in found)

    def _untrained(self, names: Iterable[str]) -> list[str]:
        """A message for each reason why these targets do not train, without those that were named before."""
        reasons: dict[str, list[str]] = {}
        for name in names:
            if name not in self._said:
                self._said.add(name)
                reasons.setdefault(self._reason(name), []).append(name)
        messages = []
        for reason, found in reasons.items():
            shown = ", ".join(repr(name) for name in found[:SHOWN]) + (", …" if len(found) > SHOWN else "")
            messages.append(f"{len(found)} of {len(self._masters)} targets got no gradient and do not train: {shown}; {reason}")
        return messages

    def _reason(self, name: str) -> str:
        each = self._masters[name]
        if not all(is_installed(module, self._forwards.get(id(module))) for module in self._modules[name]):
            return "their modules were given another forward after attach(), as hooks of other libraries do; attach after that"
        if not any(parameter.requires_grad for parameter in each.parameters.values()):
            return "their values are frozen (requires_grad=False)"
        if not each.calls:
            return "their modules were never called: other code reads the weights, or no input came by; leave them out"
        if not each.calls_with_gradients:
            return "they ran without gradients only: under no_grad, or in reentrant checkpoints whose inputs need none"
        return "what they compute does not reach the loss"
