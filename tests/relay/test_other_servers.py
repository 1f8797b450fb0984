"""Servers that speak OpenAI's API and cost nothing: found, watched and used, through the whole gateway."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.inside import until
from tests.support.provider import INPUTS, OUTPUTS, TEXT, Provider, refuses, says_nonsense, stops_early
from tests.support.relaying import Conversation, Front, Reply, Scripted, relaying

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

CHAT, OPENAI, ANTHROPIC = "/api/chat", "/v1/chat/completions", "/v1/messages"
GPT = {"model": "gpt", "messages": [{"role": "user", "content": "hi"}]}
WHOLE = {**GPT, "stream": False}
JSON = {"Content-Type": "application/json"}


@asynccontextmanager
async def fronted(
    home: Path, provider: Provider, local: Scripted | None = None, *, url: str = "", **more: Any
) -> AsyncIterator[Front]:
    """A gateway with the provider as an external server, and perhaps an Ollama."""
    async with provider.serving(), (local or Scripted()).serving() as ollama:
        vllm = {"driver": "external", "protocol": "openai", "url": f"{provider.url}{url}", **more}
        instances: dict[str, Any] = {"vllm": vllm}
        if local is not None:
            instances["ollama"] = {"driver": "external", "url": ollama.url}
        async with relaying(home, {}, config={"instances": instances}) as front:
            for name in instances:
                await until(partial(is_usable, front, name), within_s=20)
            yield front


def is_usable(front: Front, name: str) -> bool:
    instance = front.daemon.fleet.get(name)
    return instance.usable_endpoint() is not None and instance.listed is not None


def is_probed(front: Front, name: str) -> bool:
    return front.daemon.fleet.get(name).is_probed


async def call(front: Front, path: str, method: str = "GET") -> Reply:
    caller = await front.connect()
    await caller.raw(f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{front.port}\r\n\r\n".encode())
    reply = await caller.reply()
    caller.leave()
    return reply


@pytest.mark.parametrize("url", ["", "/v1", "/v1/"])
@pytest.mark.parametrize("health", [200, 404])
async def test_its_models_are_found_and_listed_and_its_health_is_what_it_has(
    tmp_path: Path, url: str, health: int
) -> None:
    provider = Provider(("gpt", "whisper-1"), health=health)
    async with fronted(tmp_path, provider, url=url) as front:
        tags = (await call(front, "/api/tags")).json()["models"]
        assert {"gpt", "whisper-1"} <= {one["name"] for one in tags}
        shown = (await call(front, "/api/runtime/compute/instances/vllm")).json()
        assert (shown["phase"], shown["health"]) == ("ready", "healthy")
        reply = await front.ask(WHOLE, OPENAI)
        assert reply.status == 200
        assert provider.seen[0].target == OPENAI
        assert {*provider.asked} == {"/health", "/v1/models"}


async def test_a_server_without_a_list_has_the_models_that_are_named(tmp_path: Path) -> None:
    provider = Provider(lists=False)
    async with fronted(tmp_path, provider, models=["gpt"]) as front:
        assert (await front.ask(WHOLE)).json()["message"]["content"] == TEXT


@pytest.mark.parametrize("health", [500, 503])
async def test_one_that_says_it_is_unwell_is_not_used(tmp_path: Path, health: int) -> None:
    provider = Provider(health=200)
    async with fronted(tmp_path, provider) as front:
        provider.health = health
        instance = front.daemon.fleet.get("vllm")
        await until(lambda: instance.usable_endpoint() is None, within_s=20)
        assert f"status {health}" in (instance.view().explanation or instance).message  # type: ignore[union-attr]
        assert (await front.ask(WHOLE)).status == 503
        provider.health = 200
        await until(lambda: instance.usable_endpoint() is not None, within_s=20)
        assert (await front.ask(WHOLE)).status == 200


async def test_a_new_key_is_taken_from_its_file(tmp_path: Path) -> None:
    provider, file = Provider(), tmp_path / "key"
    provider.key = "first"
    file.write_text("first\n")
    async with fronted(tmp_path, provider, key_file=str(file)) as front:
        instance: Any = front.daemon.fleet.get("vllm")
        for key in ("first", "second"):
            file.write_text(f"{key}\n")
            provider.key = key
            await until(lambda: instance._key.value == provider.key, within_s=20)
            assert (await front.ask(WHOLE)).status == 200
            assert provider.seen[-1].header("authorization") == f"Bearer {key}"


async def test_its_key_is_needed_used_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = Provider()
    provider.key = "k-secret-4711"
    monkeypatch.setenv("VLLM_KEY", provider.key)
    async with fronted(tmp_path, provider, key_env="VLLM_KEY") as front:
        reply = await front.ask(WHOLE, headers={"Authorization": "Bearer of-the-client"})
        assert reply.status == 200
        assert provider.seen[0].header("authorization") == "Bearer k-secret-4711"
        assert provider.seen[0].header("x-request-id") is not None, "it is one of ours, and can be traced"
        provider.key = "another"
        instance = front.daemon.fleet.get("vllm")
        await until(lambda: instance.usable_endpoint() is None, within_s=20)
        shown = json.dumps((await call(front, "/api/runtime/compute/instances/vllm")).json())
        assert "refuses the key" in shown
        assert "4711" not in shown


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, OPENAI, ANTHROPIC, "/v1/responses"])
async def test_every_dialect_is_served(tmp_path: Path, path: str, stream: bool) -> None:
    body: dict[str, Any] = {"model": "gpt", "stream": stream}
    body |= {"input": "hi"} if path == "/v1/responses" else {"messages": GPT["messages"]}
    body |= {"max_tokens": 9} if path == ANTHROPIC else {}
    async with fronted(tmp_path, Provider()) as front:
        reply = await front.ask(body, path)
        assert (reply.status, reply.whole) == (200, True), reply.body
        assert (reply.headers["x-provider"], reply.headers["x-instance"]) == ("local", "vllm")
        assert (await front.record()).outcome == "ok"
        if not (path == OPENAI and stream):  # nobody asked it for its usage there
            record = await front.record()
            assert (record.input_tokens, record.output_tokens) == (INPUTS, OUTPUTS)


async def test_the_bytes_of_the_same_dialect_pass_as_they_came(tmp_path: Path) -> None:
    provider = Provider()
    async with fronted(tmp_path, provider) as front:
        body = b'{"model":"gpt", "odd":  [1,2],"messages":[],"top_k": 3}'
        reply = await front.ask(body, OPENAI)
        assert provider.seen[0].body == body
        assert reply.json()["model"] == "gpt-dated"


@pytest.mark.parametrize("path", ["/api/embed", "/api/embeddings", "/v1/embeddings"])
async def test_vectors_come_in_every_dialect(tmp_path: Path, path: str) -> None:
    field = "prompt" if path == "/api/embeddings" else "input"
    async with fronted(tmp_path, Provider()) as front:
        reply = await front.ask({"model": "gpt", field: "text"}, path)
        assert reply.status == 200, reply.body
        # Ollama normalises the vectors of /api/embed, and only those.
        assert (b"0.4472135" if path == "/api/embed" else b"0.25") in reply.body


async def test_a_transcription_passes_to_a_whisper_server(tmp_path: Path) -> None:
    provider = Provider(("whisper-1",))

    async def hears(talk: Conversation) -> None:
        await talk.whole(200, b'{"text":"hello"}')

    provider.answer = hears
    form = (
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n--b--\r\n'
    )
    async with fronted(tmp_path, provider, serves=["transcribe"]) as front:
        kind = {"Content-Type": "multipart/form-data; boundary=b"}
        reply = await front.ask(form, "/v1/audio/transcriptions", kind)
        assert (reply.status, reply.json()) == (200, {"text": "hello"}), reply.body
        assert reply.headers["x-provider"] == "local"
        assert provider.seen[0].target == "/v1/audio/transcriptions"
        assert provider.seen[0].body == form
        assert (await front.ask({**WHOLE, "model": "whisper-1"})).status == 422


async def test_a_redirect_is_followed_by_nobody(tmp_path: Path) -> None:
    provider, other = Provider(), Provider()
    async with other.serving(), fronted(tmp_path, provider) as front:
        provider.answer = refuses(302, "go", f"Location: {other.url}{OPENAI}\r\n")
        for path in (CHAT, OPENAI):
            reply = await front.ask(WHOLE, path)
            assert reply.status == 502
            assert "location" not in reply.headers
        assert other.seen == []


async def test_what_cannot_be_said_there_goes_elsewhere_or_is_refused_by_its_name(tmp_path: Path) -> None:
    provider, local = Provider(), Scripted(("gpt",))
    body = {**WHOLE, "options": {"mirostat": 1}}
    async with fronted(tmp_path, provider, local, priority=9) as front:
        reply = await front.ask(WHOLE)
        assert reply.headers["x-instance"] == "vllm"
        reply = await front.ask(body)
        assert (reply.status, reply.headers["x-instance"]) == (200, "ollama"), reply.body
        reply = await front.ask({**body, "model": "gpt@vllm"})
        assert reply.status == 400
        assert "mirostat" in reply.json()["error"]
        assert len(provider.seen) == 1
        await until(lambda: front.at_rest)


@pytest.mark.parametrize("answer", [says_nonsense, refuses(500, "oh no")])
async def test_a_failure_is_told_in_the_clients_words(tmp_path: Path, answer: Any) -> None:
    provider = Provider()
    async with fronted(tmp_path, provider) as front:
        provider.answer = answer
        for path, more in ((CHAT, {}), (ANTHROPIC, {"max_tokens": 5})):
            reply = await front.ask({**WHOLE, **more}, path)
            assert reply.status in (500, 502)
            assert reply.json()["error"]
            assert (reply.json().get("type") == "error") is (path == ANTHROPIC)


async def test_a_stream_without_its_end_is_cut(tmp_path: Path) -> None:
    provider = Provider()
    async with fronted(tmp_path, provider) as front:
        provider.answer = stops_early
        reply = await front.ask(GPT)
        assert "before its end" in reply.lines()[-1]["error"]
        assert (await front.record()).outcome == "upstream_error"


async def test_nothing_is_loaded_unloaded_or_pulled_there(tmp_path: Path) -> None:
    provider = Provider()
    async with fronted(tmp_path, provider) as front:
        reply = await front.ask({"model": "gpt", "messages": []})
        assert (reply.status, reply.json()["done_reason"]) == (200, "load")
        reply = await front.ask({"model": "gpt", "keep_alive": 0})
        assert (reply.status, reply.json()["done_reason"]) == (200, "unload")
        assert provider.seen == []


async def test_a_model_is_shown_as_far_as_it_is_known(tmp_path: Path) -> None:
    """`ollama run` begins with this, and ends where it is refused."""
    provider = Provider()
    async with fronted(tmp_path, provider) as front:
        for asked in ({"model": "gpt"}, {"name": "gpt:latest"}):
            reply = await front.ask(asked, "/api/show", JSON)
            assert (reply.status, reply.headers["x-instance"]) == (200, "vllm"), reply.body
            shown = reply.json()
            assert shown["capabilities"] == ["completion"]
            assert (shown["model_info"], shown["details"]["format"]) == ({}, "")
            assert (await front.record()).outcome == "ok"
        assert (await front.ask({"model": "none"}, "/api/show", JSON)).status == 404
        assert provider.seen == []


async def test_another_manager_is_an_instance_with_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER_KEY", "om-of-the-other")
    far = Scripted()
    (tmp_path / "inner").mkdir()
    (tmp_path / "outer").mkdir()
    async with far.serving(), relaying(tmp_path / "inner", {"far": far}, key="om-of-the-other") as inner:
        for key_env, status in (("OTHER_KEY", 200), (None, 503)):
            other: Mapping[str, Any] = {"driver": "external", "url": inner.base_url}
            other = {**other, "key_env": key_env} if key_env else other
            async with relaying(tmp_path / "outer", {}, config={"instances": {"other": other}}) as outer:
                await until(partial(is_probed, outer, "other"), within_s=20)
                if key_env:
                    await until(partial(is_usable, outer, "other"), within_s=20)
                reply = await outer.ask({"model": "tiny", "stream": False})
                assert reply.status == status, reply.body


async def test_an_answer_of_megabytes_is_read_beside_the_event_loop(tmp_path: Path) -> None:
    provider = Provider()
    vector = [0.25] * 200_000

    async def embeds(talk: Conversation) -> None:
        data = [{"object": "embedding", "index": 0, "embedding": vector}]
        document = {"object": "list", "data": data, "model": "gpt", "usage": {"prompt_tokens": INPUTS}}
        await talk.whole(200, json.dumps(document).encode(), "Content-Type: application/json\r\n")

    provider.answer = embeds
    async with fronted(tmp_path, provider) as front:
        reply = await front.ask({"model": "gpt", "prompt": "text"}, "/api/embeddings")
        assert reply.status == 200
        assert reply.json()["embedding"] == vector
        assert (await front.record()).input_tokens == INPUTS
