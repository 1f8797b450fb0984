"""Whether the files of a database are still those that were opened."""

from __future__ import annotations

from pathlib import Path

from manager.adapters.registry.opening import REGISTRY
from manager.errors import RegistryUnwritableError


class SameFiles:
    """Refuses files that have taken the place of a database and its write-ahead log.

    SQLite goes on writing into files that have no name any more; a restart would lose all of it.

    Args:
        path: of the database.
        what: names the file in errors.
    """

    def __init__(self, path: Path, what: str = REGISTRY) -> None:
        self._path = path
        self._what = what
        self._identities: dict[Path, tuple[int, int]] = {}

    def remember(self) -> None:
        """Take the files that are there now for the right ones; a connection has read from them."""
        self._identities = {path: _identity(path) for path in (self._path, Path(f"{self._path}-wal"))}

    def refuse_others(self) -> None:
        """Look at the files; before `remember` there is nothing to look at.

        Raises:
            RegistryUnwritableError: one was deleted, moved or replaced; nothing can be written.
        """
        for path, identity in self._identities.items():
            try:
                now = _identity(path)
            except OSError as exc:
                raise RegistryUnwritableError(
                    f"{self._what} {self._path} could not be written: {path.name} is gone ({exc.strerror}); "
                    "put it back, or restart the daemon to begin with what is there"
                ) from exc
            if now != identity:
                raise RegistryUnwritableError(
                    f"{self._what} {self._path} could not be written: {path.name} was replaced by another "
                    "file; restart the daemon"
                )


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino
