"""A head is read once for all requests that say the same, and nothing of it gets into another's line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.relay.answer import _where
from manager.relay.caller import read_caller
from manager.relay.upstream import Address
from manager.services.requests import Requests
from manager.wire.access import Access
from manager.wire.caller import HeaderNames
from manager.wire.routes import INFERENCE
from tests.support.keys import keys

if TYPE_CHECKING:
    from manager.relay.caller import Caller
    from manager.relay.relay import Relay
    from manager.wire.head import Header

HERE: Header = (b"host", b"localhost")
PARENT = (b"traceparent", b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")


def read(*headers: Header, names: HeaderNames | None = None, key: str | None = None) -> Caller:
    relay = SimpleNamespace(
        requests=Requests(names or HeaderNames(), default_project="default"),
        access=Access(allowed_hosts=["localhost"], keys=keys(key)),
    )
    return read_caller(cast("Relay", relay), INFERENCE[b"/api/chat"], [HERE, *headers])


def test_a_caller_that_says_nothing_belongs_to_the_default_project() -> None:
    caller = read()
    assert (caller.origin.instance, caller.origin.lane, caller.origin.project, caller.origin.intent) == (
        None,
        None,
        "default",
        None,
    )
    assert (caller.origin.trace, caller.refusal, caller.ambiguity, caller.lines) == (None, None, None, b"")


def test_what_a_caller_says_of_itself_is_read_and_kept_from_the_server() -> None:
    caller = read(
        (b"x-instance", b"gpu0"),
        (b"x-lane", b"output"),
        (b"x-project-id", b"shop"),
        (b"x-intent", b"summary"),
        (b"x-local-only", b"true"),
        PARENT,
        (b"user-agent", b"curl"),
    )
    assert (caller.origin.instance, caller.origin.lane, caller.origin.project, caller.origin.intent) == (
        "gpu0",
        "output",
        "shop",
        "summary",
    )
    assert caller.origin.trace == ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", "01")
    assert caller.lines == b"user-agent: curl\r\n"


def test_other_names_count_where_others_are_configured_and_the_usual_ones_no_more() -> None:
    names = HeaderNames(instance=b"x-where", project=b"x-awooop-project")
    caller = read((b"x-where", b"gpu1"), (b"x-instance", b"gpu0"), (b"x-awooop-project", b"p"), names=names)
    assert (caller.origin.instance, caller.origin.project, caller.lines) == ("gpu1", "p", b"")


def test_what_is_ambiguous_or_not_allowed_is_told() -> None:
    coding = (b"transfer-encoding", b"chunked")
    assert read(coding, coding).ambiguity == "transfer-encoding is given more than once"
    for caller, code in ((read(key="secret"), "unauthorized"), (read(HERE), "bad_request")):
        assert caller.refusal is not None
        assert caller.refusal.code == code


def test_the_head_for_a_server_is_made_once_and_anew_for_another() -> None:
    caller = read((b"accept", b"*/*"))
    one, other = Address.of("http://127.0.0.1:1"), Address.of("http://127.0.0.1:2/prefix")
    head = caller.head_for(one, b"/api/chat")
    assert head == b"POST /api/chat HTTP/1.1\r\nHost: 127.0.0.1:1\r\naccept: */*\r\n"
    assert caller.head_for(one, b"/api/chat") is head
    assert caller.head_for(one, b"/api/chat?x=1").startswith(b"POST /api/chat?x=1 HTTP/1.1\r\n")
    for key in (b"first", b"second"):  # two instances of one server, each with a key of its own
        head = caller.head_for(one, b"/api/chat", ((b"x-api-key", key),))
        assert head.endswith(b"x-api-key: " + key + b"\r\n")
    assert b"x-api-key" not in caller.head_for(one, b"/api/chat")
    assert caller.head_for(other, b"/api/chat").startswith(
        b"POST /prefix/api/chat HTTP/1.1\r\nHost: 127.0.0.1:2"
    )


@given(st.binary(max_size=300))
def test_no_value_of_a_header_can_end_a_line_of_a_log_or_of_an_answer(value: bytes) -> None:
    caller = read(*((name, value) for name in (b"x-instance", b"x-lane", b"x-project-id", b"x-intent")))
    for text in (caller.origin.instance, caller.origin.lane, caller.origin.project, caller.origin.intent):
        assert text is None or (text.isascii() and text.isprintable())


@pytest.mark.parametrize("model", ["m\r\nSet-Cookie: a=b", "m\n", "m\x00", "m\u2028", "m\ud800", "é"])
def test_no_name_of_a_model_can_end_the_line_that_tells_it(model: str) -> None:
    lines = _where("gpu0", model)
    assert lines.count(b"\r\n") == 2
    assert lines.count(b"\n") == lines.count(b"\r") == 2
    assert lines.isascii()
