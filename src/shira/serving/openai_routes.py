"""OpenAI's /v1/completions and /v1/chat/completions over the Transformers engine.

The bodies of answers are the `openai` package's own types, so its client reads what they say.
"""

import asyncio
import copy
import json
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice as ChatChoice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from starlette.requests import ClientDisconnect

from ..errors import ShiraError
from ..texts import strict_json
from .answers import Choice, Piece, Text, TimeLimit, pieces
from .catalogue import Catalogue
from .logprobs import ChatLogprobs, CompletionLogprobs
from .openai_requests import ChatRequest, CompletionRequest, OpenAIRequest, RequestError, parsed
from .selections import AdapterReplaced, SelectionError, UnknownAdapter
from .transformers_engine import EngineError, EngineStopped, RequestTooLong, TransformersEngine

__all__ = ["OpenAIRoutes", "error_response", "status_of"]

log = logging.getLogger(__name__)
T = TypeVar("T")
CLIENT_GONE = 499  # nobody reads it
STATUS: list[tuple[type[Exception], int, str, str]] = [  # the first that fits: status, OpenAI's type, code
    (UnknownAdapter, 404, "invalid_request_error", "model_not_found"),
    (SelectionError, 400, "invalid_request_error", "invalid_model"),
    (RequestTooLong, 400, "invalid_request_error", "context_length_exceeded"),
    (RequestError, 400, "invalid_request_error", "invalid_request"),
    (AdapterReplaced, 409, "conflict_error", "adapter_replaced"),  # OpenAI's client sends the request again
    (EngineStopped, 503, "server_error", "engine_stopped"),
    (TimeLimit, 504, "server_error", "time_limit"),
    (EngineError, 500, "server_error", "engine_error"),
    (ShiraError, 422, "invalid_request_error", "adapter_error"),  # an adapter that cannot be read or used
    (OSError, 422, "invalid_request_error", "adapter_error"),
]


def status_of(error: Exception) -> int:
    return next((status for kind, status, _, _ in STATUS if isinstance(error, kind)), 500)


def error_body(error: Exception, folder: str = "") -> dict[str, Any]:
    """An error in OpenAI's form. folder: the served folder, whose place a message does not tell."""
    known = next(((kind, code) for found, _, kind, code in STATUS if isinstance(error, found)), None)
    kind, code = known or ("server_error", "internal_error")
    message = (
        str(error).replace(f"{folder}{os.sep}", "")
        if known
        else f"the server failed ({type(error).__name__}); its log has the details"
    )
    param = "model" if isinstance(error, SelectionError) else getattr(error, "param", None)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: Exception, folder: str = "") -> Response:
    return JSONResponse(error_body(error, folder), status_of(error))


class OpenAIRoutes:
    """Both routes. `router` goes into a FastAPI application.

    catalogue: of the served folder. defaults: the sampling settings of the model itself.
    most_tokens: of an answer; None: as many as there is room for. seconds: for one request.
    """

    def __init__(
        self,
        engine: TransformersEngine,
        catalogue: Catalogue,
        tokenizer: Any,
        *,
        defaults: Mapping[str, float],
        most_tokens: int | None = None,
        seconds: float = 600.0,
    ) -> None:
        self._engine, self._catalogue, self._tokenizer = engine, catalogue, tokenizer
        self._folder = str(catalogue.folder)
        self._encoder = copy.deepcopy(tokenizer)  # a tokenizer must not read in one thread while it writes in another
        self._encoding = ThreadPoolExecutor(1, "shira tokenizer")
        self._defaults, self._most_tokens, self._seconds = defaults, most_tokens, seconds
        self.router = APIRouter()
        self.router.add_api_route("/v1/completions", self.completions, methods=["POST"], response_model=None)
        self.router.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)

    async def completions(self, request: Request) -> Response:
        return await self._answered(request, self._completions)

    async def chat(self, request: Request) -> Response:
        return await self._answered(request, self._chat)

    async def _answered(self, request: Request, answer: Callable[[bytes], Coroutine[Any, Any, Response]]) -> Response:
        """The response, or the error that was raised, in OpenAI's form. The work is cancelled if the client leaves."""
        try:
            task = asyncio.ensure_future(answer(await request.body()))
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            return await task if task.done() else Response(status_code=CLIENT_GONE)
        except Exception as error:
            _log(error)
            return error_response(error, self._folder)
        finally:
            task.cancel()
            gone.cancel()

    async def _completions(self, body: bytes) -> Response:
        asked = parsed(CompletionRequest, _json(body))
        prompts = await self._encoded(lambda: [self._tokens(prompt) for prompt in asked.prompts])
        choices = await self._begin(asked, prompts)
        form = _CompletionForm(asked, self._tokenizer)
        return await self._respond(asked, choices, form, sum(map(len, prompts)))

    async def _chat(self, body: bytes) -> Response:
        asked = parsed(ChatRequest, _json(body))
        if not getattr(self._tokenizer, "chat_template", None):
            raise RequestError("this model's tokenizer has no chat template; use /v1/completions", "messages")
        prompts = await self._encoded(lambda: [self._chat_tokens(asked)])
        choices = await self._begin(asked, prompts)
        return await self._respond(asked, choices, _ChatForm(asked, self._tokenizer), len(prompts[0]))

    async def _encoded(self, encode: Callable[[], list[list[int]]]) -> list[list[int]]:
        return await asyncio.get_running_loop().run_in_executor(self._encoding, encode)

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return list(self._encoder(prompt)["input_ids"])
        if not all(0 <= token < self._engine.vocabulary for token in prompt):
            raise RequestError(f"the tokens of a prompt must be from 0 to {self._engine.vocabulary - 1}", "prompt")
        return prompt

    def _chat_tokens(self, asked: ChatRequest) -> list[int]:
        messages = [message.plain() for message in asked.messages]
        try:
            text = self._encoder.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever the template raises for messages that it does not take
            said = " ".join(str(error).split())[:300]
            raise RequestError(f"the model's chat template does not take these messages: {said}", "messages") from error
        return list(self._encoder(text, add_special_tokens=False)["input_ids"])

    async def _begin(self, asked: OpenAIRequest, prompts: Sequence[list[int]]) -> list[Choice]:
        """Check all that can be checked before an answer begins, and submit one job for each answer."""
        key = self._catalogue.resolve(asked.model).key
        outside = [token for token in asked.logit_bias if not 0 <= token < self._engine.vocabulary]
        if outside:
            raise RequestError(f"logit_bias names the token {outside[0]}, which the model does not have", "logit_bias")
        most = asked.most_tokens
        if self._most_tokens is not None:
            if most is not None and most > self._most_tokens:
                raise RequestTooLong(f"{most} tokens were asked for; this server writes at most {self._most_tokens}")
            rooms = [min(self._most_tokens, self._engine.room(len(prompt), most)) for prompt in prompts]
        else:
            rooms = [self._engine.room(len(prompt), most) for prompt in prompts]
        await self._engine.prefetch(key)
        choices: list[Choice] = []
        try:
            for prompt, room in zip(prompts, rooms, strict=True):
                for _ in range(asked.n):
                    number = len(choices)
                    sampling = asked.sampling(self._defaults, number, asked.n * len(prompts))
                    job = self._engine.submit(prompt, key, sampling, room, ignore_ends=asked.ignore_eos)
                    choices.append(Choice(number, job, Text(self._tokenizer, prompt, asked.stops)))
        except BaseException:
            for choice in choices:
                choice.cancel()
            raise
        return choices

    async def _respond(self, asked: OpenAIRequest, choices: list[Choice], form: "_Form", prompt_tokens: int) -> Response:
        if asked.stream:
            return _Stream(choices, self._events(asked, choices, form, prompt_tokens))
        gathered: list[list[Piece]] = [[] for _ in choices]
        async for choice, piece in pieces(choices, self._seconds):
            gathered[choice.index].append(piece)
        whole = [
            Piece(
                "".join(piece.text for piece in parts),
                sum(piece.tokens for piece in parts),
                [entry for piece in parts for entry in piece.logprobs],
                parts[-1].finish,
            )
            for parts in gathered
        ]
        usage = _usage(prompt_tokens, sum(piece.tokens for piece in whole))
        return Response(form.whole(whole, usage), media_type="application/json")

    async def _events(
        self, asked: OpenAIRequest, choices: list[Choice], form: "_Form", prompt_tokens: int
    ) -> AsyncIterator[str]:
        """An answer as server-sent events, in OpenAI's form."""
        wants_usage = asked.stream_options is not None and asked.stream_options.include_usage
        written = 0
        try:
            for choice in choices:
                for event in form.opening(choice.index):
                    yield _event(event, wants_usage)
            async for choice, piece in pieces(choices, self._seconds):
                written += piece.tokens
                for event in form.chunks(choice.index, piece):
                    yield _event(event, wants_usage)
            if wants_usage:
                yield _event(form.chunk([]) | {"usage": _usage(prompt_tokens, written).model_dump()}, False)
            yield "data: [DONE]\n\n"
        except Exception as error:
            _log(error)
            yield f"data: {json.dumps(error_body(error, self._folder))}\n\n"


class _Form:
    """How the answers of one request are written. Whatever belongs to one answer has the same id and time."""

    kind = ""
    prefix = ""

    def __init__(self, asked: OpenAIRequest) -> None:
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
        self.wants_logprobs = asked.reported is not None

    def whole(self, answers: list[Piece], usage: CompletionUsage) -> str:
        raise NotImplementedError

    def opening(self, index: int) -> list[dict[str, Any]]:
        return []

    def chunk(self, choices: list[Any]) -> dict[str, Any]:
        raise NotImplementedError

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        raise NotImplementedError


class _ChatForm(_Form):
    prefix = "chatcmpl"

    def __init__(self, asked: OpenAIRequest, tokenizer: Any) -> None:
        super().__init__(asked)
        self._logprobs = ChatLogprobs(tokenizer)

    def whole(self, answers: list[Piece], usage: CompletionUsage) -> str:
        choices = [
            ChatChoice(
                index=index,
                message=ChatCompletionMessage(role="assistant", content=answer.text, refusal=None),
                logprobs=self._logprobs.whole(answer.logprobs) if self.wants_logprobs else None,
                finish_reason=answer.finish,  # type: ignore[arg-type]
            )
            for index, answer in enumerate(answers)
        ]
        made = ChatCompletion(**self.head, object="chat.completion", choices=choices, usage=usage)  # type: ignore[arg-type]
        return made.model_dump_json(exclude_unset=True)

    def opening(self, index: int) -> list[dict[str, Any]]:
        return [self._chunk(index, ChoiceDelta(role="assistant", content=""), None, None)]

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        logprobs = self._logprobs.chunk(piece.logprobs) if self.wants_logprobs else None
        made = [self._chunk(index, ChoiceDelta(content=piece.text), logprobs, None)] if piece.text or piece.logprobs else []
        return made + ([self._chunk(index, ChoiceDelta(), None, piece.finish)] if piece.finish else [])

    def _chunk(self, index: int, delta: ChoiceDelta, logprobs: Any, finish: Any) -> dict[str, Any]:
        return self.chunk([ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)])

    def chunk(self, choices: list[Any]) -> dict[str, Any]:
        made = ChatCompletionChunk(**self.head, object="chat.completion.chunk", choices=choices)  # type: ignore[arg-type]
        return made.model_dump(exclude_unset=True)


class _CompletionForm(_Form):
    prefix = "cmpl"

    def __init__(self, asked: OpenAIRequest, tokenizer: Any) -> None:
        super().__init__(asked)
        self._tokenizer = tokenizer
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def _reported(self, index: int, piece: Piece) -> Any:
        if not self.wants_logprobs:
            return None
        return self._logprobs.setdefault(index, CompletionLogprobs(self._tokenizer)).add(piece.logprobs)

    def whole(self, answers: list[Piece], usage: CompletionUsage) -> str:
        choices = [
            CompletionChoice(index=index, text=answer.text, logprobs=self._reported(index, answer), finish_reason=answer.finish)  # type: ignore[arg-type]
            for index, answer in enumerate(answers)
        ]
        made = Completion(**self.head, object="text_completion", choices=choices, usage=usage)  # type: ignore[arg-type]
        return made.model_dump_json(exclude_unset=True)

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        if not (piece.text or piece.logprobs or piece.finish):
            return []
        logprobs = self._reported(index, piece)
        reported = logprobs and logprobs.model_dump()
        return [self.chunk([{"index": index, "text": piece.text, "logprobs": reported, "finish_reason": piece.finish}])]

    def chunk(self, choices: list[Any]) -> dict[str, Any]:
        return {**self.head, "object": "text_completion", "choices": choices}  # OpenAI's type has no choice without a reason


class _Stream(StreamingResponse):
    """A stream that cancels its jobs when it ends, however it ends."""

    def __init__(self, choices: list[Choice], events: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._choices = choices

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for choice in self._choices:
                choice.cancel()


def _usage(prompt: int, written: int) -> CompletionUsage:
    return CompletionUsage(prompt_tokens=prompt, completion_tokens=written, total_tokens=prompt + written)


def _event(content: dict[str, Any], wants_usage: bool) -> str:
    """wants_usage: each event before the last has a usage of null."""
    return f"data: {json.dumps(content | {'usage': None} if wants_usage else content, separators=(',', ':'))}\n\n"


def _json(body: bytes) -> Any:
    try:
        return strict_json(body)
    except ValueError as error:
        raise RequestError(f"the body is not the JSON text that was expected: {error}") from None


def _log(error: Exception) -> None:
    if not isinstance(error, ShiraError | OSError):  # the engine has logged the others, or the request was wrong
        log.error("a request failed", exc_info=error)


async def _gone(request: Request) -> None:
    """Return when the client has left. The body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
