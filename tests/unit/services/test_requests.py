"""The record of a request begins with what its head says, and with ids that are its own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.keys import Grant, Scope
from manager.domain.record import never
from manager.domain.roles import RequestKind
from manager.services.requests import Requests
from manager.wire.caller import HeaderNames
from manager.wire.trace import read_traceparent
from tests.support.keys import AT, grant

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = (b"traceparent", f"00-{TRACE}-{SPAN}-01".encode())


def requests(**more: object) -> Requests:
    return Requests(HeaderNames(), default_project="default", **more)  # type: ignore[arg-type]


def test_a_client_that_says_nothing_has_the_default_project_and_no_wishes() -> None:
    origin = requests().origin([])
    assert origin == (None, None, "default", None, False, None, None, None)


def test_a_client_says_where_it_belongs_and_wants_to_go() -> None:
    origin = requests().origin(
        [
            (b"x-instance", b"gpu0"),
            (b"x-lane", b"thinking"),
            (b"x-project-id", b"shop"),
            (b"x-intent", b"summary"),
            (b"x-local-only", b"Yes"),
            PARENT,
        ]
    )
    assert origin == ("gpu0", "thinking", "shop", "summary", True, (TRACE, SPAN, "01"), None, None)


@pytest.mark.parametrize(
    ("value", "means"), [(b"true", True), (b"1", True), (b"TRUE", True), (b"0", False), (b"no", False)]
)
def test_only_local_servers_are_wanted_where_that_is_said(value: bytes, *, means: bool) -> None:
    one = requests()
    origin = one.origin([(b"x-local-only", value)])
    assert origin.local_only is means
    assert one.record("/api/chat", None, origin).local_only is means


def test_a_record_begins_with_what_is_known_of_its_request() -> None:
    one = requests()
    origin = one.origin([(b"x-lane", b"thinking"), (b"x-intent", b"summary"), PARENT])
    record = one.record("/api/chat", RequestKind.GENERATE, origin)
    assert (record.path, record.kind, record.lane, record.intent) == (
        "/api/chat",
        RequestKind.GENERATE,
        "thinking",
        "summary",
    )
    assert (record.trace_id, record.parent_span_id, record.sampled) == (TRACE, SPAN, True)
    assert record.span_id not in (SPAN, "0" * 16)
    assert (record.attempts, record.outcome, record.status, record.failed_attempts) == (0, "ok", 0, ())


def test_every_request_has_ids_of_its_own() -> None:
    one, other = requests(), requests()
    records = [each.record("/api/chat", None, each.origin([])) for each in (one, other) for _ in range(1000)]
    for name, length in (("request_id", 20), ("span_id", 16), ("trace_id", 32)):
        ids = {getattr(record, name) for record in records}
        assert len(ids) == 2000, "of two daemons as well"
        assert {len(one) for one in ids} == {length}
        assert all(int(one, 16) for one in ids)


@pytest.mark.parametrize(("flags", "sampled"), [("01", True), ("00", False), ("03", True), ("02", False)])
def test_whether_a_trace_is_sampled_is_up_to_the_client_that_began_it(flags: str, *, sampled: bool) -> None:
    one = requests(samples=lambda _trace: not sampled)
    origin = one.origin([(b"traceparent", f"00-{TRACE}-{SPAN}-{flags}".encode())])
    assert one.record("/api/chat", None, origin).sampled is sampled


def test_a_trace_that_begins_here_is_sampled_as_is_said() -> None:
    def samples(trace: str) -> bool:
        seen.append(trace)
        return True

    seen: list[str] = []
    one = requests(samples=samples)
    record = one.record("/api/chat", None, one.origin([]))
    assert (record.sampled, seen) == (True, [record.trace_id])
    assert not requests().record("/api/chat", None, one.origin([])).sampled
    assert not never("x")


def test_a_request_beside_the_relay_is_sent_on_with_the_ids_of_its_record() -> None:
    begun = requests().begin(
        "/api/show",
        None,
        [
            (b"host", b"localhost"),
            (b"x-instance", b"gpu0"),
            (b"authorization", b"Bearer ours"),
            (b"accept", b"*/*"),
        ],
    )
    headers = dict(begun.headers)
    assert begun.instance == "gpu0"
    assert headers.pop(b"x-request-id").decode() == begun.record.request_id
    assert read_traceparent(headers.pop(b"traceparent")) == (
        begun.record.trace_id,
        begun.record.span_id,
        "00",
    )
    assert headers == {b"accept": b"*/*"}


@given(st.binary(max_size=200))
def test_a_header_is_sent_on_as_it_came(value: bytes) -> None:
    value = value.replace(b"\r", b"").replace(b"\n", b"")
    begun = requests().begin("/api/show", None, [(b"user-agent", value)])
    assert (b"user-agent", value) in list(begun.headers)


def test_the_key_of_a_request_decides_on_its_project_and_on_paid_servers_and_is_noted_as_used() -> None:
    used: set[str] = set()
    shop = Grant("shop-ci", frozenset({Scope.CLIENT}), AT, project="shop", is_local=True)
    one = Requests(HeaderNames(), default_project="default", used=used)
    spoofed = [(b"x-project-id", b"other"), (b"x-local-only", b"false")]
    record = one.record("/api/chat", None, one.origin(spoofed, shop))
    assert (record.key, record.project_id, record.local_only) == ("shop-ci", "shop", True)
    assert used == {"shop-ci"}
    loose = one.begin("/api/pull", None, [*spoofed], grant("loose")).record
    assert (loose.key, loose.project_id, loose.local_only) == ("loose", "other", False)
    nobody = one.record("/api/chat", None, one.origin(spoofed))
    assert (nobody.key, nobody.project_id) == (None, "other")
    assert used == {"shop-ci", "loose"}
