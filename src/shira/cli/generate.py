"""shira generate: let a model with adapters answer a prompt."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import DataError
from .adapters import Adapters, given_adapters
from .options import MOST_SEED, Density, Drop, Dtype, MaxNewTokens, MethodName, System, Temperature, method_options
from .output import cell, console, waiting, write

if TYPE_CHECKING:
    from ..fusion.strengths import Strength

__all__ = ["generate"]

Sampled = Annotated[
    int, typer.Option("--seed", help="The seed for sampling tokens, and for what --method dare drops.", min=0, max=MOST_SEED)
]


def generate(
    model: Annotated[str, typer.Argument(help="A model folder, a hub id, or SmolLM2-135M-Instruct-Q4_1.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="May be given more than once.", show_default=False)
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option("--prompt-file", "-f", help="A file that is one prompt; - is the standard input.", show_default=False),
    ] = None,
    adapter: Adapters = None,
    compare: Annotated[bool, typer.Option("--compare", help="Print the base's answer, too.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without a chat template.")] = False,
    system: System = "",
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = None,
    seed: Sampled = 0,
    method: MethodName = "sum",
    density: Density = None,
    drop: Drop = None,
    dtype: Dtype = "auto",
) -> None:
    """Print what a model with adapters answers, word by word. Each answer begins with the same seed.

    The prompt goes through the model's chat template if it has one; otherwise, or with --raw, the model continues it.

    Example: shira generate SmolLM2-135M-Instruct-Q4_1 -a spam.safetensors=0.8 -p "Write a message to a friend." --compare
    """
    from ..runs.live import check_files, load_live

    options = method_options(method, density=density, drop=drop, seed=seed if method == "dare" else None)
    strengths = given_adapters(adapter or [])
    if compare and not strengths:
        raise DataError("--compare needs an adapter: give -a FILE")
    files = {file: file for file in strengths}
    check_files(files, strengths)
    prompts = [*(prompt or []), *_read(prompt_file, wanted=not prompt)]
    from ..integrations.generation import Prompt, answer, is_chat
    from ..integrations.transformers import load_tokenizer

    with waiting("loading the model"):
        tokenizer = load_tokenizer(model)
        chats = is_chat(tokenizer, raw=raw, system=system)
        loaded, switcher = load_live(model, files, dtype)
    states: list[tuple[str, dict[str, Strength]]] = [("base", {})] if compare or not strengths else []
    if strengths:
        states.append((" + ".join(adapter or []), strengths))
    for text in prompts:
        messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": text}]
        asked: Prompt = messages if chats else text
        if len(prompts) > 1:
            console.rule(f"prompt: {cell(text)}", align="left", characters="═")
        answers = []
        for label, selection in states:
            switcher.use(selection, method, **options)
            if compare:
                console.rule(cell(label), align="left")
            settings = {"max_new_tokens": max_new_tokens, "seed": seed}
            answers.append(answer(loaded, tokenizer, asked, temperature=temperature, on_text=write, **settings))
            write("\n")
        if compare and answers[0] == answers[1]:
            console.print("(both answers are the same)")


def _read(file: Path | None, *, wanted: bool) -> list[str]:
    """The prompt in a file or on the standard input. wanted: there must be one. Raises DataError or OSError."""
    if file is None and not (wanted and not sys.stdin.isatty()):
        if wanted:
            raise DataError("there is no prompt: give -p TEXT or -f FILE, or pipe it in")
        return []
    name = "the standard input" if file is None or str(file) == "-" else str(file)
    if name == str(file) and Path(name).is_dir():
        raise DataError(f"-f {name}: expected a file with one prompt, found a folder")
    try:
        text = Path(name).read_text(encoding="utf-8") if name == str(file) else sys.stdin.read()
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not a text in UTF-8: {error}") from error
    if not text.strip():
        raise DataError(f"{name} holds no prompt; give -p TEXT or -f FILE, or pipe it in")
    return [text.rstrip("\n")]
