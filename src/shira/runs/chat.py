"""A conversation with a live model, whose adapters are switched by commands between the answers."""

import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..errors import DataError, ShiraError, did_you_mean
from ..fusion.strengths import Strength, parse_strength
from ..integrations.generation import Prompt, answer, is_chat
from ..switching.switcher import Switcher
from ..texts import shown

__all__ = ["Chat", "converse"]

HELP = """\
/use poet=1 coder=0.5   switch to these adapters; without = the strength is 1
/base                   switch to the base, bit for bit
/adapters               list the adapters, and which are active
/reset                  forget the conversation
/help                   show this
/quit                   end (so does Ctrl-D; Ctrl-C ends an answer)"""


class Chat:
    """A conversation, and the model that leads it.

    options: of `integrations.generation.answer`: max_new_tokens, temperature, seed. Each answer begins with the same seed.
    If the model has no chat template, each text is continued by itself, without what was said before.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, switcher: Switcher, *, system: str = "", **options: Any) -> None:
        self.model, self.tokenizer, self.switcher, self.options = model, tokenizer, switcher, options
        self.is_chat = is_chat(tokenizer, system=system)
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = []
        self._commands: dict[str, Callable[[str], str]] = {
            "/use": self.use,
            "/base": lambda _: self._switch({}),
            "/adapters": self.adapters,
            "/reset": self.reset,
            "/help": lambda _: HELP,
        }

    def say(self, text: str, on_text: Callable[[str], None] = lambda piece: None) -> str:
        """The model's answer, which is streamed to on_text. If it is interrupted, the conversation keeps what was written."""
        pieces: list[str] = []

        def take(piece: str) -> None:
            pieces.append(piece)
            on_text(piece)

        asked = {"role": "user", "content": text}
        prompt: Prompt = [*self._system, *self.messages, asked] if self.is_chat else text
        try:
            answer(self.model, self.tokenizer, prompt, on_text=take, **self.options)
        finally:
            if pieces and self.is_chat:
                self.messages += [asked, {"role": "assistant", "content": "".join(pieces)}]
        return "".join(pieces)

    def command(self, line: str) -> str:
        """Run a command, such as "/use poet=1". Returns what it has to say. Raises ShiraError; then nothing has changed."""
        word, *rest = line.split(maxsplit=1)
        if word not in self._commands:
            raise DataError(f"there is no command {shown(word)}; {did_you_mean(word, [*self._commands, '/quit'])}")
        return self._commands[word]("".join(rest))

    def use(self, text: str) -> str:
        """Switch to adapters with their strengths, as "poet=1 coder=0.5"."""
        parts = [parse_strength(part) for part in re.findall(r"[^\s={]+=\{[^}]*\}|\S+", text)]
        names = ", ".join(self.switcher.names) or "none was given with -a"
        if not parts:
            raise DataError(f"say which adapters: /use NAME=STRENGTH ...; there are: {names}")
        if len(dict(parts)) < len(parts):
            raise DataError("one adapter is given twice; give it once, with the sum of its strengths")
        return self._switch(dict(parts))

    def adapters(self, _: str = "") -> str:
        """The adapters' names, one a line; the active ones with their strengths."""
        active = self.switcher.active
        width = max(map(len, self.switcher.names), default=0)
        lines = [
            f"{name:<{width}}  {f'active, {_number(active[name])}' if name in active else '-'}" for name in self.switcher.names
        ]
        return "\n".join(lines) or "no adapter: give them with -a FILE"

    def reset(self, _: str = "") -> str:
        """Forget the conversation. Adapters stay active."""
        self.messages = []
        return "the conversation is forgotten"

    def active(self) -> str:
        """What is active, in words."""
        found = self.switcher.active
        return " + ".join(f"{name}={_number(strength)}" for name, strength in found.items()) or "the base"

    def _switch(self, strengths: Mapping[str, Strength]) -> str:
        started = time.perf_counter()
        self.switcher.prefetch(strengths)
        prepared = time.perf_counter()
        self.switcher.use(strengths)
        done = time.perf_counter()
        read = f" (read and checked in {1e3 * (prepared - started):.1f} ms)" if self.switcher.active else ""
        return f"{self.active()} is active: switched in {1e3 * (done - prepared):.1f} ms{read}"


def _number(strength: Strength) -> str:
    return f"{strength:g}" if isinstance(strength, float) else str(strength)


def converse(
    chat: Chat,
    ask: Callable[[], str | None],
    write: Callable[[str], None],
    note: Callable[[str], None],
    complain: Callable[[Exception], None],
) -> None:
    """Talk until /quit or the end of the input. An error or an interrupt ends an answer or a command, not the conversation.

    ask: the next line; None at the end. write: takes pieces of answers. note: takes what commands say. complain: takes errors.
    """
    while True:
        try:
            line = ask()
            if line is None or line.split()[:1] == ["/quit"]:
                return
            if line.strip().startswith("/"):
                note(chat.command(line.strip()))
            elif line.strip():
                chat.say(line.strip(), write)
                write("\n")
        except KeyboardInterrupt:
            write("\n")
            note(f"interrupted; {chat.active()} is active; /quit or Ctrl-D ends the chat")
        except (ShiraError, FileNotFoundError, PermissionError, UnicodeDecodeError) as error:
            complain(error)
