"""`shira serve --engine vllm`: this process becomes vLLM's own server, with our scheduler, workers and routes."""

import json
import math
import os
import sys

from ...data.models import model_path
from ..catalogue import Catalogue
from ..settings import Settings
from .environment import check_entry_points, check_version, classes, installed_version, variables

__all__ = ["arguments", "serve"]

BLOCK = 32  # tokens of a block of the KV cache, if its size is given in tokens


def serve(settings: Settings) -> None:
    """Become vLLM's server. It does not return.

    Raises MissingExtra without vLLM; ShiraError for a version that was not tested; SelectionError for the folder
    and the names of the base.
    """
    environment = {**os.environ, **variables(settings)}
    check_version(installed_version())
    check_entry_points()
    Catalogue(settings.adapters, settings.base_names)  # raises if the folder or a name is not possible
    os.execve(sys.executable, [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments(settings)], environment)


def arguments(settings: Settings) -> list[str]:
    """The arguments of vLLM's server for these settings."""
    options = {
        "model": model_path(settings.model),
        "dtype": settings.dtype,
        "host": settings.host,
        "port": settings.port,
        "max-num-seqs": settings.max_running,
        "max-num-batched-tokens": settings.step_tokens,
        "max-model-len": settings.max_model_len,
        "shutdown-timeout": math.ceil(settings.shutdown_timeout),
        **{name.replace("_", "-"): value for name, value in classes().items()},
    }
    if settings.kv_tokens is not None:
        options |= {"num-gpu-blocks-override": -(-settings.kv_tokens // BLOCK), "block-size": BLOCK}
    if settings.max_tokens is not None:  # vLLM takes it as a limit for every request
        options["override-generation-config"] = json.dumps({"max_new_tokens": settings.max_tokens})
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return [*given, "--served-model-name", *settings.base_names]
