"""Log-probabilities in OpenAI's two forms: that of completions and that of chats."""

import re
from collections.abc import Sequence
from typing import Any

from openai.types.chat import ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs

from .answers import INCOMPLETE
from .sampling import TokenLogprob

__all__ = ["ChatLogprobs", "CompletionLogprobs"]


BYTE = re.compile("<0x([0-9A-F]{2})>")  # a byte in a vocabulary of SentencePiece
_plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that byte-level BPE writes as the letter of that number
LETTERS = {chr(byte): byte for byte in _plain}
LETTERS |= {chr(256 + number): byte for number, byte in enumerate(sorted({*range(256)} - {*_plain}))}


def _bytes(tokenizer: Any, token: int, text: str) -> list[int] | None:
    """The bytes of a token, also of one that is a part of a character; None if they are not known. text: what it decodes to."""
    piece = tokenizer.convert_ids_to_tokens(token) if INCOMPLETE in text else text
    if not isinstance(piece, str):
        return None
    if piece == text or INCOMPLETE in piece:
        return list(text.encode())
    if found := BYTE.fullmatch(piece):
        return [int(found[1], 16)]
    return [LETTERS[letter] for letter in piece] if LETTERS.keys() >= set(piece) else None


def _text(tokenizer: Any, token: int) -> str:
    return str(tokenizer.decode([token], clean_up_tokenization_spaces=False))


class ChatLogprobs:
    """In chats: each token with its bytes, and the most probable tokens in a list."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def whole(self, entries: Sequence[TokenLogprob]) -> ChoiceLogprobs:
        return ChoiceLogprobs(content=[self._entry(entry) for entry in entries], refusal=None)

    def chunk(self, entries: Sequence[TokenLogprob]) -> ChunkLogprobs:
        return ChunkLogprobs(content=[self._entry(entry) for entry in entries], refusal=None)

    def _entry(self, entry: TokenLogprob) -> ChatCompletionTokenLogprob:
        top = [TopLogprob(**self._said(token, logprob)) for token, logprob in entry.top]
        return ChatCompletionTokenLogprob(**self._said(entry.token, entry.logprob), top_logprobs=top)

    def _said(self, token: int, logprob: float) -> dict[str, Any]:
        text = _text(self._tokenizer, token)
        return {"token": text, "bytes": _bytes(self._tokenizer, token, text), "logprob": logprob}


class CompletionLogprobs:
    """Of one answer; `add` takes its tokens as they come, because offsets count from the answer's beginning."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._offset = tokenizer, 0

    def add(self, entries: Sequence[TokenLogprob]) -> Logprobs:
        made = Logprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token, logprob, top in entries:
            text = _text(self._tokenizer, token)
            made.tokens.append(text)  # type: ignore[union-attr]
            made.token_logprobs.append(logprob)  # type: ignore[union-attr]
            chosen = {text: logprob}  # it is reported also if it is not among the most probable
            others = {_text(self._tokenizer, other): value for other, value in reversed(top)}
            made.top_logprobs.append({**others, **chosen} if top else {})  # type: ignore[union-attr]
            made.text_offset.append(self._offset)  # type: ignore[union-attr]
            self._offset += len(text)
        return made
