"""The Docker Engine of this machine: how it is installed and started. For `up`, which asks first."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from manager.cli.failures import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SYSTEM_SOCKET = "unix:///var/run/docker.sock"

_PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
_CGROUPS = Path("/sys/fs/cgroup")
_SERVICE_LIMIT_S = 20.0
_ENGINE_LIMIT_S = 60.0
_PING_S = 5.0
_POLL_S = 0.05
_TAIL_LINES = 15


@dataclass(frozen=True, slots=True)
class Need:
    """A program, and the Debian packages that have it."""

    program: str
    packages: tuple[str, ...]


DOCKERD = Need("dockerd", ("docker.io",))
IPTABLES = Need("iptables", ("iptables",))


def which(program: str) -> str | None:
    """Return the path of a program, looked for in the directories for administrators too."""
    return shutil.which(program, path=_PATH)


def lacking(needs: Iterable[Need]) -> list[Need]:
    """Return the needs whose programs are not installed."""
    return [need for need in needs if which(need.program) is None]


def install(needs: Iterable[Need]) -> None:
    """Install what is missing of `needs` with apt.

    Raises:
        CommandError: this user may not, this system has no apt, or apt failed.
    """
    missing = lacking(needs)
    if not missing:
        return
    packages = [package for need in missing for package in need.packages]
    names = ", ".join(need.program for need in missing)
    if os.geteuid() != 0 or which("apt-get") is None:
        raise CommandError(
            f"not installed: {names}",
            lines=(
                f"Debian, Ubuntu:  sudo apt-get install {' '.join(packages)}",
                "elsewhere:       the packages of your distribution that have these programs",
            ),
        )
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages],
    ):
        result = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if result.returncode:
            output = (result.stdout + result.stderr).splitlines()[-_TAIL_LINES:]
            raise CommandError(f"{' '.join(command)} failed", lines=output)
    if lacking(needs):
        names = ", ".join(need.program for need in lacking(needs))
        raise CommandError(f"apt-get has installed {' '.join(packages)}, and there is still no {names}")


def why_no_engine(url: str) -> str | None:
    """Return why the engine at `url` does not answer; None when it does."""
    from manager.adapters.docker_engine import DockerEngine  # noqa: PLC0415
    from manager.errors import EngineError  # noqa: PLC0415

    async def ping() -> None:
        engine = DockerEngine(url, _PING_S)
        try:
            await engine.ping(_PING_S)
        finally:
            engine.close()

    try:
        asyncio.run(ping())
    except EngineError as error:
        return error.message
    return None


def how_to_start(url: str, trouble: str) -> tuple[str, ...]:
    """Return in words what `start_engine` would do.

    Raises:
        CommandError: this user cannot start the engine, or it is no engine of this machine.
    """
    if url != SYSTEM_SOCKET:
        raise CommandError(
            f"the Docker Engine at {url} does not answer: {trouble}",
            next_step="check DOCKER_HOST or engine.url, and that the engine runs",
        )
    missing = [package for need in lacking((DOCKERD, IPTABLES)) for package in need.packages]
    if os.geteuid() != 0 or (missing and which("apt-get") is None):
        raise _for_an_administrator(trouble)
    install_first = (f"install {' '.join(missing)} (apt-get)",) if missing else ()
    return (*install_first, "start the Docker Engine of this machine")


def start_engine(url: str, log_dir: Path) -> None:
    """Install the engine of this machine where it is missing, and start it. It keeps running afterwards.

    Raises:
        CommandError: it does not run.
    """
    install((DOCKERD, IPTABLES))
    for start in (_start_by_systemd, _start_by_service):
        if start(url):
            return
    _start_in_background(url, log_dir)


def _for_an_administrator(trouble: str) -> CommandError:
    socket = Path(SYSTEM_SOCKET.removeprefix("unix://"))
    if socket.exists() and not os.access(socket, os.R_OK | os.W_OK):
        return CommandError(
            f"this user may not use the Docker Engine of this machine ({socket})",
            lines=("sudo usermod -aG docker $USER     then log in again",),
        )
    if which("dockerd") is not None:
        return CommandError(
            f"the Docker Engine of this machine does not run ({trouble})",
            lines=("sudo systemctl start docker",),
        )
    return CommandError(
        "there is no Docker Engine on this machine",
        next_step="or set DOCKER_HOST to the engine of another machine",
        lines=(
            "Debian, Ubuntu:  sudo apt-get install docker.io iptables",
            "elsewhere:       https://docs.docker.com/engine/install/",
            "and then:        sudo usermod -aG docker $USER     (and log in again)",
        ),
    )


def _start_by_systemd(url: str) -> bool:
    if not Path("/run/systemd/system").is_dir():
        return False
    return _run_service(["systemctl", "start", "docker"], url)


def _start_by_service(url: str) -> bool:
    if Path("/run/systemd/system").is_dir() or not Path("/etc/init.d/docker").exists():
        return False
    if which("service") is None:
        return False
    return _run_service(["service", "docker", "start"], url)


def _run_service(command: list[str], url: str) -> bool:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        click.echo(f"{' '.join(command)} failed: {(result.stdout + result.stderr).strip()}", err=True)
        return False
    return _await(lambda: why_no_engine(url) is None, _SERVICE_LIMIT_S)


def _start_in_background(url: str, log_dir: Path) -> None:
    with suppress(OSError):  # dockerd says what it lacks
        prepare_cgroup_v2()
    log_dir.mkdir(parents=True, exist_ok=True)
    log = log_dir / "ollama-manager-dockerd.log"
    with log.open("ab") as sink:
        # A session of its own: Ctrl-C is for the daemon, not for the containers of others.
        engine = subprocess.Popen(
            [which("dockerd") or "dockerd"],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
            env={**os.environ, "PATH": _PATH},
        )
    answers = _await(lambda: engine.poll() is not None or why_no_engine(url) is None, _ENGINE_LIMIT_S)
    if not answers or engine.poll() is not None:
        tail = log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        raise CommandError(f"dockerd does not run; this is the end of {log}", lines=tail)
    click.echo(f"started dockerd in the background (process {engine.pid}, log {log}); it stays", err=True)


def prepare_cgroup_v2() -> None:
    """Let dockerd make cgroups where this machine is a container with a cgroup v2 of its own.

    The root of such a cgroup must have no processes: they move into a child. The root of a whole machine
    has no `cgroup.type` and is left alone.

    Raises:
        OSError: the cgroups may not be changed.
    """
    wanted = _CGROUPS / "cgroup.subtree_control"
    if not (_CGROUPS / "cgroup.type").exists() or "memory" in wanted.read_text().split():
        return
    controllers = (_CGROUPS / "cgroup.controllers").read_text().split()
    inner = _CGROUPS / "oem-processes"
    inner.mkdir(exist_ok=True)
    for pid in (_CGROUPS / "cgroup.procs").read_text().split():
        with suppress(OSError):  # kernel threads stay, others have ended
            (inner / "cgroup.procs").write_text(pid)
    wanted.write_text(" ".join(f"+{controller}" for controller in controllers))


def _await(condition: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
