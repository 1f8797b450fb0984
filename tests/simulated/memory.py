"""Real memory for the simulated Ollama to hold, so that a container can run out of it."""

from __future__ import annotations

import os
import signal
import sys

_PAGE_BYTES = 4096


class Memory:
    """Holds one block, in this process or in a child that ends with it."""

    def __init__(self) -> None:
        self._block: bytearray | None = None
        self._child: int | None = None

    def hold(self, size_bytes: int, where: str) -> None:
        """Give back what is held and hold `size_bytes` instead, every page of it touched."""
        self._block = None
        if self._child is not None:
            os.kill(self._child, signal.SIGKILL)
            self._child = None
        if size_bytes == 0:
            return
        if where == "server":
            self._block = _touched(size_bytes)
            return
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            # Keep nothing of the parent's but the pipe: its end closes when the parent dies, however it dies.
            os.dup2(read_end, 3)
            os.closerange(4, 1 << 16)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            block = _touched(size_bytes)
            os.read(3, 1)
            os._exit(len(block) and 0)
        os.close(read_end)
        os.set_inheritable(write_end, False)
        self._child = child

    def reap(self) -> None:
        """Collect children that have ended; say in the log when one was killed."""
        while True:
            try:
                process, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process == 0:
                return
            if process == self._child:
                self._child = None
                code = os.waitstatus_to_exitcode(status)
                sys.stderr.write(
                    "level=ERROR source=server.go:1 "
                    f'msg="llama runner terminated" error="exit status {code}"\n'
                )


def _touched(size_bytes: int) -> bytearray:
    block = bytearray(size_bytes)
    for position in range(0, size_bytes, _PAGE_BYTES):
        block[position] = 1
    return block
