"""shira play: a page in the browser, the base and the base with adapters side by side."""

import logging
import threading
from typing import Annotated, Any

import typer

from .adapters import named_adapters
from .options import Dtype
from .output import cell, console, waiting

__all__ = ["play"]


def play(
    model: Annotated[
        str, typer.Argument(help="A model folder, a hub id, or SmolLM2-135M-Instruct-Q4_1.", show_default="the built-in model")
    ] = "",
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapters",
            "-a",
            help="FILE, NAME=FILE, FILE=STRENGTH, or a folder of adapters. May be given more than once.",
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        str, typer.Option(help="A folder of a Diffusers pipeline, or a hub id. Beside MODEL, or alone.", show_default=False)
    ] = "",
    server: Annotated[str, typer.Option(help="The address of a running shira serve.", show_default=False)] = "",
    api_key: Annotated[
        str, typer.Option(help="A key of that server.", envvar="SHIRA_API_KEY", show_default=False, show_envvar=True)
    ] = "",
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="0: any free one.", show_default="the first free one from 7860", min=0, max=65535)
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    dtype: Dtype = "auto",
) -> None:
    """Play with adapters on a page: a strength slider each, the base and the adapted model side by side.

    Files can be dropped on the page. It listens on this machine alone unless --host says otherwise, and has no password.

    Example: shira play SmolLM2-135M-Instruct-Q4_1 -a spam.safetensors -a questions.safetensors
    """
    from ..play.opening import Options, adapters_of, check, opened, places, workspace

    files, strengths = named_adapters([each for given in adapters or [] for each in adapters_of(given)])
    asked: dict[str, Any] = {"files": files, "strengths": strengths, "server": server, "key": api_key}
    options = Options(model, image, dtype=dtype, host=host, port=port, browser=browser, **asked)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio asks itself whether it is there
    with workspace() as folder:
        check(options)
        with waiting("asking the server" if server else "loading"):
            made = places(options, folder)
        for place in made:
            console.print(f"{cell(place.title)}: {len(place.names())} adapters", highlight=False)
        with opened(made, options) as address:
            console.print(f"Open {address} in a browser. Ctrl-C ends it.", highlight=False)
            try:
                threading.Event().wait()
            except KeyboardInterrupt:
                console.print("ended")
