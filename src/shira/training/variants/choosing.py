"""Choose the kind of masters for each target: plain ones, or those of the requested variant."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ...errors import MaskError, TargetError, TuningError
from ...masks import Mask, needs, resolve
from ...sparse.positions import seed_of
from ...texts import shown
from ...weights.distributed import is_sharded
from ...weights.quantized import dtype_label, is_quantized
from ...weights.targets import Target, is_conv1d
from ..masters import Masters, Plain
from .decomposed import Decomposed
from .deltas import Deltas
from .hybrid import Hybrid

__all__ = ["Make", "choose"]

Make = Callable[[Target, Tensor, float], Masters]  # (target, its positions, lr_scale) -> its masters


def choose(
    targets: Iterable[Target], mask: str | Mask, method: str, decompose: bool | int, low_rank: int | None, seed: int
) -> tuple[Make, dict[str, Any]]:
    """A function that makes the masters for a target and its positions, and the variant's entries for the metadata.

    Raises TuningError for options that exclude each other or are not a rank. Raises TargetError or MaskError for a target that
    does not support them or the mask.
    """
    targets = list(targets)
    chosen = {"decompose": None if decompose is False else decompose, "low_rank": low_rank}
    record = {key: value for key, value in chosen.items() if value is not None}
    if len(record) > 1:
        raise TuningError("decompose and low_rank cannot be combined; choose one")
    for option, rank in record.items():
        free = option == "decompose" and rank is True
        if not free and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise TuningError(f"{option} must be a rank, a whole number from 1 on, found {shown(rank)}")
        largest = max((max(target.matrix_shape) for target in targets), default=rank)
        if rank > largest:
            raise TuningError(
                f"{option} must be a rank, at most {largest:,}, the largest side of a target; found {shown(rank)}"
            )
        if method == "hook":
            raise TuningError(f"{option} needs method='values': with it, not the weights train")
    _check_quantized([target for target in targets if is_quantized(target.weight)], mask, method, record)
    sharded = next((target.name for target in targets if is_sharded(target.weight)), None)
    if sharded is not None and record:
        raise TargetError(f"'{sharded}' is sharded, and {', '.join(record)} needs whole weights; train with DDP instead")
    if low_rank is not None:
        for target in targets:
            for use in target.uses:
                if use.attribute != "weight" or use.holder is not use.module or not _is_linear(use.module):
                    raise TargetError(
                        f"low_rank is for linear layers alone, and '{target.name}' is used by a {type(use.module).__name__}; "
                        "leave it out of the targets"
                    )

    names = {target.name for target in targets}

    def make(target: Target, indices: Tensor, scale: float) -> Masters:
        seeded = seed_of(seed, f"{target.name}\nfactors")
        if target.name not in names:  # a target that trains whole, without a variant
            return Plain(target, indices)
        if is_quantized(target.weight):
            return Deltas(target, indices, scale)
        if low_rank is not None:
            return Hybrid(target, indices, low_rank, seeded, scale)
        if decompose is False or target.matrix_shape[1] == 1:  # a vector has no direction
            return Plain(target, indices, scale)
        return Decomposed(target, indices, None if decompose is True else decompose, seeded)

    return make, record


def _check_quantized(quantized: list[Target], mask: str | Mask, method: str, record: Mapping[str, Any]) -> None:
    """Raise an error unless deltas can train beside these quantized targets, with this mask, method and variant (record)."""
    if not quantized:
        return
    first = f"'{quantized[0].name}' is {dtype_label(quantized[0].weight)}"
    for option in record:
        raise TargetError(f"{first}, and {option} needs weights that are not quantized; leave it out, or load a plain base")
    if method == "hook":
        raise TuningError(f"{first}: a quantized weight has no gradient, it needs method='values'")
    if any("gradient" in need for need in needs(resolve(mask)[1])):
        raise MaskError(
            f"{first}: a quantized weight has no gradient for this mask; take wm, wanda, rand or struct, or choose on the "
            "plain base and take its positions: functools.partial(shira.masks.from_adapter, adapter=…)"
        )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)
