"""A fuzzer for what comes from others: `make fuzz MINUTES=60`. Files, plans and requests in turn.

A part (fuzz_files.py, fuzz_kernels.py, fuzz_server.py) has `case(draw, pool)`, a case at random; `run(case)`, which raises what
is wrong and returns the kind of outcome; `dump` and `load`, for the corpus; and perhaps `close`. Cases with a new outcome join
the pool, which later cases are made from. Hypothesis makes what it finds smaller, and the smallest case is kept in
tests/corpus, which tests/test_corpus.py replays. Each part is a process of its own: one that crashes or hangs leaves its case
there, too.
"""

import argparse
import collections
import faulthandler
import hashlib
import importlib
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
PARTS = ("files", "kernels", "server")
SECONDS = 60  # that a case may take before it counts as hanging
BATCH = 200  # cases between two looks at the clock
SMALLEST = 2048  # bytes of a case that the corpus keeps for its outcome alone


def module_of(part):
    return importlib.import_module(f"fuzz_{part}")


def folder_of(module):
    return CORPUS / module.__name__.removeprefix("fuzz_")


def stored(module):
    """The cases of a part in the corpus: name -> case."""
    return {path.name: module.load(path.read_bytes()) for path in sorted(folder_of(module).glob(f"*{module.ENDING}"))}


def closed(module):
    getattr(module, "close", lambda: None)()


def keep(module, content, why):
    """Put a case into the corpus. why: "found" something, or "outcome". Returns its path."""
    path = folder_of(module) / f"{why}-{hashlib.sha256(content).hexdigest()[:12]}{module.ENDING}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


class Draw:
    """Hypothesis' generator, which refuses to draw from nothing, as `random` does, before Hypothesis has noted the draw."""

    def __init__(self, real):
        self._real = real

    def __getattr__(self, name):
        return getattr(self._real, name)

    def choice(self, options):
        if not options:
            raise IndexError("nothing to choose from")
        return self._real.choice(options)

    def randrange(self, stop):
        if stop < 1:
            raise ValueError("nothing to draw from")
        return self._real.randrange(stop)


def in_short(outcome):
    """The kind of an outcome, of which the corpus keeps one case."""
    return outcome.partition("; ")[0][:60]


def place_of(error):
    """Where an error was raised: two with the same place are one defect."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return type(error).__name__, last.filename, last.lineno


def fuzz(part, seconds, current, keep_outcomes):
    """Run one part. current: a file that always holds the case that runs. Returns how many defects were found."""
    module, began = module_of(part), time.monotonic()
    pool = list(stored(module).values())
    outcomes = {module.run(case) for case in pool}
    kept = {in_short(outcome) for outcome in outcomes}
    fresh, known, counts = [], set(), collections.Counter()
    smallest = {}  # place of an error -> the smallest case that raises it

    def once(draw):
        case = module.case(Draw(draw), pool)
        content = module.dump(case)
        current.write_bytes(content)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        counts["cases"] += 1
        try:
            outcome = module.run(case)
        except Exception as error:
            if (place := place_of(error)) not in known:
                smallest[place] = min(smallest.get(place, content), content, key=len)
                raise
        else:
            if outcome not in outcomes:
                outcomes.add(outcome)
                fresh.append((outcome, case))

    rules = settings(max_examples=BATCH, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    rules = settings(rules, phases=[Phase.generate, Phase.shrink], print_blob=False)
    number = int.from_bytes(os.urandom(6), "big")
    while time.monotonic() - began < seconds:
        number += 1
        try:
            hypothesis.seed(number)(rules(hypothesis.given(st.randoms(use_true_random=False))(once)))()
        except Exception as error:
            traceback.print_exception(error)
        for place in smallest.keys() - known:
            counts["found"] += 1
            print(f"{': '.join(map(str, place))}: found, and kept as {keep(module, smallest[place], 'found')}", flush=True)
        known |= smallest.keys()
        for outcome, case in fresh:
            pool.append(case)
            if keep_outcomes and in_short(outcome) not in kept and len(content := module.dump(case)) <= SMALLEST:
                kept.add(in_short(outcome))
                keep(module, content, "outcome")
        fresh.clear()
    closed(module)
    faulthandler.cancel_dump_traceback_later()
    print(
        f"{part}: {counts['cases']:,} cases in {time.monotonic() - began:.0f} s, {len(outcomes)} kinds of outcome, "
        f"{counts['found']} found",
        flush=True,
    )
    return counts["found"]


def guarded(part, given, folder):
    """Run one part in a process of its own. Returns whether nothing was found."""
    current = folder / f"{part}.current"
    current.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--part", part, "--seconds", str(60 * given.minutes / len(given.parts))]
    command += ["--keep-outcomes"] if given.keep_outcomes else []
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    if part == "kernels" and given.sanitized:
        library = subprocess.run(
            ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        path = os.pathsep.join(filter(None, [given.sanitized, os.environ.get("PYTHONPATH")]))
        environment |= {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": path}
    code = subprocess.run(command, env=environment).returncode
    if code not in (0, 1):
        kept = keep(module_of(part), current.read_bytes(), "found") if current.exists() else "no case"
        print(f"{part}: the process ended with {code}, in {kept}", flush=True)
    return code == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="of all parts together")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--sanitized", help="folder of a build of shira with AddressSanitizer, for the kernels")
    parser.add_argument(
        "--keep-outcomes", action="store_true", help="also keep a small case of each kind of outcome in the corpus"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder = HERE.parent / "build" / "fuzz"
    folder.mkdir(parents=True, exist_ok=True)
    if given.part:
        sys.exit(bool(fuzz(given.part, given.seconds, folder / f"{given.part}.current", given.keep_outcomes)))
    sys.exit(not all([guarded(part, given, folder) for part in given.parts]))


if __name__ == "__main__":
    main()
