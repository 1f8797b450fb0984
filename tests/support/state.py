"""What a daemon has left in its state directory, read without its help and without changing a byte of it."""

from __future__ import annotations

import asyncio
import fcntl
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manager.adapters.registry import open_registry

if TYPE_CHECKING:
    from manager.domain.registry import InstanceRow


def stored(state_dir: Path, query: str) -> list[dict[str, Any]]:
    """Rows of the registry. It is copied first: reading a write-ahead log would write to it."""
    with tempfile.TemporaryDirectory() as directory:
        for path in state_dir.glob("registry.sqlite3*"):
            if not path.name.endswith("-shm"):
                shutil.copy(path, directory)
        with closing(sqlite3.connect(Path(directory, "registry.sqlite3"))) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(query)]


def stored_instance(state_dir: Path, instance: str) -> dict[str, Any]:
    (row,) = stored(state_dir, f"SELECT * FROM instances WHERE id = '{instance}'")
    return row


def store_instance(state_dir: Path, row: InstanceRow) -> None:
    """Put a row into the registry of a daemon that does not run, making the registry where there is none."""
    state_dir.mkdir(parents=True, exist_ok=True)

    async def store() -> None:
        registry = await open_registry(state_dir / "registry.sqlite3")
        await registry.save_instance(row)
        await registry.close()

    asyncio.run(store())


def is_locked(path: Path) -> bool:
    """Whether some process holds a lock on the file; one that is missing is not locked."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
