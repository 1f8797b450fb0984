"""Slots and lanes through the real gateway: queues, refusals in each dialect, cancels, live changes."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from tests.support.inside import until
from tests.support.relaying import LAST, Caller, Conversation, Front, Scripted, a_word, relaying

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

TINY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": False}
LANES = "/api/runtime/compute/lanes"
SETTINGS = "/api/settings/models"


class Gated(Scripted):
    """A server that answers when the test says so; `most` is how many requests it had at once."""

    def __init__(self) -> None:
        super().__init__()
        self.open = asyncio.Semaphore(0)
        self.at_once = 0
        self.most = 0
        self.answer = self.wait

    async def wait(self, talk: Conversation) -> None:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            await self.open.acquire()
        finally:
            self.at_once -= 1
        await a_word(talk)


_CALLERS: list[Caller] = []


@pytest_asyncio.fixture(autouse=True)
async def callers_leave() -> AsyncIterator[None]:
    yield
    while _CALLERS:
        caller = _CALLERS.pop()
        caller.leave()
        await caller.ended()


def role(**values: Any) -> dict[str, Any]:
    return {"model": "tiny", **values}


async def control(front: Front, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    caller = await front.connect()
    raw = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{front.port}\r\nContent-Length: {len(raw)}\r\n"
    await caller.raw(f"{head}Content-Type: application/json\r\n\r\n".encode() + raw)
    reply = await caller.reply()
    caller.leave()
    return reply.status, reply.json()


async def lanes(front: Front) -> dict[str, Any]:
    status, body = await control(front, "GET", LANES)
    assert status == 200
    return {one["name"]: one for one in body["lanes"]} | {one["id"]: one for one in body["instances"]}


async def asked(front: Front, model: str = "tiny", **headers: str) -> Caller:
    caller = await front.connect()
    _CALLERS.append(caller)
    await caller.send({**TINY, "model": model}, headers=headers)
    return caller


async def test_an_instance_has_no_more_requests_than_slots_and_the_others_wait(tmp_path: Path) -> None:
    server = Gated()
    async with server.serving(), relaying(tmp_path, {"a": server}, slots={"a": 2}) as front:
        callers = [await asked(front) for _ in range(5)]
        await until(lambda: server.at_once == 2)
        found = await lanes(front)
        assert (found["a"]["in_use"], found["*"]["queued"], found["*"]["in_flight"]) == (2, 3, 2)
        assert found["*"]["oldest_wait_s"] >= 0
        for _ in callers:
            server.open.release()
        replies = [await caller.reply() for caller in callers]
        assert [reply.status for reply in replies] == [200] * 5
        assert server.most == 2
        assert all(int(reply.headers["x-queue-ms"]) >= 0 for reply in replies)
        await until(lambda: front.at_rest)
        assert (await lanes(front))["a"]["in_use"] == 0


async def test_full_instances_are_explained_and_recorded(tmp_path: Path) -> None:
    server, other = Gated(), Gated()
    config = {"roles": {"x": role(instances=["a", "b"])}}
    slots = {"a": 1, "b": 1}

    async def explained(front: Front) -> dict[str, Any]:
        status, body = await control(front, "GET", "/api/runtime/compute/explain?model=x")
        assert status == 200
        return dict(body)

    async with (
        server.serving(),
        other.serving(),
        relaying(tmp_path, {"a": server, "b": other}, slots=slots, config=config) as front,
    ):
        found = await explained(front)
        assert (found["would_wait"], found["passed_over"]) == (False, [])
        first = await asked(front, "x")
        await until(lambda: server.at_once == 1)
        full = {"model": "tiny", "reason": "overloaded", "detail": "all its slots are taken"}
        found = await explained(front)
        assert (found["would_wait"], found["passed_over"]) == (False, [{"instance": "a", **full}])
        assert [one["instance"] for one in found["attempts"]] == ["b", "a"]
        assert found["attempts"][0]["fallback"] == "overloaded"
        assert found["summary"].startswith("x would go to b")
        assert "all its slots are taken" in found["summary"]
        second = await asked(front, "x")
        await until(lambda: other.at_once == 1)
        found = await explained(front)
        assert found["would_wait"]
        assert [one["instance"] for one in found["passed_over"]] == ["a", "b"]
        assert found["summary"].startswith("x would wait for a slot, then go to a")
        _, listed = await control(front, "GET", "/api/runtime/compute/requests")
        (spilled,) = [one["request_id"] for one in listed["requests"] if one["effective_target"] == "b"]
        _, shown = await control(front, "GET", f"/api/runtime/compute/requests/{spilled}")
        (passed,) = shown["decision"]["passed_over"]
        assert full.items() <= passed.items()
        assert passed["instance"] == "a"
        for one in (server, other):
            one.open.release()
        assert [(await one.reply()).status for one in (first, second)] == [200, 200]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/api/chat", {"error": "the queue of the role 'x' is full (queue_full)"}),
        ("/v1/chat/completions", {"message": "the queue of the role 'x' is full (queue_full)"}),
        ("/v1/messages", {"type": "rate_limit_error"}),
    ],
)
async def test_a_full_queue_is_a_429_at_once_in_the_dialect_of_the_client(
    tmp_path: Path, path: str, says: dict[str, str]
) -> None:
    server = Gated()
    config = {"roles": {"x": role(queue={"length": 0})}}
    async with (
        server.serving(),
        relaying(tmp_path, {"a": server}, slots={"a": 1}, config=config) as front,
    ):
        first = await asked(front, "x")
        await until(lambda: server.at_once == 1)
        reply = await front.ask({**TINY, "model": "x", "max_tokens": 5}, path)
        assert reply.status == 429
        assert int(reply.headers["retry-after"]) >= 1
        body = reply.json()
        assert says.items() <= (body if path == "/api/chat" else body["error"]).items()
        record = await front.record()
        assert (record.outcome, record.fallback_reason, record.status) == ("refused", "queue_full", 429)
        server.open.release()
        assert (await first.reply()).status == 200


async def test_the_end_of_the_time_in_the_queue_is_a_503(tmp_path: Path) -> None:
    server = Gated()
    config = {"roles": {"x": role(queue={"wait_s": 0.05})}}
    async with (
        server.serving(),
        relaying(tmp_path, {"a": server}, slots={"a": 1}, config=config) as front,
    ):
        first = await asked(front, "x")
        await until(lambda: server.at_once == 1)
        reply = await front.ask({**TINY, "model": "x"})
        assert (reply.status, reply.json()) == (
            503,
            {"error": "no slot became free within 0.05 s (overloaded)"},
        )
        assert int(reply.headers["x-queue-ms"]) >= 50
        assert int(reply.headers["retry-after"]) >= 1
        server.open.release()
        assert (await first.reply()).status == 200


async def test_a_client_that_leaves_the_queue_or_its_slot_lets_the_next_one_in(tmp_path: Path) -> None:
    server = Gated()
    async with server.serving(), relaying(tmp_path, {"a": server}, slots={"a": 1}) as front:
        first, second, third = [await asked(front) for _ in range(3)]
        await until(lambda: server.at_once == 1)
        second.leave()
        await until(lambda: len(front.records) == 1)
        assert front.records[0].outcome == "client_gone"
        first.leave()
        await until(lambda: len(server.seen) == 2)
        server.open.release()
        server.open.release()
        assert (await third.reply()).status == 200
        await until(lambda: front.at_rest)
        assert (await lanes(front))["a"]["in_use"] == 0


async def test_a_reserved_slot_answers_while_the_others_wait(tmp_path: Path) -> None:
    server = Gated()
    config = {"roles": {"alert": role(instances=["a"], reserved=1), "bulk": role()}}
    async with (
        server.serving(),
        relaying(tmp_path, {"a": server}, slots={"a": 2}, config=config) as front,
    ):
        bulk = [await asked(front, "bulk") for _ in range(5)]
        await until(lambda: server.at_once == 1)
        assert (await lanes(front))["a"]["reserved_free"] == 1
        alert = await asked(front, "alert")
        await until(lambda: server.at_once == 2)
        assert server.seen[-1].json()["model"] == "tiny"
        for _ in range(6):
            server.open.release()
        assert (await alert.reply()).status == 200
        assert [(await caller.reply()).status for caller in bulk] == [200] * 5


async def test_a_stream_of_events_is_told_its_place_in_the_queue(tmp_path: Path) -> None:
    server = Gated()
    async with (
        server.serving(),
        relaying(tmp_path, {"a": server}, slots={"a": 1}, gateway={"keep_alive_s": 0.1}) as front,
    ):
        first = await asked(front)
        await until(lambda: server.at_once == 1)
        second = await asked(front)
        waiting = await front.connect()
        _CALLERS.append(waiting)
        await waiting.send({**TINY, "stream": True}, "/v1/chat/completions")
        status, _ = await waiting.head()
        assert status == 200
        assert (await waiting.chunk()).startswith(b": waiting for a slot, 1 ahead in the queue")
        for caller in (first, second, waiting):
            server.open.release()
            if caller is not waiting:
                assert (await caller.reply()).status == 200


async def test_limits_change_live_and_a_contradiction_is_a_422(tmp_path: Path) -> None:
    server = Gated()
    config = {"roles": {"x": role(instances=["a"])}}
    async with (
        server.serving(),
        relaying(tmp_path, {"a": server}, slots={"a": 2}, config=config) as front,
    ):
        status, body = await control(front, "POST", SETTINGS, {"roles": {"x": {"reserved": 3}}})
        assert status == 422
        assert "3 slots of a are reserved by roles together, and it has 2" in body["error"]["message"]
        status, _ = await control(front, "POST", SETTINGS, {"roles": {"x": {"concurrency": 1}}})
        assert status == 200
        callers = [await asked(front, "x") for _ in range(2)]
        await until(lambda: server.at_once == 1)
        assert (await lanes(front))["x"]["queued"] == 1
        status, _ = await control(front, "POST", SETTINGS, {"roles": {"x": {"concurrency": 2}}})
        assert status == 200
        await until(lambda: server.at_once == 2)
        server.open.release()
        server.open.release()
        assert [(await caller.reply()).status for caller in callers] == [200, 200]
        status, effective = await control(front, "GET", f"{SETTINGS}/effective")
        assert effective["roles"]["x"]["concurrency"] == {"value": 2, "source": "override"}


async def test_a_waiting_request_gets_the_first_slot_of_any_instance(tmp_path: Path) -> None:
    one, other = Gated(), Gated()
    async with (
        one.serving(),
        other.serving(),
        relaying(tmp_path, {"a": one, "b": other}, slots={"a": 1, "b": 1}) as front,
    ):
        callers = [await asked(front) for _ in range(3)]
        await until(lambda: one.at_once == other.at_once == 1)
        other.open.release()
        await until(lambda: len(one.seen) + len(other.seen) == 3)
        one.open.release()
        other.open.release()
        assert [(await caller.reply()).status for caller in callers] == [200] * 3


async def test_a_role_for_runs_refuses_a_request_that_waits_for_its_answer(tmp_path: Path) -> None:
    server = Scripted()
    config = {"roles": {"deep": role(mode="async")}}
    async with server.serving(), relaying(tmp_path, {"a": server}, config=config) as front:
        reply = await front.ask({**TINY, "model": "deep"})
        assert reply.status == 409
        assert reply.headers["location"] == "/api/v1/runs"
        assert "async_only" in reply.json()["error"]
        assert server.seen == []


async def test_a_slot_goes_to_the_next_when_the_server_dies(tmp_path: Path) -> None:
    server = Gated()
    async with server.serving(), relaying(tmp_path, {"a": server}, slots={"a": 1}) as front:
        talks: list[Conversation] = []

        async def keep(talk: Conversation) -> None:
            talks.append(talk)
            await talk.left() if len(talks) == 1 else await a_word(talk)

        server.answer = keep
        first, second = await asked(front), await asked(front)
        await until(lambda: len(talks) == 1)
        talks[0].crash()
        assert (await first.reply()).status == 502
        reply = await second.reply()
        assert (reply.status, reply.body) == (200, LAST.strip())


async def test_a_client_that_leaves_a_load_to_others_gives_its_slot_back(tmp_path: Path) -> None:
    server = Gated()
    async with server.serving(), relaying(tmp_path, {"a": server}, slots={"a": 2}) as front:
        first, second = await asked(front), await asked(front)
        await until(lambda: server.at_once == 2)
        third = await asked(front)
        await until(lambda: len(front.relay.exchanges) == 3)
        first.leave()  # the server goes on: the second request waits for the same load
        await until(lambda: len(server.seen) == 3)
        for _ in range(3):
            server.open.release()
        assert [(await one.reply()).status for one in (second, third)] == [200, 200]
        await until(lambda: front.at_rest)
        assert (await lanes(front))["a"]["in_use"] == 0
