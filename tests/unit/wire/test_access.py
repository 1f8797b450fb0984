"""Who may ask, as far as it needs no daemon: what the rest is, tests/api/test_gate.py sees from outside."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.access import Access, for_pages, permission

if TYPE_CHECKING:
    from manager.wire.head import Header

ALLOWED = ("localhost", "127.0.0.1", "[::1]", "gateway.example")
HERE: Header = (b"host", b"localhost:11435")
KEY = "correct-horse"


def code(access: Access, *headers: Header, path: str = "/api/chat") -> str | None:
    refusal = access.refusal(path, list(headers))
    return refusal.code if refusal else None


@pytest.fixture
def open_access() -> Access:
    return Access(allowed_hosts=ALLOWED, key=None)


@pytest.fixture
def keyed() -> Access:
    return Access(allowed_hosts=ALLOWED, key=KEY)


@pytest.mark.parametrize("name", ALLOWED)
@pytest.mark.parametrize("form", ["{}", "{}:1", "{}:65535", " {} "])
def test_a_host_is_allowed_under_its_name_with_any_port(open_access: Access, name: str, form: str) -> None:
    for text in (form.format(name), form.format(name.upper())):
        assert code(open_access, (b"host", text.encode())) is None


@pytest.mark.parametrize(
    "host",
    ["", ".", ":80", "localhost:", "localhost:123456", "localhost:-1", "localhost..", "localhost/",
     "a@localhost", "localhost localhost", "evil.example", "localhost.evil.example", "::1", "[::1", "[::1]x",
     "[::2]", "[::1%lo]"],
)  # fmt: skip
def test_any_other_host_is_refused_and_named(open_access: Access, host: str) -> None:
    refusal = open_access.refusal("/healthz", [(b"host", host.encode())])
    assert refusal is not None
    assert (refusal.status, refusal.code) == (403, "host_not_allowed")
    assert repr(host) in refusal.message


def test_a_host_is_given_exactly_once(open_access: Access) -> None:
    assert code(open_access) == "host_not_allowed"
    assert code(open_access, HERE, HERE) == "host_not_allowed"


@given(st.text(st.characters(max_codepoint=255), max_size=20))
def test_whatever_host_is_named_only_those_allowed_are_let_in_and_no_line_is_broken(text: str) -> None:
    access = Access(allowed_hosts=ALLOWED, key=None)
    refusal = access.refusal("/", [(b"host", text.encode("latin-1"))])
    if refusal is None:
        assert text.strip().lower().rstrip("0123456789").removesuffix(":").removesuffix(".") in ALLOWED
    else:
        assert refusal.message.isprintable()


def test_a_refusal_is_not_remembered_as_a_permission(open_access: Access) -> None:
    for _ in range(2):
        assert code(open_access, (b"host", b"evil.example")) == "host_not_allowed"
        assert code(open_access, HERE) is None


def test_hosts_beyond_those_that_are_remembered_are_allowed_as_well(open_access: Access) -> None:
    for port in range(1, 600):
        assert code(open_access, (b"host", b"localhost:%d" % port)) is None
    assert code(open_access, (b"host", b"evil.example:600")) == "host_not_allowed"


@pytest.mark.parametrize(
    ("origin", "refused"),
    [
        (b"http://localhost:3000", False),
        (b"https://gateway.example", False),
        (b"null", True),
        (b"", True),
        (b"localhost", True),
        (b"HTTP://localhost", True),
        (b"http:localhost", True),
        (b"file://localhost", True),
        (b"http://evil.example", True),
        (b"http://localhost/", True),
        (b"http://a@localhost", True),
        (b"http://\xff\r\nx", True),
    ],
)
def test_a_page_may_ask_where_it_comes_from_an_allowed_host(
    open_access: Access, origin: bytes, refused: bool
) -> None:
    refusal = open_access.refusal("/api/chat", [HERE, (b"origin", origin)])
    assert (refusal is not None) is refused
    if refusal is not None:
        assert (refusal.status, refusal.code) == (403, "origin_not_allowed")
        assert refusal.message.isprintable()


def test_every_origin_counts_of_several(open_access: Access) -> None:
    good, evil = (b"origin", b"http://localhost"), (b"origin", b"http://evil.example")
    assert code(open_access, HERE, good, good) is None
    assert code(open_access, HERE, good, evil) == code(open_access, HERE, evil, good) == "origin_not_allowed"


def test_without_a_key_none_is_asked_for(open_access: Access, keyed: Access) -> None:
    assert not open_access.wants_key
    assert keyed.wants_key
    assert code(open_access, HERE, (b"authorization", b"Bearer ollama")) is None


@pytest.mark.parametrize(
    ("headers", "opens"),
    [
        ([], False),
        ([(b"x-api-key", b"correct-horse")], True),
        ([(b"x-api-key", b"Bearer correct-horse")], False),
        ([(b"authorization", b"Bearer correct-horse")], True),
        ([(b"authorization", b"bEARER   correct-horse ")], True),
        ([(b"authorization", b"correct-horse")], False),
        ([(b"authorization", b"Bearer")], False),
        ([(b"authorization", b"Basic eDp5"), (b"x-api-key", b"correct-horse")], True),
        ([(b"authorization", b"Bearer correct-horse"), (b"x-api-key", b"ollama")], True),
        ([(b"authorization", b"Bearer ollama"), (b"x-api-key", b"correct-horse")], False),
        ([(b"x-api-key", b"")], False),
        ([(b"x-api-key", b"\xff\x00")], False),
        ([(b"x-key", b"correct-horse")], False),
    ],
)
def test_the_key_opens_as_bearer_or_as_x_api_key(keyed: Access, headers: list[Header], opens: bool) -> None:
    assert (code(keyed, HERE, *headers) is None) is opens


def test_who_has_no_key_is_told_how_to_present_one(keyed: Access) -> None:
    refusal = keyed.refusal("/api/tags", [HERE])
    assert refusal is not None
    assert (refusal.status, refusal.headers) == (401, {"WWW-Authenticate": "Bearer"})
    assert KEY not in refusal.message


def test_only_healthz_is_open_without_a_key_and_only_to_allowed_hosts(keyed: Access) -> None:
    assert code(keyed, HERE, path="/healthz") is None
    assert code(keyed, HERE, path="/healthz/") == "key_required"
    assert code(keyed, (b"host", b"evil.example"), path="/healthz") == "host_not_allowed"


def test_the_right_key_does_not_open_to_another_host(keyed: Access) -> None:
    assert code(keyed, (b"host", b"evil.example"), (b"x-api-key", KEY.encode())) == "host_not_allowed"


# --- pages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allowed", "origin", "lets"),
    [
        ("https://chat.example", b"https://chat.example", True),
        ("https://chat.example", b"https://chat.example.evil", False),
        ("https://chat.example", b"http://chat.example", False),
        ("chrome-extension://*", b"chrome-extension://abcdef", True),
        ("chrome-extension://*", b"moz-extension://abcdef", False),
        ("*", b"https://anything.example", True),
        ("*", b"null", True),
    ],
)
def test_pages_of_other_origins_may_use_models_where_that_is_configured_and_nothing_else(
    allowed: str, origin: bytes, lets: bool
) -> None:
    access = Access(allowed_hosts=ALLOWED, allowed_origins=(allowed,), key=None)
    expected = None if lets else "origin_not_allowed"
    for path in ("/api/chat", "/v1/chat/completions", "/api/tags"):
        assert code(access, HERE, (b"origin", origin), path=path) == expected
    for path in ("/api/runtime/compute/reap", "/api/settings/models", "/metrics"):
        assert code(access, HERE, (b"origin", origin), path=path) == "origin_not_allowed"


def test_an_answer_can_be_read_by_the_page_that_asked_and_no_other(keyed: Access) -> None:
    page: Header = (b"origin", b"http://localhost:3000")
    assert for_pages([HERE], None) == []
    told = dict(for_pages([HERE, page], keyed.refusal("/api/chat", [HERE, page])))
    assert told[b"Access-Control-Allow-Origin"] == page[1]
    assert told[b"Vary"] == b"Origin"
    assert b"X-Instance" in told[b"Access-Control-Expose-Headers"]
    evil: Header = (b"origin", b"http://evil.example")
    assert for_pages([HERE, evil], keyed.refusal("/api/chat", [HERE, evil])) == []


def test_a_browser_that_asks_first_needs_no_key(keyed: Access) -> None:
    asks = [
        HERE,
        (b"origin", b"http://localhost:3000"),
        (b"access-control-request-method", b"POST"),
        (b"access-control-request-headers", b"authorization, content-type"),
    ]
    assert keyed.refusal("/api/chat", asks, asks_first=True) is None
    granted = permission(asks)
    assert granted is not None
    assert dict(granted)[b"Access-Control-Allow-Headers"] == b"authorization, content-type"
    assert permission(asks[:2]) is None
    evil = [HERE, (b"origin", b"http://evil.example"), *asks[2:]]
    refusal = keyed.refusal("/api/chat", evil, asks_first=True)
    assert refusal is not None
    assert refusal.code == "origin_not_allowed"
