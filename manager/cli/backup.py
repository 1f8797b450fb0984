"""`backup`: one consistent copy of the state directory, beside a daemon that runs or without one."""

from __future__ import annotations

import os
import sqlite3
import tarfile
import tempfile
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from manager.cli.failures import CommandError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from manager.settings import Settings

_REGISTRY = "registry.sqlite3"
# The files beside the registry. Locks belong to one process, and are not copied.
_FILES = ("owner.json",)


def back_up(settings: Settings, target: Path) -> list[str]:
    """Write the state directory into a tar archive that only its owner can read; return the names in it.

    The registry is copied by SQLite's online backup (https://sqlite.org/backup.html): the copy is one moment
    of it, and a running daemon is not held up.

    Raises:
        CommandError: there is no state, the target exists, or one of them cannot be used.
    """
    state_dir = settings.state.dir
    registry = state_dir / _REGISTRY
    if not registry.is_file():
        raise CommandError(f"there is no registry in {state_dir}", next_step="check state.dir, or --config")
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise CommandError(f"{target} exists; name a new file") from None
    try:
        with open(descriptor, "wb") as stream, tarfile.open(fileobj=stream, mode="w") as archive:  # noqa: PTH123
            with _copy(registry) as copy:
                _add(archive, _REGISTRY, copy)
            for name in _FILES:
                if (state_dir / name).is_file():
                    _add(archive, name, state_dir / name)
            names = archive.getnames()
            stream.flush()
            os.fsync(descriptor)
    except BaseException as error:
        target.unlink(missing_ok=True)  # no half of a copy
        if isinstance(error, sqlite3.Error):
            raise CommandError(f"{registry} cannot be copied: {error}") from error
        raise
    return names


@contextmanager
def _copy(registry: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, _REGISTRY)
        with (
            closing(sqlite3.connect(f"{registry.resolve().as_uri()}?mode=ro", uri=True)) as source,
            closing(sqlite3.connect(copy)) as destination,
        ):
            source.backup(destination)
        yield copy


def _add(archive: tarfile.TarFile, name: str, file: Path) -> None:
    entry = tarfile.TarInfo(name)
    with file.open("rb") as stream:  # the history of requests can be large
        entry.size = os.fstat(stream.fileno()).st_size
        entry.mode = 0o600
        archive.addfile(entry, stream)
