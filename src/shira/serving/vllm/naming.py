"""HTTP middleware for vLLM's server: `model` names a selection, and the engine is told its key. vLLM's own routes do the rest.

Only this middleware writes the key. A request that carries one of its own is refused, whatever its route.
"""

import json
from typing import Any

from ...errors import ShiraError
from ...texts import shown
from ..catalogue import Catalogue
from ..gate import Message, Receive, Send, replayed
from ..metrics import Metrics
from ..problems import error_body, status_of
from ..selections import SelectionError
from .client import VllmEngine
from .environment import FIELD

__all__ = ["Naming"]

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses")  # those whose `model` may name a selection
CARRIERS = ("vllm_xargs", "extra_args")  # fields of requests that reach SamplingParams.extra_args


class Naming:
    """Plain ASGI, so that streams pass through."""

    def __init__(self, app: Any, catalogue: Catalogue, engine: VllmEngine, metrics: Metrics) -> None:
        self._app, self._catalogue, self._engine, self._metrics = app, catalogue, engine, metrics

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        content = await _content(receive)
        if content is None:  # the client has gone
            return
        try:
            data = json.loads(content)
        except (ValueError, RecursionError):
            await self._app(scope, replayed(content, receive), send)  # vLLM says what is wrong with it
            return
        try:
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            key = self._name(path, data)
        except ShiraError as error:
            await self._tell(send, error)
            return
        if key is None:
            await self._app(scope, replayed(content, receive), send)
            return
        content = json.dumps(data).encode()
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(content)).encode())]}
        with self._metrics.opened(key):
            await self._app(scope, replayed(content, receive), self._with_reason(key, send) if key else send)

    def _name(self, path: str, data: Any) -> str | None:
        """The key of a request's selection, which is written into it; None if the request is left as it is.

        Raises UnknownAdapter and SelectionError.
        """
        if _carries_a_key(data):
            raise SelectionError(f"'{FIELD}' is not a field for clients; name the adapter in 'model'")
        if path not in ROUTES or not isinstance(data, dict) or data.get("model") in (None, ""):
            return None
        key = self._catalogue.resolve(data["model"]).key
        data["model"] = self._catalogue.base[0]
        if key:
            given = data.get("vllm_xargs") or {}
            if not isinstance(given, dict):
                raise SelectionError(f"'vllm_xargs' must be an object, found {shown(given)}")
            data["vllm_xargs"] = {**given, FIELD: key}
        return key

    async def _tell(self, send: Send, error: Exception) -> None:
        content = json.dumps(error_body(error, str(self._catalogue.folder))).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": status_of(error), "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def _with_reason(self, key: str, send: Send) -> Send:
        """Answers of vLLM that say no more than that a request failed, with the reason of a failed switch."""
        failed: list[Message] = []  # the beginning of an answer, then its body in parts

        async def write(message: Message) -> None:
            is_body = message["type"] == "http.response.body"
            if failed or (message["type"] == "http.response.start" and message["status"] >= 500):
                failed.append(message)
                if not is_body or message.get("more_body"):
                    return
                reason = await self._engine.failure(key)
                if reason is not None:
                    await self._tell(send, reason)
                    return
                for each in failed:
                    await send(each)
            elif is_body and message.get("body", b"").startswith(b'data: {"error"'):
                reason = await self._engine.failure(key)
                if reason is not None:
                    told = json.dumps(error_body(reason, str(self._catalogue.folder))).encode()
                    message = {**message, "body": b"data: " + told + b"\n\n"}
                await send(message)
            else:
                await send(message)

        return write


async def _content(receive: Receive) -> bytes | None:
    """The body of a request; None if the client has gone."""
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _carries_a_key(data: Any) -> bool:
    """Whether a request carries a key of its own, in any place."""
    waiting = [data]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            if any(isinstance(each.get(name), dict) and FIELD in each[name] for name in CARRIERS):
                return True
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each
    return False
