"""Log-probabilities in OpenAI's two forms: that of completions and that of chats."""

from collections.abc import Sequence
from typing import Any

from openai.types.chat import ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs

from .sampling import TokenLogprob

__all__ = ["ChatLogprobs", "CompletionLogprobs"]


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
        return {"token": text, "bytes": list(text.encode()), "logprob": logprob}


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
