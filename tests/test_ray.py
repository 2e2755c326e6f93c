"""Ray Serve over two nodes of a local cluster, with replicas and a node that die under load: `make test-ray`.

With SHIRA_VLLM_PYTHON, an interpreter with vLLM, also over its engine.
"""

import asyncio
import contextlib
import os
import socket
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shira import ShiraError
from shira.integrations.ray import application, selection_of


def test_a_request_goes_where_its_selection_is():
    assert selection_of(b'{"model": "poet:1.0 + coder:0.5"}') == selection_of(b'{"model": "coder:0.5+poet:1.0"}')
    assert selection_of(b'{"model": "poet"}') == "poet"
    for other in (b"", b"{}", b"[]", b'{"model": 3}', b"\xff", b"[" * 100_000):
        assert selection_of(other) == ""
    assert selection_of(b'{"model": "base"}', ["base", "b"]) == ""  # it is everywhere


@given(st.binary(max_size=60))
def test_any_body_has_a_selection(body):
    assert isinstance(selection_of(body), str)


def free_port():
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return each.getsockname()[1]


@contextlib.contextmanager
def cluster(model, adapters, **options):
    """Two nodes, two replicas, and the address of their application; and a function that removes a node."""
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    port = free_port()
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 3})
    node = made.add_node(num_cpus=3)
    ray.init(address=made.address, log_to_driver=False, configure_logging=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = {"served_model_name": "base", "dtype": "float32"}
        serve.run(application(model, adapters, **settings, **options), route_prefix="/")
        yield f"http://127.0.0.1:{port}", lambda: made.remove_node(node, allow_graceful=False)
    finally:
        serve.shutdown()
        ray.shutdown()
        made.shutdown()


def servers(folder):
    """The processes of `shira serve` with a model or adapters in this folder, or vLLM's servers that they became."""
    import psutil

    lines = [(each, each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])]
    return [each for each, line in lines if any(str(folder) in part for part in line)]


def own_path(folder, python):
    """A program that runs this interpreter without the PYTHONPATH of the others."""
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH= exec {python} "$@"\n')
    program.chmod(0o755)
    return str(program)


@pytest.mark.filterwarnings("default")
def test_options_that_exclude_each_other():
    pytest.importorskip("ray")
    with pytest.raises(ShiraError, match="not both"):
        application("m", "a", replicas=2, autoscaling={"max_replicas": 3})


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_answers_are_right_while_parts_of_the_cluster_die(tmp_path, monkeypatch, engine):
    pytest.importorskip("ray")
    python = {"transformers": sys.executable, "vllm": os.environ.get("SHIRA_VLLM_PYTHON")}[engine]
    if python is None:
        pytest.skip("needs SHIRA_VLLM_PYTHON, an interpreter with vLLM")
    import openai
    from benchmarks.serving_load import asked_of, load, make_adapters
    from transformers import AutoModelForCausalLM

    from serving_answers import tiny_model

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # of Ray's processes
    if engine == "vllm":
        python = own_path(tmp_path, os.path.abspath(python))
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    model, adapters = tiny_model(tmp_path / "model"), tmp_path / "adapters"
    adapters.mkdir()
    names = make_adapters(AutoModelForCausalLM.from_pretrained(model), adapters, 4, 0.05, 2.0)
    selections = [*names, "base", f"{names[0]}:0.5+{names[1]}"]
    requests = [each._replace(model=name) for name in selections for each in asked_of(["x"], 3, 12, seed=7)]
    with cluster(model, str(adapters), replicas=2, engine=engine, python=python) as (url, remove_node):
        alone, _ = asyncio.run(load(url, requests, 1))
        assert [answer.status for answer in alone] == [200] * len(requests)
        assert len({answer.text for answer in alone}) > len(requests) // 2
        expected = dict(zip(requests, [answer.text for answer in alone], strict=True))

        def under_load(disturb):
            """Answers of many requests, while something happens; those that are answered must be right."""

            async def both():
                answering = asyncio.create_task(load(url, requests * 8, 8))
                await asyncio.sleep(0.5)
                await asyncio.to_thread(disturb)
                return (await answering)[0]

            answers = asyncio.run(both())
            whole = [(asked, answer) for asked, answer in zip(requests * 8, answers, strict=True) if answer.status == 200]
            assert all(answer.text == expected[asked] for asked, answer in whole if not answer.error)
            return len(answers), sum(answer.status != 200 or bool(answer.error) for answer in answers)

        def recovered():
            end = time.monotonic() + (60 if engine == "transformers" else 240)  # a server with vLLM starts slowly
            while time.monotonic() < end:
                answers, _ = asyncio.run(load(url, requests, 4))
                if all(answer.text == expected[asked] for asked, answer in zip(requests, answers, strict=True)):
                    return
                time.sleep(1)
            raise AssertionError(f"the application did not recover: {answers}")

        lost = {"nothing": under_load(lambda: None)}
        assert lost["nothing"][1] == 0
        assert len(servers(tmp_path)) == 2
        victim = servers(tmp_path)[0]
        its = victim.children(recursive=True)  # vLLM's have some
        lost["a server was killed"] = under_load(victim.kill)
        recovered()
        assert not [each for each in its if each.is_running()]
        lost["a node was killed"] = under_load(remove_node)
        recovered()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=5)
        asked = requests[6]
        again = client.completions.create(
            model=asked.model, prompt=asked.prompt, max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
        )
        assert again.choices[0].text == expected[asked]
        refused = pytest.raises(openai.APIStatusError, client.post, "/adapters", body={"name": names[0]}, cast_to=object)
        assert refused.value.status_code == 501
        print(f"lost of all answers, {engine}:", lost)
    end = time.monotonic() + 30
    while servers(tmp_path) and time.monotonic() < end:
        time.sleep(0.5)
    assert not servers(tmp_path)  # they end with their replicas
