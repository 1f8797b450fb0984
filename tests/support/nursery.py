"""Programs that begin with everything imported: a process that has imported the daemon forks them.

Importing the daemon takes a second of a core, and the tests start hundreds. A program that is begun here runs
`python -m MODULE …` as always, in a process of its own with its own environment, directory and descriptors.
What the dynamic linker or the interpreter reads when it starts (`LD_…`, `PYTHON…`) cannot be changed here.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = Path(__file__).parents[2]
_STATUS = struct.Struct("i")
_MOST_BYTES = 1 << 20
# What every daemon imports.
_IMPORTED = ("manager.adapters.metrics", "manager.cli.commands", "manager.daemon", "uvloop", "pydantic.v1")
# Where compiled files lie makes no difference to modules that are there already.
_OF_COMPILED_FILES = {"PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE"}
# Read once, when a process starts.
_OF_THE_INTERPRETER = ("LD_", "PYTHON", "MALLOC_", "GLIBC_", "COVERAGE_")


class Child:
    """A running program, with the methods of `subprocess.Popen` that the tests use."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""
        return self._read(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it goes on for `timeout` seconds.
        """
        status = self._read(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _read(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = _STATUS.unpack(os.read(self._status, _STATUS.size))[0]
            os.close(self._status)
        return self.returncode


Process: TypeAlias = "subprocess.Popen[bytes] | Child"


class Nursery:
    """The process that forks, from the first program on until this process ends."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.nursery", str(theirs.fileno())],
            cwd=ROOT,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        atexit.register(self._end)

    def _end(self) -> None:
        self._socket.close()
        self._process.wait()

    def begin(self, argv: Sequence[str], *, cwd: Path, env: Mapping[str, str], log: int) -> Child:
        """Run `python -m ARGV…` with both outputs in `log`."""
        read, write = os.pipe()
        order = json.dumps({"argv": list(argv), "cwd": str(cwd), "env": dict(env)}).encode()
        socket.send_fds(self._socket, [order], [log, write])
        os.close(write)
        return Child(int(self._socket.recv(64)), read)


_nursery: dict[int, Nursery] = {}


def can_begin(env: Mapping[str, str]) -> bool:
    """Return whether an environment differs from ours in nothing that the interpreter reads at its start."""
    names = {name for name in {*env, *os.environ} if name.startswith(_OF_THE_INTERPRETER)}
    return all(env.get(name) == os.environ.get(name) for name in names - _OF_COMPILED_FILES)


def begin(argv: Sequence[str], *, cwd: Path, env: Mapping[str, str], log: int) -> Child:
    """Run a program, as `Nursery.begin`; each process of the tests has a nursery of its own."""
    pid = os.getpid()
    if pid not in _nursery:
        _nursery.clear()
        _nursery[pid] = Nursery()
    return _nursery[pid].begin(argv, cwd=cwd, env=env, log=log)


def main() -> None:
    for name in _IMPORTED:
        importlib.import_module(name)
    orders = socket.socket(fileno=int(sys.argv[1]))
    gc.collect()
    gc.freeze()
    running: dict[int, tuple[int, int]] = {}  # pidfd -> pid, where its status goes
    while True:
        ready, _, _ = select.select([orders.fileno(), *running], [], [])
        for one in ready:
            if one in running:
                _bury(running, one)
            elif not _take(orders, running):
                return


def _take(orders: socket.socket, running: dict[int, tuple[int, int]]) -> bool:
    data, descriptors, _, _ = socket.recv_fds(orders, _MOST_BYTES, 2)
    if not data:
        return False
    log, status = descriptors
    pid = os.fork()
    if pid == 0:
        _become(json.loads(data), log)
    os.close(log)
    running[os.pidfd_open(pid)] = (pid, status)
    orders.send(str(pid).encode())
    return True


def _bury(running: dict[int, tuple[int, int]], pidfd: int) -> None:
    pid, status = running.pop(pidfd)
    _, code = os.waitpid(pid, 0)
    os.close(pidfd)
    with suppress(BrokenPipeError):  # nobody waits for it
        os.write(status, _STATUS.pack(os.waitstatus_to_exitcode(code)))
    os.close(status)


def _become(order: dict[str, Any], log: int) -> None:
    code: object = 1
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.closerange(3, 1 << 16)
        os.environ.clear()
        os.environ.update(order["env"])
        os.chdir(order["cwd"])
        sys.argv = order["argv"]
        sys.stdout.reconfigure(line_buffering=False)  # type: ignore[union-attr]
        runpy.run_module(order["argv"][0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        code = 0 if ended.code is None else ended.code
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:  # noqa: BLE001  (as the interpreter does at the end of a program)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    main()
