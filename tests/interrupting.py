"""KeyboardInterrupt wherever shira's own Python code can be interrupted: at any line, and again while that is dealt with."""

import contextlib
import functools
import os
import sys
from pathlib import Path

import shira

HERE = str(Path(shira.__file__).parent)


@functools.cache
def is_ours(file):
    return file.startswith(HERE)


@contextlib.contextmanager
def interrupted(line, later=0, error=KeyboardInterrupt):
    """KeyboardInterrupt, or another error, before the `line`-th line of shira that runs, and, if `later`, a second one at the
    `later`-th event (a line, call or return) after that. Yields a list of what is still to come: empty once all have struck."""
    left = [line] + [later] * bool(later)

    def strike():
        del left[0]
        if left:
            sys.setprofile(profile)
        raise error

    def trace(frame, event, _):
        if event == "line":
            if left:  # counted here, not in a function: most of the time of a run is spent on this line
                left[0] -= 1
                if left[0] == 0:
                    strike()
        elif not is_ours(frame.f_code.co_filename):
            return None
        return trace

    def profile(frame, event, _):
        """Python drops a trace function that has raised: it is put back at the next call or return, for frames to come."""
        if left:
            sys.settrace(trace)
            if is_ours(frame.f_code.co_filename):
                left[0] -= 1
                if left[0] == 0:
                    strike()

    before = sys.gettrace(), sys.getprofile()
    try:
        sys.settrace(trace)
        yield left
    except error:
        pass
    finally:
        sys.setprofile(before[1])  # first, since it puts the trace function back
        sys.settrace(before[0])


@contextlib.contextmanager
def moments():
    """Yields a list of the numbers, as `interrupted` counts them, of the lines of shira that run inside: for each line and the
    calls that led to it the first time and the last; with the environment variable SHIRA_LONG every time."""
    seen, found = [], []

    def trace(frame, event, _):
        if event == "line":
            seen.append(tuple(calls(frame)))
        elif not is_ours(frame.f_code.co_filename):
            return None
        return trace

    def calls(frame):
        while frame:
            yield frame.f_code, frame.f_lineno
            frame = frame.f_back

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield found
    finally:
        sys.settrace(before)
    last = {line: number for number, line in enumerate(seen, 1)}
    first = {line: number for number, line in reversed([*enumerate(seen, 1)])}
    found += range(1, len(seen) + 1) if os.environ.get("SHIRA_LONG") else sorted({*first.values(), *last.values()})


def every_moment(attempt, *, every=17, most=24):
    """Call attempt(line, later) with each line, and with pairs of moments of which about one in `every` is tried, all with the
    environment variable SHIRA_LONG, until none strikes any more; returns how many lines there are.

    attempt: whether all interrupts struck. most: how much later the second one comes.
    """
    step = 1 if os.environ.get("SHIRA_LONG") else every
    line = 1
    while attempt(line, 0):
        for later in range(1 + line % step, most + 1, step):
            if not attempt(line, later):
                break
        line += 1
        assert line < 5000, "the call never ends"
    return line - 1
