"""Check that targets can train: their entries must be writable in place, and not only some targets may be frozen."""

from collections.abc import Iterable

from torch import nn

from ..errors import TargetError
from ..sparse.memory_order import is_in_order
from ..sparse.tensor import FLOAT_DTYPES, dtype_name, has_memory, is_dense
from ..weights.distributed import check_pieces, is_sharded
from ..weights.model_tensors import OFFLOADED
from ..weights.quantized import dtype_label, is_quantized, is_wrapper
from ..weights.targets import Target

__all__ = ["check_trainable"]


def check_trainable(targets: Iterable[Target]) -> None:
    """Raise TargetError, which names the target, if its entries cannot be overwritten, or if only some targets are frozen.

    Quantized weights of linear layers pass: deltas train beside them.
    """
    targets = list(targets)
    for target in targets:
        weight = target.weight
        if is_quantized(weight):
            other = next((use.module for use in target.uses if not isinstance(use.module, nn.Linear)), None)
            if other is not None:
                raise TargetError(
                    f"'{target.name}' is {dtype_label(weight)} and used by a {type(other).__name__}; of quantized weights only "
                    "those of linear layers can be trained, leave it out of the targets"
                )
            continue
        if is_sharded(weight):
            check_pieces(target.name, weight)
        if is_wrapper(weight):
            raise TargetError(
                f"'{target.name}' must be a plain tensor, found a {type(weight).__name__}, which consists of other tensors; "
                "leave it out of the targets, or load plain weights"
            )
        if weight.is_inference():
            raise TargetError(f"'{target.name}' was made under torch.inference_mode; load the model outside of it")
        if not is_dense(weight):
            raise TargetError(
                f"'{target.name}' must be a dense tensor, not a sparse, nested or negated one, found {weight.layout}; "
                "replace it by a dense one, or leave it out of the targets"
            )
        if weight.dtype not in FLOAT_DTYPES or weight.is_meta or not is_in_order(weight):
            more = "" if is_in_order(weight) else f", not contiguous: strides {list(weight.stride())}; use its contiguous()"
            more = f", without data; {OFFLOADED}" if weight.is_meta else more
            raise TargetError(
                f"'{target.name}' must be contiguous, or contiguous but for the order of its dimensions, with data, and one of "
                f"{', '.join(map(dtype_name, FLOAT_DTYPES))}; found {weight.dtype} on {weight.device}{more}"
            )
        if not is_sharded(weight) and not has_memory(weight):
            raise TargetError(f"the memory of '{target.name}' was freed; load the model again")
    plain = [target for target in targets if not is_quantized(target.weight)]
    frozen = [target.name for target in plain if not target.weight.requires_grad]
    if 0 < len(frozen) < len(plain):  # freezing all is usual for a base; freezing some is a choice that attach() would undo
        raise TargetError(
            f"{len(frozen)} of {len(plain)} targets were frozen (requires_grad=False), the first is '{frozen[0]}'; exclude "
            "them, or unfreeze them before attach()"
        )
