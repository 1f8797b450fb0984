"""Paid servers as the last resort, through the whole gateway over real sockets."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from manager.errors import Reason
from tests.support.inside import until
from tests.support.provider import (
    INPUTS,
    OUTPUTS,
    TEXT,
    WORDS,
    Provider,
    event,
    is_cut,
    openai_answer,
    openai_events,
    refuses,
    says_nonsense,
    speaks,
    stops_early,
)
from tests.support.relaying import Conversation, Front, Reply, Scripted, a_word, relaying

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
    from pathlib import Path

KEY = "sk-very-secret-0123456789"
TINY = {"model": "pays", "messages": [{"role": "user", "content": "hi"}]}
WHOLE = {**TINY, "stream": False}
PRICES = {"input_usd_per_mtok": 1.0, "output_usd_per_mtok": 2.0, "max_output_tokens": 64}
CHAT, OPENAI, ANTHROPIC = "/api/chat", "/v1/chat/completions", "/v1/messages"
SETTINGS = "/api/settings/models"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROVIDER_KEY", KEY)


@asynccontextmanager
async def fronted(
    home: Path,
    provider: Provider,
    local: Scripted | None = None,
    *,
    protocol: str = "openai",
    role: Mapping[str, Any] | None = None,
    cloud: Mapping[str, Any] | None = None,
    slots: int | None = None,
    **sections: Any,
) -> AsyncIterator[Front]:
    """A gateway with one local server, and the provider behind it."""
    local = local or Scripted()
    async with local.serving(), provider.serving():
        instances = {
            "home": {"driver": "external", "url": local.url, "slots": slots},
            "paid": {
                "driver": "cloud",
                "protocol": protocol,
                "url": provider.url,
                "key_env": "PROVIDER_KEY",
                "models": {"gpt": {**PRICES, "for": ["pays", "emergency"]}},
                **(cloud or {}),
            },
        }
        roles = {
            "pays": {"model": "tiny", "paid_fallback": True, **(role or {})},
            "free": {"model": "tiny"},
            "emergency": {"paid_fallback": True},
        }
        config = {"instances": instances, "roles": roles, "fallback": {"enabled": True}, **sections}
        async with relaying(home, {"home": local}, config=config) as front:
            await until(lambda: front.daemon.fleet.get("paid").usable_endpoint() is not None)
            yield front


async def fails(talk: Conversation) -> None:
    await talk.whole(500, b'{"error":"something went wrong"}')


async def lacks(talk: Conversation) -> None:
    await talk.whole(404, b'{"error":"model not found"}')


async def cannot_load(talk: Conversation) -> None:
    await talk.whole(500, b'{"error":"model failed to load"}')


async def dies(talk: Conversation) -> None:
    talk.crash()


def broken(answer: Callable[[Conversation], Awaitable[None]] = fails) -> Scripted:
    local = Scripted()
    local.answer = answer
    return local


async def get(front: Front, path: str) -> Any:
    caller = await front.connect()
    await caller.raw(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{front.port}\r\n\r\n".encode())
    reply = await caller.reply()
    caller.leave()
    return reply.json()


async def ended(front: Front, run: str) -> Any:
    """A run, once it has ended."""
    async with asyncio.timeout(30):
        while True:
            shown = await get(front, f"/api/v1/runs/{run}")
            if shown["status"] not in ("queued", "running"):
                return shown
            await asyncio.sleep(0.02)


def limit(path: str, tokens: int = 5) -> dict[str, int]:
    """The limit of an answer, which a native client does not say like that."""
    return {} if path == CHAT else {"max_tokens": tokens}


def said(reply: Reply) -> str:
    """The text of a native answer."""
    return "".join(line["message"]["content"] for line in reply.lines())


async def test_while_something_local_answers_nothing_is_paid(tmp_path: Path) -> None:
    provider = Provider()
    async with fronted(tmp_path, provider) as front:
        reply = await front.ask(WHOLE)
        assert (reply.status, reply.headers["x-provider"]) == (200, "local")
        assert provider.seen == []
        assert provider.asked == [], "a paid server is never probed"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (fails, Reason.UPSTREAM_ERROR),
        (lacks, Reason.MODEL_MISSING),
        (cannot_load, Reason.MODEL_LOAD_FAILED),
        (dies, Reason.UPSTREAM_UNREACHABLE),
    ],
)
async def test_each_local_failure_leads_to_the_cloud_and_is_the_reason(
    tmp_path: Path, answer: Callable[[Conversation], Awaitable[None]], reason: Reason
) -> None:
    provider = Provider()
    async with fronted(tmp_path, provider, broken(answer)) as front:
        reply = await front.ask(WHOLE)
        assert reply.status == 200, reply.body
        assert reply.json()["message"]["content"] == TEXT
        assert reply.headers["x-provider"] == "paid"
        assert reply.headers["x-instance"] == "paid"
        assert reply.headers["x-model"] == "gpt"
        assert reply.headers["x-fallback-reason"] == reason
        record = await front.record()
        assert (record.provider, record.fallback, record.fallback_reason) == ("paid", True, reason)
        assert (record.input_tokens, record.output_tokens) == (INPUTS, OUTPUTS)
        assert record.outcome == "ok"
        assert front.kinds().count("cloud_used") == 1
    assert len(provider.seen) == 1


async def test_a_local_server_that_is_down_or_too_slow_leads_there_too(tmp_path: Path) -> None:
    async def sleeps(talk: Conversation) -> None:
        await talk.left()

    provider = Provider()
    role = {"attempt_timeouts_s": [0.3]}
    async with fronted(tmp_path, provider, broken(sleeps), role=role) as front:
        reply = await front.ask(WHOLE)
        assert reply.headers["x-fallback-reason"] == "attempt_timeout"
        assert reply.headers["x-provider"] == "paid"


async def test_a_stream_comes_as_the_client_asked_for_it(tmp_path: Path) -> None:
    async with fronted(tmp_path, Provider(), broken()) as front:
        reply = await front.ask(TINY)
        assert reply.headers["content-type"].startswith("application/x-ndjson")
        assert said(reply) == TEXT
        last = reply.lines()[-1]
        assert (last["done"], last["prompt_eval_count"], last["eval_count"]) == (True, INPUTS, OUTPUTS)
        record = await front.record()
        assert (record.input_tokens, record.output_tokens, record.stream) == (INPUTS, OUTPUTS, True)


@pytest.mark.parametrize("protocol", ["openai", "anthropic"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, "/api/generate", OPENAI, "/v1/responses", ANTHROPIC])
async def test_every_dialect_reaches_every_protocol(
    tmp_path: Path, protocol: str, path: str, stream: bool
) -> None:
    provider = Provider()
    body: dict[str, Any] = {"model": "pays", "stream": stream}
    if path == "/api/generate":
        body["prompt"] = "hi"
    elif path == "/v1/responses":
        body["input"] = "hi"
    else:
        body |= {"messages": TINY["messages"], **limit(path, 1000)}
    async with fronted(tmp_path, provider, broken(), protocol=protocol) as front:
        reply = await front.ask(body, path)
        assert (reply.status, reply.whole) == (200, True), reply.body
        text = reply.body.decode("unicode_escape") if b"\\u" in reply.body else reply.body.decode()
        for word in WORDS if stream else (TEXT,):
            assert word in text
        assert ("content-length" in reply.headers) is not stream
        record = await front.record()
        assert (record.input_tokens, record.output_tokens) == (INPUTS, OUTPUTS)
        assert record.outcome == "ok"
        await until(lambda: front.at_rest)
    (seen,) = provider.seen
    assert seen.target == {"openai": "/v1/chat/completions", "anthropic": "/v1/messages"}[protocol] or (
        path == "/v1/responses" and seen.target in ("/v1/responses", "/v1/chat/completions", "/v1/messages")
    )
    asked = seen.json()
    assert asked["model"] == "gpt"
    limits = {asked.get(name) for name in ("max_tokens", "max_completion_tokens", "max_output_tokens")}
    assert limits - {None} == {64}, "a paid request always has a limit, and no higher one"


@pytest.mark.parametrize(
    ("protocol", "name", "value"),
    [("openai", "authorization", f"Bearer {KEY}"), ("anthropic", "x-api-key", KEY)],
)
async def test_the_providers_key_is_sent_and_nothing_of_the_client(
    tmp_path: Path, protocol: str, name: str, value: str
) -> None:
    provider = Provider()
    mine = {
        "Authorization": "Bearer of-the-client",
        "X-Api-Key": "of-the-client",
        "Cookie": "of-the-client",
        "X-Mine": "of-the-client",
        "User-Agent": "of-the-client",
        "Accept-Encoding": "gzip",
        "anthropic-version": "of-the-client",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }
    async with fronted(tmp_path, provider, broken(), protocol=protocol) as front:
        for path in (CHAT, OPENAI, ANTHROPIC):
            body = {**WHOLE, **limit(path)}
            assert (await front.ask(body, path, mine)).status == 200
        assert len(provider.seen) == 3
        for seen in provider.seen:
            assert seen.header(name) == value
            told = json.dumps(seen.headers)
            assert "of-the-client" not in told
            assert "0af7651916cd43dd" not in told
            assert (seen.header("anthropic-version") is not None) is (protocol == "anthropic")
        shown = json.dumps([await get(front, path) for path in (SETTINGS, f"{SETTINGS}/effective")])
        shown += json.dumps(await get(front, "/api/runtime/compute/instances"))
        shown += json.dumps([vars(one) for one in front.records], default=str)
        shown += json.dumps([one.detail for one in front.daemon.backend.journal._recent])
        assert KEY not in shown


async def test_the_usage_that_a_paid_stream_needs_is_hidden_from_a_client_that_did_not_ask(
    tmp_path: Path,
) -> None:
    provider = Provider()
    async with fronted(tmp_path, provider, broken()) as front:
        reply = await front.ask({**TINY, "stream": True}, OPENAI)
        assert provider.seen[0].json()["stream_options"] == {"include_usage": True}
        assert b'"usage"' not in reply.body
        assert reply.body.endswith(b"data: [DONE]\n\n")
        record = await front.record()
        assert (record.input_tokens, record.output_tokens) == (INPUTS, OUTPUTS)
        asked = {**TINY, "stream": True, "stream_options": {"include_usage": True}}
        reply = await front.ask(asked, OPENAI)
        assert reply.body.count(b'"usage"') == 1


@pytest.mark.parametrize("fallback", [{"enabled": False}, {"enabled": True, "force_local": True}])
async def test_the_settings_keep_the_cloud_away(tmp_path: Path, fallback: dict[str, Any]) -> None:
    provider = Provider()
    async with fronted(tmp_path, provider, broken(), fallback=fallback) as front:
        reply = await front.ask(WHOLE)
        assert (reply.status, reply.headers["x-provider"]) == (500, "local")
        assert provider.seen == []


async def test_force_local_is_a_live_switch_and_wins(tmp_path: Path) -> None:
    provider = Provider()
    async with fronted(tmp_path, provider, broken()) as front:
        changed = await front.ask({"force_local": True}, SETTINGS, JSON)
        assert (changed.status, changed.json()["force_local"]) == (200, True), changed.body
        assert changed.json()["fallback"] == {"enabled": True, "force_local": True, "order": []}
        effective = await get(front, f"{SETTINGS}/effective")
        assert effective["force_local"] == {"value": True, "source": "override"}
        assert effective["fallback"]["enabled"] == {"value": True, "source": "file"}
        assert (await front.ask(WHOLE)).status == 500
        reply = await front.ask({**WHOLE, "model": "emergency"})
        assert reply.status == 403
        assert reply.json()["error"].endswith("fallback.force_local is on (local_only)")
        assert provider.seen == []
        await front.ask({"fallback": {"force_local": None}}, SETTINGS, JSON)
        assert (await front.ask(WHOLE)).headers["x-provider"] == "paid"
        two = await front.ask({"force_local": True, "fallback": {"force_local": False}}, SETTINGS, JSON)
        assert two.status == 422


async def test_a_request_can_forbid_it_for_itself(tmp_path: Path) -> None:
    provider = Provider()
    async with fronted(tmp_path, provider, broken()) as front:
        reply = await front.ask(WHOLE, headers={"X-Local-Only": "true"})
        assert (reply.status, reply.headers["x-provider"]) == (500, "local")
        reply = await front.ask({**WHOLE, "model": "emergency"}, headers={"X-Local-Only": "true"})
        assert reply.status == 403
        assert "(local_only)" in reply.json()["error"]
        assert provider.seen == []


@pytest.mark.parametrize("model", ["gpt", "gpt@paid", "tiny@paid", "free@paid"])
async def test_a_name_or_a_pin_grants_nothing(tmp_path: Path, model: str) -> None:
    provider = Provider()
    async with fronted(tmp_path, provider) as front:
        for path in (CHAT, OPENAI, ANTHROPIC):
            reply = await front.ask({**WHOLE, "model": model, **limit(path)}, path)
            assert reply.status == 403, (path, reply.body)
            assert b"costs money" in reply.body
        assert provider.seen == []


async def test_a_role_of_the_cloud_alone_is_answered_there(tmp_path: Path) -> None:
    async with fronted(tmp_path, Provider()) as front:
        reply = await front.ask({**WHOLE, "model": "emergency"})
        assert (reply.status, reply.headers["x-fallback-reason"]) == (200, "model_missing")
        assert reply.headers["x-provider"] == "paid"


@pytest.mark.parametrize(
    ("answer", "status", "told"),
    [
        (refuses(429, "slow down", "Retry-After: 7\r\n"), 429, "slow down"),
        (refuses(500, "oh no"), 500, "oh no"),
        (refuses(529, "overloaded"), 503, "overloaded"),
        (refuses(400, "context too long"), 400, "context too long"),
        (refuses(401, f"bad key {KEY}"), 502, "refuses the manager's key"),
        (refuses(402, "pay first"), 502, "refuses the manager's key or account"),
        (refuses(307, "elsewhere", "Location: http://127.0.0.1:1/steal\r\n"), 502, "is not followed"),
        (dies, 502, "paid"),
        (says_nonsense, 502, "paid: "),
    ],
)
@pytest.mark.parametrize("path", [CHAT, OPENAI, ANTHROPIC])
async def test_what_has_been_paid_for_is_asked_once_and_its_error_told_in_the_clients_words(
    tmp_path: Path, answer: Any, status: int, told: str, path: str
) -> None:
    if answer is says_nonsense and path == OPENAI:
        pytest.skip("the bytes of the same dialect pass as they are")
    provider = Provider()
    provider.answer = answer
    async with fronted(tmp_path, provider) as front:
        reply = await front.ask({**WHOLE, "model": "emergency", **limit(path)}, path)
        assert reply.status == status, reply.body
        error = reply.json()["error"]
        message = error if isinstance(error, str) else error["message"]
        assert told in message
        assert KEY not in reply.body.decode()
        assert (reply.json().get("type") == "error") is (path == ANTHROPIC)
        if status == 429:
            assert reply.headers["retry-after"] == "7"
        assert "location" not in reply.headers
        assert len(provider.seen) == 1, "a request that costs money is never sent twice"
        record = await front.record()
        assert record.provider == "paid"
        await until(lambda: front.at_rest)


@pytest.mark.parametrize("answer", [is_cut, stops_early])
@pytest.mark.parametrize("protocol", ["openai", "anthropic"])
@pytest.mark.parametrize("path", [CHAT, OPENAI, ANTHROPIC])
async def test_a_stream_that_is_cut_is_never_taken_for_whole(
    tmp_path: Path, answer: Any, protocol: str, path: str
) -> None:
    provider = Provider()
    provider.answer = answer
    async with fronted(tmp_path, provider, broken(), protocol=protocol) as front:
        reply = await front.ask({**TINY, "stream": True, **limit(path)}, path)
        assert reply.status == 200
        assert b'"error"' in reply.body
        assert b"[DONE]" not in reply.body
        assert b"message_stop" not in reply.body
        assert b'"done":true' not in reply.body
        record = await front.record()
        assert record.outcome == "upstream_error"
        assert record.output_tokens, "a cut answer is settled on what was seen"
        await until(lambda: front.at_rest)


@pytest.mark.parametrize("path", [CHAT, OPENAI, ANTHROPIC])
async def test_an_error_amid_a_stream_is_told(tmp_path: Path, path: str) -> None:
    async def breaks_off(talk: Conversation) -> None:
        await talk.begin("text/event-stream")
        await talk.chunk(openai_events(usage=False)[1])
        await talk.chunk(event({"error": {"message": "boom", "type": "server_error"}}))
        await talk.end()

    provider = Provider()
    provider.answer = breaks_off
    async with fronted(tmp_path, provider, broken()) as front:
        reply = await front.ask({**TINY, "stream": True, **limit(path)}, path)
        assert b"boom" in reply.body
        assert (await front.record()).outcome == "upstream_error"
        await until(lambda: front.at_rest)


@pytest.mark.parametrize(
    "usage", [None, "many", {"prompt_tokens": -5, "completion_tokens": "x"}, {"prompt_tokens": 10**30}]
)
@pytest.mark.parametrize("path", [CHAT, OPENAI])
async def test_a_wrong_count_of_tokens_spoils_no_answer(tmp_path: Path, path: str, usage: Any) -> None:
    async def miscounts(talk: Conversation) -> None:
        await talk.whole(200, json.dumps({**openai_answer(), "usage": usage}).encode())

    provider = Provider()
    provider.answer = miscounts
    async with fronted(tmp_path, provider, broken()) as front:
        reply = await front.ask(WHOLE, path)
        assert (reply.status, TEXT.split()[0].encode() in reply.body) == (200, True)
        record = await front.record()
        assert record.outcome == "ok"
        assert min(record.input_tokens or 0, record.output_tokens or 0) >= 0
        assert max(record.input_tokens or 0, record.output_tokens or 0) < 2**60


async def test_a_provider_that_is_too_slow_is_given_up_and_asked_no_second_time(tmp_path: Path) -> None:
    async def sleeps(talk: Conversation) -> None:
        await talk.left()

    provider = Provider()
    provider.answer = sleeps
    local = broken(lacks)
    async with fronted(tmp_path, provider, local, role={"attempt_timeouts_s": [0.3]}) as front:
        reply = await front.ask(WHOLE)
        assert (reply.status, reply.headers["x-provider"]) == (504, "paid")
        assert len(provider.seen) == 1
        await until(lambda: front.at_rest)


async def test_two_providers_are_tried_in_order_only_while_nothing_was_sent(tmp_path: Path) -> None:
    provider, down = Provider(), Provider()
    async with down.serving():
        pass  # nobody listens there any more
    async with provider.serving():
        pass
    one = {
        "driver": "cloud",
        "protocol": "openai",
        "url": down.url,
        "key_env": "PROVIDER_KEY",
        "models": {"gpt": {**PRICES, "for": ["pays"]}},
    }
    local = broken()
    async with provider.serving(), local.serving():
        config = {
            "instances": {
                "home": {"driver": "external", "url": local.url},
                "down": one,
                "up": {**one, "url": provider.url},
            },
            "roles": {"pays": {"model": "tiny", "paid_fallback": True}},
            "fallback": {"enabled": True, "order": ["down", "up"]},
        }
        async with relaying(tmp_path, {"home": local}, config=config) as front:
            await until(lambda: front.daemon.fleet.get("up").usable_endpoint() is not None)
            reply = await front.ask(WHOLE)
            assert (reply.status, reply.headers["x-provider"]) == (200, "up"), reply.body
            assert len(provider.seen) == 1
            provider.answer = refuses(500)
            down.port = int(down.url.rpartition(":")[2])
            async with down.serving():  # both are there now, and the first one fails
                front.daemon.backend.passing.routing.breakers.reset("down")
                down.answer = refuses(500)
                reply = await front.ask(WHOLE)
                assert (reply.headers["x-provider"], reply.status) == ("down", 500)
                assert (len(down.seen), len(provider.seen)) == (1, 1), "what was sent is sent nowhere else"


async def test_a_paid_request_is_not_risked_on_a_connection_that_was_kept(tmp_path: Path) -> None:
    provider = Provider()
    async with fronted(tmp_path, provider) as front:
        for _ in range(3):
            assert (await front.ask({**WHOLE, "model": "emergency"})).status == 200
        assert provider.accepted == 3


async def test_the_breaker_keeps_a_failing_provider_away(tmp_path: Path) -> None:
    provider = Provider()
    provider.answer = refuses(500)
    async with fronted(tmp_path, provider, broken(lacks)) as front:
        for _ in range(2):
            await front.ask(WHOLE)
        assert len(provider.seen) == 2
        await front.ask(WHOLE)
        assert len(provider.seen) == 2
        shown = await get(front, "/api/runtime/compute/instances/paid")
        assert (shown["breaker"]["state"], shown["health"]) == ("open", "unhealthy")


@pytest.mark.parametrize(
    ("limits", "slots", "status"),
    [
        ({"concurrency": 1, "queue": {"length": 0, "wait_s": 1}}, None, 429),
        ({"queue": {"length": 0, "wait_s": 1}}, 1, 429),
        ({"queue": {"length": 1, "wait_s": 0.2}}, 1, 503),
    ],
)
async def test_a_busy_lane_does_not_spill_into_the_cloud(
    tmp_path: Path, limits: dict[str, Any], slots: int | None, status: int
) -> None:
    provider, local = Provider(), Scripted()
    held = asyncio.Event()

    async def waits(talk: Conversation) -> None:
        await held.wait()
        await a_word(talk)

    local.answer = waits
    async with fronted(tmp_path, provider, local, role=limits, slots=slots) as front:
        first = asyncio.ensure_future(front.ask(WHOLE))
        await until(lambda: len(local.seen) == 1)
        reply = await front.ask(WHOLE)
        assert reply.status == status
        held.set()
        assert (await first).status == 200
        assert provider.seen == []


async def test_a_missing_key_makes_it_unavailable_and_a_new_one_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "key"
    provider = Provider()
    local = broken(lacks)
    async with local.serving(), provider.serving():
        paid = {
            "driver": "cloud",
            "protocol": "openai",
            "url": f"{provider.url}/v1",
            "key_file": str(file),
            "models": {"gpt": {**PRICES, "for": ["pays"]}},
        }
        config = {
            "instances": {"home": {"driver": "external", "url": local.url}, "paid": paid},
            "roles": {"pays": {"model": "tiny", "paid_fallback": True}},
            "fallback": {"enabled": True},
        }
        async with relaying(tmp_path, {"home": local}, config=config) as front:
            instance = front.daemon.fleet.get("paid")
            await until(lambda: instance.is_probed)
            shown = await get(front, "/api/runtime/compute/instances/paid")
            assert (shown["driver"], shown["phase"], shown["health"]) == ("cloud", "unavailable", "unhealthy")
            assert shown["device"]["kind"] is None
            assert str(file) in shown["reason"]["message"]
            assert (await front.ask(WHOLE)).status == 404
            for key in ("first", "second"):
                file.write_text(f"{key}\n")
                instance._key._looked_at = float("-inf")  # type: ignore[attr-defined]
                await instance.look()  # type: ignore[attr-defined]
                reply = await front.ask(WHOLE)
                assert reply.status == 200, reply.body
                assert provider.seen[-1].header("authorization") == f"Bearer {key}"
            shown = await get(front, "/api/runtime/compute/instances/paid")
            assert (shown["phase"], shown["health"], shown["reason"]) == ("ready", "healthy", None)
            assert shown["models"] == []


async def test_a_paid_server_is_not_managed(tmp_path: Path) -> None:
    provider = Provider()
    async with fronted(tmp_path, provider) as front:
        for call in ("start", "stop", "restart"):
            reply = await front.ask(b"", f"/api/runtime/compute/instances/paid/{call}", JSON)
            assert reply.status == 409, reply.body
        for other in ("/api/show", "/api/pull", "/api/push"):
            reply = await front.ask({"model": "gpt"}, other, {**JSON, "X-Instance": "paid"})
            assert 400 <= reply.status < 500, (other, reply.body)
            assert b"manages no models" in reply.body
        reply = await front.ask({"model": "gpt"}, "/api/show", JSON)
        assert reply.status == 404
        assert (provider.seen, provider.asked) == ([], [])


async def test_a_drained_paid_server_is_passed_over(tmp_path: Path) -> None:
    provider = Provider()
    async with fronted(tmp_path, provider, broken()) as front:
        drain = "/api/runtime/compute/instances/paid/drain"
        assert (await front.ask({"reason": "too dear"}, drain, JSON)).status == 200
        reply = await front.ask({**WHOLE, "model": "emergency"})
        assert (reply.status, "too dear" in reply.json()["error"]) == (503, True)
        assert provider.seen == []


async def test_the_cloud_is_no_local_model(tmp_path: Path) -> None:
    async with fronted(tmp_path, Provider()) as front:
        for path, key in (("/api/tags", "models"), ("/api/ps", "models"), ("/v1/models", "data")):
            assert "gpt" not in json.dumps((await get(front, path))[key])


async def test_the_routing_shows_when_it_would_be_used(tmp_path: Path) -> None:
    async with fronted(tmp_path, Provider()) as front:
        path = "/api/runtime/compute/routing/explain"
        shown = (await front.ask({"model": "pays"}, path, JSON)).json()
        assert [(one["instance"], one["because"]) for one in shown["attempts"]] == [
            ("home", "running"),
            ("paid", "paid"),
        ]
        shown = (await front.ask({"model": "free"}, path, JSON)).json()
        assert [(one["instance"], one["reason"], one["detail"]) for one in shown["passed_over"]] == [
            ("paid", "policy", "the role 'free' has no paid_fallback")
        ]
        shown = (await front.ask({"model": "pays", "local_only": True}, path, JSON)).json()
        assert [one["reason"] for one in shown["passed_over"]] == ["local_only"]
        roles = (await get(front, "/api/runtime/compute/routing"))["roles"]
        assert (roles["pays"]["effective_target"], roles["emergency"]["effective_target"]) == ("home", "paid")
        assert roles["emergency"]["fallback_reason"] == "model_missing"


async def test_a_client_that_leaves_ends_the_paid_work(tmp_path: Path) -> None:
    provider = Provider()
    left = asyncio.Event()

    async def goes_on(talk: Conversation) -> None:
        await talk.begin("text/event-stream")
        await talk.chunk(b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n')
        await talk.left()
        left.set()

    provider.answer = goes_on
    async with fronted(tmp_path, provider, broken()) as front:
        caller = await front.connect()
        await caller.send(TINY)
        await caller.head()
        caller.leave()
        async with asyncio.timeout(20):
            await left.wait()
        await until(lambda: front.at_rest)
        assert (await front.record()).outcome == "client_gone"


async def test_a_client_that_does_not_read_holds_the_provider_up(tmp_path: Path) -> None:
    provider = Provider()
    word = b'data: {"choices":[{"index":0,"delta":{"content":"%s"}}]}\n\n' % (b"x" * 1000)
    sent = 0

    async def floods(talk: Conversation) -> None:
        nonlocal sent
        await talk.begin("text/event-stream")
        while not talk.writer.is_closing():
            await talk.chunk(word * 100)
            sent += 1

    provider.answer = floods
    async with fronted(tmp_path, provider, broken()) as front:
        caller = await front.connect()
        await caller.send(TINY)
        await caller.head()
        before = -1
        async with asyncio.timeout(60):
            while before != sent:
                before = sent
                await asyncio.sleep(0.3)
        assert sent < 2000
        caller.leave()
        await until(lambda: front.at_rest, within_s=20)


async def test_a_load_or_an_unload_never_reaches_the_cloud(tmp_path: Path) -> None:
    provider = Provider()
    async with fronted(tmp_path, provider, broken()) as front:
        reply = await front.ask({"model": "pays", "keep_alive": 0})
        assert reply.status == 500, reply.body
        reply = await front.ask({"model": "emergency", "keep_alive": 0})
        assert (reply.status, reply.json()["done_reason"]) == (200, "unload")
        assert "x-instance" not in reply.headers, "no paid server was even chosen"
        reply = await front.ask({"model": "emergency", "messages": []})
        assert (reply.status, reply.json()["done_reason"]) == (200, "load")
        assert provider.seen == []


async def test_a_run_is_answered_by_the_cloud_as_well(tmp_path: Path) -> None:
    provider = Provider()
    provider.answer = speaks
    async with fronted(tmp_path, provider, broken()) as front:
        for body in (WHOLE, TINY):
            begun = await front.ask({"path": CHAT, "body": body}, "/api/v1/runs", JSON)
            run = begun.json()["id"]
            shown = await ended(front, run)
            assert shown["status"] == "succeeded", shown
            caller = await front.connect()
            path = f"/api/v1/runs/{run}/result"
            await caller.raw(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{front.port}\r\n\r\n".encode())
            result = await caller.reply()
            caller.leave()
            assert said(result) == TEXT
        record = await front.record()
        assert (record.provider, record.input_tokens, record.output_tokens) == ("paid", INPUTS, OUTPUTS)
        provider.answer = is_cut
        begun = await front.ask({"path": CHAT, "body": TINY}, "/api/v1/runs", JSON)
        shown = await ended(front, begun.json()["id"])
        assert shown["status"] == "failed"
