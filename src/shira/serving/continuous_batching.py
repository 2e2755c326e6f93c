"""Transformers' continuous batching, with one selection of adapters in each step, or with several that share it (`mixing`).

A step is a forward pass over their requests. The requests of others keep their places in the KV cache meanwhile.
This file extends classes of Transformers that are not part of its public interface. Nothing imports it before an engine is
built.
"""

import inspect
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, Scheduler
from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads
from transformers.generation.logits_process import LogitsProcessorList

from .mixing import MIXED, Mixing
from .sampling import RowSampler, Ticket
from .turns import Turns

__all__ = ["PAGE", "Manager", "Router", "TurnScheduler", "cache_token_bytes"]

PAGE = 16  # tokens of a block of the KV cache


def ticket_of(state: Any) -> Ticket:
    ticket: Ticket = state.logit_processor_kwargs["ticket"]
    return ticket


class TurnScheduler(Scheduler):  # type: ignore[misc]  # mypy does not follow Transformers
    """Shows Transformers the requests of one selection in each step.

    If the KV cache has no room, the request that came last gives up its place to one that came earlier, whichever selections
    they belong to. It starts again later from its prompt and what it has written. So the request that came first goes on.
    """

    def __init__(self, cache: Any, safety_margin: float | None, max_requests_per_batch: int) -> None:
        self.turns = Turns()
        self.mixing: Mixing | None = None
        self.key = ""
        self.rows: list[tuple[str, int]] = []  # (key, number of tokens) of each request in a step that selections share
        self.mixed_steps = 0
        self.on_turn: Callable[[Sequence[str]], None] = lambda upcoming: None
        self.interrupted = 0  # times that a request has lost its place
        super().__init__(cache, safety_margin or 0.0, max_requests_per_batch)

    def schedule_batch(self, token_budget: int, cache_budget: int) -> tuple[list[Any], bool, int, int]:
        present: dict[str, list[Any]] = {}
        for state in (*self.active_requests.values(), *self.waiting_requests.values()):
            present.setdefault(ticket_of(state).key, []).append(state)
        if self.mixing is not None:
            present = self._shared(self.mixing, present)
        while present:  # more than once only if the cache has no room for any request of a selection
            since = {key: min(ticket_of(state).arrived for state in states) for key, states in present.items()}
            if MIXED in present:
                since[MIXED] = min(self.turns.since(ticket_of(each).key, ticket_of(each).arrived) for each in present[MIXED])
            sizes = {key: len(states) for key, states in present.items()}
            now = time.monotonic()
            key = self.turns.choose(since, now, sizes)
            batch, fast, tokens, cached = self._batch_of(present.pop(key), token_budget, cache_budget)
            if batch:
                self.rows = []
                if key == MIXED:
                    batch.sort(key=lambda each: ticket_of(each.state).key)
                    self.rows = [(ticket_of(each.state).key, each.query_length) for each in batch]
                    self.turns.served_in(MIXED, {key for key, _ in self.rows}, now)
                    self.mixed_steps += 1
                if key != self.key:
                    self.key = key
                    self.on_turn(self.turns.upcoming())
                return batch, fast, tokens, cached
        return [], False, 0, 0

    @staticmethod
    def _shared(mixing: Mixing, present: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Those that share a step under one key. Those whose changes are being read wait, unless nothing else can run."""
        oldest = sorted(present, key=lambda key: min(map(_arrival, present[key])))
        shared, waiting = mixing.share({key: len(present[key]) for key in oldest})
        found = {key: states for key, states in present.items() if key not in shared and key not in waiting}
        if shared:
            found[MIXED] = [state for key in shared for state in present[key]]
        return found or present

    def _batch_of(self, states: list[Any], token_budget: int, cache_budget: int) -> tuple[list[Any], bool, int, int]:
        """What Transformers' own code makes of the requests of one selection: those that write first, then those that read."""
        states.sort(key=lambda state: (state.status != RequestStatus.DECODING, _arrival(state)))
        for state in states[: self.max_requests_per_batch]:
            if self._is_here(state):
                self._make_room(state, token_budget)
        removed: set[str] = set()
        candidates = [state for state in states if self._is_here(state)]
        batch, _, fast, tokens, cached = self._process_candidates(candidates, token_budget, cache_budget, removed)
        self._cleanup_waiting_queue(removed)
        self.starved_requests: list[Any] = []  # Transformers would interrupt some of them; `_make_room` does it, by age
        return batch, fast, tokens, cached

    def _is_here(self, state: Any) -> bool:
        known = self.active_requests.get(state.request_id) or self.waiting_requests.get(state.request_id)
        return known is state

    def _make_room(self, state: Any, token_budget: int) -> None:
        """Interrupt requests that came later until the next tokens of this one have room in the cache."""
        tokens = state.tokens_to_process if state.status == RequestStatus.DECODING else state.remaining_prefill_tokens
        length = min(len(tokens), token_budget)
        while not self.cache.can_store_request_tokens(state, length, dry_run=True):
            later = [other for other in self.active_requests.values() if _arrival(other) > _arrival(state)]
            if not later:
                return
            self._interrupt(max(later, key=_arrival))
            self.cache.pool.try_to_free_sectors()

    def again(self, states: Sequence[Any]) -> None:
        """Let requests of a step that failed begin again, from their prompts and what they have written before it."""
        for state in states:
            start = state._true_initial_tokens or len(state.initial_tokens)
            del ticket_of(state).logprobs[len(state.initial_tokens) - start + len(state.generated_tokens) :]
            self._interrupt(state)

    def _interrupt(self, state: Any) -> None:
        again = state.create_equivalent_initial_request()
        state._status = RequestStatus.FINISHED
        self.finish_request(state.request_id)
        self.add_waiting_request(again)
        self.interrupted += 1


def _arrival(state: Any) -> tuple[float, str]:
    return ticket_of(state).arrived, state.request_id


SCHEDULER_MAPPING["shira"] = TurnScheduler


class Router(OutputRouter):  # type: ignore[misc]  # mypy does not follow Transformers
    """Passes on what Transformers has for requests: their tokens so far, or the error that ended them."""

    def __init__(self, deliver: Callable[[list[Any]], None], fail: Callable[[str, Exception], None]) -> None:
        super().__init__()
        self._deliver, self._fail = deliver, fail

    def deliver(self, output: Any) -> None:
        self._deliver([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        self._deliver(outputs)

    def fail_and_deliver(self, state: RequestState, error: Exception) -> None:
        state.status, state.error = RequestStatus.FAILED, str(error)
        self._fail(state.request_id, error)


class Manager(ContinuousBatchingManager):  # type: ignore[misc]  # mypy does not follow Transformers
    """The generation thread. It calls `use(key)` before each step, and goes on after an error in a step.

    use: writes a selection into the weights. failed: called after an error; if it raises, the thread ends.
    ended: called when the thread ends, for whatever reason.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        turns: Turns,
        mixing: Mixing | None,
        router: Router,
        use: Callable[[str], None],
        failed: Callable[[Exception], None],
        ended: Callable[[], None],
        blocks: int,
        max_running: int,
        step_tokens: int,
    ) -> None:
        config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=blocks,
            max_batch_tokens=step_tokens,
            max_requests_per_batch=max_running,
            max_blocks_per_request=0,
            allow_block_sharing=False,  # the hash of a block does not know the selection it was computed with
            use_async_batching=False,  # the next step's selection is known only after this step
            use_cuda_graph=False,  # the sampler is Python
            scheduler_type="shira",
            auto_switch_to_flash=False,
        )
        super().__init__(model, GenerationConfig(do_sample=False, max_new_tokens=1, eos_token_id=-1, pad_token_id=0), config)
        self.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([RowSampler()]))
        self.logit_processor.tensors_required = 1
        self.output_router = router
        self._turns, self._mixing, self._use, self._failed, self._ended = turns, mixing, use, failed, ended
        self.last_error: Exception | None = None  # of a step

    @property
    def scheduler(self) -> TurnScheduler:
        scheduler: TurnScheduler = self.batch_processor.scheduler
        return scheduler

    def start(self) -> None:
        """Start the thread. It is a daemon, so a program that ends without `stop` does not hang."""
        self.background_thread_status.clear()
        known = inspect.signature(
            ContinuousBatchingManager._run_generation_loop
        ).parameters  # Transformers 5.24 added an argument
        options = {"use_inference_mode": False} if "use_inference_mode" in known else {}  # a switch writes into the weights
        loop = self._run_generation_loop
        self._generation_thread = threading.Thread(target=loop, kwargs=options, name="shira generation", daemon=True)
        self._generation_thread.start()

    def _create_batch_processor(self) -> Any:
        processor = super()._create_batch_processor()
        processor.scheduler.turns, processor.scheduler.mixing = self._turns, self._mixing
        return processor

    def _run_generation_loop(self, **options: bool) -> None:
        try:
            super()._run_generation_loop(**options)
        finally:
            self._ended()

    def _generation_step(self) -> None:
        """A forward pass. After an error the requests of this step have failed, and the others go on.

        If selections shared the step, the error may be that of one of them: all begin again, in turns of their own.
        """
        processor = self.batch_processor
        try:
            self._use(processor.scheduler.key)
            super()._generation_step()
            if self._mixing is not None:
                self._mixing.step_succeeded(processor.scheduler.key)
        except Exception as error:
            self.last_error = error
            self._failed(error)
            if processor.scheduler.rows:
                processor.scheduler.again([each.state for each in processor.inputs_and_outputs.prepare_batch_update()[0]])
            else:
                processor.handle_batch_error(error)
            processor.inputs_and_outputs.requests_in_batch = []  # nothing to update


def cache_token_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of one token in the KV cache."""
    size = find_num_key_value_heads(config) * find_head_dim(config) * dtype.itemsize
    return int(2 * config.num_hidden_layers * size)
