"""Which error of the port an error of LanceDB becomes.

LanceDB tells its errors apart by text alone: nearly all are RuntimeError, ValueError or OSError without a
number, and a panic of its Rust code is a BaseException.
"""

from __future__ import annotations

import errno
import os
import re

from manager.errors import VectorsDamagedError, VectorsUnavailableError

# Another call, or the other process of a handover, has committed first. The same call works when repeated.
_CONFLICTS = ("commit conflict", "too many concurrent writers", "retryable", "incompatible transaction")
# The table and its files are not at fault.
_NOT_THE_TABLE = frozenset(
    {
        errno.EACCES,
        errno.EAGAIN,
        errno.EBUSY,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EINTR,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ENOSPC,
        errno.EPERM,
        errno.EROFS,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
# Where in LanceDB's sources the error was made.
_PLACE = re.compile(r",? /[^ ,]+\.rs:\d+:\d+.*")
_NUMBER = re.compile(r"os error (\d+)")
_MOST_CHARACTERS = 300


def is_conflict(error: BaseException) -> bool:
    """Return whether the call has changed nothing because another one was faster."""
    return not isinstance(error, OSError) and any(words in str(error).lower() for words in _CONFLICTS)


def is_panic(error: BaseException) -> bool:
    """Return whether LanceDB's Rust code has panicked; the class cannot be imported."""
    return type(error).__name__ == "PanicException"


def translated(error: BaseException, table: int) -> VectorsUnavailableError:
    """Return what the port raises instead of `error`, which a call on `table` has raised."""
    why = _PLACE.sub("", " ".join(str(error).split()))[:_MOST_CHARACTERS] or type(error).__name__
    number = _number(error)
    if number in _NOT_THE_TABLE:
        return VectorsUnavailableError(f"table {table} of vectors: {os.strerror(number)}")
    is_of_the_table = isinstance(error, OSError | RuntimeError | ValueError) or is_panic(error)
    if isinstance(error, TimeoutError) or is_conflict(error) or not is_of_the_table:
        return VectorsUnavailableError(f"table {table} of vectors: {type(error).__name__}: {why}")
    # The default for what LanceDB says is damage: bytes that it cannot make sense of, a file that is not
    # there (ENOENT) or that the disk cannot read (EIO). Its arguments are right, and are checked before.
    # Anything else is a mistake of ours or of LanceDB, or a want of memory; no table is rebuilt for that.
    return VectorsDamagedError(f"table {table} of vectors is damaged: {why}", table=table)


def _number(error: BaseException) -> int:
    """Return the errno, wherever the error carries it, or 0."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = _NUMBER.search(str(error))
    return int(found[1]) if found else 0
