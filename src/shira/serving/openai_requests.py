"""What clients may send to /v1/completions and /v1/chat/completions: OpenAI's fields, checked.

A field that would change the answer and is not there is refused, never ignored. The first error ends the check: pydantic would
otherwise keep one for each of a million wrong items. This file extends a class of pydantic, so only `openai_routes` imports it.
"""

import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ..texts import shown
from .problems import Problem
from .sampling import Sampling

__all__ = ["ChatRequest", "CompletionRequest", "OpenAIRequest", "RequestError", "parsed"]

MOST_ANSWERS = 128  # to one request
IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
NO_EFFECT = {  # fields that are refused, but for these values
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "echo": (False,),
    "suffix": ("",),
}
FORMS = {  # of fields that may have several: what an error of theirs begins with
    "content": 'this server takes text only: content must be a text or a list of {"type": "text", "text": "…"}; ',
    "prompt": "prompt must be a text, a list of texts, a list of token numbers or a list of such lists; ",
}
ELSEWHERE = {"response_format", "tools", "tool_choice", "functions", "function_call"}
EMPTY = {"tool_calls", "annotations"}  # what OpenAI's client sends back of an answer that had none
Positive = Annotated[int, Field(ge=1)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Tokens = Annotated[list[int], Field(fail_fast=True)]


T = TypeVar("T", bound="OpenAIRequest")


class RequestError(Problem):
    """A request that cannot be answered. param: the field that is wrong."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Fields(BaseModel):
    """An object in which every field is known, and of its own type: "2" is no number, and true is no 1."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _first_unknown(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.keys() <= cls.model_fields.keys():
            return given
        first = min(given.keys() - cls.model_fields.keys())
        return {name: value for name, value in given.items() if name in cls.model_fields or name == first}


def _biases(given: Any) -> Any:
    """logit_bias by token, whose number is a text in JSON. Raises ValueError for the first entry that is none."""
    for token, bias in given.items() if isinstance(given, dict) else ():
        if not re.fullmatch("0|[1-9][0-9]{0,17}", token) or type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError(f"expected a token's number and a bias from -100 to 100, found {shown(token)}: {shown(bias)}")
    return {int(token): bias for token, bias in given.items()} if isinstance(given, dict) else given


def _listed(given: Any) -> Any:
    """A list in place of one string."""
    return [given] if isinstance(given, str) else given


class Inner(Fields):
    """An object in a request. As at the top, null means that a field is not given; so does an empty list of EMPTY."""

    @model_validator(mode="before")
    @classmethod
    def _given(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None and not (value == [] and name in EMPTY)}


class StreamOptions(Inner):
    include_usage: bool = False
    include_obfuscation: bool = False


class OpenAIRequest(Fields):
    """The fields of both routes. top_k, min_p, repetition_penalty and ignore_eos are vLLM's extensions."""

    model: str
    max_tokens: Positive | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Annotated[list[StopString], Field(max_length=16, fail_fast=True), BeforeValidator(_listed)] = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    logit_bias: Annotated[dict[int, float], BeforeValidator(_biases)] = {}
    ignore_eos: bool = False

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def reported(self) -> int | None:
        """How many of the most probable tokens are reported beside the chosen one; None if log-probabilities are not."""
        raise NotImplementedError

    def sampling(self, defaults: Mapping[str, float], number: int, answers: int) -> Sampling:
        """The settings of one of the answers. defaults: the model's own settings, which hold where the request says nothing."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
        chosen = {**defaults, **{name: value for name, value in given.items() if value is not None}}
        return Sampling(
            f"{seed}/{number}" if answers > 1 else f"{seed}",
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=self.logit_bias,
            logprobs=self.reported,
            **{**chosen, "top_k": max(0, int(chosen.get("top_k", 0)))},
        )


class CompletionRequest(OpenAIRequest):
    prompt: str | Tokens | Annotated[list[str], Field(fail_fast=True)] | Annotated[list[Tokens], Field(fail_fast=True)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None

    @property
    def reported(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(Inner):
    type: Literal["text"]
    text: str


class Message(Inner):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """The message as chat templates take it."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        found = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return found | ({"name": self.name} if self.name else {})


class ChatRequest(OpenAIRequest):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Positive | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def reported(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def parsed(kind: type[T], body: Any) -> T:
    """A request out of the value of its JSON text. Raises RequestError."""
    if not isinstance(body, dict):
        raise RequestError('the body must be a JSON object, as in {"model": "…"}')
    fields = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
    for name in fields.keys() & NO_EFFECT.keys():
        if fields[name] not in NO_EFFECT[name]:
            more = "; this engine has no structured output and no tools, vLLM has (--engine vllm)" if name in ELSEWHERE else ""
            raise RequestError(f"{name} is not supported{more}", name)
        del fields[name]
    try:
        asked = kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        found = "" if first["type"] in ("missing", "value_error") else f", found {shown(first['input'])}"
        unknown = first["type"] == "extra_forbidden"
        known = "this server does not know the field" if unknown else first["msg"].removeprefix("Value error, ")
        forms = "" if unknown else next((said for name, said in FORMS.items() if name in first["loc"]), "")
        raise RequestError(f"{forms}{where}: {known}{found}", str(first["loc"][0]) if first["loc"] else None) from None
    _check_together(asked)
    return asked


def _check_together(asked: OpenAIRequest) -> None:
    if asked.stream_options is not None and not asked.stream:
        raise RequestError("stream_options are for stream=true", "stream_options")
    if isinstance(asked, ChatRequest) and asked.top_logprobs is not None and not asked.logprobs:
        raise RequestError("top_logprobs needs logprobs=true", "top_logprobs")
    if isinstance(asked, CompletionRequest):
        if asked.best_of not in (None, asked.n):
            raise RequestError("best_of is not supported, but for the same number as n", "best_of")
        if not asked.prompts or asked.n * len(asked.prompts) > MOST_ANSWERS:
            raise RequestError(f"expected 1 to {MOST_ANSWERS} answers: n for each prompt", "prompt")
