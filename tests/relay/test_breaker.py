"""Breakers: what opens them, what does not, and who is let through afterwards, over real sockets."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.breaker import BreakerLimits, BreakerState
from manager.errors import Reason
from manager.settings import load_settings
from manager.settings.changes import changes
from tests.support.inside import until
from tests.support.relaying import LAST, LINE, Conversation, Scripted, a_word, relaying

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from manager.services.routing.breakers import Breakers, BreakerView
    from tests.support.relaying import Caller, Front

TINY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
# Tests half-open a breaker themselves: by its limits, which hold at once.
AT_ONCE = BreakerLimits(open_s=0.0, max_open_s=0.0)
COMPUTE = "/api/runtime/compute"


def breakers(front: Front) -> Breakers:
    return front.daemon.backend.passing.routing.breakers


def breaker(front: Front, instance: str = "a") -> BreakerView:
    return breakers(front).view(instance)


async def half_open(front: Front, instance: str = "a") -> None:
    """Let the open time of a breaker end."""
    breakers(front).reconfigure(AT_ONCE)
    await until(lambda: breaker(front, instance).state is BreakerState.HALF_OPEN)
    breakers(front).reconfigure(BreakerLimits())


async def control(front: Front, path: str, method: str = "GET", body: Any = None) -> Any:
    """The JSON of a call to the control API."""
    import httpx  # noqa: PLC0415

    async with httpx.AsyncClient(base_url=front.base_url) as client:
        answer = await client.request(method, COMPUTE + path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()


@asynccontextmanager
async def one_server(
    tmp_path: Path, *, loaded: tuple[str, ...] = ("tiny",), **gateway: Any
) -> AsyncIterator[tuple[Scripted, Front]]:
    async with (
        Scripted(loaded=loaded).serving() as server,
        relaying(tmp_path, {"a": server}, gateway=gateway) as front,
    ):
        await until(lambda: bool(loaded) is bool(front.daemon.fleet.get("a").models))
        yield server, front


# --- what counts ---


async def breaks_off(talk: Conversation) -> None:
    await talk.begin()
    await talk.chunk(LINE)
    talk.crash()


async def document_breaks_off(talk: Conversation) -> None:
    await talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
    talk.crash()


async def forgets_the_end(talk: Conversation) -> None:
    await talk.begin()
    await talk.chunk(LINE)
    await talk.end()


async def fails_late(talk: Conversation) -> None:
    await talk.begin()
    await talk.chunk(LINE)
    await talk.chunk(b'{"error":"llama runner process has terminated"}\n')
    await talk.end()


async def dies(talk: Conversation) -> None:
    talk.crash()


async def babbles(talk: Conversation) -> None:
    await talk.send(b"this is no HTTP\r\n\r\n")


async def is_broken(talk: Conversation) -> None:
    await talk.whole(500, b'{"error":"something went wrong"}')


async def cannot_load(talk: Conversation) -> None:
    await talk.whole(500, b'{"error":"model failed to load"}')


async def hangs(talk: Conversation) -> None:
    await talk.left()


async def stalls(talk: Conversation) -> None:
    await talk.begin()
    await talk.chunk(LINE)
    await talk.left()


FAULTS = {
    "an answer that breaks off": (breaks_off, "upstream_error"),
    "a document that breaks off": (document_breaks_off, "upstream_error"),
    "a stream without its last line": (forgets_the_end, "upstream_error"),
    "an error in mid-stream": (fails_late, "model_load_failed"),
    "no byte before the end": (dies, "upstream_unreachable"),
    "no HTTP": (babbles, "upstream_unreachable"),
    "an internal error": (is_broken, "upstream_error"),
    "a runner that died": (cannot_load, "model_load_failed"),
    "no first byte in time": (hangs, "attempt_timeout"),
    "an answer that stalls": (stalls, "attempt_timeout"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_two_faults_of_a_server_open_its_breaker(tmp_path: Path, fault: str) -> None:
    answer, reason = FAULTS[fault]
    async with one_server(tmp_path, first_byte_timeout_s=0.3, idle_timeout_s=0.3) as (server, front):
        server.answer = answer
        for count in (1, 2):
            await front.ask(TINY)
            await until(lambda: front.at_rest)
            assert breaker(front).failures == count
        assert breaker(front).state is BreakerState.OPEN
        assert breaker(front).reason == reason
        assert front.kinds().count("breaker_opened") == 1
        asked = len(server.seen)
        server.answer = a_word
        reply = await front.ask(TINY)
        assert reply.status == 503
        assert "breaker_open" in reply.json()["error"]
        assert 28 <= int(reply.headers["retry-after"]) <= 30
        assert (await front.record()).outcome == "refused"
        assert len(server.seen) == asked, "it is left alone"


async def test_refused_connections_open_the_breaker(tmp_path: Path) -> None:
    server = Scripted(loaded=("tiny",))
    slow_probes = {"lifecycle": {"probe_interval_s": 30}}
    async with server.serving():
        gateway = relaying(tmp_path, {"a": server}, config=slow_probes)
        front = await gateway.__aenter__()
    try:
        for _ in range(2):
            assert (await front.ask(TINY)).status == 502
        view = breaker(front)
        assert (view.state, view.failures, view.reason) == (BreakerState.OPEN, 2, "upstream_unreachable")
        assert (await front.ask(TINY)).status == 503
    finally:
        await gateway.__aexit__(None, None, None)


async def test_connections_that_are_not_accepted_in_time_open_the_breaker(tmp_path: Path) -> None:
    server = Scripted(loaded=("tiny",))
    slow_probes = {"lifecycle": {"probe_interval_s": 30}}
    async with server.serving():
        gateway = relaying(tmp_path, {"a": server}, config=slow_probes, gateway={"connect_timeout_s": 0.3})
        front = await gateway.__aenter__()
    waiting: list[socket.socket] = []
    with socket.socket() as full:
        full.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        full.bind(("127.0.0.1", server.port))
        full.listen(0)
        try:
            for _ in range(4):  # the backlog is full: the kernel drops what comes
                waiting.append(socket.socket())
                waiting[-1].setblocking(False)
                waiting[-1].connect_ex(("127.0.0.1", server.port))
            for _ in range(2):
                reply = await front.ask(TINY)
                assert "could not be connected to within 0.3 s" in reply.json()["error"]
            view = breaker(front)
            assert (view.state, view.failures, view.reason) == (BreakerState.OPEN, 2, "attempt_timeout")
        finally:
            for one in waiting:
                one.close()
            await gateway.__aexit__(None, None, None)


async def test_a_whole_answer_between_two_faults_keeps_the_breaker_closed(tmp_path: Path) -> None:
    async with one_server(tmp_path) as (server, front):
        for _ in range(3):
            server.answer = is_broken
            await front.ask(TINY)
            assert breaker(front).failures == 1
            server.answer = a_word
            assert (await front.ask(TINY)).status == 200
            assert breaker(front).failures == 0
        assert "breaker_opened" not in front.kinds()


# --- what does not count ---


def says(status: int, error: str, extra: str = "") -> Any:
    async def answer(talk: Conversation) -> None:
        await talk.whole(status, b'{"error":"%b"}' % error.encode(), extra)

    return answer


INNOCENT = {
    "a bad request": says(400, "invalid"),
    "a missing model": says(404, "model 'tiny' not found"),
    "too many requests": says(429, "slow down"),
    "a full queue": says(503, "server busy, please try again"),
    "an internal error about the request": says(500, "option num_ctx must be of type integer"),
}


@pytest.mark.parametrize("what", INNOCENT)
async def test_what_is_no_fault_of_the_server_counts_for_nothing(tmp_path: Path, what: str) -> None:
    async with one_server(tmp_path) as (server, front):
        server.answer = INNOCENT[what]
        for _ in range(4):
            assert (await front.ask(TINY)).status >= 400
        await until(lambda: front.at_rest)
        assert breaker(front).failures == 0


async def test_a_load_that_fails_says_nothing_about_other_models(tmp_path: Path) -> None:
    async with one_server(tmp_path, loaded=()) as (server, front):
        server.answer = cannot_load
        for _ in range(3):
            assert (await front.ask(TINY)).status == 500
        assert breaker(front).failures == 0


@pytest.mark.parametrize("answer", [hangs, stalls])
async def test_clients_that_leave_count_for_nothing(tmp_path: Path, answer: Any) -> None:
    async with one_server(tmp_path) as (server, front):
        server.answer = answer
        for count in (1, 2, 3):
            caller = await front.connect()
            await caller.send(TINY)
            if answer is stalls:
                await caller.head()
            await until(lambda count=count: len(server.seen) == count)  # type: ignore[misc]
            caller.leave()
            await until(lambda: front.at_rest)
        assert breaker(front).failures == 0


async def test_an_unload_neither_opens_nor_closes_a_breaker(tmp_path: Path) -> None:
    unload = {"model": "tiny", "messages": [], "keep_alive": 0}
    async with one_server(tmp_path) as (server, front):
        server.answer = is_broken
        for _ in range(3):
            await front.ask(unload)
        assert breaker(front).failures == 0
        await front.ask(TINY)
        server.answer = a_word
        await front.ask({**unload, "stream": False})
        assert breaker(front).failures == 1


async def test_what_manages_models_is_asked_of_an_instance_with_an_open_breaker(tmp_path: Path) -> None:
    async with one_server(tmp_path) as (server, front):
        server.answer = is_broken
        for _ in range(2):
            await front.ask(TINY)
        assert breaker(front).state is BreakerState.OPEN
        server.answer = says(200, "no error")
        assert (await front.ask({"model": "tiny"}, "/api/show")).status == 200
        assert breaker(front).state is BreakerState.OPEN


# --- an open breaker ---


async def test_while_another_can_serve_an_open_breaker_costs_no_request_anything(tmp_path: Path) -> None:
    async with (
        Scripted(loaded=("tiny",)).serving() as one,
        Scripted().serving() as other,
        relaying(tmp_path, {"a": one, "b": other}) as front,
    ):
        one.answer = is_broken
        await until(lambda: front.daemon.fleet.get("a").models)
        for _ in range(2):
            assert (await front.ask(TINY)).headers["x-instance"] == "b"
        assert breaker(front).state is BreakerState.OPEN
        reply = await front.ask(TINY)
        assert (reply.status, reply.headers["x-instance"]) == (200, "b")
        record = await front.record(2)
        assert (record.attempts, record.failed_attempts) == (1, ())
        assert len(one.seen) == 2
        decision = await control(front, "/routing/explain", "POST", {"model": "tiny"})
        assert [passed["reason"] for passed in decision["passed_over"]] == ["breaker_open"]
        detail = decision["passed_over"][0]["detail"]
        assert detail.startswith(
            "breaker open after 2 failures in a row, the last one upstream_error; retry at"
        )
        pinned = await front.ask({**TINY, "model": "tiny@a"})
        assert pinned.status == 503
        assert "breaker_open" in pinned.json()["error"]


async def test_where_all_breakers_are_open_the_earliest_retry_is_told(tmp_path: Path) -> None:
    async with (
        Scripted(loaded=("tiny",)).serving() as one,
        Scripted(loaded=("tiny",)).serving() as other,
        relaying(tmp_path, {"a": one, "b": other}) as front,
    ):
        one.answer = other.answer = is_broken
        breakers(front).reconfigure(BreakerLimits(failures=1, open_s=200))
        await front.ask({**TINY, "model": "tiny@a"})
        breakers(front)._limits = BreakerLimits(failures=1, open_s=50)
        await front.ask({**TINY, "model": "tiny@b"})
        assert (breaker(front, "a").state, breaker(front, "b").state) == ("open", "open")
        reply = await front.ask(TINY)
        assert reply.status == 503
        assert 48 <= int(reply.headers["retry-after"]) <= 50
        record = await front.record(2)
        assert (record.fallback_reason, record.outcome, record.attempts) == ("breaker_open", "refused", 0)


async def test_the_routing_of_roles_says_what_an_open_breaker_changes(tmp_path: Path) -> None:
    roles = {
        "thinking": {"model": "tiny", "policy": "prefer_gpu"},
        "control": {"model": "tiny", "target": "card"},
    }
    async with (
        Scripted(loaded=("tiny",)).serving() as card,
        Scripted().serving() as other,
        relaying(
            tmp_path,
            {"card": card, "cpu": other},
            devices={"card": "gpu", "cpu": "cpu"},
            config={"roles": roles},
        ) as front,
    ):
        await until(lambda: front.daemon.fleet.get("card").models)
        for _ in range(2):
            breakers(front).failed("card", breakers(front).admit("card"), Reason.ATTEMPT_TIMEOUT)
        shown = (await control(front, "/routing"))["roles"]
        thinking, held = shown["thinking"], shown["control"]
        assert (thinking["effective_target"], thinking["fallback_reason"]) == ("cpu", "breaker_open")
        assert (held["effective_target"], held["fallback_reason"]) == (None, "breaker_open")
        assert "breaker_open; breaker open after 2 failures" in held["message"]
        reply = await front.ask({**TINY, "model": "thinking"})
        assert (reply.headers["x-instance"], reply.headers["x-fallback-reason"]) == ("cpu", "breaker_open")


async def test_other_limits_are_in_force_with_a_reload(tmp_path: Path) -> None:
    async with one_server(tmp_path) as (server, front):
        server.answer = is_broken
        running = load_settings(tmp_path / "config.yaml")
        text = (tmp_path / "config.yaml").read_text()
        (tmp_path / "config.yaml").write_text(text + "breaker: {failures: 1, open_s: 5}\n")
        templates = front.daemon.templates
        wanted = load_settings(tmp_path / "config.yaml")
        changed = changes(running, wanted, templates=templates, wanted_templates=templates)
        assert changed.applied == ("breaker.failures", "breaker.open_s")
        front.daemon.reconfigure(changed)
        await front.ask(TINY)
        assert breaker(front).state is BreakerState.OPEN
        assert int((await front.ask(TINY)).headers["retry-after"]) <= 5


async def test_a_breaker_is_shown_and_reset(tmp_path: Path) -> None:
    async with one_server(tmp_path) as (server, front):
        shown = (await control(front, "/instances/a"))["breaker"]
        assert shown == {
            "state": "closed", "failures": 0, "opened_at": None, "retry_at": None, "reason": None,
        }  # fmt: skip
        server.answer = is_broken
        for _ in range(2):
            await front.ask(TINY)
        shown = (await control(front, "/instances"))["instances"][0]["breaker"]
        assert (shown["state"], shown["failures"], shown["reason"]) == ("open", 2, "upstream_error")
        assert shown["opened_at"] < shown["retry_at"]
        assert 'ollama_manager_breaker_state{instance="a"} 2.0' in await metrics(front)
        server.answer = a_word
        for _ in range(2):
            reset = await control(front, "/instances/a/breaker/reset", "POST")
            assert (reset["id"], reset["breaker"]["state"], reset["breaker"]["failures"]) == (
                "a",
                "closed",
                0,
            )
        assert (await front.ask(TINY)).status == 200
        assert 'ollama_manager_breaker_state{instance="a"} 0.0' in await metrics(front)
        assert front.kinds().count("breaker_closed") == 1


async def metrics(front: Front) -> str:
    import httpx  # noqa: PLC0415

    async with httpx.AsyncClient(base_url=front.base_url) as client:
        return (await client.get("/metrics")).text


# --- half-open ---


async def opened(server: Scripted, front: Front) -> None:
    server.answer = is_broken
    for _ in range(2):
        await front.ask(TINY)
    server.seen.clear()


async def test_of_many_requests_at_once_exactly_one_tries_a_half_open_instance(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def answers_later(talk: Conversation) -> None:
        await go_on.wait()
        await a_word(talk)

    async with one_server(tmp_path) as (server, front):
        await opened(server, front)
        server.answer = answers_later
        await half_open(front)
        asking = [asyncio.ensure_future(front.ask(TINY)) for _ in range(20)]
        done: set[Any] = set()
        while len(done) < 19:
            finished, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
            done |= finished
            asking = [one for one in asking if one not in done]
        assert {one.result().status for one in done} == {503}
        assert {one.result().headers["retry-after"] for one in done} == {"1"}
        assert len(server.seen) == 1
        go_on.set()
        assert (await asking[0]).status == 200
        assert breaker(front).state is BreakerState.CLOSED
        assert (await front.ask(TINY)).status == 200


async def test_a_probe_that_fails_opens_the_breaker_for_twice_as_long(tmp_path: Path) -> None:
    async with one_server(tmp_path) as (server, front):
        await opened(server, front)
        await half_open(front)
        assert (await front.ask(TINY)).status == 500
        reply = await front.ask(TINY)
        assert 58 <= int(reply.headers["retry-after"]) <= 60
        assert len(server.seen) == 1
        assert breaker(front).failures == 3


async def test_a_probe_whose_client_leaves_gives_its_slot_to_the_next_at_once(tmp_path: Path) -> None:
    async with one_server(tmp_path) as (server, front):
        await opened(server, front)
        server.answer = hangs
        await half_open(front)
        caller: Caller = await front.connect()
        await caller.send(TINY)
        await until(lambda: server.seen)
        assert (await front.ask(TINY)).status == 503
        caller.leave()
        await until(lambda: front.at_rest)
        server.answer = a_word
        assert (await front.ask(TINY)).status == 200
        assert breaker(front).state is BreakerState.CLOSED


async def test_a_probe_that_is_told_of_a_full_queue_says_nothing(tmp_path: Path) -> None:
    async with one_server(tmp_path) as (server, front):
        await opened(server, front)
        server.answer = INNOCENT["a full queue"]
        await half_open(front)
        for _ in range(3):
            assert (await front.ask(TINY)).status == 503
        assert len(server.seen) == 3, "each of them was the probe"
        assert breaker(front).state is BreakerState.HALF_OPEN


async def test_a_long_stream_closes_a_half_open_breaker_with_its_beginning(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def tells_a_story(talk: Conversation) -> None:
        await talk.begin()
        await talk.chunk(LINE)
        await go_on.wait()
        talk.crash()

    async with one_server(tmp_path) as (server, front):
        await opened(server, front)
        server.answer = tells_a_story
        await half_open(front)
        long = asyncio.ensure_future(front.ask(TINY))
        await until(lambda: breaker(front).state is BreakerState.CLOSED)
        server.answer = a_word
        assert (await front.ask(TINY)).status == 200, "the others do not wait for the end of the stream"
        go_on.set()
        await long
        view = breaker(front)
        assert (view.state, view.failures, view.reason) == (BreakerState.CLOSED, 1, Reason.UPSTREAM_ERROR)


@pytest.mark.parametrize("begins", [b"", b'{"error":"llama runner process has terminated"}\n'])
async def test_a_stream_without_a_good_beginning_is_no_proof(tmp_path: Path, begins: bytes) -> None:
    async def begins_badly(talk: Conversation) -> None:
        await talk.begin()
        if begins:
            await talk.chunk(begins)
        begun.set()
        await go_on.wait()
        talk.crash()

    begun, go_on = asyncio.Event(), asyncio.Event()
    async with one_server(tmp_path) as (server, front):
        await opened(server, front)
        server.answer = begins_badly
        await half_open(front)
        asking = asyncio.ensure_future(front.ask(TINY))
        await begun.wait()
        assert (await front.ask(TINY)).status == 503, "it still is the one that tries it"
        go_on.set()
        await asking
        assert (breaker(front).state, breaker(front).failures) == (BreakerState.OPEN, 3)


async def test_a_load_that_takes_longer_than_an_attempt_may_does_not_open_the_breaker(tmp_path: Path) -> None:
    async with one_server(tmp_path, loaded=(), first_byte_timeout_s=0.3) as (server, front):
        for _ in range(3):
            server.answer = hangs  # it loads
            assert (await front.ask(TINY)).status == 504
            assert (breaker(front).state, breaker(front).failures) == (BreakerState.CLOSED, 0)
            server.answer = a_word
            assert (await front.ask(TINY)).status == 200


async def test_a_server_that_hangs_in_a_load_is_left_alone_after_two_time_outs(tmp_path: Path) -> None:
    async with one_server(tmp_path, loaded=(), first_byte_timeout_s=0.3) as (server, front):
        server.answer = hangs
        for _ in range(2):
            assert (await front.ask(TINY)).status == 504
        view = breaker(front)
        assert (view.state, view.failures, view.reason) == (BreakerState.OPEN, 2, Reason.ATTEMPT_TIMEOUT)


# --- late results ---


async def test_a_slow_request_that_fails_after_a_reset_counts_for_nothing(tmp_path: Path) -> None:
    fail = asyncio.Event()

    async def fails_later(talk: Conversation) -> None:
        await fail.wait()
        await is_broken(talk)

    async with one_server(tmp_path) as (server, front):
        server.answer = fails_later
        slow = [asyncio.ensure_future(front.ask(TINY)) for _ in range(3)]
        await until(lambda: len(server.seen) == 3)
        await control(front, "/instances/a/breaker/reset", "POST")
        fail.set()
        assert {one.status for one in await asyncio.gather(*slow)} == {500}
        view = breaker(front)
        assert (view.state, view.failures) == (BreakerState.CLOSED, 0)


async def test_a_slow_answer_of_before_the_opening_does_not_close_the_breaker(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def answers_later(talk: Conversation) -> None:
        await talk.begin()
        await talk.chunk(LINE)
        await go_on.wait()
        await talk.chunk(LAST)
        await talk.end()

    async with one_server(tmp_path) as (server, front):
        server.answer = answers_later
        slow = asyncio.ensure_future(front.ask(TINY))
        await until(lambda: server.seen)
        await opened(server, front)
        go_on.set()
        assert (await slow).status == 200
        assert breaker(front).state is BreakerState.OPEN


# --- overload ---


async def test_a_server_with_a_full_queue_is_passed_over_for_as_long_as_it_asks(tmp_path: Path) -> None:
    async with (
        Scripted(loaded=("tiny",)).serving() as one,
        Scripted(loaded=("tiny",)).serving() as other,
        relaying(tmp_path, {"a": one, "b": other}) as front,
    ):
        await until(lambda: all(front.daemon.fleet.get(name).models for name in "ab"))
        one.answer = says(503, "server busy, please try again", "Retry-After: 20\r\n")
        first = await front.ask(TINY)
        assert (first.headers["x-instance"], first.headers["x-fallback-reason"]) == ("b", "overloaded")
        for _ in range(3):
            assert (await front.ask(TINY)).headers["x-instance"] == "b"
        assert len(one.seen) == 1
        decision = await control(front, "/routing/explain", "POST", {"model": "tiny"})
        assert [attempt["instance"] for attempt in decision["attempts"]] == ["b", "a"]
        assert decision["passed_over"] == [
            {
                "instance": "a",
                "model": "tiny",
                "reason": "overloaded",
                "detail": "the server has too many requests",
            }
        ]
        one.answer, other.answer = a_word, is_broken
        assert (await front.ask(TINY)).headers["x-instance"] == "a", "it fails no request"


async def test_a_server_that_is_the_only_one_is_asked_although_it_is_overloaded(tmp_path: Path) -> None:
    async with one_server(tmp_path) as (server, front):
        server.answer = says(429, "slow down", "Retry-After: 20\r\n")
        assert (await front.ask(TINY)).status == 429
        server.answer = a_word
        assert (await front.ask(TINY)).status == 200


async def test_an_instance_that_has_become_slow_for_a_model_is_passed_over_and_tried_again(
    tmp_path: Path,
) -> None:
    delay_s = 0.0

    async def answers_in_time(talk: Conversation) -> None:
        await asyncio.sleep(delay_s)
        await a_word(talk)

    async with (
        Scripted(loaded=("tiny",)).serving() as one,
        Scripted(loaded=("tiny",)).serving() as other,
        relaying(tmp_path, {"a": one, "b": other}) as front,
    ):
        one.answer = answers_in_time
        await until(lambda: all(front.daemon.fleet.get(name).models for name in "ab"))
        for _ in range(25):
            assert (await front.ask(TINY)).headers["x-instance"] == "a"
        delay_s, slow = 0.3, 0
        while (await front.ask(TINY)).headers["x-instance"] == "a":
            slow += 1
            assert slow < 60
        await until(lambda: front.at_rest)
        reply = await front.ask(TINY)
        assert (reply.headers["x-instance"], reply.headers.get("x-fallback-reason")) == ("b", None)
        decision = await control(front, "/routing/explain", "POST", {"model": "tiny"})
        assert decision["passed_over"][0]["reason"] == "overloaded"
        assert "usually" in decision["passed_over"][0]["detail"]
        overload = front.daemon.backend.passing.routing.overload
        overload._now = lambda now=overload._now: now() + 11  # type: ignore[misc]
        await until(lambda: overload.of("a") is None)
        delay_s = 0.0
        assert (await front.ask(TINY)).headers["x-instance"] == "a"


async def test_an_order_without_fields_takes_an_empty_body_alone(tmp_path: Path) -> None:
    json = "application/json"
    wrong = (
        (json, b'{"force":true}', "body.force: unknown key; allowed: none"),
        (json, b"[]", "body: a list; expected an object"),
        (json, b"{", "body: it is not JSON"),
        ("text/plain", b"{}", f"body: expected JSON, with the header `Content-Type: {json}`"),
    )
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        for order in ("breaker/reset", "resume", "restart", "rollback"):
            path = f"/api/runtime/compute/instances/a/{order}"
            for kind, body, problem in wrong:
                reply = await front.ask(body, path, {"Content-Type": kind})
                assert (reply.status, reply.json()["error"]["message"]) == (422, problem), order
            for kind, body in ((json, b"{}"), (json, b""), ("text/plain", b"")):
                reply = await front.ask(body, path, {"Content-Type": kind})
                # The daemon did not start this instance, and replaces nothing there.
                assert (reply.status == 200) is (order in {"breaker/reset", "resume"}), reply.body
                assert reply.status != 422, reply.body
