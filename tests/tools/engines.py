"""`make test-engines`: the integration tests on other engines than that of this machine; not in `make test`.

It makes what an engine needs: Debian sid in .build/engines/sid (debootstrap; the tree is kept until
`make clean`) for `docker-sid` and `podman-sid`, the package for `podman`. It needs root. ARGS names engines,
then arguments of pytest: `make test-engines ARGS="podman tests/integration/test_idle.py"`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from manager.cli.machine import DOCKERD, IPTABLES, Need
from tests.support.engine_kinds import CHOICE, CHOICES, TREE
from tests.tools.console import ToolError, say
from tests.tools.suite import streamed
from tests.tools.system import IP, provide

_MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
_PACKAGES = ("docker.io", "podman", "netavark", "aardvark-dns", "crun", "runc", "iptables", "ca-certificates")
_DEBOOTSTRAP = Need("debootstrap", ("debootstrap",))
_PODMAN = Need("podman", ("podman", "containernetworking-plugins", "runc"))
_NICE = 5


def main() -> int:
    arguments = sys.argv[1:]
    engines = [argument for argument in arguments if argument in CHOICES]
    engines = engines or [engine for engine in CHOICES if engine != "docker"]
    pytest_arguments = [argument for argument in arguments if argument not in CHOICES]
    if not any(argument.startswith("tests/") for argument in pytest_arguments):
        pytest_arguments.append("tests/integration")
    if os.geteuid() != 0:
        raise ToolError("the engines need root: they have namespaces, bridges and cgroups of their own")
    os.nice(_NICE)
    results = [(engine, *_tried(engine, pytest_arguments)) for engine in engines]
    say("")
    for engine, version, status, summary in results:
        say(f"{engine:11} {version:16} {'passed' if status == 0 else 'FAILED'}  {summary}")
    return max(status for _, _, status, _ in results)


def _tried(engine: str, arguments: list[str]) -> tuple[str, int, str]:
    """Run the tests on an engine. Its version, pytest's exit status and last line."""
    _provide(engine)
    os.environ[CHOICE] = engine
    version = _version(engine)
    say(f"== {engine} {version}")
    run = streamed([sys.executable, "-m", "pytest", "-q", *arguments])
    return version, run.status, run.summary.strip("= ")


def _provide(engine: str) -> None:
    provide([DOCKERD, IPTABLES, IP])
    if engine == "podman":
        provide([_PODMAN])
    if engine.endswith("-sid") and not (TREE / "usr/bin/podman").exists():
        provide([_DEBOOTSTRAP])
        _make_tree()


def _make_tree() -> None:
    """Have Debian sid with its engines in TREE; a tree that was not finished is made anew."""
    unfinished = TREE.with_name(f"{TREE.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    say(f"making Debian sid in {TREE} (about two minutes, 700 MB) ...")
    began = time.monotonic()
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(_PACKAGES)}", "sid", str(unfinished)]
    result = subprocess.run([*command, _MIRROR], capture_output=True, text=True, check=False)
    if result.returncode:
        tail = "\n".join((result.stdout + result.stderr).splitlines()[-15:])
        raise ToolError(f"debootstrap failed:\n{tail}")
    for archive in Path(unfinished, "var/cache/apt/archives").glob("*.deb"):
        archive.unlink()
    unfinished.rename(TREE)
    say(f"made in {time.monotonic() - began:.0f} s")


def _version(engine: str) -> str:
    program = ["podman", "--version"] if "podman" in engine else ["dockerd", "--version"]
    # With /proc, which Podman looks at and a bare tree does not have.
    script = f'mount --rbind /proc {TREE}/proc; exec chroot {TREE} "$@"'
    inside = ["unshare", "--mount", "sh", "-c", script, "sh"]
    command = [*inside, *program] if engine.endswith("-sid") else program
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return next((word.strip(",") for word in said.split() if word[:1].isdigit()), "unknown")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ToolError as error:
        say(f"make: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
