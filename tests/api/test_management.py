"""Requests that manage models pass through to whoever writes to their volume, and end exactly once."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import TYPE_CHECKING

import pytest

from tests.support.inside import until
from tests.support.relaying import Conversation, Front, relaying
from tests.support.storing import Progress, Store, ask, line, request

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.relaying import Caller, Reply

TINY = {"model": "tiny"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": False}
BLOB = "/api/blobs/sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
MIB = 2**20


class Held:
    """What a server does only when it is told to; `began` and `left` say how far it is."""

    def __init__(self, *lines: bytes) -> None:
        self.lines = lines or (line("working"),)
        self.began = asyncio.Semaphore(0)
        self.go = asyncio.Event()
        self.left = asyncio.Event()
        self.running = 0
        self.most = 0

    async def __call__(self, talk: Conversation) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        leaving = asyncio.ensure_future(talk.left())
        going = asyncio.ensure_future(self.go.wait())
        try:
            await talk.begin()
            for one in self.lines:
                await talk.chunk(one)
            self.began.release()
            await asyncio.wait({leaving, going}, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                self.left.set()
                return
            await talk.chunk(line("success"))
            await talk.end()
        finally:
            self.running -= 1
            leaving.cancel()
            going.cancel()


async def begun(held: Held) -> None:
    async with asyncio.timeout(20):
        await held.began.acquire()


async def happens(event: asyncio.Event) -> None:
    async with asyncio.timeout(20):
        await event.wait()


# --- what passes, and what does not ---------------------------------------------------------------


async def test_a_request_passes_without_what_is_ours_and_its_answer_says_where_it_comes_from(
    tmp_path: Path,
) -> None:
    async def show(talk: Conversation) -> None:
        await talk.whole(
            200, b'{"details":{}}', "X-Instance: forged\r\nX-Own: 1\r\nConnection: X-Hop\r\nX-Hop: 1\r\n"
        )

    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.on["/api/show"] = show
        given = {
            "Authorization": "Bearer secret",
            "X-Lane": "fast",
            "X-Project-ID": "me",
            "X-Custom": "kept",
            "Connection": "keep-alive, X-Gone",
            "X-Gone": "1",
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        }
        reply = await ask(front, "POST", "/api/show?verbose=1", TINY, given)
        assert (reply.status, reply.json()) == (200, {"details": {}})
        assert (reply.headers["x-instance"], reply.headers["x-model"]) == ("a", "tiny")
        assert "x-start-ms" not in reply.headers
        assert (reply.headers["x-own"], "x-hop" in reply.headers) == ("1", False)
        (seen,) = server.seen
        assert (seen.method, seen.target, seen.json()) == ("POST", "/api/show?verbose=1", TINY)
        names = {name.lower() for name, _ in seen.headers}
        assert not names & {"authorization", "x-lane", "x-project-id", "x-gone", "user-agent"}
        assert (seen.header("x-custom"), seen.header("x-request-id")) == (
            "kept",
            reply.headers["x-request-id"],
        )
        assert (seen.header("traceparent") or "").startswith("00-0af7651916cd43dd8448eb211c80319c-")
        record = await front.record()
        assert (record.path, record.model, record.effective_target) == ("/api/show", "tiny", "a")
        assert (record.status, record.outcome, record.project_id, record.lane) == (200, "ok", "me", "fast")
        assert record.request_id == reply.headers["x-request-id"]
        assert front.at_rest


async def test_a_servers_own_error_is_the_callers(tmp_path: Path) -> None:
    async def refuse(talk: Conversation) -> None:
        await talk.whole(400, b'{"error":"no such thing"}')

    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        for path in ("/api/show", "/api/create", "/api/pull", "/api/push", "/api/delete"):
            server.on[path] = refuse
            reply = await ask(front, "DELETE" if path == "/api/delete" else "POST", path, TINY)
            assert (reply.status, reply.json()) == (400, {"error": "no such thing"}), path
        await until(lambda: len(front.records) == 5)
        assert {record.outcome for record in front.records} <= {"client_error", "upstream_error"}
        assert front.at_rest


@pytest.mark.parametrize(
    ("method", "path", "body", "message"),
    [
        ("POST", "/api/show", b"", "missing request body"),
        ("POST", "/api/show", b"{", "the request body is not JSON"),
        ("POST", "/api/pull", b"[]", "the request body must be a JSON object"),
        ("POST", "/api/create", b"{}", "model is required"),
        ("DELETE", "/api/delete", b'{"model": 5}', "model must be a string"),
        ("POST", "/api/pull", b'{"model": "tiny", "stream": 1}', "stream must be true or false"),
        ("POST", "/api/copy", b'{"destination": "x"}', "source is required"),
        ("POST", "/api/copy", b'{"source": "tiny@a", "destination": "x@b"}', "two instances"),
    ],
)
async def test_a_body_that_names_nothing_is_refused_before_anybody_is_asked(
    tmp_path: Path, method: str, path: str, body: bytes, message: str
) -> None:
    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        reply = await ask(front, method, path, body)
        assert reply.status == 400
        assert message in reply.json()["error"]
        assert not server.seen
        assert (await front.record()).outcome == "client_error"


# --- where to -------------------------------------------------------------------------------------


async def asked(front: Front, servers: dict[str, Store], reply: Reply) -> str:
    """Who got the last request, by the answer and by who has seen one."""
    (who,) = [name for name, server in servers.items() if server.seen]
    assert reply.headers["x-instance"] == who
    for server in servers.values():
        server.seen.clear()
    return who


async def test_a_request_goes_where_its_model_is_and_a_pin_decides(tmp_path: Path) -> None:
    one, two = Store(("tiny", "both")), Store(("qwen3:8b", "both"))
    servers = {"one": one, "two": two}
    roles = {"thinking": {"model": "qwen3:8b:latest"}}
    async with (
        one.serving(),
        two.serving(),
        relaying(tmp_path, dict(servers), config={"roles": roles}) as front,
    ):
        for method, path, body, where in (
            ("POST", "/api/show", {"model": "qwen3:8b:latest"}, "two"),
            ("POST", "/api/show", {"name": "qwen3:8b:latest"}, "two"),
            ("POST", "/api/show", {"model": "thinking"}, "two"),
            ("POST", "/api/show", {"model": "both@two"}, "two"),
            ("POST", "/api/show", {"model": "both"}, "one"),
            ("POST", "/api/push", {"model": "qwen3:8b:latest"}, "two"),
            ("POST", "/api/copy", {"source": "qwen3:8b:latest", "destination": "mine"}, "two"),
            ("POST", "/api/create", {"model": "new"}, "one"),
            ("POST", "/api/create", {"model": "new", "from": "qwen3:8b:latest"}, "two"),
            ("POST", "/api/create", {"model": "new", "from": "qwen3:8b:latest", "files": {"x": "y"}}, "one"),
            ("POST", "/api/create", {"model": "new@two"}, "two"),
            ("POST", "/api/pull", {"model": "qwen3:8b:latest"}, "one"),
            ("POST", "/api/pull", {"model": "other@two"}, "two"),
            ("DELETE", "/api/delete", {"model": "both"}, "one"),
            ("DELETE", "/api/delete", {"model": "both"}, "two"),
        ):
            reply = await ask(front, method, path, body)
            assert reply.status == 200, (path, body, reply.body)
            assert await asked(front, servers, reply) == where, (path, body)
        reply = await ask(front, "POST", "/api/show", {"model": "tiny"}, {"X-Instance": "two"})
        assert await asked(front, servers, reply) == "two"


async def test_the_server_gets_the_name_without_the_pin_and_a_role_by_its_model(tmp_path: Path) -> None:
    roles = {"thinking": {"model": "tiny"}}
    async with (
        Store().serving() as server,
        relaying(tmp_path, {"a": server}, config={"roles": roles}) as front,
    ):
        await ask(front, "POST", "/api/show", {"model": "tiny@a", "verbose": True})
        await ask(front, "POST", "/api/show", {"Name": "thinking"})
        await ask(front, "POST", "/api/copy", {"source": "tiny@a", "destination": "mine@a"})
        assert server.asked("/api/show") == [{"model": "tiny", "verbose": True}, {"model": "tiny"}]
        assert server.asked("/api/copy") == [{"source": "tiny", "destination": "mine"}]


async def test_what_nobody_has_is_404_and_names_what_there_is(tmp_path: Path) -> None:
    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        for method, path, body in (
            ("POST", "/api/show", {"model": "nope"}),
            ("POST", "/api/push", {"model": "nope"}),
            ("POST", "/api/copy", {"source": "nope", "destination": "x"}),
            ("DELETE", "/api/delete", {"model": "nope"}),
        ):
            reply = await ask(front, method, path, body)
            assert (reply.status, reply.json()) == (
                404,
                {"error": "model 'nope' not found; models: tiny:latest"},
            )
        assert not server.seen
        reply = await ask(front, "POST", "/api/pull", {"model": "x@nowhere"})
        assert reply.status == 404
        assert reply.json()["error"] == "there is no instance 'nowhere'; there is: a"
        await until(lambda: len(front.records) == 5)
        assert {record.outcome for record in front.records} == {"refused"}


async def test_a_model_that_appeared_just_now_is_found(tmp_path: Path) -> None:
    lifecycle = {"probe_interval_s": 30, "resync_interval_s": 30}
    async with (
        Store().serving() as server,
        relaying(tmp_path, {"a": server}, config={"lifecycle": lifecycle}) as front,
    ):
        server.add("fresh")
        assert (await ask(front, "POST", "/api/show", {"model": "fresh"})).status == 200


# --- what has changed is seen ---------------------------------------------------------------------


async def test_a_change_is_seen_before_its_answer_ends(tmp_path: Path) -> None:
    lifecycle = {"probe_interval_s": 30, "resync_interval_s": 30}
    async with (
        Store().serving() as server,
        relaying(tmp_path, {"a": server}, config={"lifecycle": lifecycle}) as front,
    ):
        await ask(front, "POST", "/api/copy", {"source": "tiny", "destination": "copied"})
        assert (await front.ask({**CHAT, "model": "copied"})).status == 200
        await ask(front, "DELETE", "/api/delete", {"model": "copied"})
        assert (await front.ask({**CHAT, "model": "copied"})).status == 404
        for path in ("/api/create", "/api/pull"):
            model = path.rpartition("/")[2]
            caller = await front.connect()
            await caller.raw(request(front, "POST", path, {"model": model}))
            await caller.head()
            progress = Progress(caller)
            while (await progress.line())["status"] != "success":
                pass
            # The answer has not ended yet: whoever reads that line may go on at once.
            assert (await front.ask({**CHAT, "model": model})).status == 200, path
            caller.leave()
        listed = json.loads((await ask(front, "GET", "/api/tags")).body)["models"]
        assert sorted(model["name"] for model in listed) == ["create:latest", "pull:latest", "tiny:latest"]


# --- one after the other --------------------------------------------------------------------------


async def test_changes_of_one_volume_wait_for_each_other_and_for_nobody_else(tmp_path: Path) -> None:
    one, two = Store(), Store()
    held = Held()
    async with (
        one.serving(),
        two.serving(),
        relaying(tmp_path, {"one": one, "two": two}) as front,
    ):
        one.on["/api/create"] = one.on["/api/pull"] = held
        creating = asyncio.ensure_future(ask(front, "POST", "/api/create", {"model": "a"}))
        await begun(held)
        waiting = [
            asyncio.ensure_future(ask(front, "POST", "/api/pull", {"model": "b"})),
            asyncio.ensure_future(ask(front, "POST", "/api/create", {"model": "c"})),
            asyncio.ensure_future(ask(front, "DELETE", "/api/delete", TINY)),
        ]
        # Neither other volumes nor what only looks, nor parts of models, have to wait.
        assert (await ask(front, "DELETE", "/api/delete", {"model": "tiny@two"})).status == 200
        assert (await ask(front, "POST", "/api/show", TINY)).status == 200
        assert (await ask(front, "POST", "/api/push", TINY)).status == 200
        one.on["/api/blobs"] = lambda talk: talk.send(b"HTTP/1.1 201 X\r\nContent-Length: 0\r\n\r\n")
        assert (await ask(front, "POST", BLOB, b"")).status == 201
        assert not any(task.done() for task in waiting)
        held.go.set()
        replies = await asyncio.gather(creating, *waiting)
        assert [reply.status for reply in replies] == [200, 200, 200, 200]
        assert held.most == 1
        assert replies[1].lines()[0] == {"status": "waiting for the creation of a"}
        await until(lambda: front.at_rest)


async def test_whoever_leaves_while_it_waits_gives_up_its_turn(tmp_path: Path) -> None:
    held = Held()
    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.on["/api/create"] = held
        creating = asyncio.ensure_future(ask(front, "POST", "/api/create", {"model": "a"}))
        await begun(held)
        caller = await front.connect()
        await caller.raw(request(front, "POST", "/api/create", {"model": "b"}))
        await until(lambda: front.daemon.backend.passing.volumes._turns["instance:a"]._waiters)
        caller.leave()
        await until(lambda: front.records)
        assert front.records[0].outcome == "client_gone"
        held.go.set()
        assert (await creating).status == 200
        assert len(server.asked("/api/create")) == 1


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
        for number in range(20_000):
            await talk.chunk(line(f"pulling abc {'x' * 200}", digest="abc", completed=number))
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
        assert len(lines) < 20_000
        assert json.loads(lines[-1]) == {"status": "success"}
        assert json.loads(lines[-2])["completed"] == 19_999


async def rest(caller: Caller) -> bytes:
    body = b""
    while piece := await caller.chunk():
        body += piece
    return body


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


# --- callers that leave, servers that do not answer -----------------------------------------------


async def test_a_caller_that_leaves_takes_its_request_with_it(tmp_path: Path) -> None:
    left = asyncio.Event()

    async def silent(talk: Conversation) -> None:
        await talk.left()
        left.set()

    async def stalls(talk: Conversation) -> None:
        await talk.begin()
        await talk.chunk(line("working"))
        await silent(talk)

    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.on |= {"/api/show": silent, "/api/create": stalls, "/api/delete": silent, "/api/push": stalls}
        for path in server.on:
            left.clear()
            asked_before = len(server.seen)
            caller = await front.connect()
            await caller.raw(request(front, "DELETE" if path == "/api/delete" else "POST", path, TINY))
            await until(lambda before=asked_before: len(server.seen) > before)  # type: ignore[misc]
            if server.on[path] is stalls:
                await caller.head()
            caller.leave()
            await happens(left)
            await until(lambda: front.at_rest)
        assert [record.outcome for record in front.records] == ["client_gone"] * 4


async def test_a_server_that_breaks_off_is_told_as_an_error(tmp_path: Path) -> None:
    async def crash(talk: Conversation) -> None:
        talk.crash()

    async def break_off(talk: Conversation) -> None:
        await talk.begin()
        await talk.chunk(b'{"status":"half a')
        talk.crash()

    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.on["/api/show"] = crash
        reply = await ask(front, "POST", "/api/show", TINY)
        assert reply.status == 502
        server.on["/api/create"] = break_off
        reply = await ask(front, "POST", "/api/create", TINY)
        assert (reply.status, reply.whole) == (200, True)
        first, last = reply.body.splitlines()
        assert first == b'{"status":"half a'
        assert "broke off" in json.loads(last)["error"]
        await until(lambda: len(front.records) == 2)
        assert [record.outcome for record in front.records] == ["upstream_error"] * 2


async def test_a_document_that_breaks_off_never_looks_whole(tmp_path: Path) -> None:
    async def break_off(talk: Conversation) -> None:
        await talk.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        talk.crash()

    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.on["/api/show"] = break_off
        reply = await ask(front, "POST", "/api/show", TINY)
        assert not reply.whole
        assert (await front.record()).outcome == "upstream_error"


async def test_a_server_that_says_nothing_is_504_when_its_time_is_over(tmp_path: Path) -> None:
    async with (
        Store().serving() as server,
        relaying(tmp_path, {"a": server}, gateway={"first_byte_timeout_s": 0.3}) as front,
    ):
        server.on["/api/show"] = lambda talk: talk.left()
        reply = await ask(front, "POST", "/api/show", TINY)
        assert (reply.status, "did not answer within 0.3 s" in reply.json()["error"]) == (504, True)
        assert (await front.record()).outcome == "timeout"


async def test_a_server_that_is_gone_is_503_with_a_hint_when_to_come_back(tmp_path: Path) -> None:
    async def gone(talk: Conversation) -> bool:
        talk.crash()
        return True

    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server._status = gone  # type: ignore[method-assign]
        await until(lambda: front.daemon.fleet.get("a").usable_endpoint() is None, within_s=20)
        for kind in ("show", "pull", "create"):
            reply = await ask(front, "POST", f"/api/{kind}", TINY)
            assert (reply.status, int(reply.headers["retry-after"]) >= 1) == (503, True), kind


# --- parts of models ------------------------------------------------------------------------------


async def received(talk: Conversation) -> bytes:
    length = int(talk.seen.header("content-length") or 0)
    return await talk.reader.readexactly(length)


async def test_a_blob_passes_whole_whatever_its_size(tmp_path: Path) -> None:
    got = hashlib.sha256()

    async def store(talk: Conversation) -> None:
        left = int(talk.seen.header("content-length") or 0)
        while left:
            piece = await talk.reader.read(min(left, MIB))
            left -= len(piece)
            got.update(piece)
        await talk.send(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")

    piece = bytes(range(256)) * (MIB // 256)
    wanted = hashlib.sha256()
    gateway = {"max_body": "2m"}
    async with Store().serving() as server, relaying(tmp_path, {"a": server}, gateway=gateway) as front:
        server.on["/api/blobs"] = store
        caller = await front.connect()
        head = request(front, "POST", BLOB, None, {"Content-Length": str(100 * MIB)})
        await caller.raw(head)
        for _ in range(100):
            wanted.update(piece)
            await caller.raw(piece)
        reply = await caller.reply()
        caller.leave()
        assert (reply.status, reply.headers["x-instance"]) == (201, "a")
        assert "x-model" not in reply.headers
        assert got.digest() == wanted.digest()
        record = await front.record()
        assert (record.path, record.outcome) == ("/api/blobs", "ok")


async def test_a_blob_in_chunks_stays_in_chunks_and_heads_pass(tmp_path: Path) -> None:
    seen: list[bytes] = []

    async def store(talk: Conversation) -> None:
        if talk.seen.method == "HEAD":
            await talk.send(b"HTTP/1.1 404 X\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n")
            return
        assert talk.seen.header("transfer-encoding") == "chunked"
        while size := int(await talk.reader.readuntil(b"\r\n"), 16):
            seen.append(await talk.reader.readexactly(size))
            await talk.reader.readexactly(2)
        await talk.send(b"HTTP/1.1 201 X\r\nContent-Length: 0\r\n\r\n")

    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.on["/api/blobs"] = store
        caller = await front.connect()
        host = f"Host: 127.0.0.1:{front.port}"
        await caller.raw(f"POST {BLOB} HTTP/1.1\r\n{host}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        await caller.raw(b"5\r\nhello\r\n5\r\nworld\r\n0\r\n\r\n")
        assert (await caller.reply()).status == 201
        assert b"".join(seen) == b"helloworld"
        caller.leave()
        reply = await ask(front, "HEAD", BLOB)
        assert (reply.status, reply.headers["content-length"]) == (404, "20")


async def test_a_server_that_does_not_read_holds_the_upload_up(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def wait_then_store(talk: Conversation) -> None:
        await go.wait()
        await received(talk)
        await talk.send(b"HTTP/1.1 201 X\r\nContent-Length: 0\r\n\r\n")

    size = 64 * MIB
    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.on["/api/blobs"] = wait_then_store
        caller = await front.connect()
        await caller.raw(request(front, "POST", BLOB, None, {"Content-Length": str(size)}))
        sent = 0

        async def send() -> None:
            nonlocal sent
            while sent < size:
                await caller.raw(bytes(MIB))
                sent += MIB

        sending = asyncio.ensure_future(send())
        before = -1
        while before != sent or not server.seen:
            before = sent
            await asyncio.wait({sending}, timeout=0.3)
        assert sent < 24 * MIB, "no more than what the sockets on the way hold"
        go.set()
        await sending
        assert (await caller.reply()).status == 201
        caller.leave()


async def test_an_upload_that_is_too_large_is_refused_and_ends_at_the_server_too(tmp_path: Path) -> None:
    left = asyncio.Event()

    async def read(talk: Conversation) -> None:
        await talk.left()
        left.set()

    gateway = {"max_upload": "1m"}
    async with Store().serving() as server, relaying(tmp_path, {"a": server}, gateway=gateway) as front:
        server.on["/api/blobs"] = read
        reply = await ask(front, "POST", BLOB, bytes(MIB + 1))
        assert reply.status == 413
        assert reply.json()["error"] == "the request body is too large: at most 1048576 bytes are taken"
        await happens(left)
        await until(lambda: front.at_rest)
        assert (await front.record()).outcome == "client_error"


async def test_a_caller_that_leaves_in_the_middle_of_an_upload_ends_it(tmp_path: Path) -> None:
    left = asyncio.Event()

    async def read(talk: Conversation) -> None:
        await talk.left()
        left.set()

    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.on["/api/blobs"] = read
        caller = await front.connect()
        await caller.raw(request(front, "POST", BLOB, None, {"Content-Length": str(MIB)}))
        await caller.raw(b"x" * 1000)
        await until(lambda: server.seen)
        caller.leave()
        await happens(left)
        await until(lambda: front.at_rest)
        assert (await front.record()).outcome == "client_gone"


async def test_an_answer_before_the_end_of_an_upload_is_the_callers(tmp_path: Path) -> None:
    async def refuse(talk: Conversation) -> None:
        await talk.whole(400, b'{"error":"no room"}')

    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.on["/api/blobs"] = refuse
        caller = await front.connect()
        await caller.raw(request(front, "POST", BLOB, None, {"Content-Length": str(10 * MIB)}))
        await caller.raw(b"x" * 1000)
        reply = await caller.reply()
        assert (reply.status, reply.json()) == (400, {"error": "no room"})
        caller.leave()
        await until(lambda: front.at_rest)


async def test_a_caller_that_takes_nothing_is_cut_off(tmp_path: Path) -> None:
    left = asyncio.Event()

    async def endless(talk: Conversation) -> None:
        await talk.begin()
        try:
            while True:
                await talk.chunk(line("x" * 60_000))
        finally:
            left.set()

    async with (
        Store().serving() as server,
        relaying(tmp_path, {"a": server}, gateway={"idle_timeout_s": 0.5}) as front,
    ):
        server.on["/api/push"] = endless
        caller = await front.connect()
        await caller.raw(request(front, "POST", "/api/push", TINY))
        await until(lambda: front.records, within_s=30)
        assert front.records[0].outcome == "timeout"
        await happens(left)
        await until(lambda: front.at_rest)
        caller.leave()
