"""Container engines for tests, which nobody else's containers live in.

`PrivateEngine` starts an engine of the chosen kind (`engine_kinds`) with a directory, a bridge and a cgroup
of its own; it can be killed, stopped in its tracks and restarted, and leaves nothing behind. `acquire_engine`
yields the best engine to be had.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import docker

from manager.cli.machine import prepare_cgroup_v2
from tests.support import engine_kinds
from tests.support.engine_kinds import Place
from tests.support.host import (
    CGROUPS,
    claim_network,
    command,
    command_line,
    interface_addresses,
    remove_cgroup,
)

if TYPE_CHECKING:
    import ipaddress
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

NESTED_IMAGE = "docker:28-dind"

_START_LIMIT_S = 60.0
_END_LIMIT_S = 15.0
_POLL_S = 0.01
_LOG_TAIL_LINES = 40
_MARK = "OLLAMA_MANAGER_TEST_ENGINE"


class EngineError(RuntimeError):
    """The engine did not do what it should; the message ends with the last lines of its log."""


class NoEngineError(RuntimeError):
    """There is no engine for tests here; the message says what to install."""


class Engine(Protocol):
    """What every engine for tests has."""

    @property
    def url(self) -> str: ...

    def client(self) -> docker.DockerClient:
        """A new client; the engine closes it at its end."""
        ...


class PrivateEngine:
    """An engine of its own, as a context manager. `private_engine_obstacles` says what it needs.

    The engine touches no firewall rule (`--iptables=false`), so that any number of engines, the user's
    included, get on with each other: the host reaches containers by their addresses on any network,
    containers reach the host by the gateway's, and published ports are served by docker-proxy. Containers
    have no way to the outside.

    Docker (up to 28) takes device requests for the driver `nvidia`: containers see NVIDIA_VISIBLE_DEVICES.

    Args:
        extra_arguments: more of the command line of the engine.
        data_limit_bytes: keep all data on a tmpfs of this size, so that a disk can be full.
        live_restore: containers outlive the engine; on Podman they always do.
    """

    _namespaces: Sequence[str] = ()  # those beside that for mounts, as `unshare` and `nsenter` name them

    def __init__(
        self,
        extra_arguments: Sequence[str] = (),
        *,
        data_limit_bytes: int | None = None,
        live_restore: bool = False,
    ) -> None:
        self._extra_arguments = list(extra_arguments)
        self._data_limit_bytes = data_limit_bytes
        self._kind = engine_kinds.make_kind(live_restore=live_restore)
        self._name = f"oem{secrets.token_hex(4)}"  # of the bridge (15 characters at most) and of the cgroup
        # A socket's path has 107 characters at most: the default directory may be too deep for that.
        self._root = Path(tempfile.gettempdir() if len(tempfile.gettempdir()) < 40 else "/tmp", self._name)
        self._place: Place | None = None
        self._holder: subprocess.Popen[bytes] | None = None
        self._beside: subprocess.Popen[bytes] | None = None
        self._engine: subprocess.Popen[bytes] | None = None
        self._cgroup_names: tuple[str, ...] = ()
        self._clients: list[docker.DockerClient] = []

    @property
    def url(self) -> str:
        return f"unix://{self._root}/docker.sock"

    @property
    def bridge(self) -> str:
        """Name of the default bridge's interface."""
        return self._name

    @property
    def data_root(self) -> Path:
        return self._root / "data"

    @property
    def event_log(self) -> Path | None:
        """The file that a Podman writes its events to; None for Docker."""
        return self._root / "tmp/events/events.log" if engine_kinds.is_podman() else None

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._running().pid

    def __enter__(self) -> Self:
        try:
            self._set_up()
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def client(self) -> docker.DockerClient:
        client = docker.DockerClient(base_url=self.url, version="auto", timeout=60)
        self._clients.append(client)
        return client

    def start(self) -> None:
        """Start the engine and wait until it answers. Raises EngineError when it ends or stays silent."""
        assert self._place is not None
        (self._root / "docker.pid").unlink(missing_ok=True)  # it may be that of another process by now
        (self._root / "docker.sock").unlink(missing_ok=True)
        self._engine = self._run([*self._kind.command(self._place), *self._extra_arguments])
        self.wait_until_ready()

    def wait_until_ready(self, limit_s: float = _START_LIMIT_S) -> None:
        """Returns once `GET /_ping` answers. Raises EngineError."""
        deadline = time.monotonic() + limit_s
        while not self._answers():
            if self._running().poll() is not None:
                raise EngineError(f"the engine ended with {self._running().returncode}\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise EngineError(f"the engine does not answer after {limit_s} s\n{self.log_tail()}")
            time.sleep(_POLL_S)

    def kill(self) -> None:
        """SIGKILL the engine. Its containers run on; without `live_restore` the next start ends them."""
        self._running().kill()
        self._running().wait()

    def restart(self) -> None:
        """End the engine in order, if it runs, and start it again."""
        self._running().terminate()
        self._running().wait(_END_LIMIT_S)
        self.start()

    def pause(self) -> None:
        """Stop the engine in its tracks: connections are accepted and nothing answers."""
        process = self._running()
        process.send_signal(signal.SIGSTOP)
        # On a busy machine a thread may still run for a while.
        while not all(_is_stopped(task) for task in Path(f"/proc/{process.pid}/task").iterdir()):
            time.sleep(0.005)

    def resume(self) -> None:
        self._running().send_signal(signal.SIGCONT)

    def log_tail(self) -> str:
        """The last lines of the log of the engine and what runs beside it."""
        log = self._root / "log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else ["(no log)"]
        return "\n".join(lines[-_LOG_TAIL_LINES:])

    def stop(self) -> None:
        """End the engine and all that it has made, in whatever state it is; a second call does nothing.

        It does not ask the engine for anything: that might be paused or dead.
        """
        for client in self._clients:
            client.close()
        self._clients.clear()
        for process in (self._engine, self._beside, self._holder):
            if process is not None:
                process.kill()
                process.wait()
        self._end_processes()
        for mount in self._mounts():
            subprocess.run(["umount", "--lazy", mount], check=False, capture_output=True)
        for interface in self._interfaces():
            subprocess.run(["ip", "link", "delete", interface], check=False, capture_output=True)
        for cgroup in self._cgroups():
            _await(lambda cgroup=cgroup: remove_cgroup(cgroup), _END_LIMIT_S)  # type: ignore[misc]
        shutil.rmtree(self._root, ignore_errors=True)

    def assert_clean(self) -> None:
        """Raises AssertionError that lists what the engine has left on the machine."""
        left = [f"process {pid}: {command_line(pid)}" for pid in self._processes()]
        left += [f"mount {mount}" for mount in self._mounts()]
        left += [f"interface {interface}" for interface in self._interfaces()]
        left += [f"cgroup {cgroup}" for cgroup in self._cgroups()]
        left += [f"directory {self._root}"] if self._root.exists() else []
        assert not left, "\n".join(["left behind:", *left])

    def _set_up(self) -> None:
        self._root.mkdir(mode=0o711)
        self.data_root.mkdir()
        if self._data_limit_bytes is not None:
            command(
                "mount", "-t", "tmpfs", "-o", f"size={self._data_limit_bytes}", "oem", str(self.data_root)
            )
        hook = self._root / "bin" / "nvidia-container-runtime-hook"
        hook.parent.mkdir()
        hook.write_text("#!/bin/sh\nexit 0\n")
        hook.chmod(0o755)
        prepare_cgroup_v2()
        self._place = Place(self._root, self._name, self._claimed())
        if self._kind.is_apart or self._namespaces:
            self._holder = self._held(engine_kinds.apart(self._kind.tree, self._namespaces))
            self._connect(self._holder.pid)
        if (beside := self._kind.prepare(self._place)) is not None:
            self._beside = self._run(beside)

    def _claimed(self) -> ipaddress.IPv4Network:
        """The network whose addresses are the engine's; its default bridge is there afterwards."""
        return claim_network(self._name)

    def _connect(self, holder: int) -> None:
        """Connect the namespaces of the process `holder` to what is outside."""

    def _held(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        """Start the process that holds the namespaces, and wait until it has made them."""
        with (self._root / "log").open("ab") as log:
            holder = subprocess.Popen(
                arguments,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert holder.stdout is not None
        with holder.stdout as output:
            if output.readline() != b"ready\n":
                raise EngineError(f"no namespaces for the engine\n{self.log_tail()}")
        return holder

    def _run(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        with (self._root / "log").open("ab") as log:
            return subprocess.Popen(
                [*self._inside(), *arguments],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _inside(self) -> list[str]:
        """What a command line begins with that runs in the engine's namespaces."""
        if self._holder is None:
            return []
        return ["nsenter", "--target", str(self._holder.pid), "--mount", *self._namespaces, "--"]

    def _environment(self) -> dict[str, str]:
        # The mark is inherited by every shim and docker-proxy, which is how they are found at the end.
        more = self._kind.environment(self._place) if self._place is not None else {}
        path = f"{self._root}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return {**os.environ, **more, _MARK: self._name, "PATH": path}

    def _running(self) -> subprocess.Popen[bytes]:
        if self._engine is None:
            raise EngineError("the engine has not been started")
        return self._engine

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as connection, suppress(OSError):
            connection.settimeout(1)
            connection.connect(f"{self._root}/docker.sock")
            connection.sendall(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
            return b" 200 " in connection.recv(64)
        return False

    def _end_processes(self) -> None:
        def none_left() -> bool:
            # The monitors first: they start another process when their container ends.
            for pid in sorted(self._processes(), key=lambda pid: "conmon" not in command_line(pid)):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not self._processes()

        _await(none_left, _END_LIMIT_S)

    def _processes(self) -> list[int]:
        """Helpers of the engine, by the mark in their environment, and containers', by their cgroup."""
        mark = f"{_MARK}={self._name}".encode()
        cgroups = [f"/{name}" for name in self._container_cgroups()]
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                marked = mark in (folder / "environ").read_bytes().split(b"\0") or (
                    # Podman gives its monitors another environment.
                    engine_kinds.is_podman() and f"{self._root}/" in command_line(int(folder.name))
                )
                inside = (folder / "cgroup").read_text()
                if state != "Z" and (marked or any(cgroup in inside for cgroup in cgroups)):
                    found.append(int(folder.name))
        return found

    def _mounts(self) -> list[str]:
        """Mount points below the engine's directory, the deepest first."""
        points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        return sorted(
            (point for point in points if point.startswith(f"{self._root}/")), key=len, reverse=True
        )

    def _interfaces(self) -> list[str]:
        """Interfaces with an address of the engine's network: bridges, its own and of other networks."""
        if self._place is None:
            return []
        network = self._place.network
        return [name for name, address in interface_addresses() if address in network]

    def _cgroups(self) -> list[Path]:
        return [
            path
            for name in self._container_cgroups()
            for pattern in (name, f"*/{name}", f"*/*/{name}")
            for path in CGROUPS.glob(pattern)
        ]

    def _container_cgroups(self) -> tuple[str, ...]:
        """Those of all containers that were seen so far: what lists them is removed at the end."""
        if self._place is not None:
            self._cgroup_names = (*self._cgroup_names, *self._kind.container_cgroups(self._place))
            self._cgroup_names = tuple(dict.fromkeys(self._cgroup_names))
        return self._cgroup_names


class NestedEngine:
    """A Docker engine in a privileged container of the user's own engine.

    Its containers are reached by published ports only, not by address.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._clients = ExitStack()

    @property
    def url(self) -> str:
        return self._url

    def client(self) -> docker.DockerClient:
        client = docker.DockerClient(base_url=self._url, version="auto", timeout=60)
        self._clients.callback(client.close)
        return client

    def close(self) -> None:
        self._clients.close()


def _is_stopped(task: Path) -> bool:
    """Return whether a thread is stopped, or has ended; the state follows the name in parentheses."""
    with suppress(OSError):
        return (task / "stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return True


@contextmanager
def acquire_engine() -> Iterator[Engine]:
    """An engine for tests alone: a private one where that is possible, else one in the user's.

    Raises NoEngineError.
    """
    obstacles = private_engine_obstacles()
    if not obstacles:
        with PrivateEngine() as engine:
            yield engine
        return
    try:
        user = docker.from_env()
        user.ping()
        user.close()
    except docker.errors.DockerException as error:
        raise NoEngineError(
            f"no Docker engine for tests: {'; '.join(obstacles)}; and no engine of yours answers ({error}). "
            "As root: apt-get install docker.io iptables iproute2"
        ) from error
    with _nested_engine() as nested:
        yield nested


@contextmanager
def unconnected() -> Iterator[PrivateEngine]:
    """An engine that reaches no registry, whatever this machine does: nothing listens at its proxy."""
    before = os.environ.get("HTTPS_PROXY")
    os.environ["HTTPS_PROXY"] = "http://127.0.0.1:9"
    try:
        engine = PrivateEngine()
        engine.__enter__()
    finally:
        if before is None:
            del os.environ["HTTPS_PROXY"]
        else:
            os.environ["HTTPS_PROXY"] = before
    try:
        yield engine
    finally:
        engine.stop()


def private_engine_obstacles() -> list[str]:
    """Why a PrivateEngine cannot run here; nothing when it can."""
    return engine_kinds.obstacles()


@contextmanager
def _nested_engine() -> Iterator[NestedEngine]:
    from testcontainers.core.container import DockerContainer  # noqa: PLC0415 - seldom needed

    port = 2375
    container = DockerContainer(NESTED_IMAGE).with_kwargs(privileged=True).with_exposed_ports(port)
    with container.with_env("DOCKER_TLS_CERTDIR", "") as running:
        engine = NestedEngine(f"tcp://{running.get_container_host_ip()}:{running.get_exposed_port(port)}")

        def answers() -> bool:
            with suppress(docker.errors.DockerException):
                engine.client().close()
                return True
            return False

        try:
            _await(answers, _START_LIMIT_S)
            yield engine
        finally:
            engine.close()


def _await(condition: Callable[[], bool], limit_s: float) -> None:
    """Returns when `condition` holds or the limit is over; what is then left is for `assert_clean` to say."""
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
