"""The gate before every request: keys, limits, ids, log lines, metrics."""

import asyncio
import logging
import re

import pytest

from serving_site import Site, bearer
from shira import ShiraError
from shira.serving import gate
from shira.serving.gate import ADMIN_KEYS, KEYS, Keys

pytestmark = pytest.mark.usefixtures("settled")


def test_keys_separate_answers_from_administration(tmp_path, monkeypatch):
    monkeypatch.setenv(KEYS, "reader, other")
    monkeypatch.setenv(ADMIN_KEYS, "chief")
    site = Site(tmp_path, Keys.of_environment("0.0.0.0"))

    async def work(client):
        for headers, status in (
            ({}, 401),
            (bearer("x"), 401),
            (bearer("reader"), 200),
            (bearer("other"), 200),
            (bearer("chief"), 200),
        ):
            assert (await client.post("/v1/completions", json={}, headers=headers)).status_code == status
            assert (await client.get("/v1/adapters", headers=headers)).status_code == status
            assert (await client.get("/metrics", headers=headers)).status_code == status
        for headers, status in (({}, 401), (bearer("x"), 401), (bearer("reader"), 403), (bearer("chief"), 200)):
            assert (await client.post("/v1/adapters", json={"name": "poet"}, headers=headers)).status_code == status
            assert (await client.post("/v1/adapters/poet/pin", headers=headers)).status_code == status
            assert (await client.delete("/v1/adapters/poet/pin", headers=headers)).status_code == status
        for odd in ("Basic chief", "chief", "Bearer", "Bearer  chief x"):
            assert (await client.post("/v1/completions", json={}, headers={"Authorization": odd})).status_code == 401
        assert (await client.get("/health")).status_code == 200

    site.run(work)


@pytest.mark.parametrize(
    ("keys", "host", "answers", "changes"), [("", "127.0.0.1", 200, 200), ("", "0.0.0.0", 200, 403), ("k", "::1", 401, 403)]
)
def test_without_a_key_of_administration_only_this_machine_administers(tmp_path, monkeypatch, keys, host, answers, changes):
    monkeypatch.delenv(KEYS, raising=False)
    monkeypatch.delenv(ADMIN_KEYS, raising=False)
    if keys:
        monkeypatch.setenv(KEYS, keys)
    site = Site(tmp_path, Keys.of_environment(host))

    async def work(client):
        assert (await client.post("/v1/completions", json={})).status_code == answers
        assert (await client.post("/v1/adapters", json={"name": "poet"})).status_code == changes

    site.run(work)


def test_keys_of_any_letters_and_variables_without_a_key(tmp_path, monkeypatch):
    monkeypatch.setenv(KEYS, "schlüssel")
    monkeypatch.delenv(ADMIN_KEYS, raising=False)
    site = Site(tmp_path, Keys.of_environment("0.0.0.0"))

    async def work(client):
        for key, status in (("schlüssel".encode(), 200), (b"schl\xfcssel", 401), (b"\xff", 401)):
            headers = {b"Authorization": b"Bearer " + key, b"X-Request-ID": "é".encode()}
            answer = await client.get("/v1/models", headers=headers)
            assert answer.status_code == status and answer.headers["x-request-id"].isalnum()

    site.run(work)
    for empty in ("", ",", " "):
        monkeypatch.setenv(KEYS, empty)
        with pytest.raises(ShiraError, match="holds none"):
            Keys.of_environment("127.0.0.1")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "[::1]:8000", "Origin": "http://localhost:3000"}, 200),
        ({"Origin": "https://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "rebound.example"}, 403),
        ({"Host": "[bad"}, 403),
    ],
)
def test_without_keys_no_page_of_another_site_administers(site, headers, status):
    async def work(client):
        answer = await client.post("/v1/unload_lora_adapter", json={"lora_name": "poet"}, headers=headers)
        assert answer.status_code == status
        assert (await client.get("/v1/models", headers=headers)).status_code == 200

    site.run(work)


def test_a_body_that_does_not_come_frees_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.05)
    site = Site(tmp_path, max_running=1, max_queue=0)

    async def never():
        yield b'{"a":'
        await asyncio.sleep(30)

    async def work(client):
        late = await client.post("/v1/completions", content=never())
        assert late.status_code == 408 and late.json()["error"]["code"] == "slow_body"
        assert (await client.post("/v1/completions", json={})).status_code == 200

    site.run(work)


def test_a_client_that_reads_nothing_does_not_hold_its_request(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "LAST_SECONDS", 0.05)
    site = Site(tmp_path, request_timeout=0.05)
    bodies = [{"type": "http.request", "body": b'{"stream": true, "seconds": 9}'}]

    async def receive():
        return bodies.pop() if bodies else await asyncio.sleep(60)

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)  # as uvicorn waits while the client's buffer is full

    async def work(client):
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
        await asyncio.wait_for(site.app(scope, receive, send), 5)

    site.run(work)


def test_bodies_are_bounded_also_without_their_length(tmp_path):
    site = Site(tmp_path, max_body=100)

    async def pieces():
        for _ in range(20):
            yield b"0123456789"

    async def work(client):
        assert (await client.post("/v1/completions", content=b'{"a": "' + b"x" * 91 + b'"}')).status_code == 200
        for content in (b"x" * 101, pieces()):
            for path in ("/v1/completions", "/health"):  # the second one asks for no key
                refused = await client.post(path, content=content if isinstance(content, bytes) else pieces())
                assert refused.status_code == 413 and "100 bytes" in refused.json()["error"]["message"]
        told = await client.post("/v1/completions", content=b"{}", headers={"content-length": "9" * 5000})
        assert told.status_code == 413
        told = await client.post("/v1/completions", content=b"{}", headers={"content-length": "²".encode()})
        assert told.status_code == 200  # no length: what comes counts

    site.run(work)


def test_too_many_requests_are_refused(tmp_path):
    site = Site(tmp_path, max_running=2, max_queue=1)

    async def work(client):
        answers = await asyncio.gather(*[client.post("/v1/completions", json={"seconds": 0.2}) for _ in range(5)])
        assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 429, 429]
        assert {answer.headers.get("retry-after") for answer in answers} == {None, "1"}
        assert (await client.post("/v1/completions", json={})).status_code == 200

    site.run(work)


def test_slow_senders_take_no_place(tmp_path, monkeypatch):
    monkeypatch.setattr("shira.serving.gate.BODY_SECONDS", 0.5)
    site = Site(tmp_path, max_running=1, max_queue=0)

    async def slowly():
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    async def work(client):
        slow = asyncio.create_task(client.post("/v1/completions", content=slowly()))
        await asyncio.sleep(0.1)
        assert (await client.post("/v1/completions", json={})).status_code == 200
        assert (await slow).status_code == 408

    site.run(work)


def test_a_request_has_a_time_limit(tmp_path):
    site = Site(tmp_path, request_timeout=0.1)

    async def work(client):
        late = await client.post("/v1/completions", json={"seconds": 5})
        assert late.status_code == 504 and late.json()["error"]["code"] == "time_limit"
        stream = await client.post("/v1/completions", json={"seconds": 5, "stream": True})
        assert (
            stream.status_code == 200
            and "data: 1" in stream.text
            and "time_limit" in stream.text
            and "data: 2" not in stream.text
        )

    site.run(work)


def test_each_answer_has_an_id_a_log_line_and_is_counted(site, caplog):
    caplog.set_level(logging.INFO, logger="shira.serving")

    async def work(client):
        given = await client.post("/v1/completions", json={}, headers={"X-Request-ID": "mine-1"})
        assert given.headers["x-request-id"] == "mine-1"
        made = await client.post("/v1/completions", json={}, headers={"X-Request-ID": "bad id\t"})
        assert re.fullmatch(r"[0-9a-f]{32}", made.headers["x-request-id"])
        await client.get("/nowhere/a")
        await client.get("/nowhere/b")
        site.engine.resident.use(site.catalogue.resolve("coder:0.5+poet").key)
        with site.metrics.opened(site.catalogue.resolve("coder:0.5+poet").key):
            text = (await client.get("/metrics")).text
        assert 'shira_requests_total{path="/v1/completions",status="200"} 2.0' in text
        assert 'shira_requests_total{path="other",status="404"} 2.0' in text
        assert 'shira_open_requests{selection="coder+poet"} 1.0' in text
        assert "shira_switches_total 1.0" in text and 'shira_ready_lookups_total{found="not ready"} 1.0' in text
        assert "shira_served_adapters 2.0" in text
        assert 'selection="coder+poet"' not in (await client.get("/metrics")).text

    site.run(work)
    assert re.search(r"mine-1 POST /v1/completions 200 \d+\.\d ms", caplog.text)


def test_a_fault_of_the_server_is_counted_and_has_an_id(site, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="shira.serving")
    monkeypatch.setattr(site.engine, "tiers", lambda: 1 // 0)

    async def work(client):
        client._transport.raise_app_exceptions = False
        answer = await client.get("/v1/adapters")
        assert answer.status_code == 500 and answer.headers["x-request-id"]
        assert answer.json()["error"]["code"] == "internal_error"

    site.run(work)
    assert "GET /v1/adapters 500" in caplog.text


def test_a_client_that_leaves_in_its_body_is_no_fault_of_the_server(site):
    """On the routes about adapters, as on those that answer."""
    sent = []

    async def leaves():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/adapters", "raw_path": b"/v1/adapters", "query_string": b""}
    headers = [(b"host", b"localhost")]
    asyncio.run(site.app({**scope, "headers": headers, "server": ("localhost", 8000), "scheme": "http"}, leaves, send))
    assert [message["status"] for message in sent if message["type"] == "http.response.start"] == [499]
