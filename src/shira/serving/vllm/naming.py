"""HTTP middleware for vLLM's server: `model` names a selection, and the engine is told its key. vLLM's own routes do the rest.

Only this middleware writes the key. A request that carries one of its own is refused, whatever its route.
"""

import json
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

from ...errors import ShiraError
from ...texts import shown
from ..selections import UnknownAdapter
from .environment import FIELD

__all__ = ["Naming"]

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses")  # those whose `model` may name a selection
CARRIERS = ("vllm_xargs", "extra_args")  # fields of requests that reach SamplingParams.extra_args
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Naming:
    """Plain ASGI, so that streams pass through.

    resolve: a request's `model` -> the key of its selection; it raises ShiraError. base: the name that vLLM knows the model by.
    failure: key -> why the last switch to it has failed.
    """

    def __init__(
        self,
        app: Any,
        resolve: Callable[[str], str],
        base: Callable[[], str],
        failure: Callable[[str], Awaitable[str | None]],
    ) -> None:
        self._app, self._resolve, self._base, self._failure = app, resolve, base, failure

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        content = await _content(receive)
        if content is None:  # the client has gone
            return
        try:
            data = json.loads(content)
        except (ValueError, RecursionError):
            await self._app(scope, _again(content, receive), send)  # vLLM says what is wrong with it
            return
        if any(True for _ in _smuggled(data)):
            return await _error(send, 400, f"'{FIELD}' is not a field for clients; name the adapter in 'model'")
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path not in ROUTES or not isinstance(data, dict) or data.get("model") in (None, ""):
            await self._app(scope, _again(content, receive), send)
            return
        try:
            if not isinstance(data["model"], str):
                return await _error(send, 400, f"'model' must be a text, found {shown(data['model'])}")
            key = self._resolve(data["model"])
        except UnknownAdapter as error:
            return await _error(send, 404, str(error))
        except ShiraError as error:
            return await _error(send, 400, str(error))
        data["model"] = self._base()
        if key:
            given = data.get("vllm_xargs")
            if given is not None and not isinstance(given, dict):
                return await _error(send, 400, f"'vllm_xargs' must be an object, found {shown(given)}")
            data["vllm_xargs"] = {**(given or {}), FIELD: key}
        content = json.dumps(data).encode()
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(content)).encode())]}
        await self._app(scope, _again(content, receive), self._with_reason(key, send) if key else send)

    def _with_reason(self, key: str, send: Send) -> Send:
        """Answers of vLLM that say no more than that a request failed, with the reason of a failed switch."""
        failed: list[Message] = []

        async def write(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 500:
                failed.append(message)
            elif failed and message["type"] == "http.response.body":
                if message.get("more_body"):
                    return
                reason = await self._failure(key)
                await _error(send, failed.pop()["status"], reason or "internal error; the server's log has the reason")
            elif message["type"] == "http.response.body" and message.get("body", b"").startswith(b'data: {"error"'):
                reason = await self._failure(key)
                event = b"data: " + _described(500, reason) + b"\n\n" if reason else message["body"]
                await send({**message, "body": event})
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


def _again(content: bytes, receive: Receive) -> Receive:
    """A `receive` that gives this body, then what the server says later (that the client has gone)."""
    left = [content]

    async def read() -> Message:
        return {"type": "http.request", "body": left.pop(), "more_body": False} if left else await receive()

    return read


def _smuggled(data: Any) -> Iterator[None]:
    """One item for each place at which a request carries a key of its own."""
    waiting = [data]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            for name in CARRIERS:
                if isinstance(each.get(name), dict) and FIELD in each[name]:
                    yield None
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each


def _described(status: int, message: str) -> bytes:
    kind = {400: "BadRequestError", 404: "NotFoundError"}.get(status, "InternalServerError")
    return json.dumps({"error": {"message": message, "type": kind, "param": "model", "code": status}}).encode()


async def _error(send: Send, status: int, message: str) -> None:
    content = _described(status, message)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
