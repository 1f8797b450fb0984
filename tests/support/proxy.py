"""Between a daemon and its engine: notes every request, and can keep some back."""

from __future__ import annotations

import re
import shutil
import socket
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from types import TracebackType

_FORBIDDEN = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 9\r\nConnection: close\r\n\r\nForbidden"
_REQUEST = re.compile(rb"([A-Z]+) (?:/v[0-9.]+)?(/\S+) HTTP/1\.1\r\n")


class EngineProxy:
    """A context manager that listens on a Unix socket and passes everything on to an engine's.

    Args:
        engine_url: where the engine is.
        address: listen there instead, on a port of TCP, as an engine on another machine does.

    Attributes:
        requests: `METHOD /path` of every request so far, without the version of the API.
        events: what becomes of requests for events from now on: `passed` on, `silent` (the connection stays
            open and nothing comes), or `refused`, as by a proxy that forbids them.
        held: requests whose path ends so are kept back from now on, until `release`.
    """

    def __init__(self, engine_url: str, *, address: str | None = None) -> None:
        self._engine = engine_url.removeprefix("unix://")
        self._directory = Path(tempfile.mkdtemp(prefix="oem-proxy-"))
        if address is None:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(self._directory / "docker.sock"))
            self._listener.listen(64)
            self.url = f"unix://{self._directory}/docker.sock"
        else:
            self._listener = socket.create_server((address, 0))
            self.url = f"tcp://{address}:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self.requests: list[str] = []
        self.events: Literal["passed", "silent", "refused"] = "passed"
        self.held: str | None = None
        self._released = threading.Event()

    def release(self) -> None:
        """Pass on what was kept back, and everything from now on."""
        self.held = None
        self._released.set()

    def count(self, ending: str) -> int:
        """How many requests so far had a path that ends so."""
        return sum(request.partition("?")[0].endswith(ending) for request in self.requests)

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        for connection in (self._listener, *self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        shutil.rmtree(self._directory)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                engine = socket.socket(socket.AF_UNIX)
                engine.connect(self._engine)
            except OSError:
                return
            self._open += [client, engine]
            threading.Thread(target=self._pass_on, args=(client, engine, True), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(engine, client, False), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, is_client: bool) -> None:
        with suppress(OSError):
            while chunk := source.recv(65536):
                request = _REQUEST.match(chunk) if is_client else None
                if request is not None:
                    line = f"{request[1].decode()} {request[2].decode()}"
                    self.requests.append(line)
                    if self.events != "passed" and line.startswith("GET /events"):
                        if self.events == "refused":
                            source.sendall(_FORBIDDEN)
                        continue
                    if self.held is not None and line.partition("?")[0].endswith(self.held):
                        self._released.wait()
                sink.sendall(chunk)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
