"""What this machine has: programs of the system, and a Docker Engine for everyday use."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import docker
from docker.errors import DockerException

from tests.support.host import prepare_cgroup_v2
from tests.tools.console import ToolError, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SYSTEM_SOCKET = "unix:///var/run/docker.sock"

_PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
_SERVICE_LIMIT_S = 20.0
_ENGINE_LIMIT_S = 60.0
_PING_S = 5


@dataclass(frozen=True, slots=True)
class Need:
    """A program, and the Debian packages that bring it."""

    program: str
    packages: tuple[str, ...]


DOCKERD = Need("dockerd", ("docker.io",))
IPTABLES = Need("iptables", ("iptables",))
IP = Need("ip", ("iproute2",))
COMPILER = Need("cc", ("gcc", "libc6-dev"))
COMPOSE = Need("docker-compose", ("docker-compose",))


def which(program: str) -> str | None:
    return shutil.which(program, path=_PATH)


def lacking(needs: Iterable[Need]) -> list[Need]:
    return [need for need in needs if which(need.program) is None]


def provide(needs: Iterable[Need]) -> None:
    """Have all of `needs` on this machine: installs with apt what is missing, where it may.

    Raises:
        ToolError: it may not, or it failed.
    """
    missing = lacking(needs)
    if not missing:
        return
    packages = [package for need in missing for package in need.packages]
    names = ", ".join(need.program for need in missing)
    if os.geteuid() != 0 or which("apt-get") is None:
        raise ToolError(
            f"not installed: {names}\n"
            f"  Debian, Ubuntu:  sudo apt-get install {' '.join(packages)}\n"
            "  elsewhere:       the packages of your distribution that have these programs"
        )
    say(f"installing {' '.join(packages)} (not installed: {names}) ...")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages],
    ):
        result = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if result.returncode:
            tail = "\n".join((result.stdout + result.stderr).splitlines()[-15:])
            raise ToolError(f"{' '.join(command)} failed:\n{tail}")
    if lacking(needs):
        raise ToolError(f"installed, and still not there: {', '.join(n.program for n in lacking(needs))}")


def why_no_engine(url: str) -> str | None:
    """None when the engine at `url` answers, else why it does not."""
    try:
        with closing(docker.DockerClient(base_url=url, version="auto", timeout=_PING_S)) as client:
            client.ping()
    except (DockerException, OSError) as error:
        return str(error)
    return None


def provide_engine(url: str, log_dir: Path) -> None:
    """Have the Docker Engine at `url` answer; starts and installs this machine's own where it may.

    Raises:
        ToolError: it may not, or it failed.
    """
    trouble = why_no_engine(url)
    if trouble is None:
        return
    if url != SYSTEM_SOCKET:
        raise ToolError(f"the Docker Engine at {url} does not answer: {trouble}")
    if os.geteuid() != 0:
        raise ToolError(_what_a_user_does(trouble))
    provide([DOCKERD, IPTABLES])
    say("the Docker Engine of this machine does not run; starting it ...")
    for start in (_start_by_systemd, _start_by_service):
        if start(url):
            return
    _start_in_background(url, log_dir)


def _what_a_user_does(trouble: str) -> str:
    socket = Path(SYSTEM_SOCKET.removeprefix("unix://"))
    if socket.exists() and not os.access(socket, os.R_OK | os.W_OK):
        return (
            f"you may not use the Docker Engine of this machine ({socket}).\n"
            "  sudo usermod -aG docker $USER     then log in again"
        )
    if which("dockerd") is not None:
        return (
            "the Docker Engine of this machine does not run.\n  sudo systemctl start docker"
            f"\n(what the attempt to reach it said: {trouble})"
        )
    return (
        "there is no Docker Engine on this machine. Either name one with DOCKER_HOST, or install it:\n"
        "  Debian, Ubuntu:  sudo apt-get install docker.io iptables\n"
        "  elsewhere:       https://docs.docker.com/engine/install/\n"
        "and then:          sudo usermod -aG docker $USER     (and log in again)"
    )


def _start_by_systemd(url: str) -> bool:
    if not Path("/run/systemd/system").is_dir():
        return False
    result = subprocess.run(["systemctl", "start", "docker"], capture_output=True, text=True, check=False)
    if result.returncode:
        say(f"systemctl start docker failed: {result.stderr.strip()}")
        return False
    return _await(lambda: why_no_engine(url) is None, _SERVICE_LIMIT_S)


def _start_by_service(url: str) -> bool:
    if Path("/run/systemd/system").is_dir() or not Path("/etc/init.d/docker").exists():
        return False
    if which("service") is None:
        return False
    result = subprocess.run(["service", "docker", "start"], capture_output=True, text=True, check=False)
    if result.returncode:
        say(f"service docker start failed: {(result.stdout + result.stderr).strip()}")
        return False
    return _await(lambda: why_no_engine(url) is None, _SERVICE_LIMIT_S)


def _start_in_background(url: str, log_dir: Path) -> None:
    prepare_cgroup_v2()
    log_dir.mkdir(parents=True, exist_ok=True)
    log = log_dir / "dockerd.log"
    with log.open("ab") as sink:
        # A session of its own: Ctrl-C is meant for the daemon, not for everybody's containers.
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
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise ToolError(f"dockerd does not run; the end of {log}:\n{tail}")
    say(f"started dockerd in the background (process {engine.pid}, log {log}); it stays when this ends")


def _await(condition: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
