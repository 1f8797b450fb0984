"""The thread that reads a stream of the engine ends with the reader, whenever that leaves."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from manager.adapters import docker_streams
from manager.errors import EngineError, Reason
from tests.support.inside import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest


class Endless:
    """A stream that brings nothing until it is closed."""

    def __init__(self) -> None:
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._closed.wait()
        return iter(())

    def close(self) -> None:
        self._closed.set()


async def test_a_reader_that_leaves_while_the_stream_is_opened_leaves_no_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connecting, go_on = threading.Event(), threading.Event()

    def begin(_client: Any) -> Endless:
        connecting.set()
        go_on.wait()
        return Endless()

    monkeypatch.setattr(docker_streams, "_connect", lambda _url: SimpleNamespace(close=lambda: None))
    stream: docker_streams._Stream[Any] = docker_streams._Stream(
        "unix:///none",
        begin,
        lambda entry: entry,
        lambda _error: EngineError("no", reason=Reason.ENGINE_UNAVAILABLE),
        "leaving",
    )
    reading = asyncio.ensure_future(anext(stream.items()))
    await until(connecting.is_set)
    reading.cancel()
    await asyncio.wait([reading])
    go_on.set()
    await until(lambda: all(thread.name != "docker-leaving" for thread in threading.enumerate()))


class Torrent:
    """A stream that always has more, until it is closed; `taken` counts what was read of it."""

    def __init__(self) -> None:
        self._closed = threading.Event()
        self.taken = 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._closed.is_set():
            raise StopIteration
        self.taken += 1
        return b"x" * 1000

    def close(self) -> None:
        self._closed.set()


async def test_an_engine_is_read_no_faster_than_its_reader_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    torrent = Torrent()
    client = SimpleNamespace(close=lambda: None, logs=lambda *_arguments, **_options: torrent)
    monkeypatch.setattr(docker_streams, "_connect", lambda _url: client)
    pieces = docker_streams.logs("unix:///none", "a" * 64, 10)
    assert await anext(pieces) == ""  # it has been opened
    most = docker_streams._MOST_WAITING
    await until(lambda: torrent.taken >= most)
    for _ in range(10 * most):
        await anext(pieces)
    # Each piece that is read makes room for one; besides, one is in the hands of the thread.
    assert torrent.taken <= 11 * most + 2
    await pieces.aclose()
    await until(lambda: all(thread.name != "docker-logs" for thread in threading.enumerate()))


async def test_a_character_in_two_pieces_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [b"gr\xc3", b"\xbc\xc3\x9fe \xff\n"]
    client = SimpleNamespace(close=lambda: None, logs=lambda *_arguments, **_options: iter(pieces))
    monkeypatch.setattr(docker_streams, "_connect", lambda _url: client)
    found = [piece async for piece in docker_streams.logs("unix:///none", "a" * 64, 10)]
    assert "".join(found) == "grüße \ufffd\n"
