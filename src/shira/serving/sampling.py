"""How the tokens of a request are chosen: a logits processor for a batch in which every request has settings of its own.

Tokens are drawn by the Gumbel-max trick: noise is added to the scores, and the largest is taken. The noise of a token depends
on the request's seed and on the token's number alone. So an answer does not depend on what else is in the batch, or on whether
the request was interrupted. This file extends a class of Transformers, so nothing imports it before an engine is built.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from .problems import Problem

__all__ = ["NotFinite", "RowSampler", "Sampling", "Ticket", "TokenLogprob"]


MOST = 1024  # tokens that are nearly always enough for top_p


class NotFinite(Problem):
    """Scores for the next token that are no numbers, as with a strength that is too large for the model's dtype."""

    status = 422
    code = "not_finite"


class QuickTopP(TopPLogitsWarper):  # type: ignore[misc]  # mypy does not follow Transformers
    """Keeps what Transformers' warper keeps. It sorts all scores only if the most probable tokens are not enough."""

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        """scores: [1, vocabulary]."""
        top = scores.softmax(dim=-1).topk(min(MOST, scores.shape[1]))
        if float(top.values.sum()) < self.top_p:
            return super().__call__(input_ids, scores)  # type: ignore[no-any-return]
        count = max(1, int((top.values.cumsum(-1) - top.values < self.top_p).sum()))  # a top_p of 1e-320 is 0 in float32
        kept = top.indices[0, :count]
        return torch.full_like(scores, self.filter_value).index_copy_(1, kept, scores[:, kept])


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The defaults draw from the model's own distribution."""

    seed: int | str
    temperature: float = 1.0  # 0: always the most probable token
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None  # how many of the most probable tokens are reported beside the chosen one; None: nothing is

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken. Scores divided by a smaller temperature could be infinite."""
        return self.temperature < 1e-4

    def warpers(self) -> LogitsProcessorList:
        """Transformers' own warpers, in the order of `generate`."""
        if self.is_greedy:
            return LogitsProcessorList()
        made: list[Any] = [TemperatureLogitsWarper(self.temperature)] if self.temperature != 1 else []
        made += [TopKLogitsWarper(self.top_k)] if self.top_k else []
        made += [QuickTopP(self.top_p)] if self.top_p < 1 else []
        made += [MinPLogitsWarper(self.min_p)] if self.min_p else []
        return LogitsProcessorList(made)


class TokenLogprob(NamedTuple):
    """A chosen token's log-probability in the model's own distribution, and the most probable tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Ticket:
    """What the generation thread has to know of a request. Transformers carries it along with the request."""

    def __init__(self, key: str, arrived: float, sampling: Sampling) -> None:
        self.key, self.arrived, self.sampling = key, arrived, sampling
        self.logprobs: list[TokenLogprob] = []  # one a token, if they were asked for
        self.warpers = sampling.warpers()

    def __deepcopy__(self, memo: Any) -> "Ticket":
        return self  # Transformers copies the settings of a request that it starts again; this is the same request


class RowSampler(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]  # mypy does not follow Transformers
    """Changes the scores of each request so that the largest is the token that is drawn for it."""

    supported_kwargs = {"ticket": Ticket}
    ignored_kwargs = ()

    def __init__(self) -> None:
        self._rows: list[tuple[Ticket, list[int], list[int]]] = []  # with the tokens of the prompt and of the answer so far

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> Tensor:
        self._rows = []
        for request in requests_with_new_token:
            state = request.state
            start = state._true_initial_tokens or len(state.initial_tokens)  # the rest was written before an interruption
            written = state.initial_tokens[start:] + state.generated_tokens
            self._rows.append((state.logit_processor_kwargs["ticket"], state.initial_tokens[:start], written))
        return torch.empty(0, dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """scores: float32 [rows, vocabulary]. Raises NotFinite."""
        if self._rows and not scores[: len(self._rows)].amax(dim=-1).isfinite().all():
            raise NotFinite(
                "the model's scores for the next token are not finite; lower the strengths of the adapters, or serve the model "
                "in a dtype that holds larger numbers (--dtype float32)"
            )
        scores = scores.clone()
        plain = {
            number: scores[number].log_softmax(-1)
            for number, (ticket, _, _) in enumerate(self._rows)
            if ticket.sampling.logprobs is not None
        }
        for number, (ticket, prompt, written) in enumerate(self._rows):
            _decide_(scores[number : number + 1], ticket, prompt, written)
        chosen = scores.argmax(dim=-1).tolist() if plain else []
        for number, logprobs in plain.items():
            ticket = self._rows[number][0]
            values, tokens = logprobs.topk(min(ticket.sampling.logprobs or 0, logprobs.numel()))
            top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
            ticket.logprobs.append(TokenLogprob(chosen[number], float(logprobs[chosen[number]]), top))
        return scores


def _decide_(row: Tensor, ticket: Ticket, prompt: list[int], written: list[int]) -> None:
    """Change a row of scores in place. row: [1, vocabulary]."""
    sampling = ticket.sampling
    if sampling.repetition_penalty != 1:
        ids = torch.tensor([prompt + written], device=row.device)
        row.copy_(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, row))
    if written and (sampling.frequency_penalty or sampling.presence_penalty):
        counts = torch.bincount(torch.tensor(written, device=row.device), minlength=row.shape[1])[: row.shape[1]]
        row -= counts * sampling.frequency_penalty + (counts > 0) * sampling.presence_penalty
    if sampling.logit_bias:
        tokens = torch.tensor(list(sampling.logit_bias), device=row.device)
        row[0, tokens] += torch.tensor(list(sampling.logit_bias.values()), device=row.device)
    if sampling.is_greedy:
        return
    row.copy_(ticket.warpers(None, row))
    row += _gumbel(sampling.seed, len(written), row.shape[1]).to(row.device)


def _gumbel(seed: int | str, number: int, size: int) -> Tensor:
    """Gumbel noise for the token of this number of a request. It is made on the CPU, so it is the same on every device."""
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    generator = numpy.random.Generator(numpy.random.Philox(int.from_bytes(digest, "little")))  # a third of torch's time
    return torch.from_numpy(generator.standard_exponential(size, dtype=numpy.float32)).log_().neg_()
