"""One request and its answer: framing, deadlines, and that nothing is left of it whichever way it ends."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from manager.domain.roles import BodyChanges
from manager.domain.routing import Refused
from manager.errors import OutOfDescriptorsError, Reason
from manager.relay.relay import Limits
from manager.wire.encoding import zstd
from tests.support.attempts import NOBODY, attempt, decision, target, unavailable
from tests.support.exchanging import (
    ANTHROPIC,
    CHAT,
    DONE,
    EMBED,
    EVENT,
    LAST,
    LINE,
    MAX_BODY,
    OPENAI,
    TINY,
    Bench,
    FakeFront,
    bench_of,
)

if TYPE_CHECKING:
    from manager.relay.exchange import Exchange

STREAM = {**TINY, "stream": True}
WHOLE = {**TINY, "stream": False}
LOAD_FAILED = b'{"error":"model failed to load"}'
SOMETHING = b'{"error":"something went wrong"}'
LARGE = {**TINY, "images": ["QUJD" * 50_000]}
ZSTD = (b"content-encoding", b"zstd")
EVENTS = b"text/event-stream"


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return bench_of(monkeypatch, attempt("a"), attempt("b"))


@pytest.fixture
async def alone(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return bench_of(monkeypatch, attempt("a"))


@pytest.fixture
async def loading(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The model is in no instance's memory."""
    return bench_of(monkeypatch, attempt("a", "running"), attempt("b", "running"))


def outcome(bench: Bench) -> tuple[str, int]:
    assert bench.at_rest()
    return bench.record.outcome, bench.record.status


async def answered(bench: Bench, client: FakeFront) -> None:
    """Wait until the client has its answer; a large body takes many steps."""
    await bench.until(lambda: client.ended)
    await bench.settle()


# --- the way there and back ---


async def test_a_stream_goes_through_as_it_comes(bench: Bench) -> None:
    server = bench.kept()
    exchange, client = bench.ask()
    assert (len(server.requests), bench.stage.placement.held) == (1, {"a": 1})
    bench.clock.advance(0.25)
    server.head()
    assert client.written == b"", "the head goes out together with the first bytes"
    server.body(LINE)
    assert client.lines()[0]["done"] is False
    bench.clock.advance(0.75)
    server.body(LAST, complete=True)
    assert (client.status, client.body, client.is_whole) == (200, LINE + LAST, True)
    assert client.headers["x-instance"] == "a"
    assert client.headers["x-accel-buffering"] == "no"
    assert client.ended == [exchange]
    assert exchange.keep_alive
    assert outcome(bench) == ("ok", 200)
    record = bench.record
    assert (record.stream, record.ttfb_ms, record.duration_ms) == (True, 250.0, 1000.0)
    assert (record.input_tokens, record.output_tokens) == (12, 34)
    assert (bench.pool().kept, server.usable) == ([server], True), "for the next request"


async def test_a_whole_answer_keeps_its_length(bench: Bench) -> None:
    server = bench.kept()
    _, client = bench.ask(WHOLE)
    server.whole(200, LAST)
    assert (client.headers["content-length"], client.body) == (str(len(LAST)), LAST)
    assert (outcome(bench), bench.record.stream) == (("ok", 200), False)


async def test_the_server_sees_the_request_as_it_came_under_a_new_head(bench: Bench) -> None:
    server = bench.kept()
    parent = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    bench.ask(TINY, CHAT, (b"user-agent", b"curl"), (b"traceparent", parent))
    ((head, body),) = server.requests
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /api/chat HTTP/1.1"
    assert b"Host: a:11434" in lines
    assert b"user-agent: curl" in lines
    assert b"Content-Length: %d" % len(body) in lines
    assert head.endswith(b"\r\n\r\n")
    assert b"traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-" in head
    assert parent not in head
    assert json.loads(body) == TINY


async def test_the_body_is_changed_for_each_attempt(bench: Bench) -> None:
    bench.stage.router.decision = decision(attempt("a", model="one"), attempt("b", model="two", role="r"))
    bench.stage.router.changes = {("two", "r"): BodyChanges(overrides={"think": False})}
    one, two = bench.kept("a"), bench.kept("b")
    bench.ask()
    one.whole(500, LOAD_FAILED)
    assert json.loads(one.requests[0][1])["model"] == "one"
    second = json.loads(two.requests[0][1])
    assert (second["model"], second["think"]) == ("two", False)


async def test_without_a_connection_one_is_opened(bench: Bench) -> None:
    _, client = bench.ask(WHOLE)
    assert bench.relay.open_tasks == 1
    await bench.settle()
    bench.pool().opened[0].whole(200, LAST)
    assert client.status == 200
    assert outcome(bench) == ("ok", 200)


async def test_a_body_in_pieces_is_one_body(bench: Bench) -> None:
    server = bench.kept()
    exchange, _ = bench.begin()
    raw = json.dumps(TINY).encode()
    for at in range(0, len(raw), 7):
        exchange.body_came(raw[at : at + 7])
    assert bench.bodies.held_bytes == len(raw)
    exchange.request_ended()
    assert server.requests[0][1] == raw


async def test_a_large_body_is_read_and_changed_in_steps(bench: Bench) -> None:
    bench.stage.router.decision = decision(attempt("a", model="other"))
    exchange, client = bench.ask(LARGE)
    assert bench.stage.placement.granted == [], "not on the callback of the client's bytes"
    await bench.settle()
    server = bench.pool().opened[0]
    assert json.loads(server.requests[0][1]) == {**LARGE, "model": "other"}
    assert bench.bodies.held_bytes > 0, "it may have to be sent again"
    server.head()
    server.body(LINE)
    assert bench.bodies.held_bytes == 0, "nothing is sent again after the first byte"
    assert exchange._attempting is not None
    assert exchange._attempting.is_delivered
    assert exchange._body is not None
    assert not exchange._body.raw
    server.body(LAST, complete=True)
    assert client.is_whole
    assert outcome(bench) == ("ok", 200)


async def test_an_encoded_body_is_decoded_and_counted_at_its_decoded_size(bench: Bench) -> None:
    raw = json.dumps(TINY | {"x": "y" * 100_000}).encode()
    bench.ask(zstd.compress(raw), OPENAI, ZSTD)
    await bench.settle()
    server = bench.pool().opened[0]
    assert bench.bodies.held_bytes == len(raw)
    assert server.requests[0][1] == raw
    assert b"content-encoding" not in server.requests[0][0].lower()
    server.whole(200, b"{}")
    assert outcome(bench) == ("ok", 200)


async def test_a_client_that_speaks_http_1_0_gets_an_answer_that_ends_with_its_connection(
    bench: Bench,
) -> None:
    server = bench.kept()
    exchange, client = bench.ask(keep_alive=False, chunks=False)
    server.head()
    server.body(LINE)
    server.body(LAST, complete=True)
    assert "transfer-encoding" not in client.headers
    assert client.headers["connection"] == "close"
    assert client.body == LINE + LAST
    assert not exchange.keep_alive
    assert outcome(bench) == ("ok", 200)


@pytest.mark.parametrize("keep_alive", [True, False])
async def test_an_answer_says_whether_its_connection_stays(bench: Bench, *, keep_alive: bool) -> None:
    server = bench.kept()
    exchange, client = bench.ask(WHOLE, keep_alive=keep_alive)
    server.whole(200, LAST)
    assert client.headers.get("connection") == (None if keep_alive else "close")
    assert exchange.keep_alive is keep_alive


async def test_a_connection_that_is_to_end_says_so_in_an_answer_that_has_not_begun(bench: Bench) -> None:
    server = bench.kept()
    exchange, client = bench.ask(WHOLE)
    exchange.keep_alive = False
    server.whole(200, LAST)
    assert client.headers["connection"] == "close"


async def test_a_request_waits_for_its_turn(bench: Bench) -> None:
    server = bench.kept()
    exchange, client = bench.ask(turn=False)
    assert (server.requests, client.written, bench.relay.exchanges) == ([], b"", set())  # type: ignore[comparison-overlap]
    exchange.turn_came()
    assert len(server.requests) == 1


# --- what is wrong with a request ---


@pytest.mark.parametrize(
    ("body", "says"),
    [(b"nonsense", "not JSON"), (b"[]", "JSON object"), (b"", "missing request body"), (b"{}", "model")],
)
async def test_a_body_that_cannot_be_understood_is_refused(bench: Bench, body: bytes, says: str) -> None:
    exchange, client = bench.ask(body)
    assert (client.status, outcome(bench)) == (400, ("client_error", 400))
    assert says in client.json()["error"]
    assert exchange.keep_alive
    assert "x-instance" not in client.headers


@pytest.mark.parametrize("headers", [(), (ZSTD,)])
async def test_a_large_body_that_cannot_be_understood_is_refused(bench: Bench, headers: Any) -> None:
    _, client = bench.ask(b"n" * 100_000, OPENAI, *headers)
    await bench.settle()
    assert (client.status, outcome(bench)) == (400, ("client_error", 400))


async def test_the_model_may_be_named_by_the_lane(bench: Bench) -> None:
    server = bench.kept()
    bench.ask({"messages": []}, CHAT, (b"x-lane", b"thinking"))
    assert len(server.requests) == 1


async def test_a_body_that_cannot_be_changed_is_refused(bench: Bench) -> None:
    """A system prompt among too many messages: for large bodies this is found in a task."""
    bench.stage.router.changes = {("tiny", None): BodyChanges(system="be brief")}
    messages = [{"role": "user", "content": "a"}] * 66_000
    for _ in range(2):  # on a new connection, and on one that was kept
        _, client = bench.ask({"model": "tiny", "messages": messages})
        await answered(bench, client)
        assert client.status == 400
        assert outcome(bench) == ("client_error", 400)
        bench.kept()


async def test_a_body_beyond_the_limit_is_refused_before_all_of_it_has_come(bench: Bench) -> None:
    exchange, client = bench.begin()
    exchange.body_came(b" " * MAX_BODY)
    exchange.body_came(b" ")
    assert (client.status, client.headers["connection"]) == (413, "close")
    assert not exchange.keep_alive
    assert outcome(bench) == ("client_error", 413)
    exchange.body_came(b"what still comes")
    exchange.request_ended()
    assert bench.at_rest()


async def test_a_body_that_decodes_to_more_than_the_limit_is_refused(bench: Bench) -> None:
    _, client = bench.ask(zstd.compress(b" " * (MAX_BODY + 1)), OPENAI, ZSTD)
    await answered(bench, client)
    assert (client.status, outcome(bench)) == (413, ("client_error", 413))


async def test_a_refusal_is_told_when_the_turn_comes(bench: Bench) -> None:
    exchange, client = bench.begin(turn=False)
    exchange.refuse(403, "not for you", {"X-Why": "because"})
    exchange.body_came(b"{}")
    assert client.written == b""
    exchange.turn_came()
    assert (client.status, client.headers["x-why"], client.json()) == (
        403,
        "because",
        {"error": "not for you"},
    )
    assert client.headers["connection"] == "close", "its body would be taken for the next request"
    assert outcome(bench) == ("client_error", 403)


async def test_a_refused_request_that_has_come_whole_keeps_its_connection(bench: Bench) -> None:
    exchange, client = bench.begin(turn=False)
    exchange.request_ended()
    exchange.refuse(401, "a key")
    exchange.turn_came()
    assert (client.status, exchange.keep_alive) == (401, True)


async def test_a_request_is_refused_once(bench: Bench) -> None:
    exchange, client = bench.begin(turn=False)
    exchange.refuse(401, "a key")
    exchange.refuse_now(413, "too large")
    exchange.turn_came()
    exchange.refuse_now(413, "too large")
    assert (client.status, len(bench.stage.ended)) == (401, 1)


@pytest.mark.parametrize(
    ("what", "status"), [("unknown", 404), ("impossible", 400), ("unavailable", 503), ("contradiction", 422)]
)
async def test_a_request_that_may_go_nowhere_is_refused_with_the_reason(
    bench: Bench, what: Any, status: int
) -> None:
    bench.stage.router.decision = decision(refused=Refused(what, Reason.POLICY, "no way"))
    _, client = bench.ask(TINY, OPENAI)
    assert (client.status, client.json()["error"]["message"]) == (status, "no way")
    assert client.headers.get("retry-after") == ("1" if status == 503 else None)
    assert outcome(bench) == ("refused", status)


# --- the bound of all bodies ---


async def test_bodies_that_are_too_many_together_are_refused_as_they_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = bench_of(monkeypatch, attempt("a"), most_buffered=1000)
    first, _ = bench.begin()
    first.body_came(b" " * 900)
    second, client = bench.begin()
    second.body_came(b" " * 100)
    second.body_came(b" ")
    assert (client.status, client.headers["retry-after"]) == (503, "1")
    assert (bench.record.outcome, bench.bodies.held_bytes) == ("refused", 900)
    first.caller_left()
    assert bench.at_rest()


async def test_a_body_that_does_not_fit_decoded_is_refused_while_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = bench_of(monkeypatch, attempt("a"), most_buffered=2**20)
    _, client = bench.ask(zstd.compress(b" " * (2**21)), OPENAI, ZSTD)
    most = 0
    while not client.ended:
        await asyncio.sleep(0)
        most = max(most, bench.bodies.held_bytes)
    await bench.settle()
    assert 2**19 < most <= 2**20
    assert (client.status, client.headers["retry-after"]) == (503, "1")
    assert outcome(bench) == ("refused", 503)


async def test_an_ended_request_keeps_nothing_of_its_body(alone: Bench) -> None:
    """A connection that stays open keeps its last exchange."""
    alone.stage.router.decision = decision(refused=NOBODY)
    exchange, client = alone.ask(LARGE)
    await alone.settle()
    assert client.status == 503
    assert exchange._body is not None
    assert not exchange._body.raw
    assert not exchange._body.fields
    assert alone.at_rest()


# --- a server that cannot be reached ---


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionRefusedError(111, "Connection refused"), "upstream_unreachable"),
        (OSError("no route"), "upstream_unreachable"),
        (TimeoutError(), "attempt_timeout"),
    ],
)
async def test_a_server_that_cannot_be_connected_to_is_left_for_another(
    bench: Bench, error: Exception, reason: str
) -> None:
    bench.pool("a").opens = [error]
    server = bench.kept("b")
    _, client = bench.ask(WHOLE)
    await bench.settle()
    server.whole(200, LAST)
    assert (client.headers["x-instance"], client.headers["x-fallback-reason"]) == ("b", reason)
    assert bench.record.failed_attempts == (("a", reason),)
    assert (outcome(bench), bench.record.attempts) == (("ok", 200), 2)


async def test_a_connection_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(monkeypatch, attempt("a"), limits=Limits(connect_timeout_s=0))
    bench.pool().opens = [asyncio.get_running_loop().create_future()]
    _, client = bench.ask()
    await bench.settle()
    assert client.status == 504
    assert client.json()["error"] == "a could not be connected to within 0 s"
    assert outcome(bench) == ("timeout", 504)


async def test_a_lack_of_descriptors_is_told_and_blames_no_instance(bench: Bench) -> None:
    bench.pool("a").opens = [OutOfDescriptorsError()]
    _, client = bench.ask()
    await bench.settle()
    assert (client.status, client.headers["retry-after"]) == (503, "1")
    assert "descriptor" in client.json()["error"]
    assert (bench.stage.blamed(), bench.pool("b").opened) == ({}, [])
    assert bench.at_rest()


async def test_when_no_server_can_be_reached_the_first_trouble_is_told(bench: Bench) -> None:
    for name in "ab":
        bench.pool(name).opens = [ConnectionRefusedError(111, "Connection refused")]
    _, client = bench.ask()
    await bench.settle()
    assert (client.status, client.json()) == (502, {"error": "a cannot be reached (Connection refused)"})
    assert outcome(bench) == ("upstream_error", 502)


async def test_a_kept_connection_that_was_closed_is_replaced_and_the_request_sent_once_more(
    alone: Bench,
) -> None:
    stale = alone.kept()
    _, client = alone.ask(WHOLE)
    stale.breaks(may_have_begun=False)
    await alone.settle()
    fresh = alone.pool().opened[0]
    assert fresh.requests[0][1] == stale.requests[0][1]
    fresh.whole(200, LAST)
    assert (client.status, outcome(alone), alone.record.attempts) == (200, ("ok", 200), 2)
    assert alone.stage.blamed() == {}


async def test_a_request_is_sent_once_more_on_a_new_connection_whatever_else_is_kept(alone: Bench) -> None:
    """A server that was restarted has closed all of them."""
    others = [alone.kept(), alone.kept()]
    stale = alone.kept()
    _, client = alone.ask(WHOLE)
    stale.breaks(may_have_begun=False)
    await alone.settle()
    assert [other.requests for other in others] == [[], []]
    alone.pool().opened[0].whole(200, LAST)
    assert (client.status, outcome(alone), alone.record.attempts) == (200, ("ok", 200), 2)


@pytest.mark.parametrize("data", [b"", LINE], ids=["no byte", "a line"])
async def test_a_break_behind_the_head_counts_as_every_failed_attempt(alone: Bench, data: bytes) -> None:
    server = alone.kept()
    _, client = alone.ask()
    server.head()
    if data:
        server.body(data)
    server.breaks()
    assert alone.stage.blamed() == {("a", "upstream_error"): 1}
    assert [failed.reason for failed in alone.record.failed_attempts] == [Reason.UPSTREAM_ERROR]
    assert outcome(alone) == ("upstream_error", 502 if not data else 200)
    assert "before the answer ended" in client.body.decode()


async def test_a_connection_that_closes_while_a_large_body_is_made_is_replaced(alone: Bench) -> None:
    server = alone.kept()
    alone.stage.router.decision = decision(attempt("a", model="other"))
    exchange, _ = alone.ask(LARGE)
    await alone.until(lambda: exchange._connection)
    server.usable = False
    await alone.settle()
    assert server.requests == []
    assert len(alone.pool().opened[0].requests) == 1
    exchange.caller_left()


async def test_a_server_that_dies_takes_the_request_with_it(bench: Bench) -> None:
    server = bench.kept("a")
    _, client = bench.ask()
    server.breaks("the server closed the connection")
    assert (client.status, client.json()["error"]) == (502, "a: the server closed the connection")
    assert outcome(bench) == ("upstream_error", 502)
    assert bench.pool("b").opened == []


# --- an answer with an error ---


async def test_an_error_is_read_before_another_server_is_asked(bench: Bench) -> None:
    one, two = bench.kept("a"), bench.kept("b")
    _, client = bench.ask(WHOLE)
    one.head(500, b"application/json")
    one.body(LOAD_FAILED[:10])
    assert (two.requests, client.written) == ([], b"")  # type: ignore[comparison-overlap]
    one.body(LOAD_FAILED[10:], complete=True)
    two.whole(200, LAST)
    assert (client.body, client.headers["x-fallback-reason"]) == (LAST, "model_load_failed")
    assert outcome(bench) == ("ok", 200)
    assert bench.pool("a").kept == [one]


async def test_an_error_about_the_request_is_passed_on(bench: Bench) -> None:
    body = b'{"error":"option \\"num_ctx\\" must be of type integer"}'
    server = bench.kept("a")
    _, client = bench.ask()
    server.whole(500, body)
    assert (client.status, client.body) == (500, body)
    assert (bench.stage.blamed(), bench.stage.placement.granted) == ({}, ["a"])
    assert outcome(bench) == ("upstream_error", 500)


async def test_an_error_about_the_request_is_no_fault_of_an_instance_that_is_alone(alone: Bench) -> None:
    server = alone.kept()
    _, client = alone.ask()
    server.whole(500, b'{"error":"invalid options"}'.replace(b"options", b"option"))
    assert (client.status, alone.stage.blamed()) == (500, {})
    assert alone.stage.status.idle_status("tiny:latest") == "not_loaded"
    assert alone.at_rest()


@pytest.mark.parametrize(("status", "ends"), [(400, "client_error"), (422, "client_error"), (301, "ok")])
async def test_what_is_no_fault_of_the_server_goes_through_as_it_comes(
    bench: Bench, status: int, ends: str
) -> None:
    server = bench.kept("a")
    _, client = bench.ask()
    server.head(status, b"application/json")
    server.body(b'{"error":')
    assert client.status == status
    server.body(b'"no"}', complete=True)
    assert (client.is_whole, outcome(bench)) == (True, (ends, status))


async def test_when_no_later_server_answers_the_first_answer_is_the_clients(bench: Bench) -> None:
    one, two = bench.kept("a"), bench.kept("b")
    answer = b'{"error":"server busy","wait":3}'
    _, client = bench.ask()
    one.whole(503, answer)
    two.breaks()
    assert (client.status, client.body) == (503, answer)
    assert (client.headers["x-instance"], "x-fallback-reason" in client.headers) == ("a", False)
    assert outcome(bench) == ("upstream_error", 503)


async def test_the_last_servers_error_goes_through(alone: Bench) -> None:
    server = alone.kept()
    _, client = alone.ask()
    server.whole(503, b'{"error":"server busy"}')
    assert (client.status, client.body) == (503, b'{"error":"server busy"}')
    assert alone.stage.blamed() == {("a", "overloaded"): 1}


async def test_an_error_that_is_too_long_to_be_held_is_the_clients(bench: Bench) -> None:
    server = bench.kept("a")
    _, client = bench.ask()
    server.head(500, b"text/plain")
    for _ in range(3):
        server.body(b"x" * 30_000)
    assert client.status == 500
    server.body(b"y" * 10, complete=True)
    assert client.body == b"x" * 90_000 + b"y" * 10
    assert (client.headers["x-instance"], bench.record.attempts) == ("a", 1)
    assert (client.is_whole, outcome(bench)) == (True, ("upstream_error", 500))
    assert bench.pool("b").opened == []


async def test_an_error_that_is_too_long_may_come_at_once(bench: Bench) -> None:
    server = bench.kept("a")
    _, client = bench.ask()
    server.whole(500, b"x" * 70_000)
    assert client.body == b"x" * 70_000
    assert outcome(bench) == ("upstream_error", 500)


@pytest.mark.parametrize("how", ["breaks off", "takes too long"])
async def test_an_error_that_does_not_end_is_followed_by_the_next_server(bench: Bench, how: str) -> None:
    one, two = bench.kept("a"), bench.kept("b")
    exchange, client = bench.ask(WHOLE)
    one.head(500)
    one.body(b'{"error":"fail')
    if how == "breaks off":
        one.breaks()
    else:
        bench.check(exchange, 5.0)
        assert two.requests == []
        bench.check(exchange, 0.1)
        assert one.abandoned == 1
    two.whole(200, LAST)
    assert (client.body, outcome(bench)) == (LAST, ("ok", 200))


async def test_an_error_that_does_not_end_is_told_in_our_words_where_nothing_follows(alone: Bench) -> None:
    server = alone.kept()
    _, client = alone.ask()
    server.head(500)
    server.body(b'{"error":"fail')
    server.breaks()
    assert (client.status, client.json()) == (502, {"error": "a answered with status 500"})
    assert outcome(alone) == ("upstream_error", 502)


async def test_a_server_that_is_being_heard_is_not_left_because_it_is_silent_or_late(bench: Bench) -> None:
    one, two = bench.kept("a"), bench.kept("b")
    exchange, client = bench.ask(WHOLE)
    bench.clock.advance(59)
    one.head(500)
    one.body(b'{"error":')
    bench.stage.placement.silent.add("a")
    bench.check(exchange, 2)
    assert two.requests == []
    one.body(b'"model failed to load"}', complete=True)
    two.whole(500, LOAD_FAILED)
    assert client.body == LOAD_FAILED, "of the last server alone"
    assert bench.at_rest()


async def test_a_client_that_leaves_while_an_error_is_read_ends_the_request(bench: Bench) -> None:
    server = bench.kept("a")
    exchange, _ = bench.ask()
    server.head(500)
    server.body(b'{"error":')
    exchange.caller_left()
    assert server.abandoned == 1
    assert outcome(bench) == ("client_gone", 0)
    assert bench.pool("b").opened == []


# --- the end of an answer ---


async def test_a_stream_without_its_last_line_is_no_whole_answer(bench: Bench) -> None:
    server = bench.kept()
    _, client = bench.ask()
    server.head()
    server.body(LINE)
    server.body(complete=True)
    assert "before its end" in client.lines()[-1]["error"]
    assert (client.is_whole, outcome(bench)) == (True, ("upstream_error", 200))


async def test_an_error_that_the_server_tells_itself_is_not_told_again(bench: Bench) -> None:
    server = bench.kept()
    _, client = bench.ask()
    server.head()
    server.body(LINE)
    server.body(b'{"error":"out of memory"}\n', complete=True)
    assert [line.get("error") for line in client.lines()] == [None, "out of memory"]
    assert outcome(bench) == ("upstream_error", 200)


@pytest.mark.parametrize(
    ("path", "piece", "between"),
    [
        (CHAT, LINE, b""),
        (CHAT, LINE[:-1], b"\n"),
        (OPENAI, EVENT, b""),
        (OPENAI, EVENT[:-1], b"\n"),
        (OPENAI, EVENT[:-2], b"\n\n"),
        (OPENAI, EVENT.replace(b"\n", b"\r\n"), b""),
        (OPENAI, EVENT[:-2] + b"\r\n", b"\n"),
        (ANTHROPIC, EVENT[:-1], b"\n"),
    ],
)
async def test_an_error_behind_a_part_of_a_stream_is_a_line_or_an_event_of_its_own(
    bench: Bench, path: str, piece: bytes, between: bytes
) -> None:
    server = bench.kept()
    _, client = bench.ask(STREAM, path)
    server.head(200, b"application/x-ndjson" if path == CHAT else EVENTS)
    server.body(piece)
    server.breaks("the connection broke")
    assert client.body.startswith(piece + between)
    error = client.body[len(piece + between) :]
    assert error.startswith({CHAT: b'{"error"', OPENAI: b"data: {", ANTHROPIC: b"event: error\n"}[path])
    assert b"a: the connection broke before the answer ended" in error
    assert (client.is_whole, outcome(bench)) == (True, ("upstream_error", 200))
    assert bench.stage.blamed() == {("a", "upstream_error"): 1}


async def test_a_document_that_breaks_off_is_not_passed_off_as_whole(bench: Bench) -> None:
    server = bench.kept()
    _, client = bench.ask(WHOLE)
    server.head(200, b"application/json", 100)
    server.body(b"{")
    server.breaks()
    assert (client.aborted, client.is_whole) == (1, False)
    assert outcome(bench) == ("upstream_error", 200)


async def test_nothing_follows_the_first_byte(bench: Bench) -> None:
    server = bench.kept("a")
    bench.ask()
    server.head()
    server.body(LINE)
    server.breaks(may_have_begun=False)
    assert (bench.pool("b").opened, bench.stage.placement.granted) == ([], ["a"])
    assert bench.at_rest()


async def test_only_the_end_of_a_long_answer_is_kept_for_its_figures(bench: Bench) -> None:
    server = bench.kept()
    exchange, client = bench.ask()
    server.head()
    for _ in range(40):
        server.body(LINE * 100)
        assert len(exchange._tail) <= 64 * 1024 + len(LINE) * 100
    server.body(LAST, complete=True)
    assert client.body == LINE * 4000 + LAST
    assert (bench.record.input_tokens, bench.record.output_tokens) == (12, 34)


# --- the client ---


@pytest.mark.parametrize(
    "moment",
    [
        "while its body comes",
        "while its body is read",
        "while an instance is prepared",
        "while a connection is opened",
        "before the task has begun",
        "while the body is made",
        "before the head",
        "after the head",
        "in the middle of the answer",
    ],
)
async def test_a_client_that_leaves_takes_everything_with_it(bench: Bench, moment: str) -> None:
    exchange: Exchange
    match moment:
        case "while its body comes":
            exchange, client = bench.begin()
            exchange.body_came(b'{"model":')
        case "while its body is read":
            exchange, client = bench.ask(LARGE)
        case "while an instance is prepared":
            bench.stage.placement.prepares["a"] = asyncio.get_running_loop().create_future()
            exchange, client = bench.ask()
            await bench.settle()
        case "while a connection is opened":
            bench.pool().opens = [asyncio.get_running_loop().create_future()]
            exchange, client = bench.ask()
            await bench.settle()
        case "before the task has begun":
            exchange, client = bench.ask()
        case "while the body is made":
            bench.stage.router.decision = decision(attempt("a", model="other"))
            bench.kept()
            exchange, client = bench.ask(LARGE)
            await bench.until(lambda: exchange._connection)
        case _:
            server = bench.kept()
            exchange, client = bench.ask()
            if moment != "before the head":
                server.head()
            if moment == "in the middle of the answer":
                server.body(LINE)
    exchange.caller_left()
    exchange.caller_left()
    await bench.settle()
    assert bench.at_rest()
    assert bench.record.outcome == "client_gone"
    assert len(bench.stage.ended) == 1
    assert client.ended == [], "its connection is gone"
    exchange.cut("too late")
    exchange.give_up()
    exchange.request_ended()
    bench.check(exchange, 1000)
    assert len(bench.stage.ended) == 1


async def test_a_client_that_does_not_read_slows_its_server(bench: Bench) -> None:
    server = bench.kept()
    exchange, _ = bench.ask()
    exchange.pause()
    assert not server.is_paused, "nothing is being written"
    server.head()
    server.body(LINE)
    exchange.pause()
    assert server.is_paused
    exchange.resume()
    assert not server.is_paused
    server.body(LAST, complete=True)
    exchange.pause()
    exchange.resume()
    assert not server.is_paused, "it serves another request by now"


# --- deadlines ---


async def test_a_stream_in_which_nothing_moves_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(monkeypatch, attempt("a"), limits=Limits(idle_timeout_s=30))
    server = bench.kept()
    exchange, client = bench.ask()
    server.head()
    server.body(LINE)
    bench.check(exchange)
    bench.check(exchange, 29)
    server.body(LINE)
    bench.check(exchange, 2)
    bench.check(exchange, 30)
    assert not client.ended
    bench.check(exchange, 0.1)
    assert client.lines()[-1] == {"error": "nothing moved for 30 s"}
    assert server.abandoned == 1
    assert outcome(bench) == ("timeout", 200)


async def test_a_client_that_reads_nothing_loses_its_connection(bench: Bench) -> None:
    server = bench.kept()
    exchange, client = bench.ask()
    server.head()
    server.body(LINE)
    bench.check(exchange)
    client.flow.write_paused = True
    bench.check(exchange, 301)
    assert (client.aborted, exchange.keep_alive, server.abandoned) == (1, False, 1)
    assert outcome(bench) == ("timeout", 200)


async def test_a_body_that_stops_coming_is_given_up(bench: Bench) -> None:
    exchange, client = bench.begin()
    exchange.body_came(b'{"model":')
    bench.check(exchange)
    bench.check(exchange, 59)
    exchange.body_came(b'"tiny"')
    bench.check(exchange, 59)
    assert not client.ended
    bench.check(exchange, 61)
    assert (client.status, client.headers["connection"]) == (408, "close")
    assert outcome(bench) == ("client_error", 408)


async def test_the_time_that_a_request_waits_for_its_turn_is_not_a_delay_of_its_body(bench: Bench) -> None:
    exchange, client = bench.begin(turn=False)
    bench.clock.advance(100)
    exchange.turn_came()
    bench.check(exchange)
    assert not client.ended
    exchange.caller_left()


async def test_a_client_that_reads_again_has_time_again(bench: Bench) -> None:
    server = bench.kept()
    exchange, client = bench.ask()
    server.head()
    server.body(LINE)
    bench.check(exchange)
    exchange.pause()
    bench.clock.advance(299)
    exchange.resume()
    bench.check(exchange, 2)
    assert not client.ended
    exchange.caller_left()


async def test_what_comes_of_a_body_after_the_end_is_not_kept(bench: Bench) -> None:
    exchange, _ = bench.begin()
    exchange.cut("because")
    exchange.body_came(b'{"model":"tiny"}')
    exchange.request_ended()
    assert bench.at_rest()


async def test_the_time_for_the_first_byte_is_followed_by_the_next_server(bench: Bench) -> None:
    one, two = bench.kept("a"), bench.kept("b")
    exchange, client = bench.ask(WHOLE)
    bench.check(exchange, 60)
    await bench.settle()
    assert one.abandoned == 1
    two.whole(200, LAST)
    assert (client.headers["x-fallback-reason"], outcome(bench)) == ("attempt_timeout", ("ok", 200))


async def test_a_silent_server_is_left_at_once(loading: Bench) -> None:
    one, two = loading.kept("a"), loading.kept("b")
    exchange, client = loading.ask(WHOLE)
    loading.stage.placement.silent.add("a")
    loading.check(exchange, 1)
    assert one.abandoned == 1
    two.whole(200, LAST)
    assert client.headers["x-fallback-reason"] == "instance_unhealthy"
    assert loading.at_rest()


@pytest.mark.parametrize("ends", ["breaks", "ends without its last line", "says so"])
async def test_a_stream_of_an_instance_that_the_operator_stops_is_cut(bench: Bench, ends: str) -> None:
    server = bench.kept()
    _, client = bench.ask(STREAM, CHAT)
    server.head(200, b"application/x-ndjson")
    server.body(LINE)
    bench.stage.placement.books["a"].cut("a was stopped")
    if ends == "breaks":
        server.breaks("the connection broke")
    else:
        server.body(b'{"error":"shutting down"}\n' if ends == "says so" else b"", complete=True)
    assert b"cut off: a was stopped" in client.body
    assert outcome(bench)[0] == "cut"
    assert bench.stage.blamed() == {}


@pytest.mark.parametrize("ends", ["with a head", "with its connection"])
async def test_an_answer_during_the_look_at_a_load_is_the_answer(loading: Bench, ends: str) -> None:
    looking = loading.stage.placement.loading["a"] = asyncio.get_running_loop().create_future()
    server = loading.kept("a")
    exchange, client = loading.ask(WHOLE)
    loading.check(exchange, 60)
    await loading.settle()
    if ends == "with a head":
        server.whole(200, LAST)
        assert client.status == 200
    else:
        server.breaks()
        assert client.json() == {"error": "a: the connection broke"}
    await loading.settle()
    assert looking.cancelled()
    assert loading.at_rest()
    assert loading.stage.placement.granted == ["a"]


async def test_a_load_that_goes_on_is_waited_for(loading: Bench) -> None:
    loading.stage.placement.loading["a"] = True
    server = loading.kept("a")
    exchange, client = loading.ask(WHOLE)
    for _ in range(3):
        loading.check(exchange, 60)
        await loading.settle()
    server.whole(200, LAST)
    assert (client.status, loading.record.attempts) == (200, 1)
    assert loading.at_rest()


@pytest.mark.parametrize("state", ["reading", "preparing", "connecting", "waiting", "holding", "streaming"])
async def test_the_total_deadline_ends_a_request_in_every_state(bench: Bench, state: str) -> None:
    server = None
    if state in ("waiting", "holding", "streaming"):
        server = bench.kept("a")
    elif state == "connecting":
        bench.pool().opens = [asyncio.get_running_loop().create_future()]
    else:
        bench.stage.placement.prepares["a"] = asyncio.get_running_loop().create_future()
    exchange, client = bench.begin() if state == "reading" else bench.ask()
    await bench.settle()
    if server is not None and state != "waiting":
        server.head(500 if state == "holding" else 200)
        server.body(LINE if state == "streaming" else b"{")
    bench.check(exchange, 600)
    await bench.settle()
    assert outcome(bench)[0] == "timeout"
    if state == "streaming":
        assert client.lines()[-1] == {"error": "no end within 600 s"}
    else:
        assert (client.status, client.json()) == (504, {"error": "no end within 600 s"})
    assert bench.pool("b").opened == []


# --- signs of life ---


@pytest.fixture
async def waiting(bench: Bench) -> tuple[Bench, Exchange, FakeFront]:
    bench.kept("a")
    exchange, client = bench.ask(STREAM, OPENAI)
    bench.check(exchange, 14.9)
    assert client.written == b""
    bench.check(exchange, 0.1)
    return bench, exchange, client


def asked(bench: Bench, exchange: Exchange) -> Any:
    connection: Any = exchange._connection
    assert connection is not None
    return connection


async def test_a_client_of_events_that_waits_hears_of_it_now_and_then(
    waiting: tuple[Bench, Exchange, FakeFront],
) -> None:
    bench, exchange, client = waiting
    assert (client.status, client.headers["content-type"]) == (200, "text/event-stream")
    assert client.headers["x-instance"] == "a"
    bench.check(exchange, 14.9)
    assert client.body == b": waiting for a\n", "an empty line would end an event"
    bench.check(exchange, 0.1)
    assert client.body == b": waiting for a\n" * 2
    server = asked(bench, exchange)
    server.head(200, EVENTS)
    server.body(EVENT + DONE, complete=True)
    assert client.body == b": waiting for a\n" * 2 + EVENT + DONE
    assert outcome(bench) == ("ok", 200)
    assert bench.record.ttfb_ms == 30_000.0, "a sign of life is not the first byte of the answer"


async def test_nothing_follows_a_sign_of_life(waiting: tuple[Bench, Exchange, FakeFront]) -> None:
    bench, exchange, client = waiting
    asked(bench, exchange).breaks(may_have_begun=False)
    assert b"a: the connection broke" in client.body
    assert (client.is_whole, outcome(bench)) == (True, ("upstream_error", 200))
    assert bench.pool("b").opened == []


@pytest.mark.parametrize(
    ("status", "kind", "body", "says"),
    [
        (500, b"application/json", b'{"error":{"message":"no memory left"}}', b"no memory left"),
        (503, b"text/plain", b"busy", b"the server answered with status 503"),
        (200, b"application/json", b'{"choices":[]}', b"the server answered with status 200"),
    ],
)
async def test_what_is_no_stream_of_events_is_an_error_event_after_a_sign_of_life(
    waiting: tuple[Bench, Exchange, FakeFront], status: int, kind: bytes, body: bytes, says: bytes
) -> None:
    bench, exchange, client = waiting
    server = asked(bench, exchange)
    server.head(status, kind, len(body))
    server.body(body[:5])
    server.body(body[5:], complete=True)
    assert client.body.startswith(b": waiting for a\ndata: {")
    assert says in client.body
    assert client.is_whole
    assert outcome(bench) == ("upstream_error", 200)


async def test_a_sign_of_life_tells_how_far_a_pull_is(alone: Bench) -> None:
    alone.stage.router.decision = decision(attempt("a", "pull"))
    alone.stage.placement.progress = ("pulling 42 %",)
    pulled = alone.stage.placement.prepares["a"] = asyncio.get_running_loop().create_future()
    exchange, client = alone.ask(STREAM, ANTHROPIC)
    await alone.settle()
    alone.check(exchange, 15)
    assert client.body == b": waiting for a (pulling 42 %)\n"
    pulled.set_result(unavailable(Reason.MODEL_MISSING))
    await alone.settle()
    assert b"event: error\n" in client.body
    assert client.is_whole
    assert outcome(alone) == ("refused", 200)


@pytest.mark.parametrize("who", ["native", "no stream", "http 1.0", "switched off", "no attempt yet"])
async def test_no_other_client_hears_anything_before_the_answer(
    monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    limits = Limits(keep_alive_s=0) if who == "switched off" else Limits()
    bench = bench_of(monkeypatch, attempt("a"), limits=limits)
    if who == "no attempt yet":
        bench.stage.router.is_known = False
        bench.stage.router.decision = decision(refused=NOBODY)
    else:
        bench.kept()
    path = CHAT if who == "native" else OPENAI
    exchange, client = bench.ask(WHOLE if who == "no stream" else STREAM, path, chunks=who != "http 1.0")
    for _ in range(3):
        bench.check(exchange, 16)
    assert client.written == b""
    exchange.caller_left()
    await bench.settle()
    assert bench.at_rest()


# --- loads that are shared ---


async def test_a_client_that_leaves_does_not_cancel_a_load_that_another_waits_for(loading: Bench) -> None:
    one, two = loading.kept("a"), loading.kept("a")
    first, first_client = loading.ask()
    second, second_client = loading.ask()
    first.caller_left()
    assert (one.abandoned, two.abandoned, loading.stage.ended) == (0, 0, [])
    loading.check(first, 16)
    two.whole(200, LAST)  # the last one taken first: connections are a stack
    one.whole(200, LAST)
    assert {record.outcome for record in loading.stage.ended} == {"ok", "client_gone"}
    assert first_client.written + second_client.written != b""
    assert loading.at_rest()
    del second


async def test_the_last_client_that_leaves_ends_the_load_for_all(loading: Bench) -> None:
    servers = [loading.kept("a") for _ in range(3)]
    requests = [loading.ask()[0] for _ in range(3)]
    for request in requests[:2]:
        request.caller_left()
    assert loading.stage.ended == []
    requests[2].caller_left()
    assert [server.abandoned for server in servers] == [1, 1, 1]
    assert [record.outcome for record in loading.stage.ended] == ["client_gone"] * 3
    assert loading.at_rest()


@pytest.mark.parametrize("ends", ["head", "break", "silence", "time"])
async def test_a_request_whose_client_has_left_is_sent_to_no_other_server(loading: Bench, ends: str) -> None:
    left_server = loading.kept("a")
    left, _ = loading.ask()
    server = loading.kept("a")
    stays, _ = loading.ask()
    left.caller_left()
    assert loading.stage.ended == []
    if ends == "head":
        left_server.head(503)
    elif ends == "break":
        left_server.breaks(may_have_begun=False)
    elif ends == "silence":
        loading.stage.placement.silent.add("a")
        left.check(loading.clock())
    else:
        loading.check(left, 60)
        await loading.settle()
    assert [record.outcome for record in loading.stage.ended] == ["client_gone"]
    assert (loading.pool("b").opened, loading.stage.placement.held) == ([], {"a": 1})
    assert server.abandoned == 0
    stays.caller_left()
    assert loading.at_rest()


async def test_where_the_model_is_in_memory_nobody_waits_for_a_load(bench: Bench) -> None:
    one, two = bench.kept("a"), bench.kept("a")
    first, _ = bench.ask()
    second, _ = bench.ask()
    first.caller_left()
    assert {one.abandoned, two.abandoned} == {0, 1}
    second.caller_left()
    assert bench.at_rest()


# --- the end of the daemon, and defects ---


@pytest.mark.parametrize("begun", [False, True])
async def test_a_request_that_is_cut_off_says_so(bench: Bench, *, begun: bool) -> None:
    server = bench.kept()
    exchange, client = bench.ask()
    if begun:
        server.head()
        server.body(LINE)
    exchange.cut("the manager is being stopped")
    says = {"error": "cut off: the manager is being stopped"}
    assert (client.lines()[-1] if begun else client.json()) == says
    assert client.is_whole
    assert outcome(bench) == ("cut", 200 if begun else 503)
    assert server.abandoned == 1


@pytest.mark.parametrize(
    "where", ["callback", "task", "deadline", "answer that broke", "step of a large body"]
)
async def test_a_defect_costs_one_request_its_answer_and_gives_everything_back(
    bench: Bench, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> Any:
        raise ZeroDivisionError

    def breaks() -> None:
        monkeypatch.setattr("manager.relay.exchange.body_for", fails)
        monkeypatch.setattr("manager.relay.exchange.rewriting", fails)

    with capture_logs() as logs:
        if where in ("deadline", "answer that broke"):
            one, _ = bench.kept("a"), bench.kept("b")
            exchange, client = bench.ask()
            breaks()
            if where == "deadline":
                bench.stage.placement.silent.add("a")
                bench.check(exchange, 1)
            else:
                one.breaks(may_have_begun=False)
                await bench.settle()
        else:
            breaks()
            if where != "task":
                bench.kept("a")
            exchange, client = bench.ask(LARGE if where == "step of a large body" else TINY)
            await bench.settle()
    assert (client.status, client.json()) == (500, {"error": "the manager failed; its log says more"})
    assert [(line["event"], line["path"]) for line in logs] == [("request_failed", CHAT)]
    assert outcome(bench) == ("refused", 500)


async def test_a_defect_while_a_request_is_sent_does_not_lose_its_connection(bench: Bench) -> None:
    server = bench.kept()
    server.fails_to_send = ZeroDivisionError()
    with capture_logs():
        _, client = bench.ask()
    assert (client.status, server.abandoned) == (500, 1)
    assert bench.at_rest()


async def test_a_client_that_cannot_even_be_told_leaves_nothing_behind(bench: Bench) -> None:
    client = FakeFront()
    client.fails_to_write = ZeroDivisionError()
    with capture_logs(), pytest.raises(ZeroDivisionError):
        bench.ask(b"nonsense", front=client)
    assert outcome(bench) == ("refused", 0)


async def test_what_an_abandoned_server_still_says_is_not_heard(bench: Bench) -> None:
    server = bench.kept("a")
    exchange, client = bench.ask()
    exchange.cut("because")
    before = bytes(client.written)
    exchange.head_came  # noqa: B018  (a connection in the middle of its callbacks may still call these)
    server.sink = exchange
    server.head()
    server.body(LINE, complete=True)
    exchange.answer_broke("late", may_have_begun=True)
    assert (bytes(client.written), len(bench.stage.ended)) == (before, 1)


async def test_an_endpoint_of_vectors_never_streams(bench: Bench) -> None:
    server = bench.kept()
    _, client = bench.ask({"model": "tiny", "input": "a", "stream": True}, EMBED)
    server.whole(200, b'{"embeddings":[[1]],"prompt_eval_count":3}')
    assert (client.body, bench.record.stream) == (b'{"embeddings":[[1]],"prompt_eval_count":3}', False)
    assert (outcome(bench), bench.record.input_tokens) == (("ok", 200), 3)


async def test_a_target_of_another_owner_gets_its_own_headers(bench: Bench) -> None:
    bench.stage.placement.targets["a"] = target("a").__class__(
        "a", "http://a:11434", headers=((b"authorization", b"Bearer theirs"),)
    )
    server = bench.kept()
    bench.ask(TINY, CHAT, (b"authorization", b"Bearer ours"))
    assert b"authorization: Bearer theirs\r\n" in server.requests[0][0]
    assert b"ours" not in server.requests[0][0]


async def test_a_request_that_never_had_its_turn_leaves_no_record(bench: Bench) -> None:
    exchange, _ = bench.begin(turn=False)
    exchange.body_came(b"{}")
    exchange.refuse_now(413, "too large")
    exchange.cut("because")
    assert bench.bodies.held_bytes == 0
    assert bench.stage.ended == []


# --- requests that only unload a model ---


UNLOAD = {"model": "tiny", "keep_alive": 0}


async def test_a_model_is_unloaded_wherever_it_runs_and_nothing_is_started_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = bench_of(
        monkeypatch, attempt("a"), attempt("b", "running"), attempt("c", "startable"), attempt("d", "unread")
    )
    server = bench.kept("a")
    _, client = bench.ask(UNLOAD, "/api/generate")
    await bench.settle()
    assert bench.unloaded == [("b", "tiny")]
    assert json.loads(server.requests[0][1]) == UNLOAD
    server.whole(200, b'{"model":"tiny","done":true,"done_reason":"unload"}')
    assert (client.status, outcome(bench)) == (200, ("ok", 200))
    assert bench.stage.placement.granted == ["a"]


@pytest.mark.parametrize("first", ["answers", "refuses", "breaks", "is gone"])
async def test_the_others_unload_whatever_becomes_of_the_first_and_the_answer_is_that_of_all(
    monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    for trouble in (None, "b: status 500"):
        bench = bench_of(monkeypatch, attempt("a"), attempt("b", "running"))
        if trouble:
            bench.not_unloaded = {"b": trouble}
        if first == "is gone":
            bench.pool("a").opens = [ConnectionRefusedError(111, "Connection refused")]
        server = None if first == "is gone" else bench.kept("a")
        _, client = bench.ask(UNLOAD, "/api/generate")
        await bench.settle()
        assert bench.unloaded == [("b", "tiny")]
        if server is not None and first == "breaks":
            server.breaks()
        elif server is not None:
            server.whole(200 if first == "answers" else 500, b'{"done":true,"error":"no"}')
        if first in ("answers", "is gone"):
            assert client.status == (502 if trouble else 200)
        else:
            assert client.status == (500 if first == "refuses" else 502)
        assert trouble is None or first in ("refuses", "breaks") or trouble in client.json()["error"]
        assert bench.at_rest()


async def test_a_model_that_no_running_instance_has_is_unloaded_already(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = bench_of(monkeypatch, attempt("a", "startable"))
    for path in (CHAT, "/api/generate"):
        _, client = bench.ask(UNLOAD, path)
        await bench.settle()
        assert (client.status, client.json()["done_reason"]) == (200, "unload")
        assert outcome(bench) == ("ok", 200)
    assert (bench.unloaded, bench.stage.placement.prepared) == ([], [])


async def test_a_name_that_nobody_has_cannot_be_unloaded(bench: Bench) -> None:
    bench.stage.router.decision = decision(refused=Refused("unknown", Reason.MODEL_MISSING, "not found"))
    _, client = bench.ask(UNLOAD)
    await bench.settle()
    assert (client.status, client.json()) == (404, {"error": "not found"})
    assert bench.at_rest()


async def test_the_first_look_at_the_fleet_comes_before_an_unload(bench: Bench) -> None:
    bench.stage.router.is_known = False
    found, bench.stage.router.decision = bench.stage.router.decision, decision(refused=NOBODY)
    bench.stage.router.learns = lambda: setattr(bench.stage.router, "decision", found)
    server = bench.kept("a")
    exchange, _ = bench.ask(UNLOAD)
    await bench.settle()
    assert len(server.requests) == 1
    exchange.caller_left()
    assert bench.at_rest()


async def test_a_client_that_leaves_during_an_unload_leaves_nothing_behind(bench: Bench) -> None:
    exchange, _ = bench.ask(UNLOAD)
    exchange.caller_left()
    await bench.settle()
    assert bench.at_rest()
    assert bench.record.outcome == "client_gone"


async def test_a_body_that_asks_for_more_than_the_end_is_no_unload(bench: Bench) -> None:
    server = bench.kept("a")
    exchange, _ = bench.ask({**TINY, "keep_alive": 0})
    assert len(server.requests) == 1
    exchange.caller_left()
    assert bench.at_rest()
