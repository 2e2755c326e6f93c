"""vLLM's HTTP server with adapters: an entry point of vllm.endpoint_plugins, made when "shira" is in VLLM_PLUGINS."""

from typing import Any

from ..catalogue import Catalogue
from .client import VllmEngine
from .environment import PLUGIN, check_version, installed_version, options
from .naming import Naming

__all__ = ["Endpoints"]


class Endpoints:
    """An endpoint plugin of vLLM."""

    name = PLUGIN
    required_tasks = ("generate",)

    def __init__(self) -> None:
        check_version(installed_version())
        self._names: list[str] = []
        self._catalogue: Catalogue | None = None
        self._engine: VllmEngine | None = None

    def attach_router(self, app: Any) -> None:
        """Called once, before the engine is known."""
        app.add_middleware(Naming, resolve=self._resolve, base=lambda: self._names[0], failure=self._failure)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Called once, after the engine has started."""
        self._names = list(args.served_model_name or [args.model])
        self._engine = VllmEngine(engine_client)
        self._catalogue = Catalogue(options().adapters, self._names)
        self._catalogue.scan()

    def _resolve(self, text: str) -> str:
        assert self._catalogue is not None
        return self._catalogue.resolve(text).key

    async def _failure(self, key: str) -> str | None:
        assert self._engine is not None
        return await self._engine.failure(key)
