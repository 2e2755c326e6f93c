"""What requests may hold, as clients send it: second turns of a chat, types, and what a prompt may be."""

import pytest

from test_serve_http import CHATS, served  # noqa: F401, a fixture

openai = pytest.importorskip("openai")
from shira.serving.openai_requests import ChatRequest, CompletionRequest, RequestError, parsed  # noqa: E402


def test_a_second_turn_takes_the_answer_as_the_client_sends_it_back(served):  # noqa: F811
    """OpenAI's client fills the fields that an answer does not have with null."""

    async def work(client):
        first = await client.chat.completions.create(model="a", messages=CHATS, max_tokens=4, temperature=0)
        answer = first.choices[0].message
        plain = {"role": "assistant", "content": answer.content}
        lists = answer.model_dump() | {"tool_calls": [], "annotations": []}
        assert (
            answer.model_dump().items() >= {"refusal": None, "audio": None, "function_call": None, "tool_calls": None}.items()
        )
        seconds = [
            await client.chat.completions.create(model="a", messages=[*CHATS, said, *CHATS], max_tokens=8, temperature=0)
            for said in (plain, answer, answer.model_dump(), lists)
        ]
        for wrong in ({"tool_calls": [{"id": "1"}]}, {"refusal": "no"}, {"prefix": []}):
            with pytest.raises(openai.BadRequestError, match="does not know the field"):
                await client.chat.completions.create(model="a", messages=[*CHATS, plain | wrong])
        return [second.choices[0].message.content for second in seconds]

    found = served.http(work)
    assert len(found[0]) == 8 and len(set(found)) == 1


WRONG = [
    *({"temperature": value} for value in ("0.5", True)),
    *({"n": value} for value in ("2", True, 2.0)),
    *({"stream": value} for value in ("yes", 1)),
    {"max_tokens": True},
    {"stop": [True]},
    {"stream": True, "stream_options": {"include_usage": "yes"}},
    {"logit_bias": {"5": "1"}},
    {"logit_bias": {"5": True}},
]


@pytest.mark.parametrize(
    "fields", [*WRONG, {"prompt": [True]}, {"prompt": [1.0, 2.0]}, {"prompt": [[True]]}, {"logprobs": True}]
)
def test_a_value_of_another_type_is_refused(fields):
    with pytest.raises(RequestError) as found:
        parsed(CompletionRequest, {"model": "a", "prompt": "x", **fields})
    assert str(found.value).startswith(list(fields)[-1])


@pytest.mark.parametrize("fields", [*WRONG, {"logprobs": 1}, {"logprobs": True, "top_logprobs": "2"}])
def test_a_value_of_another_type_is_refused_in_chats(fields):
    with pytest.raises(RequestError) as found:
        parsed(ChatRequest, {"model": "a", "messages": CHATS, **fields})
    assert str(found.value).startswith(list(fields)[-1])


def test_whole_numbers_stand_for_real_ones_and_text_for_the_numbers_of_tokens():
    asked = parsed(CompletionRequest, {"model": "a", "prompt": [5, 6], "temperature": 1, "top_p": 1, "logit_bias": {"5": -1}})
    assert (asked.temperature, asked.top_p, asked.logit_bias, asked.prompts) == (1.0, 1.0, {5: -1.0}, [[5, 6]])


@pytest.mark.parametrize("content", [[{"type": "image_url", "image_url": {"url": "x"}}], 5, [{"type": "text"}], None])
def test_what_is_no_text_in_a_message_is_refused_with_what_may_be_there(content):
    with pytest.raises(RequestError, match=r"this server takes text only: .*; messages\.0\.content") as found:
        parsed(ChatRequest, {"model": "a", "messages": [{"role": "user", "content": content}]})
    assert found.value.param == "messages"


@pytest.mark.parametrize("prompt", [["x", 5], [5, "x"], [[5], 5], {"x": 1}, 5])
def test_what_a_prompt_may_be_is_said(prompt):
    words = r"prompt must be a text, .* or a list of such lists; prompt\.str: Input should be a valid string"
    with pytest.raises(RequestError, match=words):
        parsed(CompletionRequest, {"model": "a", "prompt": prompt})
