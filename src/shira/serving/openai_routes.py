"""OpenAI's /v1/completions and /v1/chat/completions over the Transformers engine."""

import asyncio
import contextlib
import copy
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from openai.types import CompletionUsage
from starlette.requests import ClientDisconnect

from ..errors import ShiraError
from ..texts import strict_json
from .answers import AnswerPiece, Choice, Text, joined, pieces
from .catalogue import Catalogue
from .metrics import Metrics
from .openai_forms import AnswerForm, ChatForm, CompletionForm
from .openai_requests import ChatRequest, CompletionRequest, OpenAIRequest, RequestError, parsed
from .problems import CLIENT_LEFT, Refused, error_body, status_of
from .transformers_engine import RequestTooLong, TransformersEngine

__all__ = ["OpenAIRoutes"]

log = logging.getLogger(__name__)
LETTERS = 16  # of a token at least, for the bound on the text of a prompt


class _Answers(NamedTuple):
    """The answers to one request. open: closed when they are sent; then their jobs are cancelled."""

    asked: OpenAIRequest
    choices: list[Choice]
    prompt_tokens: int
    open: contextlib.ExitStack


class OpenAIRoutes:
    """Both routes. `router` goes into a FastAPI application.

    catalogue: of the served folder. defaults: the sampling settings of the model itself.
    most_tokens: of an answer; None: as many as there is room for. most_answers: that wait or run; None: any number.
    """

    def __init__(
        self,
        engine: TransformersEngine,
        catalogue: Catalogue,
        tokenizer: Any,
        metrics: Metrics,
        *,
        defaults: Mapping[str, float],
        most_tokens: int | None = None,
        most_answers: int | None = None,
    ) -> None:
        self._engine, self._catalogue, self._tokenizer, self._metrics = engine, catalogue, tokenizer, metrics
        self._folder = str(catalogue.folder)
        self._encoder = copy.deepcopy(tokenizer)  # a tokenizer must not read in one thread while it writes in another
        self._encoding = ThreadPoolExecutor(1, "shira tokenizer")
        self._most_letters = engine.longest * max(LETTERS, *map(len, tokenizer.get_vocab()))
        self._defaults, self._most_tokens, self._most_answers = defaults, most_tokens, most_answers
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
            return Response(status_code=CLIENT_LEFT)
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            return await task if task.done() else Response(status_code=CLIENT_LEFT)
        except Exception as error:
            _log(error)
            return JSONResponse(error_body(error, self._folder), status_of(error))
        finally:
            task.cancel()
            gone.cancel()

    async def _completions(self, body: bytes) -> Response:
        asked = parsed(CompletionRequest, _json(body))
        prompts = await self._encoded(lambda: [self._tokens(prompt) for prompt in asked.prompts])
        return await self._respond(await self._begin(asked, prompts), CompletionForm(asked, self._tokenizer))

    async def _chat(self, body: bytes) -> Response:
        asked = parsed(ChatRequest, _json(body))
        if not getattr(self._tokenizer, "chat_template", None):
            raise RequestError("this model's tokenizer has no chat template; use /v1/completions", "messages")
        prompts = await self._encoded(lambda: [self._chat_tokens(asked)])
        return await self._respond(await self._begin(asked, prompts), ChatForm(asked, self._tokenizer))

    async def _encoded(self, encode: Callable[[], list[list[int]]]) -> list[list[int]]:
        return await asyncio.get_running_loop().run_in_executor(self._encoding, encode)

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self._encode(prompt)
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
        return self._encode(text, add_special_tokens=False)

    def _encode(self, text: str, **options: Any) -> list[int]:
        """The tokens of a text. One that cannot fit is refused before, because its tokens would take gigabytes."""
        if len(text) > self._most_letters:
            raise RequestTooLong(
                f"the prompt has {len(text):,} characters; expected at most {self._most_letters:,}, because a prompt and its "
                f"answer may have {self._engine.longest:,} tokens"
            )
        return list(self._encoder(text, **options)["input_ids"])

    async def _begin(self, asked: OpenAIRequest, prompts: Sequence[list[int]]) -> _Answers:
        """Check all that can be checked before an answer begins, and submit one job for each answer."""
        key = self._catalogue.resolve(asked.model).key
        outside = [token for token in asked.logit_bias if not 0 <= token < self._engine.vocabulary]
        if outside:
            raise RequestError(f"logit_bias names the token {outside[0]}, which the model does not have", "logit_bias")
        rooms = [self._room(len(prompt), asked.wanted_tokens) for prompt in prompts]
        await self._engine.prefetch(key)
        self._check_load(asked.n * len(prompts))
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._metrics.opened(key))
            choices: list[Choice] = []
            for prompt, room in zip(prompts, rooms, strict=True):
                self._metrics.tokens.labels("prompt").inc(len(prompt))
                for _ in range(asked.n):
                    number = len(choices)
                    sampling = asked.sampling(self._defaults, number, asked.n * len(prompts))
                    job = self._engine.submit(prompt, key, sampling, room, ignore_ends=asked.ignore_eos)
                    stack.callback(job.cancel)
                    choices.append(Choice(number, job, Text(self._tokenizer, prompt, asked.stop)))
            return _Answers(asked, choices, sum(map(len, prompts)), stack.pop_all())

    def _check_load(self, answers: int) -> None:
        """The gate counts requests, and each may want many answers. A single one is answered if there are no others."""
        others = self._engine.open
        if self._most_answers is not None and others and others + answers > self._most_answers:
            raise Refused(
                f"{others} answers wait or run, and with those of this request there may be {self._most_answers}; try later",
                429,
                "overloaded",
            )

    def _room(self, prompt: int, wanted: int | None) -> int:
        if self._most_tokens is None:
            return self._engine.room(prompt, wanted)
        if wanted is not None and wanted > self._most_tokens:
            raise RequestTooLong(f"{wanted} tokens were asked for; this server writes at most {self._most_tokens}")
        return min(self._most_tokens, self._engine.room(prompt, wanted))

    async def _respond(self, answers: _Answers, form: AnswerForm) -> Response:
        if answers.asked.stream:
            return _Stream(answers.open, self._events(answers, form))
        gathered: list[list[AnswerPiece]] = [[] for _ in answers.choices]
        with answers.open:
            async for choice, piece in pieces(answers.choices):
                self._metrics.tokens.labels("answer").inc(piece.tokens)
                gathered[choice.index].append(piece)
        whole = [joined(parts) for parts in gathered]
        usage = _usage(answers.prompt_tokens, sum(piece.tokens for piece in whole))
        return Response(form.whole(whole, usage), media_type="application/json")

    async def _events(self, answers: _Answers, form: AnswerForm) -> AsyncIterator[str]:
        """Answers as server-sent events, in OpenAI's form."""
        options = answers.asked.stream_options
        wants_usage = options is not None and options.include_usage
        written = 0
        try:
            for choice in answers.choices:
                for event in form.opening(choice.index):
                    yield _event(event, wants_usage)
            async for choice, piece in pieces(answers.choices):
                self._metrics.tokens.labels("answer").inc(piece.tokens)
                written += piece.tokens
                for event in form.chunks(choice.index, piece):
                    yield _event(event, wants_usage)
            if wants_usage:
                usage = _usage(answers.prompt_tokens, written).model_dump(exclude_unset=True)
                yield _event(form.chunk([]) | {"usage": usage}, False)
            yield "data: [DONE]\n\n"
        except Exception as error:
            _log(error)
            yield f"data: {json.dumps(error_body(error, self._folder))}\n\n"


class _Stream(StreamingResponse):
    """A stream that closes what was open for it when it ends, however it ends."""

    def __init__(self, opened: contextlib.ExitStack, events: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._opened = opened

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self._opened:
            await super().__call__(scope, receive, send)


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
