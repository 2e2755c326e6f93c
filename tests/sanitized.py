"""Mutants of files and of plans, for the kernels in C built with AddressSanitizer and UBSan: `make test-sanitized`.

A file that is damaged is read, added, fused and compared, or refused; a plan, a merge, a fusion and products of rows of any
positions, dtypes, layouts and sizes give what the reference gives, or an error. A write outside of anything ends the process.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import fuzz_kernels
import shira
from conftest import bits
from shira import ShiraError
from shira.kernels.cpu import native
from test_hostile_files import mutants, uses


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
        refused += "refused" in fuzz_kernels.run(fuzz_kernels.case(random.Random(number), []))
        total += 1
    print(f"{total} mutants of plans, {refused} refused, {time.monotonic() - began:.0f} s; nothing outside was touched")
    assert done + total < 1000 or refused > 100, "hardly anything was refused: this tests nothing"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
