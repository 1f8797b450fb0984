"""The stages of a rollout: which requests pass to the raw server as they came, and which are managed."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from manager.settings import load_settings
from manager.settings.changes import changes
from manager.wire.encoding import zstd
from tests.support.inside import until
from tests.support.relaying import LAST, LINE, Conversation, Scripted, a_word, relaying

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.support.relaying import Front, Reply

SETTINGS = "/api/settings/models"
TINY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
ODD = b' {"model" : "tiny", "messages":[], "x": 1.50, "options":{"num_gpu":0}, "options":{"seed":1}} \n'


def stage(name: str, raw: Scripted, **more: Any) -> dict[str, Any]:
    return {"rollout": {"stage": name, "raw_url": raw.url, **more}}


async def put(front: Front, rollout: Mapping[str, Any] | None) -> Reply:
    headers = {"Content-Type": "application/json"}
    return await front.ask({"rollout": rollout}, SETTINGS, headers)


async def get(front: Front, path: str, headers: Mapping[str, str] | None = None) -> Reply:
    caller = await front.connect()
    lines = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    try:
        await caller.raw(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{lines}\r\n".encode())
        return await caller.reply()
    finally:
        caller.leave()


async def metric(front: Front, name: str) -> float:
    text = (await get(front, "/metrics")).body.decode()
    return float(next(line for line in text.splitlines() if line.startswith(name)).rpartition(" ")[2])


@pytest.mark.parametrize("name", ["observe", "shadow"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat?x=1", ODD),
        ("/api/chat", json.dumps({**TINY, "keep_alive": 0, "messages": []}).encode()),
        ("/api/generate", b"no JSON at all"),
        ("/api/chat", b'{"messages": []}'),
        ("/v1/embeddings", b'{"model": "tiny@a", "input": "x"}'),
        ("/api/chat", b""),
        ("/api/chat", json.dumps({**TINY, "pad": "x" * 3_000_000}).encode()),
    ],
)
async def test_all_inference_passes_as_it_came(tmp_path: Path, name: str, path: str, body: bytes) -> None:
    changed = {"roles": {"output": {"model": "tiny"}}, "models": {"settings": {"tiny": {"think": True}}}}
    async with (
        Scripted().serving() as a,
        Scripted().serving() as raw,
        relaying(tmp_path, {"a": a}, config={**stage(name, raw), **changed}) as front,
    ):

        async def answers(talk: Conversation) -> None:
            await talk.whole(200, LAST, "X-Own: yes\r\n")

        raw.answer = answers
        reply = await front.ask(body, path, {"X-Lane": "output", "User-Agent": "me", "X-Other": "1"})
        assert (reply.status, reply.body) == (200, LAST)
        assert (reply.headers["x-instance"], reply.headers["x-own"]) == ("raw", "yes")
        assert [(one.target, one.body) for one in raw.seen] == [(path, body)]
        assert (raw.seen[0].header("user-agent"), raw.seen[0].header("x-other")) == ("me", "1")
        assert a.seen == []
        record = await front.record()
        assert (record.effective_target, record.provider, record.attempts) == ("raw", "local", 1)
        assert (record.endpoint, record.outcome) == (raw.url, "ok")
        await until(lambda: front.at_rest)
        assert front.relay.bodies.held_bytes == 0


async def test_a_compressed_body_passes_compressed(tmp_path: Path) -> None:
    async with (
        Scripted().serving() as a,
        Scripted().serving() as raw,
        relaying(tmp_path, {"a": a}, config=stage("shadow", raw)) as front,
    ):

        async def answers(talk: Conversation) -> None:
            await talk.whole(200, b"{}")

        raw.answer = answers
        body = zstd.compress(json.dumps(TINY).encode())
        reply = await front.ask(body, "/v1/chat/completions", {"Content-Encoding": "zstd"})
        assert reply.status == 200
        assert raw.seen[0].body == body
        assert raw.seen[0].header("content-encoding") == "zstd"
        assert (await front.record()).shadow_target == "a"
        await until(lambda: front.at_rest)
        assert front.relay.bodies.held_bytes == 0


async def test_no_credential_of_a_client_reaches_the_raw_server(tmp_path: Path) -> None:
    """So no raw_url can spend the money of an account: a server that is paid asks for a key."""
    async with (
        Scripted().serving() as a,
        Scripted().serving() as raw,
        relaying(tmp_path, {"a": a}, config=stage("observe", raw), key="k" * 20) as front,
    ):
        assert (await front.ask(TINY)).status == 401
        assert (await get(front, "/api/tags")).status == 401
        keys = {"Authorization": f"Bearer {'k' * 20}", "X-API-Key": "k" * 20}
        assert (await front.ask(TINY, headers=keys)).status == 200
        assert (await get(front, "/v1/models/x", keys)).headers["x-instance"] == "raw"
        for seen in raw.seen:
            assert seen.header("authorization") is seen.header("x-api-key") is None
        assert len(raw.seen) == 2


async def test_observe_makes_no_decision(tmp_path: Path) -> None:
    async with (
        Scripted().serving() as a,
        Scripted().serving() as raw,
        relaying(tmp_path, {"a": a}, config=stage("observe", raw)) as front,
    ):
        await front.ask({**TINY, "model": "unknown"})
        record = await front.record()
        assert (record.role, record.policy, record.shadow_target, record.disagreement) == (None,) * 4


async def is_missing(talk: Conversation) -> None:
    await talk.whole(404, b'{"error":"model not found"}')


async def fails(talk: Conversation) -> None:
    await talk.whole(500, b'{"error":"something went wrong"}')


async def refuses(talk: Conversation) -> None:
    await talk.whole(400, b'{"error":"bad options"}')


async def dies(talk: Conversation) -> None:
    talk.crash()


@pytest.mark.parametrize(
    ("model", "answer", "status", "target", "refused", "differs"),
    [
        ("tiny", a_word, 200, "a", None, None),
        ("output", a_word, 200, "a", None, "model"),
        ("second", a_word, 200, "a", None, "fallback"),
        ("unknown", a_word, 200, None, "model_missing", "refused"),
        ("unknown", is_missing, 404, None, "model_missing", None),
        ("slow", a_word, 200, None, "policy", "refused"),
        ("tiny", is_missing, 404, "a", None, "model_missing"),
        ("tiny", fails, 500, "a", None, "raw_failed"),
        ("tiny", dies, 502, "a", None, "raw_failed"),
        ("tiny", refuses, 400, "a", None, None),
    ],
)
async def test_shadow_records_what_would_have_happened(  # noqa: PLR0917
    tmp_path: Path,
    model: str,
    answer: Any,
    status: int,
    target: str | None,
    refused: str | None,
    differs: Any,
) -> None:
    roles = {
        "output": {"model": "tiny"},
        "second": {"model": "missing", "kind": "generate", "fallbacks": ["third"]},
        "third": {"model": "second", "kind": "generate"},
        "slow": {"model": "tiny", "kind": "generate", "mode": "async"},
    }
    async with (
        Scripted(("tiny", "second")).serving() as a,
        Scripted().serving() as raw,
        relaying(tmp_path, {"a": a}, config={**stage("shadow", raw), "roles": roles}) as front,
    ):
        raw.answer = answer
        for _ in range(2):
            reply = await front.ask({**TINY, "model": model})
            assert reply.status == status
        assert (len(raw.seen), a.seen) == (2, [])
        record = await front.record(1)
        assert (record.shadow_target, record.shadow_refused, record.disagreement) == (
            target,
            refused,
            differs,
        )
        assert front.kinds().count("rollout_disagreement") == (differs is not None)
        if differs:
            name = f'ollama_manager_rollout_disagreements_total{{reason="{differs}"}}'
            assert await metric(front, name) == 2
        stored = (await get(front, f"/api/runtime/compute/requests/{record.request_id}")).json()
        assert (stored["shadow_target"], stored["disagreement"]) == (target, differs)
        assert stored["decision"]["asked"]["model"] == model
        assert "managed it would" in stored["summary"]
        # Nothing was reserved for it, and nothing is held against an instance.
        assert front.daemon.fleet.get("a").in_flight == 0
        breakers = front.daemon.backend.passing.routing.breakers
        assert not breakers.why_shut("a")


async def test_a_dead_raw_server_is_the_clients_error_and_no_instance_answers(tmp_path: Path) -> None:
    raw = Scripted()
    async with Scripted().serving() as a:
        async with raw.serving():
            pass
        async with relaying(tmp_path, {"a": a}, config=stage("shadow", raw)) as front:
            reply = await front.ask(TINY)
            assert reply.status == 502
            assert a.seen == []
            assert (await get(front, "/v1/models/x")).status == 502
            assert (await front.record()).fallback is False


LANES = {"roles": {"output": {"model": "tiny"}, "control": {"model": "tiny"}}}


async def test_only_the_lanes_named_are_managed(tmp_path: Path) -> None:
    async with (
        Scripted().serving() as a,
        Scripted(("own",)).serving() as raw,
        relaying(tmp_path, {"a": a}, config={**LANES, **stage("lanes", raw, lanes=["output"])}) as front,
    ):
        lane = {"X-Lane": "output"}
        where = [
            (await front.ask({**TINY, "model": "output"})).headers["x-instance"],
            (await front.ask(TINY, headers=lane)).headers["x-instance"],
            (await front.ask({**TINY, "model": "control"})).headers["x-instance"],
            (await front.ask(TINY)).headers["x-instance"],
            (await front.ask(TINY, headers={"X-Lane": "control"})).headers["x-instance"],
        ]
        assert where == ["a", "a", "raw", "raw", "raw"]
        assert [seen.json()["model"] for seen in a.seen] == ["tiny", "tiny"]
        assert [seen.json()["model"] for seen in raw.seen] == ["control", "tiny", "tiny"]
        # A body that cannot be read names no lane; with one it is refused as ever.
        assert (await front.ask(b"[]", headers=lane)).status == 400
        assert (await front.ask(b'{"stream":false}', headers=lane)).headers["x-instance"] == "a"
        raw.answer = is_missing
        assert (await front.ask(b"[]")).headers["x-instance"] == "raw"
        # What a client looks up is where its inference goes.
        assert (await front.ask({"model": "output"}, "/api/show")).headers["x-instance"] == "a"
        assert (await front.ask({"name": "tiny"}, "/api/show")).headers["x-instance"] == "raw"
        assert (await get(front, "/v1/models/output")).json()["id"] == "output"
        assert (await get(front, "/v1/models/control")).headers["x-instance"] == "raw"
        assert [one["name"] for one in (await get(front, "/api/tags")).json()["models"]] == ["own:latest"]


@pytest.mark.parametrize("name", ["observe", "shadow"])
async def test_lists_and_all_that_manages_models_pass_too(tmp_path: Path, name: str) -> None:
    async with (
        Scripted().serving() as a,
        Scripted(("own",)).serving() as raw,
        relaying(tmp_path, {"a": a}, config=stage(name, raw)) as front,
    ):

        async def answers(talk: Conversation) -> None:
            await talk.whole(200, b'{"fine":true}')

        raw.answer = answers
        tags = await get(front, "/api/tags")
        assert [one["name"] for one in tags.json()["models"]] == ["own:latest"]
        for path in ("/v1/models", "/v1/models/own", "/v1/rerank", "/api/status"):
            assert (await get(front, path)).json() == {"fine": True}
        for path in ("/api/show", "/api/pull", "/api/create", "/api/copy", "/v1/rerank"):
            assert (await front.ask(b'{"a": 1}', path)).headers["x-instance"] == "raw"
            assert (raw.seen[-1].target, raw.seen[-1].body) == (path, b'{"a": 1}')
        assert (await get(front, "/v1/..%2Fapi%2Fdelete")).status == 404
        assert a.seen == []
        # The control API stays.
        assert (await get(front, "/readyz")).json()["rollout"] == name
        listed = (await get(front, "/api/runtime/compute/instances")).json()
        assert ([one["id"] for one in listed["instances"]], listed["rollout"]) == (["a"], name)


async def test_a_recording_passes_and_its_decision_is_recorded(tmp_path: Path) -> None:
    form = (
        b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n'
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n\x00\x01\r\n--B--\r\n'
    )
    async with (
        Scripted().serving() as a,
        Scripted().serving() as raw,
        relaying(tmp_path, {"a": a}, config=stage("shadow", raw)) as front,
    ):

        async def answers(talk: Conversation) -> None:
            await talk.whole(200, b'{"text":"x"}')

        raw.answer = answers
        kind = {"Content-Type": "multipart/form-data; boundary=B"}
        reply = await front.ask(form, "/v1/audio/transcriptions", kind)
        assert (reply.json(), reply.headers["x-instance"]) == ({"text": "x"}, "raw")
        assert raw.seen[0].body == form
        assert (await front.record()).disagreement == "refused"


async def test_a_run_passes_as_well(tmp_path: Path) -> None:
    async with (
        Scripted().serving() as a,
        Scripted().serving() as raw,
        relaying(tmp_path, {"a": a}, config=stage("shadow", raw)) as front,
    ):
        begun = await front.ask(
            {"path": "/api/chat", "body": TINY}, "/api/v1/runs", {"Content-Type": "application/json"}
        )
        run_id = begun.json()["id"]

        async def run() -> Any:
            return (await get(front, f"/api/v1/runs/{run_id}")).json()

        async with asyncio.timeout(20):
            while (ended := await run())["status"] in ("queued", "running"):  # noqa: ASYNC110  (nobody tells)
                await asyncio.sleep(0.01)
        assert (ended["status"], ended["instance"]) == ("succeeded", "raw")
        assert a.seen == []


async def test_a_change_of_the_stage_never_cuts_an_open_request(tmp_path: Path) -> None:
    async with (
        Scripted().serving() as a,
        Scripted().serving() as raw,
        relaying(tmp_path, {"a": a}, config=LANES) as front,
    ):
        go = asyncio.Event()

        async def held(talk: Conversation) -> None:
            await talk.begin()
            await talk.chunk(LINE)
            await go.wait()
            await talk.chunk(LAST)
            await talk.end()

        a.answer = raw.answer = held
        open_ = []
        for name, expected in (
            ("all", "a"),
            ("observe", "raw"),
            ("lanes", "raw"),
            ("shadow", "raw"),
            ("all", "a"),
            ("observe", "raw"),
        ):
            reply = await put(front, {"stage": name, "raw_url": raw.url, "lanes": ["output"]})
            assert reply.status == 200, reply.body
            caller = await front.connect()
            await caller.send(TINY)
            assert (await caller.head())[1]["x-instance"] == expected
            assert await caller.chunk() == LINE
            open_.append(caller)
        # Back to what the file says: all.
        assert (await put(front, None)).json()["rollout"] == {
            "stage": "all",
            "lanes": [],
            "raw_url": None,
        }
        go.set()
        for caller in open_:
            assert await caller.chunk() == LAST
            assert await caller.chunk() == b""
            caller.leave()
        assert [one.outcome for one in front.records] == ["ok"] * 6
        assert front.kinds().count("rollout_changed") == 7
        await until(lambda: front.at_rest)


async def test_a_client_that_leaves_ends_its_request_at_the_raw_server(tmp_path: Path) -> None:
    async with (
        Scripted().serving() as a,
        Scripted().serving() as raw,
        relaying(tmp_path, {"a": a}, config=stage("observe", raw)) as front,
    ):
        left = asyncio.Event()

        async def waits(talk: Conversation) -> None:
            await talk.left()
            left.set()

        raw.answer = waits
        caller = await front.connect()
        await caller.send(TINY)
        await until(lambda: raw.seen)
        caller.leave()
        await asyncio.wait_for(left.wait(), 10)
        assert (await front.record()).outcome == "client_gone"


async def test_a_client_that_waits_for_the_raw_server_gets_nothing_before_its_answer(tmp_path: Path) -> None:
    async with (
        Scripted().serving() as a,
        Scripted().serving() as raw,
        relaying(tmp_path, {"a": a}, config=stage("observe", raw), gateway={"keep_alive_s": 0.05}) as front,
    ):

        async def slow(talk: Conversation) -> None:
            await asyncio.sleep(0.6)  # several times as long as a comment would take
            await talk.whole(503, b'{"error":{"message":"full"}}', "X-Own: 1\r\n")

        raw.answer = slow
        reply = await front.ask({**TINY, "stream": True}, "/v1/chat/completions")
        assert (reply.status, reply.headers["x-own"]) == (503, "1")


async def test_a_kept_connection_that_the_raw_server_has_closed_is_repeated(tmp_path: Path) -> None:
    async with (
        Scripted().serving() as a,
        Scripted().serving() as raw,
        relaying(tmp_path, {"a": a}, config=stage("observe", raw)) as front,
    ):
        closing: list[Conversation] = []

        async def answers(talk: Conversation) -> None:
            closing.append(talk)
            await a_word(talk)

        raw.answer = answers
        assert (await front.ask(TINY)).status == 200
        closing[0].crash()
        assert (await front.ask(TINY)).status == 200
        assert len(raw.seen) == 2


async def test_the_settings_over_the_api_have_sources_and_outlive_a_reload(tmp_path: Path) -> None:
    async with (
        Scripted().serving() as a,
        Scripted().serving() as raw,
        relaying(tmp_path, {"a": a}, config={**LANES, "rollout": {"raw_url": raw.url}}) as front,
    ):
        assert (await put(front, {"stage": "lanes", "lanes": ["output"]})).status == 200
        effective = (await get(front, f"{SETTINGS}/effective")).json()["rollout"]
        assert effective == {
            "stage": {"value": "lanes", "source": "override"},
            "lanes": {"value": ["output"], "source": "override"},
            "raw_url": {"value": raw.url, "source": "file"},
        }
        for wrong, field in (
            ({"stage": "half"}, "body.rollout.stage"),
            ({"lanes": ["nobody"]}, "body.rollout.lanes"),
            ({"lanes": []}, "body.rollout.lanes"),
            ({"raw_url": "ftp://x"}, "body.rollout.raw_url"),
            ({"raw_url": "http://u:p@x"}, "body.rollout.raw_url"),
            ({"raw_url": f"http://127.0.0.1:{front.daemon.settings.server.port}"}, "body.rollout.raw_url"),
        ):
            refused = await put(front, wrong)
            assert refused.status == 422
            assert field in json.dumps(refused.json()), refused.body
        assert (await get(front, f"{SETTINGS}/effective")).json()["rollout"] == effective
        # What was changed is read again by the next daemon, and stays above a reload.
        daemon = front.daemon
        loaded = load_settings(tmp_path / "config.yaml")
        daemon.reconfigure(
            changes(loaded, loaded, templates=daemon.templates, wanted_templates=daemon.templates)
        )
        assert (await get(front, "/readyz")).json()["rollout"] == "lanes"
        await daemon.backend.rollout.load()
        assert (await get(front, "/readyz")).json()["rollout"] == "lanes"


async def test_explain_tells_what_passes(tmp_path: Path) -> None:
    async with (
        Scripted().serving() as a,
        Scripted().serving() as raw,
        relaying(tmp_path, {"a": a}, config={**LANES, **stage("lanes", raw, lanes=["output"])}) as front,
    ):
        path = "/api/runtime/compute/explain?model="
        passed = (await get(front, f"{path}tiny")).json()
        assert passed["passes_to_raw"] is True
        assert passed["summary"] == "tiny passes to rollout.raw_url; managed, tiny would go to a"
        managed = (await get(front, f"{path}output")).json()
        assert managed["passes_to_raw"] is False
        assert managed["summary"].startswith("output would go to a")
