"""`/api/v1/benchmarks` over the real gateway: what is measured, compared, reported and kept."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from manager.wire.routes import INFERENCE
from tests.support.inside import until
from tests.support.relaying import Conversation, Front, Scripted, relaying
from tests.support.storing import ask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

API = "/api/v1/benchmarks"
JSON = {"Content-Type": "application/json"}
MODEL = "tiny:latest"
OWN = """
name: own
max_tokens: 9
temperature: 0.5
prompts:
  - name: sum
    system: Be brief.
    text: What is 1 + 1?
    checks: [{contains: "2"}, {max_words: 3}]
  - name: hello
    text: Say hello.
    checks: [{equals: hello}]
"""
NS = 10**9


class Speaking(Scripted):
    """A server that streams `says` word by word, at 50 tokens a second as it says."""

    def __init__(self, *models: str, loaded: tuple[str, ...] = ()) -> None:
        super().__init__(models or ("tiny",), loaded)
        self.says = "It is 2"
        self.pause_s = 0.0
        self.go = asyncio.Event()
        self.go.set()
        self.how = self.stream
        self.chats: list[Any] = []
        self.answer = self.route

    async def route(self, talk: Conversation) -> None:
        if talk.seen.target == "/api/show":
            await talk.whole(200, b'{"details": {}}')
        else:
            self.chats.append(talk.seen.json())
            await self.how(talk)

    async def stream(self, talk: Conversation) -> None:
        await talk.begin()
        await self.go.wait()
        await asyncio.sleep(self.pause_s)
        words = self.says.split(" ")
        for place, word in enumerate(words):
            piece = word if place == 0 else f" {word}"
            await talk.chunk(line(message={"role": "assistant", "content": piece}, done=False))
        last = {"prompt_eval_count": 5, "eval_count": 10, "eval_duration": NS // 5}
        await talk.chunk(line(message={"role": "assistant", "content": ""}, done=True, **last))
        await talk.end()


def line(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", **fields}).encode() + b"\n"


@asynccontextmanager
async def benching(tmp_path: Path, *servers: Speaking, **options: Any) -> AsyncIterator[Front]:
    """A gateway in front of these servers, with a workload of the operator's own."""
    file = tmp_path / "own.yaml"
    file.write_text(OWN)
    names = dict(zip(("one", "two"), servers, strict=False))
    config = {"routing": {"workloads": str(file)}, **options.pop("config", {})}
    async with relaying(tmp_path, names, config=config, **options) as front:
        yield front


@asynccontextmanager
async def speaking(*models: str, loaded: tuple[str, ...] = ()) -> AsyncIterator[Speaking]:
    server = Speaking(*models, loaded=loaded)
    async with server.serving():
        yield server


async def post(front: Front, body: Any, status: int = 202, path: str = API) -> Any:
    reply = await front.ask(body, path, JSON)
    assert reply.status == status, reply.body
    return reply.json()


async def get(front: Front, path: str, status: int = 200) -> Any:
    reply = await ask(front, "GET", path, None)
    assert reply.status == status, reply.body
    return reply.json()


async def delete(front: Front, benchmark: str, status: int = 200) -> Any:
    reply = await ask(front, "DELETE", f"{API}/{benchmark}", None)
    assert reply.status == status, reply.body
    return reply.json()


async def ended(front: Front, benchmark: str) -> Any:
    """The benchmark once it has ended."""
    open_ = ("queued", "running")
    benchmarks = front.daemon.backend.benchmarks
    await until(lambda: benchmarks._get(benchmark).status.value not in open_, within_s=20)
    return await get(front, f"{API}/{benchmark}")


async def run(front: Front, **wanted: Any) -> Any:
    started = await post(front, {"workloads": ["own"], "model": "tiny", **wanted})
    return await ended(front, started["id"])


async def test_a_benchmark_measures_each_prompt(tmp_path: Path) -> None:
    async with speaking() as server, benching(tmp_path, server) as front:
        server.pause_s = 0.05
        reply = await front.ask({"workloads": ["own"], "model": "tiny", "repeat": 2}, API, JSON)
        started = reply.json()
        assert (reply.status, started["status"]) == (202, "queued")
        assert reply.headers["location"] == f"{API}/{started['id']}"
        found = await ended(front, started["id"])
        assert (found["status"], found["source"], found["error"]) == ("succeeded", "local", None)
        assert (found["done"], found["total"], found["repeat"]) == (4, 4, 2)
        assert found["targets"] == [{"instance": "one", "model": MODEL}]
        assert [one["prompt"] for one in found["samples"]] == ["sum", "hello"] * 2
        first = found["samples"][0]
        assert first["ok"] is True
        assert 50 <= first["ttft_ms"] <= first["duration_ms"]
        assert (first["tokens_per_s"], first["output_tokens"]) == (50.0, 10)
        assert [one["quality"] for one in found["samples"]] == [1.0, 0.0] * 2
        (result,) = found["results"]
        assert (result["workload"], result["instance"], result["model"]) == ("own", "one", MODEL)
        assert (result["success"]["mean"], result["quality"]["mean"]) == (1.0, 0.5)
        assert result["tokens_per_s"] == {"count": 4, "mean": 50.0, "p50": 50.0, "p95": 50.0, "stddev": 0.0}
        expected = 0.5 / (1 + result["ttft_ms"]["p50"] / 5000)
        assert result["score"] == pytest.approx(expected)
        assert front.daemon.backend.benchmarks.scores() == {("one", MODEL): pytest.approx(expected)}
        warm, *asked = server.chats
        assert warm["options"]["num_predict"] == 1, "the load of the model is in no measurement"
        assert asked[0]["stream"] is True
        assert asked[0]["options"] == {"temperature": 0.5, "num_predict": 9}
        assert [one["role"] for one in asked[0]["messages"]] == ["system", "user"]
        record = await front.record()
        assert (record.path, record.stream, record.outcome) == (API, True, "ok")
        assert record.output_tokens == 10
        assert front.at_rest
        kinds = front.kinds()
        assert kinds.index("benchmark_started") < kinds.index("benchmark_succeeded")


async def test_the_time_to_the_first_token_is_that_of_the_first_piece_not_of_the_head(tmp_path: Path) -> None:
    async with speaking() as server, benching(tmp_path, server) as front:
        server.pause_s = 0.2
        (one, _) = (await run(front))["samples"]
        assert one["ttft_ms"] >= 200
        assert ((await front.record()).ttfb_ms or 0) >= 200


@pytest.mark.parametrize("how", ["error", "cut", "refused", "crash"])
async def test_an_answer_that_is_not_whole_is_no_success(tmp_path: Path, how: str) -> None:
    async def answer(talk: Conversation) -> None:
        if how == "refused":
            await talk.whole(400, b'{"error": "not like this"}')
            return
        await talk.begin()
        await talk.chunk(line(message={"role": "assistant", "content": "2"}, done=False))
        if how == "error":
            await talk.chunk(b'{"error": "out of order"}\n')
        if how == "crash":
            talk.crash()
        else:
            await talk.end()

    async with speaking() as server, benching(tmp_path, server) as front:
        server.how = answer
        found = await run(front)
        assert (found["status"], found["done"]) == ("failed", 2)
        assert found["error"]
        assert [(one["ok"], one["quality"]) for one in found["samples"]] == [(False, None)] * 2
        assert found["results"][0]["success"]["mean"] == 0.0
        assert front.daemon.backend.benchmarks.scores() == {}, "a server that is out of order says nothing"
        assert front.at_rest
        assert "benchmark_failed" in front.kinds()
        said = {"error": "out of order", "refused": "not like this"}.get(how)
        assert said is None or said in found["error"]


async def test_a_benchmark_takes_free_slots_only(tmp_path: Path) -> None:
    async with speaking() as server, benching(tmp_path, server, slots={"one": 1}) as front:
        server.go.clear()
        live = asyncio.ensure_future(front.ask({"model": "tiny", "messages": []}))
        await until(lambda: len(server.chats) == 1)
        started = await post(front, {"workloads": ["own"], "model": "tiny"})
        path = f"{API}/{started['id']}"
        benchmarks = front.daemon.backend.benchmarks
        await until(lambda: benchmarks._running is not None and benchmarks._running.waits_for)
        found = await get(front, path)
        assert (found["status"], found["done"]) == ("running", 0)
        assert "waits for none (overloaded)" in found["waits_for"]
        assert len(server.chats) == 1, "the slot is the live caller's"
        server.go.set()
        assert (await live).status == 200
        found = await ended(front, started["id"])
        assert (found["status"], found["waits_for"]) == ("succeeded", None)
        assert all(one["ok"] for one in found["samples"]), "a wait is no failure"


async def test_one_benchmark_runs_at_a_time_and_each_can_be_cancelled(tmp_path: Path) -> None:
    async with speaking() as server, benching(tmp_path, server) as front:
        server.go.clear()
        ids = [(await post(front, {"workloads": ["own"], "model": "tiny"}))["id"] for _ in range(2)]
        await until(lambda: server.chats)
        assert [(await get(front, f"{API}/{one}"))["status"] for one in ids] == ["running", "queued"]
        assert await delete(front, ids[1]) == {"id": ids[1], "status": "cancelled", "removed": False}
        assert await delete(front, ids[0]) == {"id": ids[0], "status": "cancelled", "removed": False}
        await until(lambda: front.at_rest)
        assert len(server.chats) == 1
        assert front.kinds().count("benchmark_cancelled") == 2
        server.go.set()
        assert (await run(front))["status"] == "succeeded"
        assert await delete(front, ids[0]) == {"id": ids[0], "status": "cancelled", "removed": True}
        await get(front, f"{API}/{ids[0]}", 404)
        assert (await delete(front, ids[0], 404))["error"]["code"] == "unknown_benchmark"


async def test_no_more_than_some_wait(tmp_path: Path) -> None:
    async with speaking() as server, benching(tmp_path, server) as front:
        server.go.clear()
        body = {"workloads": ["own"], "model": "tiny"}
        for _ in range(16):
            await post(front, body)
        assert (await post(front, body, 429))["error"]["code"] == "queue_full"


async def test_what_was_measured_survives_a_restart_and_what_ran_is_interrupted(tmp_path: Path) -> None:
    async with speaking() as server:
        async with benching(tmp_path, server) as front:
            done = await run(front)
            server.go.clear()
            started = await post(front, {"workloads": ["own"], "model": "tiny"})
            waiting = await post(front, {"workloads": ["own"], "model": "tiny"})
            await until(lambda: len(server.chats) == 4)
            scores = dict(front.daemon.backend.benchmarks.scores())
        server.go.set()
        async with benching(tmp_path, server) as front:
            assert dict(front.daemon.backend.benchmarks.scores()) == scores
            assert await get(front, f"{API}/{done['id']}") == done
            found = await get(front, f"{API}/{started['id']}")
            assert (found["status"], found["done"]) == ("interrupted", 0)
            assert found["ended_at"] is not None
            assert (await ended(front, waiting["id"]))["status"] == "succeeded", "it was not begun yet"


async def test_without_a_model_those_in_memory_are_measured_wherever_they_are(tmp_path: Path) -> None:
    async with (
        speaking("tiny", "other", loaded=("tiny",)) as first,
        speaking("tiny", loaded=("tiny",)) as second,
        benching(tmp_path, first, second) as front,
    ):
        found = await run(front, model=None)
        assert found["targets"] == [{"instance": one, "model": MODEL} for one in ("one", "two")]
        assert {one["instance"] for one in found["samples"]} == {"one", "two"}
        assert (len(first.chats), len(second.chats)) == (3, 3), "each was asked for its own"
        found = await run(front, model=None, instance="two")
        assert [one["instance"] for one in found["targets"]] == ["two"]
        latest = await get(front, "/v1/cluster/benchmarks")
        assert [(one["instance"], one["model"]) for one in latest["benchmarks"]] == [
            ("one", MODEL), ("two", MODEL),
        ]  # fmt: skip
        (workload,) = latest["benchmarks"][1]["workloads"]
        assert (workload["benchmark"], workload["source"]) == (found["id"], "local")
        assert workload["result"] == found["results"][0]
        assert latest["benchmarks"][1]["score"] == found["results"][0]["score"]


async def test_a_role_means_its_model(tmp_path: Path) -> None:
    config = {"roles": {"quick": {"model": "tiny"}}}
    async with speaking() as server, benching(tmp_path, server, config=config) as front:
        found = await run(front, model="quick")
        assert found["targets"] == [{"instance": "one", "model": MODEL}]
        assert found["status"] == "succeeded"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"workloads": ["none"]}, 404, "there is: chat.concise_support, chat.short_reasoning, own"),
        ({"model": "absent"}, 404, "no instance has the model 'absent'"),
        ({"model": "tiny", "instance": "absent"}, 404, "there is: one"),
        ({}, 409, "no model is in the memory"),
        ({"model": "tiny", "repeat": 51}, 422, "body.repeat"),
        ({"model": "tiny", "repeat": 0}, 422, "body.repeat"),
        ({"model": "tiny", "more": 1}, 422, "body.more"),
    ],
)
async def test_what_cannot_be_measured_is_refused(tmp_path: Path, body: Any, status: int, said: str) -> None:
    async with speaking() as server, benching(tmp_path, server) as front:
        assert said in (await post(front, body, status))["error"]["message"]
        assert (await get(front, API))["count"] == 0
        assert not server.chats


def sample(**changes: Any) -> dict[str, Any]:
    return {
        "workload": "own",
        "prompt": "sum",
        "instance": "lab",
        "model": "Tiny",
        "ok": True,
        "ttft_ms": 5000.0,
        "tokens_per_s": 10.0,
        "quality": 1.0,
    } | changes


async def test_a_report_of_another_program_counts_as_the_daemons_own(tmp_path: Path) -> None:
    async with speaking() as server, benching(tmp_path, server) as front:
        body = {"source": "lab", "samples": [sample(), sample(prompt="hello", quality=0.5)]}
        found = await post(front, body, 201, f"{API}/reports")
        assert (found["status"], found["source"], found["done"]) == ("succeeded", "lab", 2)
        assert found["targets"] == [{"instance": "lab", "model": MODEL}]
        assert found["results"][0]["quality"]["mean"] == 0.75
        assert await get(front, f"{API}/{found['id']}") == found
        assert front.daemon.backend.benchmarks.scores() == {("lab", MODEL): pytest.approx(0.375)}
        assert "benchmark_reported" in front.kinds()
        shown = {name: found[name] for name in ("samples", "started_at", "ended_at")}
        again = await post(front, {"source": "lab2", **shown}, 201, f"{API}/reports")
        assert again["samples"] == found["samples"], "what one shows, the other takes"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"source": "local"}, "body.source"),
        ({"source": "No Name"}, "body.source"),
        ({"samples": []}, "body.samples"),
        ({"samples": [sample(quality=1.5)]}, "body.samples.0.quality"),
        ({"samples": [sample(ttft_ms=-1)]}, "body.samples.0.ttft_ms"),
        ({"samples": [sample(model="a b")]}, "body.samples.0.model"),
        ({"samples": [sample(instance="../x")]}, "body.samples.0.instance"),
        ({"samples": [sample(colour=1)]}, "body.samples.0.colour"),
        ({"samples": [sample()] * 1001}, "body.samples"),
        ({"started_at": "2026-01-02T00:00:00Z", "ended_at": "2026-01-01T00:00:00Z"}, "body.ended_at"),
    ],
)
async def test_a_report_that_cannot_be_meant_is_refused(
    tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    async with speaking() as server, benching(tmp_path, server) as front:
        body = {"source": "lab", "samples": [sample()], **changes}
        found = await post(front, body, 422, f"{API}/reports")
        assert found["error"]["details"]["fields"][0]["field"] == field
        assert (await get(front, API))["count"] == 0


async def test_lists_are_of_what_is_asked_for_the_newest_first(tmp_path: Path) -> None:
    async with speaking() as server, benching(tmp_path, server) as front:
        for source, changes in (("a", {}), ("b", {"model": "x"}), ("c", {"workload": "w", "instance": "i"})):
            await post(front, {"source": source, "samples": [sample(**changes)]}, 201, f"{API}/reports")

        async def sources(query: str) -> str:
            found = await get(front, f"{API}{query}")
            assert found["count"] == len(found["benchmarks"])
            assert "samples" not in str(found["benchmarks"])
            return "".join(one["source"] for one in found["benchmarks"])

        assert await sources("") == "cba"
        assert await sources("?limit=2") == "cb"
        assert await sources("?model=TINY") == "ca"
        assert await sources("?instance=lab") == "ba"
        assert await sources("?workload=w") == "c"
        assert await sources("?workload=w&instance=lab") == ""
        await get(front, f"{API}?limit=0", 422)
        await get(front, f"{API}?modle=x", 422)


async def test_two_benchmarks_are_compared_side_by_side(tmp_path: Path) -> None:
    async with speaking() as server, benching(tmp_path, server) as front:
        ids = []
        for tokens_per_s in (10.0, 30.0):
            body = {"source": "lab", "samples": [sample(tokens_per_s=tokens_per_s)] * 3}
            ids.append((await post(front, body, 201, f"{API}/reports"))["id"])
        found = await get(front, f"{API}/compare?a={ids[0]}&b={ids[1]}")
        assert (found["a"]["id"], found["b"]["id"]) == tuple(ids)
        (result,) = found["results"]
        assert result["tokens_per_s"]["a"]["mean"] == 10.0
        assert result["tokens_per_s"]["b"] == {
            "count": 3,
            "mean": 30.0,
            "p50": 30.0,
            "p95": 30.0,
            "stddev": 0.0,
        }
        assert result["tokens_per_s"]["difference"] == 20.0
        assert result["score"]["difference"] == 0.0
        missing = await get(front, f"{API}/compare?a={ids[0]}&b=nope", 404)
        assert missing["error"]["code"] == "unknown_benchmark"
        await get(front, f"{API}/compare?a={ids[0]}", 422)


@pytest.mark.parametrize(("name", "allowed"), [("compare", "GET"), ("reports", "POST"), ("x", "DELETE, GET")])
async def test_the_names_of_other_routes_are_no_ids(tmp_path: Path, name: str, allowed: str) -> None:
    async with speaking() as server, benching(tmp_path, server) as front:
        reply = await ask(front, "PUT", f"{API}/{name}", None)
        assert (reply.status, reply.headers["allow"]) == (405, allowed)


async def test_a_role_that_is_scored_prefers_what_benchmarks_prefer(tmp_path: Path) -> None:
    config = {
        "roles": {"chat": {"model": "tiny", "strategy": "scored"}},
        "routing": {"weights": {"benchmark": 100}},
    }
    async with (
        speaking(loaded=("tiny",)) as first,
        speaking(loaded=("tiny",)) as second,
        relaying(tmp_path, {"one": first, "two": second}, config=config) as front,
    ):
        for number, better in enumerate(("two", "one")):
            samples = [
                sample(instance=name, quality=float(name == better), ttft_ms=0.0) for name in ("one", "two")
            ]
            await post(front, {"source": "lab", "samples": samples}, 201, f"{API}/reports")
            await front.ask({"model": "chat", "messages": []})
            assert (await front.record(number)).effective_target == better
            match = await front.ask({"role": "chat"}, "/v1/cluster/routes/match", JSON)
            signals = {one["instance"]: one["signals"]["benchmark"] for one in match.json()["candidates"]}
            assert signals == {name: float(name == better) for name in ("one", "two")}


async def test_a_score_is_a_metric(tmp_path: Path) -> None:
    async with speaking() as server, benching(tmp_path, server) as front:
        await post(front, {"source": "lab", "samples": [sample()]}, 201, f"{API}/reports")
        reply = await ask(front, "GET", "/metrics", None)
        expected = f'ollama_manager_benchmark_score{{instance="lab",model="{MODEL}"}} 0.5'
        assert expected in reply.body.decode().splitlines()


def test_the_route_of_benchmarks_is_that_of_chat() -> None:
    assert INFERENCE[b"/api/chat"].streams
