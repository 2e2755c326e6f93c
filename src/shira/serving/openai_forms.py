"""How answers are written: OpenAI's two forms, whole and in pieces.

The bodies are the `openai` package's own types, so its client reads what they say.
"""

import time
import uuid
from typing import Any

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice as ChatChoice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta

from .answers import AnswerPiece
from .logprobs import ChatLogprobs, CompletionLogprobs
from .openai_requests import OpenAIRequest

__all__ = ["AnswerForm", "ChatForm", "CompletionForm"]


class AnswerForm:
    """How the answers of one request are written. Whatever belongs to one answer has the same id and time."""

    prefix = ""  # of the ids

    def __init__(self, asked: OpenAIRequest) -> None:
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
        self.wants_logprobs = asked.reported is not None

    def whole(self, answers: list[AnswerPiece], usage: CompletionUsage) -> str:
        """The body with all answers, as JSON."""
        raise NotImplementedError

    def opening(self, index: int) -> list[dict[str, Any]]:
        """The events before the first piece of an answer."""
        return []

    def chunk(self, choices: list[Any]) -> dict[str, Any]:
        """An event of a stream."""
        raise NotImplementedError

    def chunks(self, index: int, piece: AnswerPiece) -> list[dict[str, Any]]:
        """The events of a piece of an answer."""
        raise NotImplementedError


class ChatForm(AnswerForm):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl"

    def __init__(self, asked: OpenAIRequest, tokenizer: Any) -> None:
        super().__init__(asked)
        self._logprobs = ChatLogprobs(tokenizer)

    def whole(self, answers: list[AnswerPiece], usage: CompletionUsage) -> str:
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

    def chunks(self, index: int, piece: AnswerPiece) -> list[dict[str, Any]]:
        logprobs = self._logprobs.chunk(piece.logprobs) if self.wants_logprobs else None
        made = [self._chunk(index, ChoiceDelta(content=piece.text), logprobs, None)] if piece.text or piece.logprobs else []
        return made + ([self._chunk(index, ChoiceDelta(), None, piece.finish)] if piece.finish else [])

    def _chunk(self, index: int, delta: ChoiceDelta, logprobs: Any, finish: Any) -> dict[str, Any]:
        return self.chunk([ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)])

    def chunk(self, choices: list[Any]) -> dict[str, Any]:
        made = ChatCompletionChunk(**self.head, object="chat.completion.chunk", choices=choices)  # type: ignore[arg-type]
        return made.model_dump(exclude_unset=True)


class CompletionForm(AnswerForm):
    """Of /v1/completions."""

    prefix = "cmpl"

    def __init__(self, asked: OpenAIRequest, tokenizer: Any) -> None:
        super().__init__(asked)
        self._tokenizer = tokenizer
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def _reported(self, index: int, piece: AnswerPiece) -> Any:
        if not self.wants_logprobs:
            return None
        return self._logprobs.setdefault(index, CompletionLogprobs(self._tokenizer)).add(piece.logprobs)

    def whole(self, answers: list[AnswerPiece], usage: CompletionUsage) -> str:
        choices = [
            CompletionChoice(index=index, text=answer.text, logprobs=self._reported(index, answer), finish_reason=answer.finish)  # type: ignore[arg-type]
            for index, answer in enumerate(answers)
        ]
        made = Completion(**self.head, object="text_completion", choices=choices, usage=usage)  # type: ignore[arg-type]
        return made.model_dump_json(exclude_unset=True)

    def chunks(self, index: int, piece: AnswerPiece) -> list[dict[str, Any]]:
        if not (piece.text or piece.logprobs or piece.finish):
            return []
        logprobs = self._reported(index, piece)
        reported = logprobs and logprobs.model_dump()
        return [self.chunk([{"index": index, "text": piece.text, "logprobs": reported, "finish_reason": piece.finish}])]

    def chunk(self, choices: list[Any]) -> dict[str, Any]:
        return {**self.head, "object": "text_completion", "choices": choices}  # OpenAI's type has no choice without a reason
