"""vLLM's HTTP server with adapters: an entry point of vllm.endpoint_plugins, made when "shira" is in VLLM_PLUGINS."""

import contextlib
from typing import Any

import prometheus_client
from fastapi import FastAPI

from ..adapter_routes import AdapterRoutes, watching
from ..catalogue import Catalogue, shapes_of
from ..gate import Gate, Keys
from ..metrics import Metrics
from .client import VllmEngine
from .environment import PLUGIN, check_version, installed_version, settings
from .naming import Naming

__all__ = ["Endpoints"]


class Endpoints:
    """An endpoint plugin of vLLM: the gate, names of selections, and the routes about adapters."""

    name = PLUGIN
    required_tasks = ("generate",)

    def __init__(self) -> None:
        check_version(installed_version())
        self._settings = settings()
        self._engine = VllmEngine()
        self._stack = contextlib.AsyncExitStack()

    def attach_router(self, app: FastAPI) -> None:
        """Called once, before the engine is known."""
        arguments = app.state.args
        names = list(arguments.served_model_name or [arguments.model])
        self._catalogue = Catalogue(self._settings.adapters, names, shapes_of(arguments.model))
        metrics = Metrics(prometheus_client.REGISTRY)  # where vLLM has its own
        routes = AdapterRoutes(self._catalogue, self._engine, metrics)
        app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") != "/metrics"]
        app.include_router(routes.router)
        app.add_middleware(Naming, catalogue=self._catalogue, engine=self._engine, metrics=metrics)
        keys = Keys.of_environment(arguments.host or "0.0.0.0")
        app.add_middleware(Gate, settings=self._settings, keys=keys, metrics=metrics)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Called once, after the engine has started."""
        self._engine.client = engine_client
        await self._stack.enter_async_context(watching(self._catalogue, self._settings.scan))
