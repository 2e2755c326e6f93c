"""`SparseTensor`: a few positions of one tensor, and their values. It is checked once, when it is made."""

import hashlib
import math
import weakref
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import AdapterError
from ..texts import described, shown
from .positions import index_dtype

__all__ = [
    "FLOAT_DTYPES",
    "MOST_ENTRIES",
    "SHA256",
    "XXH3",
    "Kind",
    "SparseTensor",
    "all_finite",
    "bytes_of",
    "dtype_name",
    "fingerprint",
    "has_memory",
    "is_dense",
    "numel_of",
]

Kind = Literal["overwrite", "delta"]

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_ENTRIES, MOST_SIDES = 2**62, 64  # of a tensor; sums of positions then fit into int64
XXH3, SHA256 = "xxh3:", ""  # how a fingerprint by each hash begins


def numel_of(shape: tuple[int, ...]) -> int:
    """Number of entries of a tensor of this shape, which may come from a file. Raises ValueError for an impossible shape.

    The limit of 2⁶² entries counts a dimension of 0 as 1.
    """
    if len(shape) > MOST_SIDES or not all(type(side) is int and 0 <= side <= MOST_ENTRIES for side in shape):
        raise ValueError(f"shape must hold whole numbers from 0 on, found {shown(list(shape))}")
    if math.prod(max(1, side) for side in shape) > MOST_ENTRIES:
        raise ValueError(f"shape {list(shape)} has more than 2^62 entries")
    return math.prod(shape)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name in files and messages: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def has_memory(tensor: Tensor) -> bool:
    """Whether the storage of a strided tensor holds all its entries. Others may have freed or shortened it (`resize_`)."""
    entries = tensor.numel()
    if entries and not tensor.is_contiguous():
        entries = 1 + sum((side - 1) * step for side, step in zip(tensor.shape, tensor.stride(), strict=True))
    return entries == 0 or (tensor.storage_offset() + entries) * tensor.itemsize <= tensor.untyped_storage().nbytes()


def memory_state(tensor: Tensor) -> tuple[int, int, int]:
    """What changes if others write into a tensor, free its memory, or give it another; unless they write past torch."""
    return 0 if tensor.is_inference() else tensor._version, tensor.data_ptr(), tensor.untyped_storage().nbytes()


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's memory holds its entries as they are: it is not sparse, nested, quantized, conjugated or negated."""
    return tensor.layout == torch.strided and not (
        tensor.is_nested or tensor.is_quantized or tensor.is_conj() or tensor.is_neg()
    )


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, uint8 [nbytes], in C order and on its device. A contiguous tensor shares its memory."""
    plain = tensor.detach().contiguous()  # a single element may still have another stride than 1
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. Testing the smallest and the largest takes a tenth of the time of testing each."""
    return not values.numel() or all(bool(extreme.isfinite()) for extreme in torch.aminmax(values))


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """A few entries of one tensor.

    shape: the shape of the whole tensor.
    indices: [nnz], flat positions in C order, strictly increasing; int32 below 2³¹ entries, int64 from there on
        (either is accepted and converted).
    values: [nnz], float32, bfloat16, float16 or float64, finite; without a gradient (they are detached).
    kind: "overwrite": the values are the tensor's new entries; "delta": the values are added to its old entries.

    Raises AdapterError if any of this is not so.
    """

    shape: tuple[int, ...]
    indices: Tensor
    values: Tensor
    kind: Kind = "overwrite"

    def __post_init__(self) -> None:
        self._check_form()
        _check_plain("indices", self.indices)
        if self.indices.dtype not in (torch.int32, torch.int64):
            raise AdapterError(f"indices must be int32 or int64, found {dtype_name(self.indices.dtype)}")
        if self.indices.ndim != 1 or self.values.shape != self.indices.shape:
            raise AdapterError(
                "indices and values must be 1-D and of one length, found shapes "
                f"{list(self.indices.shape)} and {list(self.values.shape)}"
            )
        if self.indices.device != self.values.device:
            raise AdapterError(f"indices are on {self.indices.device}, values on {self.values.device}")
        self._check_positions()
        self._check_values()
        object.__setattr__(self, "indices", self.indices.to(index_dtype(self.numel)).contiguous())
        object.__setattr__(self, "values", self.values.detach().contiguous())
        _checked[self] = self._state()

    def _state(self) -> tuple[Any, ...]:
        return memory_state(self.indices), memory_state(self.values)

    def check(self) -> tuple[Any, ...]:
        """Check again, if others have written into the tensors since, or have freed them. Raises AdapterError.

        Returns their state in memory, which is another one after each such change.
        """
        if _checked.get(self) != self._state():
            try:
                self.__post_init__()
            except AdapterError as error:
                raise AdapterError(f"was changed in memory after it was made: {error}; make the adapter again") from None
        return _checked[self]

    def __repr__(self) -> str:
        """One line without numbers from the tensors: an adapter has hundreds of these."""
        shape, dtype = " × ".join(map(str, self.shape)), dtype_name(self.values.dtype)
        return f"<shira.SparseTensor {shape}: {self.nnz:,} entries, {self.kind}, {dtype}>"

    def _check_form(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in get_args(Kind):
            raise AdapterError(f"kind must be 'overwrite' or 'delta', found {shown(self.kind)}")
        try:
            object.__setattr__(self, "shape", tuple(self.shape))
            numel_of(self.shape)
        except (TypeError, ValueError) as error:
            what = str(error) if isinstance(error, ValueError) else f"found {described(self.shape)}"
            raise AdapterError(f"a sparse tensor is SparseTensor((rows, columns), indices, values): {what}") from None
        _check_plain("values", self.values)
        if self.values.dtype not in FLOAT_DTYPES:
            known = " or ".join(map(dtype_name, FLOAT_DTYPES))
            raise AdapterError(f"values must be floating point, found {dtype_name(self.values.dtype)}; cast them to {known}")

    @classmethod
    def of_kernel(cls, shape: tuple[int, ...], indices: Tensor, values: Tensor, kind: Kind) -> "SparseTensor":
        """A tensor that a kernel made. Only the values are checked, to be finite: the kernel guarantees all else.

        Raises AdapterError.
        """
        made = object.__new__(cls)
        for name, value in {"shape": shape, "indices": indices, "values": values, "kind": kind}.items():
            object.__setattr__(made, name, value)
        made._check_values()
        _checked[made] = made._state()
        return made

    def _check_values(self) -> None:
        if not all_finite(self.values):
            where = int(torch.isfinite(self.values).logical_not().nonzero()[0])
            raise AdapterError(f"values must be finite, found {float(self.values[where])} as value {where}")

    def _check_positions(self) -> None:
        if self.nnz == 0:
            return
        first, last = int(self.indices[0]), int(self.indices[-1])
        rising = self.indices[1:] > self.indices[:-1]
        if not bool(rising.all()):
            where = int(rising.logical_not().nonzero()[0])
            here, then = int(self.indices[where]), int(self.indices[where + 1])
            fault = "twice the position" if here == then else f"position {then} after"
            raise AdapterError(f"indices must be sorted and unique, found {fault} {here} (index {where + 1})")
        if first < 0 or last >= self.numel:
            wrong = first if first < 0 else last
            raise AdapterError(f"indices must be from 0 to {self.numel - 1} (shape {list(self.shape)}), found {wrong}")

    @property
    def numel(self) -> int:
        """Number of entries of the whole tensor."""
        return math.prod(self.shape)

    @property
    def nnz(self) -> int:
        """Number of entries that the adapter holds."""
        return self.values.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of positions and values in memory."""
        return self.indices.nbytes + self.values.nbytes


_checked: "weakref.WeakKeyDictionary[SparseTensor, tuple[Any, ...]]" = weakref.WeakKeyDictionary()  # the state when checked


def _check_plain(what: str, tensor: Any) -> None:
    """Raise AdapterError unless this is a dense tensor with data, neither sparse nor quantized."""
    if not isinstance(tensor, Tensor):
        raise AdapterError(f"{what} must be a tensor, as in torch.tensor([1, 5]); found {described(tensor)}")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise AdapterError(f"{what} must be a plain tensor with data, found {tensor.layout} on {tensor.device}")
    if not has_memory(tensor):
        raise AdapterError(f"the memory of {what} was freed")


def fingerprint(values: Tensor, like: str = XXH3) -> str:
    """A fingerprint of base values: "xxh3:" and XXH3-128 over them as little-endian float32, in hex.

    Taken in float32, it is the same for a bfloat16 checkpoint loaded as bfloat16 and as float32. It finds mistakes. It need not
    withstand attackers, since whoever writes an adapter's file writes its fingerprints, too.
    like: the fingerprint to compare with, whose beginning says which hash to take. One that begins with no hash is the first
        128 bits of SHA-256, as in files up to format version 2.
    """
    begins: str = SHA256
    digest: Any = hashlib.sha256()
    if like.startswith(XXH3):
        import xxhash

        begins, digest = XXH3, xxhash.xxh3_128()
    for piece in values.detach().reshape(-1).split(2**18):  # what is widened stays in cache
        digest.update(piece.to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).data)
    return f"{begins}{digest.hexdigest()[:32]}"
