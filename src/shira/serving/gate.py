"""What every request passes before an engine sees it: keys, limits, a request id, a log line, metrics.

It is plain ASGI middleware, so streams pass through; it stands before our own routes and before vLLM's.
"""

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from ..errors import ShiraError
from ..texts import visible
from .metrics import Metrics
from .problems import CLIENT_LEFT, Refused, error_body, status_of
from .settings import Settings

__all__ = ["ADMIN_KEYS", "KEYS", "Gate", "Keys", "Message", "Receive", "Send", "replayed"]

KEYS, ADMIN_KEYS = "SHIRA_API_KEYS", "SHIRA_ADMIN_KEYS"  # environment variables: keys with commas between them
OPEN = ("/health", "/ready", "/ping", "/version")  # paths without a key
ADMINISTRATION = re.compile(r"/v1/(adapters|load_lora_adapter|unload_lora_adapter)(/|$)")
ANSWERS = re.compile(r"/v1/(chat/completions|completions|responses)/?$")
LENGTH = re.compile(r"[0-9]+")
REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
KNOWN = re.compile(rf"{ANSWERS.pattern}|/v1/(adapters|models|(un)?load_lora_adapter)|/(health|ready|metrics)$")
BODY_SECONDS = 60.0  # a body must be there after them; until then it takes no place in the queue
LAST_SECONDS = 5.0  # to tell a client of an error that reads nothing
RETRY = 1  # seconds until a client that was refused for load should ask again

log = logging.getLogger("shira.serving")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Keys:
    """Who may do what. inference: keys for answers. administration: keys for answers, and to load, unload and pin adapters.

    Without any key everybody may do everything, if the server listens on this machine alone.
    """

    def __init__(self, inference: Iterable[str] = (), administration: Iterable[str] = (), *, loopback: bool = True) -> None:
        self._administration = [_digest(key) for key in administration]
        self._all = [*self._administration, *map(_digest, inference)]
        self._loopback = loopback

    @classmethod
    def of_environment(cls, host: str) -> "Keys":
        """The keys of SHIRA_API_KEYS and SHIRA_ADMIN_KEYS. host: the address that the server listens on.

        Raises ShiraError for a variable that is set and holds no key: it would open what it was to close.
        """
        lists = [[key.strip() for key in os.environ.get(name, "").split(",") if key.strip()] for name in (KEYS, ADMIN_KEYS)]
        for name, keys in zip((KEYS, ADMIN_KEYS), lists, strict=True):
            if name in os.environ and not keys:  # empty, too: what fills it may have failed
                raise ShiraError(f"{name} must hold keys with commas between them, and holds none; remove it to ask for no key")
        loopback = _is_loopback(host)
        if not any(lists) and not loopback:
            log.warning("everybody who reaches %s gets answers; set %s to ask for keys", host, KEYS)
        return cls(*lists, loopback=loopback)

    @property
    def are_none(self) -> bool:
        return not self._all

    def check(self, presented: str, administration: bool) -> None:
        """Raise Refused unless this key permits it. All keys are compared, each in constant time."""
        digest = _digest(presented)
        if administration and not self._administration:
            if self._all or not self._loopback:
                raise Refused(
                    f"adapters cannot be administered here: the server has no key for it, {ADMIN_KEYS}", 403, "forbidden"
                )
            return
        known = self._administration if administration else self._all
        if known and not any([hmac.compare_digest(digest, key) for key in known]):
            if administration and any([hmac.compare_digest(digest, key) for key in self._all]):
                raise Refused("this key is for answers alone; adapters need a key of administration", 403, "forbidden")
            raise Refused("there is no such key; send one as 'Authorization: Bearer KEY'", 401, "invalid_api_key")


class Gate:
    """Middleware: `app.add_middleware(Gate, settings=…, keys=…, metrics=…)`."""

    def __init__(self, app: App, settings: Settings, keys: Keys, metrics: Metrics) -> None:
        self.app, self.settings, self.keys, self.metrics = app, settings, keys, metrics
        self.open = 0  # requests for answers that wait or run

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(scope, send)
        try:
            self._check(scope)
            again = await self._with_body(receive)  # before the request is counted: a slow sender takes no place
            with self._counted(scope):
                async with asyncio.timeout(self.settings.request_timeout if ANSWERS.match(scope["path"]) else None) as limit:
                    await self.app(scope, again, answer.send)
        except TimeoutError:
            if not limit.expired():
                raise
            seconds = self.settings.request_timeout
            await answer.refuse(Refused(f"the request took longer than {seconds:g} seconds", 504, "time_limit"))
        except Refused as error:
            await answer.refuse(error)
        except Exception as error:
            await answer.refuse(error)
            raise  # the server around it logs it
        finally:
            answer.done(self.metrics)

    def _check(self, scope: Message) -> None:
        """Raise Refused if a request may not enter."""
        path = scope["path"]
        if path not in OPEN:
            scheme, _, key = _header(scope, b"authorization").partition(" ")
            writes = bool(ADMINISTRATION.match(path)) and scope["method"] not in ("GET", "HEAD")
            self.keys.check(key.strip() if scheme.lower() == "bearer" else "", writes)
            if writes and self.keys.are_none and not _is_from_here(scope):
                raise Refused(
                    f"without {ADMIN_KEYS} adapters are administered under the name localhost, and by no page of another site",
                    403,
                    "forbidden",
                )
        length = _header(scope, b"content-length")
        if LENGTH.fullmatch(length) and (len(length) > 18 or int(length) > self.settings.max_body):
            raise self._too_large()

    @contextlib.contextmanager
    def _counted(self, scope: Message) -> Iterator[None]:
        """Count a request for an answer inside the `with`. Raises Refused if there are too many."""
        if not ANSWERS.match(scope["path"]):
            yield
            return
        if self.open >= self.settings.max_running + self.settings.max_queue:
            raise Refused(f"{self.open} requests wait or run; send it again later", 429, "overloaded")
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1

    async def _with_body(self, receive: Receive) -> Receive:
        """`receive` that returns the whole body at once, which is read now. Raises Refused if it is too large, or too slow."""
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return _always(message)
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self.settings.max_body:
                        raise self._too_large()
        except TimeoutError:
            raise Refused(f"the body did not come within {BODY_SECONDS:g} seconds", 408, "slow_body") from None
        return replayed(bytes(body), receive)

    def _too_large(self) -> Refused:
        return Refused(f"the body of a request may have {self.settings.max_body:,} bytes; this one is larger", 413, "too_large")


class _Answer:
    """What is sent to a client: with the request's id, counted and logged."""

    def __init__(self, scope: Message, send: Send) -> None:
        self._scope, self._send = scope, send
        self._began = time.perf_counter()
        self._first: float | None = None
        given = _header(scope, b"x-request-id")
        self._id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.status = 0  # none yet

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", []), (b"x-request-id", self._id.encode())]}
        elif self._first is None and message.get("body"):
            self._first = time.perf_counter()
        await self._send(message)

    async def refuse(self, error: Exception) -> None:
        """Tell an error. A stream that has begun ends with it, as an event."""
        body = json.dumps(error_body(error)).encode()
        if self.status:
            with contextlib.suppress(Exception):  # the answer may be over, or of a fixed length, or nobody reads it
                async with asyncio.timeout(LAST_SECONDS):
                    await self._send({"type": "http.response.body", "body": b"data: " + body + b"\n\n"})
            return
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        status = status_of(error)
        if status in (429, 503):
            headers.append((b"retry-after", str(RETRY).encode()))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    def done(self, metrics: Metrics) -> None:
        """Count and log it. Without a status the client has left before the answer began."""
        status, method, path = self.status or CLIENT_LEFT, self._scope["method"], self._scope["path"]
        known = KNOWN.match(path)
        metrics.answered(known[0] if known else "other", status, self._began, self._first)
        milliseconds = 1000 * (time.perf_counter() - self._began)
        log.info("%s %s %s %d %.1f ms", self._id, method, visible(path), status, milliseconds)


def replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives this body, then what the server says later (that the client has gone)."""
    left = [body]

    async def again() -> Message:
        return {"type": "http.request", "body": left.pop(), "more_body": False} if left else await receive()

    return again


def _always(message: Message) -> Receive:
    async def again() -> Message:
        return message

    return again


def _header(scope: Message, name: bytes) -> str:
    value: bytes = dict(scope["headers"]).get(name, b"")
    return value.decode(errors="surrogateescape")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _is_from_here(scope: Message) -> bool:
    """Whether a request names this machine, and is not of a page that a browser has from another one."""
    try:
        named = urlsplit(f"//{_header(scope, b'host')}").hostname
        origin = _header(scope, b"origin")
        return (named is None or _is_loopback(named)) and (not origin or _is_loopback(urlsplit(origin).hostname or ""))
    except ValueError:
        return False


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
