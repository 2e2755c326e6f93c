"""Our masks for PEFT's `ShiraConfig`, which has one of its own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import masks
from ..adapter import Adapter
from ..errors import MaskError
from ..masks.catalogue import Mask
from ..texts import shown
from ..weights.model_tensors import plain_model

__all__ = ["mask_fn"]


def mask_fn(model: nn.Module, mask: str | Mask | Adapter, *, seed: int = 0) -> Callable[..., Tensor]:
    """A mask of ours, for PEFT's `ShiraConfig`: set `config.mask_fn` to it before `get_peft_model`.

    model: the model that PEFT will adapt, before it does.
    mask: the name of a mask that needs no calibration ("wm", "rand", "lift"), a function as in `shira.masks`, or an adapter
        with the positions. `shira.attach(model, mask="snip", rank=r, …).adapter()` is one; rank is what PEFT calls r.
    Raises MaskError, also when PEFT calls it, for a mask that does not return r · (out + in) positions.

        config = peft.ShiraConfig(r=8, mask_type="wm", target_modules=["q_proj", "v_proj"])
        config.mask_fn = shira.integrations.peft_masks.mask_fn(model, "wm")
    """
    plain = plain_model(model, MaskError, "mask_fn(model, 'wm')")
    names = {module: f"{name}.weight" for name, module in plain.named_modules()}
    if not isinstance(mask, Adapter):
        calibrated = [need for need in masks.needs(masks.resolve(mask)[1]) if need in masks.CALIBRATED]
        if calibrated:
            raise MaskError(
                f"mask {masks.resolve(mask)[0]!r} needs calibration ({', '.join(calibrated)}): make an adapter with "
                "shira.attach(model, mask=…, rank=r, calibration=…).adapter(), and pass that"
            )

    def positions(base_layer: nn.Module, r: int, **_: Any) -> Tensor:
        name = names.get(base_layer, "")
        weight: Any = base_layer.weight  # of nn.Linear, the only layer that PEFT's SHiRA adapts
        count = r * (weight.shape[0] + weight.shape[1])
        if not name:
            raise MaskError(
                f"a layer that is not in the model was given to the mask: {shown(str(base_layer))}; pass that model"
            )
        if isinstance(mask, Adapter):
            mask.check()
            empty = torch.empty(0, dtype=torch.int64, device="cpu")
            found = mask.tensors[name].indices.long() if name in mask.tensors else empty
        else:
            found = masks.select(mask, name, weight.detach(), min(count, weight.numel()), seed=seed)
        if found.numel() != count:
            raise MaskError(
                f"PEFT wants r · (out + in) = {count} positions of '{name}', found {found.numel()}; use a mask that gives the "
                "whole budget, such as 'wm', or an adapter that was attached with rank=r"
            )
        chosen = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        chosen[found.to(weight.device)] = True
        return chosen.view(weight.shape)

    return positions
