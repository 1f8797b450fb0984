"""The directory of the tables, apart from what LanceDB does in it. All of it blocks."""

from __future__ import annotations

import os
import re
import shutil
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_NAME = re.compile(r"v([1-9][0-9]{0,17})\.lance")
_DROPPED = ".dropped"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_PARTS = ("data", "_deletions", "_indices", "_transactions", "_versions")


def path_of(directory: Path, table: int) -> Path:
    return directory / f"v{table}.lance"


def tables_in(directory: Path) -> frozenset[int]:
    """Return the tables that exist, damaged or not."""
    try:
        names = [path.name for path in directory.iterdir()]
    except FileNotFoundError:
        return frozenset()
    return frozenset(int(found[1]) for name in names if (found := _NAME.fullmatch(name)))


def open_directory(directory: Path) -> None:
    """Make the directory where there is none; it is for the user alone."""
    directory.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(directory, _DIRECTORY)
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) != 0o700:  # noqa: PLR2004
            os.fchmod(descriptor, 0o700)
    finally:
        os.close(descriptor)


def is_missing(path: Path) -> bool:
    """Return whether there is nothing. A directory that may not be searched raises: it says neither."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    return False


def states(path: Path) -> int:
    """Return how many states of a table are kept."""
    try:
        with os.scandir(path / "_versions") as entries:
            return sum(entry.name.endswith(".manifest") for entry in entries)
    except FileNotFoundError:
        return 0


def has_rows(path: Path) -> bool:
    """Return whether a table has ever had rows. One that is killed while it is created has none."""
    try:
        with os.scandir(path / "data") as entries:
            return next(iter(entries), None) is not None
    except FileNotFoundError:
        return False


def remove(path: Path) -> None:
    """Remove a table at once: one that is removed in part would look like a damaged one."""
    dropped = path.with_suffix(_DROPPED)
    try:
        path.rename(dropped)
    except FileNotFoundError:
        return
    _sync(path.parent, _DIRECTORY)
    _remove_all(dropped)


def remove_dropped(directory: Path) -> None:
    """Finish the removals that the end of a process has interrupted."""
    for path in directory.glob(f"*{_DROPPED}"):
        _remove_all(path)


class Unsynced:
    """The files of a table that are newer than this object, so that they can be flushed to the disk.

    LanceDB flushes nothing. A loss of power shortly after a write would leave empty files behind, and a
    table with an empty manifest is lost as a whole.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._old = self._names()

    def sync(self) -> None:
        """Flush what is new: files first, then the directories that name them."""
        new = self._names() - self._old
        for name in sorted(new):
            try:
                _sync(name, _FILE)
            except FileNotFoundError:  # tend has removed it meanwhile
                continue
        for directory in sorted({os.path.dirname(name) for name in new}):  # noqa: PTH120
            _sync(directory, _DIRECTORY)
        _sync(self._path, _DIRECTORY)
        _sync(self._path.parent, _DIRECTORY)

    def _names(self) -> set[str]:
        return {
            os.path.join(folder, name)  # noqa: PTH118
            for part in _PARTS
            for folder, _, names in os.walk(self._path / part)
            for name in names
        }


def _remove_all(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync(path: Path | str, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
