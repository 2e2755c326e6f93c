"""Examples as tokens: which of them the loss counts, kept outside of memory, and several examples in a row.

Tokens are written to a temporary file, five bytes each, and read back from there: memory holds 16 bytes a row.
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

__all__ = ["IGNORED", "Packed", "Row", "Rows", "encode", "pack"]

IGNORED = -100  # the label of a token that does not count in the loss
TOKEN = np.dtype([("id", "<i4"), ("counts", "?")])

Row = dict[str, list[int]]  # "input_ids", "labels", and for several examples "position_ids", of one length


class _Rows(Sequence[Row]):
    """Rows that are made when they are asked for."""

    lengths: np.ndarray[Any, Any]  # int64, of each row

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


class Rows(_Rows):
    """Encoded examples, each a row.

    tokens: TOKEN [total], all rows' one after another; ends: int64 [rows], where each ends.
    shortened: how many examples lost their beginning; dropped: how many were left without a token that counts, or had none.
    """

    def __init__(self, tokens: np.ndarray[Any, Any], ends: Sequence[int], shortened: int = 0, dropped: int = 0) -> None:
        self.tokens, self.ends = tokens, np.asarray(ends, dtype=np.int64)
        self.lengths = np.diff(self.ends, prepend=0)
        self.shortened, self.dropped = shortened, dropped

    def _row(self, number: int) -> Row:
        end = int(self.ends[number])
        tokens = self.tokens[end - int(self.lengths[number]) : end]
        return {"input_ids": tokens["id"].tolist(), "labels": np.where(tokens["counts"], tokens["id"], IGNORED).tolist()}


class Packed(_Rows):
    """Rows that hold several examples each, whose positions begin at 0: `parts` says which."""

    def __init__(self, rows: Rows, parts: Sequence[Sequence[int]]) -> None:
        self.rows, self.parts = rows, parts
        self.lengths = np.array([sum(int(rows.lengths[number]) for number in part) for part in parts], dtype=np.int64)

    def _row(self, number: int) -> Row:
        packed: Row = {"input_ids": [], "labels": [], "position_ids": []}
        for part in self.parts[number]:
            row = self.rows[part]
            packed["input_ids"] += row["input_ids"]
            packed["labels"] += [IGNORED, *row["labels"][1:]]  # its first token does not follow from the example before
            packed["position_ids"] += range(len(row["input_ids"]))
        return packed


def pack(rows: Rows, length: int) -> Packed:
    """Put rows together, each whole, into as few of at most `length` tokens as best fit finds, the longest first.

    length: at least that of the longest row.
    """
    parts: list[list[int]] = []
    open_parts: list[list[int]] = [[] for _ in range(length + 1)]  # by the room that is left in them
    rooms: list[int] = []  # for which there are any, sorted
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
    """Tokens of at most max_length a row. The loss counts texts and completions with the end-of-text token after them, and the
    assistant's turns of chats; not prompts.

    A text that is longer is cut into rows; anything else loses its beginning. A chat whose template changes earlier turns as it
    goes on becomes a row for each of the assistant's turns. on_read(done) is called after each example.
    Raises DataError if nothing is left to train on, or for a chat that the tokenizer cannot tell.
    """
    ends = array.array("q")
    end = shortened = dropped = 0
    with tempfile.TemporaryFile(prefix="shira-tokens-") as file:
        for done, example in enumerate(examples, start=1):
            found = False
            for ids, counts in _pieces(tokenizer, example, max_length):
                shortened += len(ids) > max_length
                piece = np.empty(min(len(ids), max_length), dtype=TOKEN)
                piece["id"], piece["counts"] = ids[-len(piece) :], counts[-len(piece) :]
                if piece["counts"][1:].any():  # the first token has nothing before it to be predicted from
                    found = True
                    file.write(piece.tobytes())
                    end += len(piece)
                    ends.append(end)
            dropped += not found
            on_read(done)
        if not ends:
            why = f": none of {dropped} has a token that the loss counts within {max_length}" if dropped else ""
            raise DataError(f"no example to train on{why}")
        file.flush()
        return Rows(np.memmap(file, dtype=TOKEN, mode="r"), ends, shortened, dropped)


def _pieces(tokenizer: Any, example: Example, max_length: int) -> Iterator[tuple[list[int], list[bool]]]:
    """(ids, whether each counts), of a text so many as it takes."""
    if example.messages:
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
    """A chat's tokens, of which those count that the model must write: from where the template asks for an answer to where the
    turn ends. What the template makes of the turns so far is compared with what it makes of all."""
    turns = [n for n, message in enumerate(example.messages) if message["role"] == "assistant" and n >= example.first]
    asked = [_told(tokenizer, example, turn, asking=True) for turn in turns]
    answered = [_told(tokenizer, example, turn + 1) for turn in turns]
    for turn, before, after in zip(turns, asked, answered, strict=True):
        if not after.startswith(before):
            raise DataError(
                f"{example.origin}: the chat template does not go on from where it asks for message {turn + 1}, so where that "
                "begins cannot be known; use a prompt and a completion"
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
    """A text's tokens, and whether each begins in one of the stretches [start, stop) of its letters."""
    try:
        told = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError as error:
        raise DataError(f"{example.origin}: chats need a fast tokenizer, which tells where in a text its tokens are") from error
    counts = []
    for begin, _ in told["offset_mapping"]:
        stretch = bisect.bisect_right(starts, begin) - 1
        counts.append(stretch >= 0 and begin < stops[stretch])
    return told["input_ids"], counts


def _told(tokenizer: Any, example: Example, turns: int, asking: bool = False) -> str:
    """What the chat template makes of the first so many messages, asking for an answer or not."""
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{example.origin}: messages need a tokenizer with a chat template, and this model's has none")
    try:
        messages = list(example.messages[:turns])
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asking))
    except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
        raise DataError(f"{example.origin}: the chat template does not take these messages: {error}") from error
