"""Pulls of one model are one pull, whoever waits for it; the last who leaves ends it."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from tests.support.inside import until
from tests.support.relaying import Conversation, relaying
from tests.support.storing import Held, Progress, Store, ask, begun, happens, line, request

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.relaying import Caller

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": False}


# --- pulls ----------------------------------------------------------------------------------------


async def test_a_pull_that_two_ask_for_is_one_and_both_get_its_progress(tmp_path: Path) -> None:
    held = Held(line("pulling manifest"), line("pulling abc", digest="abc", total=10, completed=5))
    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.on["/api/pull"] = held
        first = await front.connect()
        await first.raw(request(front, "POST", "/api/pull", {"model": "big"}))
        assert (await first.head())[1]["x-instance"] == "a"
        told = Progress(first)
        assert (await told.line())["status"] == "pulling manifest"
        assert (await told.line())["completed"] == 5
        second = await front.connect()
        await second.raw(request(front, "POST", "/api/pull", {"name": "Big:latest"}))
        quiet = asyncio.ensure_future(
            ask(front, "POST", "/api/pull", {"model": "registry.ollama.ai/library/big", "stream": False})
        )
        await second.head()
        told_later = Progress(second)
        assert (await told_later.line())["status"] == "pulling manifest"
        assert (await told_later.line())["completed"] == 5
        await until(lambda: front.in_flight("a") == 1)
        held.go.set()
        for caller, progress in ((first, told), (second, told_later)):
            assert await progress.line() == {"status": "success"}
            assert await progress.line() is None
            caller.leave()
        reply = await quiet
        assert (reply.status, reply.json()) == (200, {"status": "success"})
        assert (reply.headers["content-type"], reply.headers["x-instance"]) == ("application/json", "a")
        assert len(server.asked("/api/pull")) == 1
        await until(lambda: len(front.records) == 3)
        assert {(record.outcome, record.effective_target) for record in front.records} == {("ok", "a")}


async def test_pulls_that_say_something_else_are_two(tmp_path: Path) -> None:
    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        replies = await asyncio.gather(
            ask(front, "POST", "/api/pull", {"model": "big"}),
            ask(front, "POST", "/api/pull", {"model": "big", "insecure": True}),
            ask(front, "POST", "/api/pull", {"model": "other"}),
        )
        assert [reply.status for reply in replies] == [200, 200, 200]
        assert len(server.asked("/api/pull")) == 3


async def test_a_pull_goes_on_until_the_last_who_waits_has_left(tmp_path: Path) -> None:
    held = Held()
    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.on["/api/pull"] = held
        callers = [await front.connect() for _ in range(3)]
        for caller in callers:
            await caller.raw(request(front, "POST", "/api/pull", {"model": "big"}))
            await caller.head()
        callers[0].leave()
        callers[1].leave()
        await until(lambda: len(front.records) == 2)
        assert not held.left.is_set()
        callers[2].leave()
        await happens(held.left)
        await until(lambda: front.at_rest)
        assert {record.outcome for record in front.records} == {"client_gone"}
        held.go.set()
        assert (await ask(front, "POST", "/api/pull", {"model": "big"})).status == 200
        assert len(server.asked("/api/pull")) == 2


async def test_a_pull_that_fails_says_so_as_ollama_does(tmp_path: Path) -> None:
    async def fail(talk: Conversation) -> None:
        await talk.begin()
        await talk.chunk(line("pulling manifest"))
        await talk.chunk(b'{"error":"no such host"}\n')
        await talk.end()

    async def break_off(talk: Conversation) -> None:
        await talk.begin()
        await talk.chunk(line("pulling manifest"))
        talk.crash()

    async def end_early(talk: Conversation) -> None:
        await talk.begin()
        await talk.chunk(line("pulling manifest"))
        await talk.end()

    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        for answer, message in (
            (fail, "no such host"),
            (break_off, "broke off"),
            (end_early, "before its end"),
        ):
            server.on["/api/pull"] = answer
            reply = await ask(front, "POST", "/api/pull", {"model": "big"})
            first, last = reply.lines()
            assert (reply.status, reply.whole, first) == (200, True, {"status": "pulling manifest"})
            assert message in last["error"]
            quiet = await ask(front, "POST", "/api/pull", {"model": "big", "stream": False})
            assert message in quiet.json()["error"]
            assert quiet.status == (502 if answer is break_off else 500)
        await until(lambda: len(front.records) == 6)
        assert {record.outcome for record in front.records} == {"upstream_error"}


async def test_progress_without_lines_ends_the_pull(tmp_path: Path) -> None:
    async def endless(talk: Conversation) -> None:
        await talk.begin()
        while True:
            await talk.chunk(b"x" * 65536)

    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.on["/api/pull"] = endless
        reply = await ask(front, "POST", "/api/pull", {"model": "big"})
        assert (reply.status, reply.json()) == (500, {"error": "the server's progress has no lines"})


async def test_who_reads_slowly_holds_nobody_up_and_gets_the_newest(tmp_path: Path) -> None:
    async def busy(talk: Conversation) -> None:
        await talk.begin()
        for number in range(4000):
            await talk.chunk(line(f"pulling abc {'x' * 8000}", digest="abc", completed=number))
        await talk.chunk(line("success"))
        await talk.end()

    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.on["/api/pull"] = busy
        slow = await front.connect()
        await slow.raw(request(front, "POST", "/api/pull", {"model": "big"}))
        await slow.head()
        quick = await ask(front, "POST", "/api/pull", {"model": "big", "stream": False})
        assert quick.json() == {"status": "success"}
        lines = (await rest(slow)).splitlines()
        slow.leave()
        assert len(lines) < 4000
        assert json.loads(lines[-1]) == {"status": "success"}
        assert json.loads(lines[-2])["completed"] == 3999


async def rest(caller: Caller) -> bytes:
    pieces = []
    while piece := await caller.chunk():
        pieces.append(piece)
    return b"".join(pieces)


# --- models that are pulled because somebody asks for them ----------------------------------------


async def test_a_request_for_a_model_that_nobody_has_pulls_it_once_for_all(tmp_path: Path) -> None:
    held = Held()
    config = {"models": {"auto_pull": True}}
    async with Store().serving() as server, relaying(tmp_path, {"a": server}, config=config) as front:
        server.on["/api/pull"] = held
        chats = [asyncio.ensure_future(front.ask({**CHAT, "model": "big"})) for _ in range(3)]
        await begun(held)
        pulling = asyncio.ensure_future(ask(front, "POST", "/api/pull", {"model": "big"}))
        await until(lambda: front.in_flight("a") == 4)  # each request has its lease, and the pull one
        server.add("big")
        held.go.set()
        assert {reply.status for reply in await asyncio.gather(*chats, pulling)} == {200}
        assert len(server.asked("/api/pull")) == 1
        await until(lambda: front.at_rest)


async def test_a_model_that_cannot_be_pulled_is_404_and_not_asked_for_again_at_once(tmp_path: Path) -> None:
    async def fail(talk: Conversation) -> None:
        await talk.whole(404, b'{"error":"pull model manifest: file does not exist"}')

    config = {"models": {"auto_pull": True}}
    async with Store().serving() as server, relaying(tmp_path, {"a": server}, config=config) as front:
        server.on["/api/pull"] = fail
        for _ in range(3):
            reply = await front.ask({**CHAT, "model": "nope"})
            assert (reply.status, reply.json()) == (
                404,
                {"error": "pull model manifest: file does not exist"},
            )
        assert len(server.asked("/api/pull")) == 1
        assert (await ask(front, "POST", "/api/pull", {"model": "nope"})).status == 404
        assert len(server.asked("/api/pull")) == 2, "whoever asks for the pull itself gets one"


async def test_a_caller_that_leaves_ends_the_pull_that_it_waited_for(tmp_path: Path) -> None:
    held = Held()
    config = {"models": {"auto_pull": True}}
    async with Store().serving() as server, relaying(tmp_path, {"a": server}, config=config) as front:
        server.on["/api/pull"] = held
        caller = await front.connect()
        await caller.send({**CHAT, "model": "big"})
        await begun(held)
        caller.leave()
        await happens(held.left)
        await until(lambda: front.at_rest)


async def test_a_caller_of_events_hears_how_far_the_pull_for_it_is(tmp_path: Path) -> None:
    held = Held(b'{"status":"pulling 6a0746a1ec1a","completed":43,"total":100}\n')
    config = {"models": {"auto_pull": True}}
    quick = {"keep_alive_s": 0.5}
    async with (
        Store().serving() as server,
        relaying(tmp_path, {"a": server}, config=config, gateway=quick) as front,
    ):
        server.on["/api/pull"] = held
        caller = await front.connect()
        await caller.send({**CHAT, "model": "big", "stream": True}, "/v1/chat/completions")
        await begun(held)
        await caller.head()
        heard = b": waiting for a (pulling 6a0746a1ec1a 43 %)\n"
        while await caller.chunk() != heard:
            pass
        caller.leave()
        await until(lambda: front.at_rest)
