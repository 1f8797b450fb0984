"""Replaces the process of a daemon."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from tests.support.daemon import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.daemon import Daemon
    from tests.support.nursery import Process


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    """All processes that were replaced; none of them is left."""
    found: list[Process] = []
    yield found
    for process in found:
        if process.poll() is None:
            process.kill()
        process.wait()


class Replaceable:
    """A daemon whose process is replaced by the next one."""

    def __init__(self, daemon: Daemon, processes: list[Process]) -> None:
        self.daemon = daemon
        self._processes = processes

    def replace(self) -> Process:
        """Start a process that replaces the running one; return the old one once the new one serves."""
        old = self.daemon.process
        assert old is not None
        self._processes.append(old)
        self.daemon.start(arguments=("--replace",), until_ready=False)
        new = self.daemon.process
        assert new is not None
        wait_for(lambda: described_pid(self.daemon) == new.pid or new.poll() is not None)
        assert new.poll() is None, self.daemon.log()
        return old


def described_pid(daemon: Daemon) -> int | None:
    with suppress(OSError, ValueError):
        pid: int = json.loads((daemon.state_dir / "daemon.json").read_text(encoding="utf-8"))["pid"]
        return pid
    return None
