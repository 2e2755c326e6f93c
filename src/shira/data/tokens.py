"""Examples as tokens: which tokens the loss counts, storage outside of memory, and several examples in one row.

Tokens are written to a temporary file, five bytes each, and read back from it. Memory holds 24 bytes for each row.
"""

import array
import bisect
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np

from ..errors import DataError
from .tasks import Example

__all__ = ["IGNORED", "Packed", "Row", "Rows", "chat_text", "encode", "pack"]

IGNORED = -100  # the label of a token that does not count in the loss
TOKEN = np.dtype([("id", "<i4"), ("counts", "?")])

Row = dict[str, list[int]]  # "input_ids", "labels" and, for several examples, "position_ids"; all of the same length


class _RowsMadeOnDemand(Sequence[Row]):
    """A sequence of rows, which are made when they are asked for."""

    lengths: np.ndarray[Any, Any]  # int64 [rows], the tokens of each row

    @abstractmethod
    def _row(self, number: int) -> Row:
        """The row of this number, from 0 on."""

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, number: int) -> Row: ...
    @overload
    def __getitem__(self, number: slice) -> list[Row]: ...
    def __getitem__(self, number: int | slice) -> Row | list[Row]:
        places = range(len(self))[number]
        return self._row(places) if isinstance(places, int) else [self._row(place) for place in places]


class Rows(_RowsMadeOnDemand):
    """Encoded examples, one in each row.

    tokens: TOKEN [total], the rows one after another. ends: int64 [rows], where each row ends.
    examples: int64 [rows], the number of each row's example, from 0 on.
    shortened: how many examples lost their beginning. dropped: how many have no token that counts, or lost all of them.
    """

    def __init__(
        self,
        tokens: np.ndarray[Any, Any],
        ends: Sequence[int],
        examples: Sequence[int],
        shortened: int = 0,
        dropped: int = 0,
    ) -> None:
        self.tokens, self.ends = tokens, np.asarray(ends, dtype=np.int64)
        self.examples = np.asarray(examples, dtype=np.int64)
        self.lengths = np.diff(self.ends, prepend=0)
        self.shortened, self.dropped = shortened, dropped

    def _row(self, number: int) -> Row:
        end = int(self.ends[number])
        tokens = self.tokens[end - int(self.lengths[number]) : end]
        return {"input_ids": tokens["id"].tolist(), "labels": np.where(tokens["counts"], tokens["id"], IGNORED).tolist()}


class Packed(_RowsMadeOnDemand):
    """Rows that hold several examples each. The positions of each example begin at 0.

    parts: for each packed row, the numbers of the examples in it.
    """

    def __init__(self, rows: Rows, parts: Sequence[Sequence[int]]) -> None:
        self.rows, self.parts = rows, parts
        self.lengths = np.array([sum(int(rows.lengths[number]) for number in part) for part in parts], dtype=np.int64)

    def _row(self, number: int) -> Row:
        packed: Row = {"input_ids": [], "labels": [], "position_ids": []}
        for part in self.parts[number]:
            row = self.rows[part]
            packed["input_ids"] += row["input_ids"]
            packed["labels"] += [IGNORED, *row["labels"][1:]]  # the first token must not be predicted from the example before
            packed["position_ids"] += range(len(row["input_ids"]))
        return packed


def pack(rows: Rows, length: int) -> Packed:
    """Pack rows, each undivided, into rows of at most `length` tokens: by best fit, the longest first.

    length: at least the length of the longest row.
    """
    parts: list[list[int]] = []
    open_parts: list[list[int]] = [[] for _ in range(length + 1)]  # free tokens -> packed rows with so many
    rooms: list[int] = []  # the numbers of free tokens that any packed row has, sorted
    for number in np.argsort(-rows.lengths, kind="stable").tolist():
        size = int(rows.lengths[number])
        place = bisect.bisect_left(rooms, size)
        if place < len(rooms):
            room = rooms[place]
            part = open_parts[room].pop()
            if not open_parts[room]:
                del rooms[place]
        else:
            room, part = length, len(parts)
            parts.append([])
        parts[part].append(number)
        if room > size:
            if not open_parts[room - size]:
                bisect.insort(rooms, room - size)
            open_parts[room - size].append(part)
    return Packed(rows, parts)


def encode(
    tokenizer: Any, examples: Iterable[Example], max_length: int = 512, *, on_read: Callable[[int], None] = lambda done: None
) -> Rows:
    """Examples as rows of at most max_length tokens.

    The loss counts texts and completions, with the end-of-text token after them (but not after one of `choices`), and the
    assistant's turns of chats. It does not count prompts.
    A longer text is cut into several rows. Any other example loses its beginning. If a chat's template changes earlier turns
    when further turns follow, the chat becomes one row for each of the assistant's turns.
    on_read(done) is called after each example.
    Raises DataError if nothing is left to train on, or for a chat that the tokenizer cannot encode.
    """
    ends, numbers = array.array("q"), array.array("q")
    end = shortened = dropped = 0
    with tempfile.TemporaryFile(prefix="shira-tokens-") as file:
        for done, example in enumerate(examples, start=1):
            found = False
            for ids, counts in _pieces(tokenizer, example, max_length):
                shortened += len(ids) > max_length
                piece = np.empty(min(len(ids), max_length), dtype=TOKEN)
                piece["id"], piece["counts"] = ids[-len(piece) :], counts[-len(piece) :]
                if piece["counts"][1:].any():  # the first token cannot be predicted
                    found = True
                    file.write(piece.tobytes())
                    end += len(piece)
                    ends.append(end)
                    numbers.append(done - 1)
            dropped += not found
            on_read(done)
        if not ends:
            why = f": none of {dropped} has a token that the loss counts within {max_length}" if dropped else ""
            raise DataError(f"no example to train on{why}")
        file.flush()
        return Rows(np.memmap(file, dtype=TOKEN, mode="r"), ends, numbers, shortened, dropped)


def _pieces(tokenizer: Any, example: Example, max_length: int) -> Iterator[tuple[list[int], list[bool]]]:
    """The rows of an example: (ids, whether each counts). A text is cut to max_length; other rows may be longer."""
    if example.messages and not (example.completion and not getattr(tokenizer, "chat_template", None)):
        yield from _chat(tokenizer, example)
        return
    prompt = tokenizer(example.prompt)["input_ids"] if example.prompt else []
    completion = tokenizer(example.completion, add_special_tokens=not example.prompt)["input_ids"]
    if not example.choices and tokenizer.eos_token_id is not None:
        completion = [*completion, tokenizer.eos_token_id]
    if example.prompt:
        yield prompt + completion, [False] * len(prompt) + [True] * len(completion)
    else:
        for start in range(0, len(completion), max_length):
            piece = completion[start : start + max_length]
            yield piece, [True] * len(piece)


def _chat(tokenizer: Any, example: Example) -> Iterator[tuple[list[int], list[bool]]]:
    """A chat's tokens. Those count that the model must write: from the template's prompt for an answer to the end of the turn.

    To find these places, the template's text for the turns so far is compared with its text for all turns.
    """
    turns = [n for n, message in enumerate(example.messages) if message["role"] == "assistant" and n >= example.first]
    asked = [chat_text(tokenizer, example, turn, asking=True) for turn in turns]
    answered = [chat_text(tokenizer, example, turn + 1) for turn in turns]
    for turn, before, after in zip(turns, asked, answered, strict=True):
        if not after.startswith(before):
            raise DataError(
                f"{example.origin}: with message {turn + 1} the chat template's text does not begin with its own prompt for "
                "that message, so the message's beginning is not known; use a prompt and a completion"
            )
    whole = answered[-1]
    starts = [len(before) for before in asked]
    stops = [len(after) for after in answered]
    if all(whole.startswith(after) for after in answered):
        yield _counted(tokenizer, example, whole, starts, stops)
    else:
        for after, start, stop in zip(answered, starts, stops, strict=True):
            yield _counted(tokenizer, example, after, [start], [stop])


def _counted(tokenizer: Any, example: Example, text: str, starts: list[int], stops: list[int]) -> tuple[list[int], list[bool]]:
    """A text's tokens, and whether each begins in one of the ranges [start, stop) of its characters."""
    try:
        told = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError as error:
        raise DataError(f"{example.origin}: chats need a fast tokenizer, which tells where in a text its tokens are") from error
    counts = []
    for begin, _ in told["offset_mapping"]:
        stretch = bisect.bisect_right(starts, begin) - 1
        counts.append(stretch >= 0 and begin < stops[stretch])
    return told["input_ids"], counts


def chat_text(tokenizer: Any, example: Example, turns: int, asking: bool = False) -> str:
    """The chat template's text for the first `turns` messages. asking: with the template's prompt for an answer."""
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{example.origin}: messages need a tokenizer with a chat template, and this model's has none")
    try:
        messages = list(example.messages[:turns])
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asking))
    except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
        raise DataError(f"{example.origin}: the chat template does not take these messages: {error}") from error
