"""The process's own lack of file descriptors, told from failures of the other side."""

from __future__ import annotations

import errno
import socket

_LACKS = (errno.EMFILE, errno.ENFILE)


def has_descriptors() -> bool:
    """Return whether another descriptor can be had."""
    try:
        socket.socket().close()
    except OSError as error:
        return error.errno not in _LACKS
    return True


def lacks_descriptors(error: OSError) -> bool:
    """Return whether a connection failed because this process, or its system, has no descriptor left.

    A failed lookup hides the cause: getaddrinfo says that the name is unknown. So try another descriptor.
    """
    if isinstance(error, socket.gaierror):
        return not has_descriptors()
    return error.errno in _LACKS
