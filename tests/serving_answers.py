"""Does any request get another's answer? Single runs compared with the same requests under load, while things go wrong.

    python tests/serving_answers.py --answers 5000
    python tests/serving_answers.py --model SmolLM2-135M-Instruct-Q4_1 --answers 300 --adapters 20 --tokens 8
    python tests/serving_answers.py --engine vllm --python .venv-vllm/bin/python

Each request is first answered alone, one at a time. Then many clients send all of them in a random order, and every answer must
be the same text. Meanwhile clients leave, send nonsense, and ask for adapters that are not there. Broken files are dropped in.
The files of some adapters are replaced and removed, and an answer of these must be right for one of the contents they had.
tests/test_serving_answers.py runs it for seconds.
"""

import argparse
import asyncio
import collections
import os
import random
import re
import shutil
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import aiohttp
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a command it is in tests/
from benchmarks.serving_load import SERVE, Asked, ask, asked_of, load, make_adapters, save_adapter, serving

NONSENSE = (b"", b"{", b"[1]", b'{"model": 3}', b'{"model": "adapter000", "prompt": {"a": 1}}', b"\xff\xfe")
VICTIMS = 4  # adapters whose files are replaced and removed meanwhile
CONTENTS = [f"content{number}" for number in range(3)]  # adapters with what those files hold in turn
DENSITY, SIZE = 0.02, 2.0  # of an adapter; of its changes, in standard deviations of the weight
TO_VICTIMS = Asked("", "abc def", 8)


class Found(NamedTuple):
    """Of one run. wrong: (request, expected text, text). statuses: status -> how many. memory: bytes, over time.

    longest_wait: seconds that a selection has waited for its turn, as the server says.
    """

    answers: int
    wrong: list
    statuses: collections.Counter
    memory: list
    seconds: float
    longest_wait: float = 0.0


def tiny_model(folder):
    """A random Llama of two layers whose answers differ from adapter to adapter, saved with a tokenizer of letters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from conftest import letter_tokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, num_key_value_heads=1, max_position_embeddings=256, **sizes))
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data *= 4  # so that its answers are not all one letter
    model.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return str(folder)


def save_victim(weights, path, number):
    """Write one of the contents to a file."""
    save_adapter(weights, path, 900 + number % len(CONTENTS), DENSITY, SIZE)


def sets_of(names, count, seed=0):
    """Weighted sets of two or three adapters."""
    draw = random.Random(seed)
    chosen = [draw.sample(names, draw.choice([2, 3])) for _ in range(count)]
    return ["+".join(f"{name}:{draw.choice([0.25, 0.5, 1.0, 1.5])}" for name in each) for each in chosen]


async def under_load(server, folder, weights, expected, victims, total, clients, seconds):
    """Send random requests until `total` answers have come and `seconds` have passed; see the top of this file."""
    draw = random.Random(1)
    wrong, statuses, memory = [], collections.Counter(), []
    requests = list(expected)
    done, began, stop = 0, time.monotonic(), False
    numel = sum(weight.numel() for weight in weights.values())
    right = {expected[TO_VICTIMS._replace(model=content)] for content in CONTENTS}
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)

    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as client:

        async def honest():
            nonlocal done
            while done < total or time.monotonic() - began < seconds:
                asked = draw.choice(requests)
                answer = await ask(client, server.url, asked)
                statuses[answer.status if not answer.error else f"{answer.status} {answer.error[:60]}"] += 1
                done += 1
                if answer.status != 200 or answer.error or answer.text != expected[asked]:
                    wrong.append((asked, expected[asked], answer))

        async def leaving():
            while not stop:
                await ask(client, server.url, draw.choice(requests), leave_after=draw.randint(1, 3))
                await asyncio.sleep(0.05)

        async def nonsense():
            while not stop:
                async with client.post(f"{server.url}/v1/completions", data=draw.choice(NONSENSE)) as answer:
                    statuses[f"nonsense {answer.status}"] += 1
                for name in ("absent", "../adapter000", "broken", "adapter000:x"):
                    answer = await ask(client, server.url, Asked(name, "abc", 4))
                    statuses[f"unknown {answer.status}"] += 1
                await asyncio.sleep(0.1)

        async def changing():
            number, pause = 0, 0.2 + numel / 1e8
            while not stop:
                for name in victims:
                    number += 1
                    path = folder / f"{name}.safetensors"
                    await asyncio.to_thread(save_victim, weights, path, number)
                    await asyncio.sleep(pause)
                    if number % 5 == 0:
                        path.unlink()
                        await asyncio.sleep(pause)
                    (folder / "broken.safetensors").write_bytes(os.urandom(200))

        async def victims_asked():
            while not stop:
                answer = await ask(client, server.url, TO_VICTIMS._replace(model=draw.choice(victims)))
                statuses[f"changing {answer.status}"] += 1
                if answer.status == 200 and not answer.error and answer.text not in right:
                    wrong.append(("a victim", right, answer))
                await asyncio.sleep(0.02)

        async def watched():
            while not stop:
                memory.append(server.memory())
                await asyncio.sleep(1)

        others = [asyncio.create_task(each()) for each in (leaving, nonsense, changing, victims_asked, watched)]
        await asyncio.gather(*[honest() for _ in range(clients)])
        stop = True
        await asyncio.gather(*others)
    return Found(done, wrong, statuses, memory, time.monotonic() - began)


def run(model, folder, *, engine="transformers", python=sys.executable, adapters=100, sets=20, base=True, prompts=3, tokens=12,
        total=5000, clients=64, seconds=0.0, options=(), environment=None):  # fmt: skip
    """One run. Returns what was found, and the last lines of the server's log."""
    from shira.integrations.transformers import load_model

    served = Path(folder) / "adapters"
    served.mkdir()
    loaded = load_model(model, "float32")
    weights = {name: weight.detach() for name, weight in loaded.named_parameters() if "proj" in name}
    names = make_adapters(loaded, served, adapters, DENSITY, SIZE)
    victims = [f"victim{number}" for number in range(VICTIMS)]
    for number, name in enumerate([*CONTENTS, *victims]):
        save_victim(weights, served / f"{name}.safetensors", number)
    selections = [*names, *sets_of(names, sets), *(["base"] if base else [])]
    asked = asked_of(["x"], prompts, tokens, seed=7)
    requests = [each._replace(model=selection) for selection in selections for each in asked]
    requests += [TO_VICTIMS._replace(model=content) for content in CONTENTS]
    command = [python, "-c", SERVE, "serve", model, "--adapters", str(served), "--engine", engine]
    given = ["--served-model-name", "base", "--dtype", "float32", "--scan", "0.2", *options]
    log = Path(folder) / "server.log"
    with serving(model, served, log, *given, command=command, environment=environment) as server:
        alone, _ = asyncio.run(load(server.url, requests, 1))
        bad = [answer for answer in alone if answer.status != 200 or answer.error]
        assert not bad, bad[:3]
        expected = dict(zip(requests, [answer.text for answer in alone], strict=True))
        found = asyncio.run(under_load(server, served, weights, expected, victims, total, clients, seconds))
        again, _ = asyncio.run(load(server.url, requests, 8))
        pairs = zip(requests, again, strict=True)
        wrong = [(each, expected[each], answer) for each, answer in pairs if answer.text != expected[each]]
        told = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
        longest = float(re.search(r"^shira_longest_wait_seconds (\S+)", told, re.MULTILINE)[1])
        assert server.process.poll() is None, "the server has ended"
    ended = server.process.returncode
    texts = collections.defaultdict(set)
    for each in requests:
        texts[each.prompt].add(expected[each])
    distinct = [len(texts[each.prompt]) for each in asked]
    return (
        found._replace(wrong=found.wrong + wrong, longest_wait=longest),
        distinct,
        len(selections),
        ended,
        log.read_text(errors="replace"),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model; by default a tiny random one", default="")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the server")
    for name, usual in (("answers", 5000), ("adapters", 100), ("sets", 20), ("tokens", 12), ("prompts", 3), ("clients", 64)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--seconds", type=float, default=0.0, help="at least so long")
    parser.add_argument("options", nargs="*", help="more options of the server, after --")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="shira-answers-"))
    try:
        model = given.model or tiny_model(folder / "model")
        found, distinct, selections, ended, _ = run(
            model, folder, engine=given.engine, python=given.python, adapters=given.adapters, sets=given.sets,
            prompts=given.prompts, tokens=given.tokens, total=given.answers, clients=given.clients, seconds=given.seconds,
            options=given.options,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{found.answers:,} answers of {selections} selections from {given.clients} clients in {found.seconds:.0f} s")
    print(f"distinct answers to a prompt: {distinct} of {selections}; the server ended with {ended}")
    for status, count in sorted(found.statuses.items(), key=str):
        print(f"  {status}: {count:,}")
    if found.memory:
        quarter = max(1, len(found.memory) // 4)
        first, last = (sum(part) / len(part) / 2**20 for part in (found.memory[:quarter], found.memory[-quarter:]))
        print(f"memory: {first:.0f} MiB in the first quarter, {last:.0f} MiB in the last")
    print(f"longest wait of a selection for its turn: {found.longest_wait:.2f} s")
    print(f"wrong: {len(found.wrong)}")
    for each in found.wrong[:10]:
        print(" ", each)
    sys.exit(bool(found.wrong))


if __name__ == "__main__":
    main()
