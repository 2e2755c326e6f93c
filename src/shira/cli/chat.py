"""shira chat: talk to a model, and switch its adapters meanwhile."""

import contextlib
import io
import sys
from typing import Annotated

import typer

from ..errors import DataError
from .adapters import named_adapters
from .options import MOST_SEED, Dtype, MaxNewTokens, System, Temperature
from .output import console, fail, waiting, write

__all__ = ["chat"]

PROMPT = "> "


def chat(
    model: Annotated[str, typer.Argument(help="A model folder, a hub id, or SmolLM2-135M-Instruct-Q4_1.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", "-a", help="FILE or NAME=FILE, to switch to. With =STRENGTH it is active at first.", show_default=False
        ),
    ] = None,
    system: System = "",
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = None,
    seed: Annotated[
        int, typer.Option(help="The seed for sampling tokens. Each answer begins with it.", min=0, max=MOST_SEED)
    ] = 0,
    dtype: Dtype = "auto",
) -> None:
    """Talk to a model, and switch its adapters meanwhile.

    Lines come from the standard input. /use poet=1 coder=0.5 switches to these adapters and prints the time; /help tells more.

    Example: shira chat SmolLM2-135M-Instruct-Q4_1 -a spam.safetensors -a quiz=questions.safetensors
    """
    from ..runs.live import check_files, load_live

    files, strengths = named_adapters(adapter or [])
    check_files(files, strengths)
    from ..integrations.generation import is_chat
    from ..integrations.transformers import load_tokenizer
    from ..runs.chat import Chat, converse

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # one bad byte must not lose the lines around it
    with waiting("loading the model"):
        tokenizer = load_tokenizer(model)
        is_chat(tokenizer, system=system)  # raises its error before the model is loaded
        loaded, switcher = load_live(model, files, dtype)
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    talk = Chat(loaded, tokenizer, switcher, system=system, **settings)
    if not talk.is_chat:
        _note("This model has no chat template: it continues each text by itself, without what was said before.")
    _note(f"Adapters: {', '.join(files) or 'none'}. /help lists the commands.")
    if strengths:
        switcher.use(strengths)
    _note(f"{talk.active()} is active.")
    try:
        converse(talk, _ask, write, _note, fail)
    finally:
        switcher.use(None)


def _ask() -> str | None:
    """The next line of the standard input. A log shows it, too."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  `input` then edits lines and remembers them
        try:
            return input(PROMPT)
        except EOFError:
            print()
            return None
    if not (line := sys.stdin.readline()):
        return None
    if not line.isascii() and any("\udc80" <= letter <= "\udcff" for letter in line):  # bytes that could not be decoded
        raise DataError("a line of the standard input is not in UTF-8, and was left out")
    write(f"{PROMPT}{line.rstrip()}\n")
    return line


def _note(text: str) -> None:
    console.print(text, style="dim", highlight=False)
