"""The choice of the requests of one step, over any of vLLM's schedulers: all of them have one selection.

vLLM's own `schedule` sees the requests of the chosen selection only. The others are hidden from it for that moment: they keep
their places and their blocks of the KV cache. The chosen key travels on the SchedulerOutput, since in asynchronous scheduling
the next step is chosen before this one has been computed.

When the KV cache is too small, a shown request may take blocks from hidden requests that came after it, the last one first. So
the request that came first always gets on, whatever is hidden, and two selections cannot take blocks from each other for ever.
"""

import json
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ...errors import ShiraError
from ..turns import Turns
from .environment import FIELD, end_with_parent, settings

__all__ = ["Step", "TurnScheduler", "key_of", "salted"]

SOON = 2  # selections that are made ready while another has its turn


class Step(NamedTuple):
    """What a worker is told with each step.

    key: the selection to compute with. upcoming: those to make ready. longest_wait: see `Turns`.
    """

    key: str
    upcoming: tuple[str, ...]
    longest_wait: float = 0.0


def key_of(request: Any) -> str:
    """The key of a request's selection, "" for the base. Nobody has checked it yet."""
    extra = getattr(request.sampling_params, "extra_args", None) or {}
    key = extra.get(FIELD) or ""
    return key if isinstance(key, str) else json.dumps(key, default=str)


def salted(key: str, salt: str | None) -> str | None:
    """The salt of a request's hashes in the prefix cache, different for each selection, whatever salt a client chose."""
    if not key and not (salt or "").startswith(f"{FIELD}:"):
        return salt
    return f"{FIELD}:{key}|{salt or ''}"


class TurnScheduler:
    """A mixin for vLLM's Scheduler and AsyncScheduler.

    It stands before them among the base classes. `schedule` is called once a step. All requests that it schedules have the key
    of the output's `shira`, a `Step`.
    """

    # of vLLM's Scheduler
    requests: dict[str, Any]
    running: list[Any]
    waiting: Any
    kv_holding_waiting: Any
    kv_cache_manager: Any
    grammar_compile_error_reqs: set[str]
    finished_recving_kv_req_ids: set[str]
    use_v2_model_runner: bool
    requires_kv_delivery: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        end_with_parent()
        if self.use_v2_model_runner:
            raise ShiraError("vLLM's model runner V2 was not tried with adapters; set VLLM_USE_V2_MODEL_RUNNER=0")
        chosen = settings()
        self.turns = Turns(quantum=chosen.quantum, patience=chosen.patience, ready=chosen.ready + chosen.host_ready)
        self._key = ""
        self._stuck: set[str] = set()  # selections whose last step got no token, because of the KV cache
        self._hidden: list[Any] = []  # requests with blocks that vLLM does not see while it schedules
        self._preempted: list[Any] = []  # of them, those that had to give up their blocks
        allocate = self.kv_cache_manager.allocate_slots
        self.kv_cache_manager.allocate_slots = lambda *args, **kwargs: self._allocate(allocate, *args, **kwargs)

    def add_request(self, request: Any) -> None:
        """As in vLLM. The request's blocks in the prefix cache are those of its selection."""
        request.shira_key, request.shira_since = key_of(request), time.monotonic()
        salt = salted(request.shira_key, request.cache_salt)
        if salt != request.cache_salt:
            request.cache_salt, request.block_hashes = salt, []
            request.update_block_hashes()
        super().add_request(request)  # type: ignore[misc]

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """As in vLLM, for one selection."""
        self._choose()
        shown, hidden = _divided(self.running, self._key)
        queues = (self.waiting, self.kv_holding_waiting)
        before = [list(queue) for queue in queues]
        away = [_divided(each, self._key)[1] for each in before]
        if not (hidden or any(away)):
            return self._checked(super().schedule(*args, **kwargs))  # type: ignore[misc]
        order, self.running = self.running, shown
        self._hidden, self._preempted = hidden, []
        for queue, requests in zip(queues, away, strict=True):
            queue.remove_requests(requests)
        try:
            output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.running = _merged(order, [*self.running, *self._hidden])
            for queue, requests, gone in zip(queues, before, away, strict=True):
                _refill(queue, requests, [*queue, *gone])
            for request in self._preempted:  # the last one to come is the first here
                self.waiting.prepend_request(request)
            self._hidden, self._preempted = [], []
        return self._checked(output)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """As in vLLM. If the switch for this step has failed, its requests end with an error, as after a failed grammar."""
        if getattr(model_runner_output, "shira_failed", False):
            self.grammar_compile_error_reqs.update(scheduler_output.num_scheduled_tokens)
        return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]

    def _choose(self) -> None:
        """Choose the selection of the next step, if any wants one."""
        since: dict[str, float] = {}
        sizes: dict[str, int] = {}
        ready = [request for request in self.running if _has_a_step_left(request)]
        ready += [request for queue in (self.waiting, self.kv_holding_waiting) for request in queue if self._is_ready(request)]
        for request in ready:
            key = request.shira_key
            since[key] = min(since.get(key, request.shira_since), request.shira_since)
            sizes[key] = sizes.get(key, 0) + 1
        able = {key: when for key, when in since.items() if key not in self._stuck}
        if since:
            self._key = self.turns.choose(able or since, time.monotonic(), sizes)

    def _is_ready(self, request: Any) -> bool:
        """Whether a waiting request waits for nothing but a step."""
        status = request.status.name
        if status == "WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR":
            wanted = request.structured_output_request
            return wanted is not None and wanted.grammar is not None
        if status == "WAITING_FOR_REMOTE_KVS":
            return request.request_id in self.finished_recving_kv_req_ids
        if status == "WAITING_FOR_STREAMING_REQ":
            return False
        return not request.num_stale_output_tokens or bool(request.drop_stale_output)

    def _checked(self, output: Any) -> Any:
        """The output with its `Step`. Raises ShiraError if it mixes selections, which would be a mistake in here."""
        for name in output.num_scheduled_tokens:
            if self.requests[name].shira_key != self._key:
                raise ShiraError(f"request {name} of another selection was scheduled; the step was not computed")
        if output.total_num_scheduled_tokens:
            self._stuck.clear()
        else:
            self._stuck.add(self._key)
        output.shira = Step(self._key, self.turns.upcoming()[:SOON], self.turns.longest_wait)
        return output

    def _allocate(self, allocate: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
        """Blocks for a request, if need be those of hidden requests that came later; None if there are not enough.

        A request that has no blocks yet takes them only if nothing of its selection runs.
        """
        while (blocks := allocate(request, *args, **kwargs)) is None and self._hidden:
            last = max(self._hidden)
            if not request < last or (self.running and request.status.name != "RUNNING"):
                break
            if not self._request_blocks_can_be_freed(last):  # type: ignore[attr-defined]
                break
            self._hidden.remove(last)
            self._preempt_request(last, time.monotonic(), drop_stale_output=self.requires_kv_delivery)  # type: ignore[attr-defined]
            self.waiting.remove_request(last)  # vLLM may be looking at the first one
            self._preempted.append(last)
        return blocks


def _has_a_step_left(request: Any) -> bool:
    """Whether a running request needs a step, or will have all its tokens from those that are being computed."""
    placeholders = request.num_output_placeholders
    last = request.num_prompt_tokens + request.max_tokens
    return not placeholders or request.num_computed_tokens + 2 - placeholders < last


def _divided(requests: Iterable[Any], key: str) -> tuple[list[Any], list[Any]]:
    """The requests of a selection, and the others."""
    shown: list[Any] = []
    hidden: list[Any] = []
    for request in requests:
        (shown if request.shira_key == key else hidden).append(request)
    return shown, hidden


def _merged(before: list[Any], now: list[Any]) -> list[Any]:
    """The requests that are there now: those that were before in their old order, then new ones."""
    there, old = set(now), set(before)
    return [request for request in before if request in there] + [request for request in now if request not in old]


def _refill(queue: Any, before: list[Any], now: list[Any]) -> None:
    """Fill a queue with the requests of `now`: new ones, which vLLM puts in front, then the others in their old order."""
    there, old = set(now), set(before)
    order = [request for request in now if request not in old] + [request for request in before if request in there]
    queue.remove_requests(list(queue))
    for request in order:
        queue.add_request(request)
