"""Sparse matrices in float64: the product A₁ᵀA₂ of two of them, and their singular values.

A matrix here is a coalesced sparse COO tensor of float64 whose entries all differ from zero. The layout is COO because torch
multiplies it without MKL and, at the densities of adapters, as fast as the other layouts.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Spectrum", "as_matrix", "gram", "spectrum"]

BLOCK = 2**22  # entries or terms of a product held at a time, about 150 MB
DENSE_FROM = 1 / 16  # share of a dense product's terms; with more terms the product is computed densely
EXACT_SIDE = 4096  # the longest shorter side whose singular values are computed: 3 s for a square matrix on two cores
EXACT_NUMEL = 2**26  # and the most entries, 512 MB; beyond, singular values are estimated
PROBES = 8
STEPS = 128


class Gram(NamedTuple):
    """Facts about the product A₁ᵀA₂.

    nonzero: the number of entries (i, j) for which some row has an entry in column i of A₁ and one in column j of A₂. It
        follows from the positions alone, so it is exact.
    cancelled: the number of these entries whose terms add up to 0.0 in float64.
    squares: the sum of all squared entries.
    """

    nonzero: int
    cancelled: int
    squares: float


class Spectrum(NamedTuple):
    """Singular values in falling order, computed or estimated.

    values: float64 [k]. counts: float64 [k], how many singular values each value stands for; 1 if they were computed.
    error: of `effective_rank`: its standard error over the random starts, combined with the difference that half the steps
        make; None if they were computed.
    squares: Σσ², from the matrix's entries.
    """

    values: Tensor
    counts: Tensor
    error: float | None
    squares: float

    @property
    def rank(self) -> int | None:
        """The number of singular values above rounding, as `torch.linalg.matrix_rank` counts; None if they were estimated."""
        if self.error is not None:
            return None
        tiny = float(self.values[:1].sum()) * self.values.numel() * torch.finfo(torch.float64).eps
        return int((self.values > tiny).sum())

    @property
    def stable_rank(self) -> float:
        """Σσ² / σ₁² (Rudelson and Vershynin, arXiv math/0503442); 0 for an empty matrix."""
        return self.squares / float(self.values[0]) ** 2 if self.squares else 0.0

    @property
    def effective_rank(self) -> float:
        """exp(entropy of σ / Σσ): so many equal singular values have this entropy (Roy and Vetterli, EUSIPCO 2007)."""
        return float(_effective_rank(self.values, self.counts))

    def energy(self, rank: float) -> float | None:
        """The share of Σσ² in the `rank` largest singular values; None if they were estimated.

        It is the most that any matrix of that rank can hold (Eckart and Young, 1936). A fraction of a rank counts as that
        fraction of the next σ².
        """
        if self.error is not None:
            return None
        taken = (rank - torch.arange(self.values.numel(), dtype=torch.float64, device="cpu")).clamp(0, 1)
        return min(1.0, float((taken * self.values.square()).sum()) / self.squares) if self.squares else 0.0


def as_matrix(shape: tuple[int, ...], indices: Tensor, values: Tensor) -> Tensor:
    """A sparse matrix of the entries at sorted flat positions, without those that are zero.

    A tensor with more than two dimensions becomes [first, all others]; one with fewer becomes a column.
    """
    rows = shape[0] if shape else 1
    columns = math.prod(shape[1:])
    kept = values != 0
    where = indices[kept].long()
    coordinates = torch.stack([where // max(1, columns), where % max(1, columns)])
    return _coo(coordinates, values[kept].double(), (rows, columns))


def gram(one: Tensor, other: Tensor, block: int = BLOCK) -> Gram:
    """Facts about oneᵀ · other, computed in blocks of its rows: term by term, or by dense products if there are many terms.

    one, other: sparse matrices from `as_matrix` with equally many rows. block: the most entries or terms of the product that
    are held at once; but a row is never divided.
    """
    (row, column), values = one.indices(), one.values()
    order = (column * one.shape[0] + row).argsort()
    row, column, values = row[order], column[order], values[order]
    held = torch.bincount(other.indices()[0], minlength=one.shape[0])  # entries in each row of `other`
    terms = held.new_zeros(one.shape[1]).index_add_(0, column, held[row])  # in each row of the product
    dense = int(terms.sum()) > DENSE_FROM * one.shape[0] * one.shape[1] * other.shape[1]
    first_entry = held.cumsum(0) - held
    right = other.to_dense() if dense else None
    width = other.shape[1]
    nonzero, cancelled, squares = 0, 0, 0.0
    for start, stop in _blocks(terms if right is None else (terms > 0) * width, width, block):
        first, last = torch.searchsorted(column, torch.tensor([start, stop], device="cpu")).tolist()
        part = row[first:last], column[first:last] - start, values[first:last]
        if right is None:
            sums, met = _by_terms(*part, stop - start, other, held, first_entry)
        else:
            sums, met = _by_dense(*part, stop - start, right)
        nonzero += int(met.sum())
        cancelled += int((met & (sums == 0)).sum())
        squares += float(sums.square().sum())
    return Gram(nonzero, cancelled, squares)


def _by_terms(
    row: Tensor, column: Tensor, values: Tensor, count: int, other: Tensor, held: Tensor, first_entry: Tensor
) -> tuple[Tensor, Tensor]:
    """`count` rows of the product, flat [count · n], and which of their entries have terms.

    There is a term for each entry of one matrix and each entry of the other in the same row.
    """
    repeats = held[row]
    left = torch.arange(row.numel(), device="cpu").repeat_interleave(repeats)
    right = torch.arange(left.numel(), device="cpu") - (repeats.cumsum(0) - repeats - first_entry[row])[left]
    place = column[left] * other.shape[1] + other.indices()[1][right]
    met = torch.zeros(count * other.shape[1], dtype=torch.bool, device="cpu")
    met[place] = True
    sums = torch.zeros(met.numel(), dtype=torch.float64, device="cpu")
    return sums.index_add_(0, place, values[left] * other.values()[right]), met


def _by_dense(row: Tensor, column: Tensor, values: Tensor, count: int, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same as `_by_terms`, in [count, n], from dense products of the values and of the masks."""
    left = torch.zeros(count, right.shape[0], dtype=torch.float64, device="cpu")
    left[column, row] = values
    return left @ right, (left != 0).float() @ (right != 0).float() > 0


def spectrum(sparse: Tensor, seed: int = 0) -> Spectrum:
    """The singular values of a sparse matrix from `as_matrix`.

    Empty rows and columns are left out first; that removes only singular values of 0. Then singular values are computed in
    float64 if the shorter side has at most 4096 entries and the matrix at most 2²⁶. Otherwise they are estimated by Lanczos
    quadrature (Ubaru, Chen and Saad, SIAM J. Matrix Anal. 38, 2017), with random vectors from `seed`: the largest one is right
    to many digits, the others are right as a distribution.
    """
    (row, column), values = sparse.indices(), sparse.values()
    rows, row = row.unique(return_inverse=True)
    columns, column = column.unique(return_inverse=True)
    shape = (rows.numel(), columns.numel())
    if shape[0] < shape[1]:
        shape = (shape[1], shape[0])
        order = (column * shape[1] + row).argsort()
        row, column, values = column[order], row[order], values[order]
    squares = float(values.square().sum())
    if shape[1] <= EXACT_SIDE and shape[0] * shape[1] <= EXACT_NUMEL:
        dense = torch.zeros(shape, dtype=torch.float64, device="cpu")
        dense[row, column] = values
        found = torch.linalg.svdvals(dense)
        return Spectrum(found, torch.ones_like(found), None, squares)
    bidiagonal = _bidiagonal(_coo(torch.stack([row, column]), values, shape), seed)
    nodes, weights = _quadrature(bidiagonal, shape[1])
    coarse = _effective_rank(*_quadrature(bidiagonal[:, : STEPS // 2, : STEPS // 2], shape[1]))
    fine = _effective_rank(nodes, weights)
    error = math.hypot(float(fine.std()) / math.sqrt(PROBES), float((fine - coarse).mean()))
    order = nodes.view(-1).argsort(descending=True)
    return Spectrum(nodes.view(-1)[order], weights.view(-1)[order] / PROBES, error, squares)


def _bidiagonal(sparse: Tensor, seed: int) -> Tensor:
    """Golub and Kahan's bidiagonal matrices [probes, steps, steps] of a matrix [m, n], from random start vectors.

    Only the shorter side's vectors are kept and orthogonalized again (Simon and Zha, SIAM J. Sci. Comput. 21, 2000).
    """
    rows, columns = sparse.shape
    transposed = sparse.t().coalesce()
    basis = torch.zeros(PROBES, columns, STEPS, dtype=torch.float64, device="cpu")
    bidiagonal = torch.zeros(PROBES, STEPS, STEPS, dtype=torch.float64, device="cpu")
    right = torch.randn(columns, PROBES, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), device="cpu")
    right /= right.norm(dim=0)
    left, coupling = right.new_zeros(rows, PROBES), right.new_zeros(PROBES)
    for step in range(STEPS):
        basis[:, :, step] = right.T
        left, length = _normal(torch.sparse.mm(sparse, right) - coupling * left, bidiagonal)
        bidiagonal[:, step, step] = length
        if step + 1 < STEPS:
            right = torch.sparse.mm(transposed, left) - length * right
            known = basis[:, :, : step + 1]
            for _ in range(2):  # one pass leaves rounding errors, two are enough
                right = right - (known @ (known.mT @ right.T.unsqueeze(-1))).squeeze(-1).T
            right, coupling = _normal(right, bidiagonal)
            bidiagonal[:, step, step + 1] = coupling
    return bidiagonal


def _normal(vectors: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors [n, probes] scaled to length one, and their lengths. Rounding that is left in an exhausted space becomes 0."""
    length = vectors.norm(dim=0)
    length = torch.where(length > 1e-10 * scale.amax(dim=(1, 2)), length, 0.0)
    return torch.where(length > 0, vectors / length, 0.0), length


def _quadrature(bidiagonal: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights [probes, steps]: for each probe, Σ weight · f(node) estimates Σ f(σ) over `side` singular values."""
    _, nodes, turned = torch.linalg.svd(bidiagonal)
    return nodes, side * turned[:, :, 0].square()


def _effective_rank(values: Tensor, counts: Tensor) -> Tensor:
    total = (counts * values).sum(-1)
    logs = torch.where(values > 0, values.log(), 0.0)
    entropy = total.log() - (counts * values * logs).sum(-1) / total
    return torch.where(total > 0, entropy.exp(), 0.0)


def _blocks(terms: Tensor, width: int, block: int) -> list[tuple[int, int]]:
    """Ranges of rows with at most `block` terms and `block` entries each, or of a single row.

    A range neither begins nor ends with rows that have no terms.
    """
    ranges: list[tuple[int, int]] = []
    total = 0
    for row, count in enumerate(terms.tolist()):
        if not count:
            continue
        if ranges and total + count <= block and (row + 1 - ranges[-1][0]) * width <= block:
            ranges[-1] = (ranges[-1][0], row + 1)
            total += count
        else:
            ranges.append((row, row + 1))
            total = count
    return ranges


def _coo(coordinates: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A sparse COO tensor of entries that are already sorted and unique."""
    return torch.sparse_coo_tensor(coordinates, values, shape, device=values.device, is_coalesced=True, check_invariants=False)
