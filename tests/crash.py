"""SIGKILL at random moments of save, train, convert, merge and serve: `make crash KILLS=100`.

Each scene (crash_scenes.py) acts in a process of its own, which is killed: every second time at a moment drawn from the whole
run, otherwise just before or after one of its calls that change the file system (fsync, rename, …). After each kill no half
file may have a name, and acting again must end with the very bytes of a run that nobody disturbed. Every third time that
second run is killed, too. A kill does not lose what the system has in memory, as a power failure may: what `fsync` does is
not tested.
"""

import argparse
import collections
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

CALLS = ("open", "mkdir", "fsync", "replace", "rename", "unlink", "rmdir")  # of the module os
OURS = ".shira-"  # how temporary files begin
SECONDS = 120  # until an act has ended


def tell_of_calls(strike):
    """Call strike() before and after each of CALLS that changes the file system."""

    def watched(real):
        def call(*given, **options):
            if real.__name__ == "open" and not (len(given) > 1 and given[1] & os.O_CREAT):
                return real(*given, **options)
            strike()
            try:
                return real(*given, **options)
            finally:
                strike()

        return call

    for name in CALLS:
        setattr(os, name, watched(getattr(os, name)))


def begin(act, log, at=0):
    """Act in a process of its own. at: the moment among those before and after CALLS at which it kills itself; 0: none.

    Returns the process's id. Its output goes into a file, whose last line, if it ends, is how many of these moments there were.
    """
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code, moments = 1, 0

    def strike():
        nonlocal moments
        moments += 1
        if moments == at:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        tell_of_calls(strike)
        act()
        sys.stdout.flush()
        os.write(descriptor, f"\n{moments}".encode())
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def ended(process, seconds):
    """The status of a process that has ended within some seconds; None if it has not."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.0005)


def kill(process):
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def whole(act, log):
    """Act to the end. Returns (seconds, moments)."""
    began = time.monotonic()
    process = begin(act, log)
    code = ended(process, SECONDS)
    if code != 0:
        if code is None:
            kill(process)
        raise AssertionError(f"an act that nobody killed ended with {code}:\n{Path(log).read_text(errors='replace')[-3000:]}")
    return time.monotonic() - began, int(Path(log).read_text(errors="replace").rsplit("\n", 1)[1])


def struck(act, log, draw, seconds, moments):
    """Act, and be killed. Returns where: "at a call", "at a time", or "ended" if it ended before."""
    if draw.random() < 0.5:
        process = begin(act, log, draw.randint(1, max(1, moments)))
        code = ended(process, SECONDS)
        where = "at a call"
    else:
        process = begin(act, log)
        code = ended(process, draw.uniform(0, seconds))
        where = "at a time"
    if code is None:
        kill(process)
        return where
    assert code in (0, -signal.SIGKILL), f"ended with {code}:\n{Path(log).read_text(errors='replace')[-3000:]}"
    return "ended" if code == 0 else where


def leftovers(folder):
    return [path for path in folder.rglob("*") if path.name.startswith(OURS)]


def tree(folder):
    """path -> bytes of each file below a folder, but temporary ones."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return {name: content for name, content in found.items() if OURS not in name}


def scene(made, kills, folder, draw):
    """Kill one scene so often. Returns what happened how often. Raises AssertionError for a half file, or a wrong end."""
    counts, log = collections.Counter(), folder / "log"
    made.reset()
    seconds, moments = whole(made.act, log)
    made.learn()
    for _ in range(kills):
        made.reset()
        for _ in range(draw.choice([1, 1, 2])):
            counts[struck(made.act, log, draw, seconds, moments)] += 1
            made.check()
            counts["kills with leftovers"] += bool(leftovers(made.folder))
        whole(made.act, log)
        made.check()
        made.check_end()
        made.write_next()  # if the kill came after the last rename, acting again had nothing to write
        assert not leftovers(made.folder), f"left behind: {leftovers(made.folder)}"
        counts["ended right"] += 1
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="of each scene")
    parser.add_argument("--scenes", nargs="+", default=None)
    parser.add_argument("--seed", type=int, default=None)
    given = parser.parse_args()
    import crash_scenes  # after it no thread may run here: a fork would lose it

    seed = int.from_bytes(os.urandom(4), "big") if given.seed is None else given.seed
    failed = False
    for name in given.scenes or crash_scenes.SCENES:
        draw, began = random.Random(f"{seed} {name}"), time.monotonic()
        with tempfile.TemporaryDirectory(prefix="shira-crash-") as place:
            folder = Path(place).resolve()
            (folder / "work").mkdir()
            try:
                counts = crash_scenes.SCENES[name](folder, given.kills, draw)
            except AssertionError as error:
                failed = True
                print(f"{name}, --seed {seed}: {error}", flush=True)
                continue
        told = ", ".join(f"{key} {count}" for key, count in sorted(counts.items()))
        print(f"{name}: {told}; {time.monotonic() - began:.0f} s", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
