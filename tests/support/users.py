"""Another user for tests of who may do what to whose files; they need root."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

NOBODY = 65534


def need_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("giving files to another user needs root")


def give(path: Path, uid: int = NOBODY) -> None:
    """Make `uid` the owner, of a link itself where it is one."""
    need_root()
    os.chown(path, uid, uid, follow_symlinks=False)


@contextmanager
def acting_as(uid: int = NOBODY) -> Iterator[None]:
    """The effective user of this process is another one meanwhile."""
    need_root()
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@contextmanager
def open_directory() -> Iterator[Path]:
    """A directory of root's that every user can reach, unlike those of pytest."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)
