"""The vLLM worker's errors, what its HTTP server lets through, and the calls between them; on classes like vLLM's."""

import asyncio
import dataclasses
import json
import time

import pytest

from conftest import all_bits, same_bits
from shira.checkpoints.sources import Checkpoint
from shira.errors import BaseMismatch, CheckpointError, ShiraError
from shira.serving.catalogue import Catalogue
from shira.serving.selections import AdapterReplaced
from shira.serving.settings import Settings
from shira.serving.vllm import environment, offline, plugin, server
from shira.serving.vllm.client import VllmEngine, error_of
from shira.serving.vllm.naming import Naming
from shira.serving.vllm.ranks import Alone
from shira.serving.vllm.scheduler import Step
from shira.serving.vllm.worker import SwitchingWorker, mapped_surface
from test_vllm_mapping import SHAPES, adapter_of, changed, checkpoint, loaded


class Cached:
    @classmethod
    def make_empty(cls):
        return cls()


@dataclasses.dataclass
class Output:
    """vLLM's SchedulerOutput."""

    num_scheduled_tokens: dict
    finished_req_ids: set = dataclasses.field(default_factory=set)
    scheduled_new_reqs: list = dataclasses.field(default_factory=lambda: ["new"])
    scheduled_cached_reqs: Cached = dataclasses.field(default_factory=Cached)
    total_num_scheduled_tokens: int = 1
    scheduled_spec_decode_tokens: dict = dataclasses.field(default_factory=dict)
    scheduled_encoder_inputs: dict = dataclasses.field(default_factory=dict)


class Plain:
    """vLLM's Worker: it writes down the steps that it computes, with the weights of each."""

    def __init__(self, model):
        self.model, self.steps = model, []

    def execute_model(self, output):
        if not output.num_scheduled_tokens:
            self.steps.append(("nothing", output.finished_req_ids, output.scheduled_new_reqs))
            return "empty"
        self.steps.append(all_bits(self.model))
        return None

    def sample_tokens(self, grammar):
        return "tokens"

    def shutdown(self):
        self.steps.append("shut down")


class Worker(SwitchingWorker, Plain):
    def shira_answer(self, names):
        return ["failed", *names]


def saved_checkpoint(folder):
    from safetensors.torch import save_file

    save_file(checkpoint(), folder / "model.safetensors")
    return Checkpoint(folder)


@pytest.fixture
def served(tmp_path):
    """A worker, and the catalogue of its adapters "a" and "b"."""
    folder, adapters = tmp_path / "model", tmp_path / "adapters"
    folder.mkdir()
    adapters.mkdir()
    for seed, name in enumerate("ab", start=1):
        adapter_of(checkpoint(), seed).save(adapters / f"{name}.safetensors")
    catalogue = Catalogue(adapters, ["model"])
    for name in "ab":
        catalogue.load(name)
    worker = Worker(loaded())
    worker.shira_take_up(worker.model, saved_checkpoint(folder), Alone(), Settings(adapters=str(adapters)))
    yield worker, catalogue
    worker.shutdown()


def step(key, names, upcoming=(), finished=()):
    output = Output(dict.fromkeys(names, 1), set(finished))
    output.shira = Step(key, tuple(upcoming))
    return output


def key(catalogue, text):
    return catalogue.resolve(text).key


def test_the_step_is_computed_with_its_selection(served):
    worker, catalogue = served
    base, whole = all_bits(worker.model), checkpoint()
    for text in ("a", "b", "model", "a"):
        assert worker.execute_model(step(key(catalogue, text), ["x"])) is None
        assert worker.sample_tokens(None) == "tokens"
    merged = []
    for seed in (1, 2):
        model = loaded()
        model.load_weights(changed(whole, adapter_of(whole, seed)).items())
        merged.append(all_bits(model))
    assert all(same_bits(*pair) for pair in zip(worker.steps, [merged[0], merged[1], base, merged[0]], strict=True))
    worker.execute_model(step("", ["x"]))
    assert same_bits(all_bits(worker.model), base)


def test_a_failed_switch_fails_its_requests_until_they_have_ended(served):
    """In asynchronous scheduling the next step with the same requests is on its way already."""
    worker, catalogue = served
    base, old = all_bits(worker.model), key(catalogue, "a")
    checksum = worker.shira_checksum()
    adapter_of(checkpoint(), 9).save(catalogue.folder / "a.safetensors")
    assert worker.execute_model(step(old, ["x", "y"], finished={"z"})) is None
    assert worker.steps.pop() == ("nothing", {"z"}, [])
    assert worker.sample_tokens(None) == ["failed", "x", "y"]
    reason = worker.shira_failure(old)
    assert isinstance(error_of(reason), AdapterReplaced) and worker.shira_failure(key(catalogue, "b")) is None
    worker.execute_model(step("", ["x", "new"]))
    assert worker.sample_tokens(None) == ["failed", "x", "new"]
    worker.execute_model(step(key(catalogue, "b"), ["other"]))
    assert worker.sample_tokens(None) == "tokens"
    worker.execute_model(step("", ["x"], finished={"x", "y", "new"}))  # another request of that name
    assert worker.sample_tokens(None) == "tokens" and same_bits(base, worker.steps[-1])
    assert worker.shira_checksum() == checksum


@pytest.mark.parametrize("wrong", ["no key", '[["a","00",1.0]]', '[["../a","00",1.0]]', "[[1]]"])
def test_keys_that_mean_nothing_fail_their_requests(served, wrong):
    worker, _ = served
    worker.execute_model(step(wrong, ["x"]))
    assert worker.sample_tokens(None) == ["failed", "x"]
    worker.execute_model(step("", ["y"]))
    assert worker.sample_tokens(None) == "tokens"


def test_any_exception_in_a_switch_leaves_the_base(served, monkeypatch):
    """If even the way back fails, nobody is answered until it has worked."""
    worker, catalogue = served
    base = all_bits(worker.model)
    worker.execute_model(step(key(catalogue, "a"), ["x"]))

    def broken(*arguments):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(worker._ranks.resident._switcher, "_activate", broken)
        for selection, name in ((key(catalogue, "b"), "y"), ("", "z"), (key(catalogue, "a"), "w")):
            worker.execute_model(step(selection, [name]))
            assert worker.sample_tokens(None) == ["failed", name]
            assert worker.shira_failure(selection) == "RuntimeError: out of memory"
    worker.execute_model(step("", ["v"]))
    assert worker.sample_tokens(None) == "tokens" and same_bits(base, worker.steps[-1])


def test_what_comes_next_is_made_ready_in_the_thread(served):
    worker, catalogue = served
    b = key(catalogue, "b")
    worker.execute_model(step("", ["x"], upcoming=[b, "no key"]))
    end = time.monotonic() + 20
    while b not in worker.shira_tiers()["ready"] and time.monotonic() < end:
        time.sleep(0.01)
    worker.execute_model(step(b, ["y"]))
    assert worker.sample_tokens(None) == "tokens" and worker.shira_tiers()["misses"] == 0


def test_a_model_whose_weights_cannot_be_changed_is_refused(tmp_path):
    stored = saved_checkpoint(tmp_path)
    model = loaded()
    mapped = mapped_surface(model, stored)[1]
    assert mapped.landings.keys() == {*SHAPES, "lm_head.weight"}
    for weight in model.parameters():
        weight.data.mul_(2)
    with pytest.raises(CheckpointError, match="no adapter can be used on this model as vLLM has loaded it: .*rearranged"):
        mapped_surface(model, stored)


class Client:
    """vLLM's EngineClient over some workers in this process."""

    def __init__(self, *workers):
        self.workers = workers

    async def collective_rpc(self, method, timeout=None, args=()):
        return [getattr(worker, method)(*args) for worker in self.workers]

    async def check_health(self):
        if not self.workers:
            raise RuntimeError("dead")


def test_calls_to_the_workers(served):
    worker, catalogue = served
    engine = VllmEngine()
    engine.client = Client(worker)
    a = key(catalogue, "a")

    async def calls():
        await engine.prefetch(a)
        assert a in (await engine.tiers())["ready"]
        await engine.pin(a, True)
        assert (await engine.tiers())["pinned"] == [a]
        await engine.pin(a, False)
        assert (await engine.tiers())["pinned"] == [] and await engine.alive() and await engine.failure(a) is None
        adapter_of(checkpoint(3), 4).save(catalogue.folder / "wrong.safetensors")
        catalogue.load("wrong")
        with pytest.raises(BaseMismatch, match="does not belong to this model"):
            await engine.prefetch(key(catalogue, "wrong"))
        adapter_of(checkpoint(), 8).save(catalogue.folder / "b.safetensors")
        with pytest.raises(AdapterReplaced):
            await engine.pin(key(catalogue, "b"), True)
        engine.client = Client()
        assert not await engine.alive()

    asyncio.run(calls())
    assert worker.shira_ended(10**6).startswith("ShiraError")


class App:
    """The server behind the middleware: it keeps what comes, and answers with some messages."""

    def __init__(self, *messages):
        self.messages, self.body, self.scope = messages, None, None

    async def __call__(self, scope, receive, send):
        self.scope, self.body = scope, (await receive())["body"]
        for message in self.messages:
            await send(message)


class Reason:
    def __init__(self, error):
        self.error = error

    async def failure(self, key):
        return self.error


FINE = ({"type": "http.response.start", "status": 200, "headers": []}, {"type": "http.response.body", "body": b"ok"})


def asked(served, body, *messages, path="/v1/completions", reason=None):
    """(what the app was sent, status, body of the answer) of a POST."""
    from shira.serving.metrics import Metrics

    _, catalogue = served
    app = App(*(messages or FINE))
    sent = []
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    parts = [{"type": "http.request", "body": content[:5], "more_body": True}, {"type": "http.request", "body": content[5:]}]

    async def receive():
        return parts.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"content-length", b"1"), (b"x", b"y")]}
    asyncio.run(Naming(app, catalogue, Reason(reason), Metrics())(scope, receive, send))
    answer = b"".join(message.get("body", b"") for message in sent)
    return app, sent[0]["status"], answer


def test_the_model_of_a_request_becomes_its_key(served):
    _, catalogue = served
    body = {"model": "a:0.5+b", "prompt": "x", "vllm_xargs": {"other": 1}, "cache_salt": "mine"}
    app, status, answer = asked(served, body)
    assert (status, answer) == (200, b"ok")
    sent = json.loads(app.body)
    assert sent == {**body, "model": "model", "vllm_xargs": {"other": 1, "shira": key(catalogue, "a:0.5+b")}}
    assert dict(app.scope["headers"]) == {b"content-length": str(len(app.body)).encode(), b"x": b"y"}
    for base in ({"model": "model"}, {"model": None}, {}):
        assert "vllm_xargs" not in json.loads(asked(served, base)[0].body)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "poet"}, 404),
        ({"model": "a:x"}, 400),
        ({"model": ["a"]}, 400),
        ({"model": "a", "vllm_xargs": [1]}, 400),
        ({"model": "a", "vllm_xargs": {"shira": ""}}, 400),
        ({"model": "model", "vllm_xargs": {"shira": '[["b","0",1]]'}}, 400),
    ],
)
def test_requests_that_name_no_selection_are_refused(served, body, status):
    app, found, answer = asked(served, body)
    assert found == status and app.body is None and json.loads(answer)["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages", "/inference/v1/generate", "/anything"])
def test_no_route_takes_a_key_from_a_client(served, path):
    for body in (
        b'{"vllm_x\\u0061rgs": {"sh\\u0069ra": "x"}}',
        {"sampling_params": {"extra_args": {"shira": "x"}}},
        [{"requests": [{"vllm_xargs": {"shira": "x"}}]}],
    ):
        app, status, _ = asked(served, body, path=path)
        assert status == 400 and app.body is None


def test_other_bodies_pass_as_they_are(served):
    for body in (b"no json", b"[1]", b'"text"', b"", b"[" * 100_000):
        assert asked(served, body)[0].body == body
    assert asked(served, {"model": "a"}, path="/tokenize")[0].body == b'{"model": "a"}'


def test_a_failed_answer_says_why_the_switch_failed(served):
    start = {"type": "http.response.start", "status": 500, "headers": []}
    parts = (
        {"type": "http.response.body", "body": b"inter", "more_body": True},
        {"type": "http.response.body", "body": b"nal"},
    )
    error = AdapterReplaced("the file of 'a' was replaced")
    _, status, answer = asked(served, {"model": "a"}, start, *parts, reason=error)
    assert status == 409 and json.loads(answer)["error"] == {
        "message": "the file of 'a' was replaced",
        "type": "invalid_request_error",
        "param": None,
        "code": "adapter_replaced",
    }
    assert asked(served, {"model": "a"}, start, *parts)[1:] == (500, b"internal")
    assert asked(served, {"model": "model"}, start, *parts, reason=error)[1:] == (500, b"internal")
    event = {"type": "http.response.body", "body": b'data: {"error": {"message": "internal"}}\n\n', "more_body": True}
    end = {"type": "http.response.body", "body": b"data: [DONE]\n\n"}
    text = asked(served, {"model": "a"}, FINE[0], event, end, reason=error)[2].decode()
    assert "was replaced" in text and text.endswith("data: [DONE]\n\n") and "internal" not in text
    assert "internal" in asked(served, {"model": "a"}, FINE[0], event, end)[2].decode()


def test_versions_of_vllm(monkeypatch):
    environment.check_version(environment.TESTED[0] + "+cpu")
    for found in ("0.31.9", "0.32.0rc1", "0.33.0"):
        with pytest.raises(ShiraError, match=f"vLLM {found} was not tested.*pip install vllm==0.32.0"):
            environment.check_version(found)
    monkeypatch.setenv("SHIRA_ANY_VLLM", "1")
    environment.check_version("0.33.0")


def test_settings_travel_in_the_environment(tmp_path, monkeypatch):
    chosen = Settings(model="m", adapters=str(tmp_path), quantum=5, served_model_name=["x", "y"], max_model_len=9, patience=0.5)
    monkeypatch.setenv("VLLM_PLUGINS", "other,shira")
    said = environment.variables(chosen)
    assert said["VLLM_PLUGINS"] == "other,shira" and said["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert environment.settings() == chosen


def test_steps_are_not_shared_in_this_engine(tmp_path, monkeypatch):
    monkeypatch.setenv("SHIRA_ADAPTERS", str(tmp_path))
    monkeypatch.setenv("SHIRA_MIX", "4")
    with pytest.raises(ShiraError, match="in the Transformers engine only"):
        environment.settings()
    with pytest.raises(ShiraError, match="in the Transformers engine only"):  # before vLLM is looked for
        server.serve(Settings(model="m", adapters=str(tmp_path), mix=4))
    assert environment.variables(Settings(model="m", adapters=str(tmp_path)))["SHIRA_MIX"] == "0"


def test_the_arguments_of_the_server(tmp_path):
    chosen = Settings(model=str(tmp_path), adapters=str(tmp_path), kv_tokens=100, max_tokens=7, port=1)
    given = server.arguments(chosen)
    assert given[-2:] == ["--served-model-name", tmp_path.name]
    assert {"--port=1", "--host=127.0.0.1", "--num-gpu-blocks-override=4", "--block-size=32"} <= set(given)
    assert '--override-generation-config={"max_new_tokens": 7}' in given
    assert (
        "--scheduler-cls=shira.serving.vllm.engine.Scheduler" in given
        and "--worker-cls=shira.serving.vllm.engine.Worker" in given
    )


def test_without_a_served_folder_vllm_is_left_as_it_is(monkeypatch):
    monkeypatch.delenv("SHIRA_ADAPTERS", raising=False)
    plugin.register()  # would import vLLM otherwise


def test_offline_finds_a_file_that_was_just_written(tmp_path):
    catalogue = Catalogue(tmp_path, ["model"])
    adapter_of(checkpoint(), 1).save(tmp_path / "a.safetensors")
    assert offline._resolved(catalogue, "a").parts[0].name == "a"
    with pytest.raises(ShiraError, match="no adapter 'z'"):
        offline._resolved(catalogue, "z")
