"""What Prometheus is told: requests, tokens, time to the first token, what waits for which adapters, switches."""

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import prometheus_client as prometheus

from .selections import ServedSelection, of_key

__all__ = ["Metrics"]

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)


def label_of(selection: ServedSelection) -> str:
    """The adapters of a selection without their strengths, "base" for none: so there are not as many labels as strengths."""
    return "+".join(part.name for part in selection.parts) or "base"


class Metrics:
    """The metrics of one server. registry: where they are registered; vLLM shows those of the default one with its own.

    A selection has a label while it has open requests.
    """

    def __init__(self, registry: prometheus.CollectorRegistry | None = None) -> None:
        self.registry = registry or prometheus.CollectorRegistry()
        counter = functools.partial(prometheus.Counter, registry=self.registry, namespace="shira")
        gauge = functools.partial(prometheus.Gauge, registry=self.registry, namespace="shira")
        histogram = functools.partial(prometheus.Histogram, registry=self.registry, namespace="shira")
        timed = functools.partial(histogram, labelnames=["path"], buckets=SECONDS)
        self.requests = counter("requests", "Requests that were answered.", ["path", "status"])
        self.seconds = timed("request_seconds", "Seconds from a request to the end of its answer.")
        self.first = timed("first_byte_seconds", "Seconds from a request to the first byte of its answer.")
        self.tokens = counter("tokens", "Tokens of prompts and of answers.", ["kind"])
        self.open = gauge("open_requests", "Requests that wait or run, by their adapters.", ["selection"])
        self.switches = counter("switches", "Switches from one selection to another.")
        self.switching = counter("switch_seconds", "Seconds spent switching.")
        self.mixed = counter("mixed_steps", "Steps that selections have shared.")
        self.lookups = counter("ready_lookups", "Selections that were wanted: those that were ready, and others.", ["found"])
        self.ready = gauge("ready_selections", "Selections that are held ready.")
        self.longest = gauge("longest_wait_seconds", "The longest time that a selection has waited for its turn.")
        self.adapters = gauge("served_adapters", "Adapters that are served.")
        self._open: Counter[str] = Counter()
        self._before: dict[str, float] = {}

    @contextlib.contextmanager
    def opened(self, key: str) -> Iterator[None]:
        """Count an open request of a selection inside the `with`."""
        label = label_of(of_key(key))
        self._count(label, 1)
        try:
            yield
        finally:
            self._count(label, -1)

    def _count(self, label: str, change: int) -> None:
        self._open[label] += change
        if self._open[label]:
            self.open.labels(label).set(self._open[label])
        else:
            del self._open[label]
            self.open.remove(label)

    def answered(self, path: str, status: int, began: float, first: float | None) -> None:
        """Count an answer. began, first: when the request came, and when the answer began, as `time.perf_counter` says."""
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(time.perf_counter() - began)
        if first is not None:
            self.first.labels(path).observe(first - began)

    def update(self, tiers: Mapping[str, Any], served: int) -> None:
        """Take over what the engine says about its switches (`Resident.tiers`)."""
        for counter, name in (
            (self.switches, "switches"),
            (self.switching, "switch_seconds"),
            (self.mixed, "mixed_steps"),
            (self.lookups.labels("ready"), "hits"),
            (self.lookups.labels("not ready"), "misses"),
        ):
            value = tiers.get(name, 0)
            counter.inc(max(0, value - self._before.get(name, 0)))
            self._before[name] = value
        self.ready.set(len(tiers["ready"]))
        self.longest.set(tiers.get("longest_wait", 0.0))
        self.adapters.set(served)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return prometheus.generate_latest(self.registry)
