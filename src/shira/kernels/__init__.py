"""Every kernel that touches weights, behind one dispatch. `reference` defines the results; the other backends are faster.

A switch runs a `WritePlan`: a flat list of writes over all tensors of a model, so that one launch runs all of them. On the CPU
the backend is native.c. On a GPU it is Triton, which is imported when the first tensor on a GPU arrives. Where these are
missing, torch's operators run.
`backend("reference")` forces a backend inside a `with`. The tests run every backend on the same cases.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import custom_ops, reference, torch_ops
from .backends import BACKENDS, backend, backend_for, backend_of
from .compressed_rows import times
from .cpu import images, native
from .gpu import ops as gpu
from .gpu.host_memory import Waiting, arrived
from .plan import (
    Combination,
    Combined,
    Contribution,
    Sum,
    UnitedPositions,
    WeightChanged,
    WeightMemory,
    Write,
    WritePlan,
    same_bits,
)
from .rows import Group, RowChange, RowPositions, check_groups, row_change, row_positions
from .sliding import Sliding
from .whole_lines import WholeLines, find_whole_lines

__all__ = [
    "BACKENDS",
    "Combination",
    "Combined",
    "Contribution",
    "Group",
    "RowChange",
    "RowPositions",
    "Sliding",
    "Sum",
    "UnitedPositions",
    "Waiting",
    "WeightChanged",
    "WeightMemory",
    "WholeLines",
    "Write",
    "WritePlan",
    "add_products_",
    "arrived",
    "backend",
    "change_",
    "combine",
    "combine_all",
    "find_whole_lines",
    "gather",
    "gradient_of_rows",
    "overwrite_",
    "prepare",
    "restore_",
    "row_change",
    "row_positions",
    "row_products",
    "same_bits",
    "sampled_gradient",
    "sampled_images",
    "samples_images",
    "swap_",
    "takes_gaps",
    "unite",
    "write_",
    "write_sums_",
    "writes_sums",
]


def gather(weight: Tensor, indices: Tensor) -> Tensor:
    """The entries of `weight`, in any layout in memory, at `indices` [k], as a new tensor [k]."""
    if not weight.is_contiguous():
        return weight.detach()[torch.unravel_index(indices.long(), weight.shape)]
    place = custom_ops if torch.compiler.is_compiling() else backend_for(weight, indices)
    values: Tensor = place.gather(weight, indices)
    return values


def overwrite_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """Set the entries of `weight` at `indices` [k] to `values` [k] of its dtype, bit for bit, in place."""
    backend_for(weight, indices, values).overwrite_(weight, indices, values)


def write_(plan: WritePlan, over: WritePlan) -> None:
    """Replace the values of an active plan by those of a plan with the same positions, bit for bit, in place.

    plan: the new values. over: the active plan. The stash does not change.
    Raises WeightChanged, before anything is written, if a weight was cast, moved or replaced, or does not hold the values of
    `over`. C compares a few values of each weight, Triton compares none.
    """
    plan.check()
    backend_of(plan).write_(plan, over)


def swap_(plan: WritePlan) -> None:
    """Copy the old values of a plan's entries to its stash, then write the plan.

    Raises WeightChanged, before anything is written, if a weight was cast, moved or replaced since the plan was made.
    """
    plan.check()
    backend_of(plan).swap_(plan)


def restore_(plan: WritePlan, *, check: bool = True) -> None:
    """Write a plan's stash back to the weights, for the writes that were begun.

    Raises WeightChanged, before anything is written, if a weight was cast, moved or replaced, or, with `check`, no longer holds
    the plan's values. C compares a few values of each weight, Triton compares none.
    """
    plan.check()
    backend_of(plan).restore_(plan, check=check)


def change_(leaving: WritePlan, coming: WritePlan) -> None:
    """`restore_` an active plan, then `swap_` another; in one launch where the backend can.

    After an interruption at any point, `restore_` of the coming plan and then of the leaving plan gives the base.
    """
    leaving.check()
    coming.check()
    if leaving.begun[0] and coming.writes and _on_triton(leaving) and _on_triton(coming):
        return gpu.change_(leaving, coming)
    _restore_begun(leaving)
    if coming.writes:
        backend_of(coming).swap_(coming)


def _on_triton(plan: WritePlan) -> bool:
    return backend_of(plan) is gpu


def _restore_begun(plan: WritePlan) -> None:
    if plan.begun[0]:
        backend_of(plan).restore_(plan, check=True)
        plan.begun[0] = 0


def writes_sums(*weights: Tensor) -> bool:
    """Whether one launch can compute sums for these weights and write them: see `write_sums_`."""
    return backend_for(*weights) is gpu and all(weight.dtype in gpu.KINDS for weight in weights)


def write_sums_(plan: WritePlan, leaving: WritePlan | None = None) -> bool:
    """Compute a plan's sums, which become its values, and `swap_` it; or `change_` to it from `leaving`, if that is active.

    Returns whether all sums are finite. If not, the caller must restore the plan.
    """
    plan.check()
    if leaving is not None:
        leaving.check()
    on_triton = writes_sums(*(write.weight for write in plan.writes))
    together = on_triton and leaving is not None and bool(leaving.begun[0]) and _on_triton(leaving)
    if leaving is not None and not together:
        _restore_begun(leaving)
    return gpu.write_sums_(plan, leaving if together else None) if on_triton else reference.write_sums_(plan)


def prepare(plan: WritePlan) -> None:
    """Build now the tables of addresses that the first launch of a plan needs."""
    if plan.writes and _on_triton(plan):
        gpu.prepare(plan)


def unite(runs: Sequence[Tensor]) -> UnitedPositions:
    """The union of the positions of several tensors. runs: one or more, each [k], sorted and unique, int32 or int64."""
    union: UnitedPositions = backend_for(*runs).unite(runs)
    return union


def combine(
    weight: Tensor | None, changes: Sequence[Contribution], dtype: torch.dtype, method: str, numel: int
) -> Combined | None:
    """`combine_all` for one tensor."""
    return combine_all([Combination(weight, changes, dtype, method, numel)])[0]


def combine_all(combinations: Sequence[Combination], *, with_base: bool = True) -> list[Combined | None]:
    """Several adapters' changes to tensors, combined: see `Combination`.

    with_base: whether the results need `base` and `under`. They are empty without it, or without a weight.
    None stands for a case that no kernel supports, and for gaps that are invalid. The caller then computes the result as
    `fusion.combining.combine` defines it.
    """
    numbers = [number for number, each in enumerate(combinations) if backend_for(*each.tensors()) is native]
    found: list[Combined | None] = [None] * len(combinations)
    if numbers:
        results = native.combine_all([combinations[number] for number in numbers], with_base=with_base)
        for number, result in zip(numbers, results, strict=True):
            found[number] = result
    return found


def takes_gaps(weight: Tensor | None, entries: int) -> bool:
    """Whether `combine` should get gaps instead of positions. entries: of all changes together."""
    return backend_for(*(() if weight is None else (weight,))) is native and native.takes_gaps(weight, entries)


def sampled_gradient(grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    """The weight gradient of a linear layer at some positions: (grad_outputᵀ · input) there, float32 [k].

    grad_output: [tokens, out]; input: [tokens, in]; indices: [k], flat in [out, in].
    """
    place = custom_ops if torch.compiler.is_compiling() else backend_for(grad_output, input, indices)
    gradient: Tensor = place.sampled_gradient(grad_output, input, indices)
    return gradient


def samples_images(grad_output: Tensor, input: Tensor, positions: int, sliding: Sliding) -> bool:
    """Whether `sampled_images` is faster than the whole gradient of a convolution's weight with so many positions."""
    if torch.compiler.is_compiling() or backend_for(grad_output, input) is not native:
        return False
    return images.sampling_wins(grad_output, input, positions, sliding)


def sampled_images(grad_output: Tensor, input: Tensor, indices: Tensor, sliding: Sliding) -> Tensor:
    """The weight gradient of a two-dimensional convolution at some positions, float32 [k].

    grad_output: [images, out, lines, columns]; input: [images, in, lines, columns]; indices: [k], sorted, flat in
    [out, in, *sliding.kernel].
    """
    in_c = backend_for(grad_output, input, indices) is native and images.takes(grad_output, input)
    gradient: Tensor = (images if in_c else reference).sampled_images(grad_output, input, indices, sliding)
    return gradient


def gradient_of_rows(rows: Tensor, gradients: Tensor, indices: Tensor) -> Tensor:
    """The weight gradient of an embedding [..., columns] at some positions, float32 [k]: 0 in rows that no token looked up.

    rows: int64 [tokens], the row that each token looked up. A row may occur several times; its gradients are added.
    gradients: float32 [tokens, columns]. indices: [k], flat.
    Rows that do not occur take no memory.
    """
    place = custom_ops if torch.compiler.is_compiling() else torch_ops
    gradient: Tensor = place.gradient_of_rows(rows, gradients, indices)
    return gradient


def add_products_(output: Tensor, input: Tensor, groups: Sequence[Group]) -> None:
    """Add the products of several adapters to a linear layer's output, each for its own rows, in place.

    output: [..., out], contiguous; input: [..., in], of the same leading dimensions and device; both floating point. Rows are
    counted over all leading dimensions.
    groups: (first, end, change) for the rows first to end - 1, in order and without overlap; changes from `row_change`.
    To these rows `input · changeᵀ` is added: the products are summed in float32 (float64 for a float64 output), in any order,
    added to the output, and rounded once to its dtype. Other rows are not touched. No gradient passes through.
    Raises IndexError for arguments that do not fit each other, and AdapterError for a change that was written to, before
    anything is written.
    """
    groups = tuple(groups)  # the same ones until C is done with their memory, whatever another thread does to a list
    check_groups(output, input, groups)
    if output.untyped_storage().data_ptr() == input.untyped_storage().data_ptr():
        input = input.clone()  # the products are those of the input as it was
    if output.ndim != 2:
        rows = output.shape[:-1].numel()
        output, input = output.detach().view(rows, output.shape[-1]), input.detach().reshape(rows, input.shape[-1])
    backend_for(output).add_products_(output, input, groups)


def row_products(input: Tensor, positions: RowPositions, values: Tensor) -> Tensor:
    """input · Sᵀ, [tokens, out] in the dtype of the values. No gradient passes through.

    input: [tokens, in]. positions: those of S [out, in]; values: [k], float32 or float64, S's entries there.
    Raises IndexError for arguments that do not fit each other, and AdapterError for positions that were written to.
    """
    positions.check()
    fits = input.ndim == 2 and input.shape[1] == positions.shape[1] and values.shape == positions.columns.shape
    fits = fits and input.device == values.device == positions.device and values.dtype in (torch.float32, torch.float64)
    if not fits or not input.is_floating_point():
        raise IndexError(
            f"an input {list(input.shape)}, {input.dtype} on {input.device} and {list(values.shape)} values, {values.dtype} on "
            f"{values.device}, for {positions.columns.numel()} positions in {list(positions.shape)} on {positions.device}"
        )
    plain = type(input) is Tensor and values.dtype == torch.float32 and input.dtype in (torch.float32, torch.bfloat16)
    if plain and backend_for(input, values) is native:
        return native.row_products(input, positions, values)
    with torch.no_grad():
        return times(positions.starts, positions.columns, values, positions.shape, input)
