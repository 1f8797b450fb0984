"""A daemon is replaced while it serves, and no client notices."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from manager.cli.failures import FAILED, MISUSED
from tests.support.daemon import ROOT, wait_for
from tests.support.fixtures import write_templates
from tests.support.replacing import Replaceable, processes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

    import requests

    from tests.support.daemon import Daemon
    from tests.support.fixtures import NewDaemon
    from tests.support.nursery import Process

__all__ = ["processes"]

TOKENS = 120
SLOW = {"OLLAMA_SIM_TOKENS": str(TOKENS), "OLLAMA_SIM_TOKENS_PER_S": "40"}
KEPT, PER_S, STREAMS, TIMES = 10, 200, 20, 10


@dataclass
class Load:
    """What clients got. A failure is an answer that is not whole, of whatever reason."""

    port: int
    answered: int = 0
    streamed: int = 0
    failures: list[str] = field(default_factory=list)
    over: bool = False
    longest_s: float = 0.0

    async def keep_asking(self, every_s: float) -> None:
        """A client with one connection, which it opens anew only when the server has said that it closes."""
        while not self.over:
            async with connected(self.port) as (reader, writer):
                closes = False
                while not self.over and not closes:
                    began = time.monotonic()
                    closes = await self._guarded(self._ask(reader, writer))
                    self.longest_s = max(self.longest_s, time.monotonic() - began)
                    await asyncio.sleep(max(0.0, began + every_s - time.monotonic()))

    async def keep_connecting(self, every_s: float) -> None:
        while not self.over:
            began = time.monotonic()
            async with connected(self.port) as (reader, writer):
                await self._guarded(self._ask(reader, writer))
            await asyncio.sleep(max(0.0, began + every_s - time.monotonic()))

    async def keep_streaming(self) -> None:
        while not self.over:
            async with connected(self.port) as (reader, writer):
                await self._guarded(self._stream(reader, writer))

    async def _guarded(self, work: Any) -> bool:
        try:
            async with asyncio.timeout(30):
                closes: bool = await work
                return closes
        except (OSError, EOFError, TimeoutError, AssertionError) as error:
            self.failures.append(f"{type(error).__name__}: {error}")
            return True

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        # One goes through the relay and one through the control API's server.
        path = ("/api/generate", "/api/show")[self.answered % 2]
        options = {"num_predict": 1}
        writer.write(post(path, {"model": "tiny", "prompt": "hi", "stream": False, "options": options}))
        status, headers = await head_of(reader)
        body = await body_of(reader, headers)
        assert status == 200, body
        assert json.loads(body)
        self.answered += 1
        return headers.get("connection", "").lower() == "close"

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(post("/api/generate", {"model": "tiny", "prompt": "hi"}))
        status, headers = await head_of(reader)
        lines = [json.loads(line) for line in (await body_of(reader, headers)).splitlines()]
        assert status == 200, lines
        assert lines[-1]["done"] is True, lines[-1]
        assert len(lines) > TOKENS / 2
        self.streamed += 1
        return True


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


def post(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


async def head_of(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    pairs = (line.partition(":") for line in head[1:] if line)
    return int(head[0].split()[1]), {name.lower(): value.strip() for name, _, value in pairs}


async def body_of(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> bytes:
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    body = b""
    while size := int(await reader.readline(), 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readexactly(2)
    return body


async def under_load(one: Replaceable, times: int) -> tuple[Load, list[Process]]:
    load = Load(one.daemon.port)
    old: list[Process] = []
    async with asyncio.TaskGroup() as tasks:
        for _ in range(KEPT):
            tasks.create_task(load.keep_asking(2 * KEPT / PER_S))
            tasks.create_task(load.keep_connecting(2 * KEPT / PER_S))
        for _ in range(STREAMS):
            tasks.create_task(load.keep_streaming())
        while len(old) < times and not load.failures:
            before = load.answered
            old.append(await asyncio.to_thread(one.replace))
            await asyncio.to_thread(
                wait_for, lambda wanted=before + PER_S: load.answered >= wanted or load.failures
            )
        load.over = True
    return load, old


def test_no_request_is_lost_in_ten_replacements(new_daemon: NewDaemon, processes: list[Process]) -> None:
    daemon = new_daemon(templates={"sim": {"env": SLOW}}).start()
    daemon.started("cpu")
    load, old = asyncio.run(under_load(Replaceable(daemon, processes), TIMES))
    assert load.failures == []
    assert load.streamed >= STREAMS
    assert load.answered >= TIMES * PER_S
    for process in old:
        assert process.wait(timeout=30) == 0
    assert daemon.instance("cpu")["starts"] == 1
    assert daemon.instance("cpu")["phase"] == "ready"
    assert "Traceback" not in daemon.log()
    assert load.longest_s < 10
    assert daemon.stop(signal.SIGTERM) == 0


def ask(daemon: Daemon, path: str = "/api/show", **options: Any) -> requests.Response:
    return daemon.call("POST", path, json={"model": "tiny"}, **options)


def test_where_no_daemon_runs_there_is_nothing_to_replace(new_daemon: NewDaemon) -> None:
    daemon = new_daemon().start(arguments=("--replace",))
    assert daemon.started("cpu")["phase"] == "ready"


def test_a_start_under_way_ends_before_the_daemon_gives_way(
    new_daemon: NewDaemon, processes: list[Process]
) -> None:
    daemon = new_daemon(templates={"sim": {"env": {"OLLAMA_SIM_START_DELAY_S": "2"}}}).start()
    with ThreadPoolExecutor() as pool:
        starting = pool.submit(daemon.begin, "cpu", "start")
        daemon.wait_for_phase("cpu", "starting")
        old = Replaceable(daemon, processes).replace()
        answer = starting.result()
    assert answer.status_code == 200, answer.text
    assert old.wait(timeout=30) == 0
    assert daemon.wait_for_phase("cpu", "ready")["starts"] == 1


def test_a_daemon_that_cannot_serve_replaces_none(new_daemon: NewDaemon, processes: list[Process]) -> None:
    daemon = new_daemon().start()
    daemon.started("cpu")
    old = daemon.process
    assert old is not None
    processes.append(old)
    daemon.configure({**daemon.config, "instances": {"cpu": {"template": "missing"}}})
    daemon.start(arguments=("--replace",), until_ready=False)
    assert daemon.wait_until_dead() == MISUSED
    assert "missing" in daemon.log()
    daemon.process = old
    assert daemon.instance("cpu")["phase"] == "ready"
    daemon.configure(daemon.config)
    assert Replaceable(daemon, processes).replace() is old


def test_a_daemon_with_another_state_directory_replaces_none(new_daemon: NewDaemon) -> None:
    first = new_daemon().start()
    second = new_daemon(name="second").start(arguments=("--replace",), until_ready=False)
    assert second.wait_until_dead() == FAILED
    assert str(first.state_dir) in second.log()
    assert first.get("instances")


def test_a_daemon_serves_again_when_its_successor_dies(
    new_daemon: NewDaemon, processes: list[Process]
) -> None:
    daemon = new_daemon().start()
    daemon.started("cpu")
    old = daemon.process
    assert old is not None
    processes.append(old)
    daemon.start(arguments=("--replace",), until_ready=False)
    new = daemon.process
    assert new is not None
    wait_for(lambda: '"replaced"' in daemon.log())
    new.kill()
    new.wait()
    daemon.process = old
    wait_for(lambda: '"not_replaced"' in daemon.log())
    assert ask(daemon).status_code == 200
    assert daemon.wait_for_phase("cpu", "ready")["starts"] == 1
    assert Replaceable(daemon, processes).replace() is old


def test_an_answer_of_the_old_daemon_keeps_its_container_from_being_recreated(
    new_daemon: NewDaemon, processes: list[Process]
) -> None:
    slow = {"OLLAMA_SIM_TOKENS": "320", "OLLAMA_SIM_TOKENS_PER_S": "40"}
    daemon = new_daemon(templates={"sim": {"env": slow}}).start()
    before = daemon.started("cpu")
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(daemon.call, "POST", "/api/generate", json={"model": "tiny", "prompt": "hi"})
        wait_for(lambda: daemon.instance("cpu")["in_flight"] == 1)
        write_templates(daemon.home / "templates", {"sim": {"env": {**slow, "OLLAMA_DEBUG": "1"}}})
        old = Replaceable(daemon, processes).replace()
        adopted = daemon.wait_for_phase("cpu", "ready")
        assert adopted["container"]["id"] == before["container"]["id"]
        assert not answer.done()
        lines = answer.result().text.splitlines()
    assert json.loads(lines[-1])["done"] is True
    assert old.wait(timeout=30) == 0
    wait_for(
        lambda: daemon.instance("cpu"),
        lambda one: one["phase"] == "ready" and one["container"]["id"] != before["container"]["id"],
    )


def test_a_stop_and_a_drain_in_the_new_daemon_wait_for_the_answers_of_the_old_one_on_that_instance(
    new_daemon: NewDaemon, processes: list[Process]
) -> None:
    slow = {"OLLAMA_SIM_TOKENS": "600", "OLLAMA_SIM_TOKENS_PER_S": "40"}
    two = {"cpu": {"template": "sim"}, "other": {"template": "sim"}}
    daemon = new_daemon(instances=two, templates={"sim": {"env": slow}}).start()
    for id_ in two:
        daemon.started(id_)
    hi = {"model": "tiny", "prompt": "hi"}
    to_cpu = {"X-Instance": "cpu"}
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(daemon.call, "POST", "/api/generate", json=hi, headers=to_cpu)
        wait_for(lambda: daemon.instance("cpu")["in_flight"] == 1)
        old = Replaceable(daemon, processes).replace()
        daemon.wait_for_phase("cpu", "ready")
        assert daemon.instance("cpu")["in_flight"] == 1
        daemon.wait_for_phase("other", "ready")
        assert daemon.begin("other", "drain").status_code == 200  # nothing is open there
        assert not answer.done()
        assert daemon.stopped("cpu")["phase"] == "stopped"
        lines = answer.result(timeout=1).text.splitlines()
    assert json.loads(lines[-1])["done"] is True
    assert old.wait(timeout=30) == 0


def test_what_a_client_has_sent_of_its_next_request_moves_too(
    new_daemon: NewDaemon, processes: list[Process]
) -> None:
    daemon = new_daemon(templates={"sim": {"env": SLOW}}).start()
    daemon.started("cpu")
    address = ("127.0.0.1", daemon.port)
    with socket.create_connection(address, timeout=30) as client, client.makefile("rb") as answers:
        client.sendall(post("/api/generate", {"model": "tiny", "prompt": "hi", "stream": False}))
        client.sendall(post("/api/show", {"model": "tiny"}) * 3)
        old = Replaceable(daemon, processes).replace()
        for _ in range(4):
            assert answers.readline() == b"HTTP/1.1 200 OK\r\n"
            headers = http.client.parse_headers(answers)
            length = headers["content-length"]
            if length is not None:
                assert json.loads(answers.read(int(length)))
                continue
            while size := int(answers.readline(), 16):
                answers.read(size + 2)
            answers.readline()
    assert old.wait(timeout=30) == 0


def test_a_replacement_that_fails_leaves_clients_and_settings_as_they_were(
    new_daemon: NewDaemon, processes: list[Process]
) -> None:
    daemon = new_daemon().start()
    old = daemon.process
    assert old is not None
    processes.append(old)
    daemon.configure({**daemon.config, "server": {"allowed_hosts": ["new.example"]}})
    old.send_signal(signal.SIGHUP)
    wait_for(lambda: '"reloaded"' in daemon.log())
    kept = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=30)

    def ask_again() -> int:
        kept.request("GET", "/api/version", headers={"Host": "new.example"})
        answer = kept.getresponse()
        answer.read()
        kept.auto_open = 0  # from here on it is this one connection
        return answer.status

    assert ask_again() == 200
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        daemon.start(arguments=("--replace", "--port", str(port)), until_ready=False)
        assert daemon.wait_until_dead() == FAILED
    assert ask_again() == 200
    daemon.process = old
    wait_for(lambda: '"not_replaced"' in daemon.log())
    assert ask_again() == 200
    kept.close()
    # A signal to end holds also where the successor dies afterwards.
    daemon.start(arguments=("--replace",), until_ready=False)
    new = daemon.process
    assert new is not None
    wait_for(lambda: daemon.log().count('"replaced"') == 2)
    new.send_signal(signal.SIGSTOP)
    old.send_signal(signal.SIGTERM)
    wait_for(lambda: '"ending"' in daemon.log())
    new.kill()
    new.wait()
    assert old.wait(timeout=30) == 0
    daemon.process = None


def test_a_listener_of_systemd_is_used(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    with socket.create_server(("127.0.0.1", daemon.port)) as listener:
        # A connection from before the daemon: it waits in the listener.
        with socket.create_connection(("127.0.0.1", daemon.port), timeout=30) as early:
            early.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            with passed(daemon, listener.fileno()):
                assert early.recv(100).startswith(b"HTTP/1.1 200")
                assert daemon.get("instances")
        assert listener.getsockname()[1] == daemon.port


def test_a_listener_with_another_address_is_refused(new_daemon: NewDaemon) -> None:
    daemon = new_daemon()
    with socket.create_server(("127.0.0.1", 0)) as listener, passed(daemon, listener.fileno()) as process:
        assert process.wait(timeout=30) == FAILED
    assert f"server.port, {daemon.url}" in daemon.log()


@contextmanager
def passed(daemon: Daemon, descriptor: int) -> Iterator[Process]:
    """The daemon, started as systemd starts it."""
    command = f'exec 3<&{descriptor}; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
    program = [sys.executable, "-m", "manager", "serve", "--config", str(daemon.config_file)]
    with daemon.log_file.open("ab") as log:
        process = subprocess.Popen(
            ["bash", "-c", command, "bash", *program],
            cwd=ROOT,
            env=daemon.environment,
            pass_fds=[descriptor],
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=30)
