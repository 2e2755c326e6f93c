"""Served adapters whose positions lie in another file, `Adapter.save(like=)`; and the end of a server whose time is over."""

import asyncio
import os

import pytest
from benchmarks.serving_load import make_adapters, serving
from transformers import AutoModelForCausalLM

import shira
from conftest import all_bits, same_bits
from serving_answers import tiny_model
from shira.serving.resident import Resident
from shira.serving.selections import AdapterReplaced, SelectionError
from test_hostile_files import one, write
from test_served_adapters import expected_bits, served  # noqa: F401, a fixture

pytestmark = pytest.mark.usefixtures("settled")


def borrow(folder, name, lender):
    """Save other values at the lender's positions, which stay in its file."""
    adapter = shira.load(folder / f"{lender}.safetensors")
    tensors = {
        each: shira.SparseTensor(tensor.shape, tensor.indices, tensor.values * 0.5, tensor.kind)
        for each, tensor in adapter.tensors.items()
    }
    path = folder / f"{name}.safetensors"
    shira.Adapter(tensors, adapter.metadata).save(path, like=folder / f"{lender}.safetensors")
    assert path.stat().st_size < (folder / f"{lender}.safetensors").stat().st_size


def test_positions_in_another_file(served):  # noqa: F811
    model, folder, catalogue = served
    base = all_bits(model)
    borrow(folder, "painter", "poet")
    catalogue.scan()
    resident = Resident(model, folder, ready=2)
    key = catalogue.resolve("painter").key
    resident.use(key)
    assert same_bits(all_bits(model), expected_bits(folder, {"painter": 1.0}))

    lender = folder / "poet.safetensors"
    shira.load(lender).save(lender)  # the same content in a new file
    catalogue.scan()
    assert catalogue.resolve("painter").key != key
    resident.use(catalogue.resolve("painter").key)
    assert same_bits(all_bits(model), expected_bits(folder, {"painter": 1.0}))
    resident.use("")
    with pytest.raises(AdapterReplaced, match="'painter' was replaced"):
        Resident(model, folder, ready=2).use(key)

    away = folder.parent / "poet.safetensors"
    os.rename(lender, away)
    catalogue.scan()
    with pytest.raises(SelectionError, match="'painter' is not served"):
        catalogue.resolve("painter")
    assert "its positions should be in 'poet.safetensors'" in catalogue.refused["painter"]
    os.symlink(away, lender)  # nothing outside of the folder is opened
    catalogue.scan()
    assert "leads out of the served folder" in catalogue.refused["painter"]
    os.unlink(lender)
    os.rename(away, lender)
    catalogue.scan()
    resident.use(catalogue.resolve("painter").key)
    assert same_bits(all_bits(model), expected_bits(folder, {"painter": 1.0}))
    resident.use("")
    assert same_bits(all_bits(model), base)
    rows = {row["name"]: row for row in catalogue.listed()}
    assert rows["painter"]["bytes"] == (folder / "painter.safetensors").stat().st_size


@pytest.mark.parametrize("file", [[], {"x": 1}, None, 7, "", "..", "../poet.safetensors", "\0", "x" * 300, "odd.safetensors"])
def test_a_file_that_names_no_lender_is_refused(served, file):  # noqa: F811
    _, folder, catalogue = served
    write(folder / "odd.safetensors", *one([4, 4], {"file": file, "crc32": 0}))
    catalogue.scan()
    assert "odd" in catalogue.refused and "poet" in catalogue.versions


def test_answers_that_are_not_finished_in_time_end_with_an_error(tmp_path):
    """At the end of --shutdown-timeout; until then they are written."""
    import aiohttp

    model, adapters = tiny_model(tmp_path / "model"), tmp_path / "adapters"
    adapters.mkdir()
    make_adapters(AutoModelForCausalLM.from_pretrained(model), adapters, 1, 0.05, 2.0)
    options = ["--served-model-name", "base", "--engine", "transformers", "--shutdown-timeout", "0.1"]

    async def asked(url, process):
        body = {"model": "base", "prompt": "a", "max_tokens": 240, "ignore_eos": True}
        async with aiohttp.ClientSession() as client:

            async def whole():
                async with client.post(f"{url}/v1/completions", json=body) as answer:
                    return answer.status, await answer.json()

            async def stream():
                async with client.post(f"{url}/v1/completions", json=body | {"stream": True}) as answer:
                    first = await answer.content.readline()
                    begun.set()
                    return answer.status, first, await answer.content.read()

            begun = asyncio.Event()
            tasks = [asyncio.create_task(each()) for each in (whole, stream)]
            await asyncio.wait_for(begun.wait(), 60)
            process.terminate()
            return await asyncio.gather(*tasks)

    with serving(model, adapters, tmp_path / "log", *options) as server:
        (status, body), (streamed, first, rest) = asyncio.run(asked(server.url, server.process))
        server.process.wait(60)
    assert status == 503 and "the server is stopping" in body["error"]["message"]
    assert streamed == 200 and first.startswith(b"data: {") and b"the server is stopping" in rest
    assert "Traceback" not in (tmp_path / "log").read_text()
