"""What LanceDB is told about this process before it is loaded, and what it is made to give back."""

from __future__ import annotations

import ctypes
import os

_ENVIRONMENT = {
    # It writes to standard error by itself. What matters comes as an exception.
    "LANCEDB_LOG": "error",
    # Of one call: 2 GiB, and 8,192 rows at a time, would be the defaults. A row may have 16 KiB.
    "LANCE_DEFAULT_IO_BUFFER_SIZE": str(64 * 1024**2),
    "LANCE_DEFAULT_BATCH_SIZE": "1024",
}


def prepare() -> None:
    """Set what LanceDB reads from the environment; what is set already stays.

    Call it while the process has one thread: others may be reading the environment.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def give_back_memory() -> None:
    """Give freed memory back to the system after a call that has read much: 400 MiB of a million rows."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of the GNU C library alone
    if trim is not None:
        trim(0)
