# ruff: noqa: ASYNC221, ASYNC240  (a test's loop has nothing else to do meanwhile)
from __future__ import annotations

import asyncio
import os
import re
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from manager.adapters.collections import SqlCollections, file, open_collections
from manager.adapters.collections import store as store_module
from manager.domain.embeddings import Counts, VersionState
from manager.errors import RegistryCorruptError, RegistryUnwritableError
from tests.support.collecting import (
    NOW,
    Model,
    Step,
    a_backfill,
    a_collection,
    a_version,
    an_item,
    child,
    filled,
    opened,
    seen,
    state_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "embeddings.sqlite3"


# --- files that cannot be used ---


async def made(path: Path) -> None:
    async with opened(path) as store:
        await filled(store, 300)


def sql(statement: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(statement)
            connection.commit()

    return change


def foreign(path: Path) -> None:
    path.unlink()
    sql("CREATE TABLE items (number INTEGER)")(path)


def link(path: Path) -> None:
    path.rename(path.with_name("other"))
    path.symlink_to(path.with_name("other"))


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def damaged(path: Path) -> None:
    """Overwrite the second half of the pages."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = b"\x5a" * (len(content) - len(content) // 2)
    path.write_bytes(content)


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "text": (lambda path: path.write_bytes(b"notes " * 1000), "it is not an SQLite database"),
    "short": (
        lambda path: path.write_bytes(path.read_bytes()[:50]),
        "it is a database of some other program",
    ),
    "cut off": (lambda path: os.truncate(path, path.stat().st_size // 2), "is malformed|page"),
    "damaged": (damaged, "is malformed"),
    "foreign": (foreign, "it is a database of some other program"),
    "newer": (
        sql("PRAGMA user_version=2"),
        "its schema has the number 2, this version knows no newer one than 1: it was written by a newer",
    ),
    "numberless": (sql("PRAGMA user_version=0"), "its schema has the number 0; expected 1"),
    "link": (link, "is a symbolic link; expected a regular file"),
    "fifo": (fifo, "expected a regular file"),
    "directory": (directory, "expected a regular file"),
    "second name": (lambda path: os.link(path, path.with_name("other")), r"has 2 names \(hard links\)"),
    "odd log": (lambda path: Path(f"{path}-wal").symlink_to("/dev/null"), "expected a regular file"),
    "log of zeros and more": (
        lambda path: Path(f"{path}-wal").write_bytes(b"\0" * 4000 + b"\1" * 100),
        "the header of its write-ahead log .* is damaged",
    ),
    "no note": (sql("DELETE FROM meta"), "its table meta has 0 rows instead of one"),
}


def content_of(path: Path) -> dict[str, bytes | str]:
    """Return what is in a directory."""
    return {
        one.name: one.read_bytes() if one.is_file() else str(one.lstat().st_mode)
        for one in path.parent.iterdir()
    }


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("stores", [True, False])
async def test_a_file_that_cannot_be_used_is_refused_and_left(path: Path, kind: str, stores: bool) -> None:
    await made(path)
    change, problem = ODD[kind]
    change(path)
    before = content_of(path)
    with pytest.raises(RegistryCorruptError, match=problem) as raised:
        await open_collections(path, stores=stores)
    message = str(raised.value)
    assert message.startswith(f"the file of collections {path} cannot be used: ")
    assert f"To set it aside and begin with an empty one: mv -n {path} {path}.corrupt-" in message
    assert content_of(path) == before
    # the command that it names helps
    subprocess.run(str(raised.value.details["command"]), shell=True, check=True)
    async with opened(path) as store:
        assert await store.collections() == ()


async def left_open(path: Path, target: Path) -> None:
    """Copy a store that was not closed: what was written last is in its log."""
    async with opened(path) as store:
        await filled(store, 10)
        for suffix in ("", "-wal"):
            shutil.copyfile(f"{path}{suffix}", f"{target}{suffix}")


async def test_a_store_that_was_not_closed_is_read_with_its_log(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.sqlite3"
    await left_open(path, target)
    async with opened(target) as store:
        assert await store.item_counts() == {1: 10}
        assert not await store.was_closed()


async def test_a_gap_in_the_log_is_no_empty_collection(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.sqlite3"
    await left_open(path, target)
    wal = Path(f"{target}-wal")
    content = bytearray(wal.read_bytes())
    content[32 + 24 + 100] ^= 1  # in the page of the first frame
    wal.write_bytes(content)
    before = content_of(target)
    with pytest.raises(RegistryCorruptError, match=r"write-ahead log .* is damaged behind 0 pages"):
        await open_collections(target)
    assert content_of(target) == before


async def test_a_damaged_file_with_a_log_is_left(path: Path, tmp_path: Path) -> None:
    await made(path)
    target = tmp_path / "target.sqlite3"
    shutil.copyfile(path, target)
    async with opened(path) as store:
        await store.delete(1, "i0")
        shutil.copyfile(f"{path}-wal", f"{target}-wal")
    damaged(target)
    before = content_of(target)
    with pytest.raises(RegistryCorruptError, match=r"malformed|page"):
        await open_collections(target)
    assert {name: one for name, one in content_of(target).items() if name in before} == before


async def test_a_copy_by_sqlite_can_be_used(path: Path, tmp_path: Path) -> None:
    await made(path)
    target = tmp_path / "target.sqlite3"
    sql(f"VACUUM INTO '{target}'")(path)
    async with opened(path) as store, opened(target) as copy:
        assert await seen(copy) == await seen(store)
        assert await copy.delete(1, "i0")
        assert Path(f"{target}-wal").stat().st_size > 0


async def test_a_change_of_a_copy_that_was_cut_off_is_undone(path: Path, tmp_path: Path) -> None:
    await made(path)
    copy, target = tmp_path / "copy.sqlite3", tmp_path / "target.sqlite3"
    sql(f"VACUUM INTO '{copy}'")(path)
    with closing(sqlite3.connect(copy, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size=1")
        connection.execute("BEGIN")
        connection.execute("DELETE FROM vectors")
        for suffix in ("", "-journal"):
            shutil.copyfile(f"{copy}{suffix}", f"{target}{suffix}")
    assert copy.read_bytes() != target.read_bytes()
    async with opened(target) as store:
        assert await store.all_counts() == {1: Counts(300, 300)}
        assert len(await store.marked(1)) == 300


async def test_a_newer_schema_in_the_log_is_refused(path: Path, tmp_path: Path) -> None:
    await made(path)
    target = tmp_path / "target.sqlite3"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version=2")
        for suffix in ("", "-wal"):
            shutil.copyfile(f"{path}{suffix}", f"{target}{suffix}")
    with pytest.raises(RegistryCorruptError, match="its schema has the number 2"):
        await open_collections(target)


async def test_a_file_that_cannot_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    await made(path)
    monkeypatch.setattr(file, "refuse_other_files", fails)
    with pytest.raises(RegistryUnwritableError, match=f"{path} cannot be opened: Permission denied"):
        await open_collections(path)


async def test_in_a_large_file_only_the_small_tables_are_checked(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(path) as store:
        await filled(store, 3000)
    with closing(sqlite3.connect(path)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'items'").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    content = bytearray(path.read_bytes())
    content[(page - 1) * size : page * size] = b"\x5a" * size
    path.write_bytes(content)
    with pytest.raises(RegistryCorruptError):
        await open_collections(path)
    monkeypatch.setattr(file, "_WHOLLY_CHECKED_BYTES", 0)
    async with opened(path) as store:
        assert await store.all_counts() == {1: Counts(3000, 3000)}
        with pytest.raises(RegistryCorruptError, match="malformed"):
            await store.page(1, None, 9)
    with closing(sqlite3.connect(path)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'versions'").fetchone()
    content[(page - 1) * size : page * size] = b"\x5a" * size
    path.write_bytes(content)
    with pytest.raises(RegistryCorruptError):
        await open_collections(path)


@pytest.mark.parametrize(
    ("change", "read"),
    [
        ("UPDATE versions SET state = 'odd'", lambda store: store.versions()),
        ("UPDATE collections SET created_at = 'now'", lambda store: store.collections()),
        ("UPDATE items SET created_at = x'00'", lambda store: store.page(1, None, 9)),
    ],
)
async def test_a_row_that_cannot_be_read_refuses_the_file(path: Path, change: str, read: Any) -> None:
    await made(path)
    sql(change)(path)
    async with opened(path) as store:
        with pytest.raises(RegistryCorruptError, match="a row in it cannot be read"):
            await read(store)


# --- disks and other processes ---


@pytest.mark.parametrize("suffix", ["", "-wal"])
async def test_a_file_that_was_taken_away_is_not_written(path: Path, suffix: str) -> None:
    await made(path)
    target = Path(f"{path}{suffix}")
    store = await open_collections(path)
    aside = path.with_name("aside")
    target.rename(aside)
    with pytest.raises(RegistryUnwritableError, match=f"could not be written: {target.name} is gone"):
        await store.delete(1, "i0")
    target.write_bytes(b"another one")
    with pytest.raises(RegistryUnwritableError, match=f"{target.name} was replaced by another file"):
        await store.remove(1)
    aside.rename(target)
    assert await store.delete(1, "i0")
    target.unlink()
    await store.close()  # cannot be noted, and is no error


async def test_a_file_that_is_locked_is_not_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_BUSY_TIMEOUT_S", 0.01)
    await made(path)
    async with opened(path) as store:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(RegistryUnwritableError, match="another process has it locked"):
                await store.delete(1, "i0")
            assert await store.item_counts() == {1: 300}
        assert await store.delete(1, "i0")


async def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    path = tmp_path / "file" / "embeddings.sqlite3"
    async with opened(path) as store:
        with pytest.raises(RegistryUnwritableError, match=f"{re.escape(str(path))} cannot be made: "):
            await store.create(a_collection())


async def test_a_file_that_cannot_be_made(tmp_path: Path) -> None:
    path = tmp_path / "state" / "embeddings.sqlite3"
    async with opened(path) as store:
        path.parent.write_bytes(b"")
        with pytest.raises(RegistryUnwritableError, match=f"{re.escape(str(path))} cannot be made"):
            await store.create(a_collection())
        path.parent.unlink()
        assert await store.create(a_collection()) == 1


FULL_DISK = """
import asyncio, resource, sys
from pathlib import Path
from manager.adapters.collections import open_collections
from manager.errors import RegistryUnwritableError
from tests.support.collecting import a_collection, an_item, filled, seen

def limit(most):
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

async def refused(call):
    try:
        await call
    except RegistryUnwritableError as error:
        assert "could not be" in str(error) or "cannot be made" in str(error), error
    else:
        raise AssertionError("it was stored")

async def main(path):
    store = await open_collections(path)
    limit(10_000)
    await refused(store.create(a_collection()))
    assert list(path.parent.iterdir()) == [], list(path.parent.iterdir())
    limit(resource.RLIM_INFINITY)
    collection, version = await filled(store, 3)
    before = await seen(store)
    limit(Path(f"{path}-wal").stat().st_size + 100_000)
    items = [an_item(100 + place, f"i{place}")._replace(text="x" * 10_000) for place in range(100)]
    for _ in range(2):
        await refused(store.put(collection, items, {version: [100]}, version))
        assert await seen(store) == before
    assert await store.delete(collection, "i0")  # there is space for a small one
    limit(resource.RLIM_INFINITY)
    assert await store.put(collection, items, {version: [100]}, version)
    assert await store.item_counts() == {collection: 100}
    await store.close()
    print("done")

asyncio.run(main(Path(sys.argv[1])))
"""


async def test_a_full_disk_stores_nothing_and_breaks_nothing(path: Path) -> None:
    process = child("-c", FULL_DISK, str(path))
    assert process.communicate(timeout=60)[0] == "done\n"
    was_closed, found = await state_of(path)
    assert was_closed
    assert found["counts"] == {1: Counts(100, 1)}


# --- dry runs ---


async def test_a_dry_run_makes_no_file(path: Path) -> None:
    async with opened(path, stores=False) as store:
        assert await store.create(a_collection()) == 0
        assert [await store.allocate(5), await store.allocate(1)] == [1, 6]
        assert await seen(store) == Model().seen()
    assert not any(path.parent.iterdir())


async def test_a_dry_run_changes_nothing(path: Path) -> None:
    await made(path)
    content = path.read_bytes()
    item = an_item(999, "i0")
    collection, version = a_collection("other"), a_version(1, "d2", VersionState.BUILDING)
    async with opened(path, stores=False) as store:
        before = await seen(store)
        (known,) = await store.versions()
        calls = [
            Step("create", (collection,)),
            Step("add_version", (version,)),
            Step("remove", (1,)),
            Step("remove_version", (1,)),
            Step("save_versions", (known.moved(VersionState.ARCHIVED, NOW),)),
            Step("save_backfill", (a_backfill(1, 1),)),
            Step("begin_backfill", (a_backfill(1, 1), known)),
            Step("switch", (known, None, collection, lambda _: False)),
            Step("put", (1, [item], {1: [999]}, 1)),
            Step("delete", (1, "i0")),
            Step("delete", (1, "missing")),
            Step("mark", (1, [1, 2], NOW)),
            Step("failed", (1, 1, "why"), {"at_once": True}),
            Step("unmark", (1, None)),
            Step("add_rubbish", (1, [7])),
            Step("swept", (1, [7])),
        ]
        answers = [await call.make(store) for call in calls]
        assert answers == [
            0,
            0,
            None,
            None,
            None,
            None,
            None,
            None,
            True,
            True,
            False,
            2,
            None,
            0,
            None,
            None,
        ]
        assert await seen(store) == before
        assert await store.was_closed()
    assert path.read_bytes() == content
    async with opened(path) as store:
        assert await seen(store) == before


def test_a_dry_run_has_an_answer_for_each_call_that_writes() -> None:
    reads = {
        "allocate",
        "close",
        "collections",
        "versions",
        "backfills",
        "counts",
        "all_counts",
        "item_counts",
        "item",
        "page",
        "found",
        "matching",
        "missing",
        "failures",
        "lacking",
        "marked",
        "rubbish",
        "was_closed",
        "abandon",
    }
    unchanged = type(open_unchanged())
    names = {name for name in vars(SqlCollections) if not name.startswith("_")} - reads
    assert {name for name in names if name in vars(unchanged)} == names


def open_unchanged() -> SqlCollections:
    with asyncio.Runner() as runner:
        store = runner.run(open_collections(Path("/nonexistent/embeddings.sqlite3"), stores=False))
        runner.run(store.close())
    return store
