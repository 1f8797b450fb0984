"""The engines that tests can run on; the environment variable OEM_TEST_ENGINE chooses one.

- `docker` (default): the dockerd of this machine.
- `docker-sid`: the dockerd of Debian sid, in a tree of its own (`tests.tools.engines` makes it).
- `podman`: the Podman of this machine, by its Docker-compatible socket.
- `podman-sid`: the Podman of Debian sid, in the same tree.

Each kind but the first runs in a mount namespace of its own, which a holder process keeps. With a tree, its
root is that tree (`pivot_root`: with a chroot alone, an image cannot be loaded), with the /tmp, /proc, /sys
and /dev of this machine in it.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.host import storage_driver

if TYPE_CHECKING:
    import ipaddress
    from collections.abc import Sequence

CHOICE = "OEM_TEST_ENGINE"
CHOICES = ("docker", "docker-sid", "podman", "podman-sid")
TREE = Path(__file__).resolve().parents[2] / ".build" / "engines" / "sid"

# What engines keep beside their root directory is private to each of them: Podman has its locks in /dev/shm
# and the addresses that CNI has given away in /var/lib/cni, whatever root it is told.
_PRIVATE = ("/dev/shm", "/run", "/var/lib/cni", "/var/lib/containers", "/var/lib/docker")

_CONTAINERD_CONFIG = """\
version = 2
root = "{root}/containerd"
state = "{root}/containerd-state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs"]
[grpc]
  address = "{root}/containerd.sock"
"""

_PODMAN_CONFIG = """\
[containers]
log_driver = "k8s-file"
# What a container of dockerd may use as well.
pids_limit = 0
default_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
# crun refuses a machine whose cgroups are of both versions.
runtime = "runc"
cdi_spec_dirs = ["{root}/cdi"]
[network]
default_subnet = "{default}"
default_subnet_pools = [{{base = "{pool}", size = 27}}]
firewall_driver = "iptables"
"""

# As `nvidia-ctk cdi generate --device-name-strategy=uuid` names real cards: the cards of tests.
_CARDS = (
    *("GPU-aaaaaaaa-0000-4000-8000-000000000001", "GPU-bbbbbbbb-0000-4000-8000-000000000002"),
    *("GPU-cccccccc-0000-4000-8000-000000000003", "GPU-dddddddd-0000-4000-8000-000000000004"),
    *("MIG-1", "MIG-2", "GPU-00000000-0000-0000-0000-000000000001"),
)
CDI_VARIABLE = "OEM_TEST_CARD"
"""What a container on Podman has in its environment when it was given a card."""


def chosen() -> str:
    """The kind of engine that the tests run on. Raises ValueError."""
    kind = os.environ.get(CHOICE) or "docker"
    if kind not in CHOICES:
        raise ValueError(f"{CHOICE}={kind}: one of {', '.join(CHOICES)} is expected")
    return kind


def is_podman() -> bool:
    return chosen().startswith("podman")


def not_on_podman(difference: str) -> pytest.MarkDecorator:
    """Skips a test on Podman; the reason names the difference between the engines."""
    return pytest.mark.skipif(is_podman(), reason=f"Podman: {difference}")


@cache
def _older_podman() -> tuple[int, int] | None:
    """The version of this machine's Podman; None where another engine is chosen."""
    if chosen() != "podman":
        return None
    said = subprocess.run(["podman", "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"(\d+)\.(\d+)", said)
    assert version is not None, said
    return (int(version[1]), int(version[2]))


def gives_cards() -> bool:
    """Whether containers get cards that are asked for over the engine's API."""
    version = _older_podman()
    return version is None or version >= (5, 4)


def needs_word_of_lost_memory() -> pytest.MarkDecorator:
    """Skips a test on an engine that reports no end for want of memory."""
    version = _older_podman()
    return pytest.mark.skipif(
        version is not None and version < (5, 0) and not Path("/sys/fs/cgroup/cgroup.controllers").exists(),
        reason="Podman 4 on cgroup v1: neither an event nor the state says that the memory ran out",
    )


def needs_names() -> pytest.MarkDecorator:
    """Skips a test on an engine whose containers do not find each other by name."""
    resolvers = ("/usr/lib/cni/dnsname", "/usr/lib/podman/aardvark-dns")
    return pytest.mark.skipif(
        _older_podman() is not None and not any(Path(path).exists() for path in resolvers),
        reason="Podman: names need the CNI plugin dnsname, or netavark with aardvark-dns",
    )


def needs_cards() -> pytest.MarkDecorator:
    """Skips a test on an engine that gives no cards."""
    return pytest.mark.skipif(
        not gives_cards(), reason="Podman before 5.4: a card that is asked for over its Docker API is ignored"
    )


@dataclass(frozen=True, slots=True)
class Place:
    """What is one engine's own: a directory, a name for its bridge and cgroup, a network."""

    root: Path
    name: str
    network: ipaddress.IPv4Network

    @property
    def url(self) -> str:
        return f"unix://{self.root}/docker.sock"

    @property
    def data_root(self) -> Path:
        return self.root / "data"


class Dockerd:
    """Docker Engine.

    Args:
        tree: the directory that has its programs, None for those of this machine.
        live_restore: containers outlive it.
    """

    programs: Sequence[str] = ("dockerd", "containerd", "runc", "docker-proxy", "ip", "mount")

    def __init__(self, tree: Path | None, *, live_restore: bool) -> None:
        self.tree = tree
        self.is_apart = tree is not None
        self._live_restore = live_restore

    def environment(self, place: Place) -> dict[str, str]:
        return {}

    def prepare(self, place: Place) -> list[str] | None:
        """Write its files. The command line of what runs beside it."""
        (place.root / "daemon.json").write_text("{}")  # not the user's, which would contradict the arguments
        config = place.root / "containerd.toml"
        config.write_text(_CONTAINERD_CONFIG.format(root=place.root))
        # Its own containerd, as dockerd would share a running one and with it the names of all containers.
        return ["containerd", "--config", str(config)]

    def command(self, place: Place) -> list[str]:
        pool = list(place.network.subnets(prefixlen_diff=1))[1]  # the other half has the bridge
        return [
            "dockerd",
            *("--config-file", f"{place.root}/daemon.json"),
            *("--host", place.url),
            *("--data-root", str(place.data_root)),
            *("--exec-root", f"{place.root}/exec"),
            *("--pidfile", f"{place.root}/docker.pid"),
            *("--containerd", f"{place.root}/containerd.sock"),
            *("--bridge", place.name),
            *("--default-address-pool", f"base={pool},size=27"),
            *("--cgroup-parent", f"/{place.name}"),
            *("--exec-opt", "native.cgroupdriver=cgroupfs"),  # the same with and without systemd
            *("--storage-driver", storage_driver(place.data_root)),
            *("--shutdown-timeout", "1"),
            "--iptables=false",
            "--ip6tables=false",
            "--ip-forward=false",
            *(["--live-restore"] if self._live_restore else []),
        ]

    def container_cgroups(self, place: Place) -> tuple[str, ...]:
        """Names of cgroups, at most one level below a controller, that its containers are in."""
        return (place.name,)


class Podman:
    """Podman by its Docker-compatible socket. Its containers outlive the service.

    Args:
        tree: as that of `Dockerd`.
    """

    programs: Sequence[str] = ("podman", "conmon", "runc", "ip", "mount")
    is_apart = True

    def __init__(self, tree: Path | None) -> None:
        self.tree = tree

    def environment(self, place: Place) -> dict[str, str]:
        return {"CONTAINERS_CONF": f"{place.root}/containers.conf"}

    def prepare(self, place: Place) -> list[str] | None:
        halves = list(place.network.subnets(prefixlen_diff=1))
        default = list(halves[0].subnets(new_prefix=24))[1]
        # Podman 4.3 asks for more than a process without CAP_SYS_RESOURCE may give.
        limits = {
            "files": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
            "processes": min(resource.getrlimit(resource.RLIMIT_NPROC)[1], 2**15),  # what it gives itself
        }
        text = _PODMAN_CONFIG.format(root=place.root, default=default, pool=halves[1], **limits)
        (place.root / "containers.conf").write_text(text)
        devices = [{"name": card, "containerEdits": {"env": [f"{CDI_VARIABLE}={card}"]}} for card in _CARDS]
        specification = {"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "devices": devices}
        (place.root / "cdi").mkdir()
        (place.root / "cdi" / "nvidia.json").write_text(json.dumps(specification))
        return None

    def command(self, place: Place) -> list[str]:
        driver = {"overlay2": "overlay"}.get(found := storage_driver(place.data_root), found)
        return [
            "podman",
            *("--root", str(place.data_root)),
            *("--runroot", f"{place.root}/run"),
            *("--tmpdir", f"{place.root}/tmp"),
            *("--network-config-dir", f"{place.root}/networks"),
            *("--storage-driver", driver),
            *("system", "service", "--time", "0", place.url),
        ]

    def container_cgroups(self, place: Place) -> tuple[str, ...]:
        # Every engine of this kind has the same parent; the ids of the containers tell them apart.
        ids = {
            entry["id"]
            for file in place.data_root.glob("*-containers/containers.json")
            for entry in json.loads(file.read_bytes() or b"[]")
        }
        return tuple(f"{kind}-{id_}" for id_ in ids for kind in ("libpod", "libpod-conmon"))


def make_kind(*, live_restore: bool) -> Dockerd | Podman:
    kind = chosen()
    tree = TREE if kind.endswith("-sid") else None
    return Podman(tree) if is_podman() else Dockerd(tree, live_restore=live_restore)


def obstacles() -> list[str]:
    """Why the chosen engine cannot run here; nothing when it can."""
    kind = make_kind(live_restore=False)
    found = ["a private engine needs root"] if os.geteuid() else []
    if kind.tree is not None and not (kind.tree / "usr/sbin/dockerd").exists():
        return [*found, f"there is no {kind.tree}: `make test-engines` makes it"]
    if kind.tree is not None:
        return found
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in kind.programs if not shutil.which(name, path=path)]
    return found + ([f"not installed: {', '.join(missing)}"] if missing else [])


def apart(tree: Path | None, namespaces: Sequence[str] = ()) -> list[str]:
    """The command line of a process that holds a mount namespace; it says `ready` on its output.

    Args:
        tree: becomes the root in it.
        namespaces: more of them, as options of `unshare`.
    """
    lines = ["set -e"]
    if tree is not None:
        lines += [f"mount --rbind {tree} {tree}", f"cd {tree}", "mkdir -p .old"]
        lines += [f"mount --rbind /{name} {tree}/{name}" for name in ("proc", "sys", "dev", "tmp")]
        lines += ["pivot_root . .old", "cd /", "umount -l /.old"]
    lines += [f"mkdir -p {path} && mount -t tmpfs -o mode=1777 oem {path}" for path in _PRIVATE]
    lines += ["echo ready", "exec sleep 2147483647"]
    return ["unshare", "--mount", *namespaces, "--propagation", "private", "sh", "-c", "\n".join(lines)]
