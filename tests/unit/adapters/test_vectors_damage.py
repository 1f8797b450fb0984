"""Tables of vectors that are damaged, disks and processes that are at fault, and ends without warning."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from manager.adapters.vectors import LanceVectors
from manager.adapters.vectors.faults import is_conflict, translated
from manager.errors import VectorsDamagedError, VectorsUnavailableError
from tests.support.vectors import AT, FACTS, rows, unit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

_CHILD = """
import asyncio, os, pathlib, resource, sys
from manager.adapters.vectors import LanceVectors
from manager.errors import ManagerError
from tests.support.vectors import AT, FACTS, rows, unit

vectors = LanceVectors(pathlib.Path(sys.argv[1]))

async def main():
{body}

asyncio.run(main())
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "vectors"


@pytest.fixture
async def vectors(directory: Path) -> AsyncIterator[LanceVectors]:
    vectors = LanceVectors(directory)
    yield vectors
    await vectors.close()


def child(directory: Path, body: str) -> subprocess.Popen[str]:
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    code = _CHILD.format(body=indented)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(directory)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )


def largest(folder: Path) -> Path:
    """Of the files of rows it has those that were added first."""
    return max(folder.iterdir(), key=lambda path: path.stat().st_size)


def newest_state(table: Path) -> Path:
    """States are numbered downwards."""
    return min((table / "_versions").glob("*.manifest"))


def cut(path: Path, size: int) -> None:
    """Leave only so many bytes, or cut off as many as `size` is below zero."""
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def scribble(path: Path, start: int, count: int) -> None:
    with path.open("r+b") as file:
        file.seek(start, os.SEEK_END if start < 0 else os.SEEK_SET)
        file.write(b"\xff" * count)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("x")


HARMS: dict[str, Callable[[Path], object]] = {
    "a file of rows is gone": lambda table: largest(table / "data").unlink(),
    "a file of rows is empty": lambda table: cut(largest(table / "data"), 0),
    "a file of rows is cut in half": lambda table: cut(largest(table / "data"), 30_000),
    "a file of rows lacks its last bytes": lambda table: cut(largest(table / "data"), -10),
    "a file of rows ends in nonsense": lambda table: scribble(largest(table / "data"), -40, 40),
    "a file of rows is a directory": lambda table: replace_by_directory(largest(table / "data")),
    "all rows are gone": lambda table: shutil.rmtree(table / "data"),
    "the list of removed rows is gone": lambda table: shutil.rmtree(table / "_deletions"),
    "the list of removed rows is empty": lambda table: cut(largest(table / "_deletions"), 0),
    "the newest state is empty": lambda table: cut(newest_state(table), 0),
    "the newest state is cut off": lambda table: cut(newest_state(table), -20),
    "no state is left": lambda table: shutil.rmtree(table / "_versions"),
    "the table is a file": replace_by_file,
}
# These show in the calls that read all rows, not in those that only count them or look at the newest.
SHOWN_BY_SEARCH = [harm for harm in HARMS if "removed rows" not in harm]


async def filled(vectors: LanceVectors) -> None:
    await vectors.add(1, FACTS, rows(*range(1000)), AT)
    await vectors.add(1, FACTS, rows(*range(1000, 1010)), AT)
    await vectors.remove(1, [5])
    await vectors.add(2, FACTS, rows(7), AT)


@pytest.mark.parametrize("is_known", [True, False], ids=["open", "not open"])
@pytest.mark.parametrize("harm", HARMS)
async def test_damage_is_said_of_the_table_and_a_drop_mends_it(
    directory: Path, harm: str, is_known: bool
) -> None:
    vectors = LanceVectors(directory)
    await filled(vectors)
    if is_known:
        await vectors.numbers(1)
        await vectors.search(1, unit(1), 3)
    else:
        await vectors.close()
        vectors = LanceVectors(directory)
    HARMS[harm](directory / "v1.lance")

    for _ in range(2):
        with pytest.raises(VectorsDamagedError) as caught:
            await vectors.numbers(1)
        assert caught.value.table == 1
        assert ".rs:" not in caught.value.message
    if not is_known and harm in SHOWN_BY_SEARCH:
        for call in (vectors.search(1, unit(1), 3), vectors.get(1, 1), vectors.remove(1, [1])):
            with pytest.raises(VectorsDamagedError):
                await call
    assert await vectors.numbers(2) == {7}
    assert await vectors.tables() == {1, 2}

    await vectors.drop(1)
    assert await vectors.tables() == {2}
    assert await vectors.numbers(1) == frozenset()
    await vectors.add(1, FACTS, rows(8, 9), AT)
    assert await vectors.numbers(1) == {8, 9}
    assert [hit.number for hit in await vectors.search(1, unit(9), 1)] == [9]
    await vectors.close()


async def test_a_table_that_vanishes_is_empty(vectors: LanceVectors, directory: Path) -> None:
    await filled(vectors)
    await vectors.search(1, unit(1), 3)
    shutil.rmtree(directory / "v1.lance")
    assert await vectors.search(1, unit(1), 3) == []
    assert await vectors.get(1, 1) is None
    assert await vectors.numbers(1) == frozenset()
    assert await vectors.count(1) == 0
    await vectors.remove(1, [1])
    await vectors.tend(1)
    assert await vectors.tables() == {2}


async def test_damage_that_tend_finds_is_said(vectors: LanceVectors, directory: Path) -> None:
    for number in range(40):
        await vectors.add(1, FACTS, rows(number), AT)
    largest(directory / "v1.lance" / "data").unlink()
    with pytest.raises(VectorsDamagedError) as caught:
        await vectors.tend(1)
    assert caught.value.table == 1


# As LanceDB 0.40 has worded them on a file system that was full, or read-only, and so on.
_FULL = "lance error: LanceError(IO): Generic LocalFileSystem error: No space left (os error 28), /a/b.rs:1:2"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(_FULL),
        RuntimeError(_FULL.replace("(os error 28)", "(os error 13)")),
        RuntimeError(_FULL.replace("(os error 28)", "(os error 24)")),
        RuntimeError(_FULL.replace("(os error 28)", "(os error 30)")),
        OSError(_FULL),
        OSError(28, "No space left on device"),
        PermissionError(13, "Permission denied"),
        RuntimeError("lance error: Retryable commit conflict for version 77: preempted"),
        MemoryError(),
        TypeError("a mistake"),
    ],
)
def test_what_is_not_the_fault_of_the_table_is_no_damage(error: Exception) -> None:
    said = translated(error, 4)
    assert type(said) is VectorsUnavailableError
    assert said.code == "vectors_unavailable"
    assert said.message.startswith("table 4 of vectors: ")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("lance error: Not found: tmp/v1.lance/data/1.lance, /root/.cargo/io/local.rs:273:40"),
        RuntimeError("lance error: LanceError(IO): failed to decode Protobuf message: invalid varint"),
        RuntimeError("Generic LocalFileSystem error: Input/output error (os error 5)"),
        OSError(5, "Input/output error"),
        FileNotFoundError(2, "gone"),
        ValueError("Invalid input, file does not appear to be a Lance file"),
        type("PanicException", (BaseException,), {})("index out of bounds"),
    ],
)
def test_what_lancedb_says_otherwise_is_damage(error: BaseException) -> None:
    said = translated(error, 4)
    assert isinstance(said, VectorsDamagedError)
    assert said.table == 4
    assert ".cargo" not in said.message
    assert not is_conflict(error)


def test_a_want_of_descriptors_is_no_damage(directory: Path) -> None:
    body = (
        "await vectors.add(1, FACTS, rows(*range(100)), AT)\n"
        "_, most = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) - 1, most))\n"
        "for call in vectors.numbers(1), vectors.add(1, FACTS, rows(1), AT), vectors.tend(1):\n"
        "    try:\n"
        "        await call\n"
        "    except ManagerError as error:\n"
        "        print(error.code)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))\n"
        "print(len(await vectors.numbers(1)))\n"
    )
    with child(directory, body) as process:
        said, _ = process.communicate()
    assert said.split() == ["vectors_unavailable"] * 3 + ["100"]


def test_a_directory_that_may_not_be_read_is_no_damage() -> None:
    body = (
        "await vectors.add(1, FACTS, rows(*range(100)), AT)\n"
        "if os.geteuid() == 0:\n"
        "    for path in vectors._tables.directory.rglob('*'):\n"
        "        os.chown(path, 65534, 65534)\n"
        "    os.chown(vectors._tables.directory, 65534, 65534)\n"
        "    os.setresuid(65534, 65534, 65534)\n"
        "for part in vectors._tables.directory / 'v1.lance/data', vectors._tables.directory:\n"
        "    part.chmod(0)\n"
        "    for call in vectors.numbers(1), vectors.get(1, 1), vectors.remove(1, [1]), vectors.tend(2):\n"
        "        try:\n"
        "            await call\n"
        "        except ManagerError as error:\n"
        "            print(error.code)\n"
        "    part.chmod(0o700)\n"
        "print(len(await vectors.numbers(1)))\n"
    )
    # Root reads everything, so the child becomes another user, who may pass through the folders above.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        with child(Path(folder) / "vectors", body) as process:
            said, _ = process.communicate()
    assert said.split() == ["vectors_unavailable"] * 7 + ["100"]


async def test_rows_that_were_added_outlive_a_kill(vectors: LanceVectors, directory: Path) -> None:
    body = (
        "for first in range(0, 100_000, 10):\n"
        "    await vectors.add(1, FACTS, rows(*range(first, first + 10)), AT)\n"
        "    print(first + 10, flush=True)\n"
    )
    with child(directory, body) as process:
        assert process.stdout is not None
        for _ in range(25):
            process.stdout.readline()
        process.kill()
        lines = process.stdout.read().split()
    assert process.returncode == -signal.SIGKILL
    added = int(lines[-1]) if lines else 250
    there = await vectors.numbers(1)
    assert there >= set(range(added))
    # The last call has happened as a whole, or not at all.
    assert len(there) in (added, added + 10)
    await vectors.add(1, FACTS, rows(200_000), AT)
    await vectors.tend(1)
    assert await vectors.numbers(1) == there | {200_000}


def test_the_end_of_the_interpreter_waits_for_calls_and_cuts_off_a_tend(directory: Path) -> None:
    code = """
import asyncio, pathlib, sys, threading
from manager.adapters.vectors import LanceVectors, tending
from tests.support.vectors import AT, FACTS, rows

building = threading.Event()

async def build(*_):
    building.set()
    await asyncio.sleep(1000)

tending._build = build
vectors = LanceVectors(pathlib.Path(sys.argv[1]))
loop = asyncio.new_event_loop()
loop.run_until_complete(vectors.add(1, FACTS, rows(*range(12_000)), AT))
tend = loop.create_task(vectors.tend(1))
while not building.is_set():
    loop.run_until_complete(asyncio.sleep(0))
vectors._writer.submit(lambda: print(vectors._tables.read(1, lambda table: table.count_rows(), 0)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(directory)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
        timeout=120,
        check=True,
    )
    assert done.stdout.split() == ["12000"]
