"""Errors as OpenAI's API tells them: an HTTP status, and {"error": {"message", "type", "param", "code"}}."""

import os
import re
from typing import Any, ClassVar

from ..errors import ShiraError

__all__ = ["CLIENT_LEFT", "EngineError", "EngineStopped", "Problem", "Refused", "RequestTooLong", "error_body", "status_of"]

CLIENT_LEFT = 499  # the status of an answer that nobody reads
VERSION = re.compile(r"@[0-9a-f]{16}\b")  # of an adapter, behind its name in the messages of a switcher


class Problem(ShiraError):
    """An error of one request. status: of HTTP. code: what a program may look at. param: the field of the request."""

    status: ClassVar[int] = 400
    code: ClassVar[str] = "invalid_request"
    param: str | None = None


class Refused(Problem):
    """A request that is refused before anybody has looked at it."""

    def __init__(self, message: str, status: int, code: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code  # type: ignore[misc]  # each refusal has its own


class EngineError(Problem):
    """A model that this engine cannot serve, or a step that failed."""

    status = 500
    code = "engine_error"


class EngineStopped(Problem):
    """A request that came too late, or that was not finished when the engine ended."""

    status = 503
    code = "engine_stopped"


class RequestTooLong(Problem):
    """A request for more tokens than there is room for."""

    code = "context_length_exceeded"


def status_of(error: Exception) -> int:
    """The HTTP status of an error: its own, 422 for an adapter that cannot be read or used, 500 for a fault of the server."""
    if isinstance(error, Problem):
        return error.status
    return 422 if isinstance(error, ShiraError | OSError) else 500


def error_body(error: Exception, folder: str = "") -> dict[str, Any]:
    """An error in OpenAI's form. folder: the served folder, whose place a message does not tell.

    A fault of the server is told by its kind alone: its text may quote what is not the client's.
    """
    status = status_of(error)
    if isinstance(error, ShiraError | OSError):
        message = VERSION.sub("", str(error))
        message = message.replace(f"{folder}{os.sep}", "") if folder else message
    else:
        message = f"the server failed ({type(error).__name__}); its log has the details"
    code = error.code if isinstance(error, Problem) else "adapter_error" if status == 422 else "internal_error"
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": getattr(error, "param", None), "code": code}}
