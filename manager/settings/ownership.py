"""Checks of the owner of a file or a directory, and of who else can change it.

State, configuration and keys are trusted only where nobody but their user and root can change them. Checks of
a path cover everything that a lookup goes through, links included. POSIX ACLs are not looked at.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_MOST_LINKS = 40  # path_resolution(7)
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def user(uid: int) -> str:
    """A user for a message: name and number, as far as they are known."""
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def is_trusted(uid: int) -> bool:
    """Whether a user is the one that this process acts for, or root."""
    return uid in {os.geteuid(), 0}


def make_private_directory(path: Path) -> None:
    """Create a directory, and those that it lies in, with mode 0700 where they are missing.

    Raises:
        OSError: it cannot be created, or is no directory.
    """
    path = path.absolute()
    for missing in reversed([one for one in (path, *path.parents) if not one.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def directory_problem(path: Path) -> str | None:
    """The reason why others could change what is in a directory; None where only its user and root can.

    The directory belongs to the caller, and neither group nor others may write to it. What leads to it
    belongs to the caller or root; where everybody may write, the sticky bit keeps entries with their owners.
    A group that may write to a parent is trusted: that is how administrators share /srv. A directory that
    does not exist yet is no problem.

    Raises:
        OSError: it cannot be looked at.
    """
    path = path.absolute()
    last = None
    for step, status in _steps(path):
        if last is not None and (problem := _parent_problem(*last)):
            return problem
        last = step, status
    if last is None or not path.exists():
        return _parent_problem(*last) if last is not None else None
    _, status = last
    if status.st_uid != os.geteuid():
        return (
            f"{path} belongs to {user(status.st_uid)}, and this runs as {user(os.geteuid())}; "
            "expected a directory of that user's own"
        )
    if status.st_mode & _OTHERS_WRITE:
        return f"others may write to {path}{_mode(status)}; close it with: chmod go-w {path}"
    return None


def state_file_problem(path: Path) -> str | None:
    """The reason why a file in the state directory cannot be ours; None where it can, or where there is none.

    A second name (a hard link) would let two daemons write to one file, or a daemon to somebody else's.

    Raises:
        OSError: it cannot be looked at.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return f"{path} is {_kind(status)}; expected a regular file"
    if status.st_nlink > 1:
        return f"{path} has {status.st_nlink} names (hard links); expected one"
    if not is_trusted(status.st_uid):
        return f"{path} belongs to {user(status.st_uid)}; expected a file of {user(os.geteuid())}"
    if status.st_mode & stat.S_IWOTH:
        return f"every user may write to {path}{_mode(status)}; close it with: chmod o-w {path}"
    return None


def local_file_problem(path: Path) -> str | None:
    """The reason why a file that was found in the current directory does not count; None where it does.

    File and directory belong to the caller or root, and nobody else can write to either. A sticky directory
    such as /tmp is as good as one that others cannot write to.

    Raises:
        OSError: it cannot be looked at.
    """
    link, directory = path.lstat(), path.absolute().parent.stat()
    status = path.stat()
    for place, one in ((path, link), (path, status), (path.absolute().parent, directory)):
        if not is_trusted(one.st_uid):
            return f"{place} belongs to {user(one.st_uid)}{_mode(one)}"
    if others_can_write(status):
        return f"others may write to {path}{_mode(status)}"
    if others_can_write(directory) and not directory.st_mode & stat.S_ISVTX:
        return f"others may write to {path.absolute().parent}{_mode(directory)}"
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        return f"{path} is {_kind(status)}"
    return None


def weaknesses(path: Path) -> Iterator[str]:
    """A warning of others who could change a file or a directory that the operator has named.

    Raises:
        OSError: it cannot be looked at.
    """
    status = path.stat()
    if not is_trusted(status.st_uid):
        yield f"it belongs to {user(status.st_uid)}"
    sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
    if status.st_mode & stat.S_IWOTH and not sticky:
        yield f"every user may write to it{_mode(status)}; close it with: chmod o-w {path}"


def others_can_write(status: os.stat_result) -> bool:
    """Whether anybody but the owner may write.

    A user's private group has nobody else in it (Debian, Fedora: umask 002). Root has none: the group of that
    name is often given to administrators.
    """
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and not _is_private_group(status.st_uid, status.st_gid)


def open_regular(path: Path, *, follow: bool = True, dir_fd: int | None = None) -> int:
    """A descriptor of a regular file, for reading. Never waits for the other end of a FIFO.

    Args:
        path: what to open.
        follow: whether the last part of the path may be a symbolic link.
        dir_fd: the directory that a relative path is relative to.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    descriptor = os.open(path, flags, dir_fd=dir_fd)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def can_read_as_owner(uid: int, status: os.stat_result) -> bool:
    """Whether a user owns a file, or is in the group that it is open to.

    Permission for everybody does not count: the directories on the way to the file may be closed.
    """
    if status.st_uid == uid:
        return True
    if not status.st_mode & stat.S_IRGRP:
        return False
    try:
        account = pwd.getpwuid(uid)
    except KeyError:
        return False
    return status.st_gid in os.getgrouplist(account.pw_name, account.pw_gid)


def _steps(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every directory and link that a lookup of an absolute path goes through, as far as there are any."""
    here = Path("/")
    yield here, here.lstat()
    left = list(reversed(path.parts[1:]))
    links = 0
    while left:
        part = left.pop()
        following = here.parent if part == ".." else here / part
        try:
            status = following.lstat()
        except FileNotFoundError:
            return
        yield following, status
        if not stat.S_ISLNK(status.st_mode):
            here = following
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = following.readlink()
        left += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        here = Path("/") if target.is_absolute() else here


def _parent_problem(path: Path, status: os.stat_result) -> str | None:
    if not is_trusted(status.st_uid):
        return f"{path}, which leads to it, belongs to {user(status.st_uid)}; expected root or the caller"
    if stat.S_ISLNK(status.st_mode):
        return None  # its mode means nothing
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        return (
            f"every user may write to {path}{_mode(status)}, which leads to it; "
            f"close it with: chmod o-w {path}"
        )
    return None


def _is_private_group(uid: int, gid: int) -> bool:
    try:
        account, group = pwd.getpwuid(uid), grp.getgrgid(gid)
    except KeyError:
        return False
    return (
        uid != 0
        and account.pw_gid == gid
        and account.pw_name == group.gr_name
        and set(group.gr_mem) <= {account.pw_name}
    )


def _kind(status: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")


def _mode(status: os.stat_result) -> str:
    return f" (mode {stat.S_IMODE(status.st_mode):04o})"
