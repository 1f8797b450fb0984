"""`/api/runtime/compute/requests` over real sockets: what ended, what is open, and what is cancelled."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from manager.api.requests import RequestBody
from tests.api.test_transcription import Ears, form, hearing, transcribe
from tests.support.inside import until
from tests.support.relaying import CHAT, LAST, LINE, Conversation, Front, Reply, Scripted, a_word, relaying
from tests.support.storing import Store, ask

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

TINY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
WHOLE = {**TINY, "stream": False}
REQUESTS = "/api/runtime/compute/requests"
WHY = "cut off: the operator has cancelled the request"


async def listed(front: Front, query: str = "") -> list[dict[str, Any]]:
    reply = await ask(front, "GET", f"{REQUESTS}{query}")
    assert reply.status == 200, reply.body
    body = reply.json()
    assert body["count"] == len(body["requests"])
    found: list[dict[str, Any]] = body["requests"]
    for one in found:
        RequestBody.model_validate_json(json.dumps(one))
    return found


async def shown(front: Front, request_id: str) -> dict[str, Any]:
    reply = await ask(front, "GET", f"{REQUESTS}/{request_id}")
    assert reply.status == 200, reply.body
    body: dict[str, Any] = reply.json()
    return body


async def only_open(front: Front) -> dict[str, Any]:
    """The one open request, as the list has it."""
    (one,) = [one for one in await listed(front) if one["open"]]
    return one


async def cancelled(front: Front) -> str:
    """Cancel the one open request; its id."""
    request_id = str((await only_open(front))["request_id"])
    reply = await ask(front, "DELETE", f"{REQUESTS}/{request_id}")
    assert (reply.status, reply.json()) == (200, {"request_id": request_id, "cancelled": True})
    return request_id


async def check_cancelled(front: Front, request_id: str, status: int = 503) -> dict[str, Any]:
    """The request has ended as a cancelled one does, and holds nothing."""
    await until(lambda: front.at_rest)
    one = await shown(front, request_id)
    assert (one["open"], one["outcome"], one["fallback_reason"]) == (False, "cut", "cancelled")
    assert (one["status"], one["decision"]["message"]) == (status, WHY)
    assert f": {WHY}" in one["summary"]
    again = await ask(front, "DELETE", f"{REQUESTS}/{request_id}")
    assert (again.status, again.json()["error"]["code"]) == (409, "request_ended")
    return one


# --- what ended


async def test_every_request_is_listed_with_the_fields_of_the_log_whatever_is_logged(tmp_path: Path) -> None:
    async with (
        Scripted().serving() as server,
        relaying(tmp_path, {"a": server}, gateway={"access_log": 0}) as front,
    ):
        await front.ask(TINY, headers={"X-Project-ID": "lab", "X-Lane": "output"})
        await front.ask(b"{no json")
        await front.ask({**TINY, "model": "unknown"})
        assert len(front.records) == 2, "the good one was sampled out"
        found = await listed(front)
        assert [one["outcome"] for one in found] == ["refused", "client_error", "ok"]
        for one, record in zip(found, reversed(front.records), strict=False):
            assert {**record.as_dict(), "ts": one["ts"], "open": False} == {**one, "failed_attempts": ()}
        ok = found[-1]
        assert (ok["project_id"], ok["lane"], ok["effective_target"]) == ("lab", "output", "a")
        assert (ok["input_tokens"], ok["output_tokens"], ok["provider"]) == (12, 34, "local")
        assert ok["ts"].endswith("Z")
        assert [one["project_id"] for one in await listed(front, "?project=lab")] == ["lab"]
        assert [one["model"] for one in await listed(front, "?outcome=refused&since=1h")] == ["unknown"]
        assert len(await listed(front, "?model=tiny:latest&instance=a&limit=1")) == 1
        assert await listed(front, "?since=2100-01-01T00:00:00Z") == []
        assert len(await listed(front, "?since=999999999d")) == 3


async def test_one_request_is_shown_with_its_attempts_and_what_was_passed_over(tmp_path: Path) -> None:
    async def fails(talk: Conversation) -> None:
        await talk.whole(500, b'{"error":"model failed to load"}')

    async with (
        Scripted().serving() as bad,
        Scripted().serving() as good,
        relaying(tmp_path, {"a": bad, "b": good}) as front,
    ):
        bad.answer = fails
        reply = await front.ask(WHOLE)
        one = await shown(front, reply.headers["x-request-id"])
        made = one["decision"]["attempts"]
        assert [(each["instance"], each["outcome"], each["reason"]) for each in made] == [
            ("a", "failed", "model_load_failed"),
            ("b", "ok", None),
        ]
        assert made[0]["message"] == "model failed to load"
        assert one["decision"]["asked"]["model"] == "tiny"
        assert one["summary"].startswith(
            "asked for tiny, went to b, since a could not load the model (model failed to load); "
        )
        pinned = await front.ask({**WHOLE, "model": "tiny@b"})
        decision = (await shown(front, pinned.headers["x-request-id"]))["decision"]
        assert [(each["instance"], each["reason"]) for each in decision["passed_over"]] == [("a", "policy")]
        assert decision["passed_over"][0]["words"] == "the policy or a pin rules out a"
        refused = await front.ask({**WHOLE, "model": "unknown"})
        one = await shown(front, refused.headers["x-request-id"])
        assert one["decision"]["refused"]["what"] == "unknown"
        assert one["summary"] == f"asked for unknown; refused with status 404: {one['decision']['message']}"


async def test_a_request_that_went_elsewhere_says_why(tmp_path: Path) -> None:
    """The sentence of the issue, through the real parts."""
    config = {"roles": {"thinking": {"model": "tiny", "instances": ["a", "b"]}}}
    async with (
        Scripted().serving() as one,
        Scripted().serving() as two,
        relaying(tmp_path, {"a": one, "b": two}, config=config) as front,
    ):
        reply = await ask(
            front,
            "POST",
            "/api/runtime/compute/instances/a/drain",
            b'{"reason":"driver update"}',
            {"Content-Type": "application/json"},
        )
        assert reply.status == 200, reply.body
        reply = await front.ask({**WHOLE, "model": "thinking"})
        assert reply.headers["x-instance"] == "b"
        summary = (await shown(front, reply.headers["x-request-id"]))["summary"]
        assert summary.startswith("asked for thinking, went to b with tiny")
        assert "a was drained (driver update)" in summary
        explained = (await ask(front, "GET", "/api/runtime/compute/explain?model=thinking")).json()
        assert explained["summary"].startswith("thinking would go to b with tiny")
        assert explained["passed_over"][0]["detail"] == "drained: driver update"


async def test_an_attempt_that_broke_off_in_mid_stream_has_its_reason(tmp_path: Path) -> None:
    async def dies(talk: Conversation) -> None:
        await talk.begin()
        await talk.chunk(LINE)
        talk.crash()

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = dies
        reply = await front.ask(TINY)
        one = await shown(front, reply.headers["x-request-id"])
        assert (one["outcome"], one["decision"]["attempts"][0]["reason"]) == (
            "upstream_error",
            "upstream_error",
        )


async def test_the_cursor_follows_what_ends(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        await front.ask(TINY)
        first = (await ask(front, "GET", REQUESTS)).json()
        for _ in range(3):
            await front.ask(TINY)
        after = (await ask(front, "GET", f"{REQUESTS}?after={first['cursor']}")).json()
        assert (first["count"], after["count"]) == (1, 3)
        last = (await ask(front, "GET", f"{REQUESTS}?after={after['cursor']}")).json()
        assert (last["count"], last["cursor"]) == (0, after["cursor"])


async def test_an_open_request_takes_no_place_of_those_that_ended_after_a_cursor(tmp_path: Path) -> None:
    async def never(talk: Conversation) -> None:
        await talk.left()

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        await front.ask(TINY)
        cursor = (await ask(front, "GET", REQUESTS)).json()["cursor"]
        wanted = [(await front.ask(TINY)).headers["x-request-id"] for _ in range(3)]
        server.answer = never
        waiting = asyncio.ensure_future(front.ask(TINY))
        await until(lambda: len(server.seen) == 5)
        assert [one["open"] for one in await listed(front, "?limit=2")] == [True, False]
        found = []
        for _ in range(4):
            page = (await ask(front, "GET", f"{REQUESTS}?after={cursor}&limit=1")).json()
            cursor = page["cursor"]
            found += [one["request_id"] for one in page["requests"]]
        assert found == wanted
        waiting.cancel()
        await asyncio.wait({waiting})


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "query.limit"),
        ("limit=1001", "query.limit"),
        ("since=yesterday", "query.since"),
        ("since=2026-03-01T12:00:00", "query.since"),
        ("outcome=good", "query.outcome"),
        ("project=", "query.project"),
        ("after=-1", "query.after"),
        ("lane=output", "query.lane"),
    ],
)
async def test_a_bad_query_is_refused_with_its_field(tmp_path: Path, query: str, field: str) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        reply = await ask(front, "GET", f"{REQUESTS}?{query}")
        assert reply.status == 422
        assert reply.json()["error"]["details"]["fields"][0]["field"] == field


async def test_an_unknown_request_is_404(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        for method in ("GET", "DELETE"):
            reply = await ask(front, method, f"{REQUESTS}/nope")
            assert (reply.status, reply.json()["error"]["code"]) == (404, "unknown_request")


async def test_a_registry_that_is_gone_loses_history_and_no_request(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        registry = tmp_path / "state" / "registry.sqlite3"
        await asyncio.to_thread(registry.rename, registry.with_name("away"))
        for _ in range(5):
            assert (await front.ask(TINY)).status == 200
        history = front.daemon.backend.history
        await history.flush()
        assert (history.stored, history.waiting) == (0, 5)
        await asyncio.to_thread(registry.with_name("away").rename, registry)
        assert len(await listed(front)) == 5


async def test_metrics_count_what_the_history_did(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        await front.ask(TINY)
        await listed(front)
        text = (await ask(front, "GET", "/metrics")).body.decode()
        assert 'ollama_manager_history_requests_total{result="stored"} 1.0' in text
        assert 'ollama_manager_history_requests_total{result="dropped"} 0.0' in text


# --- what is open, and what is cancelled in each phase


async def hangs(talk: Conversation) -> None:
    await talk.left()


async def streams(talk: Conversation) -> None:
    await talk.begin()
    await talk.chunk(LINE)
    await talk.left()


async def holds(talk: Conversation) -> None:
    """An error that another attempt may follow, whose body does not end."""
    await talk.send(b"HTTP/1.1 500 X\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
    await talk.left()


async def test_a_request_that_waits_for_its_first_byte(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = hangs
        asking = asyncio.ensure_future(front.ask(WHOLE))
        await until(lambda: server.seen)
        one = await only_open(front)
        assert (one["outcome"], one["effective_target"], one["model"], one["status"]) == (
            None,
            "a",
            "tiny",
            0,
        )
        assert one["duration_ms"] > 0
        assert await listed(front, "?project=nobody") == []
        explained = await shown(front, one["request_id"])
        assert [each["outcome"] for each in explained["decision"]["attempts"]] == [None]
        assert explained["summary"].startswith("asked for tiny, went to a; open for ")
        assert explained["summary"].endswith(", waits for a")
        request_id = await cancelled(front)
        reply = await asking
        assert (reply.status, reply.json()) == (503, {"error": WHY})
        assert reply.headers["x-should-retry"] == "false"
        await check_cancelled(front, request_id)
        await until(lambda: server.connections == 1, within_s=10)  # that of the probes at most
        assert front.in_flight("a") == 0


@pytest.mark.parametrize(
    ("path", "body", "last"),
    [
        (CHAT, TINY, {"error": WHY}),
        ("/v1/chat/completions", {**TINY, "stream": True}, None),
        ("/v1/messages", {**TINY, "stream": True, "max_tokens": 10}, None),
    ],
)
async def test_a_request_in_mid_stream(
    tmp_path: Path, path: str, body: dict[str, Any], last: dict[str, Any] | None
) -> None:
    async def streams_events(talk: Conversation) -> None:
        await talk.begin("application/x-ndjson" if path == CHAT else "text/event-stream")
        await talk.chunk(LINE if path == CHAT else b'data: {"choices":[]}\n\n')
        await talk.left()

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = streams_events
        caller = await front.connect()
        await caller.send(body, path)
        await caller.head()
        await caller.chunk()
        request_id = await cancelled(front)
        rest = await caller.chunk()
        assert WHY.encode() in rest
        if last is not None:
            assert json.loads(rest) == last
        assert await caller.chunk() == b""
        await check_cancelled(front, request_id, status=200)
        caller.leave()


async def test_a_request_whose_body_still_comes(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        caller = await front.connect()
        await caller.raw(caller.request(TINY)[:-5])
        await until(lambda: front.relay.exchanges)
        request_id = await cancelled(front)
        assert (await caller.reply()).status == 503
        await check_cancelled(front, request_id)
        assert server.seen == []
        caller.leave()


async def test_a_request_that_is_being_prepared(tmp_path: Path) -> None:
    async with (
        Store(("other",)).serving() as server,
        relaying(tmp_path, {"a": server}, config={"models": {"auto_pull": True}}) as front,
    ):
        server.on["/api/pull"] = streams
        asking = asyncio.ensure_future(front.ask(WHOLE))
        await until(lambda: server.asked("/api/pull"))
        assert front.daemon.backend.passing.routing.placement.preparing == 1
        request_id = await cancelled(front)
        assert (await asking).status == 503
        await until(lambda: front.daemon.backend.passing.routing.placement.preparing == 0)
        await check_cancelled(front, request_id)


async def test_a_request_that_waits_for_a_slot(tmp_path: Path) -> None:
    async with Scripted().serving() as server:
        config = {"instances": {"a": {"driver": "external", "url": server.url, "slots": 1}}}
        async with relaying(tmp_path, {"a": server}, config=config) as front:
            server.answer = hangs
            first = asyncio.ensure_future(front.ask(WHOLE))
            await until(lambda: server.seen)
            second = asyncio.ensure_future(front.ask(WHOLE, headers={"X-Project-ID": "waits"}))
            await until(lambda: len(front.relay.exchanges) == 2)
            third = asyncio.ensure_future(front.ask(WHOLE, headers={"X-Project-ID": "also"}))
            await until(lambda: len(front.relay.exchanges) == 3)
            (one,) = await listed(front, "?project=waits")
            assert (one["open"], one["effective_target"]) == (True, None)
            summary = (await shown(front, one["request_id"]))["summary"]
            assert summary.endswith(", waits for a slot, 0 ahead in the queue")
            assert (await ask(front, "DELETE", f"{REQUESTS}/{one['request_id']}")).status == 200
            assert (await second).status == 503
            assert len(server.seen) == 1
            server.answer = a_word
            (one,) = [one for one in await listed(front, "?project=default") if one["open"]]
            assert (await ask(front, "DELETE", f"{REQUESTS}/{one['request_id']}")).status == 200
            assert (await first).status == 503
            assert (await third).status == 200, "the slot was given back"
            await until(lambda: front.at_rest)
            outcomes = {one["project_id"]: one["outcome"] for one in await listed(front)}
            assert outcomes == {"default": "cut", "waits": "cut", "also": "ok"}


async def test_a_request_whose_failed_answer_is_being_read(tmp_path: Path) -> None:
    async with (
        Scripted().serving() as bad,
        Scripted().serving() as other,
        relaying(tmp_path, {"a": bad, "b": other}) as front,
    ):
        bad.answer = holds
        asking = asyncio.ensure_future(front.ask(WHOLE))
        await until(lambda: bad.seen and all(one._held_head for one in front.relay.exchanges))  # type: ignore[attr-defined]
        request_id = await cancelled(front)
        assert (await asking).status == 503
        await check_cancelled(front, request_id)
        assert other.seen == []


async def test_a_load_that_another_request_waits_for_goes_on(tmp_path: Path) -> None:
    loads = asyncio.Event()
    left = 0

    async def loads_slowly(talk: Conversation) -> None:
        nonlocal left
        waiting = asyncio.ensure_future(loads.wait())
        leaving = asyncio.ensure_future(talk.left())
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            left += 1
            waiting.cancel()
            return
        leaving.cancel()
        await asyncio.wait({leaving})
        await talk.whole(200, LAST.strip())

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = loads_slowly
        first = asyncio.ensure_future(front.ask(WHOLE))
        await until(lambda: len(server.seen) == 1)
        request_id = (await only_open(front))["request_id"]
        second = asyncio.ensure_future(front.ask(WHOLE))
        await until(lambda: len(server.seen) == 2)
        assert (await ask(front, "DELETE", f"{REQUESTS}/{request_id}")).status == 200
        assert (await first).status == 503, "its client is told at once"
        assert (await ask(front, "DELETE", f"{REQUESTS}/{request_id}")).status == 200
        assert left == 0
        loads.set()
        assert (await second).status == 200
        assert left == 0
        await check_cancelled(front, request_id)


async def test_a_connection_serves_its_next_request_after_a_cancelled_one(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        good, server.answer = server.answer, hangs
        caller = await front.connect()
        await caller.send(WHOLE)
        await until(lambda: server.seen)
        server.answer = good
        await cancelled(front)
        assert (await caller.reply()).status == 503
        await caller.send(WHOLE)
        assert (await caller.reply()).status == 200
        caller.leave()


async def test_a_transcription(tmp_path: Path) -> None:
    hears = asyncio.Event()

    async def listens(talk: Conversation) -> None:
        hears.set()
        await talk.left()

    ears = Ears()
    ears.on["/v1/audio/transcriptions"] = listens
    async with hearing(tmp_path, ears) as front:
        asking: asyncio.Future[Reply] = asyncio.ensure_future(transcribe(front, form()))
        await hears.wait()
        assert (await only_open(front))["path"] == "/v1/audio/transcriptions"
        request_id = await cancelled(front)
        reply = await asking
        assert reply.status == 503
        assert WHY in reply.json()["error"]["message"]
        await check_cancelled(front, request_id)


@pytest.mark.parametrize("answer", [hangs, streams, holds])
async def test_many_requests_are_each_in_the_history_once(
    tmp_path: Path, answer: Callable[[Conversation], Awaitable[None]]
) -> None:
    """Half of the clients leave and half of the rest are cancelled."""
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        good, server.answer = server.answer, answer
        callers = [await front.connect() for _ in range(40)]
        for caller in callers:
            await caller.send(TINY)
        await until(lambda: len(server.seen) == 40)
        for caller in callers[::2]:
            caller.leave()
        opened = [one["request_id"] for one in await listed(front) if one["open"]]
        for request_id in opened[::2]:
            await ask(front, "DELETE", f"{REQUESTS}/{request_id}")
        for caller in callers:
            caller.leave()
        server.answer = good
        await until(lambda: front.at_rest)
        for _ in range(10):
            await front.ask(TINY)
        ids = {record.request_id for record in front.records}
        await listed(front)
        with closing(sqlite3.connect(tmp_path / "state" / "registry.sqlite3")) as connection:
            stored = [row[0] for row in connection.execute("SELECT request_id FROM requests")]
        assert len(stored) == len(ids) == 50
        assert set(stored) == ids


# --- the decision without a request


async def test_the_decision_of_a_role_that_takes_runs_only_says_so(tmp_path: Path) -> None:
    config = {"roles": {"deep": {"kind": "generate", "model": "tiny", "mode": "async"}}}
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}, config=config) as front:
        assert (await front.ask({"model": "deep", "messages": []})).status == 409
        for asked in ("model=deep", "model=tiny&lane=deep"):
            explained = (await ask(front, "GET", f"/api/runtime/compute/explain?{asked}")).json()
            assert explained["runs_only"]
            assert [one["instance"] for one in explained["attempts"]] == ["a"]
            assert explained["summary"].startswith(
                "deep takes runs only (POST /api/v1/runs); a run would go to a"
            )


async def test_a_decision_is_explained_without_a_request(tmp_path: Path) -> None:
    async with (
        Scripted().serving() as one,
        Scripted(("other",)).serving() as two,
        relaying(tmp_path, {"a": one, "b": two}) as front,
    ):
        explained = (await ask(front, "GET", "/api/runtime/compute/explain?model=tiny")).json()
        assert [each["instance"] for each in explained["attempts"]] == ["a"]
        assert (explained["summary"], explained["runs_only"]) == ("tiny would go to a", False)
        refused = (await ask(front, "GET", "/api/runtime/compute/explain?model=tiny&instance=b")).json()
        assert refused["summary"].startswith("tiny would be refused: ")
        bad = await ask(front, "GET", "/api/runtime/compute/explain?model=tiny&kind=sing")
        assert (bad.status, bad.json()["error"]["details"]["fields"][0]["field"]) == (422, "query.kind")
        missing = await ask(front, "GET", "/api/runtime/compute/explain")
        assert (missing.status, missing.json()["error"]["details"]["fields"][0]["field"]) == (
            422,
            "query.model",
        )
        assert not one.seen


async def test_older_requests_are_listed_page_by_page_and_without_the_open_ones(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        for _ in range(5):
            assert (await front.ask(WHOLE)).status == 200
        await until(lambda: front.at_rest)
        whole = [one["request_id"] for one in await listed(front)]
        assert len(whole) == 5
        seen: list[str] = []
        query = "?limit=2"
        while True:
            body = (await ask(front, "GET", f"{REQUESTS}{query}")).json()
            seen += [one["request_id"] for one in body["requests"]]
            if body["older"] is None:
                break
            query = f"?limit=2&before={body['older']}"
        assert seen == whole
        both = await ask(front, "GET", f"{REQUESTS}?after=1&before=2")
        assert both.status == 422
        assert "exclude each other" in both.json()["error"]["message"]
