"""The adapter against an engine that answers wrong: whatever comes back ends as an `EngineError`."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
import time
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pytest

from manager.adapters.docker_engine import DockerEngine
from manager.domain.container import LABEL_INSTANCE, container_request
from manager.domain.instance import DeviceKind
from manager.domain.template import Template
from manager.errors import (
    ArchiveTooLargeError,
    ContainerGoneError,
    EngineError,
    EngineUnreachableError,
    NoDescriptorForEngineError,
    Reason,
)
from tests.support.sockets import no_descriptors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

# What the SDK had open when an answer made no sense to it is closed when it is collected, not before.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

ID = "0123456789abcdef" * 4
TIMEOUT_S = 5.0
BEGIN = datetime(2026, 8, 1, tzinfo=UTC)
SHORT_S = 0.3
REQUEST = container_request(
    Template(image="ollama/ollama:1", device=DeviceKind.CPU),
    manager_id="m",
    instance_id="cpu",
    gpu=None,
    loopback_port=None,
)
GPU_REQUEST = container_request(
    Template(image="ollama/ollama:1", device=DeviceKind.GPU),
    manager_id="m",
    instance_id="gpu0",
    gpu="GPU-1",
    loopback_port=None,
)

Calls = dict[str, "Callable[[DockerEngine], Awaitable[Any]]"]


async def _drained(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


CALLS: Calls = {
    "ping": lambda engine: engine.ping(TIMEOUT_S),
    "info": lambda engine: engine.info(),
    "list": lambda engine: engine.list_containers("m"),
    "inspect": lambda engine: engine.inspect(ID),
    "create": lambda engine: engine.create(REQUEST),
    "create with a card": lambda engine: engine.create(GPU_REQUEST),
    "start": lambda engine: engine.start(ID),
    "signal": lambda engine: engine.signal(ID, "SIGTERM"),
    "remove": lambda engine: engine.remove(ID),
    "logs": lambda engine: engine.logs(ID, 10),
    "counters": lambda engine: engine.counters(ID),
    "has_volume": lambda engine: engine.has_volume("models"),
    "read_archive": lambda engine: engine.read_archive(ID, "/root/.ollama", 1000),
    "has_network": lambda engine: engine.has_network("net"),
    "ensure_network": lambda engine: engine.ensure_network("net"),
    "connect": lambda engine: engine.connect(ID, "net"),
    "logs_between": lambda engine: engine.logs_between(ID, BEGIN, BEGIN),
    "has_image": lambda engine: engine.has_image("ollama/ollama:1"),
    "events": lambda engine: _drained(engine.events("m", lambda: None)),
    "pull": lambda engine: _drained(engine.pull("ollama/ollama:1")),
    "follow_logs": lambda engine: _drained(engine.follow_logs(ID, 10)),
}
every_call = pytest.mark.parametrize("call", CALLS)


class Answers(ThreadingHTTPServer):
    """An engine that is asked its version, and gives one answer to everything else."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.version: bytes = b'{"ApiVersion": "1.41"}'
        self.status = 200
        self.body = b""
        self.silent = False
        self.headers: dict[str, str] = {}
        self.asked: list[str] = []
        self.bodies: list[bytes] = []
        self.queries: list[str] = []
        self.done = Event()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Answers

    def do_GET(self) -> None:
        self.server.bodies.append(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        self.server.asked.append(f"{self.command} {self.path.partition('?')[0]}")
        self.server.queries.append(self.path.partition("?")[2])
        if self.path == "/version":
            self._send(200, self.server.version)
            return
        if self.server.silent:
            self.server.done.wait(10)
            self.close_connection = True  # the end of the connection ends a stream that waits
            return
        self._send(self.server.status, self.server.body)

    do_POST = do_DELETE = do_GET  # noqa: N815 - the names that the base class looks for

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        if status == 200 and self.path.startswith(("/v1.41/events", "/v1.41/images/create")):
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002


@asynccontextmanager
async def talking(timeout_s: float = TIMEOUT_S) -> AsyncIterator[tuple[DockerEngine, Answers]]:
    with Answers() as server:
        serving = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        engine = DockerEngine(server.url, timeout_s)
        try:
            yield engine, server
        finally:
            server.done.set()
            engine.close()
            server.shutdown()
            serving.join()


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_left_for_others() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("docker-"):
            thread.join(10)
    gc.collect()


@every_call
async def test_a_refusal_of_any_call_is_an_engine_error_in_the_engine_s_words(call: str) -> None:
    async with talking() as (engine, server):
        for status in (400, 403, 418, 500, 503):
            server.status, server.body = refused(status, "it will not be")
            with pytest.raises(EngineError, match="it will not be") as caught:
                await CALLS[call](engine)
            assert not isinstance(caught.value, EngineUnreachableError)


NO_ANSWERS = (
    b"",
    b"not JSON",
    b"null",
    b"7",
    b'"text"',
    b"[7]",
    b"[null]",
    b"{}",
    b'{"Id": null}',
    b"\xff\xfe",
)


@every_call
async def test_an_answer_that_is_none_ends_in_nothing_but_an_engine_error(call: str) -> None:
    async with talking() as (engine, server):
        for server.body in NO_ANSWERS:
            with suppress(EngineError):  # some of them are an answer to some calls
                await CALLS[call](engine)


@every_call
async def test_a_silent_engine_is_unreachable_at_the_deadline(call: str) -> None:
    if call in ("events", "pull"):
        return  # streams have no deadline: they are silent for as long as nothing happens
    async with talking(SHORT_S) as (engine, server):
        server.silent = True
        began = time.monotonic()
        with pytest.raises(EngineUnreachableError, match=r"(did|does) not answer"):
            await (engine.ping(SHORT_S) if call == "ping" else CALLS[call](engine))
        assert time.monotonic() - began < SHORT_S + 2


@every_call
async def test_an_engine_that_is_not_there_is_unreachable_and_the_cause_is_named(call: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(EngineUnreachableError, match="Connection refused"):
        await CALLS[call](DockerEngine(f"http://127.0.0.1:{port}", TIMEOUT_S))


@pytest.mark.parametrize(
    "version", [b"{}", b"null", b"nothing", b'{"ApiVersion": 7}', b'{"ApiVersion": "1.1"}']
)
async def test_a_server_that_is_no_engine_is_no_engine(version: bytes) -> None:
    async with talking() as (engine, server):
        server.version, server.status = version, 404
        with pytest.raises(EngineError):
            await engine.ping(TIMEOUT_S)


def refused(status: int, message: str) -> tuple[int, bytes]:
    return status, json.dumps({"message": message}).encode()


async def test_what_is_gone_already_was_removed_and_stopped() -> None:
    async with talking() as (engine, server):
        server.status, server.body = refused(404, f"No such container: {ID}")
        await engine.remove(ID)
        await engine.signal(ID, "SIGKILL")
        assert await engine.inspect(ID) is None
        server.status, server.body = refused(409, f"removal of container {ID} is already in progress")
        await engine.remove(ID)
        server.status, server.body = refused(
            409, f"Cannot kill container: {ID}: Container {ID} is not running"
        )
        await engine.signal(ID, "SIGKILL")


async def test_an_image_is_missing_only_when_the_engine_says_so() -> None:
    async with talking() as (engine, server):
        server.status, server.body = refused(404, "No such image: ollama/ollama:1")
        assert await engine.has_image("ollama/ollama:1") is False
        server.status, server.body = refused(500, "layer does not exist")
        with pytest.raises(EngineError):
            await engine.has_image("ollama/ollama:1")


async def test_a_volume_is_missing_only_when_the_engine_says_so() -> None:
    async with talking() as (engine, server):
        server.status, server.body = refused(404, "get models: no such volume")
        assert await engine.has_volume("models") is False
        server.status, server.body = 200, b'{"Name": "models"}'
        assert await engine.has_volume("models") is True
        assert server.asked[-1].endswith("/volumes/models")


@pytest.mark.parametrize(
    "said",
    [
        "Could not find the file /root/.ollama/models/manifests in container 0123",
        "No such container:path: 0123:/root/.ollama/models/manifests",
        'lstat "/root/.ollama/models/manifests": no such file or directory',
    ],
)
async def test_a_path_that_is_not_in_a_container_is_none(said: str) -> None:
    async with talking() as (engine, server):
        server.status, server.body = refused(404, said)
        assert await engine.read_archive(ID, "/root/.ollama/models/manifests", 1000) is None
        server.status, server.body = refused(404, f"No such container: {ID}")
        with pytest.raises(ContainerGoneError):
            await engine.read_archive(ID, "/root/.ollama/models/manifests", 1000)


async def test_an_archive_has_what_the_engine_says_of_its_path_and_a_bound() -> None:
    async with talking() as (engine, server):
        server.body, server.headers = b"t" * 1000, {"X-Docker-Container-Path-Stat": "e30="}
        assert await engine.read_archive(ID, "/x y", 1000) == (b"t" * 1000, "e30=")
        server.headers = {}
        assert await engine.read_archive(ID, "/x", 1000) == (b"t" * 1000, "")
        server.body += b"t"
        with pytest.raises(ArchiveTooLargeError, match="more than 1000 bytes"):
            await engine.read_archive(ID, "/x", 1000)
        server.body = b'{"ServerVersion": "28.2.2"}' + b" " * 2000
        assert (await engine.info()).version == "28.2.2", "the bound is that of one call"


async def test_containers_are_listed_by_the_label_that_is_asked_for() -> None:
    async with talking() as (engine, server):
        server.body = b"[]"
        await engine.list_containers("m")
        await engine.list_containers("m", label="ollama-manager.reader")
        first, second = (unquote(query) for query in server.queries)
        assert '"ollama-manager.manager=m"' in first
        assert '"ollama-manager.reader=m"' in second


async def test_a_network_of_a_similar_name_is_another_one() -> None:
    async with talking() as (engine, server):
        server.body = b'[{"Name": "net-2"}, {"Name": "my-net"}]'
        assert await engine.has_network("net") is False
        server.body = b'[{"Name": "net-2"}, {"Name": "net"}]'
        assert await engine.has_network("net") is True
        await engine.ensure_network("net")
        assert not any(asked.startswith("POST") for asked in server.asked)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (409, "network with name net already exists"),
        (500, "network name net already used: network already exists"),  # Podman 4.3
    ],
)
async def test_a_network_that_somebody_else_was_quicker_to_create_is_there(status: int, said: str) -> None:
    async with talking() as (engine, server):
        server.body = b"[]"
        handler = _Handler.do_GET

        def conflict(self: _Handler) -> None:
            if self.command == "POST":
                server.status, server.body = refused(status, said)
            handler(self)

        _Handler.do_POST = conflict
        try:
            await engine.ensure_network("net")
        finally:
            _Handler.do_POST = handler
        assert server.asked[-1].endswith("/networks/create")


def podman(version: str) -> bytes:
    components = [{"Name": "Podman Engine", "Version": version}]
    return json.dumps({"ApiVersion": "1.41", "Components": components}).encode()


async def test_podman_is_asked_for_a_card_by_its_cdi_name_and_docker_by_its_id() -> None:
    async with talking() as (engine, server):
        server.body = b'{"Id": "1"}'
        for version, device in (
            (podman("5.4.0"), ("cdi", ["nvidia.com/gpu=GPU-1"])),
            (b'{"ApiVersion": "1.41"}', ("nvidia", ["GPU-1"])),
        ):
            server.version = version
            await engine.create(GPU_REQUEST)
            (request,) = json.loads(server.bodies[-1])["HostConfig"]["DeviceRequests"]
            assert (request["Driver"], request["DeviceIDs"]) == device


@pytest.mark.parametrize("version", ["4.3.1", "5.3.2"])
async def test_a_podman_that_would_start_a_container_without_its_card_is_not_asked_to(version: str) -> None:
    async with talking() as (engine, server):
        server.version, server.body = podman(version), b'{"Id": "1"}'
        with pytest.raises(EngineError, match=r"gives no GPU .* Podman 5\.4 or newer") as caught:
            await engine.create(GPU_REQUEST)
        assert caught.value.reason is Reason.GPU_MISSING
        assert not any(asked.startswith("POST") for asked in server.asked)
        await engine.create(REQUEST)  # one on the CPU needs no card


async def test_the_engine_s_kind_is_told() -> None:
    async with talking() as (engine, server):
        server.body = b'{"ServerVersion": "5.8.6"}'
        assert (await engine.info()).podman is False
        server.version = podman("5.8.6")
        assert (await engine.info()).podman is True
        server.version = b"[]"
        with pytest.raises(EngineError):
            await engine.info()


async def test_the_lack_of_a_descriptor_is_no_fault_of_the_engine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        engine = DockerEngine(f"http://127.0.0.1:{listener.getsockname()[1]}", TIMEOUT_S)
        with no_descriptors(), pytest.raises(NoDescriptorForEngineError) as caught:
            await engine.ping(TIMEOUT_S)
    assert (caught.value.reason, caught.value.retry_after_s) == (Reason.OVERLOADED, 1)


async def test_events_of_instances_are_passed_on_and_others_left_out() -> None:
    event = {"Type": "container", "Action": "die", "Actor": {"ID": ID, "Attributes": {LABEL_INSTANCE: "cpu"}}}
    opened: list[bool] = []
    async with talking() as (engine, server):
        server.body = b"\n".join(json.dumps(entry).encode() for entry in ({"Type": "image"}, event))
        (found,) = await _drained(engine.events("m", lambda: opened.append(True)))
        assert (found.action, found.container_id, found.instance) == ("die", ID, "cpu")
        assert opened == [True]
        server.status, server.body = refused(403, "Forbidden")
        with pytest.raises(EngineError, match="Forbidden"):
            await _drained(engine.events("m", lambda: opened.append(True)))
        assert opened == [True]


async def test_a_pull_that_fails_half_way_tells_what_came_before_and_then_why() -> None:
    lines = [{"status": "Pulling"}, {"error": "unexpected EOF"}]
    async with talking() as (engine, server):
        server.body = b"\r\n".join(json.dumps(line).encode() for line in lines)
        progress = engine.pull("ollama/ollama:1")
        assert (await anext(progress)).status == "Pulling"
        with pytest.raises(
            EngineError, match=r"ollama/ollama:1 could not be pulled: unexpected EOF"
        ) as caught:
            await anext(progress)
    assert caught.value.reason is Reason.IMAGE_MISSING


async def test_a_caller_who_gives_up_leaves_the_adapter_usable() -> None:
    async with talking() as (engine, server):
        server.silent = True
        call = asyncio.create_task(engine.info())
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait({call})
        server.done.set()
        server.silent = False
        server.body = b'{"ServerVersion": "28.2.2"}'
        assert (await engine.info()).version == "28.2.2"


async def test_a_bind_that_was_moved_since_it_was_checked_is_not_created(tmp_path: Path) -> None:
    directory = tmp_path / "models" / "real"
    directory.mkdir(parents=True)
    request = container_request(
        Template.model_validate(
            {
                "image": "ollama/ollama:1",
                "device": "cpu",
                "volumes": [{"source": f"{directory}/below", "target": "/models"}],
            }
        ),
        manager_id="m",
        instance_id="cpu",
        gpu=None,
        loopback_port=None,
    )
    engine = DockerEngine(f"unix://{tmp_path}/none.sock", SHORT_S)
    with pytest.raises(EngineUnreachableError):  # it was asked
        await engine.create(request)
    (directory / "below").mkdir()
    with pytest.raises(EngineUnreachableError):
        await engine.create(request)
    (directory / "below").rmdir()
    for planted in (directory / "below", directory):
        if planted == directory:
            (directory / "below").unlink()
            directory.rmdir()
        planted.symlink_to("/etc")
        with pytest.raises(EngineError, match=r"below leads to /etc") as caught:
            await engine.create(request)
        assert not isinstance(caught.value, EngineUnreachableError)
    engine.close()


@every_call
async def test_a_lack_of_descriptors_is_named_and_is_no_fault_of_the_engine(call: str) -> None:
    if call in ("events", "pull", "follow_logs"):
        pytest.skip("a thread of the SDK connects; the ping says why")
    engine = DockerEngine("unix:///nonexistent/engine.sock", TIMEOUT_S)
    with no_descriptors(), pytest.raises(EngineUnreachableError) as caught:
        await CALLS[call](engine)
    engine.close()
    assert caught.value.reason is Reason.OVERLOADED
    assert "no file descriptor left" in caught.value.message
