"""Async runs through the whole gateway, over real sockets: the life of any request, and a file at its end."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.inside import until
from tests.support.relaying import LAST, LINE, Conversation, Front, Reply, Scripted, a_word, relaying

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

RUNS = "/api/v1/runs"
TINY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
WHOLE = {**TINY, "stream": False}
JSON = {"Content-Type": "application/json"}


class Client:
    """A client of the control API that submits runs."""

    def __init__(self, front: Front) -> None:
        self.front = front

    async def call(self, method: str, path: str) -> Reply:
        caller = await self.front.connect()
        try:
            host = f"Host: 127.0.0.1:{self.front.port}\r\n"
            await caller.raw(f"{method} {path} HTTP/1.1\r\n{host}\r\n".encode())
            return await caller.reply()
        finally:
            caller.leave()

    async def post(self, wanted: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Reply:
        return await self.front.ask(wanted, RUNS, {**JSON, **(headers or {})})

    async def submit(
        self,
        body: Mapping[str, Any] = TINY,
        path: str = "/api/chat",
        headers: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> str:
        reply = await self.post({"path": path, "body": body, **fields}, headers)
        assert reply.status == 202, reply.body
        assert reply.json()["status"] == "queued"
        assert reply.headers["location"] == f"{RUNS}/{reply.json()['id']}"
        run_id: str = reply.json()["id"]
        return run_id

    async def show(self, run_id: str) -> dict[str, Any]:
        reply = await self.call("GET", f"{RUNS}/{run_id}")
        assert reply.status == 200, reply.body
        body: dict[str, Any] = reply.json()
        return body

    async def reaches(self, run_id: str, *statuses: str) -> dict[str, Any]:
        async with asyncio.timeout(20):
            while True:
                run = await self.show(run_id)
                if run["status"] in statuses:
                    return run
                await asyncio.sleep(0.01)

    async def ended(self, run_id: str) -> dict[str, Any]:
        return await self.reaches(run_id, "succeeded", "failed", "cancelled", "interrupted", "expired")

    async def tried(self, run_id: str) -> dict[str, Any]:
        """Wait until nothing could serve a run."""
        async with asyncio.timeout(20):
            while True:
                run = await self.show(run_id)
                if run["error"] is not None:
                    return run
                await asyncio.sleep(0.01)

    async def order(self, instance: str, action: str, body: Mapping[str, Any]) -> None:
        reply = await self.front.ask(body, f"/api/runtime/compute/instances/{instance}/{action}", JSON)
        assert reply.status == 200, reply.body

    async def result(self, run_id: str) -> Reply:
        return await self.call("GET", f"{RUNS}/{run_id}/result")


@asynccontextmanager
async def running(home: Path, *servers: Scripted, **options: Any) -> AsyncIterator[Client]:
    names = "abcdef"[: len(servers)]
    async with relaying(home, dict(zip(names, servers, strict=True)), **options) as front:
        yield Client(front)


def files(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "state" / "runs").iterdir())


class Gate:
    """An answer that waits for the test after its first line."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.opens = asyncio.Event()
        self.left = asyncio.Event()

    async def __call__(self, talk: Conversation) -> None:
        await talk.begin()
        await talk.chunk(LINE)
        self.begun.set()
        leaving = asyncio.ensure_future(talk.left())
        opening = asyncio.ensure_future(self.opens.wait())
        await asyncio.wait({leaving, opening}, return_when=asyncio.FIRST_COMPLETED)
        if leaving.done():
            self.left.set()
        else:
            leaving.cancel()
            await talk.chunk(LAST)
            await talk.end()
        opening.cancel()


async def never(talk: Conversation) -> None:
    await talk.left()


async def test_a_client_that_leaves_while_it_sends_a_run_is_no_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    async with Scripted().serving() as server, running(tmp_path, server) as client:
        bodies = client.front.daemon.backend.passing.bodies
        caller = await client.front.connect()
        head = f"POST {RUNS} HTTP/1.1\r\nHost: 127.0.0.1:{client.front.port}\r\n"
        await caller.raw(f"{head}Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{{".encode())
        await until(lambda: bodies.held_bytes)
        caller.leave()
        await until(lambda: not bodies.held_bytes)
        assert (await client.call("GET", RUNS)).json()["runs"] == []
    assert not [one for one in caplog.records if one.exc_info]
    assert "Traceback" not in "".join(capsys.readouterr())


# --- the answer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "answer", "kind"),
    [(TINY, LINE + LAST, "application/x-ndjson"), (WHOLE, LAST.strip(), "application/json")],
)
async def test_the_result_is_the_answer_as_it_came(
    tmp_path: Path, body: dict[str, Any], answer: bytes, kind: str
) -> None:
    async with Scripted().serving() as server, running(tmp_path, server) as client:
        run_id = await client.submit(body)
        run = await client.ended(run_id)
        assert (run["status"], run["error"], run["instance"]) == ("succeeded", None, "a")
        assert run["result"] == {"status": 200, "content_type": kind, "size_bytes": len(answer)}
        assert run["executions"] == 1
        reply = await client.result(run_id)
        assert (reply.status, reply.body) == (200, answer)
        assert (reply.headers["content-type"], reply.headers["x-run-id"]) == (kind, run_id)
        assert files(tmp_path) == [f"{run_id}.result"]
        (seen,) = server.seen
        assert (seen.method, seen.target, seen.json()) == ("POST", "/api/chat", body)
        assert seen.header("content-type") == "application/json"
        assert seen.header("x-request-id") == run["request_id"]


async def test_the_record_is_that_of_any_request(tmp_path: Path) -> None:
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    headers = {"X-Project-ID": "alpha", "X-Intent": "why", "traceparent": trace, "X-Local-Only": "true"}
    async with Scripted().serving() as server, running(tmp_path, server) as client:
        run = await client.ended(await client.submit(headers=headers))
        assert run["project_id"] == "alpha"
        record = await client.front.record()
        assert (record.request_id, record.outcome, record.status) == (run["request_id"], "ok", 200)
        assert (record.project_id, record.intent, record.local_only) == ("alpha", "why", True)
        assert (record.trace_id, record.parent_span_id) == ("a" * 32, "b" * 16)
        assert (record.input_tokens, record.output_tokens) == (12, 34)
        assert (record.stream, record.model, record.effective_target) == (True, "tiny", "a")
        assert record.ttfb_ms is not None
        assert server.seen[0].header("traceparent") == f"00-{'a' * 32}-{record.span_id}-01"
        assert server.seen[0].header("x-project-id") is None
        await until(lambda: client.front.at_rest)


async def test_a_role_changes_the_body_of_a_run_as_that_of_a_request(tmp_path: Path) -> None:
    role = {"model": "tiny", "body": {"defaults": {"options": {"num_ctx": 7}}}}
    async with (
        Scripted().serving() as server,
        running(tmp_path, server, config={"roles": {"output": role}}) as client,
    ):
        await client.ended(await client.submit({**WHOLE, "model": "output"}))
        run = await client.ended(await client.submit({"messages": []}, lane="output"))
        assert (run["lane"], run["model"]) == ("output", "output")
        for seen in server.seen:
            assert (seen.json()["model"], seen.json()["options"]) == ("tiny", {"num_ctx": 7})


async def test_a_pin_holds_for_a_run(tmp_path: Path) -> None:
    async with Scripted().serving() as a, Scripted().serving() as b, running(tmp_path, a, b) as client:
        run = await client.ended(await client.submit(headers={"X-Instance": "b"}))
        assert run["instance"] == "b"


async def test_a_large_run_passes_byte_by_byte(tmp_path: Path) -> None:
    body = {"model": "tiny", "prompt": "é" * 1_000_000, "stream": False}

    async def echoes(talk: Conversation) -> None:
        await talk.whole(200, talk.seen.body)

    async with Scripted().serving() as server, running(tmp_path, server) as client:
        server.answer = echoes
        run_id = await client.submit(body, "/api/generate")
        assert (await client.ended(run_id))["status"] == "succeeded"
        assert (await client.result(run_id)).json() == body


# --- failures -------------------------------------------------------------------------------------


async def is_full(talk: Conversation) -> None:
    await talk.whole(503, b'{"error":"server busy, please try again"}')


async def dies(talk: Conversation) -> None:
    talk.crash()


async def refuses(talk: Conversation) -> None:
    await talk.whole(400, b'{"error":"no messages"}')


async def breaks_off(talk: Conversation) -> None:
    await talk.begin()
    await talk.chunk(LINE)
    talk.crash()


async def ends_early(talk: Conversation) -> None:
    await talk.begin()
    await talk.chunk(LINE)
    await talk.end()


async def test_a_run_goes_to_the_next_instance_as_a_request_would(tmp_path: Path) -> None:
    async with Scripted().serving() as a, Scripted().serving() as b, running(tmp_path, a, b) as client:
        a.answer = is_full
        run = await client.ended(await client.submit())
        assert (run["status"], run["instance"], run["executions"]) == ("succeeded", "b", 1)
        record = await client.front.record()
        assert (record.attempts, record.fallback_reason) == (2, "overloaded")


async def test_a_server_that_does_not_answer_in_the_time_of_the_role_is_abandoned_for_the_next(
    tmp_path: Path,
) -> None:
    role = {"model": "tiny", "instances": ["a", "b"], "attempt_timeouts_s": [0.4]}
    async with (
        Scripted().serving() as a,
        Scripted().serving() as b,
        running(tmp_path, a, b, config={"roles": {"output": role}}) as client,
    ):
        a.answer = never
        run = await client.ended(await client.submit({**TINY, "model": "output"}))
        assert (run["status"], run["instance"]) == ("succeeded", "b")
        assert (await client.front.record()).fallback_reason == "attempt_timeout"


@pytest.mark.parametrize(
    ("answer", "status", "code", "outcome"),
    [
        (refuses, 400, "upstream_error", "client_error"),
        (is_full, 503, "upstream_error", "upstream_error"),
        (dies, 502, "upstream_unreachable", "upstream_error"),
        (breaks_off, 502, "upstream_error", "upstream_error"),
        (ends_early, 200, "upstream_error", "upstream_error"),
    ],
)
async def test_a_run_that_fails_has_the_answer_that_a_client_would_get(
    tmp_path: Path, answer: Any, status: int, code: str, outcome: str
) -> None:
    async with Scripted().serving() as server, running(tmp_path, server) as client:
        server.answer = answer
        run_id = await client.submit()
        run = await client.ended(run_id)
        assert run["status"] == "failed"
        assert run["error"]["code"] == code
        assert run["result"]["status"] == status
        reply = await client.result(run_id)
        assert reply.status == status
        assert len(reply.body) == run["result"]["size_bytes"]
        if status >= 400:
            assert run["error"]["message"] in reply.json()["error"]
        else:
            assert reply.body == LINE
        record = await client.front.record()
        assert (record.outcome, record.status) == (outcome, status)
        assert len(server.seen) == 1
        assert files(tmp_path) == [f"{run_id}.result"]
        await until(lambda: client.front.at_rest)
        breakers = client.front.daemon.backend.passing.routing.breakers
        assert breakers.view("a").failures == (answer in (dies, breaks_off, ends_early))


async def test_errors_are_in_the_words_of_the_route(tmp_path: Path) -> None:
    async with Scripted().serving() as server, running(tmp_path, server) as client:
        run_id = await client.submit({"model": "nope", "messages": []}, "/v1/messages")
        run = await client.ended(run_id)
        assert (run["status"], run["error"]["code"], run["executions"]) == ("failed", "model_missing", 0)
        reply = await client.result(run_id)
        assert reply.status == 404
        assert reply.json()["error"]["type"] == "not_found_error"
        assert reply.json()["request_id"] == f"req_{run['request_id']}"


async def test_an_answer_without_an_end_is_a_failure_once_the_time_is_over(tmp_path: Path) -> None:
    async with (
        Scripted().serving() as server,
        running(tmp_path, server, gateway={"total_timeout_s": 0.5}) as client,
    ):
        gate = server.answer = Gate()
        run = await client.ended(await client.submit())
        assert (run["status"], run["error"]["code"]) == ("failed", "attempt_timeout")
        assert run["error"]["message"] == "no end within 0.5 s"
        assert run["result"]["status"] == 504
        await gate.left.wait()
        assert (await client.front.record()).outcome == "timeout"


async def test_an_answer_that_is_too_large_is_a_failure_and_leaves_no_part(tmp_path: Path) -> None:
    async def floods(talk: Conversation) -> None:
        await talk.begin()
        while not talk.writer.is_closing():
            await talk.chunk(LINE * 1000)

    async with (
        Scripted().serving() as server,
        running(tmp_path, server, config={"runs": {"max_result": "1m"}}) as client,
    ):
        server.answer = floods
        run_id = await client.submit()
        run = await client.ended(run_id)
        assert (run["status"], run["error"]["code"]) == ("failed", "result_too_large")
        assert "runs.max_result" in run["error"]["message"]
        assert run["result"]["size_bytes"] < 1000
        assert files(tmp_path) == [f"{run_id}.result"]


# --- nothing can serve it -------------------------------------------------------------------------


async def test_a_run_waits_in_the_queue_while_every_instance_is_drained(tmp_path: Path) -> None:
    config = {"runs": {"concurrency": 1}}
    async with (
        Scripted().serving() as a,
        Scripted().serving() as b,
        running(tmp_path, a, b, config=config) as client,
    ):
        for instance in "ab":
            await client.order(instance, "drain", {"reason": "repair"})
        run_id = await client.submit()
        run = await client.tried(run_id)
        assert (run["status"], run["error"]["code"]) == ("queued", "instance_unavailable")
        assert "drained: repair" in run["error"]["message"]
        assert (run["executions"], run["started_at"], run["result"]) == (0, None, None)
        assert (await client.front.record()).outcome == "refused"
        # It does not hold the only place of those that are begun.
        gone = await client.ended(await client.submit({"model": "nope", "messages": []}))
        assert (gone["status"], gone["error"]["code"]) == ("failed", "model_missing")
        await client.order("b", "resume", {})
        run = await client.ended(run_id)
        assert (run["status"], run["error"], run["executions"]) == ("succeeded", None, 1)
        assert (len(a.seen), len(b.seen)) == (0, 1)


# --- cancelling -----------------------------------------------------------------------------------


async def test_a_cancelled_run_gives_everything_back_before_the_answer_comes(tmp_path: Path) -> None:
    async with Scripted().serving() as server, running(tmp_path, server) as client:
        gate = server.answer = Gate()
        run_id = await client.submit()
        await gate.begun.wait()
        assert (await client.show(run_id))["status"] == "running"
        assert client.front.in_flight("a") == 1
        reply = await client.call("DELETE", f"{RUNS}/{run_id}")
        assert client.front.in_flight("a") == 0
        assert (reply.status, reply.json()["status"]) == (200, "cancelled")
        await gate.left.wait()
        assert files(tmp_path) == []
        record = await client.front.record()
        assert (record.outcome, record.fallback_reason) == ("cut", "cancelled")
        assert (await client.call("DELETE", f"{RUNS}/{run_id}")).json()["status"] == "cancelled"
        refusal = await client.result(run_id)
        assert (refusal.status, refusal.json()["error"]["code"]) == (409, "run_without_result")


async def test_a_run_is_cancelled_before_its_server_answers(tmp_path: Path) -> None:
    async with Scripted().serving() as server, running(tmp_path, server) as client:
        server.answer = never
        run_id = await client.submit()
        await until(lambda: server.seen)
        assert (await client.call("DELETE", f"{RUNS}/{run_id}")).json()["status"] == "cancelled"
        await until(lambda: client.front.at_rest)


async def test_the_request_of_a_run_is_listed_and_can_be_cancelled_as_any_other(tmp_path: Path) -> None:
    requests = "/api/runtime/compute/requests"
    async with Scripted().serving() as server, running(tmp_path, server) as client:
        gate = server.answer = Gate()
        run_id = await client.submit()
        await gate.begun.wait()
        request_id = (await client.show(run_id))["request_id"]
        assert (await client.call("GET", f"{requests}/{request_id}")).json()["path"] == "/api/chat"
        reply = await client.call("DELETE", f"{requests}/{request_id}")
        assert (reply.status, reply.json()["cancelled"]) == (200, True)
        assert (await client.ended(run_id))["status"] == "cancelled"
        await gate.left.wait()
        record = await client.front.record()
        assert (record.outcome, record.fallback_reason) == ("cut", "cancelled")


async def test_a_run_that_waits_for_a_slot_is_queued_and_can_be_cancelled(tmp_path: Path) -> None:
    config = {"instances": {"a": {"driver": "external", "slots": 1}}}
    async with Scripted().serving() as server:
        config["instances"]["a"]["url"] = server.url
        async with running(tmp_path, server, config=config) as client:
            gate = server.answer = Gate()
            first = await client.submit()
            await gate.begun.wait()
            second, third = await client.submit(), await client.submit()
            lanes = client.front.daemon.backend.passing.routing.slots
            await until(lambda: sum(lane.queued for lane in lanes.lanes()) == 2)
            assert (await client.show(second))["status"] == "queued"
            reply = await client.call("DELETE", f"{RUNS}/{second}")
            assert (reply.json()["status"], reply.json()["executions"]) == ("cancelled", 0)
            assert sum(lane.queued for lane in lanes.lanes()) == 1
            gate.opens.set()
            assert (await client.ended(first))["status"] == "succeeded"
            assert (await client.ended(third))["status"] == "succeeded"
            assert len(server.seen) == 2


async def test_a_run_that_nothing_was_done_for_can_be_cancelled(tmp_path: Path) -> None:
    async with (
        Scripted().serving() as server,
        running(tmp_path, server, config={"runs": {"concurrency": 1}}) as client,
    ):
        gate = server.answer = Gate()
        first = await client.submit()
        await gate.begun.wait()
        second = await client.submit()
        replies = await asyncio.gather(*(client.call("DELETE", f"{RUNS}/{second}") for _ in range(3)))
        assert [reply.json()["status"] for reply in replies] == ["cancelled"] * 3
        assert files(tmp_path) == [f".{first}.result.part", f"{first}.body"]
        gate.opens.set()
        await client.ended(first)
        reply = await client.call("DELETE", f"{RUNS}/{first}")
        assert (reply.status, reply.json()["error"]["code"]) == (409, "run_ended")


# --- bounds ---------------------------------------------------------------------------------------


async def test_so_many_runs_are_begun_at_once_and_the_oldest_of_the_emptiest_queue_is_next(
    tmp_path: Path,
) -> None:
    async with (
        Scripted(("tiny", "other")).serving() as server,
        running(tmp_path, server, config={"runs": {"concurrency": 2}}) as client,
    ):
        gate = server.answer = Gate()
        for _ in range(3):
            await client.submit()
        await client.submit({**TINY, "model": "other"})
        await until(lambda: len(server.seen) == 2)
        assert [seen.json()["model"] for seen in server.seen] == ["tiny", "tiny"]
        await client.call("DELETE", f"{RUNS}/{await oldest(client)}")
        await until(lambda: len(server.seen) == 3)
        assert server.seen[2].json()["model"] == "other"
        gate.opens.set()


async def oldest(client: Client) -> str:
    runs = (await client.call("GET", RUNS)).json()["runs"]
    run_id: str = runs[-1]["id"]
    return run_id


async def test_more_runs_than_may_wait_are_refused_with_the_time_to_come_back(tmp_path: Path) -> None:
    async with (
        Scripted().serving() as server,
        running(tmp_path, server, config={"runs": {"max_queued": 2}}) as client,
    ):
        gate = server.answer = Gate()
        runs = [await client.submit() for _ in range(2)]
        reply = await client.post({"path": "/api/chat", "body": TINY})
        assert (reply.status, reply.json()["error"]["code"]) == (429, "queue_full")
        assert int(reply.headers["retry-after"]) > 0
        assert "runs.max_queued" in reply.json()["error"]["message"]
        gate.opens.set()
        for run in runs:
            await client.ended(run)
        await client.submit()


async def test_the_files_of_all_runs_together_are_bounded(tmp_path: Path) -> None:
    limits = {"max_body": "100k", "max_result": "100k", "max_stored": "200k", "expires_s": 0.6}
    async with Scripted().serving() as server, running(tmp_path, server, config={"runs": limits}) as client:

        async def talks_much(talk: Conversation) -> None:
            await talk.whole(200, b"x" * 90_000)

        server.answer = talks_much
        first, second = [await client.ended(await client.submit(WHOLE)) for _ in range(2)]
        assert first["status"] == second["status"] == "succeeded"
        full = await client.ended(await client.submit(WHOLE))
        assert (full["status"], full["error"]["code"]) == ("failed", "queue_full")
        assert "runs.max_stored" in full["error"]["message"]
        reply = await client.post({"path": "/api/chat", "body": {**WHOLE, "x": "y" * 90_000}})
        assert (reply.status, reply.json()["error"]["code"]) == (429, "queue_full")
        for run in (first, second, full):
            await client.reaches(run["id"], "expired")
        await until(lambda: files(tmp_path) == [])
        assert (await client.ended(await client.submit(WHOLE)))["status"] == "succeeded"


async def test_a_result_expires_at_its_time_and_is_deleted(tmp_path: Path) -> None:
    async with Scripted().serving() as server, running(tmp_path, server) as client:
        kept, short = await client.submit(), await client.submit(expires_s=0.3)
        assert (await client.ended(kept))["expires_s"] == 86_400
        run = await client.reaches(short, "expired")
        assert (run["result"], run["expires_s"]) == (None, 0.3)
        assert run["ended_at"] < run["expires_at"]
        reply = await client.result(short)
        assert (reply.status, reply.json()["error"]["code"]) == (409, "run_expired")
        assert files(tmp_path) == [f"{kept}.result"]


async def test_old_runs_are_forgotten(tmp_path: Path) -> None:
    limits = {"expires_s": 0.1, "retention_s": 0.2}
    async with Scripted().serving() as server, running(tmp_path, server, config={"runs": limits}) as client:
        run_id = await client.submit()
        await client.ended(run_id)
        async with asyncio.timeout(20):
            while (await client.call("GET", f"{RUNS}/{run_id}")).status != 404:
                await client.ended(await client.submit())  # its end is a reason to look


# --- what the API says ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "field", "words"),
    [
        ({"path": "/api/tags", "body": TINY}, "body.path", "'/api/tags'; expected '/api/generate'"),
        ({"path": "/api/chat"}, "body.body", "missing"),
        ({"path": "/api/chat", "body": "text"}, "body.body", "must be a JSON object"),
        ({"path": "/api/chat", "body": {"model": 7}}, "body.body", "model must be a string"),
        ({"path": "/api/chat", "body": {}}, "body.body.model", "missing"),
        ({"path": "/api/chat", "body": {**TINY, "stream": 1}}, "body.body", "stream must be true or false"),
        ({"path": "/api/chat", "body": {"model": "tiny", "keep_alive": 0}}, "body.body.keep_alive", "unload"),
        ({"path": "/api/chat", "body": TINY, "lane": "no"}, "body.lane", "no lane 'no'"),
        ({"path": "/api/chat", "body": TINY, "expires_s": 0}, "body.expires_s", "expected a number above 0"),
        ({"path": "/api/chat", "body": TINY, "expires_s": 10**9}, "body.expires_s", "runs.retention_s"),
        ({"path": "/api/chat", "body": TINY, "idempotent": "yes"}, "body.idempotent", "'yes'"),
        ({"path": "/api/chat", "body": TINY, "priority": 1}, "body.priority", "unknown key; allowed: path"),
        ({"path": "/api/chat", "body": {**TINY, "x": "y" * 2000}}, "body.body", "runs.max_body"),
    ],
)
async def test_a_bad_submission_is_refused_with_the_field_and_what_is_allowed(
    tmp_path: Path, wanted: dict[str, Any], field: str, words: str
) -> None:
    async with (
        Scripted().serving() as server,
        running(tmp_path, server, config={"runs": {"max_body": 1000}}) as client,
    ):
        reply = await client.post(wanted)
        error = reply.json()["error"]
        assert (reply.status, error["code"]) == (422, "invalid_request")
        assert error["message"].startswith(f"{field}: ")
        assert words in error["message"]
        assert error["details"]["fields"][0]["field"] == field
        assert (await client.call("GET", RUNS)).json() == {"runs": [], "count": 0}
        assert files(tmp_path) == []


async def test_other_bad_requests_are_refused(tmp_path: Path) -> None:
    async with Scripted().serving() as server, running(tmp_path, server) as client:
        for raw in (b"", b"[]", b'{"path":', b"\xff"):
            reply = await client.front.ask(raw, RUNS, JSON)
            assert (reply.status, reply.json()["error"]["code"]) == (422, "invalid_request")
        reply = await client.front.ask(TINY, RUNS)
        assert "Content-Type: application/json" in reply.json()["error"]["message"]
        reply = await client.post({"path": "/api/chat", "body": TINY}, {"X-Local-Only": "perhaps"})
        assert (reply.status, "x-local-only" in reply.json()["error"]["message"]) == (422, True)
        reply = await client.front.ask(b"x" * (9 * 2**20), RUNS, JSON)
        assert (reply.status, reply.json()["error"]["code"]) == (413, "body_too_large")
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/result")):
            reply = await client.call(method, f"{RUNS}/run_0{path}")
            assert (reply.status, reply.json()["error"]["code"]) == (404, "unknown_run")
        for query in ("status=done", "limit=0", "limit=1001", "state=queued"):
            assert (await client.call("GET", f"{RUNS}?{query}")).status == 422


async def test_runs_are_listed_newest_first_by_status(tmp_path: Path) -> None:
    async with Scripted().serving() as server, running(tmp_path, server) as client:
        first = await client.submit()
        await client.ended(first)
        gate = server.answer = Gate()
        second = await client.submit()
        await gate.begun.wait()
        reply = await client.result(second)
        assert (reply.status, reply.json()["error"]["code"]) == (409, "run_not_ended")
        assert reply.headers["retry-after"] == "1"

        async def listed(query: str) -> list[str]:
            return [run["id"] for run in (await client.call("GET", f"{RUNS}{query}")).json()["runs"]]

        assert await listed("") == [second, first]
        assert await listed("?limit=1") == [second]
        assert await listed("?status=succeeded") == [first]
        assert await listed("?status=running&limit=5") == [second]
        gate.opens.set()


async def test_a_role_for_runs_only_takes_runs(tmp_path: Path) -> None:
    role = {"kind": "generate", "model": "tiny", "mode": "async"}
    async with (
        Scripted().serving() as server,
        running(tmp_path, server, config={"roles": {"deep-rca": role}}) as client,
    ):
        reply = await client.front.ask({**TINY, "model": "deep-rca"})
        assert (reply.status, reply.headers["location"]) == (409, RUNS)
        assert (await client.ended(await client.submit({**TINY, "model": "deep-rca"})))[
            "status"
        ] == "succeeded"


# --- the end of the daemon ------------------------------------------------------------------------


@pytest.mark.parametrize(("is_idempotent", "status"), [(False, "interrupted"), (True, "queued")])
async def test_the_drain_lets_runs_end_and_interrupts_those_that_take_too_long(
    tmp_path: Path, is_idempotent: bool, status: str
) -> None:
    async with Scripted().serving() as server, running(tmp_path, server) as client:
        runs = client.front.daemon.backend.runs
        gate = server.answer = Gate()
        short = await client.submit()
        await gate.begun.wait()
        draining = asyncio.ensure_future(runs.drain(20, cut=asyncio.Event()))
        waits = await client.submit()
        gate.opens.set()
        await draining
        assert (await client.show(short))["status"] == "succeeded"
        assert (await client.show(waits))["status"] == "queued"
        await client.call("DELETE", f"{RUNS}/{waits}")

        gate = server.answer = Gate()
        runs.resume()
        long = await client.submit(idempotent=is_idempotent)
        await gate.begun.wait()
        await runs.drain(0.01, cut=asyncio.Event())
        run = await client.show(long)
        assert (run["status"], run["executions"]) == (status, 1)
        assert (run["error"] is None) == is_idempotent
        await gate.left.wait()
        assert (await client.front.record()).outcome == "cut"
        if is_idempotent:
            server.answer = a_word
            runs.resume()
            assert (await client.ended(long))["executions"] == 2


async def test_a_second_signal_cuts_the_drain(tmp_path: Path) -> None:
    async with Scripted().serving() as server, running(tmp_path, server) as client:
        gate = server.answer = Gate()
        run_id = await client.submit()
        await gate.begun.wait()
        cut = asyncio.Event()
        draining = asyncio.ensure_future(client.front.daemon.backend.runs.drain(60, cut=cut))
        cut.set()
        await draining
        assert (await client.show(run_id))["status"] == "interrupted"


async def test_a_registry_that_cannot_be_written_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manager.services.runs.runs._RETRY_S", 0.05)
    registry = tmp_path / "state" / "registry.sqlite3"
    aside = tmp_path / "aside"
    async with Scripted().serving() as server, running(tmp_path, server) as client:
        gate = server.answer = Gate()
        run_id = await client.submit()
        await gate.begun.wait()
        registry.rename(aside)
        reply = await client.post({"path": "/api/chat", "body": TINY})
        assert (reply.status, reply.json()["error"]["code"]) == (503, "registry_unwritable")
        gate.opens.set()
        await client.front.record()
        assert (await client.show(run_id))["status"] == "running", "its end could not be stored"
        aside.rename(registry)
        assert (await client.ended(run_id))["status"] == "succeeded"
        assert json.loads((await client.result(run_id)).body.splitlines()[-1])["done"] is True
        assert files(tmp_path) == [f"{run_id}.result"]
