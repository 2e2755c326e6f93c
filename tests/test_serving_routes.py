"""The routes about adapters: names, files, memory, health."""

import asyncio
import contextlib
import shutil
from pathlib import Path

import pytest
import typer

from conftest import all_bits, mlp, random_adapter, same_bits
from serving_site import until
from shira.cli.options import fields_of, given
from shira.serving.catalogue import path_in
from shira.serving.selections import SelectionError
from shira.serving.settings import Settings

pytestmark = pytest.mark.usefixtures("settled")


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


def test_fields_that_are_not_known_are_refused(site):
    async def work(client):
        lora, path = {"lora_name": "poet", "lora_path": "poet.safetensors"}, "/v1/load_lora_adapter"
        unknown = "strength: this server does not know the field; expected"
        for url, body, words in (
            (
                "/v1/adapters",
                {"name": "poet", "strength": 0.5},
                f"{unknown} name, pin",
            ),
            ("/v1/adapters", {"name": "poet", "pin": "yes"}, "pin: "),
            (path, {**lora, "strength": 0.5}, f"{unknown} lora_name, lora_path"),
            (path, {**lora, "is_3d_lora_weight": True}, "is_3d_lora_weight: "),
            ("/v1/unload_lora_adapter", {"lora_name": "poet", "x": None}, "x: this server does not know"),
        ):
            refused = await client.post(url, json=body)
            assert refused.status_code == 400 and refused.json()["error"]["message"].startswith(words)
        random_adapter(mlp(), 9).save(site.folder / "poet.safetensors")
        old = site.catalogue.versions["poet"]
        loaded = await client.post(path, json={**lora, "load_inplace": True, "is_3d_lora_weight": False})
        assert loaded.status_code == 200 and site.catalogue.versions["poet"] != old
        unloaded = await client.post("/v1/unload_lora_adapter", json={"lora_name": "poet", "lora_int_id": None})
        assert unloaded.status_code == 200

    site.run(work)


def test_pinning(site):
    async def work(client):
        both = "coder:0.5+poet"
        assert (await client.post(f"/v1/adapters/{both}/pin")).json() == {"name": both, "pinned": True}
        assert (await client.post("/v1/adapters/base/pin")).status_code == 200
        assert (await client.delete("/v1/adapters/base/pin")).json() == {"name": "base", "pinned": False}
        for strength in (2, 3):
            site.engine.resident.use(site.catalogue.resolve(f"poet:{strength}").key)
        told = (await client.get("/v1/adapters")).json()
        assert told["pinned"] == [both] and told["ready"] == [both, "poet:3"] and told["weights"] == "poet:3"
        full = await client.post("/v1/adapters/poet/pin")
        huge = await client.post("/v1/adapters/poet:1e300/pin")
        assert huge.status_code == 422 and "of 'poet' must be" in huge.json()["error"]["message"]
        assert full.status_code == 422 and "can be pinned" in full.json()["error"]["message"]
        assert (await client.post("/v1/adapters", json={"name": "poet", "pin": True})).status_code == 422
        assert (await client.delete("/v1/adapters/poet+coder:0.5000001/pin")).status_code == 404
        site.catalogue.unload("poet")  # what is pinned can still be let go
        assert (await client.delete("/v1/adapters/poet+coder:0.5/pin")).status_code == 200
        site.catalogue.load("poet")
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
        assert (await client.head("/health")).status_code == (await client.head("/ready")).status_code == 200  # as probes ask
        assert (await client.get("/ready")).status_code == 200
        site.engine.works = False
        for path in ("/health", "/ready"):
            assert (await client.get(path)).status_code == 503

    site.run(work)


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


def test_a_file_that_cannot_be_served_is_told_once_in_the_log_and_to_who_asks_for_it(site, caplog):
    async def work(client):
        (site.folder / "cut.safetensors").write_bytes(b"\xff" * 100)
        await until(lambda: "adapter cut is not served: cut.safetensors" in caplog.text)
        await asyncio.sleep(0.05)  # some scans
        assert caplog.text.count("adapter cut") == 1
        answer = await client.post("/v1/adapters/cut/pin")
        assert answer.status_code == 404 and "GET /v1/adapters says why" in answer.text
        (site.folder / "cut.safetensors").write_bytes(b"no adapter")
        await until(lambda: caplog.text.count("adapter cut") == 2)

    site.run(work)


def test_settings_are_checked():
    from shira import DataError

    for wrong in ({"port": -1}, {"ready": 1}, {"patience": -1.0}, {"engine": "sglang"}, {"max_queue": "many"}):
        with pytest.raises(DataError, match=next(iter(wrong))), contextlib.suppress(TypeError):
            Settings(**wrong)


def test_the_help_says_what_is_needed():
    for name in ("model", "adapters"):
        assert fields_of(Settings)[name][0]["help"].startswith("Needed: ")


def test_names_of_the_base_on_the_command_line():
    assert given({"served_model_name": "x, y z"}, Settings) == {"served_model_name": ["x", "y z"]}
    for names in ("x,,y z", "x,", ",", ""):
        with pytest.raises(typer.BadParameter, match="no empty ones"):
            given({"served_model_name": names}, Settings)


def test_a_file_that_goes_while_it_is_loaded_is_not_found(site, monkeypatch):
    (site.folder / "late.safetensors").write_bytes((site.folder / "poet.safetensors").read_bytes())

    async def gone(key):
        (site.folder / "late.safetensors").unlink()
        site.catalogue.scan()

    async def work(client):
        monkeypatch.setattr(site.engine, "prefetch", gone)
        refused = await client.post("/v1/adapters", json={"name": "late"})
        assert refused.status_code == 404 and "was removed after it was loaded" in refused.json()["error"]["message"]

    site.run(work)


def test_a_folder_that_a_link_leads_to_is_not_even_listed(tmp_path, monkeypatch):
    (tmp_path / "outside").mkdir()
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "linked").symlink_to(tmp_path / "outside")
    listed = []
    monkeypatch.setattr(Path, "iterdir", lambda path: listed.append(path) or iter(()))
    with pytest.raises(SelectionError, match="'linked' is a link that leads out of the served folder"):
        path_in(tmp_path / "served", "linked")
    assert not listed
