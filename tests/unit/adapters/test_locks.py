# ruff: noqa: ASYNC220, ASYNC240  (a test's loop has nothing else to do meanwhile)
from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
import structlog

from manager.adapters.locks import FileLocks, Holder, StateDirLock, holder_pid, read_holder
from manager.errors import ConfigurationError, LockedError, StateDirHeldError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LONG_S = 30.0

_HOLD_INSTANCE = """
import asyncio, sys
from pathlib import Path
from manager.adapters.locks import FileLocks
async def main():
    async with FileLocks(Path(sys.argv[1]), 30).hold("gpu0"):
        print("held", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
asyncio.run(main())
"""

_HOLD_STATE_DIR = """
import sys
from pathlib import Path
from manager.adapters.locks import StateDirLock
lock = StateDirLock(Path(sys.argv[1]), "other")
lock.acquire()
lock.describe(url="http://127.0.0.1:11435")
print("held", flush=True)
sys.stdin.readline()
lock.release()
"""

_COUNT = """
import asyncio, sys
from pathlib import Path
from manager.adapters.locks import FileLocks
async def main():
    locks, counter = FileLocks(Path(sys.argv[1]), 60), Path(sys.argv[2])
    for _ in range(100):
        async with locks.hold("gpu0"):
            seen = int(counter.read_text())
            await asyncio.sleep(0)
            counter.write_text(str(seen + 1))
asyncio.run(main())
"""


@contextmanager
def process(script: str, *args: object) -> Iterator[subprocess.Popen[str]]:
    """A second process that has printed its first line; it goes on when it is written to."""
    argv = [sys.executable, "-W", "error", "-c", script, *map(str, args)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        try:
            assert running.stdout.readline() == "held\n"
            yield running
        finally:
            running.kill()


def let_go(running: subprocess.Popen[str]) -> None:
    assert running.stdin is not None
    running.stdin.write("\n")
    running.stdin.flush()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "state" / "locks"


# Instances


async def test_tasks_hold_an_instance_one_after_the_other(directory: Path) -> None:
    locks = FileLocks(directory, LONG_S)
    inside = 0
    order: list[int] = []

    async def work(number: int) -> None:
        nonlocal inside
        async with locks.hold("gpu0"):
            inside += 1
            assert inside == 1
            await asyncio.sleep(0)
            order.append(number)
            inside -= 1

    await asyncio.gather(*(work(number) for number in range(20)))
    assert order == list(range(20))


async def test_instances_do_not_wait_for_each_other(directory: Path) -> None:
    locks = FileLocks(directory, LONG_S)
    async with locks.hold("gpu0"), locks.hold("gpu1"):
        assert {path.name for path in directory.iterdir()} == {"gpu0.lock", "gpu1.lock"}


async def test_lock_files_are_private_and_stay(directory: Path) -> None:
    locks = FileLocks(directory, LONG_S)
    async with locks.hold("gpu0"):
        pass
    file = directory / "gpu0.lock"
    before = file.stat().st_ino
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    async with locks.hold("gpu0"):
        assert file.stat().st_ino == before


async def test_a_free_lock_costs_no_thread(directory: Path) -> None:
    threads = threading.active_count()
    async with FileLocks(directory, LONG_S).hold("gpu0"):
        assert threading.active_count() == threads


async def test_another_process_is_named_after_the_wait(directory: Path) -> None:
    with process(_HOLD_INSTANCE, directory) as other:
        began = time.monotonic()
        with pytest.raises(LockedError) as caught:
            async with FileLocks(directory, 0.2).hold("gpu0"):
                pytest.fail("two processes held it")
        assert 0.2 <= time.monotonic() - began < LONG_S
    error = caught.value
    assert error.instance == "gpu0"
    assert error.details == {"lock": str(directory / "gpu0.lock"), "pid": other.pid}
    assert f"instance gpu0 is held by process {other.pid}" in error.message
    assert str(directory / "gpu0.lock") in error.message


async def test_the_loop_runs_on_while_another_process_is_waited_for(directory: Path) -> None:
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    with process(_HOLD_INSTANCE, directory):
        turning = asyncio.ensure_future(turn())
        with pytest.raises(LockedError):
            async with FileLocks(directory, 0.2).hold("gpu0"):
                pass
        turning.cancel()
    assert turns > 20


async def test_a_lock_is_taken_as_soon_as_the_other_process_lets_go(directory: Path) -> None:
    with process(_HOLD_INSTANCE, directory) as other:
        let_go(other)
        async with FileLocks(directory, LONG_S).hold("gpu0"):
            assert holder_pid(directory / "gpu0.lock") == os.getpid()


async def test_a_kill_of_the_holder_frees_the_lock_at_once(directory: Path) -> None:
    with process(_HOLD_INSTANCE, directory) as other:
        other.kill()
        other.wait()
        async with FileLocks(directory, 0.0).hold("gpu0"):
            pass


async def test_processes_never_hold_an_instance_together(directory: Path, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    argv = [sys.executable, "-W", "error", "-c", _COUNT, str(directory), str(counter)]
    running = [subprocess.Popen(argv) for _ in range(3)]
    assert [each.wait(60) for each in running] == [0, 0, 0]
    assert counter.read_text() == "300"


async def assert_free(locks: FileLocks, directory: Path) -> None:
    """Free for a task of this process, and for any other."""
    async with asyncio.timeout(10), locks.hold("gpu0"):
        pass
    assert holder_pid(directory / "gpu0.lock") is None


async def test_a_task_cancelled_while_it_holds_leaves_nothing_held(directory: Path) -> None:
    locks = FileLocks(directory, LONG_S)
    inside = asyncio.Event()

    async def work() -> None:
        async with locks.hold("gpu0"):
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.ensure_future(work())
    await inside.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await assert_free(locks, directory)


async def test_a_task_cancelled_while_it_waits_for_a_task_leaves_nothing_held(directory: Path) -> None:
    locks = FileLocks(directory, LONG_S)

    async def work() -> None:
        async with locks.hold("gpu0"):
            pytest.fail("the lock was held")

    async with locks.hold("gpu0"):
        task = asyncio.ensure_future(work())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
    await assert_free(locks, directory)


async def test_a_task_cancelled_while_it_waits_for_a_process_leaves_nothing_held(directory: Path) -> None:
    locks = FileLocks(directory, LONG_S)

    async def work() -> None:
        async with locks.hold("gpu0"):
            pytest.fail("the lock was held")

    with process(_HOLD_INSTANCE, directory):
        task = asyncio.ensure_future(work())
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
    await assert_free(locks, directory)


async def test_an_error_inside_leaves_nothing_held(directory: Path) -> None:
    locks = FileLocks(directory, LONG_S)
    with pytest.raises(RuntimeError, match="inside"):
        async with locks.hold("gpu0"):
            raise RuntimeError("inside")
    await assert_free(locks, directory)


async def test_a_lock_file_that_cannot_be_opened_is_named(directory: Path) -> None:
    directory.mkdir(parents=True)
    (directory / "gpu0.lock").mkdir()
    locks = FileLocks(directory, LONG_S)
    with pytest.raises(UnavailableError, match=r"the lock of instance gpu0 cannot be taken: .*gpu0\.lock"):
        async with locks.hold("gpu0"):
            pass
    (directory / "gpu0.lock").rmdir()
    await assert_free(locks, directory)


# Who holds a file


def test_nobody_holds_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert holder_pid(tmp_path / "none.lock") is None


def test_a_shared_look_is_not_taken_for_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "free.lock").touch()
    assert holder_pid(tmp_path / "free.lock") is None


# The state directory


def test_a_state_directory_is_held_by_one_daemon(tmp_path: Path) -> None:
    with process(_HOLD_STATE_DIR, tmp_path) as other:
        with pytest.raises(StateDirHeldError) as caught:
            StateDirLock(tmp_path, "default").acquire()
        message = caught.value.message
        assert f"the state directory {tmp_path} is in use by process {other.pid}" in message
        assert "manager 'other', http://127.0.0.1:11435, since 20" in message
        assert caught.value.details["pid"] == other.pid
        assert caught.value.details["url"] == "http://127.0.0.1:11435"
        let_go(other)
        other.wait(30)
    lock = StateDirLock(tmp_path, "default")
    lock.acquire()
    lock.release()


def test_a_kill_of_the_daemon_frees_its_state_directory_at_once(tmp_path: Path) -> None:
    with process(_HOLD_STATE_DIR, tmp_path) as other:
        other.kill()
        other.wait()
        assert (tmp_path / "daemon.json").exists()
        assert read_holder(tmp_path) is None
        lock = StateDirLock(tmp_path, "default")
        lock.acquire()
        assert read_holder(tmp_path) == lock._holder
        lock.release()


def test_the_holder_is_described_as_far_as_it_is_known(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    assert read_holder(directory) is None
    assert not directory.exists()
    before = datetime.now(UTC)
    lock = StateDirLock(directory, "default")
    lock.acquire()
    holder = read_holder(directory)
    assert holder is not None
    assert (holder.pid, holder.url, holder.manager_id) == (os.getpid(), None, "default")
    assert holder.started_at is not None
    assert before <= holder.started_at <= before + timedelta(minutes=1)
    lock.describe(url="http://[::1]:80", config="/c.yaml")
    described = read_holder(directory)
    assert described == Holder(os.getpid(), "http://[::1]:80", holder.started_at, "default", "/c.yaml")
    assert json.loads((directory / "daemon.json").read_text()).keys() == {
        "pid",
        "url",
        "started_at",
        "manager_id",
        "config",
    }
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}
    lock.release()
    lock.release()
    assert read_holder(directory) is None
    assert [path.name for path in directory.iterdir()] == ["daemon.lock"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"pid": null}', "\udcff"])
def test_a_description_that_cannot_be_read_leaves_the_pid(tmp_path: Path, content: str) -> None:
    lock = StateDirLock(tmp_path, "default")
    lock.acquire()
    (tmp_path / "daemon.json").write_bytes(content.encode(errors="surrogateescape"))
    assert read_holder(tmp_path) == Holder(pid=os.getpid())
    assert str(read_holder(tmp_path)) == f"process {os.getpid()}"
    lock.release()


def test_looking_does_not_keep_a_daemon_from_starting(tmp_path: Path) -> None:
    (tmp_path / "daemon.lock").touch()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            read_holder(tmp_path)

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(50):
            lock = StateDirLock(tmp_path, "default")
            lock.acquire()
            lock.release()
    finally:
        stop.set()
        for looker in lookers:
            looker.join()


def test_a_description_that_cannot_be_written_does_not_stop_the_daemon(tmp_path: Path) -> None:
    (tmp_path / "daemon.json.new").mkdir()
    lock = StateDirLock(tmp_path, "default")
    with structlog.testing.capture_logs() as logs:
        lock.acquire()
    assert [entry["event"] for entry in logs] == ["daemon_not_described"]
    assert read_holder(tmp_path) == Holder(pid=os.getpid())
    lock.release()


def test_a_state_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigurationError, match="cannot be used"):
        StateDirLock(file, "default").acquire()
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_holder(file)


def test_a_holder_that_cannot_be_seen_is_another_process() -> None:
    assert str(Holder()) == "another process"
