"""Access control from outside: the key, the Host, the origin, and the size of a body."""

from __future__ import annotations

import json
import re
import socket
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import yaml

from manager.api.gate import MOST_BODY_BYTES
from tests.api.raw_http import request, say
from tests.support.daemon import COMPUTE, ROOT
from tests.support.fixtures import making_daemons, new_manager_id

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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
        assert answer.json()["error"]["code"] == "unauthorized"
        assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": f"bearer  {KEY} "},
        {"X-API-Key": KEY},
        {"Authorization": "Basic eDp5", "X-API-Key": KEY},
        {"Authorization": "Bearer unused", "X-API-Key": KEY},
        {"Authorization": f"Bearer {KEY}", "X-API-Key": "unused"},
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
    assert (answer.status, answer.error["code"]) == (401, "unauthorized")


def test_the_key_in_the_query_does_not_open(daemon: Daemon) -> None:
    assert daemon.call("GET", f"instances?key={KEY}&api_key={KEY}").status_code == 401


def test_nothing_gets_past_healthz_by_its_name(daemon: Daemon) -> None:
    for path in (
        "/healthz/../readyz",
        "/healthz/%2e%2e/readyz",
        "/Healthz",
        "/healthz%2f..%2freadyz",
        "/healthz%2freadyz",
        "/healthz/readyz",
        "/healthz;/readyz",
        "http://localhost/readyz",
    ):
        assert say(daemon.port, request(path)).status == 401, path


def test_every_spelling_of_healthz_is_healthz(daemon: Daemon) -> None:
    for path in ("/healthz/", "//healthz", "/%68ealthz", "/x/../healthz", "http://localhost/healthz"):
        assert say(daemon.port, request(path)).status == 200, path


def test_neither_keys_nor_guesses_are_logged(daemon: Daemon) -> None:
    daemon.call("GET", f"instances?token={SECRET}", headers={"Authorization": f"Bearer {SECRET}"})
    daemon.call("PATCH", "instances/cpu", data=SECRET, headers={"X-API-Key": KEY})
    log = daemon.log()
    assert KEY not in log
    assert SECRET not in log


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
        "",
        "0.0.0.0",
        "0.0.0.0:11435",
        "127.0.0.2",
        "[::2]",
        "192.0.2.7:11435",
        "box.local",
        "host.docker.internal:11435",
        "evil.example.localhost",
        socket.gethostname(),
    ],
)
def test_names_that_only_this_machine_can_have_are_served(daemon: Daemon, host: str) -> None:
    assert say(daemon.port, request("/healthz", host=host)).status == 200


@pytest.mark.parametrize(
    "host",
    [
        None,
        "evil.example",
        "evil.example:11435",
        "localhost.evil.example",
        "localhost:evil.example",
        "localhost@evil.example",
        "evil.example@localhost",
        "localhost:1:2",
        "localhost..",
        "127.0.0.1.evil.example",
        "::1",
        "[::1]evil.example",
        "[::1",
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


@pytest.mark.parametrize("path", ["/healthz", "/api/tags", "/v1/messages/count_tokens", COMPUTE])
def test_a_request_names_exactly_one_host(daemon: Daemon, path: str) -> None:
    assert say(daemon.port, request(path, host=None)).status == 400
    for one, other in (
        ("localhost", "evil.example"),
        ("evil.example", "localhost"),
        ("localhost", "localhost"),
    ):
        assert say(daemon.port, request(path, f"Host: {other}", host=one)).status == 400


def test_a_load_balancer_may_ask_without_a_host(daemon: Daemon) -> None:
    for headers in (b"", b"Host: localhost\r\n", b"Host: \r\n"):
        assert say(daemon.port, b"GET /healthz HTTP/1.0\r\n" + headers + b"\r\n").status == 200
    assert say(daemon.port, b"GET /healthz HTTP/1.0\r\nHost: evil.example\r\n\r\n").status == 403
    assert say(daemon.port, b"GET /readyz HTTP/1.0\r\n\r\n").status == 401


def test_the_target_in_absolute_form_and_the_host_are_both_checked(daemon: Daemon) -> None:
    for target, host, status in (
        ("http://127.0.0.1:1/healthz", "localhost", 200),
        ("http://evil.example/healthz", "localhost", 403),
        ("http://localhost/healthz", "evil.example", 403),
        ("http://localhost/healthz", None, 400),
        ("http://evil.example@localhost/healthz", "localhost", 400),
        ("ftp://localhost/healthz", "localhost", 400),
    ):
        assert say(daemon.port, request(target, host=host)).status == status, (target, host)


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


@pytest.mark.parametrize(
    "origin",
    ["app://obsidian.md", "tauri://localhost", "file://", "vscode-webview://0f4a", "vscode-file://vscode-app",
     "http://0.0.0.0:3000"],
)  # fmt: skip
def test_the_origins_that_ollama_allows_may_use_models_and_control_nothing(
    daemon: Daemon, origin: str
) -> None:
    page = {"Origin": origin, "X-API-Key": KEY}
    asking = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    assert daemon.call("GET", "/api/version", headers=page).status_code == 200
    granted = daemon.call("OPTIONS", "/api/chat", headers=asking)
    assert (granted.status_code, granted.headers["Access-Control-Allow-Origin"]) == (204, origin)
    assert daemon.call("GET", "instances", headers=page).status_code == 403


def test_no_page_can_be_shown_in_a_frame(daemon: Daemon) -> None:
    headers = {"X-API-Key": KEY}
    page = daemon.call("GET", "/docs", headers=headers)
    assert page.headers["Content-Type"].startswith("text/html")
    assert page.headers["Content-Security-Policy"] == "frame-ancestors 'none'"
    assert page.headers["X-Frame-Options"] == "DENY"
    assert "X-Frame-Options" not in daemon.call("GET", "/openapi.json", headers=headers).headers


# --- what is written down of it -------------------------------------------------------------------


def test_refusals_are_logged_with_the_address_and_counted(daemon: Daemon) -> None:
    def counts() -> dict[str, float]:
        text = daemon.call("GET", "/metrics", headers={"X-API-Key": KEY}).text
        found = re.findall(r'^ollama_manager_refusals_total\{reason="(\w+)"\} (\S+)', text, re.MULTILINE)
        return {reason: float(count) for reason, count in found}

    before = counts()
    for _ in range(20):
        daemon.call("GET", "instances", headers={"X-API-Key": SECRET})
        daemon.call("POST", "/api/pull", headers={"X-API-Key": SECRET})
    daemon.call("GET", "/api/tags")
    say(daemon.port, request("/healthz", host="evil.example"))
    after = counts()
    grown = {reason: after[reason] - before[reason] for reason in after if after[reason] != before[reason]}
    assert grown == {"key_wrong": 40, "key_missing": 1, "host_not_allowed": 1}
    lines = [line for line in daemon.log().splitlines() if '"refused"' in line]
    assert lines
    assert all("127.0.0.1" in line for line in lines)
    assert SECRET not in daemon.log()


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
