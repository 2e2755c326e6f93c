"""Time `Switcher.use` here and in another checkout that is built in the same way: `python -m benchmarks.before ../other`.

Two processes run in turn, each first in every second round. Times are medians over the rounds. The ratio, time here / time in
the other checkout, is the median of the ratios of all rounds.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 41
SIZES = {"1024²": ([(1024, 1024)], 100), "4096²": ([(4096, 4096)], 10)}
SIZES["210 weights"] = ([(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)] * 30, 4)
SEQUENCES = {"a, off": ("a", None), "a, b": ("a", "b"), "a, same positions": ("a", "twin")}


def work() -> None:
    """For each input line "size|dtype|sequence", print the microseconds of one call."""
    import torch

    import shira

    from .switch import adapter_for, model_of

    switchers = {}
    for size, (shapes, _) in SIZES.items():
        for dtype in ("bfloat16", "float32"):
            model = model_of(shapes, getattr(torch, dtype))
            weights = dict(model.named_parameters())
            first = adapter_for(weights, 1)
            switchers[size, dtype] = switcher = shira.Switcher(model)
            for name, adapter in (("a", first), ("b", adapter_for(weights, 2)), ("twin", adapter_for(weights, 3, first))):
                switcher.add(name, adapter)
    print("ready", flush=True)
    for line in sys.stdin:
        size, dtype, which = line.strip().split("|")
        switcher, calls = switchers[size, dtype], SIZES[size][1]
        switcher.use(None)
        for name in SEQUENCES[which]:
            switcher.use(name)
        start = time.perf_counter()
        for _ in range(calls):
            for name in SEQUENCES[which]:
                switcher.use(name)
        print((time.perf_counter() - start) / calls / 2 * 1e6, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": str(given.threads)}
    workers = []
    for checkout in (given.other.resolve(), here):
        code = (
            f"import sys; sys.path[:0] = [{str(checkout / 'src')!r}, {str(here)!r}]; from benchmarks.before import work; work()"
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
        workers.append(subprocess.Popen([sys.executable, "-c", code], **pipes))
        workers[-1].stdout.readline()
    print("| weights | dtype | switched between | other, µs | here, µs | ratio |\n|---|---|---|---|---|---|")
    for size in SIZES:
        for dtype in ("bfloat16", "float32"):
            for which in SEQUENCES:
                found = [[], []]
                for number in range(ROUNDS):
                    for worker in (0, 1) if number % 2 else (1, 0):
                        print(f"{size}|{dtype}|{which}", file=workers[worker].stdin, flush=True)
                        found[worker].append(float(workers[worker].stdout.readline()))
                ratio = statistics.median(b / a for a, b in zip(*found, strict=True))
                other, now = map(statistics.median, found)
                print(f"| {size} | {dtype} | {which} | {other:.1f} | {now:.1f} | {ratio:.2f} |", flush=True)
    for worker in workers:
        worker.stdin.close()
        worker.wait()


if __name__ == "__main__":
    main()
