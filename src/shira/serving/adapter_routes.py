"""The routes about adapters and the server itself, for both engines: names, files, memory, health, metrics."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect

from ..errors import ShiraError
from ..texts import visible
from .catalogue import Catalogue, path_in
from .engine import Engine
from .metrics import Metrics
from .problems import CLIENT_LEFT, Refused, error_body, status_of
from .selections import AdapterReplaced, SelectionError, UnknownAdapter, of_key, parse

__all__ = ["AdapterRoutes", "watching"]

log = logging.getLogger("shira.serving")


class Body(BaseModel):
    """What a client sends: every field is known, and of its own type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Load(Body):
    """Body of POST /v1/adapters."""

    name: str
    pin: bool = False


class LoadLora(Body):
    """Body of vLLM's /v1/load_lora_adapter. load_inplace is what a load does here, whether it is true or not."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    is_3d_lora_weight: Literal[False] = False


class UnloadLora(Body):
    """Body of vLLM's /v1/unload_lora_adapter. Only the name counts, as in vLLM."""

    lora_name: str
    lora_int_id: int | None = None


class AdapterRoutes:
    """`router` goes into a FastAPI application; an engine that has some of the routes itself includes it first.

    GET /v1/models, /v1/models/{name}; GET /v1/adapters, /v1/adapters/{name}; POST /v1/adapters; DELETE /v1/adapters/{name};
    POST and DELETE /v1/adapters/{name}/pin; POST /v1/load_lora_adapter, /v1/unload_lora_adapter; GET /health, /ready, /metrics.
    """

    def __init__(self, catalogue: Catalogue, engine: Engine, metrics: Metrics) -> None:
        self.catalogue, self.engine, self.metrics = catalogue, engine, metrics
        self._began = int(time.time())
        self.router = APIRouter()
        for method, path, route in (
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{name:path}", self.model),
            ("GET", "/v1/adapters", self.adapters),
            ("POST", "/v1/adapters", self.load),
            ("GET", "/v1/adapters/{name}", self.inspect),
            ("DELETE", "/v1/adapters/{name}", self.unload),
            ("POST", "/v1/adapters/{name}/pin", self.pin),
            ("DELETE", "/v1/adapters/{name}/pin", self.unpin),
            ("POST", "/v1/load_lora_adapter", self.load_lora),
            ("POST", "/v1/unload_lora_adapter", self.unload_lora),
            ("GET", "/health", self.health),
            ("GET", "/ready", self.health),  # a server that shuts down takes no new connections
            ("GET", "/metrics", self.show_metrics),
        ):
            methods = ["GET", "HEAD"] if method == "GET" else [method]
            self.router.add_api_route(path, self._answering(route), methods=methods, response_model=None)

    def _answering(self, route: Any) -> Any:
        """The route, which answers an error in OpenAI's form."""

        async def answer(request: Request) -> Response:
            try:
                found: Response = await route(request)
                return found
            except ClientDisconnect:
                return Response(status_code=CLIENT_LEFT)
            except (ShiraError, OSError) as error:
                return JSONResponse(error_body(error, str(self.catalogue.folder)), status_of(error))

        return answer

    async def models(self, request: Request) -> Response:
        names = [*self.catalogue.base, *self.catalogue.versions]
        return JSONResponse({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self.catalogue.resolve(name)  # raises if it is not served
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        base = self.catalogue.base[0]
        parent = None if name in self.catalogue.base else base
        return {"id": name, "object": "model", "created": self._began, "owned_by": "shira", "root": name, "parent": parent}

    async def adapters(self, request: Request) -> Response:
        tiers = await self.engine.tiers()
        places = _places(tiers)
        rows = [{**row, "place": places.get((row["name"], row["version"]), "disk")} for row in self.catalogue.listed()]
        shown = {key: [str(of_key(each)) for each in tiers[key]] for key in ("ready", "pinned")}
        weights = str(of_key(tiers["weights"]))
        return JSONResponse({"object": "list", "data": rows, "weights": weights, **shown})

    async def inspect(self, request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(self.catalogue.inspect, request.path_params["name"]))

    async def load(self, request: Request) -> Response:
        """Serve an adapter of the folder, and make it ready. It is not served if it cannot be used."""
        wanted = await _body(request, Load)
        await self._load(wanted.name)
        if wanted.pin:
            await self.engine.pin(self.catalogue.resolve(wanted.name).key, True)
        row = next((row for row in self.catalogue.listed() if row["name"] == wanted.name), None)
        if row is None:
            raise UnknownAdapter(f"the file of {wanted.name!r} was removed after it was loaded")
        return JSONResponse(row)

    async def _load(self, name: str) -> None:
        await asyncio.to_thread(self.catalogue.load, name)
        try:
            await self.engine.prefetch(self.catalogue.resolve(name).key)
        except AdapterReplaced:  # by another file, which the next look at the folder finds
            raise
        except ShiraError:
            with contextlib.suppress(UnknownAdapter):  # it has gone meanwhile
                self.catalogue.unload(name)
            raise

    async def unload(self, request: Request) -> Response:
        self.catalogue.unload(request.path_params["name"])
        return JSONResponse({"name": request.path_params["name"], "status": "unloaded"})

    async def pin(self, request: Request) -> Response:
        """Hold a selection ready; the name may be a weighted set."""
        selection = self.catalogue.resolve(request.path_params["name"])
        await self.engine.pin(selection.key, True)
        return JSONResponse({"name": str(selection), "pinned": True})

    async def unpin(self, request: Request) -> Response:
        """Let go of a selection, in whichever version it was pinned."""
        name = request.path_params["name"]
        held = (await self.engine.tiers())["pinned"]
        pinned = [key for key in held if (_names(name, key) if key else name in self.catalogue.base)]
        if not pinned:
            raise UnknownAdapter(f"{name!r} is not pinned")
        for key in pinned:
            await self.engine.pin(key, False)
        return JSONResponse({"name": name, "pinned": False})

    async def load_lora(self, request: Request) -> Response:
        """What vLLM's route of this name does for LoRA. The path must be that of the adapter of this name in the folder."""
        wanted = await _body(request, LoadLora)
        folder = self.catalogue.folder
        expected = path_in(folder, wanted.lora_name)
        if "\0" in wanted.lora_path or os.path.realpath(folder / wanted.lora_path) != os.path.realpath(expected):
            raise SelectionError(
                f"lora_path must be that of {expected.name} in the served folder: an adapter has its file's name"
            )
        await self._load(wanted.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{wanted.lora_name}' added successfully.")

    async def unload_lora(self, request: Request) -> Response:
        wanted = await _body(request, UnloadLora)
        self.catalogue.unload(wanted.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{wanted.lora_name}' removed successfully.")

    async def health(self, request: Request) -> Response:
        """200 while the process can work."""
        if await self.engine.alive():
            return JSONResponse({"status": "ok"})
        raise Refused("the engine has stopped; restart the server", 503, "engine_stopped")

    async def show_metrics(self, request: Request) -> Response:
        self.metrics.update(await self.engine.tiers(), len(self.catalogue.versions))
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _places(tiers: dict[str, Any]) -> dict[tuple[str, str], str]:
    """(name, version) -> where an adapter is: "weights" or "ready"."""
    ready = (*tiers["ready"], *tiers.get("sharing", ()))
    places = {(part.name, part.version): "ready" for key in ready for part in of_key(key).parts}
    return places | {(part.name, part.version): "weights" for part in of_key(tiers["weights"]).parts}


def _names(text: str, key: str) -> bool:
    """Whether a text names the selection of a key, in whichever version."""
    selection = of_key(key)
    try:
        return parse(text, {part.name: part.version for part in selection.parts}) == selection
    except SelectionError:
        return False


async def _body(request: Request, kind: Any) -> Any:
    """The body of a request as a model of pydantic. Raises Refused."""
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        unknown = first["type"] == "extra_forbidden"
        said = f"this server does not know the field; expected {', '.join(kind.model_fields)}" if unknown else first["msg"]
        raise Refused(f"{where}: {said}", 400, "invalid_request") from None


@contextlib.asynccontextmanager
async def watching(catalogue: Catalogue, seconds: float) -> AsyncIterator[None]:
    """Look at the served folder again and again inside the `with`."""

    async def watch() -> None:
        said = ""
        while True:
            await asyncio.sleep(seconds)
            before, refused = catalogue.versions, catalogue.refused
            try:
                await asyncio.to_thread(catalogue.scan)
            except OSError as error:  # the folder is gone for now: what was served stays
                if said != str(error):
                    log.warning("the served folder cannot be read: %s", error)
                said = str(error)
                continue
            said = ""
            for name in sorted(before.keys() | catalogue.versions.keys()):
                old, new = before.get(name), catalogue.versions.get(name)
                if old != new:
                    log.info("adapter %s %s", name, "is new" if old is None else "is gone" if new is None else "was replaced")
            warn(refused)

    def warn(before: Mapping[str, str]) -> None:
        """A warning for each file that cannot be served, unless it was refused for the same reason before."""
        for name, why in sorted(catalogue.refused.items() - before.items()):
            log.warning("adapter %s is not served: %s", visible(name), visible(why))

    await asyncio.to_thread(catalogue.scan)
    log.info("%s serves %d adapters of %s", catalogue.base[0], len(catalogue.versions), catalogue.folder)
    warn({})
    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
