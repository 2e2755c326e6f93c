"""`shira serve --engine vllm` over HTTP with OpenAI's client, on a tiny model: a part of `make test-vllm`, not of the suite."""

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from openai import APIStatusError, BadRequestError, NotFoundError, OpenAI

from vllm_engine import SELECTIONS, _save, world

LETTERS = ["<pad>", "<s>", "<unk>", *(chr(code) for code in range(33, 126)), " "]  # as in `letter_tokenizer`
PROMPTS = ["hello", "The sea is", "x=1", "a much longer prompt than the others, to take several steps"]
SERVE = "from shira.serving.settings import Settings; from shira.serving.vllm.server import serve; import json, sys; "
SERVE += "serve(Settings(**json.loads(sys.argv[1])))"


class Server:
    def __init__(self, root):
        self.folder, self.adapters, self.oracle = world(root)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        settings = {"model": str(self.folder), "adapters": str(self.adapters), "port": self.port, "dtype": "float32"}
        settings |= {"max_model_len": 256, "quantum": 3, "scan": 0.2, "max_tokens": 100, "shutdown_timeout": 20.0}
        self.log = root / "log"
        with open(self.log, "w") as log:
            command = [sys.executable, "-c", SERVE, json.dumps(settings)]
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self.client = OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=60)

    def wait(self, seconds=240):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            with contextlib.suppress(OSError):
                self.get("/ready")
                return
            time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-3000:])

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=20) as answer:
            return answer.read()

    def post(self, path, body, method="POST"):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), method=method)
        request.add_header("content-type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def written(self, prompt, selection, tokens=12):
        """What Transformers writes, in letters with blanks between them, as vLLM shows them after a prompt."""
        answer = self.oracle.answer([LETTERS.index(letter) for letter in prompt], selection, tokens)
        return "".join(f" {LETTERS[token]}" for token in answer)

    def ask(self, prompt, model, **options):
        options = {
            "max_tokens": 12,
            "temperature": 0,
            "extra_body": {"ignore_eos": True, "skip_special_tokens": False},
            **options,
        }
        return self.client.completions.create(model=model or "model", prompt=prompt, **options)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("http"))
    try:
        made.wait()
        yield made
    finally:
        if made.process.poll() is None:
            made.process.send_signal(signal.SIGTERM)
            made.process.wait(60)


def test_24_streams_at_once(server):
    asked = [(prompt, selection) for prompt in PROMPTS for selection in SELECTIONS] + [(PROMPTS[0], None)] * 4

    def stream(question):
        prompt, selection = question
        return "".join(chunk.choices[0].text for chunk in server.ask(prompt, selection, stream=True))

    for _ in range(2):
        with concurrent.futures.ThreadPoolExecutor(24) as threads:
            assert list(threads.map(stream, asked)) == [server.written(*question) for question in asked]


def test_chats_logprobs_n_stop_seed_and_usage(server):
    whole = server.ask("hello", "a").choices[0].text
    assert whole == server.written("hello", "a")
    assert len(server.ask("hello", "a", logprobs=2).choices[0].logprobs.tokens) == 12
    answer = server.ask("hello", "a", logprobs=2, n=2, temperature=1e-4)  # vLLM refuses n above 1 at temperature 0
    assert [choice.text for choice in answer.choices] == [whole, whole]
    assert all(len(choice.logprobs.tokens) == 12 for choice in answer.choices)
    assert answer.usage.completion_tokens == 24
    stop = whole.split()[3]
    assert server.ask("hello", "a", stop=[stop]).choices[0].text == whole[: whole.index(stop)]
    assert server.ask("hello", "a", stop=[stop]).choices[0].finish_reason == "stop"
    drawn = [server.ask("hello", "b", temperature=1.0, top_p=0.9, seed=5).choices[0].text for _ in range(2)]
    assert drawn[0] == drawn[1] != server.ask("hello", "b", temperature=1.0, top_p=0.9, seed=6).choices[0].text
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "temperature": 0}
    extra = {"ignore_eos": True, "skip_special_tokens": False}
    for selection in SELECTIONS:
        answer = server.client.chat.completions.create(model=selection or "model", extra_body=extra, **chat)
        assert answer.choices[0].message.content == server.written("?hello;=", selection)
        chunks = server.client.chat.completions.create(model=selection or "model", stream=True, extra_body=extra, **chat)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.choices[0].message.content


def test_structured_output(server):
    words = ["yes", "no"]
    for selection in SELECTIONS:
        answer = server.ask("hello", selection, extra_body={"structured_outputs": {"choice": words}})
        assert answer.choices[0].text.replace(" ", "") in words


def test_unknown_adapters_and_keys_of_clients_are_refused(server):
    with pytest.raises(NotFoundError, match="no adapter 'poet' is served"):
        server.ask("hello", "poet")
    for model in ("a:x", "a+a", "a:inf"):
        with pytest.raises(BadRequestError):
            server.ask("hello", model)
    key = '[["a","00",1.0]]'
    for extra in ({"vllm_xargs": {"shira": key}}, {"vllm_xargs": {"shira": ""}}):
        with pytest.raises(BadRequestError, match="not a field for clients"):
            server.ask("hello", None, extra_body=extra)
    salted = {"ignore_eos": True, "skip_special_tokens": False, "cache_salt": 'shira:[["a","00",1.0]]|'}
    assert server.ask("hello", "b", extra_body=salted).choices[0].text == server.written("hello", "b")
    assert server.ask("hello", None, extra_body=salted).choices[0].text == server.written("hello", None)
    with pytest.raises(APIStatusError):
        server.ask("hello", "a", max_tokens="many")


def test_adapters_while_it_runs(server):
    listed = {row["name"]: row for row in json.loads(server.get("/v1/adapters"))["data"]}
    assert {"a", "b", "c"} <= listed.keys() and listed["a"]["status"] == "served"
    assert {model.id for model in server.client.models.list()} >= {"model", "a", "b", "c"}
    server.post("/v1/adapters/c/pin", {})
    assert json.loads(server.get("/v1/adapters"))["pinned"] == ["c"]
    server.post("/v1/adapters/c/pin", {}, "DELETE")
    server.post("/v1/adapters/c", {}, "DELETE")
    with pytest.raises(NotFoundError):
        server.ask("hello", "c")
    assert server.post("/v1/adapters", {"name": "c", "pin": True})["status"] == "served"
    assert server.ask("hello", "c").choices[0].text == server.written("hello", "c")
    text = server.get("/metrics").decode()
    assert "shira_switches_total" in text and "vllm:num_requests_running" in text
    (server.adapters / "broken.safetensors").write_bytes(b"nonsense")
    time.sleep(1.0)
    assert {row["name"]: row["status"] for row in json.loads(server.get("/v1/adapters"))["data"]}["broken"] == "error"
    with pytest.raises(NotFoundError):
        server.ask("hello", "broken")
    with pytest.raises(APIStatusError, match="must be a finite number") as raised:
        server.ask("hello", "a:1e39+b:-1e39")
    assert raised.value.status_code == 422


def test_a_file_that_is_replaced_while_requests_wait(server):
    """Each answer is that of the version when the request came, or an error that says so; others are as before."""
    from shira.serving.catalogue import Catalogue

    file = server.adapters / "a.safetensors"
    before = [server.written(prompt, "a", 60) for prompt in PROMPTS]
    others = [server.written(prompt, "b", 60) for prompt in PROMPTS]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        futures = [threads.submit(server.ask, prompt, model, max_tokens=60) for prompt in PROMPTS for model in ("a", "b")]
        _save(server.oracle, Catalogue(server.adapters, ["model"]), file, 77)
        answers = []
        for future in futures:
            try:
                answers.append(future.result().choices[0].text)
            except APIStatusError as error:
                assert error.status_code == 409 and "replaced" in str(error)
                answers.append("error")
    server.oracle.switcher.remove("a")
    server.oracle.switcher.add("a", file)
    after = [server.written(prompt, "a", 60) for prompt in PROMPTS]
    assert answers[1::2] == others
    assert all(text in (old, new, "error") for text, old, new in zip(answers[::2], before, after, strict=True))
    time.sleep(1.0)
    assert [server.ask(prompt, "a", max_tokens=60).choices[0].text for prompt in PROMPTS] == after


def test_a_client_that_leaves_and_a_server_that_is_asked_to_end(server):
    stream = server.ask("hello", "a", max_tokens=100, stream=True)
    next(iter(stream))
    stream.close()
    assert server.ask("hello", "b").choices[0].text == server.written("hello", "b")
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        last = threads.submit(server.ask, "hello", "b", max_tokens=90)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        assert last.result().choices[0].text == server.written("hello", "b", 90)
    assert server.process.wait(60) in (0, -signal.SIGTERM)
    with pytest.raises(OSError):
        os.kill(server.process.pid, 0)
