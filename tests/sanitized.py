"""Mutants of files and of plans, for the kernels in C built with AddressSanitizer and UBSan: `make test-sanitized`.

A file that is damaged is read, added, fused and compared, or refused; a plan, a merge and a fusion of any positions, dtypes,
layouts and sizes gives what the reference gives, or an error. A write outside of anything ends the process.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import shira
from conftest import bits
from shira import ShiraError, kernels
from shira.kernels import Contribution, reference
from shira.kernels.cpu import native
from test_hostile_files import mutants, uses

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ODD_INDICES = (-1, -(2**31), 2**31 - 1, 2**31, 2**40, -(2**63), 2**63 - 1)


def files(count):
    """Returns how many mutants of files there were, and how many of them are not even read."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 40))
    base, refused, done = bits(model[0].weight), 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for mask in ("rand", "struct", "wm"):
            with shira.attach(model, mask=mask, density=0.2, seed=3) as tuner:
                tuner.adapter(mask).save(folder / mask)
        shira.load(folder / "wm").save(folder / "beside", like=folder / "wm")
        path = folder / "mutant"
        for original in ("rand", "struct", "wm", "beside"):
            for content in mutants((folder / original).read_bytes(), count // 4):
                path.write_bytes(content)
                done += 1
                for label, use in uses(path, model).items():
                    try:
                        use()
                    except (ShiraError, OSError):
                        refused += label == "load"
    assert torch.equal(base, bits(model[0].weight))
    return done, refused


def random_runs(draw, generator, numel, count):
    """Sorted positions, of which some mutants are not sorted, or lie elsewhere."""
    runs = []
    for _ in range(count):
        run = (torch.rand(numel, generator=generator) < draw.choice([0, 0.01, 0.3, 1])).nonzero().view(-1)
        run = run.to(draw.choice([torch.int32, torch.int64]))
        if run.numel() and draw.random() < 0.3:
            odd = draw.choice(ODD_INDICES)
            if run.dtype == torch.int64 or -(2**31) <= odd < 2**31:
                run = run.clone()
                run[draw.randrange(run.numel())] = odd
        runs.append(run)
    return runs


def plan(draw, generator):
    """One mutant of a plan, through every mode; whether it was refused."""
    dtype = draw.choice(DTYPES)
    shape = draw.choice([(1,), (7, 5), (64, 33), (3, 5, 7), (0, 4)])
    weight = torch.randn(shape, generator=generator).to(dtype)
    if draw.random() < 0.1:
        weight = weight.expand(2, *shape) if draw.random() < 0.5 else weight.transpose(0, -1)
    (indices,) = random_runs(draw, generator, weight.numel(), 1)
    values = torch.randn(max(0, indices.numel() + draw.choice([0] * 12 + [1, -1])), generator=generator)
    values = values.to(dtype if draw.random() < 0.95 else draw.choice(DTYPES))
    if draw.random() < 0.05:
        indices = indices.repeat_interleave(2)[::2]
    before = bits(weight)
    try:
        made = kernels.WritePlan.of([kernels.Write(weight, indices, values)])
        twin = kernels.WritePlan.of([kernels.Write(weight, indices, values.flip(0))])
        kernels.swap_(made)
        kernels.write_(over := twin.over(made), made) if indices.numel() else None
        kernels.restore_(over if indices.numel() else made)
        kernels.change_(made, twin)
        if draw.random() < 0.3:
            with torch.no_grad():
                weight.data.mul_(2)
            before = None
        kernels.restore_(twin)
    except (IndexError, kernels.WeightChanged):
        if before is not None:
            assert torch.equal(before, bits(weight)), "refused, and yet written to"
        return True
    if before is not None:
        assert torch.equal(before, bits(weight)), "the base is not back"
    return False


def merging(draw, generator):
    """A merge of sorted runs, and a fusion of changes, compared with the reference."""
    numel = draw.choice([1, 64, 5000, 200_000])
    runs = [run.sort().values.unique() for run in random_runs(draw, generator, numel, draw.choice([1, 2, 5]))]
    try:
        found = native.unite(runs)
    except IndexError:
        assert any(run.numel() and not 0 <= int(run[0]) <= int(run[-1]) < 2**62 for run in runs)
        return True
    expected = reference.unite(runs)
    assert torch.equal(found.indices.long(), expected.indices.long()) and torch.equal(found.counts, expected.counts)
    dtype = draw.choice(DTYPES[:2])
    weight = torch.randn(numel, generator=generator).to(dtype) if draw.random() < 0.7 else None
    changes = []
    for run in runs:
        values = torch.randn(run.numel(), generator=generator).to(dtype)
        changes.append(
            Contribution(
                run.int() if run.numel() and int(run[-1]) < 2**31 else run, values, draw.choice([1.0, 0.5]), False, True
            )
        )
    if draw.random() < 0.4:  # gaps of any kind, which need not lead anywhere
        units = torch.randint(0, 256, (draw.choice([0, 1, 50, 3000]),), generator=generator).to(torch.uint8)
        units = units.to(draw.choice([torch.uint8, torch.uint16]))
        count = max(0, int((units != 255).sum()) + draw.choice([0, 0, 1, -1]))
        changes.append(Contribution(units, torch.randn(count, generator=generator).to(dtype), 0.5, weight is None, False))
    try:
        native.combine(weight, changes, dtype, draw.choice(["sum", "mean", "max"]), numel)
    except IndexError:
        return True
    return False


def sampling(draw, generator):
    """The gradient at positions: sizes and positions that fit, which is its caller's to see to."""
    tokens, rows, columns = (draw.choice(sides) for sides in ([1, 17, 300], [1, 33, 200], [1, 9, 131]))
    dtype = draw.choice(DTYPES[:2])
    left, right = (torch.randn(tokens, side, generator=generator).to(dtype) for side in (rows, columns))
    (indices,) = random_runs(random.Random(0), generator, rows * columns, 1)
    indices = indices[(indices >= 0) & (indices < rows * columns)]
    kernels.sampled_gradient(left, right, indices)
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=8000)
    parser.add_argument("--plans", type=int, default=16000)
    given = parser.parse_args()
    assert native.available(), "the extension was not built"
    began = time.monotonic()
    done, refused = files(given.files)
    print(f"{done} mutants of files, {refused} refused when read, {time.monotonic() - began:.0f} s", flush=True)
    total = refused = 0
    for number in range(given.plans):
        draw, generator = random.Random(number), torch.Generator().manual_seed(number)
        torch.set_num_threads(draw.choice([1, 1, 2]))
        refused += draw.choice([plan, plan, merging, sampling])(draw, generator)
        total += 1
    print(f"{total} mutants of plans, {refused} refused, {time.monotonic() - began:.0f} s; nothing outside was touched")
    assert done + total < 1000 or refused > 100, "hardly anything was refused: this tests nothing"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
