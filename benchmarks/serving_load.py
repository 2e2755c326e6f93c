"""A server of shira in a process of its own, adapters for it, and a bounded load from this process over loopback."""

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import torch
from torch import nn

import shira
from shira.sparse.tensor import fingerprint

__all__ = ["Answer", "Asked", "Server", "ask", "asked_of", "load", "make_adapters", "serving"]

SERVE = "from shira.cli import main; main()"
START = 300  # seconds until a server must be ready


class Asked(NamedTuple):
    """A request: greedy, of exactly so many tokens unless `ends`."""

    model: str
    prompt: str
    tokens: int
    ends: bool = False


class Answer(NamedTuple):
    """What came back. status: of HTTP, 0 if the connection broke. first: seconds to the first token; whole: to the last."""

    status: int
    text: str
    first: float
    whole: float
    error: str = ""


class Server(NamedTuple):
    """A running server: its address, process, and log."""

    url: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def memory(self) -> int:
        """Bytes of memory of the process and its children."""
        import psutil

        me = psutil.Process(self.process.pid)
        return sum(each.memory_info().rss for each in [me, *me.children(recursive=True)])


def make_adapters(
    model: nn.Module,
    folder: Path,
    count: int,
    density: float = 0.01,
    size: float = 0.5,
    mask: str = "rand",
    named: str = "adapter",
) -> list[str]:
    """Save adapters with entries of each linear weight, moved at random by `size` standard deviations of the weight.

    mask: chooses the entries; one that needs no calibration. Returns the names: adapter000, …
    """
    names = [f"{named}{number:03}" for number in range(count)]
    weights = {
        name: weight.detach()
        for name, weight in model.named_parameters()
        if weight.ndim == 2 and ("proj" in name or "fc" in name)
    }
    for number, name in enumerate(names):
        save_adapter(weights, folder / f"{name}.safetensors", number, density, size, mask)
    return names


def save_adapter(
    weights: dict[str, torch.Tensor], path: Path, seed: int, density: float, size: float, mask: str = "rand"
) -> None:
    """Save one such adapter, with the fingerprints of its base."""
    generator = torch.Generator().manual_seed(seed)
    tensors, prints = {}, {}
    for name, weight in weights.items():
        indices = shira.masks.select(mask, name, weight, max(1, round(density * weight.numel())), seed=seed)
        base = weight.flatten()[indices]
        change = size * weight.float().std() * torch.randn(len(indices), generator=generator)
        tensors[name] = shira.SparseTensor(tuple(weight.shape), indices, (base.float() + change).to(weight.dtype), "overwrite")
        prints[name] = fingerprint(base)
    shira.Adapter(tensors, {"name": path.stem, "fingerprints": prints}).save(path)


@contextlib.contextmanager
def serving(
    model: str,
    adapters: Path | None,
    log: Path,
    *options: str,
    command: Sequence[str] = (),
    environment: dict[str, str] | None = None,
) -> Iterator[Server]:
    """A server on a free port, ready; it is ended with SIGTERM at the end. command: another one than `shira serve`'s."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    given = [*command] or [sys.executable, "-c", SERVE, "serve", model, "--adapters", str(adapters)]
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [*given, "--port", port, *options], stdout=out, stderr=out, env={**os.environ, **(environment or {})}
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        asyncio.run(_until_ready(server))
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def _until_ready(server: Server) -> None:
    end = time.monotonic() + START
    async with aiohttp.ClientSession() as client:
        while time.monotonic() < end and server.process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError):
                async with client.get(f"{server.url}/health") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.2)
    raise RuntimeError(f"the server did not start:\n{server.log.read_text(errors='replace')[-3000:]}")


def asked_of(models: Sequence[str], count: int, tokens: int, seed: int = 0, skew: float = 0.0, words: int = 12) -> list[Asked]:
    """Requests with prompts of random letters. skew: of a Zipf distribution over the models; 0 for a uniform one."""
    draw = random.Random(seed)
    weights = [(1 + rank) ** -skew for rank in range(len(models))]
    chosen = draw.choices(models, weights, k=count)
    return [Asked(model, " ".join(_word(draw) for _ in range(words)), tokens) for model in chosen]


def _word(draw: random.Random) -> str:
    return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 5)))


async def ask(client: aiohttp.ClientSession, url: str, asked: Asked, leave_after: int | None = None) -> Answer:
    """Send one request as a stream, and read its answer. leave_after: close the connection after so many events."""
    body = {
        "model": asked.model,
        "prompt": asked.prompt,
        "max_tokens": asked.tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": not asked.ends,
    }
    began = time.perf_counter()
    first, text, error, status = 0.0, "", "", 0
    try:
        async with client.post(f"{url}/v1/completions", json=body) as answer:
            status = answer.status
            if status != 200:
                return Answer(status, "", 0.0, time.perf_counter() - began, (await answer.text())[:500])
            async for event in _events(answer):
                if "error" in event:
                    error = json.dumps(event["error"])
                    continue
                first = first or time.perf_counter() - began
                text += "".join(choice["text"] for choice in event["choices"])
                if leave_after is not None and (leave_after := leave_after - 1) <= 0:
                    break
    except (aiohttp.ClientError, ConnectionError) as broken:
        return Answer(0, text, first, time.perf_counter() - began, f"{type(broken).__name__}: {broken}")
    return Answer(status, text, first, time.perf_counter() - began, error)


async def _events(answer: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.content:
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            yield json.loads(line[6:])


async def load(url: str, requests: Sequence[Asked], clients: int) -> tuple[list[Answer], float]:
    """Answer all requests, each client one after the other. Returns the answers in order, and the seconds of all."""
    answers: list[Answer | None] = [None] * len(requests)
    numbers = itertools.count()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as client:

        async def work() -> None:
            while (number := next(numbers)) < len(requests):
                answers[number] = await ask(client, url, requests[number])

        began = time.perf_counter()
        await asyncio.gather(*[work() for _ in range(clients)])
        seconds = time.perf_counter() - began
    return [answer for answer in answers if answer is not None], seconds
