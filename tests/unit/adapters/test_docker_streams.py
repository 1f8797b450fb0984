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
