"""Turns of selections over a scheduler like vLLM's: one selection a step, hidden requests keep theirs, nothing stalls."""

import itertools
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shira.errors import ShiraError
from shira.serving.vllm import scheduler
from shira.serving.vllm.environment import settings as settings_of
from shira.serving.vllm.scheduler import Step, TurnScheduler, key_of, salted
from vllm_fakes import Output, Request, Scheduler, Status

A, B, C = '[["a","1",1.0]]', '[["b","1",1.0]]', '[["c","1",1.0]]'


class Turned(TurnScheduler, Scheduler):
    pass


@pytest.fixture(autouse=True)
def served(tmp_path, monkeypatch):
    monkeypatch.setenv("SHIRA_ADAPTERS", str(tmp_path))
    monkeypatch.setenv("SHIRA_QUANTUM", "3")


class Clock:
    """A clock that a step moves on by a tenth of a second."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 0.1
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(scheduler, "time", made)
    return made


def made(requests=(), **options):
    turned = Turned(**options)
    for request in requests:
        turned.add_request(request)
    return turned


def run(turned, most=2000, arriving=()):
    """Run until all requests have ended. Returns the steps. arriving: step -> requests that come then."""
    arriving, steps, waiting = dict(arriving), [], []
    while turned.requests or arriving:
        assert len(steps) < most, "it has stalled"
        for request in arriving.pop(len(steps), ()):
            turned.add_request(request)
        before = set(turned.requests)
        output = turned.schedule()
        keys = {turned.requests[name].shira_key for name in output.num_scheduled_tokens}
        assert keys <= {output.shira.key}
        assert before == set(turned.requests)
        everywhere = [*turned.running, *turned.waiting, *turned.kv_holding_waiting]
        assert len(everywhere) == len(set(everywhere)) == len(turned.requests)
        blocks = turned.kv_cache_manager
        assert {request for request in blocks.of if blocks.of[request]} <= set(turned.running)
        steps.append((output.shira.key, dict(output.num_scheduled_tokens)))
        waiting.append(output)
        if len(waiting) > turned.ahead:
            turned.update_from_output(waiting.pop(0), Output())
    return steps


def test_each_step_has_one_selection_and_turns_alternate():
    requests = [
        Request(f"{name}{number}", key, tokens=9) for number in range(2) for name, key in (("", ""), ("a", A), ("b", B))
    ]
    turned = made(requests)
    steps = run(turned)
    assert len(turned.finished) == 6 and all(request.num_output_tokens == 9 for request in turned.finished.values())
    order = [key for key, _ in steps]
    assert {"", A, B} == set(order)
    longest = max(len(part) for part in "".join({"": "0", A: "a", B: "b"}[key] for key in order).replace("0", " 0").split())
    assert longest <= 9 and turned.turns.switches >= 6
    assert all(request.num_preemptions == 0 for request in requests)


def test_one_selection_alone_is_scheduled_as_without_turns():
    plain, turned = Scheduler(), made()
    for number in range(5):
        plain.add_request(Request(f"r{number}", tokens=4))
        turned.add_request(Request(f"r{number}", tokens=4))
    while plain.requests:
        expected, found = plain.schedule(), turned.schedule()
        assert expected.num_scheduled_tokens == found.num_scheduled_tokens
        plain.update_from_output(expected, Output())
        turned.update_from_output(found, Output())
    assert not turned.requests


def test_hidden_requests_keep_their_order_and_their_blocks():
    turned = made([Request("a0", A), Request("b0", B), Request("a1", A), Request("b1", B)], budget=100)
    first, _ = turned.schedule(), turned.schedule()
    assert first.shira[:2] == Step(A, (B,))[:2]
    running, held = list(turned.running), dict(turned.kv_cache_manager.of)
    turned.turns._end = -1.0  # the turn is over
    step = turned.schedule()
    assert step.shira.key == B
    assert [request.request_id for request in turned.running] == ["a0", "a1", "b0", "b1"]
    assert all(turned.kv_cache_manager.of[request] >= held[request] for request in running)


def test_waiting_requests_of_all_selections_keep_their_order():
    requests = [Request(f"{name}{number}", key) for number in range(4) for name, key in (("a", A), ("b", B))]
    turned = made(requests, most=1)
    turned.schedule()
    assert [request.request_id for request in turned.waiting] == ["b0", "a1", "b1", "a2", "b2", "a3", "b3"]


def test_hidden_requests_that_came_later_give_up_blocks_and_earlier_ones_do_not(monkeypatch):
    monkeypatch.setenv("SHIRA_QUANTUM", "1")
    first, second = Request("first", A, prompt=8, tokens=8), Request("second", B, prompt=5, tokens=3)
    turned = made([first, second], blocks=4)
    for _ in range(2):
        turned.update_from_output(turned.schedule(), Output())
    assert turned.kv_cache_manager.of == {first: 2, second: 2}
    assert turned.schedule().num_scheduled_tokens == {"first": 1}
    assert second.num_preemptions == 1 and list(turned.waiting) == [second] and turned.running == [first]
    turned.update_from_output(Output(num_scheduled_tokens={"first": 1}, sampled={"first"}), Output())
    run(turned)
    assert first.num_preemptions == 0


def test_requests_that_find_no_blocks_do_not_use_up_the_time_of_others(clock):
    """One finds none while the other runs, which came earlier."""
    a, b = Request("a", A, prompt=12, tokens=8), Request("b", B, prompt=12, tokens=2)
    steps = run(made([a, b], blocks=5))
    assert (a.num_preemptions, b.num_preemptions) == (0, 0)
    empty = [not scheduled for _, scheduled in steps]
    assert any(empty) and not any(one and other for one, other in itertools.pairwise(empty))


def test_requests_that_found_no_blocks_get_a_turn_when_there_are_some(clock):
    short, long, waits = Request("short", A, prompt=8, tokens=2), Request("long", A, prompt=4, tokens=12), Request("waits", B)
    steps = run(made([short, long, waits], blocks=6))
    order = [name for _, scheduled in steps for name in scheduled]
    assert order.index("waits") < len(order) - 1 - order[::-1].index("long")


requests_ = st.lists(
    st.tuples(st.sampled_from(["", A, B, C]), st.integers(1, 12), st.integers(1, 8), st.integers(0, 30)),
    min_size=1,
    max_size=14,
)


@settings(max_examples=120)
@given(
    requests=requests_, blocks=st.integers(5, 24), budget=st.integers(2, 16), most=st.integers(1, 6), ahead=st.integers(0, 1)
)
def test_every_request_ends_however_small_the_cache(requests, blocks, budget, most, ahead):
    arriving = {}
    for number, (key, prompt, tokens, step) in enumerate(requests):
        arriving.setdefault(step, []).append(Request(f"r{number}", key, prompt, tokens))
    for step in range(31):
        arriving.setdefault(step, [])
    turned = made(blocks=blocks, budget=budget, most=most, ahead=ahead)
    run(turned, most=5000, arriving=arriving)
    assert len(turned.finished) == len(requests)
    assert all(request.num_output_tokens == request.max_tokens for request in turned.finished.values())
    assert turned.kv_cache_manager.free_blocks == blocks


def test_a_request_that_waits_for_its_grammar_gets_no_turn_until_it_is_there():
    grammar, other = Request("g", A, grammar=True), Request("o", B, tokens=8)
    turned = made([grammar, other])
    keys = []
    for number in range(6):
        output = turned.schedule()
        keys.append(output.shira.key)
        turned.update_from_output(output, Output())
        if number == 2:
            grammar.structured_output_request.grammar = object()
    assert keys[:3] == [B, B, B] and A in keys[3:]
    assert list(turned.waiting) == [] and grammar.status is Status.RUNNING


@pytest.mark.parametrize("status", [Status.WAITING_FOR_REMOTE_KVS, Status.WAITING_FOR_STREAMING_REQ])
def test_requests_that_wait_for_others_get_no_turn(status):
    blocked = Request("x", A)
    blocked.status = status
    turned = made([blocked, Request("o", B)])
    assert not turned._is_ready(blocked)
    turned._choose()
    assert turned._key == B
    turned.finished_recving_kv_req_ids.add("x")
    assert turned._is_ready(blocked) == (status is Status.WAITING_FOR_REMOTE_KVS)


def test_aborted_requests_leave_every_queue():
    requests = [Request(f"{name}{number}", key, tokens=50) for number in range(2) for name, key in (("a", A), ("b", B))]
    turned = made(requests, most=1)
    for _ in range(5):
        turned.update_from_output(turned.schedule(), Output())
    turned.finish_requests(["a0", "b1"], Status.FINISHED)
    assert {*turned.running, *turned.waiting} == {requests[1], requests[2]}
    run(turned)
    assert requests[2].num_output_tokens == 50


def test_a_failed_switch_ends_the_requests_of_its_step_alone():
    turned = made([Request("a", A), Request("b", B), Request("a2", A)])
    output = turned.schedule()
    assert output.shira.key == A
    turned.update_from_output(output, Output(shira_failed=True))
    assert {name: request.status for name, request in turned.finished.items()} == dict.fromkeys(
        ["a", "a2"], Status.FINISHED_ERROR
    )
    run(turned)
    assert turned.finished["b"].status is Status.FINISHED


def test_a_step_with_two_selections_is_never_given_out(monkeypatch):
    turned = made([Request("a", A), Request("b", B)])
    monkeypatch.setattr(scheduler, "_divided", lambda requests, key: (list(requests), []))
    with pytest.raises(ShiraError, match="of another selection was scheduled"):
        turned.schedule()


def test_the_prefix_cache_is_apart_by_selection_whatever_salt_a_client_sends():
    salts = [salted(key, salt) for key in ("", A, B) for salt in (None, "x", f"shira:{A}|", f"shira:{A}|x")]
    assert len(set(salts)) == len(salts) and salts[0] is None
    turned = made([Request("a", A, salt="x"), Request("o")])
    assert turned.requests["a"].block_hashes == [f"shira:{A}|x"]
    assert turned.requests["o"].block_hashes == ["old"]


def test_a_key_that_is_no_text_is_no_base():
    request = Request("x", {"a": 1.0})
    assert key_of(request) == '{"a": 1.0}'
    request.sampling_params = None  # a pooling request
    assert key_of(request) == ""


def test_model_runner_v2_is_refused():
    class Second(Scheduler):
        def __init__(self):
            super().__init__()
            self.use_v2_model_runner = True

    with pytest.raises(ShiraError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        type("Turned2", (TurnScheduler, Second), {})()


IMPOSSIBLE = [("QUANTUM", "0"), ("QUANTUM", "x"), ("PATIENCE", "-1"), ("PATIENCE", "nan"), ("READY", "1"), ("ADAPTERS", "/no")]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_options_that_are_not_possible_are_named(monkeypatch, name, value):
    monkeypatch.setenv(f"SHIRA_{name}", value)
    with pytest.raises(ShiraError, match=f"SHIRA_{name}"):
        settings_of()


FAMILY = """
import multiprocessing, time
from shira.serving.vllm.environment import end_with_parent

def child():
    end_with_parent()
    print("begun", flush=True)
    time.sleep(60)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=child).start()
    time.sleep(60)
"""


def test_the_engine_ends_with_a_server_that_is_killed(tmp_path):
    (tmp_path / "family.py").write_text(FAMILY)
    process = subprocess.Popen([sys.executable, str(tmp_path / "family.py")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    process.kill()
    process.communicate(timeout=20)  # it returns when both have closed their output
