"""From the tokens of jobs to pieces of text: as soon as they are known, and up to the first stop string."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, NamedTuple

from .sampling import TokenLogprob
from .transformers_engine import Job

__all__ = ["INCOMPLETE", "AnswerPiece", "Choice", "Text", "joined", "pieces"]

CONTEXT = 6  # last tokens of a prompt that decide how the first token of an answer is written
INCOMPLETE = "\ufffd"  # what a decoder writes for a character of which not all bytes are there


class Text:
    """Turns tokens into text as they come, and ends it before the first stop string. Special tokens are left out.

    Text that may be the beginning of a stop string is held back until it is known. The text does not depend on when it is read.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = (), stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._tokens = list(prompt[-CONTEXT:])
        self._start, self._seen = 0, len(self._tokens)  # tokens before `_seen` are shown; those from `_start` on are decoded
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is known after this token and was not before."""
        self._tokens.append(token)
        new = self._rest()
        if new.endswith(INCOMPLETE):
            return ""
        if new:
            self._start, self._seen = self._seen, len(self._tokens)
        return self._show(new)

    def end(self) -> str:
        """The text that was held back. After it nothing may be added."""
        text = "" if self.stopped else self._show(self._rest())
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _rest(self) -> str:
        before = self._decoded(self._tokens[self._start : self._seen])
        return self._decoded(self._tokens[self._start :])[len(before) :]

    def _decoded(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _show(self, new: str) -> str:
        text = self._held + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_beginning(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _beginning(text: str, stop: str) -> int:
    """The length of the longest end of a text that is the beginning of a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class AnswerPiece(NamedTuple):
    """A part of an answer. finish: "stop" or "length" in the last one."""

    text: str
    tokens: int
    logprobs: list[TokenLogprob]
    finish: str | None


def joined(parts: Sequence[AnswerPiece]) -> AnswerPiece:
    """All pieces of an answer as one."""
    logprobs = [entry for piece in parts for entry in piece.logprobs]
    return AnswerPiece("".join(piece.text for piece in parts), sum(piece.tokens for piece in parts), logprobs, parts[-1].finish)


class Choice:
    """One answer to a prompt: the job that writes it, and its text."""

    def __init__(self, index: int, job: Job, text: Text) -> None:
        self.index, self._job, self._text = index, job, text

    async def pieces(self) -> AsyncIterator[AnswerPiece]:
        """The pieces as they come. Raises what the job raises."""
        async for update in self._job:
            written = update.tokens[:-1] if update.finish == "stop" else update.tokens  # without the token that ends the answer
            taken, shown = 0, ""
            while taken < len(written) and not self._text.stopped:
                shown += self._text.add(written[taken])
                taken += 1
            count, finish = (taken, "stop") if self._text.stopped else (len(update.tokens), update.finish)
            if finish:
                shown += self._text.end()
                finish = "stop" if self._text.stopped else finish
            yield AnswerPiece(shown, count, update.logprobs[:taken], finish)
            if finish:
                return


async def pieces(choices: Iterable[Choice]) -> AsyncIterator[tuple[Choice, AnswerPiece]]:
    """The pieces of several answers as they come. Raises what a job raises."""
    choices = list(choices)
    queue: asyncio.Queue[tuple[Choice, AnswerPiece | Exception]] = asyncio.Queue()

    async def follow(choice: Choice) -> None:
        try:
            async for piece in choice.pieces():
                queue.put_nowait((choice, piece))
        except Exception as error:
            queue.put_nowait((choice, error))

    tasks = [asyncio.create_task(follow(choice)) for choice in choices]
    left = len(tasks)
    try:
        while left:
            choice, piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            left -= piece.finish is not None
            yield choice, piece
    finally:
        for task in tasks:
            task.cancel()
