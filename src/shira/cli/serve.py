"""shira serve: answer requests over HTTP, each with its own adapters."""

import importlib.util
import logging
import sys
from typing import Any

import typer

from ..errors import MissingExtra
from ..serving.settings import Settings
from .options import given, recipe_options

__all__ = ["serve"]


@recipe_options(of=Settings)
def serve(**options: Any) -> None:
    """Serve a model and a folder of adapters as OpenAI's API does. Each request names its adapters as its model.

    "poet" is an adapter, "poet:1.0+coder:0.5" two with strengths; the model's own name is the base. docs/serving.md says more.

    Example: shira serve SmolLM2-135M-Instruct-Q4_1 --adapters adapters
    """
    settings = Settings(**given(options, Settings))
    for name, value, hint in (
        ("the model", settings.model, "MODEL"),
        ("the folder of the adapters", settings.adapters, "--adapters"),
    ):
        if not value:
            raise typer.BadParameter(f"give {name}", param_hint=hint)
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("shira").setLevel(logging.INFO)
    try:
        if _engine(settings.engine) == "vllm":
            from ..serving.vllm.server import serve as run
        else:
            from ..serving.transformers_server import serve as run
    except ModuleNotFoundError as error:
        raise MissingExtra(f"shira serve needs {error.name}: pip install 'shira-adapters[serve]'") from error
    run(settings)


def _engine(wanted: str) -> str:
    if wanted == "auto":
        return "vllm" if importlib.util.find_spec("vllm") else "transformers"
    return wanted
