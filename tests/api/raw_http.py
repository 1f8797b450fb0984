"""Raw HTTP/1.1 over a socket: what no client library would send."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Answer:
    """The first answer on a connection; `status` is 0 when the connection ended without one."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.body)["error"]
        return error


def say(port: int, *pieces: bytes, end: bool = True, limit_s: float = 10.0) -> Answer:
    """Send the pieces, then read until the other side closes, has answered in full or falls silent.

    Args:
        port: of this machine.
        pieces: are sent one after the other.
        end: say that nothing more comes; a request that is not complete is then cut off.
        limit_s: how long the other side may be silent.
    """
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=limit_s) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
            if end:
                connection.shutdown(socket.SHUT_WR)
            while not _is_complete(received) and (piece := connection.recv(65_536)):
                received += piece
        except OSError:
            pass  # cut off while it was still being talked to: what it said before counts
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    if not lines[0].startswith("HTTP/1.1 "):
        return Answer(0, {}, received)
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    return Answer(int(lines[0].split()[1]), headers, body)


def request(path: str, *headers: str, method: str = "GET", host: str | None = "localhost") -> bytes:
    """The bytes of a request without a body; the headers are lines."""
    lines = [f"{method} {path} HTTP/1.1", *([f"Host: {host}"] if host is not None else []), *headers]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1")


def _is_complete(received: bytes) -> bool:
    head, found, body = received.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length: "):
            return bool(found) and len(body) >= int(line.removeprefix(b"content-length: "))
    return False
