"""The product of an input with a sparse matrix in compressed rows, by torch's operator."""

import functools
import warnings

import torch
from torch import Tensor

__all__ = ["accept_sparse", "times"]


def times(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int], input: Tensor) -> Tensor:
    """input [tokens, in] · Sᵀ, in the dtype of the values. S is in compressed rows, or in coordinates if torch has no MKL.

    starts: [out + 1], where the entries of each row of S begin. columns: [k], in the dtype of `starts`. values: [k],
    float32 or float64. shape: (out, in). Call `accept_sparse` once before.
    """
    if starts.device.type == "cpu" and not torch.backends.mkl.is_available():
        rows = torch.repeat_interleave(torch.arange(shape[0], device="cpu"), starts.diff())
        where = torch.stack([rows, columns.long()])
        sparse = torch.sparse_coo_tensor(where, values, shape, device=values.device, check_invariants=False)
    else:
        sparse = torch.sparse_csr_tensor(starts, columns, values, shape, device=values.device, check_invariants=False)
    return (sparse @ input.to(values.dtype).T).T.contiguous()  # to add a transposed result to an output is slow


@functools.cache
def accept_sparse() -> None:
    """Trigger torch's warning that compressed rows are in beta here, where it is ignored: torch gives it once a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))
