"""Calls in the middle of other calls of the same thread: signal handlers, and finalizers that the garbage collector runs."""

import gc
import signal
import sys
import threading

import pytest
import torch

import shira
from conftest import all_bits, mlp, random_adapter, same_bits
from shira import SwitchError


@pytest.fixture
def switcher():
    made = shira.Switcher(mlp(), ready=1)
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        made.add(name, random_adapter(made._model, seed))
    return made


def in_the_middle(work, act, line):
    """Do some work, and call `act` at its so many-th traced line. Returns whether there was such a line, and what it raised."""
    left, done = [line], []

    def trace(frame, event, argument):
        if event == "line" and "shira" in frame.f_code.co_filename:
            left[0] -= 1
            if left[0] == 0:
                sys.settrace(None)
                done.append(frame)
                act()
        return trace

    error = None
    sys.settrace(trace)
    try:
        work()
    except SwitchError as found:
        error = found
    finally:
        sys.settrace(None)
    return bool(done), error


@pytest.mark.parametrize("nested", ["a", None])
def test_a_call_in_the_middle_of_another_is_refused_and_the_base_stays_known(switcher, nested):
    base = all_bits(switcher._model)
    line, refused = 1, 0
    while True:
        switcher.use("c")
        found, error = in_the_middle(lambda: switcher.use("b"), lambda: switcher.use(nested), line)
        if not found:
            break
        refused += error is not None and "in the middle of another one of the same switcher" in str(error)
        switcher.use(None)
        assert same_bits(all_bits(switcher._model), base), line
        line += 1
    assert refused > 50


def test_a_block_that_is_collected_in_the_middle_of_a_call_is_left_at_its_end(switcher):
    model, line, left = switcher._model, 1, 0
    base = all_bits(model)

    def stream():
        with switcher.using("a"):
            yield

    while True:
        block = stream()
        next(block)
        found, error = in_the_middle(lambda: switcher.use("b"), block.close, line)
        assert error is None
        if not found:
            break
        wanted = switcher.active
        assert wanted in ({}, {"b": 1.0}), line  # left after the call or before it
        left += wanted == {}
        if wanted == {}:
            assert same_bits(all_bits(model), base), line
        switcher.use(None)
        assert same_bits(all_bits(model), base), line
        line += 1
    assert left > 50
    block.close()


def test_generators_and_sessions_in_cycles(switcher):
    """As in a server whose streams are dropped: the collector ends them in the middle of any call."""
    base = all_bits(switcher._model)

    class Session:
        def __init__(self):
            self.itself, self.stream = self, self.streamed()
            next(self.stream)

        def streamed(self):
            with switcher.using("a"):
                yield

    threshold = gc.get_threshold()
    gc.set_threshold(40, 2, 2)
    try:
        for number in range(150):
            Session()
            switcher.use("bc"[number % 2])
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    switcher.use(None)
    assert same_bits(all_bits(switcher._model), base)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers")
def test_signal_handlers_that_switch(switcher):
    base = all_bits(switcher._model)
    refused, handling = 0, []

    def handler(*_):
        if handling:  # else its error would also come where no call is under way
            return
        handling.append(True)
        try:
            switcher.use("c")
        finally:
            handling.pop()

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0007)
    try:
        for number in range(300):
            try:
                switcher.use("ab"[number % 2])
            except SwitchError:
                refused += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    switcher.use(None)
    assert same_bits(all_bits(switcher._model), base)


@pytest.mark.parametrize("where", ["signal", "thread"])
def test_a_tuner_is_detached_in_the_middle_of_a_step(where):
    base, line = None, 1
    while True:
        model = mlp()
        base = base or all_bits(model)
        tuner = shira.attach(model, targets=".*weight", density=0.3)
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.5)
        model(torch.ones(2, 13)).sum().backward()

        def detach(tuner=tuner):
            if where == "signal":
                tuner.detach()
            else:
                thread = threading.Thread(target=tuner.detach)
                thread.start()
                thread.join()

        def step(model=model, optimizer=optimizer):
            optimizer.step()
            model(torch.ones(2, 13))

        found = False
        try:
            found, _ = in_the_middle(step, detach, line)
        except (RuntimeError, shira.TuningError):
            found = True
        tuner.detach()
        assert same_bits(all_bits(model), base), line
        if not found:
            break
        line += 3
    assert line > 100
