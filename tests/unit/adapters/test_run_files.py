# ruff: noqa: ASYNC240  (a test's loop has nothing else to do meanwhile)
"""Files of runs: whole or not there, for the daemon's user alone."""

from __future__ import annotations

import asyncio
import gc
import os
import stat
import threading
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from manager.adapters.run_files import DirectoryFiles
from manager.errors import RunFilesError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
async def files(directory: Path) -> AsyncIterator[DirectoryFiles]:
    files = DirectoryFiles(directory)
    assert await files.names() == frozenset()
    yield files
    files.close()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def whole(files: DirectoryFiles, name: str) -> bytes:
    return b"".join([piece async for piece in files.pieces(name)])


async def test_directory_and_files_are_for_the_user_alone(files: DirectoryFiles, directory: Path) -> None:
    await files.save("run_1.body", b"text")
    assert mode(directory) == 0o700
    assert mode(directory / "run_1.body") == 0o600
    directory.chmod(0o755)
    await files.names()
    assert mode(directory) == 0o700


async def test_a_saved_file_is_read_whole_in_pieces_and_up_to_a_bound(files: DirectoryFiles) -> None:
    text = os.urandom(700_000)
    await files.save("run_1.body", text)
    assert await whole(files, "run_1.body") == text
    assert await files.read("run_1.body", 10**6) == text
    assert await files.read("run_1.body", 5) == text[:5]


async def test_a_file_has_its_name_only_once_it_is_whole(files: DirectoryFiles, directory: Path) -> None:
    async with files.writing("run_1.result") as file:
        await file.write(b"one ")
        assert [path.name for path in directory.iterdir()] == [".run_1.result.part"]
        assert mode(directory / ".run_1.result.part") == 0o600
        assert await files.names() == {".run_1.result.part"}
        await file.write(b"two")
        await file.commit()
    assert await files.names() == {"run_1.result"}
    assert await whole(files, "run_1.result") == b"one two"


async def test_a_file_that_was_not_committed_is_dropped(files: DirectoryFiles) -> None:
    async with files.writing("run_1.result") as file:
        await file.write(b"half")
    assert await files.names() == frozenset()
    with pytest.raises(ZeroDivisionError):
        async with files.writing("run_1.result") as file:
            raise ZeroDivisionError
    assert await files.names() == frozenset()


async def test_what_an_interrupted_execution_has_left_is_no_obstacle(
    files: DirectoryFiles, directory: Path
) -> None:
    (directory / ".run_1.result.part").write_bytes(b"much more than that")
    await files.save("run_1.result", b"new")
    assert await whole(files, "run_1.result") == b"new"


async def test_a_missing_file_is_an_error_but_not_when_it_is_removed(files: DirectoryFiles) -> None:
    with pytest.raises(RunFilesError, match=r"read: run_1\.body \(No such file"):
        await files.read("run_1.body", 10)
    with pytest.raises(RunFilesError, match="No such file"):
        await whole(files, "run_1.body")
    await files.save("run_2.body", b"x")
    await files.remove("run_1.body", "run_2.body")
    assert await files.names() == frozenset()


async def test_a_planted_link_is_not_followed(files: DirectoryFiles, directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"secret")
    (directory / "run_1.body").symlink_to(other)
    (directory / ".run_2.body.part").symlink_to(other)
    with pytest.raises(RunFilesError):
        await files.read("run_1.body", 10)
    await files.save("run_2.body", b"x")
    assert other.read_bytes() == b"secret"


async def test_a_directory_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "elsewhere")
    files = DirectoryFiles(tmp_path / "runs")
    with pytest.raises(RunFilesError):
        await files.names()
    files.close()


async def test_a_full_disk_is_an_error_and_leaves_nothing(
    files: DirectoryFiles, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int, _data: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("manager.adapters.run_files.os.write", full)
    with pytest.raises(RunFilesError, match="No space left"):
        await files.save("run_1.body", b"x")
    assert list(directory.iterdir()) == []


async def test_a_cancelled_call_ends_with_its_work_so_that_nothing_changes_afterwards(
    files: DirectoryFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, goes_on = threading.Event(), threading.Event()
    write = os.write

    def slow(descriptor: int, data: bytes) -> int:
        begun.set()
        assert goes_on.wait(20)
        return write(descriptor, data)

    monkeypatch.setattr("manager.adapters.run_files.os.write", slow)
    saving = asyncio.ensure_future(files.save("run_1.body", b"x"))
    assert await asyncio.to_thread(begun.wait, 20)
    saving.cancel()
    done, _ = await asyncio.wait({saving}, timeout=0.05)
    assert not done
    goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await saving
    assert await files.names() == frozenset()


async def cancelled_often(begun: threading.Event, work: asyncio.Future[Any]) -> None:
    """Cancel a task on every turn of the loop while its thread is held up."""
    assert await asyncio.to_thread(begun.wait, 20)
    for _ in range(20):
        work.cancel()
        await asyncio.sleep(0)


class Held:
    """One of the functions of `os`, held up in its thread; `place` is a number that it has used."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.goes_on = threading.Event(), threading.Event()
        self.place = -1
        self._real: Callable[..., object] = getattr(os, name)
        monkeypatch.setattr(f"manager.adapters.run_files.os.{name}", self._slow)

    def _slow(self, *given: object) -> object:
        if isinstance(given[0], int):
            self.place = given[0]
            inode = os.fstat(self.place).st_ino
            self._wait()
            assert os.fstat(self.place).st_ino == inode, "the descriptor has become another file"
            return self._real(*given)
        self._wait()
        found = self._real(*given)
        if not self.begun.is_set() or self.place < 0:
            self.place = found if isinstance(found, int) else -1
        return found

    def _wait(self) -> None:
        self.begun.set()
        assert self.goes_on.wait(20)

    def is_closed(self) -> bool:
        try:
            os.fstat(self.place)
        except OSError:
            return True
        return False


@pytest.mark.parametrize("name", ["open", "read"])
async def test_a_download_that_is_cancelled_again_and_again_closes_its_file_behind_the_last_read(
    files: DirectoryFiles, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    await files.save("run_1.result", b"text")
    held = Held(name, monkeypatch)
    reading = asyncio.ensure_future(whole(files, "run_1.result"))
    await cancelled_often(held.begun, reading)
    # A number that was given back too early would go to one of these, and its bytes to the late read.
    pipes = [os.pipe() for _ in range(3)]
    for _, write in pipes:
        os.write(write, b"other")
    held.goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert held.place >= 0
    assert held.is_closed()
    for read, write in pipes:
        assert os.read(read, 9) == b"other"
        os.close(read)
        os.close(write)


async def test_a_file_that_is_written_is_closed_behind_its_last_write_however_often_it_is_cancelled(
    files: DirectoryFiles, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held("write", monkeypatch)
    saving = asyncio.ensure_future(files.save("run_1.body", b"text"))
    await cancelled_often(held.begun, saving)
    assert not saving.done()
    held.goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await saving
    assert held.is_closed()
    assert list(directory.iterdir()) == []


async def test_a_cancelled_download_does_not_keep_the_loop_busy_while_its_read_is_held_up(
    files: DirectoryFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    await files.save("run_1.result", b"text")
    held = Held("read", monkeypatch)
    waits = 0
    wait = asyncio.wait

    async def counted(futures: set[asyncio.Future[Any]]) -> object:
        nonlocal waits
        waits += 1
        return await wait(futures)

    monkeypatch.setattr("manager.adapters.run_files.asyncio.wait", counted)
    async with anyio.create_task_group() as group:
        group.start_soon(whole, files, "run_1.result")
        assert await asyncio.to_thread(held.begun.wait, 20)
        before = waits
        group.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            for _ in range(100):
                await asyncio.sleep(0)
            held.goes_on.set()
    assert waits - before <= 3
    assert held.is_closed()


async def test_an_error_of_a_cancelled_call_is_told_to_nobody(
    files: DirectoryFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held("open", monkeypatch)
    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context))
    reading = asyncio.ensure_future(files.read("run_1.body", 10))
    await cancelled_often(held.begun, reading)
    held.goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await reading
    del reading
    gc.collect()
    await asyncio.sleep(0)
    assert told == []
