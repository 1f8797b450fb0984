"""Identities of files, by which a change is noticed without reading them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

Signature: TypeAlias = "tuple[tuple[int, int, int, int] | None, ...]"


def signature(files: Iterable[Path]) -> Signature:
    """Return the identities of files, which new contents or a replacement change. It blocks.

    The identity of a file that cannot be looked at is None.
    """
    return tuple(map(_identity, files))


def _identity(file: Path) -> tuple[int, int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
