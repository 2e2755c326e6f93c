"""Whether the base is exact: the bits of all weights now, compared with those at the start."""

from collections.abc import Mapping
from typing import NamedTuple

import xxhash
from torch import Tensor

from ..sparse.tensor import bytes_of

__all__ = ["Light", "Watch", "digests"]


class Light(NamedTuple):
    """What the light shows. exact: None if it is not known."""

    exact: bool | None
    text: str


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> XXH3-128 of dtype, shape and bits of each tensor."""
    found = {}
    for name, tensor in tensors.items():
        digest = xxhash.xxh3_128(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(bytes_of(tensor).cpu().numpy().data)
        found[name] = digest.hexdigest()
    return found


class Watch:
    """The bits of a model's tensors when this was made."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._before = digests(tensors)
        self._entries = sum(tensor.numel() for tensor in tensors.values())

    def light(self, tensors: Mapping[str, Tensor]) -> Light:
        """Whether these tensors have the same names, dtypes, shapes and bits."""
        now = digests(tensors)
        changed = sorted(name for name in self._before.keys() | now.keys() if self._before.get(name) != now.get(name))
        if changed:
            more = f" and {len(changed) - 1:,} more" if len(changed) > 1 else ""
            return Light(False, f"The base is not exact: {changed[0]}{more} differs from the start. Start shira play again.")
        return Light(True, f"The base is exact: all {self._entries:,} values have the bits that they had at the start.")
