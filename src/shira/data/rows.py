"""What a row of data means: the columns that it may have, and the example that it holds."""

from collections.abc import Mapping
from typing import Any

from ..errors import DataError
from ..texts import shown
from .tasks import Example

__all__ = ["COLUMNS", "EXPECTED", "example_of"]

EXPECTED = (
    "'messages'; 'conversations'; 'prompt' and 'completion'; 'prompt', 'choices' and 'label'; 'instruction' and 'output'; "
    "'question' and 'answer'; or 'text'"
)
COLUMNS = (
    *("messages", "conversations", "prompt", "completion", "choices", "label", "text"),
    *("instruction", "input", "output", "system", "question", "answer"),
)
SPEAKERS = {  # ShareGPT's names of roles
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
    "system": "system",
}


def example_of(row: object, origin: str) -> Example:
    """The example that a row holds: the first of these forms whose columns it has.

    choices: `prompt`, `choices` and `label`. Chats: `messages` of `role` and `content`, or `conversations` of ShareGPT, `from`
    and `value`. Alpaca: `instruction`, `input`, which may be missing, and `output`. `text`. `prompt` and `completion`, strings
    or lists of messages. `question` and `answer`. Alpaca's rows and ShareGPT's may have a `system` message.

    Raises DataError, which begins with the origin, if the row holds none.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{origin}: expected an object with {EXPECTED}; found {shown(row)}")
    row = {key: value for key, value in row.items() if value is not None}  # tables hold null where a value is missing
    try:
        if "choices" in row:
            return _question(row, origin)
        if "messages" in row:
            return _chat((), _messages(row["messages"], "messages"), origin)
        if "conversations" in row:
            return _chat((), _system(row) + _conversation(row["conversations"]), origin)
        if "instruction" in row:
            asked = _text(row["instruction"], "instruction"), _text(row.get("input", ""), "input")
            return _turn(row, "\n\n".join(filter(None, asked)), _text(row["output"], "output"), origin)
        if "text" in row:
            return Example(completion=_text(row["text"], "text"), origin=origin)
        if "question" in row:
            return _turn({}, _text(row["question"], "question"), _text(row["answer"], "answer"), origin)
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list) or isinstance(completion, list):
            return _chat(_messages(prompt, "prompt"), _messages(completion, "completion"), origin)
        return Example(_text(prompt, "prompt"), _text(completion, "completion"), origin=origin)
    except KeyError as error:
        found = ", ".join(map(repr, row)) or "nothing"
        raise DataError(f"{origin}: expected {EXPECTED}; found {found}, but no {error}") from error
    except TypeError as error:
        raise DataError(f"{origin}: {error}") from error


def _question(row: Mapping[str, Any], origin: str) -> Example:
    choices, label = row["choices"], row["label"]
    if not (isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) for c in choices)):
        raise TypeError(f"'choices' must be a list of at least two strings, found {shown(choices)}")
    for choice in choices:
        _text(choice, "choices")
    if type(label) is not int or not 0 <= label < len(choices):
        raise TypeError(f"label must be from 0 to {len(choices) - 1}, found {shown(label)}")
    return Example(_text(row["prompt"], "prompt"), choices[label], tuple(choices), label, origin=origin)


def _turn(row: Mapping[str, Any], asked: str, answer: str, origin: str) -> Example:
    """One question and its answer: a chat for a model with a chat template, and for others text with a blank line between."""
    messages = (*_system(row), {"role": "user", "content": asked}, {"role": "assistant", "content": answer})
    prompt = "\n\n".join([message["content"] for message in messages[:-1]] + [""])
    return Example(prompt, answer, messages=messages, first=len(messages) - 1, origin=origin)


def _chat(prompt: tuple[dict[str, Any], ...], completion: tuple[dict[str, Any], ...], origin: str) -> Example:
    if not any(message["role"] == "assistant" for message in completion):
        raise TypeError(
            "expected a turn of the role 'assistant' to learn from; found " + shown([m["role"] for m in completion])
        )
    return Example(messages=prompt + completion, first=len(prompt), origin=origin)


def _system(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    text = _text(row.get("system", ""), "system")
    return ({"role": "system", "content": text},) if text else ()


def _messages(value: object, column: str) -> tuple[dict[str, Any], ...]:
    return tuple(
        {key: part for key, part in message.items() if part is not None}
        for message in _objects(value, column, ("role", "content"))
    )


def _conversation(value: object) -> tuple[dict[str, Any], ...]:
    """ShareGPT's turns as messages. Turns that have roles and contents are taken as they are."""
    column = "conversations"
    if isinstance(value, list) and value and isinstance(value[0], Mapping) and "role" in value[0]:
        return _messages(value, column)
    turns = _objects(value, column, ("from", "value"))
    for number, turn in enumerate(turns, start=1):
        if turn["from"] not in SPEAKERS:
            known = ", ".join(map(repr, SPEAKERS))
            raise TypeError(f"message {number} of '{column}': 'from' must be one of {known}; found {shown(turn['from'])}")
    return tuple({"role": SPEAKERS[turn["from"]], "content": turn["value"]} for turn in turns)


def _objects(value: object, column: str, keys: tuple[str, str]) -> list[Mapping[str, Any]]:
    """A list of objects with two texts. Raises TypeError for anything else."""
    if not isinstance(value, list) or not value:
        raise TypeError(f"expected '{column}' to be a list of messages, found {shown(value)}")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str) for key in keys):
            first, second = keys
            raise TypeError(
                f"message {number} of '{column}' must have '{first}' and '{second}', two strings; found {shown(message)}"
            )
        _text(message[keys[1]], column)
    return value


def _text(value: object, column: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"'{column}': expected a string, found {shown(value)}")
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError as error:  # JSON can name half of a character: "\\ud83d"
        raise TypeError(f"'{column}': expected valid Unicode, found {shown(value)} ({error})") from error
    return value
