"""The worker processes, seen from the process that answers HTTP: calls to all of them, none of which waits for a file."""

import asyncio
from typing import Any

from ... import errors
from .. import selections

__all__ = ["VllmEngine", "error_of"]

SOONEST, LATEST = 0.002, 0.05  # seconds between two questions whether work in the workers' threads has ended


class VllmEngine:
    """What the routes need from an engine (`serving.engine.Engine`). client: vLLM's EngineClient, once it has started."""

    client: Any = None

    async def prefetch(self, key: str) -> None:
        """Make a selection ready in all workers, checked against the base. Raises what `Resident.prefetch` raises."""
        await self._ended("shira_prefetch", key)
        _raise_first(await self._all("shira_agree", key))

    async def pin(self, key: str, pinned: bool) -> None:
        """Hold a selection ready in all workers, or no longer. Raises what `Resident.pin` raises."""
        if pinned:
            await self.prefetch(key)
        await self._ended("shira_pin", key, pinned)

    async def tiers(self) -> dict[str, Any]:
        """`Resident.tiers` of the first worker."""
        tiers: dict[str, Any] = (await self._all("shira_tiers"))[0]
        return tiers

    async def alive(self) -> bool:
        """Whether the engine runs."""
        try:
            await self.client.check_health()
        except Exception:  # vLLM's EngineDeadError
            return False
        return True

    async def failure(self, key: str) -> errors.ShiraError | None:
        """Why a switch to a selection has failed lately; None if none has."""
        told = [message for message in await self._all("shira_failure", key) if message]
        return error_of(told[0]) if told else None

    async def _ended(self, method: str, *arguments: Any) -> None:
        (ticket,) = set(await self._all(method, *arguments))  # workers count alike
        pause = SOONEST
        while None in (messages := await self._all("shira_ended", ticket)):
            await asyncio.sleep(pause)
            pause = min(2 * pause, LATEST)
        _raise_first(messages)

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        return list(await self.client.collective_rpc(method, args=arguments))


def _raise_first(messages: list[str]) -> None:
    for message in messages:
        if message:
            raise error_of(message)


def error_of(message: str) -> errors.ShiraError:
    """The error that a worker has told as "Kind: message"; a ShiraError if its kind is not one of ours."""
    kind, _, text = message.partition(": ")
    known = getattr(selections, kind, None) or getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, errors.ShiraError):
        return known(text)
    return errors.ShiraError(message)
