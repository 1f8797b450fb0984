"""Keys in paths, headers and cookies, as pure functions."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.keys import Scope
from manager.wire.access import Access, for_pages
from manager.wire.head import forwarded
from manager.wire.keys import (
    PATH_KEY,
    SESSION_COOKIE,
    Keys,
    digest_of,
    presented,
    session_cookie,
    session_of,
    without_path_key,
    without_secrets,
)
from manager.wire.paths import normalised
from tests.support.keys import grant, keys

if TYPE_CHECKING:
    from manager.wire.head import Header

HERE: Header = (b"host", b"localhost")
SECRET = b"om_" + b"a" * 43


def test_a_secret_is_looked_up_by_its_sha_256() -> None:
    assert digest_of(SECRET) == sha256(SECRET).digest()


@pytest.mark.parametrize(
    ("path", "rest", "found"),
    [
        (b"/api/chat", b"/api/chat", []),
        (b"/key", b"/key", []),
        (b"/keys/x", b"/keys/x", []),
        (b"/key/s", b"/", [b"s"]),
        (b"/key/s/api/chat", b"/api/chat", [b"s"]),
        (b"/key/s/key/t/api", b"/api", [b"s", b"t"]),
        (b"/api/key/s", b"/api/key/s", []),
    ],
)
def test_keys_at_the_beginning_of_a_path_are_taken_off(path: bytes, rest: bytes, found: list[bytes]) -> None:
    assert without_path_key(path) == (rest, [(PATH_KEY, key) for key in found])


@given(st.lists(st.sampled_from(["key", "k%65y", "om_x", "..", ".", "", "api", "%2F"]), max_size=8))
def test_no_path_keeps_a_key_at_its_beginning_however_it_is_written(segments: list[str]) -> None:
    path = normalised(("/" + "/".join(segments)).encode())
    rest, found = without_path_key(path)
    assert rest.startswith(b"/")
    assert not rest.startswith(b"/key/")
    assert (
        b"".join(b"/key/" + key for _, key in found) + (rest if rest != b"/" else b"") == path or path == b"/"
    )


def test_the_key_of_a_path_goes_to_no_server() -> None:
    assert forwarded([(PATH_KEY, SECRET), (b"accept", b"*/*")], ()) == [b"accept: */*\r\n"]


def test_the_keys_of_path_and_headers_are_told_apart() -> None:
    headers = [(b"x-api-key", b"a"), (PATH_KEY, b"p"), (b"authorization", b"Bearer b"), (PATH_KEY, b"p")]
    assert presented(headers) == ((b"p",), (b"a", b"b"))


@pytest.mark.parametrize(
    ("cookies", "session"),
    [
        ([], None),
        ([b"a=b"], None),
        ([f"{SESSION_COOKIE}=x".encode()], b"x"),
        ([f"a=b;  {SESSION_COOKIE}=x=y ; c=d".encode()], b"x=y"),
        ([b"a=b", f"{SESSION_COOKIE}=x".encode()], b"x"),
        ([f"x{SESSION_COOKIE}=x".encode()], None),
        ([SESSION_COOKIE.encode()], b""),
    ],
)
def test_a_session_is_the_cookie_of_that_name(cookies: list[bytes], session: bytes | None) -> None:
    assert session_of([(b"cookie", one) for one in cookies]) == session


@pytest.mark.parametrize(
    ("host", "name"),
    [
        (b"localhost", SESSION_COOKIE),
        (b"localhost:11435", f"{SESSION_COOKIE}_11435"),
        (b"127.0.0.1:80", f"{SESSION_COOKIE}_80"),
        (b"[::1]:11435", f"{SESSION_COOKIE}_11435"),
        (b"[::1]", SESSION_COOKIE),
        (b"", SESSION_COOKIE),
    ],
)
def test_the_cookie_of_a_session_has_the_port_of_its_daemon(host: bytes, name: str) -> None:
    assert session_cookie(host) == name
    headers = [(b"host", host), (b"cookie", f"{SESSION_COOKIE}_1=other; {name}=own".encode())]
    assert session_of(headers) == b"own"


def test_a_secret_in_a_text_is_hidden() -> None:
    text = f"/KEY/{SECRET.decode()}/api"
    assert without_secrets(text) == "/KEY/om_…/api"
    assert without_secrets("om_short") == "om_short"
    assert without_secrets("/api/chat") == "/api/chat"


# --- what the check makes of them -----------------------------------------------------------------


def check(access: Access, *headers: Header, method: str = "POST", path: str = "/api/chat") -> str:
    """The reason of the refusal, or the name of the key."""
    refusal, found = access.check(method, path, [HERE, *headers])
    return refusal.reason if refusal is not None else f"served for {found.name if found else 'anybody'}"


@pytest.fixture
def access() -> Access:
    two = {
        digest_of(b"one"): grant("one", Scope.CLIENT),
        digest_of(b"one-new"): grant("one", Scope.CLIENT),
        digest_of(b"two"): grant("two", Scope.ADMIN),
    }
    sessions = {digest_of(b"session"): grant("two", Scope.ADMIN)}
    return Access(allowed_hosts=["localhost"], keys=Keys(two, sessions, are_required=True))


def bearer(key: bytes) -> Header:
    return (b"authorization", b"Bearer " + key)


def test_the_key_that_opens_is_told_and_its_wrong_or_second_secret_too(access: Access) -> None:
    assert check(access, bearer(b"one")) == check(access, bearer(b"one-new")) == "served for one"
    assert check(access, bearer(b"two")) == "served for two"
    assert check(access, bearer(b"three")) == "key_wrong"
    assert check(access) == "key_missing"
    assert check(access, path="/healthz", method="GET") == "served for anybody"


def test_different_keys_in_one_request_are_refused_and_secrets_of_one_are_not(access: Access) -> None:
    path_one: Header = (PATH_KEY, b"one")
    assert check(access, path_one) == check(access, path_one, bearer(b"one")) == "served for one"
    assert check(access, path_one, bearer(b"two")) == "keys_differ"
    assert check(access, path_one, bearer(b"ollama")) == "keys_differ"
    assert check(access, path_one, (PATH_KEY, b"two")) == "keys_differ"
    assert check(access, bearer(b"one"), (b"x-api-key", b"two")) == "keys_differ"
    assert check(access, bearer(b"one"), (b"x-api-key", b"one-new")) == "served for one"
    assert check(access, (PATH_KEY, b"")) == "key_missing"


def test_a_session_counts_only_without_a_key_and_for_the_daemons_own_pages(access: Access) -> None:
    cookie: Header = (b"cookie", f"{SESSION_COOKIE}=session".encode())
    own: Header = (b"sec-fetch-site", b"same-origin")
    assert check(access, cookie, own) == "served for two"
    assert check(access, cookie, own, bearer(b"one")) == "served for one"
    assert check(access, cookie, own, bearer(b"wrong")) == "key_wrong"
    assert check(access, cookie) == "key_missing"
    assert check(access, cookie, method="GET", path="/metrics") == "served for two"
    assert check(access, cookie, (b"origin", b"http://localhost")) == "served for two"
    assert check(access, cookie, (b"origin", b"http://localhost:1"), own) == "key_missing"
    assert check(access, (b"cookie", f"{SESSION_COOKIE}=other".encode()), own) == "key_missing"


def test_new_keys_are_in_force_at_once_and_advance_the_version(access: Access) -> None:
    version = access.version
    access.use(keys("three"))
    assert access.version > version
    assert check(access, bearer(b"one")) == "key_wrong"
    assert check(access, bearer(b"three")) == "served for tester"
    access.use(Keys())
    assert check(access, bearer(b"one")) == "served for anybody"
    access.use(Keys(are_required=True))
    assert check(access, bearer(b"one")) == "key_wrong"


def test_what_a_key_lacks_is_named_and_its_page_may_read_that(access: Access) -> None:
    page: Header = (b"origin", b"http://localhost")
    refusal, found = access.check("POST", "/api/pull", [HERE, page, bearer(b"one")])
    assert refusal is not None
    assert found is not None
    assert (refusal.status, refusal.code, found.name) == (403, "forbidden", "one")
    assert refusal.message == "the key 'one' has the scope client; POST /api/pull needs operator"
    assert for_pages([page], refusal)


def test_a_route_that_has_no_scope_is_there_for_admins_only(access: Access) -> None:
    refusal, _ = access.check("GET", "/api/new", [HERE, bearer(b"one")])
    assert refusal is not None
    assert (refusal.status, refusal.message) == (404, "there is no GET /api/new")
    assert check(access, bearer(b"two"), path="/api/new") == "served for two"
    refusal, _ = access.check("PUT", "/api/tags", [HERE, bearer(b"one")])
    assert refusal is not None
    assert (refusal.status, refusal.headers) == (405, {"Allow": "GET, HEAD"})
