"""The classes that vLLM is told to use: --scheduler-cls shira.serving.vllm.engine.Scheduler, --worker-cls …engine.Worker.

vLLM imports this file; nothing else in shira does, because vLLM must be installed for that.
"""

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler as PlainScheduler
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker as GPUWorker

from .environment import check_version, installed_version
from .plugin import register
from .scheduler import TurnScheduler
from .worker import SwitchingWorker

__all__ = ["AsyncTurns", "PlainTurns", "Scheduler", "SwitchingCPUWorker", "SwitchingGPUWorker", "Worker"]

check_version(installed_version())
register()  # in each process before its model is made, also if vLLM has not found the entry point


class PlainTurns(TurnScheduler, PlainScheduler):  # type: ignore[misc]
    """vLLM's scheduler with turns of selections."""


class AsyncTurns(TurnScheduler, AsyncScheduler):  # type: ignore[misc]
    """vLLM's asynchronous scheduler with turns of selections."""


class Scheduler:
    """Makes the one of the two that vLLM would use with its own schedulers."""

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        is_async = vllm_config.scheduler_config.async_scheduling
        return (AsyncTurns if is_async else PlainTurns)(vllm_config, *args, **kwargs)


class SwitchingCPUWorker(SwitchingWorker, CPUWorker):  # type: ignore[misc]
    """vLLM's worker for CPUs, which switches between steps."""


class SwitchingGPUWorker(SwitchingWorker, GPUWorker):  # type: ignore[misc]
    """vLLM's worker for GPUs, which switches between steps."""


Worker = SwitchingCPUWorker if current_platform.is_cpu() else SwitchingGPUWorker
