"""One learning rate for all masks: what a step of the optimizer changes an entry by, beside the learning rate.

With Adam every entry moves by about the learning rate in each step, whatever its gradient. So a step of η on the entries of a
mask lowers the loss by about η · Σ |gradient| over these entries. A mask that chooses large gradients needs a small step, and
one that chooses few entries, or entries whatever their gradients, a large one. The rule gives all masks the same decrease at
the same learning rate, that of full fine-tuning at a learning rate `LORA_OVER_FULL` times lower. docs/masks/README.md has the
evidence.
"""

import math
from typing import Any, Literal

from ..errors import TuningError

__all__ = ["allowed", "scale_for"]

LORA_OVER_FULL = 10.0  # LoRA's best learning rate over that of full fine-tuning (docs/masks/README.md has the evidence)
LEAST, MOST = 2.0**-6, 2.0**6


def scale_for(share: float) -> float:
    """The scale for a mask whose entries have this share (0 to 1) of Σ |gradient| over all entries: a power of two.

    It is not for a model with a new head: a mask is chosen before the head has learned anything, and all masks wanted about
    LoRA's learning rate there.
    """
    return min(max(2.0 ** round(-math.log2(LORA_OVER_FULL * max(share, 1e-9))), LEAST), MOST)


def allowed(given: Any, method: str, decompose: bool | int) -> float | Literal["auto"]:
    """The lr_scale to use: what was given, or 1 where other parameters than entries train.

    Raises TuningError unless it is "auto" or a power of two, by which values can be divided and multiplied exactly; and for a
    scale that nothing can have.
    """
    is_auto = isinstance(given, str) and given == "auto"
    is_number = isinstance(given, int | float) and not isinstance(given, bool) and LEAST <= given <= MOST
    if not is_auto and not (is_number and math.frexp(given)[0] == 0.5):
        raise TuningError(f"lr_scale must be 'auto', or a power of two from 1/64 to 64 such as 0.5, 1 or 4; found {given!r}")
    other = "method='hook'" if method == "hook" else "decompose" if decompose is not False else ""
    if other and not (is_auto or given == 1):
        raise TuningError(f"{other} trains other parameters than entries, which lr_scale={given!r} cannot scale; leave it out")
    return 1.0 if other else "auto" if is_auto else float(given)
