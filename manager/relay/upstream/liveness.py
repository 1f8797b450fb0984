"""Whether the host of a server is still there: left to the kernel, which repeats what is not acknowledged."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

# tcp(7). A host that is gone without a word ends a connection after ten seconds. A server that computes, or
# an engine that was killed, does not: the kernel of its host answers.
_UNACKNOWLEDGED_MS = 10_000
_IDLE_S = 5
_INTERVAL_S = 2


def watch_host(transport: asyncio.BaseTransport) -> None:
    """End the connection once its host has acknowledged nothing for ten seconds."""
    found = transport.get_extra_info("socket")
    if found is None or found.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with suppress(OSError):
        found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_S)
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _INTERVAL_S)
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)


def allow_a_full_window(transport: asyncio.BaseTransport) -> None:
    """Let a server take its time over a long body: a window that stays full counts as unacknowledged too.

    Since Linux 5.11 (9d9b1ee0b2d1); deadlines of the upload itself bound it.
    """
    found = transport.get_extra_info("socket")
    if found is not None and found.family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)
