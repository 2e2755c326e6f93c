"""Ray Serve: many servers of one model, on many machines. A request goes to one that has its adapters.

Each replica starts `shira serve` on its own machine, on 127.0.0.1, and passes requests on to it. An ingress reads the field
`model` of a request and asks Ray for a replica that has served the same selection lately (`serve.multiplexed`); so the adapters
stay in few memories, and requests of one selection share batches. docs/scale.md says what happens when a part dies.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ShiraError

__all__ = ["application", "selection_of"]

SERVER = (  # the server ends with the replica, also if that is killed (on Linux, by prctl's PR_SET_PDEATHSIG)
    "import ctypes, signal, sys; sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "from shira.cli import main; main()"
)
PASSED = {"content-type", "authorization", "x-request-id", "retry-after", "cache-control"}  # headers, in both directions
ATTEMPTS, PAUSE = 3, 0.2  # to find a replica that answers; seconds between them
LOST = "the replica that had the request was lost; send it again"


def application(
    model: str,
    adapters: str,
    *,
    replicas: int | None = None,
    autoscaling: Mapping[str, Any] | None = None,
    selections_per_replica: int = 16,
    ongoing_per_replica: int = 64,
    resources: Mapping[str, Any] | None = None,
    python: str = sys.executable,
    **settings: Any,
) -> Any:
    """The application for `ray.serve.run`: OpenAI's routes for answers and names, over replicas of `shira serve`.

    model, adapters: as of `shira serve`, paths that are the same on all machines. settings: more of its options, by name, but
        not host and port: each server listens on 127.0.0.1, at a free port.
    replicas: their number; or autoscaling: Ray's autoscaling_config. resources: Ray's ray_actor_options of a replica, such as
        {"num_gpus": 1}.
    selections_per_replica: how many selections Ray takes to be on one replica; give `ready` the same number.
    python: the interpreter of the replicas' servers; one with vLLM for `engine="vllm"`.

    Adapters come and go by files in the folder. Routes that change a server are not passed on: they would reach one of many.
    Raises ShiraError for options that exclude each other.

        serve.run(application("SmolLM2-135M-Instruct-Q4_1", "/shared/adapters", replicas=4))
    """
    from ray import serve

    if replicas is not None and autoscaling is not None:
        raise ShiraError("give replicas= or autoscaling=, not both")
    options = {"ready": selections_per_replica, **settings, "host": "127.0.0.1"}
    named = settings.get("served_model_name") or (Path(model).resolve().name if os.path.isdir(model) else model)
    base_names = named.split(",") if isinstance(named, str) else list(named)
    command = [python, "-c", SERVER, "serve", model, "--adapters", adapters, *_flags(options)]
    scale = {"autoscaling_config": dict(autoscaling)} if autoscaling is not None else {"num_replicas": replicas or 1}
    actor = {"ray_actor_options": dict(resources)} if resources is not None else {}
    deployed = serve.deployment(
        name="shira", max_ongoing_requests=ongoing_per_replica, health_check_period_s=2, **actor, **scale
    )(_replica(selections_per_replica))
    return serve.deployment(name="shira-ingress", max_ongoing_requests=1000)(_Ingress).bind(deployed.bind(command), base_names)


def selection_of(body: bytes, base_names: Sequence[str] = ()) -> str:
    """What Ray may send to the same replica: the `model` of a request, its parts in order; "" for the base, and for none."""
    try:
        model = json.loads(body)["model"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""
    if not isinstance(model, str) or model in base_names:
        return ""
    return "+".join(sorted(part.strip() for part in model.split("+")))


def _flags(settings: Mapping[str, Any]) -> list[str]:
    given = {name: value for name, value in settings.items() if value is not None}
    texts = {name: ",".join(value) if isinstance(value, list) else str(value) for name, value in given.items()}
    return [text for name, value in texts.items() for text in (f"--{name.replace('_', '-')}", value)]


class _Ingress:
    """Passes a request on to a replica that has its adapters. It is called with Starlette's requests."""

    def __init__(self, replica: Any, base_names: Sequence[str]) -> None:
        self._replica, self._base_names = replica, base_names

    async def __call__(self, request: Any) -> Any:
        from ray.exceptions import RayError
        from starlette.responses import JSONResponse, StreamingResponse

        if request.method != "GET" and "/completions" not in request.url.path and "/responses" not in request.url.path:
            message = "a server behind Ray is changed through the folder of adapters; this route would reach one replica"
            return JSONResponse(_error(message, "not_routed"), 501)
        body = await request.body()
        call = self._replica.options(stream=True, multiplexed_model_id=selection_of(body, self._base_names)).answer
        for _ in range(ATTEMPTS):  # a request that has brought no part of an answer is sent again
            parts = call.remote(request.method, request.url.path, _passed(request.headers), body)
            with contextlib.suppress(RayError, OSError, StopAsyncIteration):
                status, headers = await anext(aiter(parts))
                return StreamingResponse(_parts_or_error(parts), status, headers)
            await asyncio.sleep(PAUSE)
        return JSONResponse(_error(LOST, "replica_lost"), 503, headers={"retry-after": "1"})


async def _parts_or_error(parts: Any) -> AsyncIterator[bytes]:
    """The parts of an answer. A stream whose replica dies ends with an error as its last event."""
    from ray.exceptions import RayError

    try:
        async for part in parts:
            yield part
    except (RayError, OSError):
        yield b"data: " + json.dumps(_error(LOST, "replica_lost")).encode() + b"\n\n"


def _error(message: str, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": code}}


def _passed(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() in PASSED}


def _replica(selections: int) -> type:
    """The class of replicas that keep so many selections."""
    from ray import serve

    class Replica:
        """One server, in a process of its own."""

        async def __init__(self, command: list[str]) -> None:  # type: ignore[misc]  # Ray awaits it
            import aiohttp

            port = _free_port()
            self._address = f"http://127.0.0.1:{port}"
            self._server = await asyncio.create_subprocess_exec(*command, "--port", str(port), start_new_session=True)
            limits = aiohttp.TCPConnector(limit=0)
            self._client = aiohttp.ClientSession(connector=limits, timeout=aiohttp.ClientTimeout(total=None))
            await _until_ready(self._client, self._address, self._server)
            self._watch = asyncio.create_task(self._end_with_server())

        async def _end_with_server(self) -> None:
            """Ray then starts another replica, and sends this one nothing more."""
            await self._server.wait()
            self._end_the_rest()
            os._exit(1)

        def _end_the_rest(self) -> None:
            """End the processes that a killed server of vLLM leaves, with the memory that they hold."""
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)

        @serve.multiplexed(max_num_models_per_replica=selections)  # type: ignore[untyped-decorator]
        async def take(self, selection: str) -> str:
            """Let Ray know that this replica has a selection. Its server makes the adapters ready when they are asked for."""
            return selection

        async def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> AsyncIterator[Any]:
            """Status and headers, then the parts of the server's answer."""
            if selection := serve.get_multiplexed_model_id():
                await self.take(selection)
            url = f"{self._address}{path}"
            async with self._client.request(method, url, headers=headers, data=body or None) as answer:
                yield answer.status, _passed(answer.headers)
                async for part in answer.content.iter_any():
                    yield part

        async def check_health(self) -> None:
            """Ray calls this, and replaces the replica if it raises."""
            async with self._client.get(f"{self._address}/health") as answer:
                answer.raise_for_status()

        async def __del__(self) -> None:
            self._watch.cancel()
            with contextlib.suppress(ProcessLookupError):
                self._server.terminate()
            await self._server.wait()
            self._end_the_rest()
            await self._client.close()

    return Replica


async def _until_ready(client: Any, address: str, server: Any) -> None:
    """Return when the server takes requests. Raises RuntimeError if it ends before."""
    import aiohttp

    while server.returncode is None:
        with contextlib.suppress(aiohttp.ClientError):
            async with client.get(f"{address}/ready") as answer:
                if answer.status == 200:
                    return
        await asyncio.sleep(0.1)
    raise RuntimeError("shira serve did not start; the log of this replica tells why")


def _free_port() -> int:
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        port: int = each.getsockname()[1]
        return port
