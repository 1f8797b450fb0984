"""The files of async runs: written under another name, renamed when they are whole and on disk."""

from __future__ import annotations

import asyncio
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

from anyio import CancelScope

from manager.errors import RunFilesError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable
    from pathlib import Path

T = TypeVar("T")

_PIECE_BYTES = 256 * 1024
_THREADS = 4
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OLD = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class DirectoryFiles:
    """Implements `services.ports.RunFiles`. All of it happens in threads.

    A call that is cancelled, however often, ends once its work is done: no file changes afterwards, and no
    descriptor is closed while a thread uses it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pool = ThreadPoolExecutor(_THREADS, "run files")

    async def names(self) -> frozenset[str]:
        """As `services.ports.RunFiles.names`; the directory is made where there is none."""

        def work() -> frozenset[str]:
            self._open_directory()
            with os.scandir(self._directory) as entries:
                return frozenset(entry.name for entry in entries if entry.is_file(follow_symlinks=False))

        return await self._call("listed", work)

    async def save(self, name: str, data: bytes) -> None:
        async with self.writing(name) as file:
            await file.write(data)
            await file.commit()

    async def read(self, name: str, most_bytes: int) -> bytes:
        def work() -> bytes:
            with os.fdopen(os.open(self._directory / name, _OLD), "rb") as stream:
                return stream.read(most_bytes)

        return await self._call(f"read: {name}", work)

    @asynccontextmanager
    async def writing(self, name: str) -> AsyncGenerator[_Writer]:
        writer = _Writer(self, self._directory, name)
        try:
            await self._call(f"written: {name}", writer.open)
            yield writer
        finally:
            await self._call(f"written: {name}", writer.close)

    async def pieces(self, name: str) -> AsyncIterator[bytes]:
        reader = _Reader(self._directory / name)
        try:
            await self._call(f"read: {name}", reader.open)
            while piece := await self._call(f"read: {name}", reader.read):
                yield piece
        finally:
            await self._call(f"read: {name}", reader.close)

    async def remove(self, *names: str) -> None:
        def work() -> None:
            for name in names:
                (self._directory / name).unlink(missing_ok=True)

        await self._call("removed", work)

    def close(self) -> None:
        self._pool.shutdown(wait=False)

    async def run(self, doing: str, work: Callable[[], T]) -> T:
        """Do something in a thread, and translate what goes wrong."""
        return await self._call(doing, work)

    def _open_directory(self) -> None:
        self._directory.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if stat.S_IMODE(os.fstat(descriptor).st_mode) != 0o700:  # noqa: PLR2004
                os.fchmod(descriptor, 0o700)
        finally:
            os.close(descriptor)

    async def _call(self, doing: str, work: Callable[[], T]) -> T:
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError:
            with CancelScope(shield=True):  # a cancelled scope cancels again on every turn of the loop
                while not future.done():
                    with suppress(asyncio.CancelledError):
                        await asyncio.wait({future})
            future.exception()  # nobody is left to be told
            raise
        try:
            return future.result()
        except OSError as error:
            why = error.strerror or str(error)
            raise RunFilesError(f"files in {self._directory} cannot be {doing} ({why})") from error


class _Reader:
    """A file that is read in pieces; it owns its descriptor even if the call that opens it is cancelled."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def open(self) -> None:
        self._descriptor = os.open(self._path, _OLD)

    def read(self) -> bytes:
        return os.read(self._descriptor, _PIECE_BYTES)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class _Writer:
    """Implements `services.ports.FileWriter`."""

    def __init__(self, files: DirectoryFiles, directory: Path, name: str) -> None:
        self._files = files
        self._directory = directory
        self._name = name
        self._path = directory / f".{name}.part"
        self._descriptor = -1

    async def write(self, data: bytes) -> None:
        def work() -> None:
            view = memoryview(data)
            while view:
                view = view[os.write(self._descriptor, view) :]

        await self._files.run(f"written: {self._name}", work)

    async def commit(self) -> None:
        def work() -> None:
            os.fsync(self._descriptor)
            self._path.rename(self._directory / self._name)
            directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

        await self._files.run(f"written: {self._name}", work)

    def open(self) -> None:
        with suppress(FileNotFoundError):
            self._path.unlink()  # of an execution that was interrupted
        self._descriptor = os.open(self._path, _NEW, 0o600)

    def close(self) -> None:
        """Drop the file unless it has got its name."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._path.unlink(missing_ok=True)
