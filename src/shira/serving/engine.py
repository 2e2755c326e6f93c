"""What the routes need from an engine."""

from typing import Any, Protocol

__all__ = ["Engine"]


class Engine(Protocol):
    """A model that answers requests, each with its own selection (`selections.ServedSelection.key`)."""

    async def prefetch(self, key: str) -> None:
        """Read, check and compute a selection. Raises ShiraError if it cannot be used."""

    async def pin(self, key: str, pinned: bool) -> None:
        """Hold a selection ready, or no longer. Raises ShiraError."""

    async def tiers(self) -> dict[str, Any]:
        """What `resident.Resident.tiers` says."""

    async def alive(self) -> bool:
        """Whether the engine can answer requests."""
