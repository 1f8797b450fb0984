"""Who may ask: the key, the Host a request names, the origin it comes from, the size of its body."""

from __future__ import annotations

import hmac
import json
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import yaml

from manager.api.gate import MOST_BODY_BYTES, Gate
from manager.wire.access import Access
from tests.api.raw_http import request, say
from tests.support.daemon import COMPUTE, ROOT
from tests.support.fixtures import making_daemons, new_manager_id

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from starlette.types import Message

    from tests.support.daemon import Daemon
    from tests.support.engine import Engine

KEY = "correct-horse-battery-staple-0123456789"
SECRET = "guess-that-must-not-be-logged"
PATCH = f"{COMPUTE}/instances/cpu"


@pytest.fixture(scope="module")
def daemon(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that wants a key; a line break at the end of the file is not part of it."""
    home = tmp_path_factory.mktemp("gate")
    key_file = home / "key"
    key_file.write_text(f"{KEY}\n")
    key_file.chmod(stat.S_IRUSR)
    with making_daemons(engine, home, new_manager_id()) as make:
        daemon = make(config={"server": {"key_file": str(key_file)}}).start(until_ready=False)
        daemon.wait_until_alive()
        yield daemon


def routes(daemon: Daemon) -> list[tuple[str, str]]:
    """Every route there is, by the daemon's own description, and what describes it."""
    document = daemon.call("GET", "/openapi.json", headers={"X-API-Key": KEY}).json()
    described = [
        (method.upper(), path.replace("{instance_id}", "cpu"))
        for path, methods in document["paths"].items()
        for method in methods
    ]
    return [*described, ("GET", "/docs"), ("GET", "/redoc"), ("GET", "/openapi.json"), ("GET", "/nothing")]


# --- the key --------------------------------------------------------------------------------------


def test_every_route_but_healthz_wants_the_key(daemon: Daemon) -> None:
    asked = routes(daemon)
    assert len(asked) > 15
    for method, path in asked:
        answer = daemon.call(method, path)
        if path == "/healthz":
            assert answer.status_code == 200
            continue
        assert answer.status_code == 401, (method, path)
        assert answer.json()["error"]["code"] == "key_required"
        assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": f"bearer  {KEY} "},
        {"X-API-Key": KEY},
        {"Authorization": "Basic eDp5", "X-API-Key": KEY},
    ],
)
def test_the_key_opens_as_bearer_and_as_x_api_key(daemon: Daemon, headers: dict[str, str]) -> None:
    assert daemon.call("GET", "instances", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        "Authorization: Bearer",
        "Authorization: Bearer ",
        f"Authorization: {KEY}",
        f"Authorization: Basic {KEY}",
        f"Authorization: Bearer {KEY}x",
        f"Authorization: Bearer {KEY[:-1]}",
        f"Authorization: Bearer {KEY.upper()}",
        f"Authorization: Bearer {SECRET}",
        "Authorization: Bearer schl\xfcssel",
        "X-API-Key:",
        "X-API-Key: ",
        f"X-API-Key: {SECRET}",
        f"X-API-Key: Bearer {KEY}",
        "X-API-Key: \xff\xfe",
        f"Cookie: key={KEY}",
    ],
)
def test_anything_else_does_not_open(daemon: Daemon, header: str) -> None:
    answer = say(daemon.port, request(f"{COMPUTE}/instances", header))
    assert (answer.status, answer.error["code"]) == (401, "key_required")


def test_the_key_in_the_query_does_not_open(daemon: Daemon) -> None:
    assert daemon.call("GET", f"instances?key={KEY}&api_key={KEY}").status_code == 401


def test_nothing_gets_past_healthz_by_its_name(daemon: Daemon) -> None:
    for path in ("/healthz/", "/healthz/../readyz", "//healthz", "/Healthz", "/healthz%2f..%2freadyz"):
        assert say(daemon.port, request(path)).status == 401, path


def test_neither_keys_nor_guesses_are_logged(daemon: Daemon) -> None:
    daemon.call("GET", f"instances?token={SECRET}", headers={"Authorization": f"Bearer {SECRET}"})
    daemon.call("PATCH", "instances/cpu", data=SECRET, headers={"X-API-Key": KEY})
    log = daemon.log()
    assert KEY not in log
    assert SECRET not in log


async def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)

    async def app(*_: object) -> None: ...

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(_message: Message) -> None: ...

    gate = Gate(app, access=Access(allowed_hosts=["localhost"], key="right"))
    for presented in (b"", b"r", b"wrong", b"right"):
        headers = [(b"host", b"localhost"), (b"x-api-key", presented)]
        await gate({"type": "http", "path": "/x", "headers": headers}, receive, send)
    assert compared == [(b"", b"right"), (b"r", b"right"), (b"wrong", b"right"), (b"right", b"right")]


# --- the host and the origin ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:11435",
        "LOCALHOST",
        "LocalHost:80",
        "localhost.",
        "localhost.:11435",
        "127.0.0.1",
        "127.0.0.1:1",
        "[::1]",
        "[::1]:11435",
    ],
)
def test_the_daemons_own_names_are_served(daemon: Daemon, host: str) -> None:
    assert say(daemon.port, request("/healthz", host=host)).status == 200


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        "evil.example",
        "evil.example:11435",
        "localhost.evil.example",
        "evil.example.localhost",
        "localhost:evil.example",
        "localhost@evil.example",
        "evil.example@localhost",
        "localhost:1:2",
        "localhost..",
        "127.0.0.1.evil.example",
        "127.0.0.2",
        "0.0.0.0",
        "::1",
        "[::1]evil.example",
        "[::1",
        "[::2]",
        "local host",
        "localhost, evil.example",
        "locallhost",
        "lo\xe7alhost",
    ],
)
def test_any_other_host_is_refused_even_on_healthz_and_with_the_key(daemon: Daemon, host: str | None) -> None:
    for path, header in (("/healthz", "Accept: */*"), (f"{COMPUTE}/instances", f"X-API-Key: {KEY}")):
        answer = say(daemon.port, request(path, header, host=host))
        assert answer.status in {400, 403}
        if answer.status == 403:
            assert answer.error["code"] == "host_not_allowed"


def test_a_second_host_is_refused_in_whatever_order(daemon: Daemon) -> None:
    for one, other in (
        ("localhost", "evil.example"),
        ("evil.example", "localhost"),
        ("localhost", "localhost"),
    ):
        answer = say(daemon.port, request("/healthz", f"Host: {other}", host=one))
        assert answer.status in {400, 403}


@pytest.mark.parametrize(
    "origin", ["http://localhost:3000", "http://127.0.0.1", "https://localhost:8443", "http://[::1]:1"]
)
def test_a_page_of_this_machine_may_use_models_and_control_nothing(daemon: Daemon, origin: str) -> None:
    headers = (f"Origin: {origin}", f"X-API-Key: {KEY}")
    assert say(daemon.port, request("/api/version", *headers)).status == 200
    answer = say(daemon.port, request(f"{COMPUTE}/instances/cpu/stop", *headers, method="POST"))
    assert (answer.status, answer.error["code"]) == (403, "origin_not_allowed")


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_page_that_comes_from_the_daemon_may_control_it(daemon: Daemon, scheme: str) -> None:
    here = f"LocalHost:{daemon.port}"
    headers = (f"Origin: {scheme}://{here.lower()}", f"X-API-Key: {KEY}")
    asked = request(f"{COMPUTE}/reap?dry_run=true", *headers, "Content-Length: 0", method="POST", host=here)
    assert say(daemon.port, asked, end=False).status == 200


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "http://evil.example",
        "https://localhost.evil.example",
        "http://localhost@evil.example",
        "http://localhost:x@evil.example",
        "http://localhost:80/",
        "file://localhost",
        "localhost",
        "http://",
        "http://[",
        "http://[::1",
        "http://\xff",
    ],
)
def test_a_page_of_another_origin_is_refused(daemon: Daemon, origin: str) -> None:
    headers = (f"Origin: {origin}", f"X-API-Key: {KEY}")
    answer = say(daemon.port, request(f"{COMPUTE}/reap", *headers, method="POST"))
    assert (answer.status, answer.error["code"]) == (403, "origin_not_allowed")


def test_no_answer_lets_other_origins_read_it(daemon: Daemon) -> None:
    answer = daemon.call(
        "OPTIONS",
        "instances",
        headers={
            "X-API-Key": KEY,
            "Origin": f"http://127.0.0.1:{daemon.port}",
            "Access-Control-Request-Method": "POST",
        },
    )
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.lower().startswith("access-control-")]


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/api/tags", "/api/delete"])
def test_a_browser_learns_that_a_page_of_this_machine_may_use_models(daemon: Daemon, path: str) -> None:
    asking = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    asking |= {"Access-Control-Request-Headers": "x-api-key,content-type"}
    granted = daemon.call("OPTIONS", path, headers=asking)
    assert (granted.status_code, granted.content) == (204, b"")
    assert granted.headers["Access-Control-Allow-Origin"] == "http://localhost:3000"
    assert granted.headers["Access-Control-Allow-Headers"] == "x-api-key,content-type"
    refused = daemon.call("OPTIONS", path, headers={**asking, "Origin": "http://evil.example"})
    assert refused.status_code == 403
    assert "Access-Control-Allow-Origin" not in refused.headers


@pytest.mark.parametrize("headers", [{}, {"X-API-Key": KEY}], ids=["without the key", "with it"])
@pytest.mark.parametrize(("method", "path"), [("GET", "/api/tags"), ("POST", "/api/chat")])
def test_a_page_of_this_machine_can_read_what_models_say(
    daemon: Daemon, method: str, path: str, headers: dict[str, str]
) -> None:
    body: dict[str, str] | None = None if method == "GET" else {}  # which starts nothing
    answer = daemon.call(method, path, json=body, headers={**headers, "Origin": "http://localhost:3000"})
    assert (answer.status_code == 401) == (not headers)
    assert answer.headers["Access-Control-Allow-Origin"] == "http://localhost:3000"
    assert "X-Instance" in answer.headers["Access-Control-Expose-Headers"]
    quiet = daemon.call(method, path, json=body, headers=headers)
    assert not [name for name in quiet.headers if name.lower().startswith("access-control-")]


# --- the size of a body ---------------------------------------------------------------------------


def patch(*headers: str) -> bytes:
    return request(PATCH, f"X-API-Key: {KEY}", "Content-Type: application/json", *headers, method="PATCH")


def chunked(size: int, count: int) -> list[bytes]:
    chunk = f"{size:x}\r\n".encode() + b" " * size + b"\r\n"
    return [patch("Transfer-Encoding: chunked"), *([chunk] * count), b"0\r\n\r\n"]


def test_a_body_of_the_limit_is_read(daemon: Daemon) -> None:
    body = b'{"ttl_s": 900' + b" " * (MOST_BODY_BYTES - 14) + b"}"
    answer = say(daemon.port, patch(f"Content-Length: {len(body)}"), body, end=False)
    assert answer.status == 200
    assert json.loads(answer.body)["id"] == "cpu"


def test_a_declared_body_beyond_the_limit_is_refused_without_reading_it(daemon: Daemon) -> None:
    answer = say(daemon.port, patch(f"Content-Length: {MOST_BODY_BYTES + 1}"), end=False)
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("length", ["9" * 30, "18446744073709551615", "-1", "+5", "0x10", "5 5", "5, 6"])
def test_a_length_that_is_none_is_refused(daemon: Daemon, length: str) -> None:
    assert say(daemon.port, patch(f"Content-Length: {length}"), end=False).status in {400, 413}


def test_a_chunked_body_beyond_the_limit_is_refused(daemon: Daemon) -> None:
    answer = say(daemon.port, *chunked(65_536, 17), end=False)
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")


def test_a_body_that_is_longer_than_declared_is_not_taken_for_more(daemon: Daemon) -> None:
    answer = say(daemon.port, patch("Content-Length: 2"), b"{}" + b"x" * (2 * MOST_BODY_BYTES))
    assert answer.status in {0, 200, 400}, "0: the connection was cut before the answer could be read"
    assert daemon.call("GET", "/healthz").status_code == 200


def test_a_body_that_is_shorter_than_declared_changes_nothing_and_leaves_no_traceback(daemon: Daemon) -> None:
    before = daemon.call("GET", "instances/cpu", headers={"X-API-Key": KEY}).json()
    answer = say(daemon.port, patch("Content-Length: 100"), b'{"ttl_s": 1}')
    assert answer.status in {0, 422}
    assert daemon.call("GET", "instances/cpu", headers={"X-API-Key": KEY}).json() == before
    assert "Traceback" not in daemon.log()


def test_both_lengths_at_once_are_refused(daemon: Daemon) -> None:
    answer = say(
        daemon.port,
        patch("Content-Length: 2", "Transfer-Encoding: chunked"),
        b"2\r\n{}\r\n0\r\n\r\n",
        end=False,
    )
    assert answer.status == 400


# --- who listens where ----------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_listening_beyond_loopback_without_a_key_is_refused(tmp_path: Path, host: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"server": {"host": host}, "state": {"dir": str(tmp_path / "state")}}))
    result = subprocess.run(
        [sys.executable, "-m", "manager", "serve", "--config", str(config)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "server.key_file" in result.stderr
    assert "server.host" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "state").exists()
