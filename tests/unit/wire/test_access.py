"""Access control as a pure function; tests/api/test_gate.py sees it from outside."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.keys import Scope
from manager.wire.access import REASONS, Access, ambiguous, for_pages, permission
from manager.wire.hosts import host_name, is_local
from manager.wire.keys import PATH_KEY, presented
from tests.support.keys import grant, keys

if TYPE_CHECKING:
    from manager.wire.head import Header

ALLOWED = ("localhost", "127.0.0.1", "[::1]", "gateway.example")
HERE: Header = (b"host", b"localhost:11435")
KEY = "correct-horse"
CONTROL = "/api/runtime/compute/reap"


def code(access: Access, *headers: Header, path: str = "/api/chat") -> str | None:
    refusal = access.check("POST", path, list(headers)).refusal
    return refusal.code if refusal else None


@pytest.fixture
def open_access() -> Access:
    return Access(allowed_hosts=ALLOWED)


@pytest.fixture
def keyed() -> Access:
    return Access(allowed_hosts=ALLOWED, keys=keys(KEY))


@pytest.mark.parametrize("name", ALLOWED)
@pytest.mark.parametrize("form", ["{}", "{}:1", "{}:65535", " {} "])
def test_a_host_is_allowed_under_its_name_with_any_port(open_access: Access, name: str, form: str) -> None:
    for text in (form.format(name), form.format(name.upper())):
        assert code(open_access, (b"host", text.encode())) is None


@pytest.mark.parametrize(
    "host",
    [".", ":80", "localhost:", "localhost:123456", "localhost:-1", "localhost..", "localhost/", "a@localhost",
     "localhost localhost", "evil.example", "localhost.evil.example", "evil.example,a.local", "local",
     "internal", "a.local.evil.example", "alocal", "127.0.0.1.evil.example", "127.1", "0x7f000001",
     "2130706433", "256.0.0.1", "::1", "[::1", "[::1]x", "[::g]", "[127.0.0.1]", "[::1%lo]", "\xe7.local"],
)  # fmt: skip
def test_any_other_host_is_refused_and_named(open_access: Access, host: str) -> None:
    refusal = open_access.check("GET", "/healthz", [(b"host", host.encode("latin-1"))]).refusal
    assert refusal is not None
    assert (refusal.status, refusal.code) == (403, "host_not_allowed")
    assert repr(host) in refusal.message


@pytest.mark.parametrize(
    "host",
    ["", "0.0.0.0", "127.0.0.2", "192.168.1.7", "203.0.113.9", "[::2]", "[2001:db8::1]", "localhost",
     "app.localhost", "box.local", "Box.Local.", "host.docker.internal", "gpu.corp.internal", "thisbox"],
)  # fmt: skip
@pytest.mark.parametrize("port", ["", ":11435"])
def test_a_host_that_no_public_name_server_can_point_here_is_allowed(host: str, port: str) -> None:
    access = Access(allowed_hosts=(), own_names=["ThisBox"])
    if host or not port:
        assert code(access, (b"host", (host + port).encode())) is None


def test_a_request_of_http_1_1_names_exactly_one_host(open_access: Access) -> None:
    for hosts, reason in (([], "host_missing"), ([HERE, HERE], "host_repeated")):
        refusal = open_access.check("POST", "/healthz", hosts).refusal
        assert refusal is not None
        assert (refusal.status, refusal.reason) == (400, reason)


def test_a_request_of_http_1_0_may_name_no_host_and_no_other_host(open_access: Access) -> None:
    evil: Header = (b"host", b"evil.example")
    for hosts, reason in (([], None), ([evil], "host_not_allowed"), ([HERE, evil], "host_repeated")):
        refusal = open_access.check("POST", "/healthz", hosts, needs_host=False).refusal
        assert (refusal.reason if refusal else None) == reason


def test_a_page_cannot_pass_for_one_of_the_daemon_where_no_host_is_named(open_access: Access) -> None:
    for host in ([], [(b"host", b"")]):
        for origin in (b"http://", b"https://", b"http", b""):
            refusal = open_access.check(
                "POST", CONTROL, [*host, (b"origin", origin)], needs_host=False
            ).refusal
            assert refusal is not None
            assert refusal.code == "origin_not_allowed"


def test_every_host_is_allowed_where_other_machines_need_a_key_anyway() -> None:
    keyed = Access(allowed_hosts=(), keys=keys(KEY), any_host=True)
    host: Header = (b"host", b"gpu.example.com:11435")
    assert code(keyed, host) == "unauthorized"
    assert code(keyed, host, (b"x-api-key", KEY.encode())) is None
    assert code(keyed, (b"host", b"a b"), (b"x-api-key", KEY.encode())) == "host_not_allowed"
    open_to_all = Access(allowed_hosts=(), any_host=True)
    assert code(open_to_all, host) == "host_not_allowed", "without a key the Host is all that there is"


@given(st.text(st.characters(max_codepoint=255), max_size=20))
def test_no_public_name_is_let_in_and_no_line_is_broken_by_whatever_host_is_named(text: str) -> None:
    access = Access(allowed_hosts=ALLOWED)
    refusal = access.check("GET", "/", [(b"host", text.encode("latin-1"))]).refusal
    if refusal is None and text.strip():
        name = host_name(text.strip())
        assert name is not None
        assert name in ALLOWED or is_local(name)
        assert text.strip().lower().startswith(name)
    elif refusal is not None:
        assert refusal.message.isprintable()


# --- targets in absolute form ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hosts", "authority", "expected"),
    [
        (["localhost"], b"127.0.0.1:11435", [b"127.0.0.1:11435"]),
        (["localhost"], b"evil.example", [b"evil.example"]),
        (["evil.example"], b"localhost", [b"evil.example"]),
        ([], b"localhost", []),
        (["localhost", "localhost"], b"localhost", [b"localhost", b"localhost"]),
    ],
)
def test_an_authority_in_the_target_replaces_a_host_that_is_allowed(
    open_access: Access, hosts: list[str], authority: bytes, expected: list[bytes]
) -> None:
    headers = [(b"accept", b"*/*"), *((b"host", host.encode()) for host in hosts)]
    addressed = open_access.addressed(headers, authority)
    assert [value for name, value in addressed if name == b"host"] == expected
    assert (b"accept", b"*/*") in addressed


def test_an_authority_in_the_target_is_the_host_of_a_request_of_http_1_0_without_one(
    open_access: Access,
) -> None:
    other: Header = (b"host", b"x.y")
    for headers, expected in (([], b"evil.example"), ([HERE], b"evil.example"), ([other], b"x.y")):
        addressed = open_access.addressed(headers, b"evil.example", needs_host=False)
        assert addressed == [(b"host", expected)]
        refusal = open_access.check("POST", "/api/tags", addressed, needs_host=False).refusal
        assert refusal is not None
        assert refusal.code == "host_not_allowed"


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
        (b"https://127.0.0.1", False),
        (b"http://0.0.0.0:8080", False),
        (b"http://[::1]:8080", False),
        (b"app://obsidian.md", False),
        (b"file://", False),
        (b"tauri://localhost", False),
        (b"vscode-webview://0f4a", False),
        (b"vscode-file://vscode-app", False),
        (b"chrome-extension://abcdef", True),
        (b"myapp://obsidian.md", True),
        (b"app:", True),
        (b"http://127.0.0.2", True),
        (b"http://192.168.1.7", True),
        (b"http://box.local", True),
        (b"http://localhost:123456", True),
        (b"http://localhost.evil.example", True),
        (b"app://" + b"a" * 600, True),
        (b"http://evil.example", True),
        (b"http://localhost/", True),
        (b"http://a@localhost", True),
        (b"http://\xff\r\nx", True),
    ],
)
def test_a_page_may_ask_where_it_comes_from_an_allowed_host(
    open_access: Access, origin: bytes, refused: bool
) -> None:
    refusal = open_access.check("POST", "/api/chat", [HERE, (b"origin", origin)]).refusal
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
        ([(b"authorization", b"Bearer ollama"), (b"x-api-key", b"correct-horse")], True),
        ([(b"x-api-key", b"correct-horse"), (b"authorization", b"Bearer ollama")], True),
        ([(b"authorization", b"Bearer ollama"), (b"authorization", b"Bearer correct-horse")], True),
        ([(b"authorization", b"Bearer correct-horse")] * 2, True),
        ([(b"x-api-key", b"ollama"), (b"x-api-key", b"correct-horse")], True),
        ([(b"authorization", b"Bearer ollama"), (b"x-api-key", b"unused")], False),
        ([(b"x-api-key", b"guess")] * 8 + [(b"x-api-key", b"correct-horse")], False),
        ([(b"x-api-key", b"")], False),
        ([(b"x-api-key", b"\xff\x00")], False),
        ([(b"x-key", b"correct-horse")], False),
    ],
)
def test_the_key_opens_as_bearer_or_as_x_api_key(keyed: Access, headers: list[Header], opens: bool) -> None:
    assert (code(keyed, HERE, *headers) is None) is opens


def test_a_wrong_key_and_none_are_told_apart_for_the_log(keyed: Access) -> None:
    reasons = []
    headers: list[list[Header]] = [[], [(b"x-api-key", b"")], [(b"authorization", b"Basic eDp5")]]
    for given_keys in (*headers, [(b"x-api-key", b"x")]):
        refusal = keyed.check("POST", "/api/tags", [HERE, *given_keys]).refusal
        assert refusal is not None
        reasons.append(refusal.reason)
    assert reasons == ["key_missing", "key_missing", "key_missing", "key_wrong"]


def test_keys_are_presented_in_the_order_of_their_headers() -> None:
    headers = [(b"x-api-key", b"a"), (b"authorization", b"Bearer b "), (b"authorization", b"Basic c")]
    assert presented([*headers, (b"x-api-key", b"d"), (b"x-api-key", b"a")]) == ((), (b"a", b"b", b"d"))


def test_every_reason_is_a_known_label(keyed: Access) -> None:
    keyed.use(keys("client", of=grant("c", Scope.CLIENT)))
    evil: Header = (b"host", b"evil.example")
    page: Header = (b"origin", b"null")
    found = {ambiguous("why").reason}
    key: Header = (b"x-api-key", b"client")
    for path, *headers in (
        ("/api/chat",),
        ("/api/chat", HERE, HERE),
        ("/api/chat", evil),
        ("/api/chat", HERE, page),
        ("/api/chat", HERE),
        ("/api/chat", HERE, (b"x-api-key", b"x")),
        ("/api/chat", HERE, key, (PATH_KEY, b"other")),
        ("/api/pull", HERE, key),
        ("/nothing", HERE, key),
    ):
        refusal = keyed.check("POST", path, headers).refusal
        assert refusal is not None
        found.add(refusal.reason)
    assert found == set(REASONS)


def test_who_has_no_key_is_told_how_to_present_one(keyed: Access) -> None:
    refusal = keyed.check("POST", "/api/tags", [HERE]).refusal
    assert refusal is not None
    assert (refusal.status, refusal.headers) == (401, {"WWW-Authenticate": "Bearer"})
    assert KEY not in refusal.message


def test_only_healthz_is_open_without_a_key_and_only_to_allowed_hosts(keyed: Access) -> None:
    assert code(keyed, HERE, path="/healthz") is None
    assert code(keyed, HERE, path="/healthz/") == "unauthorized"
    assert code(keyed, (b"host", b"evil.example"), path="/healthz") == "host_not_allowed"


def test_the_right_key_does_not_open_to_another_host(keyed: Access) -> None:
    assert code(keyed, (b"host", b"evil.example"), (b"x-api-key", KEY.encode())) == "host_not_allowed"


# --- pages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allowed", "origin", "lets"),
    [
        ("https://chat.example", b"https://chat.example", True),
        ("https://Chat.Example", b"https://chat.example", True),
        ("https://chat.example", b"https://chat.example:8443", False),
        ("https://chat.example", b"https://chat.example.evil", False),
        ("https://chat.example", b"https://chatXexample", False),
        ("https://chat.example", b"http://chat.example", False),
        ("https://chat.example:8443", b"https://chat.example:8443", True),
        ("https://chat.example:8443", b"https://chat.example:84430", False),
        ("https://chat.example:*", b"https://chat.example:8443", True),
        ("https://chat.example:*", b"https://chat.example", True),
        ("https://chat.example:*", b"https://chat.example:8443.evil.com", False),
        ("https://*.chat.example", b"https://a.chat.example", True),
        ("https://*.chat.example", b"https://chat.example", False),
        ("https://*.chat.example", b"https://a.b.chat.example", False),
        ("https://*.chat.example", b"https://evil.com/.chat.example", False),
        ("https://*.chat.example", b"https://a.chat.example.evil.com", False),
        ("https://app-*.chat.example", b"https://app-7.chat.example", True),
        ("https://app-*.chat.example", b"https://app-.evil.chat.example", False),
        ("https://[::2]:*", b"https://[::2]:3000", True),
        ("https://*", b"https://anything.example:1", True),
        ("https://*", b"http://anything.example", False),
        ("https://*:8443", b"https://anything.example:8443", True),
        ("https://*:8443", b"https://anything.example", False),
        ("chrome-extension://*", b"chrome-extension://abcdef", True),
        ("chrome-extension://*", b"moz-extension://abcdef", False),
        ("null", b"null", True),
        ("null", b"nullx", False),
        ("https://*", b"null", False),
        ("*", b"https://anything.example", True),
        ("*", b"null", True),
    ],
)
def test_pages_of_other_origins_may_use_models_where_that_is_configured_and_nothing_else(
    allowed: str, origin: bytes, lets: bool
) -> None:
    access = Access(allowed_hosts=ALLOWED, allowed_origins=(allowed,))
    expected = None if lets else "origin_not_allowed"
    for path in ("/api/chat", "/v1/chat/completions", "/api/tags"):
        assert code(access, HERE, (b"origin", origin), path=path) == expected
    for path in ("/api/runtime/compute/reap", "/api/settings/models", "/metrics"):
        assert code(access, HERE, (b"origin", origin), path=path) == "origin_not_allowed"


@pytest.mark.parametrize(
    "name", ["localhost:11435", "127.0.0.1", "192.168.1.7:80", "gateway.example", "thisbox"]
)
def test_a_page_of_the_daemon_controls_it_under_a_name_that_is_certainly_this_machines(name: str) -> None:
    access = Access(allowed_hosts=ALLOWED, own_names=["thisbox"])
    for scheme in (b"http", b"https"):
        page = [(b"host", name.upper().encode()), (b"origin", scheme + b"://" + name.encode())]
        assert code(access, *page, path=CONTROL) is None


@pytest.mark.parametrize("name", ["box.local", "gpu.corp.internal"])
def test_a_page_under_a_name_that_another_machine_may_have_uses_models_and_controls_nothing(
    open_access: Access, name: str
) -> None:
    page = [(b"host", name.encode()), (b"origin", b"http://" + name.encode())]
    assert code(open_access, *page) is None
    assert code(open_access, *page, path=CONTROL) == "origin_not_allowed"
    assert code(open_access, page[0], path=CONTROL) is None, "that is no page"


def test_only_a_page_of_the_same_port_controls_the_daemon(open_access: Access) -> None:
    for origin in (b"http://localhost:1", b"http://localhost", b"app://localhost:11435", b"null"):
        assert code(open_access, HERE, (b"origin", origin), path=CONTROL) == "origin_not_allowed"


def test_a_page_of_the_daemon_controls_it_under_every_name_where_it_needs_a_key() -> None:
    access = Access(allowed_hosts=(), keys=keys(KEY), any_host=True)
    page = [(b"host", b"gpu.example.com"), (b"origin", b"https://gpu.example.com")]
    assert code(access, *page, path=CONTROL) == "unauthorized"
    assert code(access, *page, (b"x-api-key", KEY.encode()), path=CONTROL) is None


def test_no_page_reads_an_answer_to_a_request_that_was_refused_before_its_origin_was_checked(
    keyed: Access,
) -> None:
    page: Header = (b"origin", b"http://evil.example")
    for headers in ([page], [HERE, HERE, page]):
        assert for_pages(headers, keyed.check("POST", "/api/chat", headers).refusal) == []


def test_an_answer_can_be_read_by_the_page_that_asked_and_no_other(keyed: Access) -> None:
    page: Header = (b"origin", b"http://localhost:3000")
    assert for_pages([HERE], None) == []
    told = dict(for_pages([HERE, page], keyed.check("POST", "/api/chat", [HERE, page]).refusal))
    assert told[b"Access-Control-Allow-Origin"] == page[1]
    assert told[b"Vary"] == b"Origin"
    assert b"X-Instance" in told[b"Access-Control-Expose-Headers"]
    evil: Header = (b"origin", b"http://evil.example")
    assert for_pages([HERE, evil], keyed.check("POST", "/api/chat", [HERE, evil]).refusal) == []


def test_the_looks_of_the_page_need_no_key(keyed: Access) -> None:
    assert keyed.check("GET", "/ui/static/abc/page.css", [HERE]).refusal is None
    assert keyed.check("GET", "/ui/staticky", [HERE]).refusal is not None


def test_a_browser_that_asks_first_needs_no_key(keyed: Access) -> None:
    asks = [
        HERE,
        (b"origin", b"http://localhost:3000"),
        (b"access-control-request-method", b"POST"),
        (b"access-control-request-headers", b"authorization, content-type"),
    ]
    assert keyed.check("POST", "/api/chat", asks, preflight=True).refusal is None
    granted = permission(asks)
    assert granted is not None
    assert dict(granted)[b"Access-Control-Allow-Headers"] == b"authorization, content-type"
    assert permission(asks[:2]) is None
    evil = [HERE, (b"origin", b"http://evil.example"), *asks[2:]]
    refusal = keyed.check("POST", "/api/chat", evil, preflight=True).refusal
    assert refusal is not None
    assert refusal.code == "origin_not_allowed"
