"""OpenAI's and Ollama's own clients read what translations make of the answers of other servers.

Their libraries are imported by the tests that need them, because that takes seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.target import Protocol
from tests.support.translated import Stand, standing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openai import OpenAI

MESSAGES: Any = [{"role": "user", "content": "hi"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "weather", "description": "tells it", "parameters": PARAMETERS}
TOOLS: Any = [{"type": "function", "function": FUNCTION}]
RESPONSE_TOOLS: Any = [{"type": "function", "strict": False, **FUNCTION}]
CALL = '{"city":"Köln"}'


@pytest.fixture(params=[Protocol.ANTHROPIC, Protocol.OPENAI])
def stand(request: pytest.FixtureRequest) -> Iterator[Stand]:
    with standing(request.param) as running:
        yield running


@pytest.fixture
def anthropic_stand() -> Iterator[Stand]:
    with standing(Protocol.ANTHROPIC) as running:
        yield running


@pytest.fixture
def client(anthropic_stand: Stand) -> Iterator[OpenAI]:
    with openai_client(anthropic_stand) as made:
        yield made


def openai_client(stand: Stand) -> OpenAI:
    client: OpenAI = import_module("openai").OpenAI(
        base_url=f"{stand.url}/v1", api_key="unused", max_retries=0, timeout=30
    )
    return client


def test_a_chat(client: OpenAI, anthropic_stand: Stand) -> None:
    answer = client.chat.completions.create(model="ours", messages=MESSAGES, tools=TOOLS)
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls or []

    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Grüß dich")
    assert (call.id, call.to_dict()["function"]) == ("toolu_1", {"name": "weather", "arguments": CALL})
    assert choice.message.to_dict()["reasoning"] == "hmm"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (15, 20)
    assert anthropic_stand.asked[-1]["tools"] == [
        {"name": "weather", "description": "tells it", "input_schema": PARAMETERS}
    ]


def test_the_stream_of_a_chat(client: OpenAI) -> None:
    options: Any = {"include_usage": True}
    with client.chat.completions.stream(
        model="ours", messages=MESSAGES, tools=TOOLS, stream_options=options
    ) as stream:
        answer = stream.get_final_completion()
    (call,) = answer.choices[0].message.tool_calls or []

    assert answer.choices[0].message.content == "Grüß dich"
    assert call.function.arguments == CALL
    assert answer.usage is not None
    assert answer.usage.total_tokens == 35


def test_a_chat_goes_on_with_the_result_of_a_tool(client: OpenAI, anthropic_stand: Stand) -> None:
    answer = client.chat.completions.create(model="ours", messages=MESSAGES, tools=TOOLS)
    result = {"role": "tool", "tool_call_id": "toolu_1", "content": "rain"}
    given: Any = [*MESSAGES, answer.choices[0].message, result]
    client.chat.completions.create(model="ours", messages=given, tools=TOOLS)

    assert anthropic_stand.asked[-1]["messages"][1:] == [
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Grüß dich"},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Köln"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "content": [{"type": "text", "text": "rain"}],
                }
            ],
        },
    ]


def test_a_completion(client: OpenAI) -> None:
    whole = client.completions.create(model="ours", prompt="hi")
    stream = client.completions.create(model="ours", prompt="hi", stream=True)

    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("Grüß dich", "stop")
    assert "".join(chunk.choices[0].text for chunk in stream) == "Grüß dich"


def test_a_response(stand: Stand) -> None:
    with openai_client(stand) as client:
        answer = client.responses.create(model="ours", input="hi", tools=RESPONSE_TOOLS)
    (call,) = (item for item in answer.output if item.type == "function_call")

    assert (answer.status, answer.output_text, call.arguments) == ("completed", "Grüß dich", CALL)
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call"]
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (15, 20)


def test_the_stream_of_a_response(stand: Stand) -> None:
    with (
        openai_client(stand) as client,
        client.responses.stream(model="ours", input="hi", tools=RESPONSE_TOOLS) as stream,
    ):
        types = [event.type for event in stream]
        answer = stream.get_final_response()

    assert (types[0], types[-1]) == ("response.created", "response.completed")
    assert answer.output_text == "Grüß dich"
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call"]


def test_a_response_goes_on_with_signed_thinking(client: OpenAI, anthropic_stand: Stand) -> None:
    answer = client.responses.create(model="ours", input="hi", tools=RESPONSE_TOOLS)
    given: Any = [
        {"role": "user", "content": "hi"},
        *(item.to_dict() for item in answer.output),
        {"type": "function_call_output", "call_id": "toolu_1", "output": "rain"},
    ]
    client.responses.create(model="ours", input=given, tools=RESPONSE_TOOLS)

    content = anthropic_stand.asked[-1]["messages"][1]["content"]
    assert content[0] == {"type": "thinking", "thinking": "hmm", "signature": "sig"}


def test_an_error_amid_a_stream_is_raised(client: OpenAI, anthropic_stand: Stand) -> None:
    anthropic_stand.breaks = True
    stream = client.chat.completions.create(model="ours", messages=MESSAGES, stream=True)

    with pytest.raises(import_module("openai").APIError, match="the server ended the stream early"):
        list(stream)


def test_an_error_amid_a_response_is_raised(stand: Stand) -> None:
    stand.breaks = True
    with (
        openai_client(stand) as client,
        client.responses.create(model="ours", input="hi", stream=True) as stream,
        pytest.raises(import_module("openai").APIError, match="the server ended the"),
    ):
        list(stream)


def test_a_request_that_cannot_be_said_is_a_bad_one(client: OpenAI) -> None:
    with pytest.raises(
        import_module("openai").BadRequestError, match="seed: an Anthropic server has no such setting"
    ):
        client.chat.completions.create(model="ours", messages=MESSAGES, seed=1)


@pytest.mark.parametrize("stream", [False, True])
def test_the_client_of_ollama(stand: Stand, stream: bool) -> None:
    client = import_module("ollama").Client(stand.url)
    found = client.chat("ours", MESSAGES, tools=TOOLS, stream=stream)
    answers = list(found) if stream else [found]

    assert "".join(answer.message.content or "" for answer in answers) == "Grüß dich"
    assert "".join(answer.message.thinking or "" for answer in answers) == "hmm"
    (call,) = (call for answer in answers for call in answer.message.tool_calls or [])
    assert (call.function.name, call.function.arguments) == ("weather", {"city": "Köln"})
    assert (answers[-1].done_reason, answers[-1].prompt_eval_count, answers[-1].eval_count) == (
        "stop",
        15,
        20,
    )
