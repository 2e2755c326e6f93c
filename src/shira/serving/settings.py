"""All settings of a server."""

from dataclasses import dataclass

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """model: a folder, a hub id or a built-in name. adapters: the served folder. Sizes are in tokens, times in seconds."""

    model: str
    adapters: str
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: tuple[str, ...] = ()
    dtype: str = "auto"
    quantum: int = 16
    patience: float = 2.0
    ready: int = 8
    max_running: int = 64
    step_tokens: int = 512
    kv_blocks: int | None = None
    kv_memory: int | None = None
    max_model_len: int | None = None
    max_tokens: int | None = None
    request_timeout: float = 600.0
    shutdown_timeout: float = 30.0
