"""A request on ASGI: its one end, whatever the client, the server and the daemon do."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from manager.api import passage as module
from manager.api.passage import Passage, PassageLimits, Passages
from manager.api.refusal import RefusedError
from manager.domain.roles import RequestKind
from manager.domain.target import Target
from manager.errors import AskFailedError, OutOfDescriptorsError, Reason, UnavailableError
from manager.services.bodies import BodyBudget
from manager.services.requests import Requests
from manager.services.routing.attempting import Deadlines, Trouble
from manager.services.routing.placement import Prepared
from manager.wire.caller import HeaderNames
from tests.support.attempts import FACTS, Stage, attempt, unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from manager.services.ports import Question

NAMES = HeaderNames(
    instance=b"x-instance",
    lane=b"x-lane",
    project=b"x-project-id",
    intent=b"x-intent",
    local_only=b"x-local-only",
)
LIMITS = PassageLimits(most_body_bytes=100, most_upload_bytes=1000, stall_s=20.0)
NDJSON = (b"Content-Type", b"application/x-ndjson")
PLAIN = (b"Content-Type", b"application/json")


@dataclass
class Answer:
    """What a server answers. An error among the pieces ends them.

    `late` keeps the head from coming, `waits` the body.
    """

    status: int = 200
    pieces: Sequence[bytes | Exception] = (b'{"done":true}\n',)
    headers: Sequence[tuple[bytes, bytes]] = (NDJSON,)
    length: int | None = None
    late: asyncio.Event | None = None
    waits: asyncio.Event | None = None
    _left: list[bytes | Exception] | None = None

    async def piece(self) -> bytes:
        if self.waits is not None:
            await self.waits.wait()
        if self._left is None:
            self._left = list(self.pieces)
        if not self._left:
            return b""
        piece = self._left.pop(0)
        if isinstance(piece, Exception):
            raise piece
        return piece


@dataclass
class Server:
    """Answers by endpoint; an error is raised instead of an answer."""

    answers: dict[str, Answer | Exception] = field(default_factory=dict)
    questions: list[Question] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    @asynccontextmanager
    async def ask(self, question: Question) -> AsyncIterator[Any]:
        self.questions.append(question)
        if isinstance(question.body, bytes):
            self.bodies.append(question.body)
        else:
            self.bodies.append(b"".join([piece async for piece in question.body]))
        answer = self.answers.get(question.endpoint, Answer())
        if isinstance(answer, Exception):
            raise answer
        if answer.late is not None:
            await answer.late.wait()
        yield answer


class Client:
    """The other end of ASGI. It has left once `leaves` is called."""

    def __init__(self, *pieces: bytes) -> None:
        self.sent: list[dict[str, Any]] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        for number, piece in enumerate(pieces):
            self.sends(piece, more=number < len(pieces) - 1)

    def sends(self, piece: bytes, *, more: bool) -> None:
        self._messages.put_nowait({"type": "http.request", "body": piece, "more_body": more})

    def leaves(self) -> None:
        self._messages.put_nowait({"type": "http.disconnect"})

    async def receive(self) -> Any:
        return await self._messages.get()

    async def send(self, message: Any) -> None:
        await self.reads.wait()
        self.sent.append(message)

    @property
    def status(self) -> int:
        return cast("int", self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode().lower(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def has_end(self) -> bool:
        return bool(self.sent) and not self.sent[-1].get("more_body", False) and len(self.sent) > 1


class Rig:
    """One passage, by default with a body of two bytes and two instances, `a` before `b`."""

    def __init__(
        self,
        *pieces: bytes,
        attempts: Sequence[Any] = (attempt("a"), attempt("b")),
        path: str = "/api/show",
        limits: PassageLimits = LIMITS,
        budget: int = 10_000,
        by_model: bool = False,
        headers: Sequence[tuple[bytes, bytes]] = (),
        query: bytes = b"",
        deadlines: Deadlines | None = None,
    ) -> None:
        self.stage = Stage(*attempts, deadlines=deadlines)
        self.client = Client(*(pieces or (b"{}",)))
        self.server = Server()
        self.bodies = BodyBudget(budget)
        given = [(b"x-given", b"1"), *headers]
        begun = Requests(NAMES, default_project="default").begin(path, None, given)
        self.record = begun.record
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query,
            "headers": given,
        }
        self.passage = Passage(
            scope,
            self.client.receive,
            cast("Any", self.client.send),
            begun=begun,
            routing=self.stage.routing,
            bodies=self.bodies,
            limits=limits,
            by_model=by_model,
        )

    async def run(self, work: Callable[[Passage], Awaitable[None]] | None = None) -> None:
        await self.passage.run(work or self.passes_on)
        assert self.bodies.held_bytes == 0
        assert self.stage.placement.held == {}
        assert self.stage.ended == [self.record]

    async def passes_on(self, passage: Passage) -> None:
        body = await passage.body()
        step = passage.attempting.enter(FACTS)
        await passage.pass_on(self.server, step, lambda found: passage.question(found, body))

    def error(self) -> str:
        return cast("str", json.loads(self.client.body)["error"])


def url(instance: str) -> str:
    return f"http://{instance}:11434"


# --- an answer ------------------------------------------------------------------------------------


async def test_an_answer_is_passed_on_as_it_comes_with_where_it_comes_from() -> None:
    rig = Rig(b"{", b"}", query=b"x=1")
    rig.server.answers[url("a")] = Answer(pieces=(b"one\n", b"two\n"))
    await rig.run()
    assert (rig.client.status, rig.client.body, rig.client.has_end) == (200, b"one\ntwo\n", True)
    assert rig.client.headers["x-instance"] == "a"
    assert rig.client.headers["x-request-id"] == rig.record.request_id
    assert rig.client.headers["cache-control"] == "no-cache"
    assert rig.server.bodies == [b"{}"]
    assert rig.server.questions[0].target == "/api/show?x=1"
    assert (rig.record.outcome, rig.record.stream, rig.record.attempts) == ("ok", True, 1)
    assert rig.record.ttfb_ms is None


async def test_headers_between_two_neighbours_are_not_passed_on() -> None:
    rig = Rig()
    rig.server.answers[url("a")] = Answer(
        headers=(
            PLAIN,
            (b"Connection", b"close, X-Mine"),
            (b"X-Mine", b"1"),
            (b"Date", b"now"),
            (b"X-Kept", b"2"),
        ),
        length=14,
    )
    await rig.run()
    assert {"x-mine", "connection", "date"} & set(rig.client.headers) == set()
    assert (rig.client.headers["x-kept"], rig.client.headers["content-length"]) == ("2", "14")
    assert rig.client.headers.get("x-accel-buffering") is None


async def test_what_is_done_before_a_piece_is_done_before_the_client_has_it() -> None:
    rig = Rig()
    seen: list[tuple[bytes, bytes]] = []

    async def before(piece: bytes) -> None:
        seen.append((piece, rig.client.body))

    async def work(passage: Passage) -> None:
        await passage.body()
        step = passage.attempting.enter(FACTS)
        question = lambda found: passage.question(found, b"")  # noqa: E731
        await passage.pass_on(cast("Any", rig.server), step, question, before=before)

    rig.server.answers[url("a")] = Answer(pieces=(b"one\n", b"two\n"))
    await rig.run(work)
    assert seen == [(b"one\n", b""), (b"two\n", b"one\n")]


@pytest.mark.parametrize(("status", "is_done"), [(200, True), (404, False)])
async def test_a_short_answer_is_held_until_what_follows_from_it_is_done(
    status: int, *, is_done: bool
) -> None:
    rig = Rig(attempts=(attempt("a"),))
    done: list[int] = []

    async def then() -> None:
        done.append(len(rig.client.sent))

    async def work(passage: Passage) -> None:
        await passage.body()
        step = passage.attempting.enter_fixed([attempt("a")], Trouble(Reason.INSTANCE_UNAVAILABLE, "none"))
        question = lambda found: passage.question(found, b"")  # noqa: E731
        await passage.pass_whole(cast("Any", rig.server), step, question, then=then)

    rig.server.answers[url("a")] = Answer(status=status, pieces=(b"one", b"two"), headers=(PLAIN,), length=6)
    await rig.run(work)
    assert done == ([0] if is_done else [])
    assert (rig.client.status, rig.client.body, rig.client.has_end) == (status, b"onetwo", True)
    assert rig.record.outcome == ("ok" if is_done else "client_error")


async def test_a_short_answer_without_an_end_is_refused() -> None:
    rig = Rig()

    async def then() -> None:
        raise AssertionError

    async def work(passage: Passage) -> None:
        await passage.body()
        step = passage.attempting.enter(FACTS)
        question = lambda found: passage.question(found, b"")  # noqa: E731
        await passage.pass_whole(cast("Any", rig.server), step, question, then=then)

    rig.server.answers[url("a")] = Answer(pieces=(b"x" * 60, b"x" * 60))
    await rig.run(work)
    assert (rig.client.status, rig.record.outcome) == (502, "upstream_error")
    assert "no end" in rig.error()


async def test_an_answer_of_work_that_several_wait_for_says_who_did_it() -> None:
    rig = Rig()
    lease = SimpleNamespace(target=Target("w", "http://w"))

    async def work(passage: Passage) -> None:
        passage.answered_by(Prepared(cast("Any", lease), 5.0), "big")
        await passage.start(200, [NDJSON], None)
        await passage.send(b"")
        await passage.send(b"line\n")
        await passage.end()

    await rig.run(work)
    assert rig.client.headers["x-instance"] == "w"
    assert (rig.client.headers["x-model"], rig.client.headers["x-start-ms"]) == ("big", "5")
    assert (rig.record.effective_target, rig.record.endpoint) == ("w", "http://w")


# --- attempts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    [
        AskFailedError("refused", reason=Reason.UPSTREAM_UNREACHABLE, begun=False),
        Answer(status=503, pieces=(b'{"error":"busy"}',), headers=(PLAIN,)),
        Answer(status=503, pieces=(b'{"err', UnavailableError("broke off", reason=Reason.UPSTREAM_ERROR))),
        Answer(status=503, pieces=(b"x" * 70_000,)),
    ],
)
async def test_a_server_that_fails_is_followed_by_the_next(first: Answer | Exception) -> None:
    rig = Rig()
    rig.server.answers[url("a")] = first
    await rig.run()
    assert (rig.client.status, rig.client.headers["x-instance"]) == (200, "b")
    assert "x-fallback-reason" in rig.client.headers
    assert (rig.record.outcome, rig.record.attempts) == ("ok", 2)


async def test_where_none_is_left_the_client_gets_the_first_answer_whole() -> None:
    rig = Rig()
    rig.server.answers[url("a")] = Answer(status=503, pieces=(b'{"error":"busy ', b'a"}'), headers=(PLAIN,))
    rig.server.answers[url("b")] = AskFailedError("gone", reason=Reason.UPSTREAM_UNREACHABLE, begun=False)
    await rig.run()
    assert (rig.client.status, rig.error()) == (503, "busy a")
    assert rig.client.headers["x-instance"] == "a"


async def test_an_error_of_the_last_server_is_passed_on_whatever_its_length() -> None:
    rig = Rig(attempts=(attempt("a"),))
    rig.server.answers[url("a")] = Answer(
        status=503, pieces=(b"x" * 70_000,), headers=(PLAIN,), length=70_000
    )
    await rig.run()
    assert (rig.client.status, len(rig.client.body), rig.client.has_end) == (503, 70_000, True)


async def test_an_error_about_the_request_is_the_clients_at_once() -> None:
    rig = Rig()
    rig.server.answers[url("a")] = Answer(status=400, pieces=(b'{"error":"bad"}',), headers=(PLAIN,))
    await rig.run()
    assert (rig.client.status, rig.error(), len(rig.server.questions)) == (400, "bad", 1)
    assert rig.record.outcome == "client_error"


async def test_our_lack_of_descriptors_is_nobodys_fault() -> None:
    rig = Rig()
    rig.server.answers[url("a")] = OutOfDescriptorsError()
    await rig.run()
    assert (rig.client.status, rig.client.headers["retry-after"], len(rig.server.questions)) == (503, "1", 1)
    assert rig.stage.blamed() == {}


async def test_a_request_that_no_instance_can_be_had_for_is_told_why() -> None:
    rig = Rig(attempts=(attempt("a", "startable"),))
    rig.stage.placement.prepares["a"] = unavailable(retry_after_s=7)
    await rig.run()
    assert (rig.client.status, rig.client.headers["retry-after"]) == (503, "7")
    assert rig.error() == "a cannot be started"
    assert rig.record.outcome == "upstream_error"


async def test_a_request_that_only_a_run_may_make_is_told_where_to_go() -> None:
    rig = Rig()

    async def work(passage: Passage) -> None:
        await passage.target(Trouble(Reason.POLICY, "runs only", refused="async_only"))

    await rig.run(work)
    assert (rig.client.status, rig.client.headers["location"]) == (409, "/api/v1/runs")
    assert rig.error() == "runs only"


async def test_a_target_is_had_before_anything_is_sent_or_there_is_none() -> None:
    for outcome in (12.0, unavailable()):
        rig = Rig(attempts=(attempt("a", "startable"),))
        rig.stage.placement.prepares["a"] = outcome
        found: list[Target] = []

        async def work(passage: Passage, found: list[Target] = found) -> None:
            found.append(await passage.target(passage.attempting.enter(FACTS)))
            await passage.start(204, [], 0)
            await passage.end()

        await rig.run(work)
        assert [one.instance for one in found] == (["a"] if outcome == 12.0 else [])
        assert rig.client.status == (204 if outcome == 12.0 else 503)


async def test_headers_of_a_target_are_sent_to_it_alone() -> None:
    rig = Rig()
    rig.stage.placement.targets["a"] = Target("a", url("a"), headers=((b"authorization", b"Bearer x"),))
    rig.server.answers[url("a")] = AskFailedError("no", reason=Reason.UPSTREAM_UNREACHABLE, begun=False)
    await rig.run()
    first, second = (dict(one.headers) for one in rig.server.questions)
    assert first[b"authorization"] == b"Bearer x"
    assert b"authorization" not in second
    assert second[b"x-given"] == b"1"


# --- what the client sends ------------------------------------------------------------------------


async def test_a_body_beyond_its_bound_is_refused_and_the_rest_is_not_waited_for() -> None:
    rig = Rig()
    rig.client = Client()
    rig.passage._receive, rig.passage._send = rig.client.receive, cast("Any", rig.client.send)
    rig.client.sends(b"x" * 101, more=True)
    await rig.run()
    assert (rig.client.status, rig.client.headers["connection"]) == (413, "close")
    assert not rig.passage.is_body_read
    assert rig.record.outcome == "client_error"


async def test_the_bodies_of_all_requests_together_have_a_bound() -> None:
    rig = Rig(b"x" * 6, b"x" * 6, budget=10)
    await rig.run()
    assert rig.client.status == 503
    assert "gateway.max_buffered" in rig.error()


async def test_a_body_that_does_not_come_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_UPLOAD_STALL_S", 0.01)
    rig = Rig()
    rig.client = Client()
    rig.passage._receive, rig.passage._send = rig.client.receive, cast("Any", rig.client.send)
    await rig.run()
    assert (rig.client.status, rig.record.outcome) == (408, "client_error")


async def test_an_upload_is_passed_on_as_it_comes_and_sent_once() -> None:
    rig = Rig(b"one", b"", b"two", headers=((b"content-length", b"6"),))

    async def work(passage: Passage) -> None:
        assert passage.body_length == 6
        pieces = passage.uploaded()
        step = passage.attempting.enter(FACTS)
        await passage.pass_on(
            cast("Any", rig.server), step, lambda found: passage.question(found, pieces, passage.body_length)
        )

    rig.server.answers[url("a")] = Answer(status=503, pieces=(b'{"error":"full"}',), headers=(PLAIN,))
    await rig.run(work)
    assert rig.server.bodies == [b"onetwo"]
    assert rig.server.questions[0].length == 6
    assert (rig.client.status, len(rig.server.questions)) == (503, 1)


async def test_an_upload_beyond_its_bound_is_refused_whatever_the_server_makes_of_it() -> None:
    limits = PassageLimits(most_body_bytes=100, most_upload_bytes=5, stall_s=20.0)
    rig = Rig(b"onetwo", limits=limits)

    async def work(passage: Passage) -> None:
        assert passage.body_length is None
        pieces = passage.uploaded()

        @asynccontextmanager
        async def ask(_question: object) -> AsyncIterator[Any]:
            try:
                async for _ in pieces:
                    pass
            except RefusedError as error:
                raise AskFailedError("cut", reason=Reason.UPSTREAM_ERROR, begun=True) from error
            yield None

        step = passage.attempting.enter(FACTS)
        server = cast("Any", SimpleNamespace(ask=ask))
        await passage.pass_on(server, step, lambda found: passage.question(found, pieces))

    await rig.run(work)
    assert rig.client.status == 413


# --- clients that leave or do not read ------------------------------------------------------------


@pytest.mark.parametrize("when", ["in the body", "during the answer", "before it"])
async def test_a_client_that_leaves_ends_the_work_for_it(when: str) -> None:
    rig = Rig()
    late = asyncio.Event()
    rig.server.answers[url("a")] = Answer(pieces=(b"one\n",), late=late)
    if when == "in the body":
        rig.client = Client()
        rig.passage._receive, rig.passage._send = rig.client.receive, cast("Any", rig.client.send)
        rig.client.sends(b"{", more=True)
    if when == "during the answer":
        rig.client.reads.clear()
        late.set()
    running = asyncio.ensure_future(rig.run())
    await asyncio.sleep(0)
    rig.client.leaves()
    await running
    assert rig.record.outcome == "client_gone"
    assert rig.client.sent == []


async def test_a_client_that_takes_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = PassageLimits(most_body_bytes=100, most_upload_bytes=None, stall_s=0.01)
    rig = Rig(limits=limits)
    rig.client.reads.clear()
    del monkeypatch
    await rig.run()
    assert rig.record.outcome == "timeout"
    assert rig.client.sent == []


async def test_a_stream_that_breaks_off_ends_with_a_line_that_says_so() -> None:
    for last, line in ((b"one\n", b"one\n"), (b"half", b"half\n")):
        rig = Rig()
        broke = UnavailableError("a broke off", reason=Reason.UPSTREAM_ERROR)
        rig.server.answers[url("a")] = Answer(pieces=(last, broke))
        await rig.run()
        assert rig.client.body.startswith(line)
        assert json.loads(rig.client.body.removeprefix(line)) == {"error": "a broke off"}
        assert (rig.client.has_end, rig.record.outcome) == (True, "upstream_error")


async def test_a_body_of_a_declared_length_that_breaks_off_is_left_without_its_end() -> None:
    rig = Rig()
    broke = UnavailableError("a broke off", reason=Reason.UPSTREAM_ERROR)
    rig.server.answers[url("a")] = Answer(pieces=(b"half", broke), headers=(PLAIN,), length=60)
    await rig.run()
    assert (rig.client.body, rig.client.has_end) == (b"half", False)


@pytest.mark.parametrize(("kind", "counted"), [(RequestKind.TRANSCRIBE, 1), (None, 0)])
async def test_an_answer_of_a_model_that_breaks_off_counts_against_its_server(
    kind: RequestKind | None, counted: int
) -> None:
    for answer in (
        Answer(pieces=(b"half", UnavailableError("a broke off", reason=Reason.UPSTREAM_ERROR))),
        Answer(pieces=(b"half", UnavailableError("a stands still", reason=Reason.ATTEMPT_TIMEOUT))),
        Answer(500, (b'{"error":"what"}',), (PLAIN,)),
    ):
        rig = Rig(attempts=(attempt("a"),))
        rig.record.kind = kind
        rig.server.answers[url("a")] = answer
        await rig.run()
        assert rig.stage.breakers.view("a").failures == counted


async def test_an_answer_of_a_model_to_its_end_counts_for_its_server() -> None:
    rig = Rig(attempts=(attempt("a"),))
    rig.record.kind = RequestKind.TRANSCRIBE
    rig.stage.breakers.failed("a", rig.stage.breakers.admit("a"), Reason.UPSTREAM_ERROR)
    await rig.run()
    assert rig.stage.breakers.view("a").failures == 0


async def test_a_defect_is_a_500_in_the_clients_dialect_and_the_record_ends() -> None:
    rig = Rig(path="/v1/audio/transcriptions")

    async def work(_passage: Passage) -> None:
        raise KeyError("a defect")

    await rig.run(work)
    assert rig.client.status == 500
    assert json.loads(rig.client.body)["error"]["message"] == "the manager failed; its log says more"
    assert rig.record.outcome == "refused"


# --- deadlines, and the end of the daemon ---------------------------------------------------------


async def test_the_total_deadline_holds_for_requests_that_a_model_answers() -> None:
    rig = Rig(by_model=True, deadlines=Deadlines(first_byte_timeout_s=60.0, total_timeout_s=0.01))
    rig.server.answers[url("a")] = Answer(late=asyncio.Event())
    await rig.run()
    assert (rig.client.status, rig.record.outcome) == (504, "timeout")
    assert rig.error() == "no end within 0.01 s"


async def test_the_first_byte_of_a_model_is_recorded() -> None:
    rig = Rig(by_model=True)
    await rig.run()
    assert rig.record.ttfb_ms is not None


async def test_at_the_end_of_the_daemon_requests_come_to_their_end() -> None:
    passages, rig = Passages(), Rig()
    waits = asyncio.Event()
    rig.server.answers[url("a")] = Answer(pieces=(b"one\n",), waits=waits)
    await passages.drain(0.0, cut=asyncio.Event())
    running = asyncio.ensure_future(passages.run(rig.passage, rig.passes_on))
    await asyncio.sleep(0)
    draining = asyncio.ensure_future(passages.drain(20.0, cut=asyncio.Event()))
    await asyncio.sleep(0)
    waits.set()
    await asyncio.gather(running, draining)
    assert (rig.client.body, rig.record.outcome) == (b"one\n", "ok")


@pytest.mark.parametrize("why", ["too late", "at once"])
async def test_a_request_that_does_not_end_is_cut_and_told(why: str) -> None:
    passages, rig, cut = Passages(), Rig(), asyncio.Event()
    rig.server.answers[url("a")] = Answer(waits=asyncio.Event())
    running = asyncio.ensure_future(passages.run(rig.passage, rig.passes_on))
    while not rig.server.questions:  # noqa: ASYNC110  (nobody tells)
        await asyncio.sleep(0)
    if why == "at once":
        cut.set()
    await passages.drain(0.0 if why == "too late" else 20.0, cut=cut)
    await running
    assert rig.record.outcome == "cut"
    assert rig.client.has_end


@pytest.mark.parametrize("cancels", [True, False])
async def test_a_request_that_is_cut_may_be_repeated_unless_the_operator_has_cancelled_it(
    *, cancels: bool
) -> None:
    rig = Rig()
    rig.server.answers[url("a")] = Answer(late=asyncio.Event())
    running = asyncio.ensure_future(rig.run())
    while not rig.server.questions:  # noqa: ASYNC110  (nobody tells)
        await asyncio.sleep(0)
    if cancels:
        rig.passage.cancel("the operator has cancelled the request")
    else:
        rig.passage.cut.set()
    await running
    assert (rig.client.status, rig.record.outcome) == (503, "cut")
    assert rig.client.headers.get("x-should-retry") == ("false" if cancels else None)
    assert rig.client.headers.get("retry-after") == (None if cancels else "1")
    assert rig.record.fallback_reason == (Reason.CANCELLED if cancels else None)
    why = "the operator has cancelled the request" if cancels else "the manager is being stopped"
    assert rig.error() == f"cut off: {why}"


async def test_a_request_whose_start_the_operator_stops_is_cut_and_may_be_repeated() -> None:
    rig = Rig(attempts=(attempt("a", "startable"),))
    rig.stage.placement.prepares["a"] = unavailable(Reason.CANCELLED)
    await rig.run()
    assert (rig.client.status, rig.client.headers["retry-after"]) == (503, "1")
    assert rig.record.outcome == "cut"
