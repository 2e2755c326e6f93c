"""All settings of a server, each defined once: its type, default, bounds and help. The command is made from them."""

import dataclasses
import os
from pathlib import Path
from typing import Literal

from ..runs.options import check, option

__all__ = ["Settings"]


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ValueError(text)
    return names


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes are in tokens, times in seconds."""

    model: str = option("", "Needed: a model folder, a hub id, or SmolLM2-135M-Instruct-Q4_1.")
    adapters: str = option("", "Needed: the folder of adapters. Files that come later are served, too.")
    engine: Literal["auto", "transformers", "vllm"] = option("auto", "auto: vLLM if it is installed here.")
    served_model_name: list[str] | None = option(
        None, "Names of the base: x,y; no empty ones.", usual="the model's", parse=_names
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "auto: the checkpoint's.")

    host: str = option("127.0.0.1", "The address to listen on.", group="Network")
    port: int = option(8000, "0: any free one.", ge=0, le=65535)
    max_body: int = option(4_194_304, "Bytes of a request.", ge=1)
    request_timeout: float = option(600.0, "Seconds that a request may take.", gt=0)
    shutdown_timeout: float = option(30.0, "Seconds to finish what runs, once the server is asked to stop.", ge=0)

    quantum: int = option(16, "Steps of a turn while other selections wait.", group="Turns and memory", ge=1)
    patience: float = option(
        6.0,
        "Seconds that a selection waits at most, plus a step and a switch for each ahead of it, while all can be ready.",
        ge=0,
    )
    mix: int = option(
        0,
        "Selections with at most so many requests share steps (0: none do), which rounds otherwise. Transformers engine only.",
        ge=0,
    )
    ready: int = option(16, "Selections held ready in memory.", ge=2)
    host_ready: int = option(0, "And more of them in host memory, for a model on a GPU.", ge=0)
    max_running: int = option(64, "Requests in a batch.", ge=1)
    max_queue: int = option(1024, "Requests and answers that may wait; more: status 429.", ge=0)
    max_model_len: int | None = option(None, "Tokens of prompt and answer together.", usual="the model's", ge=2)
    max_tokens: int | None = option(None, "Tokens of an answer at most.", usual="what is left", ge=1)
    step_tokens: int = option(512, "Tokens of a step: a longer prompt takes several steps.", ge=16)
    kv_tokens: int | None = option(None, "Tokens in the KV cache.", usual="as memory allows", ge=16)
    scan: float = option(1.0, "Seconds between looks at the folder.", gt=0)

    def __post_init__(self) -> None:
        check(self)

    @property
    def base_names(self) -> list[str]:
        """The names of the base for clients: by default that of its folder, which does not tell where the folder is."""
        return self.served_model_name or [Path(self.model).resolve().name if os.path.isdir(self.model) else self.model]
