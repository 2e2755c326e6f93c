"""The process that holds the weights: it switches before a step, and reads ahead in a thread while steps are computed.

An error in a switch ends the requests of that step, and nothing else. The model runner is then given the step without requests,
because other parts of it (requests that have finished) count.
"""

import dataclasses
import hashlib
import itertools
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor, nn

from ...checkpoints.sources import Checkpoint
from ...errors import CheckpointError, ShiraError
from ...sparse.tensor import bytes_of
from ..selections import of_key
from ..settings import Settings
from .environment import FIELD, settings
from .mapping import Mapped, Surface, landings, verified
from .ranks import Alone, Group, Ranks, Together

__all__ = ["SwitchingWorker", "mapped_surface"]

MOST_REASONS = 1024  # selections whose last failure is remembered
LATELY = 60.0  # seconds
MOST_TICKETS = 1024  # results of work in the thread that nobody has asked for
logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's, so that it is shown as vLLM's own


class SwitchingWorker:
    """A mixin for vLLM's workers. It stands before one among the base classes.

    Methods whose names begin with shira_ are for `collective_rpc`.
    """

    # of vLLM's Worker
    model_runner: Any
    model_config: Any
    parallel_config: Any
    load_config: Any
    vllm_config: Any

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As in vLLM. Then it is found out where the checkpoint's tensors are in the model."""
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        self.shira_take_up(self.model_runner.get_model(), self.shira_checkpoint(), self.shira_group(), settings())

    def shira_take_up(self, model: nn.Module, checkpoint: Checkpoint, group: Group, chosen: Settings) -> None:
        """Serve adapters on this model from now on."""
        surface, mapped = mapped_surface(model, checkpoint)
        self._model, self._ready = model, chosen.ready
        self._ranks = Ranks(surface, mapped, chosen.adapters, group, ready=chosen.ready, host=chosen.host_ready)
        self._thread = ThreadPoolExecutor(1, "shira")
        self._tickets: OrderedDict[int, Future[Any]] = OrderedDict()
        self._numbers = itertools.count()
        self._upcoming: tuple[str, ...] = ()
        self._failed: set[str] = set()  # requests that have failed here, until the scheduler says that they have ended
        self._reasons: OrderedDict[str, tuple[float, str]] = OrderedDict()  # key -> when, and why a switch has failed
        self._answer: Any = None
        self._longest_wait = 0.0

    def shira_checkpoint(self) -> Checkpoint:
        """The checkpoint that vLLM has loaded. Raises ShiraError for a setting under which adapters were not tried."""
        config = self.vllm_config
        tried = {
            "pipeline parallelism": self.parallel_config.pipeline_parallel_size == 1,
            "speculative decoding": config.speculative_config is None,
            "LoRA": config.lora_config is None,
            f"load_format {self.load_config.load_format!r}": self.load_config.load_format in ("auto", "hf", "safetensors"),
        }
        for what, is_tried in tried.items():
            if not is_tried:
                raise ShiraError(f"adapters were not tried together with {what}; leave that out")
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        model = self.model_config
        found = DefaultModelLoader(self.load_config)._prepare_weights(model.model, None, model.revision, False, None)
        return Checkpoint(found[0])

    def shira_group(self) -> Group:
        """The processes that hold this model together."""
        if self.parallel_config.tensor_parallel_size == 1:
            return Alone()
        from vllm.distributed.parallel_state import get_tp_group

        return Together(get_tp_group().cpu_group)

    def execute_model(self, scheduler_output: Any) -> Any:
        """As in vLLM, with the step's selection in the weights. If that fails, `sample_tokens` says so."""
        step = getattr(scheduler_output, FIELD, None)
        self._failed -= scheduler_output.finished_req_ids
        scheduled = scheduler_output.num_scheduled_tokens
        if step is not None and scheduled:
            self._longest_wait = step.longest_wait
            try:
                if self._failed.isdisjoint(scheduled):
                    self._ranks.use(step.key)
            except Exception as error:
                logger.error("the switch to %s failed: %s", _shown(step.key), error)
                self._remember(step.key, _kind_and_message(error))
                self._failed.update(scheduled)
            if not self._failed.isdisjoint(scheduled):
                self._failed.update(scheduled)  # with those that have come since
                super().execute_model(without_requests(scheduler_output))  # type: ignore[misc]
                self._answer = self.shira_answer(list(scheduled))
                return None
            self._read_ahead(step.upcoming[: self._ready - 1])
        return super().execute_model(scheduler_output)  # type: ignore[misc]

    def sample_tokens(self, grammar_output: Any) -> Any:
        """As in vLLM. After a failed switch: that this step's requests have failed."""
        if self._answer is None:
            return super().sample_tokens(grammar_output)  # type: ignore[misc]
        answer, self._answer = self._answer, None
        return answer

    def shutdown(self) -> None:
        """As in vLLM."""
        if hasattr(self, "_thread"):
            self._thread.shutdown(wait=False, cancel_futures=True)
        super().shutdown()  # type: ignore[misc]

    def shira_answer(self, names: list[str]) -> Any:
        """The output of a step whose requests have failed: no token for any of them."""
        from vllm.v1.outputs import ModelRunnerOutput

        places = {name: place for place, name in enumerate(names)}
        answer: Any = ModelRunnerOutput(req_ids=names, req_id_to_index=places, sampled_token_ids=[[] for _ in names])
        answer.shira_failed = True
        return answer

    def shira_prefetch(self, key: str) -> int:
        """Begin to make a selection ready, in a thread. Returns a ticket for `shira_ended`."""
        return self._begin(lambda: self._ranks.resident.prefetch(key))

    def shira_pin(self, key: str, pinned: bool) -> int:
        """Begin to hold a selection ready, or no longer. Returns a ticket for `shira_ended`."""
        return self._begin(lambda: self._ranks.resident.pin(key, pinned))

    def shira_ended(self, ticket: int) -> str | None:
        """None while it goes on; "" after it has ended well, otherwise the error's kind and message."""
        future = self._tickets.get(ticket)
        if future is None:
            return "ShiraError: the ticket is too old"
        if not future.done():
            return None
        error = future.exception()
        return "" if error is None else _kind_and_message(error)

    def shira_agree(self, key: str) -> str:
        """After `shira_prefetch` of this key: compare fingerprints with the other processes. "" or the error's message."""
        try:
            self._ranks.agree(key)
        except Exception as error:
            return _kind_and_message(error)
        return ""

    def shira_tiers(self) -> dict[str, Any]:
        """`Resident.tiers`, and the longest wait of a selection for its turn in seconds."""
        return {**self._ranks.resident.tiers(), "longest_wait": self._longest_wait}

    def shira_failure(self, key: str) -> str | None:
        """Why a switch to a selection has failed in the last minute, as "Kind: message"; None if none has."""
        when, reason = self._reasons.get(key, (-math.inf, ""))
        return reason if time.monotonic() - when < LATELY else None

    def shira_checksum(self) -> tuple[str, str]:
        """SHA-256 of the bits of all weights as they are now, and of their addresses."""
        bits, places = hashlib.sha256(), hashlib.sha256()
        for name, weight in sorted(self._model.named_parameters()):
            bits.update(name.encode())
            bits.update(bytes_of(weight).cpu().numpy().data)
            places.update(f"{name} {weight.data_ptr()}".encode())
        return bits.hexdigest(), places.hexdigest()

    def _begin(self, call: Callable[[], Any]) -> int:
        ticket = next(self._numbers)
        self._tickets[ticket] = self._thread.submit(call)
        while len(self._tickets) > MOST_TICKETS:
            self._tickets.popitem(last=False)
        return ticket

    def _read_ahead(self, upcoming: tuple[str, ...]) -> None:
        """Make selections ready in the thread. An error is said again when their turn comes."""
        if upcoming != self._upcoming:
            for key in set(upcoming) - set(self._upcoming):
                self._thread.submit(self._ranks.resident.prefetch, key)
            self._upcoming = upcoming

    def _remember(self, key: str, reason: str) -> None:
        self._reasons[key] = time.monotonic(), reason
        self._reasons.move_to_end(key)
        while len(self._reasons) > MOST_REASONS:
            self._reasons.popitem(last=False)


def _kind_and_message(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _shown(key: str) -> str:
    try:
        return str(of_key(key))
    except ShiraError:
        return "a selection without a key"


def mapped_surface(model: Any, checkpoint: Checkpoint) -> tuple[Surface, Mapped]:
    """A model's weights under the checkpoint's names, and where they are.

    Raises CheckpointError if no tensor can be changed, with the reason for one of them.
    """
    mapped = landings(model, {name: checkpoint.form(name) for name in checkpoint}, model.load_weights)
    mapped = verified(Surface(model, mapped), mapped, _rows(checkpoint))
    if not mapped.landings:
        name, why = next(iter(mapped.refused.items()), ("weight", "is not in the checkpoint"))
        raise CheckpointError(f"no adapter can be used on this model as vLLM has loaded it: '{name}' {why}")
    if mapped.refused:
        name, why = next(iter(mapped.refused.items()))
        logger.warning("adapters cannot change %d of this model's tensors: '%s' %s", len(mapped.refused), name, why)
    return Surface(model, mapped), mapped


def _rows(checkpoint: Checkpoint) -> Callable[[str, int], Tensor]:
    """(name, number) -> a row of a tensor of the checkpoint."""
    files = {name: file for file, names in checkpoint.shards.items() for name in names}

    def row(name: str, number: int) -> Tensor:
        from safetensors import safe_open

        with safe_open(files[name], "pt") as opened:
            found: Tensor = opened.get_slice(name)[number : number + 1][0]
            return found

    return row


def without_requests(output: Any) -> Any:
    """A SchedulerOutput as it would be if nothing had been scheduled."""
    nothing = type(output.scheduled_cached_reqs).make_empty()
    return dataclasses.replace(
        output,
        scheduled_new_reqs=[],
        scheduled_cached_reqs=nothing,
        num_scheduled_tokens={},
        total_num_scheduled_tokens=0,
        scheduled_spec_decode_tokens={},
        scheduled_encoder_inputs={},
    )
