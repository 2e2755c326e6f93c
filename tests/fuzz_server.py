"""Requests at random to the server on a tiny model: each is answered or refused, and the next one is answered as before.

A case is JSON: a list of requests as they are on the wire, with bytes as Latin-1 text. Beside the served folder lies another
one, which links lead to: no file in it may be opened.
"""

import asyncio
import contextlib
import functools
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from urllib.parse import quote, unquote

from conftest import random_adapter
from serving import Served
from test_hostile_files import swapped

ENDING = ".json"
SECRET = "OUTSIDE-7f3a"  # in the file beside the served folder
SECONDS = 20  # until an answer is there
NAMES = ["a", "b", "base", "a:0.5+b", "a:-1", "b:1e-300", "missing", "broken", "link", "linked", "folder", "a:1e999", "a+a", ""]
NAMES += [
    "..",
    "../outside/secret",
    "..\\secret",
    "/etc/passwd",
    "a\0b",
    "x" * 300,
    "é",
    "\u202e",
    "a" + ":0.5+b" * 20,
    "%s",
    " ",
]
ADMINISTRATION = ["/v1/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
PATHS = ["/v1/completions", "/v1/chat/completions", *ADMINISTRATION, "/v1/models", "/health", "/ready", "/metrics"]
PATHS += ["/v1/adapters/{}", "/v1/adapters/{}/pin", "/v1/models/{}", "/{}", "/v1/completions/", "//v1//models", "/docs"]
METHODS = ["GET", "POST", "DELETE", "PUT", "HEAD", "OPTIONS", "PATCH", "X"]
TEXTS = ["", "hello", "é\u202e\x00", "\U0001f600" * 9, "x" * 200, "<s><pad>", "x{{ 1/0 }}", "\n\r"]
ODD = [
    *TEXTS,
    0,
    -1,
    1,
    2,
    96,
    2**31,
    2**63,
    10**39,
    0.5,
    -0.0,
    1e308,
    True,
    None,
    [],
    [""],
    [0],
    [96, 97],
    [[1]],
    {},
    {"5": 100},
]
FIELDS = {
    **{
        name: ODD
        for name in ("max_tokens", "n", "seed", "temperature", "top_p", "top_k", "min_p", "logprobs", "stop", "stream")
    },
    **{name: ODD for name in ("frequency_penalty", "presence_penalty", "repetition_penalty", "ignore_eos", "best_of", "user")},
    "logit_bias": [{"5": 100}, {"5": -100, "6": 1e-9}, {"97": 1}, {"-1": 1}, {"5": "x"}],
    "stream_options": [{"include_usage": True}, {"include_usage": 5}, {"x": 1}],
    **{
        name: ODD for name in ("top_logprobs", "max_completion_tokens", "response_format", "tools", "echo", "suffix", "unknown")
    },
}
HEADERS = {
    "host": ["localhost", "127.0.0.1:1", "evil.example", "[::1", "[::1]:x", "", "localhost:99999999", "\xff"],
    "origin": ["http://localhost", "http://evil.example", "null", "http://[", "\xff\xfe"],
    "content-length": ["0", "5", "-1", "99999999999", "9" * 5000, "\u00b2", "x", ""],
    "authorization": ["Bearer x", "Bearer \xff", "Basic eA==", ""],
    "x-request-id": ["7", "x" * 200, "\xff", "a b"],
    "content-type": ["application/json", "text/plain", "multipart/form-data", "\xff"],
    "transfer-encoding": ["chunked"],
    "expect": ["100-continue"],
}


class Site:
    """The application, which answers as long as the process lives, with what lies in and beside its folder."""

    def __init__(self):
        self._place = tempfile.TemporaryDirectory(prefix="shira-fuzz-")
        self.outside, self.folder = (Path(self._place.name).resolve() / name for name in ("outside", "adapters"))
        self.outside.mkdir()
        self.folder.mkdir()
        self.opened, self.watched = [], False
        self.served = Served(self.folder, app_options={"max_tokens": 4, "max_running": 8, "max_queue": 8, "max_body": 100_000})
        adapter = random_adapter(self.served.model, 5)
        adapter.metadata["name"] = SECRET
        adapter.save(self.outside / "secret.safetensors")
        whole = (self.folder / "a.safetensors").read_bytes()
        (self.folder / "broken.safetensors").write_bytes(whole[:-7])
        (self.folder / "link.safetensors").symlink_to(self.outside / "secret.safetensors")
        (self.folder / "linked").symlink_to(self.outside)
        (self.folder / "folder").mkdir()
        (self.folder / "folder" / "adapter.safetensors").symlink_to(self.outside / "secret.safetensors")
        self.app = self.served.app()
        self.loop = asyncio.new_event_loop()
        self._lifespan = self.app.router.lifespan_context(self.app)
        self.loop.run_until_complete(self._lifespan.__aenter__())
        sys.addaudithook(self._audit)
        self.usual = self.usual_answers()

    def _audit(self, event, given):
        if self.watched and event in ("open", "os.listdir", "os.scandir") and isinstance(given[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(given[0]))
            if path.startswith(str(self.outside)):
                self.opened.append(path)

    def check(self):
        assert self.usual_answers() == self.usual, "the server answers otherwise than before"

    def close(self):
        """End the engine; the base must then be back."""
        self.check()
        self.loop.run_until_complete(self._lifespan.__aexit__(None, None, None))
        self.loop.close()
        self._place.cleanup()
        assert self.served.intact(), "the base is not back"

    def ask(self, request):
        """(status, body) of one request; (0, b"") if the client has left before."""
        raw = request["path"].encode()
        body = request.get("body", "").encode("latin-1")
        sent = [{"type": "http.request", "body": body[: len(body) // 2], "more_body": True}] if request.get("pieces") else []
        sent += [{"type": "http.request", "body": body[len(body) // 2 :] if sent else body, "more_body": False}]
        headers = [(name.encode(), value.encode("latin-1")) for name, value in request.get("headers", [])]
        scope = {
            **{
                "type": "http",
                "http_version": "1.1",
                "scheme": "http",
                "server": ("127.0.0.1", 8000),
                "asgi": {"version": "3.0"},
            },
            **{"method": request["method"], "raw_path": raw, "path": unquote(raw.decode()), "client": ("127.0.0.1", 5)},
            **{"query_string": request.get("query", "").encode("latin-1"), "headers": headers, "root_path": "", "state": {}},
        }
        answers, left = [], request.get("leaves")

        async def receive():
            if sent and not (left == "at once" or (left == "in the body" and len(sent) == 1)):
                return sent.pop(0)
            if not left:
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}

        async def send(message):
            answers.append(message)

        self.loop.run_until_complete(asyncio.wait_for(self.app(scope, receive, send), SECONDS))
        status = next((message["status"] for message in answers if message["type"] == "http.response.start"), 0)
        return status, b"".join(message.get("body", b"") for message in answers)

    def usual_answers(self):
        """What a client gets for the base and for two selections, and the health of the server."""
        found = []
        for name in ("a", "b"):
            self.served.catalogue.load(name)
        for model in ("base", "a", "a:0.5+b"):
            body = json.dumps({"model": model, "prompt": "hello", "max_tokens": 2, "temperature": 0})
            status, answer = self.ask({"method": "POST", "path": "/v1/completions", "body": body})
            found.append((status, json.loads(answer)["choices"] if status == 200 else answer))
        return [*found, self.ask({"method": "GET", "path": "/health"})]


@functools.cache
def site():
    return Site()


def close():
    """End what `site` has begun."""
    if site.cache_info().currsize:
        site().close()
        site.cache_clear()


def case(draw, pool):
    """A few requests, of which some were in another case."""
    known = [request for each in pool for request in each]
    return [
        changed(draw, draw.choice(known)) if known and draw.random() < 0.3 else a_request(draw)
        for _ in range(draw.choice([1, 1, 2, 3]))
    ]


def changed(draw, request):
    """Another value somewhere in the body, or another method, path or header."""
    what = draw.choice(["body", "body", "method", "headers", "path"])
    fresh = a_request(draw)
    if what != "body":
        return request | {what: fresh[what]}
    try:
        return request | {"body": written(swapped(json.loads(request["body"]), draw))}
    except (ValueError, RecursionError):
        return request | {"body": fresh["body"]}


def a_request(draw):
    path = draw.choice(PATHS).replace("{}", quote(draw.choice(NAMES), safe=draw.choice(["", "/:+"])))
    if draw.random() < 0.05:
        path = "/" + draw.choice(["%2e%2e/", "%ff", "%00", "v1/models/%2e%2e%2foutside%2fsecret", "v1/adapters/../../etc"])
    post = path.split("?")[0] in PATHS[:5] or path.endswith("/pin")
    found = {"method": "POST" if post and draw.random() < 0.9 else draw.choice(METHODS), "path": path}
    found["headers"] = [[name, draw.choice(HEADERS[name])] for name in draw.sample(sorted(HEADERS), draw.choice([0, 0, 1, 2]))]
    found["body"] = a_body(draw, path)
    if draw.random() < 0.1:
        found["query"] = draw.choice(["x=1", "%ff=%00", "stream=true"])  # h11, before the application, passes ASCII alone
    if draw.random() < 0.2:
        found["pieces"] = True
    if draw.random() < 0.1:
        found["leaves"] = draw.choice(["at once", "in the body", "later"])
    return found


def a_body(draw, path):
    name = draw.choice(NAMES)
    if path in ADMINISTRATION:
        lora = {
            "lora_name": name,
            "lora_path": draw.choice([name, f"{name}.safetensors", "../outside/secret.safetensors", "a\0"]),
        }
        body = {"name": name, "pin": draw.choice([True, False, 5])} if path == ADMINISTRATION[0] else lora
    elif path == PATHS[1]:
        message = {"role": draw.choice(["user", "system", "assistant", "developer", "x"]), "content": draw.choice(ODD)}
        body = {"model": name, "messages": [message] * draw.choice([1, 1, 2, 0])}
    else:
        body = {"model": name, "prompt": draw.choice(ODD)}
    for field in draw.sample(sorted(FIELDS), draw.choice([0, 0, 1, 2])) if path in PATHS[:2] else ():
        body[field] = draw.choice(FIELDS[field])
    if draw.random() < 0.15:
        body = swapped(body, draw)
    text = written(body)
    if draw.random() < 0.15:
        at = draw.randrange(len(text) + 1)
        wrong = ["", "\xff", "\x00", "9" * 5000, "[" * 5000, "\\ud800", '"', "}", "NaN", "1e999"]
        text = text[:at] + draw.choice(wrong) + text[at + draw.randrange(3) :]
    return text


def written(value):
    """JSON as it is on the wire, with bytes as Latin-1 text."""
    return json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass").decode("latin-1")


def dump(case):
    return json.dumps(case, sort_keys=True, indent=1).encode() + b"\n"


def load(content):
    return json.loads(content)


def run(case):
    """Raises AssertionError if an answer is an error of the server, or if the server no longer answers as before."""
    outcome = answered(case)
    site().check()
    return outcome


def answered(case):
    """The same, without a look at later answers."""
    there, kinds = site(), []
    there.watched = True
    try:
        for request in case:
            status, body = there.ask(request)
            assert status == 0 or 200 <= status < 500, f"{status} {body[:300]!r} for {request}"
            assert b'"server_error"' not in body, f"{body[-300:]!r} for {request}"
            for word in (SECRET, str(there.folder), str(there.outside)):
                assert word.encode() not in body, f"the answer tells {word}: {body[:300]!r}"
            kinds.append(f"{request['method']} {status} {said(body)}")
        assert not there.opened, f"opened outside of the served folder: {there.opened}"
    finally:
        there.watched = False
        there.opened.clear()
    return "; ".join(sorted(set(kinds)))


def said(body):
    """What an answer says, without names and numbers."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        error = json.loads(body)["error"]
        message = re.sub(r"'[^']*'|\"[^\"]*\"|[0-9]+|found .*|no adapter .*", "0", error["message"])
        return f"{error['code']} {error['param']} {message[:60]}"
    return "stream" if body.startswith(b"data:") else "answer" if body else "nothing"
