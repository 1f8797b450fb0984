"""Which container a process of the host runs in, read from /proc."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# One directory of a cgroup path: `docker-<id>.scope` with the systemd driver, `<id>` with cgroupfs. The
# list is closed, because `libpod-conmon-<id>.scope` is a container's monitor and not the container.
_CGROUP = re.compile(r"(?:(?:docker|cri-containerd|crio|libpod)-)?([0-9a-f]{64})(?:\.scope)?")

# What an engine mounts into a container: root of the mount, then the place it is mounted at. The root is
# what tells, for the host's own table holds mounts *at* paths with the id of each running container.
_MOUNT = re.compile(r"[/-]containers/([0-9a-f]{64})/\S+ /etc/(?:hostname|hosts|resolv\.conf) ")


class ProcCgroups:
    """`ContainerPids` for the processes under `proc`, which must be that of the host's pid namespace."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc

    def container_of(self, pid: int) -> str | None:
        """The full id of the container a process runs in, None when it runs in none or is gone.

        Of containers inside a container it is the outermost: the one that the host's engine knows.
        """
        process = self._proc / str(pid)
        for line in _lines(process / "cgroup"):
            # hierarchy-ID:controller-list:cgroup-path, see cgroups(7); the path may hold colons
            for directory in line.split(":", 2)[-1].split("/"):
                if (match := _CGROUP.fullmatch(directory)) is not None:
                    return match[1]
        # Seen from within a cgroup namespace a path starts at that namespace's root, and loses the id there.
        for line in _lines(process / "mountinfo"):
            if (match := _MOUNT.search(line)) is not None:
                return match[1]
        return None

    def name_of(self, pid: int) -> str | None:
        """The name of a process, as `ps` shows it without arguments; None when it is gone."""
        return next(_lines(self._proc / str(pid) / "comm"), None)


def _lines(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # the process has ended, or is not ours to look at
        return
    yield from text.splitlines()


class NoPids:
    """Implements `services.ports.ContainerPids` where processes run on other machines."""

    def container_of(self, pid: int) -> str | None:  # noqa: ARG002
        """Return None: the process is not on this machine."""
        return None

    def name_of(self, pid: int) -> str | None:  # noqa: ARG002
        """Return None: the process is not on this machine."""
        return None
