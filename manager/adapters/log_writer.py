"""The log writer: a bounded queue of lines, and the thread that writes them to a file descriptor.

stderr may be a pipe that nobody reads, a full disk or a suspended terminal. A write to it may block for ever,
so no other thread writes to it.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import select
import threading
from collections import deque
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collections.abc import Sequence

_log = structlog.get_logger("log")

# Memory that unwritten lines may take. At the bound new lines are dropped and counted.
MOST_LINES = 10_000
MOST_BYTES = 8 * 2**20
# One write takes whole lines up to here. Queued bytes are given back after each.
_WRITE_BYTES = 64 * 1024
# A line that comes alone is written at once; lines that follow within this time are written together.
_GATHER_S = 0.1
# How long the end of the process waits for the last lines.
FLUSH_S = 1.0


class LogWriter:
    """Writes lines in order, from any thread, without ever blocking the caller.

    Lines that do not fit or cannot be written are dropped and counted. Once writing works again, a line
    `log_lines_dropped` says how many. At the end of the process the queue is flushed for `FLUSH_S` at most.

    Args:
        descriptor: where the lines go; it is duplicated. None: every line is discarded.
        most_lines: bound of the queue, with the lines that are being written.
        most_bytes: bound of the queue, with the lines that are being written.
        secrets: what is replaced by `hidden` in every line, whoever wrote it. The thread does that.
        hidden: stands for a secret.
    """

    def __init__(
        self,
        descriptor: int | None,
        *,
        most_lines: int = MOST_LINES,
        most_bytes: int = MOST_BYTES,
        secrets: Sequence[bytes] = (),
        hidden: bytes = b"***",
    ) -> None:
        self.secrets = secrets
        self._hidden = hidden
        self._fd = os.open(os.devnull, os.O_WRONLY) if descriptor is None else os.dup(descriptor)
        self._is_terminal = os.isatty(self._fd)
        self._most_lines = most_lines
        self._most_bytes = most_bytes
        self._lines: deque[bytes] = deque()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._count = 0
        self._bytes = 0
        self._dropped = 0
        self._reported = 0
        self._torn = False
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def is_terminal(self) -> bool:
        return self._is_terminal

    @property
    def dropped(self) -> int:
        """Lines that were dropped so far."""
        return self._dropped

    def write(self, line: bytes) -> None:
        """Queue one line, which ends in a line break. Never blocks, never raises."""
        with self._lock:
            if not self._fits(line):
                self._dropped += 1
                return
            self._lines.append(line)
            self._count += 1
            self._bytes += len(line)
        if not self._wake.is_set():
            self._wake.set()

    def close(self, timeout_s: float = FLUSH_S) -> bool:
        """Write what is queued, within `timeout_s`; later lines are dropped.

        Returns:
            Whether everything was written or dropped; False when the descriptor still blocks.
        """
        atexit.unregister(self.close)
        with self._lock:
            self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _fits(self, line: bytes) -> bool:
        if (
            self._count < self._most_lines
            and self._bytes + len(line) <= self._most_bytes
            and not self._closing.is_set()
        ):
            return True
        # The report of dropped lines, one at a time, always fits.
        return threading.current_thread() is self._thread

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            closing = self._closing.is_set()  # before the last look: nothing is queued after it was set
            while self._lines:
                self._write_some()
            if closing:
                os.close(self._fd)
                return
            self._closing.wait(_GATHER_S)

    def _write_some(self) -> None:
        lines: list[bytes] = []
        size = 0
        while self._lines and (not lines or size + len(self._lines[0]) <= _WRITE_BYTES):
            line = self._lines.popleft()
            lines.append(line)
            size += len(line)
        written = self._write_all([self._without_secrets(line) for line in lines])
        with self._lock:
            self._count -= len(lines)
            self._bytes -= size
            self._dropped += len(lines) - written
            unreported = self._dropped - self._reported
        if written and unreported:
            self._reported += unreported
            with contextlib.suppress(Exception):  # a broken log configuration must not end this thread
                _log.warning("log_lines_dropped", lines=unreported)

    def _without_secrets(self, line: bytes) -> bytes:
        for secret in self.secrets:
            line = line.replace(secret, self._hidden)
        return line

    def _write_all(self, lines: list[bytes]) -> int:
        """Write lines; how many were written whole. A torn line is ended before the next one."""
        data = memoryview(b"".join((b"\n" if self._torn else b"", *lines)))
        done = 0
        try:
            while done < len(data):
                done += self._write_once(data[done:])
        except OSError:  # a full disk, a closed pipe
            if not done:
                return 0
            ends = itertools.accumulate(map(len, lines), initial=int(self._torn))
            whole = sum(end <= done for end in ends) - 1
            self._torn = data[done - 1] != ord("\n")
            return whole
        self._torn = False
        return len(lines)

    def _write_once(self, data: memoryview) -> int:
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            # Another process that shares the terminal or the pipe has made it non-blocking.
            poll = select.poll()
            poll.register(self._fd, select.POLLOUT)
            poll.poll()
            return 0
