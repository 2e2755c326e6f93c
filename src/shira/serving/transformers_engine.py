"""The engine on Transformers: requests of many selections over one live model, through Transformers' continuous batching.

The event loop submits jobs and reads their tokens. One thread runs the model (`continuous_batching.Manager`). A second one
reads the adapters that are wanted next.
"""

import asyncio
import contextlib
import functools
import itertools
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import ShiraError
from ..integrations import transformers as hf
from .cpu_linear import take_onednn
from .mixing import MIXED, Mixing
from .problems import EngineError, EngineStopped, RequestTooLong
from .resident import Resident
from .sampling import Sampling, Ticket, TokenLogprob
from .turns import Turns

__all__ = ["EngineError", "EngineStopped", "Job", "RequestTooLong", "TransformersEngine"]

TESTED = "5.23"  # of Transformers: the classes that continuous_batching.py extends may change
log = logging.getLogger(__name__)
CPU_CACHE = 1 << 30  # bytes of the KV cache, if nothing else is said
KNOWN_GOOD = 4096  # selections of which it is remembered that they could be read
FAILED = "a step of the engine failed ({}); its log has the details"
WAITING = 8  # times as many requests as in a step may keep their places in the KV cache
AHEAD = 2  # selections that are made ready before their turn


class Update(NamedTuple):
    """New tokens of a job. finish: "stop" after a token that ends an answer, "length" after the last one asked for."""

    tokens: list[int]
    logprobs: list[TokenLogprob]  # as many as tokens, if they were asked for
    finish: str | None


class Job:
    """A request in the engine. Iterate over it once for its updates; an error of its step is raised there.

    Whoever iterates over it must call `cancel` in the end, also if the job was not finished.
    """

    def __init__(self, engine: "TransformersEngine", name: str, ticket: Ticket, ends: frozenset[int]) -> None:
        self.loop = asyncio.get_running_loop()
        self.key = ticket.key
        self._engine, self._name, self._ticket, self._ends = engine, name, ticket, ends
        self._queue: asyncio.Queue[Update | Exception] = asyncio.Queue()
        self._seen = 0

    def take(self, written: Sequence[int], is_finished: bool) -> None:
        """In the event loop: all tokens so far."""
        new, first = list(written[self._seen :]), self._seen
        self._seen = len(written)
        finish = ("stop" if written and written[-1] in self._ends else "length") if is_finished else None
        self._queue.put_nowait(Update(new, self._ticket.logprobs[first : self._seen], finish))

    def fail(self, error: Exception) -> None:
        """In the event loop."""
        self._queue.put_nowait(error)

    def cancel(self) -> None:
        """Free what the job holds in the engine. Nothing happens if it is finished."""
        self._engine.leave(self._name)

    async def __aiter__(self) -> AsyncIterator[Update]:
        while True:
            update = await self._queue.get()
            if isinstance(update, Exception):
                raise update
            yield update
            if update.finish:
                return


class TransformersEngine:
    """A causal language model of Transformers with the adapters of a served folder.

    resident: puts a selection into the model's weights. Nobody else may use it, or the model, after `start`.
    turns: whose turn it is. mixing: lets selections share steps, over the same model and resident.
    max_running: requests in a step. step_tokens: tokens in a step; a longer prompt takes several.
    cache_tokens: size of the KV cache; by default 1 GiB on a CPU and half of the free memory of a GPU, or less if the requests
    cannot use it.
    longest: tokens of a request, with its answer; by default what the model's configuration says, and never more.
    ends: tokens that end an answer.
    Raises EngineError if the model takes fewer tokens than longest, or Transformers' continuous batching does not hold for it.
    """

    def __init__(
        self,
        model: nn.Module,
        resident: Resident,
        *,
        ends: Sequence[int] = (),
        turns: Turns | None = None,
        mixing: Mixing | None = None,
        max_running: int = 64,
        step_tokens: int = 512,
        cache_tokens: int | None = None,
        longest: int | None = None,
    ) -> None:
        take_onednn(model)
        self._resident = resident
        self._mixing = mixing
        self.ends = frozenset(ends)
        config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
        self.vocabulary = int(config.vocab_size)
        self._jobs: dict[str, Job] = {}
        self._numbers = itertools.count()
        self._stopping = False
        self._closing = threading.Lock()
        self._known_good: OrderedDict[str, None] = OrderedDict()
        self._reader = ThreadPoolExecutor(1, "shira adapters")
        self._coming: set[str] = set()
        self.tokens = Counter[str]()  # "prompt": read, "generated": written, "failed": requests that an error ended
        self._manager: Any = _manager(
            self, model, turns or Turns(), mixing, max_running, step_tokens, cache_tokens, longest or _context(config)
        )
        if mixing is not None:
            mixing.wanted = functools.partial(self._read_later, mixing.read)
        from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens

        self._scheduler = self._manager.scheduler
        self._scheduler.on_turn = self._read_ahead
        room = infer_max_single_request_tokens(self._scheduler.cache)
        self.longest = min(longest or _context(config) or room, room)

    # In the event loop

    def start(self) -> None:
        """Start the thread that runs the model."""
        self._manager.start()

    async def alive(self) -> bool:
        """Whether requests can be answered."""
        return self.is_alive()

    @property
    def open(self) -> int:
        """How many jobs wait or run."""
        return len(self._jobs)

    def is_alive(self) -> bool:
        """The same, at once."""
        return bool(self._manager.is_running()) and self._manager.background_thread_status.fatal_error is None

    def room(self, prompt: int, wanted: int | None) -> int:
        """How many tokens an answer may have: those wanted, or all that there is room for. Raises RequestTooLong."""
        if not 0 < prompt < self.longest:
            raise RequestTooLong(
                f"the prompt has {prompt} tokens; expected at least 1, and less than the {self.longest} that a prompt and its "
                "answer may have"
            )
        if wanted is not None and prompt + wanted > self.longest:
            raise RequestTooLong(
                f"the prompt has {prompt} tokens, and {wanted} were asked for; both together may be {self.longest}"
            )
        return self.longest - prompt if wanted is None else wanted

    def submit(
        self, prompt: Sequence[int], key: str, sampling: Sampling, max_tokens: int | None = None, *, ignore_ends: bool = False
    ) -> Job:
        """Begin to answer a prompt. Raises RequestTooLong, or EngineStopped."""
        most = self.room(len(prompt), max_tokens)
        if self._stopping or not self.is_alive():
            raise self._ended_error()
        name, ends = f"{next(self._numbers)}", frozenset[int]() if ignore_ends else self.ends
        ticket = Ticket(key, time.monotonic(), sampling)
        job = self._jobs[name] = Job(self, name, ticket, ends)
        self._manager.add_request(
            list(prompt), name, max_new_tokens=most, streaming=True, eos_token_id=sorted(ends) or -1, ticket=ticket
        )
        if not self.is_alive():  # it ended meanwhile, and may not have seen this request
            self._end_with(name, self._ended_error())
        self.tokens["prompt"] += len(prompt)
        return job

    def leave(self, name: str) -> None:
        """End a job, whether it is finished or not."""
        if self._jobs.pop(name, None) is not None:
            self._manager.cancel_request(name)

    async def prefetch(self, key: str) -> None:
        """Read and check the adapters of a selection that no request has used before. Raises ShiraError."""
        if key and key not in self._known_good:
            await asyncio.get_running_loop().run_in_executor(self._reader, self._first_read, key)
            self._known_good[key] = None
            while len(self._known_good) > KNOWN_GOOD:
                self._known_good.popitem(last=False)

    def _first_read(self, key: str) -> None:
        if self._mixing is None or not self._mixing.read(key):
            self._resident.prefetch(key)

    async def pin(self, key: str, pinned: bool) -> None:
        """Hold a selection ready in memory, or no longer. Raises ShiraError."""
        await asyncio.get_running_loop().run_in_executor(self._reader, self._resident.pin, key, pinned)

    async def tiers(self) -> dict[str, Any]:
        """Where the selections are, and what the engine has done."""
        waiting = Counter(job.key for job in list(self._jobs.values()))
        more = {
            "requests": dict(waiting),
            "interrupted": self._scheduler.interrupted,
            "mixed_steps": self._scheduler.mixed_steps,
            "sharing": self._mixing.held if self._mixing is not None else [],
            "longest_wait": self._scheduler.turns.longest_wait,
            **self.tokens,
        }
        return {**await asyncio.to_thread(self._resident.tiers), **more}

    async def stop(self, seconds: float = 30.0) -> None:
        """Refuse new requests, finish those that run, and end. What is not finished after these seconds fails.

        Afterwards the base is in the weights.
        """
        self._stopping = True
        end = time.monotonic() + seconds
        while self._jobs and self.is_alive() and time.monotonic() < end:
            await asyncio.sleep(0.02)
        for name in list(self._jobs):
            self._end_with(name, self._ended_error())
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """End now. A second call waits until the first has ended."""
        self._stopping = True
        with self._closing:  # the server and its application both stop the engine, and two threads cannot join in the manager
            with contextlib.suppress(RuntimeError):
                self._reader.shutdown(cancel_futures=True)
            thread: threading.Thread | None = self._manager._generation_thread
            self._manager.stop(hard_stop=True, timeout=60) if thread is not None else None
            if thread is None or not thread.is_alive():
                if self._mixing is not None:
                    self._mixing.close()
                self._resident.use("")

    # In the thread that runs the model

    def use(self, key: str) -> None:
        """Before each step."""
        if self._mixing is not None:
            self._mixing.begin(self._scheduler.rows if key == MIXED else ())
        self._resident.use("" if key == MIXED else key)

    def step_failed(self, error: Exception) -> None:
        """After a step that failed. Raises what prevents the base from being restored; then the engine ends."""
        if not isinstance(error, ShiraError):
            log.error("a step failed", exc_info=error)
        if self._mixing is not None:
            self._mixing.step_failed()
        self._resident.use("")

    def deliver(self, outputs: list[Any]) -> None:
        """After each step: what the requests in it have written so far."""
        found = [(job, output) for output in outputs if (job := self._jobs.get(output.request_id)) is not None]
        self.tokens["generated"] += len(found)
        for loop in {job.loop for job, _ in found}:
            _call(loop, self._take, [(job, output) for job, output in found if job.loop is loop])

    def request_failed(self, name: str, error: Exception) -> None:
        """A request that an error has ended."""
        job = self._jobs.get(name)
        if job is None:
            return
        if not isinstance(error, ShiraError):
            status = self._manager.background_thread_status
            ending = status.local_status != status.DONT_STOP
            error = self._ended_error(error) if ending else EngineError(FAILED.format(type(error).__name__))
        self.tokens["failed"] += 1
        _call(job.loop, self._end_with, name, error)

    def thread_ended(self) -> None:
        """When the thread ends, for whatever reason."""
        for name in list(self._jobs):
            self.request_failed(name, self._ended_error())

    def _read_ahead(self, upcoming: Sequence[str]) -> None:
        for key in upcoming[:AHEAD]:
            if key not in ("", MIXED, *self._coming) and not self._stopping:
                self._coming.add(key)
                self._read_later(self._resident.prefetch, key)

    def _read_later(self, read: Callable[[str], object], key: str) -> None:
        with contextlib.suppress(RuntimeError):  # the engine is being closed
            self._reader.submit(self._read, read, key)

    def _read(self, read: Callable[[str], object], key: str) -> None:
        try:
            with contextlib.suppress(ShiraError, OSError):  # its own turn will raise it
                read(key)
        finally:
            self._coming.discard(key)

    def _take(self, found: list[tuple[Job, Any]]) -> None:
        for job, output in found:
            if output.is_finished():
                self._jobs.pop(output.request_id, None)
            job.take(output.generated_tokens, output.is_finished())

    def _end_with(self, name: str, error: Exception) -> None:
        job = self._jobs.pop(name, None)
        if job is not None:
            job.fail(error)

    def _ended_error(self, error: Exception | None = None) -> EngineStopped:
        error = error or self._manager.background_thread_status.fatal_error
        if error is not None:
            return EngineStopped(f"the engine has ended after an error and must be started again: {error}")
        return EngineStopped("the server is stopping; send the request again, to another one")


def _call(loop: asyncio.AbstractEventLoop, function: Any, *arguments: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits
        loop.call_soon_threadsafe(function, *arguments)


def _context(config: Any) -> int | None:
    """How many tokens the model takes; None if its configuration does not say."""
    found = getattr(config, "max_position_embeddings", None)
    return int(found) if found else None


def _manager(
    engine: TransformersEngine,
    model: nn.Module,
    turns: Turns,
    mixing: Mixing | None,
    max_running: int,
    step_tokens: int,
    cache_tokens: int | None,
    longest: int | None,
) -> Any:
    """Transformers' manager of continuous batching, checked against plain forward passes of the model."""
    from .self_check import check, plain_logprobs

    expected = plain_logprobs(model)
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    try:
        from .continuous_batching import PAGE, Manager, Router, cache_token_bytes

        context = _context(config)
        if longest and context and longest > context:
            raise EngineError(
                f"a prompt and its answer may have at most the {context} tokens that this model takes, found {longest}; give a "
                "smaller --max-model-len, or leave it out"
            )
        if cache_tokens is None:
            useful = WAITING * max_running * longest if longest else 1 << 60
            cache_tokens = min(useful, _free(model) // cache_token_bytes(config, model.dtype))  # type: ignore[arg-type]
        manager = Manager(
            model,
            turns=turns,
            mixing=mixing,
            router=Router(engine.deliver, engine.request_failed),
            use=engine.use,
            failed=engine.step_failed,
            ended=engine.thread_ended,
            blocks=max(1, cache_tokens // PAGE),
            max_running=min(max_running, step_tokens),
            step_tokens=step_tokens,
        )
        manager.warmup()  # allocates the KV cache
        check(manager, expected)
        if mixing is not None and not mixing.keep_fitting():
            raise EngineError(f"{type(model).__name__} has no layer that selections can share; leave out --mix")
    except Exception as error:  # whatever Transformers raises for a model that it cannot serve
        if mixing is not None:
            mixing.close()
        if isinstance(error, EngineError):
            raise
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise EngineError(
            f"Transformers' continuous batching cannot serve {type(model).__name__}: {said} (transformers {hf.version()}; this "
            f"engine was tested with {TESTED})"
        ) from error
    return manager


def _free(model: nn.Module) -> int:
    device = next(model.parameters()).device
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else CPU_CACHE
