"""Fuse adapters so that each keeps its effect on the inputs of its own task: RegMean (arXiv 2212.09849) over sparse entries.

For each row of a linear layer's weight, the fused change δ of the entries that any adapter t changes is the one with the least
Σₜ (δ − δₜ) Pₜ (δ − δₜ)ᵀ. So on the inputs of each task, δ gives nearly what δₜ alone gives. Pₜ is the mean of x xᵀ over the
inputs x that the layer sees for task t, with adapter t. Each row is a system of its own, as large as its changed entries.
"""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..errors import SwitchError
from ..masks.calibration import LossFn, Progress, calibrate, check_arguments, linear_layers
from ..sparse.tensor import SparseTensor, fingerprint
from ..texts import described, plain_number
from ..weights.model_tensors import named_tensors
from ..weights.targets import is_conv1d
from .switcher import Switcher

__all__ = ["fuse_on_inputs", "solved"]

CROSS = 0.9  # factor of Pₜ's entries off the diagonal, RegMean's: a system of few inputs has one solution
RIDGE, LEAST = 1e-4, 1e-3  # of the mean of a system's diagonal, added to it; of at least this mean: inputs may all be 0
SYSTEMS = 2**18  # numbers in the systems that are solved at once: 1 MB, which caches hold; 2**24 took 7 times as long


@torch.no_grad()
def fuse_on_inputs(
    switcher: Switcher,
    inputs: Mapping[str, Iterable[Any]],
    *,
    loss_fn: LossFn | None = None,
    memory: int = 2**31,
    progress: Progress | None = None,
) -> Adapter:
    """One adapter with the effect of several, each on inputs of its own task. The switcher's model runs on these inputs.

    inputs: name of an adapter -> batches of its task, as for calibration; 64 examples were enough. No loss is computed.
    loss_fn(model, batch): runs the model, if `model(**batch)` does not. memory: bytes that the sums over inputs may take; with
        less, the batches run more often. progress(done, total): called after each batch and each tensor.

    Each tensor's result is scaled so that, over all tasks, what an adapter changes in its own outputs keeps its size. Changes
    of weights that no linear layer multiplies are added. Method: RegMean, arXiv 2212.09849, over the entries that change.
    Raises SwitchError for fewer than two adapters, an unknown one, or inputs that are not finite; what `calibrate` and `use`
    raise. The model is as before.

        both = fuse_on_inputs(switcher, {"poet": poems, "coder": programs})
    """
    if not isinstance(switcher, Switcher) or not isinstance(inputs, Mapping):
        wrong = inputs if isinstance(switcher, Switcher) else switcher
        raise SwitchError(f"expected fuse_on_inputs(switcher, {{name: batches}}), found {described(wrong)}")
    if len(inputs) < 2:
        raise SwitchError(f"expected two adapters or more, each with batches of its task, found {len(inputs)}")
    if isinstance(memory, bool) or not isinstance(plain_number(memory), int) or memory < 1:
        raise SwitchError(f"memory must be a number of bytes, a whole number from 1 on, found {described(memory)}")
    for name, batches in inputs.items():
        check_arguments(batches, loss_fn, progress, option=f"the inputs of {name!r}")
    held = {name: list(batches) for name, batches in inputs.items()}
    changes = [switcher.changes({name: 1.0}) for name in held]
    added = switcher.changes(dict.fromkeys(held, 1.0))
    model, layers, transposed = switcher._model, dict[str, nn.Parameter](), set[str]()
    tensors = named_tensors(model)
    changed = {name: weight for name in added if isinstance(weight := tensors[name], nn.Parameter)}
    for name, layer in linear_layers(model, changed):
        layers[name] = changed[name]
        transposed |= {name} if is_conv1d(layer) else set()
    fused = {name: tensor.values for name, tensor in added.items() if name not in layers}
    groups = _groups(layers, transposed, memory // len(held))
    done = 0

    def step(*_: int) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(groups) * sum(map(len, held.values())) + len(layers))

    for group in groups:
        products: dict[str, list[Tensor]] = {name: [] for name in group}

        def receive(name: str, found: Mapping[str, Tensor], into: Any = products) -> None:
            if not found["products"].isfinite().all():
                raise SwitchError(f"'{name}': an input of its layer is NaN or infinite; check the model and the batches")
            into[name].append(found["products"])

        for name, batches in held.items():
            with switcher.using({name: 1.0}):
                weights = {tensor: layers[tensor] for tensor in group}
                calibrate(model, weights, batches, receive, statistics=["products"], loss_fn=loss_fn, progress=step)
        for name in group:
            parts = [each.get(name) for each in changes]
            fused[name] = solved(added[name], parts, products.pop(name), transposed=name in transposed)
            step()
    return _adapter(switcher, list(held), added, fused)


def solved(
    added: SparseTensor, parts: Sequence[SparseTensor | None], products: Sequence[Tensor], *, transposed: bool
) -> Tensor:
    """The fused change at the positions of `added`, float32 [n]: RegMean's, scaled to keep what parts do to their outputs.

    added: a tensor with the union of the parts' positions. parts: each adapter's change of it, deltas; None: it has none.
    products: Pₜ, [in, in], of each adapter. transposed: the tensor is [in, out], not [out, in].
    """
    indices = added.indices.cpu()
    rows, columns = indices // added.shape[1], indices % added.shape[1]
    if transposed:
        rows, columns = columns, rows
    order = torch.argsort(rows, stable=True)
    device = products[0].device
    held = indices.numel()
    each = torch.zeros(len(parts), held, device=device)
    for number, part in enumerate(parts):
        if part is not None:
            each[number, torch.searchsorted(indices, part.indices.cpu())] = part.values.float().to(device)
    systems = [_crossed(product) for product in products]
    _, counts = torch.unique_consecutive(rows[order], return_counts=True)
    starts = counts.cumsum(0) - counts
    fused, kept, wanted = torch.zeros(held, device=device), 0.0, 0.0
    by_size = torch.argsort(counts, descending=True)
    done = 0
    while done < len(by_size):
        longest = int(counts[by_size[done]])
        some = by_size[done : done + max(1, SYSTEMS // longest**2)]
        done += len(some)
        offsets = torch.arange(longest)
        valid = offsets < counts[some, None]  # [rows, longest]
        places = order[(starts[some, None] + offsets).clamp(max=held - 1)]
        here, valid, places = columns[places].to(device), valid.to(device), places.to(device)
        system = torch.diag_embed((~valid).float())
        right = torch.zeros(valid.shape, device=device)
        for product, change in zip(systems, each, strict=True):
            block = product[here[:, :, None], here[:, None, :]] * (valid[:, :, None] & valid[:, None, :])
            own = change[places] * valid
            out = (block @ own[:, :, None])[:, :, 0]
            wanted += float((own * out).sum())
            system += block
            right += out
        size = torch.diagonal(system, dim1=1, dim2=2)
        size += RIDGE * size.mean(1, keepdim=True).clamp_(min=LEAST)
        found = torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky(system))[:, :, 0]
        kept += float((found * right).sum())
        fused[places[valid]] = found[valid]
    return fused.mul_(wanted / kept if kept > 0 else 1.0)


def _crossed(product: Tensor) -> Tensor:
    """Pₜ as the systems have it: of mean 1 on its diagonal, so that all tasks count alike, and smaller off the diagonal."""
    size = torch.diagonal(product)
    scale = 1 / size.mean().clamp(min=torch.finfo(torch.float32).tiny)
    made = product * (CROSS * scale)
    torch.diagonal(made).copy_(size * scale)
    return made


def _groups(layers: Mapping[str, nn.Parameter], transposed: Collection[str], memory: int) -> list[list[str]]:
    """The weights in their order, in groups of at least one, whose products of one adapter take at most so many bytes."""
    groups: list[list[str]] = []
    left = 0
    for name, weight in layers.items():
        needed = 4 * weight.shape[0 if name in transposed else 1] ** 2
        if needed > left:
            groups.append([])
            left = memory
        groups[-1].append(name)
        left -= needed
    return groups


def _adapter(
    switcher: Switcher, names: Sequence[str], added: Mapping[str, SparseTensor], fused: Mapping[str, Tensor]
) -> Adapter:
    """The base plus the fused changes, as values to overwrite with, rounded once to the model's dtype."""
    weights = named_tensors(switcher._model)
    tensors: dict[str, SparseTensor] = {}
    prints: dict[str, str] = {}
    for name, union in added.items():
        base = switcher.base_values(name, union.indices)
        wide = torch.promote_types(base.dtype, torch.float32)
        values = (base.to(wide) + fused[name].to(base.device, wide)).to(weights[name].dtype)
        tensors[name] = SparseTensor(union.shape, union.indices.cpu(), values.cpu(), "overwrite")
        prints[name] = fingerprint(base)
    read = [switcher._sources[name].read(weights)[0] for name in names]
    said = {key: read[0].metadata.get(key) for key in ("base", "license")} | {"fused": {"method": "regmean", "adapters": names}}
    name = "+".join(each.name or os.path.basename(given) for each, given in zip(read, names, strict=True))
    return Adapter(tensors, {key: value for key, value in said.items() if value} | {"name": name, "fingerprints": prints})
