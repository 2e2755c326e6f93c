"""A scheduler that behaves as vLLM's does, as far as turns of selections see it: queues, blocks of a KV cache, preemption."""

import enum
import functools
import itertools
import math
from collections import deque
from types import SimpleNamespace

BLOCK = 4  # tokens


class Status(enum.Enum):
    WAITING = 0
    WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR = 1
    WAITING_FOR_REMOTE_KVS = 2
    WAITING_FOR_STREAMING_REQ = 3
    RUNNING = 4
    PREEMPTED = 5
    FINISHED = 6
    FINISHED_ERROR = 7


@functools.total_ordering
class Request:
    arrivals = itertools.count()

    def __init__(self, name, key="", prompt=6, tokens=5, salt=None, grammar=False):
        self.request_id = name
        self.sampling_params = SimpleNamespace(extra_args={"shira": key} if key else None)
        self.arrival_time, self.priority = next(self.arrivals), 0
        self.num_prompt_tokens, self.max_tokens = prompt, tokens
        self.num_computed_tokens = self.num_output_placeholders = self.num_output_tokens = 0
        self.num_stale_output_tokens, self.drop_stale_output, self.num_preemptions = 0, False, 0
        self.status = Status.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR if grammar else Status.WAITING
        self.structured_output_request = SimpleNamespace(grammar=None) if grammar else None
        self.cache_salt, self.block_hashes = salt, ["old"]

    def __lt__(self, other):
        return (self.priority, self.arrival_time) < (other.priority, other.arrival_time)

    def __repr__(self):
        return self.request_id

    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other

    @property
    def num_tokens(self):
        return self.num_prompt_tokens + self.num_output_tokens

    def update_block_hashes(self):
        self.block_hashes.append(self.cache_salt)


class Queue(deque):
    """vLLM's FCFSRequestQueue."""

    def add_request(self, request):
        self.append(request)

    def pop_request(self):
        return self.popleft()

    def peek_request(self):
        return self[0]

    def prepend_request(self, request):
        self.appendleft(request)

    def prepend_requests(self, requests):
        self.extendleft(requests)

    def remove_request(self, request):
        self.remove(request)

    def remove_requests(self, requests):
        gone = set(requests)
        kept = [request for request in self if request not in gone]
        self.clear()
        self.extend(kept)


class KVCache:
    def __init__(self, blocks):
        self.free_blocks, self.of = blocks, {}

    def allocate_slots(self, request, tokens, **_):
        wanted = math.ceil((request.num_computed_tokens + tokens) / BLOCK) - self.of.get(request, 0)
        if wanted > self.free_blocks:
            return None
        self.free_blocks -= wanted
        self.of[request] = self.of.get(request, 0) + wanted
        return wanted

    def free(self, request):
        self.free_blocks += self.of.pop(request, 0)


class Output(SimpleNamespace):
    pass


class Scheduler:
    """First come, first served, as in vLLM 0.32.0. ahead: outputs that are on their way when the next step is chosen."""

    def __init__(self, blocks=100, budget=16, most=8, ahead=0):
        self.requests, self.running = {}, []
        self.waiting, self.kv_holding_waiting = Queue(), Queue()
        self.kv_cache_manager = KVCache(blocks)
        self.budget, self.most, self.ahead = budget, most, ahead
        self.grammar_compile_error_reqs, self.finished_recving_kv_req_ids = set(), set()
        self.use_v2_model_runner = self.requires_kv_delivery = False
        self.finished = {}

    def add_request(self, request):
        self.requests[request.request_id] = request
        self.waiting.add_request(request)

    def schedule(self):
        left, scheduled, preempted, place = self.budget, {}, [], 0
        while place < len(self.running) and left > 0:
            request = self.running[place]
            tokens = min(request.num_tokens + request.num_output_placeholders - request.num_computed_tokens, left)
            last = request.num_prompt_tokens + request.max_tokens
            if request.num_output_placeholders and request.num_computed_tokens + 2 - request.num_output_placeholders >= last:
                tokens = 0
            if tokens == 0:
                place += 1
                continue
            while self.kv_cache_manager.allocate_slots(request, tokens) is None:
                gone = self.running.pop()
                self._preempt_request(gone, 0.0)
                preempted.append(gone)
                if gone is request:
                    break
            if request in preempted:
                break
            scheduled[request.request_id] = tokens
            left -= tokens
            place += 1
        skipped = deque()
        while not preempted and left > 0 and self.waiting and len(self.running) < self.most:
            request = self.waiting.peek_request()
            if request.status is Status.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
                if request.structured_output_request.grammar is None:
                    skipped.appendleft(self.waiting.pop_request())
                    continue
                request.status = Status.WAITING
            if request.num_stale_output_tokens:
                skipped.appendleft(self.waiting.pop_request())
                continue
            tokens = min(request.num_tokens - request.num_computed_tokens, left)
            if self.kv_cache_manager.allocate_slots(request, tokens) is None:
                break
            assert self.waiting.pop_request() is request
            request.status = Status.RUNNING
            self.running.append(request)
            scheduled[request.request_id] = tokens
            left -= tokens
        self.waiting.prepend_requests(skipped)
        assert len(self.running) <= self.most
        sampled = set()
        for name, tokens in scheduled.items():
            request = self.requests[name]
            request.num_computed_tokens += tokens
            if request.num_computed_tokens >= request.num_tokens + request.num_output_placeholders:
                sampled.add(name)
                request.num_output_placeholders += bool(self.ahead)
        total = sum(scheduled.values())
        return Output(num_scheduled_tokens=scheduled, total_num_scheduled_tokens=total, sampled=sampled)

    def _request_blocks_can_be_freed(self, request):
        return True

    def _preempt_request(self, request, timestamp, drop_stale_output=False):
        assert request.status is Status.RUNNING
        self.kv_cache_manager.free(request)
        request.status, request.num_computed_tokens = Status.PREEMPTED, 0
        request.num_preemptions += 1
        request.num_stale_output_tokens = request.num_output_placeholders
        request.num_output_placeholders = 0
        self.waiting.prepend_request(request)

    def update_from_output(self, output, answer):
        for name in output.sampled - self.grammar_compile_error_reqs:
            request = self.requests.get(name)
            if request is None:
                continue
            request.num_output_tokens += 1
            if request.num_stale_output_tokens:
                request.num_stale_output_tokens -= 1
            elif self.ahead:
                request.num_output_placeholders -= 1
            if request.num_output_tokens >= request.max_tokens:
                self.finish_requests([name], Status.FINISHED)
        self.finish_requests(self.grammar_compile_error_reqs, Status.FINISHED_ERROR)
        self.grammar_compile_error_reqs.clear()

    def finish_requests(self, names, status):
        for name in list(names):
            request = self.requests.pop(name, None)
            if request is None:
                continue
            if request in self.running:
                self.running.remove(request)
            self.waiting.remove_requests([request])
            self.kv_cache_manager.free(request)
            request.status = status
            self.finished[name] = request
