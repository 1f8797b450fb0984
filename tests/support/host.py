"""What a private engine needs of the machine: a network, a storage driver, cgroups."""

from __future__ import annotations

import ctypes
import fcntl
import ipaddress
import json
import os
import random
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_OUTER_NETWORK = "OEM_TEST_OUTER_NETWORK"


class HostError(RuntimeError):
    """A program of the system failed; the message has its words."""


def command(*arguments: str) -> str:
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if result.returncode:
        raise HostError(f"{' '.join(arguments)}: {result.stderr.strip()}")
    return result.stdout


def command_line(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return "(gone)"


def leave_network() -> None:
    """Give this process, and those that it starts from now on, a network namespace of their own.

    The firewall of the machine (a Docker Engine of the user's drops what one container sends to another), its
    interfaces and its ports are then none of the tests' business, and what the tests make ends with them.
    Does nothing without root. Raises HostError.
    """
    if os.geteuid():
        return
    if _OUTER_NETWORK not in os.environ:
        descriptor = os.open("/proc/self/ns/net", os.O_RDONLY)  # stays open as long as the tests run
        os.environ[_OUTER_NETWORK] = f"/proc/{os.getpid()}/fd/{descriptor}"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        raise HostError(f"a network namespace: {os.strerror(ctypes.get_errno())}")
    command("ip", "link", "set", "lo", "up")


def in_outer_network(*arguments: str) -> str:
    """As `command`, with the network that the tests were started in."""
    outer = os.environ.get(_OUTER_NETWORK)
    return command(*(("nsenter", f"--net={outer}") if outer else ()), *arguments)


def interface_addresses() -> list[tuple[str, ipaddress.IPv4Address]]:
    links = json.loads(command("ip", "-json", "-4", "address", "show"))
    return [
        (link["ifname"], ipaddress.IPv4Address(entry["local"]))
        for link in links
        for entry in link["addr_info"]
    ]


def claim_network(bridge: str) -> ipaddress.IPv4Network:
    """Make a bridge with an address of a /20 that no route of this machine touches; returns the /20.

    The bridge's address is what tells other engines that the network is taken; a lock covers choosing and
    taking.
    """
    with Path(tempfile.gettempdir(), "oem-engine.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        routes = json.loads(command("ip", "-json", "-4", "route", "show", "table", "all"))
        taken = [
            ipaddress.ip_network(route["dst"].removeprefix("default"), strict=False)
            for route in routes
            if route["dst"] not in ("default", "0.0.0.0/0")
        ]
        candidates = list(ipaddress.IPv4Network("10.192.0.0/10").subnets(new_prefix=20))
        random.shuffle(candidates)
        network = next((one for one in candidates if not any(one.overlaps(other) for other in taken)), None)
        if network is None:
            raise HostError("no free network in 10.192.0.0/10")
        command("ip", "link", "add", bridge, "type", "bridge")
        command("ip", "address", "add", f"{network[1]}/24", "dev", bridge)
        command("ip", "link", "set", bridge, "up")
    return network


def storage_driver(folder: Path) -> str:
    """overlay2 where an overlay can be mounted, else vfs (as in a container whose own root is an overlay)."""
    parts = {name: folder / f"probe-{name}" for name in ("lowerdir", "upperdir", "workdir")}
    target = folder / "probe-merged"
    for path in (*parts.values(), target):
        path.mkdir()
    options = ",".join(f"{name}={path}" for name, path in parts.items())
    mounted = subprocess.run(
        ["mount", "-t", "overlay", "-o", options, "overlay", str(target)], check=False, capture_output=True
    )
    if mounted.returncode == 0:
        command("umount", str(target))
    for path in (*parts.values(), target):
        shutil.rmtree(path)
    return "overlay2" if mounted.returncode == 0 else "vfs"


def remove_cgroup(path: Path) -> bool:
    """Remove a cgroup and those below it; False while it is still in use."""
    for folder in sorted(
        (entry for entry in path.rglob("*") if entry.is_dir()), key=lambda entry: -len(entry.parts)
    ):
        with suppress(OSError):
            folder.rmdir()
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
