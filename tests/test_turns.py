"""Turns: who is served in a step. The engine is simulated: steps and switches take the time that they are told to take."""

import random
import statistics
from math import inf
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shira import ShiraError
from shira.serving.turns import Turns


class Cost(NamedTuple):
    """Seconds of a step with b requests: step + each · b; and of a switch."""

    step: float = 0.02
    each: float = 0.002
    switch: float = 0.015

    def longest(self, sizes):
        return self.step + self.each * max(sizes) + self.switch


class Served(NamedTuple):
    turns: Turns
    waits: dict  # key -> the longest wait for a step, in seconds
    allowed: dict  # key -> what its longest wait may have been
    steps: int
    tokens: int
    seconds: float
    done: dict  # key -> when its last request ended


def serve(arrivals, cost, quantum=16, patience=2.0, ready=inf, reading=0.0, told=True):
    """Serve requests (arrival in seconds, key, tokens) one token a step, and note how long each key waited for a step.

    reading: seconds by which a switch takes longer to a selection that is not among the last `ready` ones. told: of which the
    turns know.
    """
    turns = Turns(quantum=quantum, patience=patience, ready=ready if told else inf)
    held = []  # the selections that are ready, the last one in use at the end
    queue = sorted(arrivals, key=lambda each: each[0])
    open_requests, since, ahead = {}, {}, {}
    waits, allowed, done, now, steps, tokens, active = {}, {}, {}, 0.0, 0, 0, None
    longest = cost.longest([len(queue)])
    if ready < inf:  # whole turns, longer for a selection with more requests than the others
        longest = longest * quantum * len(queue) + reading
    while queue or open_requests:
        if not open_requests:
            now = max(now, queue[0][0])
        again = active is not None and active not in open_requests
        while queue and queue[0][0] <= now:
            arrived, key, length = queue.pop(0)
            if key not in open_requests:
                since[key] = arrived
                ahead[key] = len(open_requests)
            open_requests.setdefault(key, []).append([arrived, length])
        if again and active in open_requests:  # it had the last step, so all others are ahead of it, whenever they came
            ahead[active] = len(open_requests) - 1
        present = {key: min(arrived for arrived, _ in requests) for key, requests in open_requests.items()}
        key = turns.choose(present, now, {key: len(requests) for key, requests in open_requests.items()})
        bound = patience + (ahead[key] + 1) * longest
        if now - since[key] - bound > waits.get(key, 0) - allowed.get(key, 0) or key not in waits:
            waits[key], allowed[key] = now - since[key], bound
        now += (
            cost.step
            + cost.each * len(open_requests[key])
            + cost.switch * (key != active)
            + reading * (ready < inf and key not in held)
        )
        held = [*(each for each in held if each != key), key]
        held = held if ready == inf else held[-ready:]
        active = key
        steps, tokens = steps + 1, tokens + len(open_requests[key])
        left = [[arrived, length - 1] for arrived, length in open_requests.pop(key) if length > 1]
        if left:
            open_requests[key] = left
            since[key], ahead[key] = now, len(open_requests) - 1
        else:
            done[key] = now
    return Served(turns, waits, allowed, steps, tokens, now, done)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    keys=st.integers(1, 40),
    requests=st.integers(1, 120),
    span=st.sampled_from([0.0, 1.0, 20.0]),
    skew=st.sampled_from([0.0, 1.0, 2.5]),
    quantum=st.sampled_from([1, 4, 16, 64]),
    patience=st.sampled_from([0.0, 0.3, 2.0]),
    switch=st.sampled_from([0.0, 0.015, 0.3]),
    ready=st.sampled_from([inf, inf, 2, 8]),
)
@example(
    seed=1, keys=2, requests=18, span=1.0, skew=0.0, quantum=1, patience=0.0, switch=0.3, ready=inf
)  # wants more in its last step
def test_no_selection_waits_longer_than_the_stated_bound(seed, keys, requests, span, skew, quantum, patience, switch, ready):
    draw = random.Random(seed)
    weights = [1 / (1 + rank) ** skew for rank in range(keys)]
    names = draw.choices([f"key {number}" for number in range(keys)], weights, k=requests)
    arrivals = [(draw.uniform(0, span), name, draw.choice([1, 3, 20, 80])) for name in names]
    served = serve(arrivals, Cost(switch=switch), quantum, patience, ready, reading=0.15)
    assert served.tokens == sum(length for _, _, length in arrivals)
    for key, wait in served.waits.items():
        assert wait <= served.allowed[key] + 1e-9


def test_a_hot_adapter_does_not_starve_a_cold_one():
    hot = [(0.01 * number, "hot", 50) for number in range(400)]  # it always has requests
    served = serve([*hot, (1.0, "cold", 20)], Cost())
    assert served.done["cold"] < 1.0 + 20 / 16 * 3 + 2  # two turns of its own, and the hot one's between them
    assert served.done["cold"] < served.done["hot"] / 4


def test_alternating_adapters_do_not_thrash():
    arrivals = [(0.001 * number, f"key {number % 2}", 64) for number in range(32)]
    served = serve(arrivals, Cost())
    assert served.steps >= 128
    assert served.turns.switches <= served.steps / 16 + 2


def test_more_selections_than_can_be_ready_have_whole_turns():
    """Single steps, each with a file to read, take five times as long, and most answers end near the end of all."""
    arrivals = [(0.0, f"key {number:02}", 12) for number in range(64)]
    whole, single = (serve(arrivals, Cost(), ready=16, reading=0.15, told=told) for told in (True, False))
    assert whole.seconds < 0.25 * single.seconds
    assert statistics.median(whole.done.values()) < 0.2 * statistics.median(single.done.values())
    assert whole.turns.switches < 2 * 64 and single.turns.switches > 8 * 64


def test_whole_turns_end_when_all_can_be_ready_again():
    turns = Turns(quantum=16, patience=0.0, ready=2)
    three, two = {"a": 0.0, "b": 0.1, "c": 0.2}, {"b": 0.1, "c": 0.2}
    assert [turns.choose(three, float(step)) for step in range(17)] == ["a"] * 16 + ["b"]
    assert [turns.choose(two, 20.0 + step) for step in range(17)] == ["b"] * 15 + ["c", "b"]


def test_the_longest_wait_is_known():
    turns = Turns(quantum=1, patience=10.0)
    for now in (1.0, 2.0, 4.0):
        turns.choose({"a": 0.0, "b": 0.5}, now)
    assert turns.longest_wait == 3.0  # of "a", from 1.0 to 4.0


def test_alone_a_selection_is_never_interrupted():
    served = serve([(0.0, "only", 500)], Cost())
    assert served.turns.switches == 0


def test_one_hundred_at_once_are_served_in_the_order_of_their_arrival():
    arrivals = [(0.001 * number, f"{number:03}", 1) for number in range(100)]
    served = serve(arrivals, Cost())
    assert sorted(served.done, key=served.done.__getitem__) == sorted(served.done)


def test_a_selection_with_more_requests_gets_more_steps():
    turns = Turns(quantum=8, patience=100.0)
    chosen = [turns.choose({"many": 0.0, "few": 0.0}, 0.01 * step, {"many": 30, "few": 10}) for step in range(60)]
    assert chosen.count("many") == 36 and chosen.count("few") == 24  # 12 and 8 a turn


def test_upcoming_is_the_order_in_which_they_will_be_served():
    turns = Turns(quantum=1, patience=10.0)
    present = {"a": 0.0, "b": 1.0, "c": 2.0}
    assert turns.choose(present, 3.0) == "a"
    assert turns.upcoming() == ("b", "c")
    assert turns.choose(present, 3.1) == "b"
    assert turns.upcoming() == ("c", "a")


def test_a_selection_that_wants_nothing_for_a_step_does_not_go_first():
    turns = Turns(quantum=1, patience=10.0)
    assert turns.choose({"a": 0.0, "b": 0.5}, 1.0) == "a"
    assert turns.choose({"b": 0.5}, 2.0) == "b"
    assert turns.choose({"a": 0.0, "b": 0.5, "c": 0.7}, 3.0) == "c"
    assert turns.choose({"a": 0.0, "b": 0.5, "c": 0.7}, 4.0) == "a"
    assert turns.choose({"a": 0.0, "b": 0.5, "c": 0.7}, 5.0) == "b"


def test_impossible_settings_are_refused():
    for quantum, patience in ((0, 1.0), (1, -1.0), (1, float("nan")), (1, float("inf"))):
        with pytest.raises(ShiraError, match="quantum must be"):
            Turns(quantum=quantum, patience=patience)
    with pytest.raises(ValueError, match="no selection wants"):
        Turns().choose({}, 0.0)
