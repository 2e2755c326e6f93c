"""What touches weights, behind one dispatch: `reference` says what is right, the others say it faster.

Switching works on a `Plan`, a flat list of writes over all tensors of a model, so that one launch does it all.
`backend("reference")` forces a backend inside a `with`; the tests run every backend on the same cases.
"""

from torch import Tensor

from .dispatch import BACKENDS, backend, backend_for
from .pattern import Pattern, find_pattern
from .plan import Plan, Write

__all__ = [
    "BACKENDS",
    "Pattern",
    "Plan",
    "Write",
    "backend",
    "diagonal_gradient",
    "find_pattern",
    "gather",
    "overwrite_",
    "restore_",
    "sampled_gradient",
    "swap_",
    "write_",
]


def gather(weight: Tensor, indices: Tensor) -> Tensor:
    """The entries of `weight` at `indices` [k], as a new tensor [k]."""
    values: Tensor = backend_for(weight, indices).gather(weight, indices)
    return values


def overwrite_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """Set the entries of `weight` at `indices` [k] to `values` [k] of its dtype, bit for bit, in place."""
    backend_for(weight, indices, values).overwrite_(weight, indices, values)


def write_(plan: Plan) -> None:
    """Write a plan's values at its positions, bit for bit, in place; its stash stays as it is."""
    backend_for(*(part.weight for part in plan.parts)).write_(plan)


def swap_(plan: Plan) -> None:
    """Keep what lies under a plan in its stash, and write it."""
    backend_for(*(part.weight for part in plan.parts)).swap_(plan)


def restore_(plan: Plan) -> None:
    """Put back what a plan's stash holds, as far as it was begun."""
    backend_for(*(part.weight for part in plan.parts)).restore_(plan)


def sampled_gradient(grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    """(grad_outputᵀ · input) at flat positions; grad_output [tokens, out], input [tokens, in]; float32 [k]."""
    gradient: Tensor = backend_for(grad_output, input, indices).sampled_gradient(grad_output, input, indices)
    return gradient


def diagonal_gradient(grad_output: Tensor, input: Tensor) -> Tensor:
    """The diagonal of (grad_outputᵀ · input); grad_output [tokens, out], input [tokens, in]; float32 [min(out, in)]."""
    gradient: Tensor = backend_for(grad_output, input).diagonal_gradient(grad_output, input)
    return gradient
