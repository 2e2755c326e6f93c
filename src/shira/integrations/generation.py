"""Text from a live model, through Transformers' own `generate` and `TextStreamer`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.tasks import Example
from ..data.tokens import chat_text
from ..errors import DataError, MissingExtra
from ..weights.random_numbers import seeded

__all__ = ["Prompt", "answer", "ends_of", "is_chat"]

Prompt = str | Sequence[Mapping[str, str]]  # a text to continue; or the messages of a chat, {"role", "content"} each


def is_chat(tokenizer: Any, *, raw: bool = False, system: str = "") -> bool:
    """Whether prompts become messages of a chat: if the tokenizer has a chat template, unless they are raw.

    Raises DataError if there is a system prompt that could not be used.
    """
    found = bool(getattr(tokenizer, "chat_template", None)) and not raw
    if system and not found:
        why = "--raw leaves it out" if raw else "this model's tokenizer has none"
        raise DataError(f"--system is for the chat template, and {why}; write it into the prompt")
    return found


def answer(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    *,
    max_new_tokens: int = 256,
    temperature: float | None = None,
    seed: int = 0,
    on_text: Callable[[str], None] = lambda text: None,
) -> str:
    """What a causal language model writes after a prompt, as it is now, with its active adapters.

    temperature: 0 always takes the most probable token; above 0 tokens are drawn. None: the model's own generation settings.
    seed: of the tokens that are drawn. The state of torch's random numbers does not change.
    on_text is called with each piece of the text as soon as it is known.
    Raises DataError if the model has no room for the prompt, if its chat template does not take the messages, for a prompt that
    is not valid Unicode, and if the model computes no number for a token, as with a strength that is too large for its dtype.

        answer(model, tokenizer, [{"role": "user", "content": "What is the capital of France?"}], max_new_tokens=20)
    """
    device = next(model.parameters()).device
    inputs = _inputs(tokenizer, prompt).to(device)
    length = inputs["input_ids"].shape[1]
    room = getattr(model.config, "max_position_embeddings", None) or length + max_new_tokens
    if not 0 < length < room:
        raise DataError(f"the prompt has {length} tokens; expected at least 1, and less than the {room} that this model takes")
    pieces: list[str] = []

    def take(text: str) -> None:
        pieces.append(text)
        on_text(text)

    sampling: dict[str, Any] = {}
    if temperature is not None:
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else GREEDY
    with torch.no_grad(), seeded(seed, model.parameters()):
        model.generate(  # type: ignore[operator]  # a method of Transformers' models
            **inputs,
            max_new_tokens=min(max_new_tokens, room - length),
            eos_token_id=ends_of(model, tokenizer) or None,
            pad_token_id=tokenizer.pad_token_id,
            streamer=_streamer(tokenizer, take),
            logits_processor=[_finite],
            **sampling,
        )
    return "".join(pieces)


# None: otherwise a warning says they are unused
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def _inputs(tokenizer: Any, prompt: Prompt) -> Any:
    """A prompt's tokens. A chat ends with the template's request for an answer."""
    text, is_plain = prompt, isinstance(prompt, str)
    if not isinstance(text, str):
        messages = tuple(dict(message) for message in text)
        text = chat_text(tokenizer, Example(messages=messages, origin="the prompt"), len(messages), asking=True)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # of a terminal's or a file's bytes that are not UTF-8
        raise DataError(f"the prompt is not valid Unicode ({error})") from error
    return tokenizer(text, add_special_tokens=is_plain, return_tensors="pt", return_token_type_ids=False)


def _finite(_: Tensor, scores: Tensor) -> Tensor:
    """The scores of the next token, as they are. Raises DataError if none of them is a number that can be compared."""
    if not scores.max().isfinite():
        raise DataError(
            "the model's scores for the next token are not finite; lower the strengths of its adapters, or load it in a dtype "
            "that holds larger numbers (--dtype float32)"
        )
    return scores


def ends_of(model: nn.Module, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: those of the model's generation settings, and the tokenizer's."""
    known = getattr(model.generation_config, "eos_token_id", None)
    return sorted({*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id} - {None})


def _streamer(tokenizer: Any, take: Callable[[str], None]) -> Any:
    try:
        from transformers import TextStreamer
    except ImportError as error:
        raise MissingExtra(f"this needs transformers: pip install 'shira-adapters[train]' ({error})") from error

    class Pieces(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                take(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
