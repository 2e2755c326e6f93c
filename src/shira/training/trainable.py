"""Which weights entries can be trained in: those that can be overwritten where they are, and that nobody has frozen alone; and
what is known of their model."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import TargetError
from ..weights.distributed import check_pieces, is_sharded
from ..weights.quantized import is_quantized, label
from ..weights.targets import Target

__all__ = ["check_trainable", "describe_base"]


def check_trainable(targets: Iterable[Target]) -> None:
    """Raise TargetError, with its name, for a weight whose entries cannot be overwritten, or that alone was frozen.

    Quantized weights of linear layers pass: deltas train beside them.
    """
    targets = list(targets)
    for target in targets:
        weight = target.weight
        if is_quantized(weight):
            other = next((use.module for use in target.uses if not isinstance(use.module, nn.Linear)), None)
            if other is not None:
                raise TargetError(
                    f"'{target.name}' is {label(weight)} and used by a {type(other).__name__}; of quantized weights only those "
                    "of linear layers can be trained, leave it out of the targets"
                )
            continue
        if is_sharded(weight):
            check_pieces(target.name, weight)
        if weight.is_inference():
            raise TargetError(f"'{target.name}' was made under torch.inference_mode; load the model outside of it")
        if not weight.is_floating_point() or weight.is_meta or not weight.is_contiguous():
            raise TargetError(
                f"'{target.name}' must be a contiguous floating-point tensor with data, found {weight.dtype} on "
                f"{weight.device}{'' if weight.is_contiguous() else ', not contiguous'}"
            )
    plain = [target for target in targets if not is_quantized(target.weight)]
    frozen = [target.name for target in plain if not target.weight.requires_grad]
    if 0 < len(frozen) < len(plain):  # who freezes the whole model means the base; who freezes a part of it means it
        raise TargetError(
            f"{len(frozen)} of {len(plain)} targets were frozen (requires_grad=False), the first is '{frozen[0]}'; exclude "
            "them, or unfreeze them before attach()"
        )


def describe_base(model: nn.Module, chosen: list[Target]) -> dict[str, Any]:
    """What is known of the base model: its id (of a local folder just the name) and the dtype of the adapted weights."""
    identity = str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
    if Path(identity).exists():
        identity = Path(identity).resolve().name
    dtypes = sorted({label(target.weight) for target in chosen})
    return {"id": identity, "dtype": dtypes[0] if len(dtypes) == 1 else dtypes}
