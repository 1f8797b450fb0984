"""Streams of a Docker Engine: events, pulls and logs, through the `docker` SDK.

The only file that imports it. Its iterators block, so each stream is read by a thread of its own, with a
client of its own (they are not thread-safe). The threads are daemons on purpose: a hung engine must not keep
the program from ending.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import threading
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import docker
from docker.errors import APIError
from docker.utils import parse_repository_tag

from manager.adapters import docker_answers as answers
from manager.errors import EngineError, EngineUnreachableError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from manager.services.ports import EngineEvent, PullProgress

T = TypeVar("T")

# Items that wait for their reader. An engine that is faster is not read meanwhile.
_MOST_WAITING = 64


async def events(url: str, filters: dict[str, str], opened: Callable[[], None]) -> AsyncIterator[EngineEvent]:
    """As `services.ports.Engine.events`."""
    stream = _Stream(
        url,
        lambda client: _begin_events(client, filters),
        answers.event,
        lambda error: answers.refusal(error.status_code, _said(error)),
        "events",
        opened=opened,
    )
    async for event in stream.items():
        yield event


async def pull(url: str, image: str) -> AsyncIterator[PullProgress]:
    """As `services.ports.Engine.pull`."""
    repository, tag = parse_repository_tag(image)
    stream = _Stream(
        url,
        lambda client: client.pull(repository, tag=tag or "latest", stream=True, decode=True),
        lambda entry: answers.pull_progress(image, entry),
        lambda error: answers.not_pulled(image, _said(error)),
        "pull",
    )
    async for progress in stream.items():
        yield progress


async def logs(url: str, container_id: str, tail: int) -> AsyncGenerator[str, None]:
    """As `services.ports.Engine.follow_logs`."""
    async with contextlib.aclosing(
        _logs(url, lambda client: client.logs(container_id, stream=True, follow=True, tail=tail))
    ) as pieces:
        async for piece in pieces:
            yield piece


async def task_logs(url: str, task_id: str, tail: int) -> AsyncGenerator[str, None]:
    """As `services.ports.Engine.follow_logs`, of a task of Docker Swarm."""
    async with contextlib.aclosing(
        _logs(url, lambda client: _begin_task_logs(client, task_id, tail))
    ) as pieces:
        async for piece in pieces:
            yield piece


async def _logs(url: str, begin: Callable[[docker.APIClient], Any]) -> AsyncGenerator[str, None]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    stream = _Stream(
        url,
        begin,
        lambda piece: decoder.decode(piece) or None,
        lambda error: answers.refusal(error.status_code, _said(error)),
        "logs",
        first="",
    )
    async with contextlib.aclosing(stream.items()) as pieces:
        async for piece in pieces:
            yield piece


class _Stream(Generic[T]):
    """Items of a blocking iterator of the SDK, read in a thread, closed when the reader leaves.

    At most `_MOST_WAITING` items wait for the reader.

    Args:
        url: where the engine is.
        begin: asks for the stream.
        convert: what an entry means, None for one that is to be left out; it may raise an EngineError.
        refused: what a refusal of the whole stream means.
        name: what the stream has.
        opened: called on the loop once the engine has begun to answer.
        first: an item for that moment; None: no such item.
    """

    def __init__(
        self,
        url: str,
        begin: Callable[[docker.APIClient], Any],
        convert: Callable[[Any], T | None],
        refused: Callable[[APIError], EngineError],
        name: str,
        *,
        opened: Callable[[], None] = lambda: None,
        first: T | None = None,
    ) -> None:
        self._url = url
        self._begin = begin
        self._convert = convert
        self._refused = refused
        self._name = name
        self._opened = opened
        self._first = first
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[T | Exception | None] = asyncio.Queue()
        self._room = threading.Semaphore(_MOST_WAITING)
        self._closed = threading.Event()
        self._source: Any = None

    async def items(self) -> AsyncGenerator[T, None]:
        threading.Thread(target=self._read, name=f"docker-{self._name}", daemon=True).start()
        try:
            while (item := await self._queue.get()) is not None:
                self._room.release()
                if isinstance(item, APIError):
                    raise self._refused(item) from item
                if isinstance(item, EngineError):
                    raise item
                if isinstance(item, Exception):
                    raise EngineUnreachableError(
                        f"the engine's {self._name} stream failed ({_innermost(item)})"
                    ) from item
                yield item
        finally:
            self._closed.set()
            self._room.release()
            self._close_source()

    def _close_source(self) -> None:
        """Shut the socket down, which wakes the reading thread. A generator has no socket to close."""
        close = getattr(self._source, "close", None)
        if close is not None and not isinstance(self._source, _Generator):
            with contextlib.suppress(Exception):
                close()

    def _read(self) -> None:
        end: Exception | None = None
        try:
            client = _connect(self._url)
            try:
                self._source = self._begin(client)
                if self._closed.is_set():  # the reader left meanwhile, when there was nothing to close yet
                    self._close_source()
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._opened)
                if self._first is not None:
                    self._post(self._first)
                for entry in self._source:
                    if self._closed.is_set():
                        break
                    if (item := self._convert(entry)) is not None:
                        self._room.acquire()
                        self._post(item)
            finally:
                client.close()
        except Exception as error:  # noqa: BLE001  (goes to whoever reads the items)
            end = error
        self._post(end)

    def _post(self, item: T | Exception | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)


_Generator = type(_ for _ in ())


def _connect(url: str) -> docker.APIClient:
    client = docker.APIClient(base_url=url, version="auto", timeout=None)  # type: ignore[arg-type]  # no time-out
    client.trust_env = False  # proxies and .netrc are for elsewhere
    return client


def _begin_events(client: docker.APIClient, filters: dict[str, str]) -> Any:
    stream: Any = client.events(decode=True, filters=filters)
    # Before the SDK's iterator (7.2) does: it takes a refusal, whose exception is an OSError, for the end.
    raise_for_status: Callable[[Any], None] = client._raise_for_status  # type: ignore[attr-defined]  # noqa: SLF001
    raise_for_status(stream._response)  # noqa: SLF001
    return stream


def _begin_task_logs(client: docker.APIClient, task_id: str, tail: int) -> Any:
    # The SDK follows the logs of containers and services only.
    url: str = client._url("/tasks/{0}/logs", task_id)  # type: ignore[attr-defined]  # noqa: SLF001
    options = {"stdout": 1, "stderr": 1, "follow": 1, "tail": tail}
    response: Any = client._get(url, params=options, timeout=None, stream=True)  # type: ignore[attr-defined]  # noqa: SLF001
    return client._get_result_tty(True, response, is_tty=False)  # type: ignore[attr-defined]  # noqa: SLF001


def _said(error: APIError) -> str:
    return str(error.explanation or error)


def _innermost(error: BaseException) -> str:
    """The cause people can act on: the SDK wraps a refused connection five times."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    plain = next((e for e in reversed(seen) if isinstance(e, OSError) and e.strerror), seen[-1])
    return str(getattr(plain, "strerror", None) or plain)
