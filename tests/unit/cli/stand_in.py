"""A daemon as its clients see it: a real HTTP server on loopback that answers what a test tells it to."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

API = "/api/runtime/compute"
CLOSED = {"state": "closed", "failures": 0, "opened_at": None, "retry_at": None, "reason": None}


@dataclass
class Answer:
    """One answer; `body` is JSON, text as it is, or an iterator of parts that are sent one by one.

    A function is called for each answer, and returns such an iterator.
    """

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Seen:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class StandInDaemon:
    """Answers by `answers["GET /path?query"]`; anything else is 404 in the daemon's own shape."""

    def __init__(self, port: int = 0) -> None:
        self.answers: dict[str, Answer] = {}
        self.seen: list[Seen] = []
        self._news = threading.Condition()
        self._sections: dict[str, Any] = {}
        self._revision = 0
        self._is_closed = False
        self._server = _Server(("127.0.0.1", port), self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def has(self, *instances: dict[str, Any]) -> None:
        """Let these be the instances."""
        self.answers[f"GET {API}/instances"] = Answer({"instances": instances, "count": len(instances)})
        for one in instances:
            self.answers[f"GET {API}/instances/{one['id']}"] = Answer(one)
        self.shows(instances=instances)

    def shows(self, **sections: Any) -> None:
        """Let these be sections of the live channel, and send them to who follows it."""
        with self._news:
            self._sections |= sections
            self._revision += 1
            self._news.notify_all()
        self.answers[f"GET {API}/live"] = Answer(
            self._live, headers={"Content-Type": "text/event-stream; charset=utf-8"}
        )

    def _live(self) -> Iterator[str]:
        sent: dict[str, Any] = {}
        yield "retry: 1000\n\n"
        while True:
            with self._news:
                while sent == self._sections and not self._is_closed:
                    self._news.wait()
                if self._is_closed:
                    return
                changed = {name: it for name, it in self._sections.items() if sent.get(name) != it}
                sent = dict(self._sections)
                revision = self._revision
            yield f"data: {json.dumps({'revision': revision, **changed})}\n\n"

    def saw(self, request: Seen) -> None:
        with self._news:
            self.seen.append(request)
            self._news.notify_all()

    def wait_for_request(self, method: str, path: str, *, limit_s: float = 30.0) -> None:
        """Returns once the daemon has been asked this."""

        def asked() -> bool:
            return any((one.method, one.path) == (method, path) for one in self.seen)

        with self._news:
            assert self._news.wait_for(asked, limit_s), f"nobody asked for {method} {path}"

    def hang_up(self) -> None:
        """Cut what is connected now."""
        self._server.hang_up()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._news:
            self._is_closed = True
            self._news.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._server.hang_up()
        self._thread.join()


def instance(instance_id: str, **changes: Any) -> dict[str, Any]:
    """An instance in the shape of the API: a stopped one on the CPU, unless `changes` say otherwise."""
    memory = {"vram_total_bytes": None, "vram_used_bytes": None, "vram_free_bytes": None}
    device = {"kind": "cpu", "uuid": None, "index": None, "name": None, **memory}
    return {
        "id": instance_id,
        "driver": "docker",
        "template": "ollama-cpu",
        "device": device,
        "endpoint": None,
        "target": "stopped",
        "phase": "stopped",
        "health": "unknown",
        "reason": None,
        "in_flight": 0,
        "pinned": False,
        "ttl_s": 900.0,
        "ttl_remaining_s": None,
        "started_at": None,
        "ready_at": None,
        "last_used_at": None,
        "last_seen_at": None,
        "starts": 0,
        "container": None,
        "models": [],
        "breaker": CLOSED,
    } | changes


def ready(instance_id: str, **changes: Any) -> dict[str, Any]:
    running = {"phase": "ready", "target": "running", "health": "healthy", "ttl_remaining_s": 872.0}
    return instance(instance_id, endpoint="http://172.18.0.2:11434", **(running | changes))


def error(code: str, message: str, **details: Any) -> dict[str, Any]:
    return {"error": {"code": code, "message": message} | ({"details": details} if details else {})}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], daemon: StandInDaemon) -> None:
        self.stand_in = daemon
        self._connections: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Cut what is still connected, as a daemon that ends does."""
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._reply()

    def do_DELETE(self) -> None:
        self._reply()

    def do_POST(self) -> None:
        self._reply()

    def do_PUT(self) -> None:
        self._reply()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the name of the base class)
        pass

    def _reply(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.stand_in.saw(Seen(self.command, self.path, dict(self.headers), body))
        unknown = Answer(error("unknown_instance", "there is no such instance; there is: cpu"), 404)
        answer = self.server.stand_in.answers.get(f"{self.command} {self.path}", unknown)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if isinstance(answer.body, str | dict | list):
            text = answer.body if isinstance(answer.body, str) else json.dumps(answer.body)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())
        else:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for part in _parts(answer.body() if callable(answer.body) else answer.body):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.wfile.write(b"0\r\n\r\n")


def _parts(body: Iterable[str]) -> Iterator[bytes]:
    for part in body:
        yield part.encode()
