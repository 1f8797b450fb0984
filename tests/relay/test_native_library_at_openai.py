"""The library of Ollama at a server that speaks OpenAI's API only, through the whole gateway."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from ollama import AsyncClient, ResponseError

from tests.support.provider import INPUTS, OUTPUTS, TEXT, WORDS, Provider, chunk, event, is_cut, refuses
from tests.support.relaying import Conversation, relaying

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

HI = [{"role": "user", "content": "hi"}]
PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452")
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}


@asynccontextmanager
async def library(home: Path, server: Provider) -> AsyncIterator[AsyncClient]:
    """The library, at a gateway with nothing behind it but the server."""
    async with server.serving():
        instances = {"vllm": {"driver": "external", "protocol": "openai", "url": server.url}}
        async with (
            relaying(home, {"vllm": server}, config={"instances": instances}) as front,
            AsyncClient(host=f"http://127.0.0.1:{front.port}") as client,
        ):
            yield client


def asked(server: Provider) -> dict[str, Any]:
    return server.seen[-1].json()  # type: ignore[no-any-return]


async def test_a_stream(tmp_path: Path) -> None:
    async with library(tmp_path, server := Provider()) as client:
        stream = await client.chat(
            "gpt", HI, stream=True, keep_alive="5m", options={"num_ctx": 512, "seed": 1}
        )
        parts = [part async for part in stream]
        assert [part.message.content for part in parts] == [*WORDS, ""]
        last = parts[-1]
        assert (last.done, last.done_reason, last.model) == (True, "stop", "gpt")
        assert (last.prompt_eval_count, last.eval_count) == (INPUTS, OUTPUTS)
        assert last.total_duration is not None
        assert server.seen[-1].target == "/v1/chat/completions"
        assert asked(server) == {
            "model": "gpt",
            "messages": HI,
            "stream": True,
            "stream_options": {"include_usage": True},
            "seed": 1,
        }


async def test_a_whole_answer_to_a_prompt_with_an_image(tmp_path: Path) -> None:
    async with library(tmp_path, server := Provider()) as client:
        answer = await client.generate(
            "gpt", "what?", system="be nice", images=[PNG], format="json", think=False
        )
        assert (answer.response, answer.done_reason, answer.eval_count) == (TEXT, "stop", OUTPUTS)
        messages = asked(server)["messages"]
        assert messages[0] == {"role": "system", "content": "be nice"}
        assert messages[1]["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")
        assert asked(server)["response_format"] == {"type": "json_object"}
        assert asked(server)["reasoning_effort"] == "none"


async def test_a_tool_is_called_and_answered(tmp_path: Path) -> None:
    async def calls(talk: Conversation) -> None:
        await talk.begin("text/event-stream")
        call = {"index": 0, "id": "a", "type": "function", "function": {"name": "weather", "arguments": ""}}
        deltas: list[dict[str, Any]] = [{"reasoning": "hm"}, {"tool_calls": [call]}]
        pieces = ('{"city"', ':"Köln"}')
        deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": piece}}]} for piece in pieces]
        for delta in deltas:
            await talk.chunk(chunk(delta))
        await talk.chunk(chunk({}, "tool_calls") + event("[DONE]"))
        await talk.end()

    async with library(tmp_path, server := Provider()) as client:
        speaks, server.answer = server.answer, calls
        stream = await client.chat("gpt", HI, tools=[TOOL], think=True, stream=True)
        parts = [part async for part in stream]
        assert [part.message.thinking for part in parts] == ["hm", None, None]
        (call,) = parts[1].message.tool_calls or ()
        assert (call.function.name, call.function.arguments) == ("weather", {"city": "Köln"})
        server.answer = speaks
        result = {"role": "tool", "tool_name": "weather", "content": "rain"}
        answer = await client.chat("gpt", [*HI, parts[1].message, result])
        assert answer.message.content == TEXT
        called, answered = asked(server)["messages"][1:]
        assert called["tool_calls"][0]["id"] == answered["tool_call_id"]
        assert json.loads(called["tool_calls"][0]["function"]["arguments"]) == {"city": "Köln"}


async def test_vectors(tmp_path: Path) -> None:
    async with library(tmp_path, server := Provider()) as client:
        found = await client.embed("gpt", ["a", "b"])
        for vector in found.embeddings:
            assert vector == pytest.approx([0.894427191, 0.447213595])
        assert len(found.embeddings) == 2
        assert found.prompt_eval_count == INPUTS
        assert list((await client.embeddings("gpt", "a")).embedding) == [0.5, 0.25]
        assert asked(server) == {"model": "gpt", "input": ["a"]}


async def test_loads_reach_no_server(tmp_path: Path) -> None:
    async with library(tmp_path, server := Provider()) as client:
        assert (await client.generate("gpt")).done_reason == "load"
        assert (await client.generate("gpt", keep_alive=0)).done_reason == "unload"
        assert (await client.chat("gpt", [])).done_reason == "load"
        assert server.seen == []


async def test_errors(tmp_path: Path) -> None:
    async with library(tmp_path, server := Provider()) as client:
        with pytest.raises(ResponseError, match="raw: true cannot be passed on") as refused:
            await client.generate("gpt", "hi", raw=True)
        assert refused.value.status_code == 400
        assert server.seen == []
        server.answer = refuses(400, "messages are too long")
        with pytest.raises(ResponseError, match="messages are too long") as refused:
            await client.chat("gpt", HI)
        assert refused.value.status_code == 400
        server.answer = is_cut
        with pytest.raises(ResponseError):
            async for _ in await client.chat("gpt", HI, stream=True):
                pass
