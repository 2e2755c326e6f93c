"""A running `shira serve` to play with: OpenAI's API, in which a request names its adapters and their strengths."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ..errors import DataError, MissingExtra, ShiraError
from .asking import Chosen, Shown, Words
from .streams import Stopped, streamed

__all__ = ["Remote", "selection"]

LONGEST = 600.0  # seconds of an answer
QUICK = 10.0  # seconds of a list


def selection(chosen: Chosen, base: str) -> str:
    """The model that a request names: "poet:1+coder:0.5", or the base."""
    return "+".join(f"{name}:{setting.strength:g}" for name, setting in chosen.items()) or base


class Remote:
    """A server, by its address. Nothing of it is kept here but names.

    Raises DataError if it does not answer as `shira serve` does, MissingExtra without openai.
    """

    makes = "text"
    is_chat: bool | None = None

    def __init__(self, url: str, key: str = "") -> None:
        try:
            import openai
        except ImportError as error:
            raise MissingExtra(f"--server needs openai: pip install 'shira-adapters[play]' ({error})") from error
        self._errors = openai
        self._url = url.rstrip("/").removesuffix("/v1")
        if not self._url.startswith(("http://", "https://")):
            raise DataError(f"--server takes an address such as http://127.0.0.1:8000, found {url!r}")
        self._client = openai.OpenAI(base_url=f"{self._url}/v1", api_key=key or "none", max_retries=0, timeout=LONGEST)
        self.blocks: list[str] = []
        models = self._answer_to(lambda: self._client.models.list(timeout=QUICK).data)
        self._base = next((each.id for each in models if getattr(each, "parent", None) is None), "")
        if not self._base:
            raise DataError(f"{self._url} names no base model in /v1/models; expected a running shira serve")
        self.title = f"{self._base} on {self._url}"
        self.names()

    def names(self) -> list[str]:
        """The names of the adapters that the server has now. Raises DataError if it does not tell them."""
        found: Any = self._answer_to(lambda: self._client.get("/adapters", cast_to=object, options={"timeout": QUICK}))
        try:
            return [row["name"] for row in found["data"] if row["status"] == "served"]
        except (TypeError, KeyError):
            raise DataError(f"{self._url}/v1/adapters lists no adapters; expected a running shira serve") from None

    def _answer_to(self, ask: Callable[[], Any]) -> Any:
        """What the server answers. Raises DataError with its own words, or if there is none."""
        try:
            return ask()
        except self._errors.APIStatusError as error:
            body = error.body if isinstance(error.body, dict) else {}
            raise DataError(f"the server refused with status {error.status_code}: {body.get('message') or error}") from error
        except self._errors.APIConnectionError as error:
            raise DataError(f"no server answers at {self._url}; start one: shira serve MODEL --adapters DIR") from error
        except (self._errors.OpenAIError, ValueError) as error:
            raise DataError(f"{self._url} does not answer as shira serve does: {error}") from error

    def run(self, asked: Words, chosen: Chosen, stop: threading.Event) -> Iterator[Shown]:
        """What the base and the selection write, both at the same time. Raises DataError with the server's words."""
        if any(not setting.is_even for setting in chosen.values()):
            raise DataError("a server takes one strength for each adapter; set all blocks to 1")

        def work(show: Callable[[Shown], None]) -> None:
            parts: queue.SimpleQueue[tuple[str, str | ShiraError | None]] = queue.SimpleQueue()
            sides = {"base": self._base, "adapted": selection(chosen, self._base)} if chosen else {"base": self._base}
            for side, model in sides.items():
                threading.Thread(target=self._write, args=(asked, model, side, parts, stop), daemon=True).start()
            seen, open_sides = Shown(base="", adapted="", note="Both sides at the same time …"), len(sides)
            while open_sides:
                side, part = parts.get()
                if isinstance(part, ShiraError):
                    raise part
                if part is None:
                    open_sides -= 1
                else:
                    seen = replace(seen, **{side: getattr(seen, side) + part})
                    if not chosen:
                        seen = replace(seen, adapted=seen.base)
                    show(seen)
            if stop.is_set():
                raise Stopped
            same = "Both sides are the same." if seen.base == seen.adapted else "Both sides differ."
            none = "No adapter has a strength above 0: both sides are the base."
            show(replace(seen, note=f"Done. {same}" if chosen else none))

        return streamed(work, stop)

    def _write(
        self,
        asked: Words,
        model: str,
        side: str,
        parts: "queue.SimpleQueue[tuple[str, str | ShiraError | None]]",
        stop: threading.Event,
    ) -> None:
        try:
            self._answer_to(lambda: self._stream(asked, model, lambda part: parts.put((side, part)), stop))
            parts.put((side, None))
        except ShiraError as error:
            parts.put((side, error))
        except Exception as error:  # whatever else ends a stream: the person is told, and nobody waits for it
            parts.put((side, DataError(f"the answer of the server ended early: {error}")))

    def _stream(self, asked: Words, model: str, take: Callable[[str], None], stop: threading.Event) -> None:
        options: dict[str, Any] = {
            "model": model,
            "max_tokens": int(asked.most_tokens),
            "temperature": asked.temperature,
            "seed": int(asked.seed),
            "stream": True,
        }
        events: Any
        if asked.raw:
            events = self._client.completions.create(prompt=asked.prompt, **options)
        else:
            message: Any = {"role": "user", "content": asked.prompt}
            events = self._client.chat.completions.create(messages=[message], **options)
        with events:
            for event in events:
                if stop.is_set():
                    return
                for choice in event.choices:
                    take((choice.text if asked.raw else choice.delta.content) or "")
