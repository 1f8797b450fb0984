"""Clients as their users have them, nothing changed but the address: chat, streams, tools, vectors, errors.

Their libraries are imported by the tests that need them: together they take longer than everything else here.
"""

from __future__ import annotations

import asyncio
import gc
import json
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.daemon import wait_for
from tests.support.gateway import Gateway, gateway_over
from tests.support.relaying import Conversation, Scripted, relaying

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# What these libraries warn of is theirs; most of them leave connections open until the process ends.
pytestmark = pytest.mark.filterwarnings("ignore")

MESSAGES = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "A city."}},
            "required": ["city"],
        },
    },
}
ENDLESS = 1_000_000
DIMENSIONS = 384
NOT_FOUND = "model 'nope' not found; models: minilm:latest, tiny:latest"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Two servers; `big` can be pulled."""
    knobs = {"one": {"pullable": "big"}, "two": {"pullable": "big"}}
    with gateway_over(tmp_path_factory.mktemp("clients"), ("one", "two"), knobs=knobs) as running:
        yield running


@pytest.fixture
def slow(gateway: Gateway) -> Iterator[Gateway]:
    """Answers have no end: who leaves in the middle must not leave anything behind."""
    for server in gateway.servers.values():
        server.set(tokens=ENDLESS, tokens_per_s=50)
    yield gateway
    for server in gateway.servers.values():
        server.set(tokens=32, tokens_per_s=0)


@pytest.fixture(scope="module")
def litellm() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # otherwise it asks the internet when imported
        module = import_module("litellm")
        patch.setattr(module, "suppress_debug_info", value=True)
        yield module
        module.in_memory_llm_clients_cache.flush_cache()
        gc.collect()


@pytest.fixture(autouse=True)
def clients_end_with_their_test() -> Iterator[None]:
    yield
    gc.collect()


def at_rest(gateway: Gateway) -> bool:
    return all(gateway.instance(id_)["in_flight"] == 0 for id_ in gateway.servers)


def calls_a_tool(*, native: bool) -> Scripted:
    """A server whose model wants to know the weather, and then says what it is."""
    call = {"name": "weather", "arguments": {"city": "Paris"}}

    async def answer(talk: Conversation) -> None:
        body = talk.seen.json()
        told = body["messages"][-1]["role"] == "tool"
        assert told or body["tools"][0]["function"]["name"] == "weather"
        message: dict[str, Any] = {"role": "assistant", "content": "It is sunny." if told else ""}
        if native:
            if not told:
                message["tool_calls"] = [{"function": call}]
            line = {"model": "tiny", "created_at": "2026-11-21T08:00:05Z", "message": message}
            await talk.begin()
            await talk.chunk(json.dumps({**line, "done": False}).encode() + b"\n")
            end = {"message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop"}
            await talk.chunk(json.dumps({**line, **end}).encode() + b"\n")
            await talk.end()
            return
        if not told:
            function = {**call, "arguments": json.dumps(call["arguments"])}
            message["tool_calls"] = [{"id": "call_1", "index": 0, "type": "function", "function": function}]
        choice = {"index": 0, "message": message, "finish_reason": "stop" if told else "tool_calls"}
        document = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1795248005,
            "model": "tiny",
            "choices": [choice],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
        await talk.whole(200, json.dumps(document).encode())

    server = Scripted()
    server.answer = answer
    return server


# --- ollama ---------------------------------------------------------------------------------------


def test_ollama_lists_and_manages_models(gateway: Gateway) -> None:
    client = import_module("ollama").Client(host=gateway.url)
    assert {model.model for model in client.list().models} == {"tiny:latest", "minilm:latest"}
    assert client.show("tiny").capabilities == ["completion"]
    statuses = [progress.status for progress in client.pull("big", stream=True)]
    assert (statuses[0], statuses[-1]) == ("pulling manifest", "success")
    assert client.pull("big").status == "success"
    assert client.create(model="brief", from_="big", system="Be brief.").status == "success"
    client.copy("brief", "copied")
    assert {"big:latest", "brief:latest", "copied:latest"} <= {one.model for one in client.list().models}
    assert client.chat(model="copied", messages=MESSAGES).message.content
    for name in ("big", "brief", "copied"):
        assert client.delete(name).status == "success"
    assert {model.model for model in client.list().models} == {"tiny:latest", "minilm:latest"}


def test_ollama_uploads_a_blob_once(gateway: Gateway, tmp_path: Path) -> None:
    file = tmp_path / "weights.gguf"
    file.write_bytes(b"GGUF" + bytes(3_000_000))
    client = import_module("ollama").Client(host=gateway.url)
    digest = client.create_blob(file)
    assert gateway.call("HEAD", f"/api/blobs/{digest}").status_code == 200


def test_ollama_chats_generates_and_embeds(gateway: Gateway) -> None:
    ollama = import_module("ollama")
    client = ollama.Client(host=gateway.url)
    whole = client.chat(model="tiny", messages=MESSAGES)
    assert (whole.done, bool(whole.message.content)) == (True, True)
    parts = list(client.chat(model="tiny", messages=MESSAGES, stream=True))
    assert len(parts) > 10
    assert parts[-1].eval_count == 32
    assert client.generate(model="tiny", prompt="hello").response
    assert sum(len(part.response) > 0 for part in client.generate(model="tiny", prompt="hello", stream=True))
    assert [len(one) for one in client.embed(model="minilm", input=["a", "b"]).embeddings] == [DIMENSIONS] * 2
    assert "tiny:latest" in {model.model for model in client.ps().models}
    with pytest.raises(ollama.ResponseError, match=NOT_FOUND) as caught:
        client.chat(model="nope", messages=MESSAGES)
    assert caught.value.status_code == 404


async def test_ollama_does_the_same_asynchronously(gateway: Gateway) -> None:
    ollama = import_module("ollama")
    client = ollama.AsyncClient(host=gateway.url)
    assert len((await client.list()).models) == 2
    assert (await client.chat(model="tiny", messages=MESSAGES)).message.content
    parts = [part async for part in await client.chat(model="tiny", messages=MESSAGES, stream=True)]
    assert parts[-1].done_reason == "stop"
    assert len((await client.embed(model="minilm", input="x")).embeddings) == 1
    with pytest.raises(ollama.ResponseError, match="model 'nope' not found"):
        await client.show("nope")
    await client._client.aclose()


async def test_ollama_may_stop_reading_in_the_middle(slow: Gateway) -> None:
    client = import_module("ollama").AsyncClient(host=slow.url)
    parts = await client.chat(model="tiny", messages=MESSAGES, stream=True)
    assert (await anext(parts)).message.content
    await parts.aclose()
    await asyncio.to_thread(wait_for, lambda: at_rest(slow))
    await client._client.aclose()


async def test_ollama_calls_tools(tmp_path: Path) -> None:
    async with calls_a_tool(native=True).serving() as server, relaying(tmp_path, {"a": server}) as front:
        client = import_module("ollama").AsyncClient(host=front.base_url)
        parts = [
            part
            async for part in await client.chat(model="tiny", messages=MESSAGES, tools=[WEATHER], stream=True)
        ]
        (call,) = [call for part in parts for call in part.message.tool_calls or ()]
        assert (call.function.name, call.function.arguments) == ("weather", {"city": "Paris"})
        told = [*MESSAGES, parts[0].message, {"role": "tool", "content": "sunny", "tool_name": "weather"}]
        answer = [part async for part in await client.chat(model="tiny", messages=told, stream=True)]
        assert answer[0].message.content == "It is sunny."
        await client._client.aclose()


# --- openai ---------------------------------------------------------------------------------------


def test_openai_lists_chats_and_embeds(gateway: Gateway) -> None:
    openai = import_module("openai")
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0) as client:
        assert {model.id for model in client.models.list()} == {"tiny:latest", "minilm:latest"}
        assert client.models.retrieve("tiny").instances == ["one", "two"]
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES)
        assert answer.choices[0].message.content
        assert answer.usage.completion_tokens == 32
        parts = list(
            client.chat.completions.create(
                model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
            )
        )
        assert parts[-1].usage.completion_tokens == 32
        assert client.responses.create(model="tiny", input="hello").output_text
        vectors = client.embeddings.create(model="minilm", input=["a", "b"]).data
        assert [len(one.embedding) for one in vectors] == [DIMENSIONS] * 2
        with pytest.raises(openai.NotFoundError, match=NOT_FOUND) as caught:
            client.chat.completions.create(model="nope", messages=MESSAGES)
        assert caught.value.type == "not_found_error"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("nope")
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="minilm", messages=MESSAGES)


async def test_openai_does_the_same_asynchronously_and_may_stop_reading(slow: Gateway) -> None:
    openai = import_module("openai")
    async with openai.AsyncOpenAI(base_url=f"{slow.url}/v1", api_key="unused") as client:
        stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        assert (await anext(stream)).choices
        await stream.close()
        await asyncio.to_thread(wait_for, lambda: at_rest(slow))
        vectors = (await client.embeddings.create(model="minilm", input=["a", "b"])).data
        assert [len(one.embedding) for one in vectors] == [DIMENSIONS] * 2


async def test_openai_calls_tools(tmp_path: Path) -> None:
    openai = import_module("openai")
    async with (
        calls_a_tool(native=False).serving() as server,
        relaying(tmp_path, {"a": server}) as front,
        openai.AsyncOpenAI(base_url=f"{front.base_url}/v1", api_key="unused") as client,
    ):
        answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, tools=[WEATHER])
        (call,) = answer.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})
        told = [
            *MESSAGES,
            answer.choices[0].message,
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
        ]
        answer = await client.chat.completions.create(model="tiny", messages=told)
        assert answer.choices[0].message.content == "It is sunny."


# --- litellm --------------------------------------------------------------------------------------


def test_litellm_reaches_both_dialects(gateway: Gateway, litellm: Any) -> None:
    native: dict[str, Any] = {"model": "ollama_chat/tiny", "api_base": gateway.url, "messages": MESSAGES}
    openai = {**native, "model": "openai/tiny", "api_base": f"{gateway.url}/v1", "api_key": "unused"}
    for request in (native, openai):
        answer = litellm.completion(**request)
        assert answer.choices[0].message.content
        assert answer.usage.completion_tokens == 32
        parts = list(litellm.completion(**request, stream=True))
        assert len(parts) > 10
    vectors = litellm.embedding(model="ollama/minilm", api_base=gateway.url, input=["a", "b"]).data
    assert [len(one["embedding"]) for one in vectors] == [DIMENSIONS] * 2
    with pytest.raises(litellm.NotFoundError, match="not found; models: minilm:latest"):
        litellm.completion(**{**native, "model": "ollama_chat/nope"})


async def test_litellm_does_the_same_asynchronously_and_may_stop_reading(slow: Gateway, litellm: Any) -> None:
    where = {"api_base": f"{slow.url}/v1", "api_key": "unused"}
    stream = await litellm.acompletion(model="openai/tiny", messages=MESSAGES, stream=True, **where)
    assert (await anext(stream)).choices
    await stream.aclose()
    await asyncio.to_thread(wait_for, lambda: at_rest(slow))
    vectors = (await litellm.aembedding(model="ollama/minilm", api_base=slow.url, input=["a"])).data
    assert [len(one["embedding"]) for one in vectors] == [DIMENSIONS]


async def test_litellm_calls_tools(tmp_path: Path, litellm: Any) -> None:
    async with calls_a_tool(native=False).serving() as server, relaying(tmp_path, {"a": server}) as front:
        answer = await asyncio.to_thread(
            litellm.completion,
            model="openai/tiny",
            api_base=f"{front.base_url}/v1",
            api_key="unused",
            messages=MESSAGES,
            tools=[WEATHER],
        )
        (call,) = answer.choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {"city": "Paris"}


# --- langchain ------------------------------------------------------------------------------------


def test_langchain_chats_streams_and_embeds(gateway: Gateway) -> None:
    langchain, ollama = import_module("langchain_ollama"), import_module("ollama")
    model = langchain.ChatOllama(model="tiny", base_url=gateway.url, validate_model_on_init=True)
    answer = model.invoke("hello")
    assert answer.content
    assert answer.usage_metadata["output_tokens"] == 32
    assert sum(1 for _ in model.stream("hello")) > 10
    embeddings = langchain.OllamaEmbeddings(model="minilm", base_url=gateway.url)
    assert [len(one) for one in embeddings.embed_documents(["a", "b"])] == [DIMENSIONS] * 2
    with pytest.raises(ollama.ResponseError, match=NOT_FOUND):
        langchain.ChatOllama(model="nope", base_url=gateway.url).invoke("hello")
    with pytest.raises(ValueError, match="nope"):
        langchain.ChatOllama(model="nope", base_url=gateway.url, validate_model_on_init=True)


def test_langchain_may_stop_reading_in_the_middle(slow: Gateway) -> None:
    model = import_module("langchain_ollama").ChatOllama(model="tiny", base_url=slow.url)
    parts = model.stream("hello")
    assert next(parts).content
    parts.close()
    wait_for(lambda: at_rest(slow))


async def test_langchain_does_the_same_asynchronously(slow: Gateway) -> None:
    langchain = import_module("langchain_ollama")
    parts = langchain.ChatOllama(model="tiny", base_url=slow.url).astream("hello")
    assert (await anext(parts)).content
    await parts.aclose()
    await asyncio.to_thread(wait_for, lambda: at_rest(slow))
    embeddings = langchain.OllamaEmbeddings(model="minilm", base_url=slow.url)
    assert [len(one) for one in await embeddings.aembed_documents(["a", "b"])] == [DIMENSIONS] * 2


async def test_langchain_calls_tools(tmp_path: Path) -> None:
    async with calls_a_tool(native=True).serving() as server, relaying(tmp_path, {"a": server}) as front:
        chat = import_module("langchain_ollama").ChatOllama(model="tiny", base_url=front.base_url)
        answer = await chat.bind_tools([WEATHER]).ainvoke("What is the weather in Paris?")
        (call,) = answer.tool_calls
        assert (call["name"], call["args"]) == ("weather", {"city": "Paris"})
