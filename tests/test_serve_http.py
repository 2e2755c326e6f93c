"""OpenAI's routes over the Transformers engine, with OpenAI's own client."""

import asyncio
import json
import time

import pytest
import torch

from conftest import CHAT, letter_tokenizer
from serving import SELECTIONS, Served

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

CHATS = [{"role": "user", "content": "abc"}]


def tokenizer():
    """Letters, without spaces between them in a decoded text."""
    from tokenizers import decoders

    made = letter_tokenizer(CHAT)
    made.backend_tokenizer.decoder = decoders.Fuse()
    return made


@pytest.fixture
def served(tmp_path):
    return Served(tmp_path, tokenizer=tokenizer(), max_running=8, step_tokens=64)


def text_of(served, selection, prompt, tokens):
    """What `generate` writes alone, as text."""
    ids = served.tokenizer(prompt)["input_ids"]
    return served.tokenizer.decode(served.single(selection, ids, tokens), skip_special_tokens=True)


async def streamed(stream):
    return [chunk async for chunk in stream]


def test_interleaved_answers_streamed_and_not_are_those_of_single_runs(served):
    texts = [(list(SELECTIONS)[n % 4], "abcdefgh"[: 2 + n % 5]) for n in range(12)]
    expected = [text_of(served, *case, 10) for case in texts]

    async def work(client):
        create = client.completions.create
        whole = [create(model=model, prompt=prompt, max_tokens=10, temperature=0) for model, prompt in texts]
        streams = [create(model=model, prompt=prompt, max_tokens=10, temperature=0, stream=True) for model, prompt in texts]
        answers, opened = await asyncio.gather(asyncio.gather(*whole), asyncio.gather(*streams))
        return answers, await asyncio.gather(*map(streamed, opened))

    answers, streams = served.http(work)
    assert [answer.choices[0].text for answer in answers] == expected
    assert ["".join(chunk.choices[0].text for chunk in chunks) for chunks in streams] == expected
    for (model, prompt), answer in zip(texts, answers, strict=True):
        assert answer.model == model and answer.object == "text_completion" and answer.choices[0].finish_reason == "length"
        assert answer.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
            "prompt_tokens": len(prompt),
            "completion_tokens": 10,
            "total_tokens": len(prompt) + 10,
        }


def test_chat(served):
    expected = text_of(served, "a", "?abc;=", 8)

    async def work(client):
        whole = await client.chat.completions.create(model="a", messages=CHATS, max_completion_tokens=8, temperature=0)
        parts = [{"role": "user", "content": [{"type": "text", "text": "abc"}]}]
        stream = await client.chat.completions.create(
            model="a", messages=parts, max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}
        )
        return whole, await streamed(stream)

    whole, chunks = served.http(work)
    assert whole.choices[0].message.content == expected and whole.choices[0].message.role == "assistant"
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-2:] == [None, "length"]
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens == 8 == whole.usage.completion_tokens
    assert chunks[0].usage is None and len({chunk.id for chunk in chunks}) == 1


def test_the_events_of_a_stream(served):
    async def work(client):
        body = {"model": "base", "messages": CHATS, "max_tokens": 2, "temperature": 0, "stream": True, "user": "me"}
        response = await client._client.post("http://shira/v1/chat/completions", json=body)
        return response

    response = served.http(work)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    first, *_, last = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert first["object"] == "chat.completion.chunk" and first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_across_tokens(served, stream):
    plain = text_of(served, "b", "hello", 30)
    stop = plain[7:10]
    expected = plain[: plain.index(stop)]

    async def work(client):
        made = await client.completions.create(
            model="b", prompt="hello", max_tokens=30, temperature=0, stop=[stop, "\n"], stream=stream
        )
        while served.engine._jobs:
            await asyncio.sleep(0.01)
        return await streamed(made) if stream else [made]

    found = served.http(work)
    assert "".join(each.choices[0].text for each in found) == expected
    assert found[-1].choices[0].finish_reason == "stop"
    if not stream:
        assert found[0].usage.completion_tokens == plain.index(stop) + len(stop)


def test_seeds_and_several_answers(served):
    async def work(client):
        ask = {"model": "a", "prompt": "hello", "max_tokens": 12, "temperature": 1.0, "seed": 3}
        four = await client.completions.create(**ask, n=4)
        again, *_ = await asyncio.gather(
            client.completions.create(**ask, n=4), *(client.completions.create(model="b", prompt="xy") for _ in range(3))
        )
        free = [await client.completions.create(**{**ask, "seed": None}) for _ in range(2)]
        lists = await client.completions.create(**{**ask, "prompt": ["hello", "you"], "temperature": 0}, n=2)
        stream = await client.completions.create(**ask, n=4, stream=True)
        return four, again, free, lists, await streamed(stream)

    four, again, free, lists, chunks = served.http(work)
    texts = [choice.text for choice in four.choices]
    assert texts == [choice.text for choice in again.choices] and len(set(texts)) == 4
    assert free[0].choices[0].text != free[1].choices[0].text
    assert [choice.index for choice in lists.choices] == [0, 1, 2, 3]
    assert lists.choices[0].text == lists.choices[1].text == text_of(served, "a", "hello", 12)
    assert lists.choices[2].text == lists.choices[3].text == text_of(served, "a", "you", 12)
    assert lists.usage.prompt_tokens == 8 and four.usage.completion_tokens == 48
    for index, text in enumerate(texts):
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices[0].index == index) == text


def test_logprobs_in_both_forms(served):
    ids = served.tokenizer("hello")["input_ids"]
    chosen = served.single("a", ids, 6)
    with served.oracle.using("a"), torch.no_grad():
        plain = served.model(torch.tensor([ids + chosen])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    expected = [float(row[token]) for row, token in zip(plain, chosen, strict=True)]

    async def work(client):
        ask = {"model": "a", "max_tokens": 6, "temperature": 0}
        completion = await client.completions.create(**ask, prompt="hello", logprobs=2)
        stream = await client.completions.create(**ask, prompt="hello", logprobs=2, stream=True)
        chat = await client.chat.completions.create(**ask, messages=CHATS, logprobs=True, top_logprobs=3)
        chunks = await client.chat.completions.create(**ask, messages=CHATS, logprobs=True, top_logprobs=3, stream=True)
        return completion, await streamed(stream), chat, await streamed(chunks)

    completion, stream, chat, chunks = served.http(work)
    reported = completion.choices[0].logprobs
    assert reported.token_logprobs == pytest.approx(expected, abs=1e-4)
    assert "".join(reported.tokens) == completion.choices[0].text
    assert reported.text_offset == list(range(6))
    assert all(
        len(top) == 2 and max(top.values()) == top[token]
        for top, token in zip(reported.top_logprobs, reported.tokens, strict=True)
    )
    assert [value for chunk in stream for value in chunk.choices[0].logprobs.token_logprobs] == reported.token_logprobs
    assert [value for chunk in stream for value in chunk.choices[0].logprobs.text_offset] == reported.text_offset
    content = chat.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == chat.choices[0].message.content
    assert all(len(entry.top_logprobs) == 3 and entry.bytes == list(entry.token.encode()) for entry in content)
    pieces = [chunk.choices[0].logprobs for chunk in chunks]
    assert [entry for piece in pieces if piece for entry in piece.content] == content


REFUSED = [
    ({"model": "nobody"}, 404, "model_not_found", "no adapter 'nobody' is served"),
    ({"model": "a:much"}, 400, "invalid_model", "must be a finite number"),
    ({"model": "a:1_0"}, 400, "invalid_model", "must be a finite number"),
    ({"model": "a:\u0661"}, 400, "invalid_model", "must be a finite number"),
    ({"prompt": "a" * 200}, 400, "context_length_exceeded", "200 tokens"),
    ({"prompt": "a " * 1000}, 400, "context_length_exceeded", "2,000 characters; expected at most 1,536"),
    ({"max_tokens": 95}, 400, "context_length_exceeded", "both together may be 96"),
    ({"max_tokens": 0}, 400, "invalid_request", "max_tokens: Input should be greater than or equal to 1, found 0"),
    ({"temperature": -1}, 400, "invalid_request", "temperature"),
    ({"prompt": ""}, 400, "context_length_exceeded", "0 tokens"),
    ({"prompt": []}, 400, "invalid_request", "expected 1 to 128 answers"),
    ({"prompt": [5, 97]}, 400, "invalid_request", "from 0 to 96"),
    ({"prompt": "x", "n": 129}, 400, "invalid_request", "n: "),
    ({"echo": True}, 400, "invalid_request", "echo is not supported"),
    ({"suffix": "x"}, 400, "invalid_request", "suffix is not supported"),
    ({"best_of": 3}, 400, "invalid_request", "best_of"),
    ({"stop": ""}, 400, "invalid_request", "stop"),
    ({"logit_bias": {"97": 1}}, 400, "invalid_request", "token 97"),
    ({"logit_bias": {"5": 101}}, 400, "invalid_request", "logit_bias: expected a token's number and a bias from -100 to 100"),
    ({"logit_bias": {"05": 1}}, 400, "invalid_request", "found '05': 1"),
    ({"response_format": {"type": "json_object"}}, 400, "invalid_request", "no structured output and no tools, vLLM has"),
    ({"invented": 1}, 400, "invalid_request", "invented: this server does not know the field"),
    ({"stream_options": {"include_usage": True}}, 400, "invalid_request", "stream=true"),
]


def test_what_is_refused(served):
    async def work(client):
        posts = [
            client._client.post("http://shira/v1/completions", json={"model": "a", "prompt": "hello", **fields})
            for fields, *_ in REFUSED
        ]
        return await asyncio.gather(*posts)

    for (_, status, code, words), response in zip(REFUSED, served.http(work), strict=True):
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (status, code), error
        assert words in error["message"] and set(error) == {"message", "type", "param", "code"}
    assert not served.engine._jobs


def test_what_a_chat_is_refused(served):
    image = {"type": "image_url", "image_url": {"url": "x"}}
    bad = [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [image]}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"top_logprobs": 2}, "top_logprobs"),
    ]

    async def work(client):
        post, url = client._client.post, "http://shira/v1/chat/completions"
        answers = [await post(url, json={"model": "a", "messages": CHATS, **fields}) for fields, _ in bad]
        broken = await post(url, content=b'{"model": ')
        surrogate = await post(url, content=b'{"model": "a", "messages": [{"role": "user", "content": "\\ud800"}]}')
        served.tokenizer.chat_template = None
        return answers, broken, surrogate, await post(url, json={"model": "a", "messages": CHATS}), await post(url + "s")

    answers, broken, surrogate, without, unknown = served.http(work)
    for (_, param), response in zip(bad, answers, strict=True):
        assert response.status_code == 400 and response.json()["error"]["param"] == param
    assert broken.status_code == surrogate.status_code == without.status_code == 400
    assert "has no chat template" in without.json()["error"]["message"]
    assert unknown.status_code == 404 and "there is no POST '/v1/chat/completionss'; OpenAI" in unknown.text


def test_null_is_as_if_a_field_was_not_there(served):
    async def work(client):
        fields = {"stop": None, "seed": None, "logit_bias": None, "response_format": {"type": "text"}, "metadata": {"a": "b"}}
        return await client._client.post(
            "http://shira/v1/completions", json={"model": "a", "prompt": "x", "max_tokens": 3, "temperature": 0, **fields}
        )

    response = served.http(work)
    assert response.json()["choices"][0]["text"] == text_of(served, "a", "x", 3)


def test_a_file_that_cannot_be_read_is_refused_before_a_stream_begins(served):
    path = served.folder / "a.safetensors"

    async def work(client):
        content = bytearray(path.read_bytes())
        content[-3] ^= 255
        path.write_bytes(content)
        url, body = "http://shira/v1/completions", {"model": "a", "prompt": "hello", "stream": True}
        response = await client._client.post(url, json=body)
        return response, await client.completions.create(model="b", prompt="hello", max_tokens=5, temperature=0)

    response, other = served.http(work)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (422, "adapter_error")
    assert error["message"].startswith("a.safetensors: tensor")  # the place of the folder is nobody's business
    assert other.choices[0].text == text_of(served, "b", "hello", 5)


def test_a_failure_in_the_middle_of_a_stream(served):
    steps = iter(range(100))

    def fails(module, args, output):
        if next(steps) == 10:
            raise ZeroDivisionError("the tenth step")

    async def work(client):
        stream = await client.completions.create(model="base", prompt="hello", max_tokens=60, temperature=0, stream=True)
        texts = []
        with pytest.raises(openai.APIError, match="a step of the engine failed .ZeroDivisionError"):
            async for chunk in stream:
                texts.append(chunk.choices[0].text)
        return texts, await client.completions.create(model="a", prompt="hello", max_tokens=5, temperature=0)

    hook = served.model.register_forward_hook(fails)
    texts, answer = served.http(work)
    hook.remove()
    assert len(texts) == 10
    assert answer.choices[0].text == text_of(served, "a", "hello", 5)


def test_an_answer_that_takes_too_long(tmp_path):
    served = Served(tmp_path, tokenizer=tokenizer(), app_options={"request_timeout": 0.05})
    served.model.register_forward_hook(lambda module, args, output: time.sleep(0.02))

    async def work(client):
        with pytest.raises(openai.InternalServerError, match="longer than 0.05 seconds"):
            await client.completions.create(model="a", prompt="hello", max_tokens=60)

    served.http(work)


def test_the_limit_of_tokens(tmp_path):
    served = Served(tmp_path, tokenizer=tokenizer(), app_options={"max_tokens": 7})

    async def work(client):
        with pytest.raises(openai.BadRequestError, match="at most 7"):
            await client.completions.create(model="a", prompt="hello", max_tokens=8)
        return await client.completions.create(model="a", prompt="hello")

    assert served.http(work).usage.completion_tokens == 7


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_what_it_held(served, stream):
    import httpx2

    hook = served.model.register_forward_hook(lambda module, args, output: time.sleep(0.02))
    body = {"model": "a", "prompt": "hello", "max_tokens": 90, "temperature": 0, "stream": stream, "ignore_eos": True}
    with served.listening() as (url, _):
        if stream:
            with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx2.ReadTimeout):
                httpx2.post(f"{url}/v1/completions", json=body, timeout=0.3)
        for _ in range(100):
            if not served.engine._scheduler.has_pending_requests():
                break
            time.sleep(0.01)
        assert not served.engine._jobs and served.engine._scheduler.cache.compute_free_capacity() == 1.0
        assert served.engine.tokens["generated"] < 60
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        answer = client.completions.create(model="b", prompt="hello", max_tokens=5, temperature=0).choices[0].text
        client.close()
    hook.remove()
    assert answer == text_of(served, "b", "hello", 5)


def test_a_server_that_is_asked_to_stop_finishes_what_runs(served):
    import httpx2

    hook = served.model.register_forward_hook(lambda module, args, output: time.sleep(0.01))
    body = {"model": "a", "prompt": "hello", "max_tokens": 40, "temperature": 0, "stream": True, "ignore_eos": True}
    with (
        served.listening() as (url, server),
        httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as response,
    ):
        lines = response.iter_lines()
        events = [next(lines)]
        server.should_exit = True
        events += [line for line in lines if line]
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{url}/health", timeout=5)
    hook.remove()
    assert events[-1] == "data: [DONE]"
    text = "".join(json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-1])
    assert text == text_of(served, "a", "hello", 40)


def test_one_application_has_the_gate_and_all_routes(served):
    async def work(client):
        models = await client.models.list()
        await client.completions.create(model="a", prompt="hello", max_tokens=5, temperature=0)
        get = client._client.get
        found = {path: await get(f"http://shira/{path}") for path in ("health", "ready", "metrics", "v1/adapters")}
        served.engine._manager.background_thread_status.record_fatal_error(MemoryError("no more"))
        return [model.id for model in models.data], found, await get("http://shira/ready")

    models, found, dead = served.http(work)
    assert models == ["base", "a", "b"]
    assert [response.status_code for response in found.values()] == [200] * 4 and dead.status_code == 503
    assert 'shira_tokens_total{kind="answer"} 5.0' in found["metrics"].text
    assert 'shira_tokens_total{kind="prompt"} 5.0' in found["metrics"].text
    assert found["v1/adapters"].json()["weights"] == "a"
    assert found["health"].headers["x-request-id"]
