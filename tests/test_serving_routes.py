"""The gate, and the routes about adapters: keys, limits, names, files, memory, metrics."""

import asyncio
import contextlib
import logging
import re
import shutil

import httpx2
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from conftest import all_bits, mlp, random_adapter, same_bits
from shira import ShiraError
from shira.serving import catalogue as catalogue_module
from shira.serving import gate
from shira.serving.adapter_routes import AdapterRoutes, watching
from shira.serving.catalogue import Catalogue
from shira.serving.gate import ADMIN_KEYS, KEYS, Gate, Keys
from shira.serving.metrics import Metrics
from shira.serving.resident import Resident
from shira.serving.settings import Settings


class WeightsAlone:
    """An engine that holds the weights of a model and runs no steps."""

    def __init__(self, resident):
        self.resident = resident
        self.works = True

    async def prefetch(self, key):
        self.resident.prefetch(key)

    async def pin(self, key, pinned):
        self.resident.pin(key, pinned)

    async def tiers(self):
        return self.resident.tiers()

    async def alive(self):
        return self.works


class Site:
    """An application with the gate and the routes, and one route that answers slowly, as a model does."""

    def __init__(self, folder, keys=None, **options):
        self.model, self.folder = mlp(), folder
        self.before = all_bits(self.model)
        for seed, name in enumerate(["coder", "poet"], start=1):
            random_adapter(self.model, seed).save(folder / f"{name}.safetensors")
        self.catalogue = Catalogue(folder, ["base", "alias"])
        self.engine = WeightsAlone(Resident(self.model, folder, ready=2))
        self.metrics = Metrics()
        self.settings = Settings(model="m", adapters=str(folder), scan=0.01, **options)
        self.app = FastAPI()
        self.app.include_router(AdapterRoutes(self.catalogue, self.engine, self.metrics).router)
        self.app.add_api_route("/v1/completions", self.slowly, methods=["POST"], response_model=None)
        self.app.add_middleware(Gate, settings=self.settings, keys=keys or Keys(), metrics=self.metrics)

    async def slowly(self, request: Request):
        wanted = await request.json()
        if "stream" not in wanted:
            await asyncio.sleep(wanted.get("seconds", 0))
            return JSONResponse({"said": wanted})

        async def parts():
            yield b"data: 1\n\n"
            await asyncio.sleep(wanted["seconds"])
            yield b"data: 2\n\n"

        return StreamingResponse(parts(), media_type="text/event-stream")

    def run(self, work):
        async def whole():
            transport = httpx2.ASGITransport(self.app)
            async with (
                watching(self.catalogue, self.settings.scan),
                httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client,
            ):
                return await asyncio.wait_for(work(client), 30)

        return asyncio.run(whole())


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    monkeypatch.setattr(catalogue_module, "SETTLED", -1.0)


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def test_models_are_the_base_and_the_adapters(site):
    async def work(client):
        names = [row["id"] for row in (await client.get("/v1/models")).json()["data"]]
        assert names == ["base", "alias", "coder", "poet"]
        assert (await client.get("/v1/models/poet")).json()["parent"] == "base"
        assert (await client.get("/v1/models/poet:1.0+coder:0.5")).json()["id"] == "poet:1.0+coder:0.5"
        missing = await client.get("/v1/models/painter")
        assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"

    site.run(work)


def test_adapters_come_and_go_while_it_runs(site):
    async def work(client):
        async def rows():
            return {row["name"]: row for row in (await client.get("/v1/adapters")).json()["data"]}

        assert {row["place"] for row in (await rows()).values()} == {"disk"}
        assert (await client.post("/v1/adapters", json={"name": "poet"})).json()["status"] == "served"
        site.engine.resident.use(site.catalogue.resolve("coder").key)
        assert {name: row["place"] for name, row in (await rows()).items()} == {"coder": "weights", "poet": "ready"}
        assert (await client.get("/v1/adapters/poet")).json()["nnz"] > 0
        old = (await rows())["poet"]["version"]
        random_adapter(mlp(), 9).save(site.folder / "poet.safetensors")
        random_adapter(mlp(), 10).save(site.folder / "fresh.safetensors")
        await until(lambda: "fresh" in site.catalogue.versions and site.catalogue.versions["poet"] != old)
        assert (await rows())["poet"]["place"] == "disk"  # the new version
        (site.folder / "fresh.safetensors").unlink()
        await until(lambda: "fresh" not in site.catalogue.versions)
        assert (await client.delete("/v1/adapters/poet")).json()["status"] == "unloaded"
        assert (await client.get("/v1/models/poet")).status_code == 404
        assert (await client.delete("/v1/adapters/poet")).status_code == 404

    site.run(work)


def test_vllms_routes_for_lora_load_and_unload(site):
    async def work(client):
        async def load(name, path):
            return await client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})

        assert (await client.post("/v1/unload_lora_adapter", json={"lora_name": "poet"})).status_code == 200
        assert "poet" not in site.catalogue.versions
        for path in ("poet.safetensors", site.folder / "poet.safetensors"):
            assert (await load("poet", path)).text == "Success: LoRA adapter 'poet' added successfully."
        for path in ("coder.safetensors", "/etc/passwd", "\0", "../poet.safetensors", site.folder.parent / "poet.safetensors"):
            refused = await load("poet", path)
            assert refused.status_code == 400 and "served folder" in refused.json()["error"]["message"]
        assert (await load("../x", "x")).status_code == 400
        assert (await client.post("/v1/unload_lora_adapter", json={"lora_name": "x"})).status_code == 404
        assert (await client.post("/v1/load_lora_adapter", json={"lora_name": "poet"})).status_code == 400

    site.run(work)


def test_pinning(site):
    async def work(client):
        both = "coder:0.5+poet"
        assert (await client.post(f"/v1/adapters/{both}/pin")).json() == {"name": both, "pinned": True}
        for strength in (2, 3):
            site.engine.resident.use(site.catalogue.resolve(f"poet:{strength}").key)
        told = (await client.get("/v1/adapters")).json()
        assert told["pinned"] == [both] and told["ready"] == [both, "poet:3"] and told["weights"] == "poet:3"
        full = await client.post("/v1/adapters/poet/pin")
        huge = await client.post("/v1/adapters/poet:1e300/pin")
        assert huge.status_code == 422 and "of 'poet' must be" in huge.json()["error"]["message"]
        assert full.status_code == 422 and "can be pinned" in full.json()["error"]["message"]
        assert (await client.post("/v1/adapters", json={"name": "poet", "pin": True})).status_code == 422
        assert (await client.delete("/v1/adapters/poet+coder:0.5/pin")).status_code == 200
        assert (await client.delete(f"/v1/adapters/{both}/pin")).status_code == 404

    site.run(work)


def test_a_broken_file_is_an_error_and_not_served(site):
    (site.folder / "broken.safetensors").write_bytes(b"\x01" * 100)
    shutil.copy(site.folder / "poet.safetensors", site.folder / "damaged.safetensors")
    with open(site.folder / "damaged.safetensors", "r+b") as file:
        file.seek(-30, 2)
        file.write(b"\xff" * 30)

    async def work(client):
        assert (await client.get("/v1/models/broken")).status_code == 404
        refused = await client.post("/v1/adapters", json={"name": "broken"})
        assert refused.status_code == 400 and "not a whole safetensors file" in refused.json()["error"]["message"]
        assert str(site.folder) not in refused.text
        refused = await client.post("/v1/adapters", json={"name": "damaged"})
        assert refused.status_code == 422 and str(site.folder) not in refused.text
        assert (await client.get("/v1/models/damaged")).status_code == 404
        for body in (b"{", b"[]", b'{"name": 3}', b"{}", b"\xff"):
            assert (await client.post("/v1/adapters", content=body)).status_code == 400
        assert (await client.get("/v1/adapters/../../etc/passwd")).status_code == 404
        assert (await client.get("/v1/adapters/absent")).status_code == 404

    site.run(work)
    assert same_bits(all_bits(site.model), site.before)


def test_health_follows_the_engine(site):
    async def work(client):
        assert (await client.get("/health")).json() == {"status": "ok"}
        assert (await client.get("/ready")).status_code == 200
        site.engine.works = False
        for path in ("/health", "/ready"):
            assert (await client.get(path)).status_code == 503

    site.run(work)


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
    monkeypatch.setenv(KEYS, keys)
    monkeypatch.delenv(ADMIN_KEYS, raising=False)
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
    for empty in (",", " "):
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
            refused = await client.post("/v1/completions", content=content)
            assert refused.status_code == 413 and "100 bytes" in refused.json()["error"]["message"]

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


def test_the_folder_may_be_away_for_a_while(site, caplog):
    async def work(client):
        moved = site.folder.rename(site.folder.with_name("away"))
        await until(lambda: "cannot be read" in caplog.text)
        assert (await client.get("/v1/models/poet")).status_code == 200
        await asyncio.sleep(0.05)  # some scans
        assert caplog.text.count("cannot be read") == 1
        moved.rename(site.folder)
        random_adapter(mlp(), 3).save(site.folder / "later.safetensors")
        await until(lambda: "later" in site.catalogue.versions)

    site.run(work)


def test_settings_are_checked():
    from shira import DataError

    for wrong in ({"port": -1}, {"ready": 1}, {"patience": -1.0}, {"engine": "sglang"}, {"max_queue": "many"}):
        with pytest.raises(DataError, match=next(iter(wrong))), contextlib.suppress(TypeError):
            Settings(**wrong)
