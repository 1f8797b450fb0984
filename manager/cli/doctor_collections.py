"""Finding of `doctor` about collections: the extra, their file, and the space for a change of the model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from manager.cli.findings import broken, fine, skipped, warning
from manager.errors import RegistryCorruptError, RegistryUnwritableError

if TYPE_CHECKING:
    from manager.cli.findings import Finding

_CHECK = "collections"
_INSTALL = "pip install 'ollama-endpoint-manager[embeddings]'"


def collections_finding(state_dir: Path, *, is_held: bool) -> Finding:
    """Look at the collections of a state directory; `is_held`: a daemon has it."""
    from manager.adapters.vectors import installed  # noqa: PLC0415  (imports asyncio)

    path, is_installed = state_dir / "embeddings.sqlite3", installed()
    if not os.path.lexists(path):
        how = "the first one makes their file" if is_installed else f"they need an extra: {_INSTALL}"
        return fine(_CHECK, f"none yet; {how}")
    if not is_installed:
        message = f"{path} has collections, and the extra for them is not installed here: they answer 501"
        return warning(_CHECK, message, _INSTALL)
    problem = None if is_held else _of_file(path)
    return problem or _space(path, is_held=is_held)


def _space(path: Path, *, is_held: bool) -> Finding:
    state_dir = path.parent
    if (needed := _size_of(state_dir / "vectors")) > (free := shutil.disk_usage(state_dir).free):
        message = f"their vectors have {needed // 2**20} MiB, and {free // 2**20} MiB are left"
        return warning(_CHECK, message, "free some space: a backfill of all writes as much again")
    if is_held:
        return skipped(_CHECK, f"{path} is in use; a daemon checks it when it starts")
    return fine(_CHECK, f"{path} is whole")


def _of_file(path: Path) -> Finding | None:
    # The import is slow, and is only needed here.
    from manager.adapters.collections.file import verify  # noqa: PLC0415

    try:
        verify(path)
    except RegistryCorruptError as error:
        command = str(error.details.get("command", ""))
        problem = str(error.details.get("problem", error.message))
        return broken(_CHECK, f"{path} cannot be used: {problem}", f"begin with none: {command}")
    except (RegistryUnwritableError, OSError) as error:
        return broken(_CHECK, f"{path} cannot be read: {error}", "run this as the user of the daemon")
    return None


def _size_of(directory: Path) -> int:
    """Return the bytes of all files; those that are gone or closed to us count for nothing."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                total += Path(parent, name).lstat().st_size
            except OSError:
                continue
    return total
