"""Requests that manage models pass through to whoever writes to their volume, and end exactly once."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from manager.api import passage
from tests.support.gateway import gateway_over
from tests.support.inside import until
from tests.support.relaying import Conversation, Front, relaying
from tests.support.storing import Held, Progress, Store, ask, begun, happens, line, request

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.relaying import Reply

TINY = {"model": "tiny"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": False}
BLOB = "/api/blobs/sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"


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


async def test_a_long_request_passes_whole(tmp_path: Path) -> None:
    body = {"model": "new", "template": "x" * 3_000_000}
    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        assert (await ask(front, "POST", "/api/create", body)).status == 200
        assert server.asked("/api/create") == [body]


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
    one, two = Store(("tiny", "both")), Store(("qwen3", "both"))
    servers = {"one": one, "two": two}
    roles = {"thinking": {"model": "qwen3:latest"}}
    async with (
        one.serving(),
        two.serving(),
        relaying(tmp_path, dict(servers), config={"roles": roles}) as front,
    ):
        for method, path, body, where in (
            ("POST", "/api/show", {"model": "qwen3:latest"}, "two"),
            ("POST", "/api/show", {"name": "qwen3:latest"}, "two"),
            ("POST", "/api/show", {"model": "thinking"}, "two"),
            ("POST", "/api/show", {"model": "both@two"}, "two"),
            ("POST", "/api/show", {"model": "both"}, "one"),
            ("POST", "/api/push", {"model": "qwen3:latest"}, "two"),
            ("POST", "/api/copy", {"source": "qwen3:latest", "destination": "mine"}, "two"),
            ("POST", "/api/create", {"model": "new"}, "one"),
            ("POST", "/api/create", {"model": "new", "from": "qwen3:latest"}, "two"),
            ("POST", "/api/create", {"model": "new", "from": "qwen3:latest", "files": {"x": "y"}}, "one"),
            ("POST", "/api/create", {"model": "new@two"}, "two"),
            ("POST", "/api/pull", {"model": "qwen3:latest"}, "one"),
            ("POST", "/api/pull", {"model": "other@two"}, "two"),
            ("DELETE", "/api/delete", {"model": "both"}, "one"),
            ("DELETE", "/api/delete", {"model": "both"}, "two"),
        ):
            reply = await ask(front, method, path, body)
            assert reply.status == 200, (path, body, reply.body)
            assert await asked(front, servers, reply) == where, (path, body)
        reply = await ask(front, "POST", "/api/show", {"model": "tiny"}, {"X-Instance": "two"})
        assert await asked(front, servers, reply) == "two"


@pytest.mark.parametrize(
    ("method", "path", "key"),
    [
        ("POST", "/api/show", "model"),
        ("POST", "/api/pull", "name"),
        ("POST", "/api/create", "from"),
        ("POST", "/api/copy", "source"),
        ("POST", "/api/copy", "destination"),
        ("DELETE", "/api/delete", "model"),
        ("POST", "/api/chat", "model"),
        ("POST", "/v1/embeddings", "model"),
    ],
)
async def test_a_name_of_any_length_costs_a_short_answer_and_a_short_record(
    tmp_path: Path, method: str, path: str, key: str
) -> None:
    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        body = {"model": "tiny", "source": "tiny", "destination": "mine", key: "x" * 5_000_000}
        reply = await ask(front, method, path, body)
        assert (reply.status, len(reply.body) < 200) == (400, True)
        assert b"at most 1024 characters" in reply.body
        record = await front.record()
        assert len(record.model or "") <= 1024
        assert server.seen == []


@pytest.mark.parametrize("name", ["a b", "a/b/c/d", "tiny:", "x" * 100])
async def test_a_name_that_no_model_can_have_is_a_400_as_from_the_server(tmp_path: Path, name: str) -> None:
    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        for method, path in (
            ("POST", "/api/show"),
            ("POST", "/api/pull"),
            ("DELETE", "/api/delete"),
            ("POST", "/api/chat"),
            ("POST", "/api/embed"),
        ):
            reply = await ask(front, method, path, {"model": name})
            assert (reply.status, reply.json()) == (400, {"error": "invalid model name"}), path
        reply = await ask(front, "POST", "/v1/chat/completions", {"model": name})
        assert (reply.status, reply.json()["error"]["message"]) == (400, "invalid model name")
        assert server.seen == []


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


async def test_what_nobody_has_is_404_in_ollamas_own_words(tmp_path: Path) -> None:
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
                {"error": 'model "nope" not found' if path == "/api/copy" else "model 'nope' not found"},
            )
        # The daemon itself asks for the details of the models there are.
        assert not [seen for seen in server.seen if b"nope" in seen.body]
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


@pytest.mark.parametrize(
    "body", [b'{"status":"writing manifest"}\n{"status":"success"}\n', b'{"status":"success"}']
)
async def test_a_created_model_is_there_when_its_client_has_read_success_wherever_that_is_cut(
    tmp_path: Path, body: bytes
) -> None:
    lifecycle = {"probe_interval_s": 30, "resync_interval_s": 30}
    cut = 0

    async def create(talk: Conversation) -> None:
        model = talk.seen.json()["model"]
        if body.endswith(b"\n"):
            await talk.begin()
        else:  # so Ollama answers without streaming
            await talk.send(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body)
            )
        server.add(model)
        for piece in filter(None, (body[:cut], body[cut:])):
            await (talk.chunk(piece) if body.endswith(b"\n") else talk.send(piece))
            await asyncio.sleep(0.01)  # two pieces are two reads
        if body.endswith(b"\n"):
            await talk.end()

    async with (
        Store().serving() as server,
        relaying(tmp_path, {"a": server}, config={"lifecycle": lifecycle}) as front,
    ):
        server.on["/api/create"] = create
        for cut in range(0, len(body), 3):
            reply = await ask(front, "POST", "/api/create", {"model": f"new{cut}"})
            assert (reply.status, reply.body) == (200, body)
            assert (await front.ask({**CHAT, "model": f"new{cut}"})).status == 200, cut


async def test_what_was_taken_away_behind_our_back_is_found_out(tmp_path: Path) -> None:
    async def missing(talk: Conversation) -> None:
        await talk.whole(404, b'{"error":"not found"}')

    lifecycle = {"probe_interval_s": 0.2, "resync_interval_s": 60}
    async with (
        Store().serving() as server,
        relaying(tmp_path, {"a": server}, config={"lifecycle": lifecycle}) as front,
    ):
        server.models = ("other",)
        server.on["/api/show"] = missing
        assert (await ask(front, "POST", "/api/show", TINY)).status == 404
        instance = front.daemon.fleet.get("a")
        await until(lambda: instance.available_models == ("other:latest",))


# --- names of roles -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["embedding", "Embedding", "thinking", "gpt-4.1", "embedding@a"])
async def test_no_model_is_made_under_the_name_of_a_role(tmp_path: Path, name: str) -> None:
    roles = {"embedding": {"model": "tiny"}, "gpt-4.1": {"model": "tiny"}}
    async with (
        Store().serving() as server,
        relaying(tmp_path, {"a": server}, config={"roles": roles}) as front,
    ):
        for path, body in (
            ("/api/pull", {"model": name}),
            ("/api/pull", {"name": name, "stream": False}),
            ("/api/create", {"model": name, "from": "tiny"}),
            ("/api/copy", {"source": "tiny", "destination": name}),
        ):
            reply = await ask(front, "POST", path, body)
            bare = name.partition("@")[0]
            assert reply.status == 400, (path, body)
            assert f"'{bare}' is a role here" in reply.json()["error"]
            assert f"{bare}:latest" in reply.json()["error"]
        assert not server.seen


async def test_a_model_under_a_roles_name_is_made_and_reached_with_its_tag(tmp_path: Path) -> None:
    roles = {"embedding": {"model": "tiny", "policy": "cpu_only"}}
    async with (
        Store(("tiny", "embedding")).serving() as server,
        relaying(tmp_path, {"a": server}, config={"roles": roles}) as front,
    ):
        for path, body in (
            ("/api/pull", {"model": "embedding:8b"}),
            ("/api/copy", {"source": "tiny", "destination": "embedding:latest"}),
            ("/api/create", {"model": "me/embedding"}),
        ):
            assert (await ask(front, "POST", path, body)).status == 200, path
        await ask(front, "POST", "/api/show", {"model": "embedding"})
        await ask(front, "POST", "/api/show", {"model": "embedding:latest"})
        assert [one["model"] for one in server.asked("/api/show")] == ["tiny", "embedding:latest"]


# --- what others have loaded ----------------------------------------------------------------------


class Loaded(Store):
    """Unloads as Ollama does: it finds the model through its name, so the name must still be there."""

    def __init__(self, names: set[str], *models: str) -> None:
        super().__init__(models)
        self.names = names
        self.loaded = models
        self.on["/api/generate"] = self.unload

    async def unload(self, talk: Conversation) -> None:
        model = talk.seen.json()["model"]
        assert talk.seen.json() == {"model": model, "keep_alive": 0}
        if model not in self.names:
            await talk.whole(404, b'{"error":"not found"}')
            return
        self.loaded = tuple(name for name in self.loaded if name != model)
        await talk.whole(200, b'{"done":true,"done_reason":"unload"}')


@pytest.fixture
def one_volume(monkeypatch: pytest.MonkeyPatch) -> None:
    """All instances are on one volume; those without a container have none of ours otherwise."""
    modules = ("models.volumes", "overview", "models.model_lists", "models.volume_reader")
    for module in (*modules, "routing.router", "routing.placement"):
        monkeypatch.setattr(f"manager.services.{module}.volume_of", lambda _spec: "shared")


@pytest.mark.usefixtures("one_volume")
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("DELETE", "/api/delete", {"model": "tiny"}),
        ("POST", "/api/copy", {"source": "other", "destination": "tiny"}),
        ("POST", "/api/create", {"model": "tiny", "from": "other"}),
        ("POST", "/api/pull", {"model": "tiny"}),
    ],
)
async def test_a_model_that_is_deleted_or_replaced_is_unloaded_everywhere_else(
    tmp_path: Path, method: str, path: str, body: dict[str, str]
) -> None:
    names = {"tiny", "other"}
    one, two, three = Loaded(names, "tiny", "other"), Loaded(names, "tiny", "other"), Loaded(names, "other")

    async def change(talk: Conversation) -> None:
        if path == "/api/pull":
            await talk.begin()
            await talk.chunk(line("pulling abc", digest="abc", total=10, completed=5))
            await talk.chunk(line("verifying sha256 digest"))
            await until(lambda: two.loaded == ("other",))
        names.discard("tiny")  # from here on the old one cannot be found by its name
        if path == "/api/pull":
            await talk.chunk(line("success"))
            await talk.end()
        else:
            await talk.whole(200, b'{"status":"success"}')

    async with (
        one.serving(),
        two.serving(),
        three.serving(),
        relaying(tmp_path, {"one": one, "two": two, "three": three}) as front,
    ):
        one.on[path] = change
        await until(lambda: all(front.daemon.fleet.get(name).models for name in ("one", "two", "three")))
        reply = await ask(front, method, path, body, {"X-Instance": "one"})
        assert (reply.status, reply.headers["x-instance"]) == (200, "one")
        assert two.loaded == ("other",)
        assert one.loaded == ("tiny", "other"), "its own server sees to that"
        assert not three.asked("/api/generate"), "it does not hold the model"
        await until(lambda: front.at_rest)


@pytest.mark.usefixtures("one_volume")
async def test_an_instance_that_does_not_unload_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manager.services.models.volumes._UNLOAD_S", 0.2)
    one, two, three = (Loaded({"tiny"}, "tiny") for _ in range(3))
    two.on["/api/generate"] = lambda talk: talk.left()

    async def crash(talk: Conversation) -> None:
        talk.crash()

    three.on["/api/generate"] = crash
    async with (
        one.serving(),
        two.serving(),
        three.serving(),
        relaying(tmp_path, {"one": one, "two": two, "three": three}) as front,
    ):
        await until(lambda: all(front.daemon.fleet.get(name).models for name in ("one", "two", "three")))
        reply = await ask(front, "DELETE", "/api/delete", {"model": "tiny"}, {"X-Instance": "one"})
        assert reply.status == 200
        assert len(two.asked("/api/generate")) == len(three.asked("/api/generate")) == 1
        assert one.models == ()


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


async def test_a_server_that_stops_in_the_middle_is_told_as_an_error(tmp_path: Path) -> None:
    async def stall(talk: Conversation) -> None:
        await talk.begin()
        await talk.chunk(line("working"))
        await talk.left()

    async with (
        Store().serving() as server,
        relaying(tmp_path, {"a": server}, gateway={"first_byte_timeout_s": 0.3}) as front,
    ):
        server.on["/api/create"] = server.on["/api/pull"] = stall
        for path in ("/api/create", "/api/pull"):
            reply = await ask(front, "POST", path, TINY)
            assert reply.lines()[0] == {"status": "working"}
            assert "sent nothing for 0.3 s" in reply.lines()[-1]["error"]
        await until(lambda: front.at_rest)


async def test_a_body_that_does_not_arrive_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passage, "_UPLOAD_STALL_S", 0.1)
    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        caller = await front.connect()
        await caller.raw(request(front, "POST", "/api/show", None, {"Content-Length": "100"}))
        reply = await caller.reply()
        assert (reply.status, reply.headers["connection"]) == (408, "close")
        assert await caller.ended() == b""
        caller.leave()


def test_without_any_instance_nothing_can_be_pulled(tmp_path: Path) -> None:
    with gateway_over(tmp_path, (), config={"instances": {}}) as gateway:
        answer = gateway.call("POST", "/api/pull", json=TINY)
        assert (answer.status_code, answer.json()) == (503, {"error": "there is no instance"})
        assert gateway.call("POST", "/api/show", json=TINY).status_code == 404
        assert gateway.get("/api/tags") == {"models": []}


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


# --- the end of the daemon ------------------------------------------------------------------------


async def test_what_is_under_way_may_come_to_its_end(tmp_path: Path) -> None:
    held = Held()
    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.on["/api/create"] = held
        creating = asyncio.ensure_future(ask(front, "POST", "/api/create", TINY))
        await begun(held)
        front.server.should_exit = True
        await until(lambda: front.server.servers[0].sockets == ())
        held.go.set()
        reply = await creating
        assert (reply.whole, reply.lines()[-1]) == (True, {"status": "success"})
        assert (await front.record()).outcome == "ok"


async def test_what_does_not_end_in_time_is_cut_and_says_so(tmp_path: Path) -> None:
    held = Held()
    gateway = {"drain_timeout_s": 0.1}
    async with Store().serving() as server, relaying(tmp_path, {"a": server}, gateway=gateway) as front:
        server.on["/api/create"] = server.on["/api/pull"] = held
        server.on["/api/show"] = lambda talk: talk.left()
        waiting = [
            asyncio.ensure_future(ask(front, "POST", "/api/create", TINY)),
            asyncio.ensure_future(ask(front, "POST", "/api/show", TINY)),
        ]
        await begun(held)
        await until(lambda: server.asked("/api/show"))
        front.server.should_exit = True
        created, shown = await asyncio.gather(*waiting)
        why = {"error": "cut off: the manager is being stopped"}
        assert (created.status, created.whole, created.lines()[-1]) == (200, True, why)
        assert (shown.status, shown.json()) == (503, why)
        await until(lambda: len(front.records) == 2)
        assert {record.outcome for record in front.records} == {"cut"}
