"""The server on Transformers: one process that holds the model and answers HTTP."""

import asyncio
import contextlib
import errno
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from torch import nn

from ..errors import ShiraError
from ..integrations import generation
from ..integrations import transformers as hf
from ..runs.live import load_live
from ..texts import shown
from .adapter_routes import AdapterRoutes, watching
from .catalogue import Catalogue, shapes_of
from .gate import Gate, Keys
from .metrics import Metrics
from .mixing import Mixing
from .openai_routes import OpenAIRoutes
from .problems import Refused, error_body
from .resident import Resident
from .settings import Settings
from .transformers_engine import TransformersEngine
from .turns import Turns

__all__ = ["app", "built", "defaults_of", "ends_of", "serve"]

KEEP_ALIVE = 75  # seconds of an idle connection: longer than clients (5) and proxies (60) keep one, so they close it first
LAST_ANSWERS = 5  # seconds to send what the engine answers when it ends
NOT_STARTED = 3  # the exit status, as of uvicorn's own command
MARK = "shira7answer"  # stands for an answer in a rendered chat


def app(
    engine: TransformersEngine,
    catalogue: Catalogue,
    tokenizer: Any,
    settings: Settings,
    defaults: dict[str, float],
    keys: Keys | None = None,
) -> FastAPI:
    """The application. The engine starts and stops with it. defaults: the sampling settings of the model itself."""
    metrics = Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            async with watching(catalogue, settings.scan):
                yield
        finally:
            await engine.stop(settings.shutdown_timeout)

    made = FastAPI(lifespan=lifespan, openapi_url=None)
    routes = OpenAIRoutes(
        engine,
        catalogue,
        tokenizer,
        metrics,
        defaults=defaults,
        most_tokens=settings.max_tokens,
        most_answers=settings.max_running + settings.max_queue,
    )
    made.include_router(routes.router)
    made.include_router(AdapterRoutes(catalogue, engine, metrics).router)
    made.add_exception_handler(HTTPException, _as_openai)
    made.add_middleware(Gate, settings=settings, keys=keys or Keys(), metrics=metrics)
    return made


async def _as_openai(request: Request, error: Exception) -> Response:
    """An unknown path or method in OpenAI's form."""
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("Allow")
    hint = f"it takes {allowed}" if allowed else "OpenAI's routes begin with /v1, such as /v1/chat/completions and /v1/models"
    message = f"there is no {request.method} {shown(request.url.path)}; {hint}"
    body = error_body(Refused(message, error.status_code, "not_found"))
    return JSONResponse(body, error.status_code, headers=error.headers)


def built(model: nn.Module, tokenizer: Any, settings: Settings) -> tuple[TransformersEngine, Catalogue]:
    """An engine over a loaded model, and the catalogue of the served folder. Raises EngineError and SelectionError."""
    catalogue = Catalogue(settings.adapters, settings.base_names, shapes_of(settings.model))
    resident = Resident(model, settings.adapters, ready=settings.ready, host=settings.host_ready)
    engine = TransformersEngine(
        model,
        resident,
        ends=ends_of(model, tokenizer),
        turns=Turns(quantum=settings.quantum, patience=settings.patience, ready=settings.ready + settings.host_ready),
        mixing=Mixing(model, resident, settings.mix, settings.ready) if settings.mix else None,
        max_running=settings.max_running,
        step_tokens=settings.step_tokens,
        cache_tokens=settings.kv_tokens,
        longest=settings.max_model_len,
    )
    return engine, catalogue


def serve(settings: Settings) -> None:
    """Load the model, and serve it until the process is told to end. Then what runs is finished, within the time limit.

    Raises DataError for the model, EngineError if this engine cannot serve it, SelectionError for the folder and the
    base's names, ShiraError for keys and port. What can be checked without the model is checked before it is loaded.
    """
    import uvicorn

    keys = Keys.of_environment(settings.host)
    Catalogue(settings.adapters, settings.base_names)
    _check_port(settings.host, settings.port)
    tokenizer = hf.load_tokenizer(settings.model)
    model, _ = load_live(settings.model, {}, settings.dtype)
    engine, catalogue = built(model, tokenizer, settings)
    made = app(engine, catalogue, tokenizer, settings, defaults_of(model), keys)

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: Any = None) -> None:
            """The engine ends first, and tells those whose answers are not finished in time. Uvicorn would cut them."""
            stopped = asyncio.create_task(engine.stop(settings.shutdown_timeout))
            await super().shutdown(sockets)
            await stopped

    config = uvicorn.Config(
        made,
        host=settings.host,
        port=settings.port,
        http="h11",  # it bounds the size of a request's head
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=round(settings.shutdown_timeout + LAST_ANSWERS),
        access_log=False,
        log_config=None,
    )
    server = Server(config)
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C, which uvicorn raises again when all has ended
        server.run()
    if not server.started:
        sys.exit(NOT_STARTED)


def _check_port(host: str, port: int) -> None:
    """Raise ShiraError if nobody may listen there, or somebody does."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as asyncio does
                probe.bind(address)
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno in (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL):
            raise ShiraError(
                f"the server cannot listen on {host}:{port}: {error.strerror}; choose another --port or --host, or end what "
                "listens there"
            ) from error


def defaults_of(model: nn.Module) -> dict[str, float]:
    """The sampling settings that come with a model; they hold where a request says nothing."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    found = {name: getattr(model.generation_config, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def ends_of(model: nn.Module, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the model's, the tokenizer's, and the one that ends a turn of its chats."""
    ends = set(generation.ends_of(model, tokenizer))
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
        with contextlib.suppress(Exception):  # a template may want other messages; the two above are then all that is known
            after = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(MARK)[2]
            first = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
            ends |= set(first) & set(tokenizer.all_special_ids)
    return sorted(ends)
