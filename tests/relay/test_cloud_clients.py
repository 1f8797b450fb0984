"""The official Python clients of Ollama, OpenAI and Anthropic, through each translation."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import ollama
import openai
import pytest

from tests.relay.test_cloud import broken, fronted, key
from tests.support.provider import (
    INPUTS,
    OUTPUTS,
    TEXT,
    Provider,
    anthropic_answer,
    anthropic_events,
    chunk,
    event,
    openai_answer,
    refuses,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.relaying import Conversation, Front

__all__ = ["key"]  # a fixture that all of these use
PROTOCOLS = pytest.mark.parametrize("protocol", ["openai", "anthropic"])
ASKED: list[dict[str, str]] = [{"role": "user", "content": "hi"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "of a city", "parameters": PARAMETERS},
}


async def calls(talk: Conversation) -> None:
    """Call the tool that was offered, as the protocol of the route does it."""
    asked = talk.seen.json()
    if talk.seen.target.endswith("/messages"):
        assert asked["tools"][0]["input_schema"] == PARAMETERS
        use = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Ulm"}}
        if not asked.get("stream"):
            whole = {**anthropic_answer(), "content": [use], "stop_reason": "tool_use"}
            await talk.whole(200, json.dumps(whole).encode())
            return
        first, *_ = anthropic_events()
        said: list[dict[str, Any]] = [
            {"type": "content_block_start", "index": 0, "content_block": {**use, "input": {}}},
            *(
                {
                    "type": "content_block_delta",
                    "index": 0,
                    "delta": {"type": "input_json_delta", "partial_json": part},
                }
                for part in ('{"ci', 'ty":"Ulm"}')
            ),
            {"type": "content_block_stop", "index": 0},
            {
                "type": "message_delta",
                "delta": {"stop_reason": "tool_use", "stop_sequence": None},
                "usage": {"output_tokens": OUTPUTS},
            },
            {"type": "message_stop"},
        ]
        events = [first, *(event(one, one["type"]) for one in said)]
    else:
        assert asked["tools"][0]["function"]["parameters"] == PARAMETERS
        call = {
            "id": "t1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city":"Ulm"}'},
        }
        if not asked.get("stream"):
            whole = openai_answer()
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
            whole["choices"] = [{"index": 0, "message": message, "finish_reason": "tool_calls"}]
            await talk.whole(200, json.dumps(whole).encode())
            return
        begun = {**call, "index": 0, "function": {"name": "weather", "arguments": ""}}
        events = [chunk({"role": "assistant", "tool_calls": [begun]})]
        events += [
            chunk({"tool_calls": [{"index": 0, "function": {"arguments": part}}]})
            for part in ('{"ci', 'ty":"Ulm"}')
        ]
        events += [chunk({}, "tool_calls"), event("[DONE]")]
    await talk.begin("text/event-stream")
    for one in events:
        await talk.chunk(one)
    await talk.end()


def openai_client(front: Front) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{front.base_url}/v1", api_key="mine", max_retries=0)


@PROTOCOLS
async def test_the_client_of_ollama(tmp_path: Path, protocol: str) -> None:
    provider = Provider()
    async with fronted(tmp_path, provider, broken(), protocol=protocol) as front:
        client = ollama.AsyncClient(host=front.base_url)
        answer = await client.chat(model="pays", messages=ASKED)
        assert (answer.message.content, answer.prompt_eval_count, answer.eval_count) == (
            TEXT,
            INPUTS,
            OUTPUTS,
        )
        assert (answer.done, answer.done_reason) == (True, "stop")
        parts = [part async for part in await client.chat(model="pays", messages=ASKED, stream=True)]
        assert "".join(part.message.content or "" for part in parts) == TEXT
        assert parts[-1].eval_count == OUTPUTS
        assert (await client.generate(model="pays", prompt="hi")).response == TEXT
        provider.answer = calls
        answer = await client.chat(model="pays", messages=ASKED, tools=[TOOL])
        (call,) = answer.message.tool_calls or ()
        assert (call.function.name, call.function.arguments) == ("weather", {"city": "Ulm"})
        parts = [
            part async for part in await client.chat(model="pays", messages=ASKED, tools=[TOOL], stream=True)
        ]
        (call,) = [call for part in parts for call in part.message.tool_calls or ()]
        assert call.function.arguments == {"city": "Ulm"}
        provider.answer = refuses(400, "too long")
        with pytest.raises(ollama.ResponseError, match="too long"):
            await client.chat(model="pays", messages=ASKED)


@PROTOCOLS
async def test_the_client_of_openai(tmp_path: Path, protocol: str) -> None:
    provider = Provider()
    async with fronted(tmp_path, provider, broken(), protocol=protocol) as front:
        client: Any = openai_client(front)
        answer = await client.chat.completions.create(model="pays", messages=ASKED)
        assert answer.choices[0].message.content == TEXT
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (INPUTS, OUTPUTS)
        stream = await client.chat.completions.create(
            model="pays", messages=ASKED, stream=True, stream_options={"include_usage": True}
        )
        parts = [part async for part in stream]
        text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        assert text == TEXT
        assert [part.usage.completion_tokens for part in parts if part.usage] == [OUTPUTS]
        said = await client.responses.create(model="pays", input="hi")
        assert said.output_text == TEXT
        provider.answer = calls
        answer = await client.chat.completions.create(model="pays", messages=ASKED, tools=[TOOL])
        (call,) = answer.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Ulm"})
        stream = await client.chat.completions.create(model="pays", messages=ASKED, tools=[TOOL], stream=True)
        deltas = [part.choices[0].delta async for part in stream if part.choices]
        pieces = [call for delta in deltas for call in delta.tool_calls or ()]
        assert json.loads("".join(call.function.arguments or "" for call in pieces)) == {"city": "Ulm"}
        provider.answer = refuses(429, "slow down", "Retry-After: 3\r\n")
        with pytest.raises(openai.RateLimitError, match="slow down"):
            await client.chat.completions.create(model="pays", messages=ASKED)
        await client.close()


@PROTOCOLS
async def test_the_client_of_anthropic(tmp_path: Path, protocol: str) -> None:
    anthropic: Any = pytest.importorskip("anthropic")
    provider = Provider()
    async with fronted(tmp_path, provider, broken(), protocol=protocol) as front:
        client = anthropic.AsyncAnthropic(base_url=front.base_url, api_key="mine", max_retries=0)
        asked = {"model": "pays", "messages": ASKED, "max_tokens": 9}
        answer = await client.messages.create(**asked)
        assert answer.content[0].text == TEXT
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (INPUTS, OUTPUTS)
        async with client.messages.stream(**asked) as stream:
            assert "".join([text async for text in stream.text_stream]) == TEXT
            assert (await stream.get_final_message()).usage.output_tokens == OUTPUTS
        provider.answer = calls
        tool = {"name": "weather", "description": "of a city", "input_schema": PARAMETERS}
        answer = await client.messages.create(**asked, tools=[tool])
        (use,) = [block for block in answer.content if block.type == "tool_use"]
        assert (use.name, use.input) == ("weather", {"city": "Ulm"})
        provider.answer = refuses(500, "oh no")
        with pytest.raises(anthropic.InternalServerError, match="oh no"):
            await client.messages.create(**asked)
        await client.close()
