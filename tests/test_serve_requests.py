"""What requests may hold, as clients send it: second turns of a chat, types, and what a prompt may be."""

import pytest

from test_serve_http import CHATS, served  # noqa: F401, a fixture

openai = pytest.importorskip("openai")


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
