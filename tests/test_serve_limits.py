"""What a careless or hostile client may not cost, and what is told before a model is loaded."""

import asyncio
import socket

import pytest

from serving import Served
from shira import ShiraError

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [None] * 1000},
        {"prompt": [["x"] * 1000] * 1000},
        {"stop": [1] * 1000},
        {"logit_bias": dict.fromkeys(map(str, range(1000)), "x")},
        dict.fromkeys(map("x{}".format, range(1000))),
        {"messages": [1] * 1000},
        {"messages": [{"role": "user", "content": [1] * 1000}]},
        {"messages": [dict.fromkeys(map("x{}".format, range(1000)))]},
    ],
    ids=lambda fields: min(fields),
)
def test_a_body_full_of_errors_costs_no_more_than_the_first(fields):
    from shira.serving.openai_requests import ChatRequest, CompletionRequest

    kind, rest = (ChatRequest, {}) if "messages" in fields else (CompletionRequest, {"prompt": "x"})
    with pytest.raises(pydantic.ValidationError) as found:
        kind.model_validate({"model": "a", **rest, **fields})
    assert found.value.error_count() <= 4  # one for each form that a prompt may have


@pytest.mark.parametrize(
    "stop, words",
    [(["x"] * 17, "at most 16 items"), ("", "at least 1 character"), (["x", 3], r"stop\.1: Input should be a valid string")],
)
def test_what_is_wrong_with_stop_is_said(stop, words):
    from shira.serving.openai_requests import CompletionRequest, RequestError, parsed

    with pytest.raises(RequestError, match=words):
        parsed(CompletionRequest, {"model": "a", "prompt": "x", "stop": stop})
    assert parsed(CompletionRequest, {"model": "a", "prompt": "x", "stop": "end"}).stop == ["end"]


def test_answers_are_counted_not_requests_alone(tmp_path):
    served = Served(tmp_path, app_options={"max_running": 2, "max_queue": 2})

    async def work(client):
        create = client.completions.create
        alone = await create(model="a", prompt="hello", max_tokens=2, n=9)
        running = asyncio.create_task(create(model="a", prompt="hello", max_tokens=80, n=3))
        while served.engine.open < 3:
            await asyncio.sleep(0)
        with pytest.raises(openai.RateLimitError, match="3 answers wait or run"):
            await create(model="a", prompt="hello", max_tokens=2, n=2)
        beside = await create(model="b", prompt="hello", max_tokens=2)
        await running
        return alone, beside

    alone, beside = served.http(work)
    assert len(alone.choices) == 9 and len(beside.choices) == 1


def test_what_can_be_checked_is_checked_before_the_model_is_loaded(tmp_path, monkeypatch):
    from shira.serving.settings import Settings
    from shira.serving.transformers_server import serve

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for words, changed in (
            ("cannot listen on 127.0.0.1:", {}),
            ("cannot listen on 300.1.1.1:", {"host": "300.1.1.1"}),
            ("there is no folder", {"adapters": str(tmp_path / "absent")}),
            ("'b.c' cannot be a name of the base", {"served_model_name": ["x", "b+c"]}),
        ):
            with pytest.raises(ShiraError, match=words):
                serve(Settings(**{"model": "absent", "adapters": str(tmp_path), "port": port, **changed}))


def test_a_model_that_is_not_causal(tmp_path):
    from shira.runs.live import load_live

    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ShiraError, match="is no causal language model of transformers"):
        load_live(str(tmp_path), {}, "float32")
