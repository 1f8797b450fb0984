"""Descriptors are finite: `/healthz` and keyed requests are served all the same, and the log says so."""

from __future__ import annotations

import asyncio
import json
import resource
import select
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests

from tests.relay.test_observability import begins
from tests.support.daemon import wait_for
from tests.support.relaying import Scripted
from tests.support.serving import LIMIT_S, Serving, serving

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

KEY = "a-key-of-16-characters-or-more"
KEYED = f"X-API-Key: {KEY}\r\n"
FEW = (128, 128)
CHAT = b'{"model":"tiny","messages":[]}'


@contextmanager
def daemon(home: Path, **more: Any) -> Iterator[Serving]:
    config = {"gateway": {"drain_timeout_s": 0.5}, **more.pop("config", {})}
    with (home / "log").open("wb") as log, serving(home, stderr=log, config=config, **more) as running:
        yield running


def events(home: Path, name: str) -> list[dict[str, Any]]:
    entries = map(json.loads, (home / "log").read_bytes().splitlines())
    return [entry for entry in entries if entry.get("event") == name]


def nothing(client: socket.socket, running: Serving) -> None:
    pass


def half_a_head(client: socket.socket, running: Serving) -> None:
    client.sendall(b"POST /api/chat HTTP/1.1\r\nHost: 127.0")


def no_body(path: str) -> Any:
    def act(client: socket.socket, running: Serving) -> None:
        client.sendall(running.request("POST", path, b"x" * 10)[:-10])

    return act


def a_byte_behind_an_answer(client: socket.socket, running: Serving) -> None:
    client.sendall(running.request("GET", "/healthz") + b"G")


def an_idle_connection(client: socket.socket, running: Serving) -> None:
    client.sendall(running.request("POST", "/api/chat", b'{"model":"unknown"}'))


@pytest.mark.parametrize(
    "act",
    [
        nothing,
        half_a_head,
        no_body("/api/runtime/compute/reap"),
        no_body("/api/chat"),
        a_byte_behind_an_answer,
        an_idle_connection,
    ],
    ids=["nothing", "head", "control", "chat", "byte", "idle"],
)
def test_clients_that_hold_connections_shut_out_nobody(tmp_path: Path, act: Any) -> None:
    with daemon(tmp_path, descriptors=FEW) as running, ExitStack() as held:
        for number in range(300):
            try:
                client = held.enter_context(running.connect())
                act(client, running)
            except ConnectionError:
                continue  # it was closed for one of those behind it
            if number % 50 == 49:
                assert running.is_alive()
        assert running.is_alive()
        # Once they have been quiet for a second, any request is served again.
        wait_for(
            lambda: requests.post(f"{running.url}/api/chat", data=CHAT, timeout=LIMIT_S).status_code,
            lambda status: status == 404,
        )
        assert running.end() == 0
    said = events(tmp_path, "connections_exhausted")
    assert said
    assert said[0]["limit"] < 64
    assert not events(tmp_path, "descriptors_exhausted")


async def streams(running: Serving, count: int, headers: str = "") -> list[asyncio.StreamWriter]:
    """So many streams that have begun and do not end."""

    async def stream() -> asyncio.StreamWriter:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        try:
            writer.write(running.request("POST", "/api/chat", CHAT, headers))
            status = await reader.readline()
            assert b" 200 " in status, status
            await reader.readuntil(b'"done":false')
        except BaseException:
            writer.transport.abort()
            raise
        return writer

    async with asyncio.timeout(LIMIT_S):
        return await asyncio.gather(*(stream() for _ in range(count)))


def with_instance(server: Scripted, **server_settings: Any) -> dict[str, Any]:
    return {
        "instances": {"a": {"driver": "external", "url": server.url}},
        "lifecycle": {"probe_interval_s": 0.2},
        "server": server_settings,
    }


async def until_listed(running: Serving) -> None:
    def listed() -> bool:
        answer = requests.get(f"{running.url}/api/tags", timeout=5, headers={"X-API-Key": KEY})
        return answer.ok and bool(answer.json()["models"])

    await asyncio.to_thread(wait_for, listed, within_s=LIMIT_S)


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """The test itself holds both ends of each connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip(f"the hard limit of descriptors is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_low_soft_limit_does_not_bound_the_streams(tmp_path: Path, many_descriptors: None) -> None:
    async with Scripted().serving() as server:
        server.answer = begins
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        # Server and clients share a loop: 700 clients at once hold up its answers to probes.
        config = {**with_instance(server), "lifecycle": {"probe_interval_s": 10}}
        with daemon(tmp_path, config=config, descriptors=(512, hard)) as running:
            await until_listed(running)
            clients = await streams(running, 700)
            assert server.connections >= 700
            assert await asyncio.to_thread(running.is_alive)
            for client in clients:
                client.transport.abort()
    assert events(tmp_path, "descriptor_limit_raised")[0]["soft"] == 512
    assert not events(tmp_path, "connections_exhausted")


async def test_when_all_connections_are_busy_keyed_requests_and_health_are_served(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "key").chmod(0o600)
    async with Scripted().serving() as server:
        server.answer = begins
        config = with_instance(server, key_file=str(tmp_path / "key"))
        with daemon(tmp_path, config=config, descriptors=FEW) as running:
            await until_listed(running)
            (serving_line,) = events(tmp_path, "serving")
            most = serving_line["most_connections"]
            clients = await streams(running, most, KEYED)

            def status(path: str, headers: dict[str, str] | None = None) -> int:
                url = f"{running.url}{path}"
                with requests.Session() as session:
                    return session.get(url, headers=headers, timeout=LIMIT_S).status_code

            assert await asyncio.to_thread(status, "/healthz") == 200
            assert await asyncio.to_thread(status, "/api/tags", {"X-API-Key": KEY}) == 200
            assert await asyncio.to_thread(status, "/api/tags") == 503
            assert await asyncio.to_thread(status, "/api/tags", {"X-API-Key": "wrong"}) == 503
            # Keyed streams take the privileged places, but not those of /healthz.
            clients += await streams(running, 2, KEYED)
            with pytest.raises(AssertionError, match="503"):
                await streams(running, 1, KEYED)
            assert await asyncio.to_thread(status, "/healthz") == 200
            # What was refused did not disturb what was served, and places are given back.
            assert not any(client.transport.is_closing() for client in clients)
            for client in clients[:3]:
                client.transport.abort()
            await asyncio.to_thread(wait_for, lambda: status("/api/tags") == 401)
            for client in clients:
                client.transport.abort()
            assert running.end() == 0
    (said, *_) = events(tmp_path, "connections_exhausted")
    assert said["limit"] == most


def test_descriptors_that_are_used_up_otherwise_are_logged_and_idle_connections_are_closed(
    tmp_path: Path,
) -> None:
    with daemon(tmp_path, descriptors=(1000, 1000)) as running, ExitStack() as held:
        clients = [held.enter_context(running.connect()) for _ in range(100)]
        assert running.is_alive()  # so those before it have been accepted
        # As many as are open now: accepting fails, as if files or upstream connections had taken the rest.
        limit = len(list(Path(f"/proc/{running.process.pid}/fd").iterdir())) - 50
        resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (limit, 1000))
        # A descriptor that is closed meanwhile leaves a low number free, which these connections take.
        for _ in range(5):
            held.enter_context(running.connect())
        wait_for(lambda: events(tmp_path, "descriptors_exhausted"), within_s=10)
        closed, _, _ = select.select(clients, [], [], 10)
        assert closed
        assert closed[0].recv(1) == b""
        wait_for(running.is_alive, within_s=10)
        assert running.end() == 0
    (said,) = events(tmp_path, "descriptors_exhausted")
    assert said["limit"] == limit
