"""The mapping of processes to containers, on the forms that /proc has with the engines and drivers in use."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from manager.adapters.cgroups import NoPids, ProcCgroups

if TYPE_CHECKING:
    from pathlib import Path

    from manager.services.ports import ContainerPids

A = "3f4c1d5e" * 8
B = "0a9b8c7d" * 8

V1_CGROUPFS = f"""\
12:pids:/docker/{A}
11:cpuset:/docker/{A}
4:cpu,cpuacct:/docker/{A}
1:name=systemd:/docker/{A}
0::/system.slice/containerd.service
"""
V1_SYSTEMD = f"""\
12:memory:/system.slice/docker-{A}.scope
11:rdma:/
1:name=systemd:/system.slice/docker-{A}.scope
0::/system.slice/docker-{A}.scope
"""
V1_KUBERNETES = f"11:memory:/kubepods/burstable/pod6a9ef9b4-0f5b-4a6b-9d3c-1b7f0f9f3d11/{A}\n"
V2_KUBERNETES = (
    "0::/kubepods.slice/kubepods-besteffort.slice/"
    f"kubepods-besteffort-pod6a9ef9b4_0f5b.slice/cri-containerd-{A}.scope\n"
)
V2_PODMAN = f"0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{A}.scope/container\n"
V2_ROOTLESS = f"0::/user.slice/user-1000.slice/user@1000.service/user.slice/docker-{A}.scope\n"

HOST_MOUNTS = f"""\
22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw
25 22 0:22 / /proc rw,nosuid,nodev,noexec shared:5 - proc proc rw
612 22 0:61 / /var/lib/docker/containers/{A}/mounts/shm rw shared:300 - tmpfs shm rw,size=65536k
613 22 0:62 / /var/lib/docker/overlay2/{B}/merged rw shared:301 - overlay overlay rw
"""
CONTAINER_MOUNTS = f"""\
640 600 0:61 / / rw,relatime master:300 - overlay overlay rw,lowerdir=/var/lib/docker/overlay2/l/X
641 640 0:64 / /proc rw,nosuid - proc proc rw
648 640 259:2 /var/lib/docker/containers/{A}/resolv.conf /etc/resolv.conf rw - ext4 /dev/nvme0n1p2 rw
649 640 259:2 /var/lib/docker/containers/{A}/hostname /etc/hostname rw - ext4 /dev/nvme0n1p2 rw
"""
PODMAN_MOUNTS = (
    f"649 640 0:45 /containers/storage/overlay-containers/{A}/userdata/hosts "
    "/etc/hosts rw,nosuid - tmpfs tmpfs rw\n"
)


def process(proc: Path, *, cgroup: str | None = None, mountinfo: str | None = None) -> ContainerPids:
    (proc / "42").mkdir()
    if cgroup is not None:
        (proc / "42" / "cgroup").write_text(cgroup)
    if mountinfo is not None:
        (proc / "42" / "mountinfo").write_text(mountinfo)
    return ProcCgroups(proc)


@pytest.mark.parametrize(
    "cgroup",
    [
        pytest.param(V1_CGROUPFS, id="v1-cgroupfs"),
        pytest.param(V1_SYSTEMD, id="v1-systemd"),
        pytest.param(f"0::/docker/{A}\n", id="v2-cgroupfs"),
        pytest.param(f"0::/system.slice/docker-{A}.scope\n", id="v2-systemd"),
        pytest.param(f"0::/system.slice/docker-{A}.scope/init.scope\n", id="child-of-a-scope"),
        pytest.param(f"0::/docker/{A}/ollama/runner\n", id="child-of-a-directory"),
        pytest.param(f"0::/gpu.slice/gpu-eu:1.slice/docker-{A}.scope\n", id="cgroup-parent-with-a-colon"),
        pytest.param(f"0::/../docker-{A}.scope\n", id="from-another-container-systemd"),
        pytest.param(f"0::/../{A}\n", id="from-another-container-cgroupfs"),
        pytest.param(f"0::/actions_job/{A}\n", id="cgroup-parent"),
        pytest.param(V1_KUBERNETES, id="kubernetes-v1"),
        pytest.param(V2_KUBERNETES, id="kubernetes-v2"),
        pytest.param(f"0::/machine.slice/libpod-{A}.scope/container\n", id="podman"),
        pytest.param(V2_PODMAN, id="podman-rootless"),
        pytest.param(V2_ROOTLESS, id="docker-rootless"),
        pytest.param(f"0::/kubepods.slice/crio-{A}.scope\n", id="cri-o"),
        pytest.param(f"0::/docker/{A}", id="no-last-newline"),
    ],
)
def test_the_container_is_named_in_the_cgroup_path(tmp_path: Path, cgroup: str) -> None:
    assert process(tmp_path, cgroup=cgroup).container_of(42) == A


@pytest.mark.parametrize(
    "cgroup",
    [
        f"0::/docker/{A}/docker/{B}\n",
        f"0::/system.slice/docker-{A}.scope/system.slice/docker-{B}.scope\n",
        f"0::/docker/{A}/kubelet.slice/kubelet-kubepods.slice/cri-containerd-{B}.scope\n",
    ],
)
def test_of_nested_containers_the_outermost_is_meant(tmp_path: Path, cgroup: str) -> None:
    assert process(tmp_path, cgroup=cgroup).container_of(42) == A


@pytest.mark.parametrize(
    "cgroup",
    [
        "",
        "\n",
        "nonsense\n",
        "0::/\n",
        "0::/init.scope\n",
        "0::/system.slice/docker.service\n",
        "0::/user.slice/user-1000.slice/session-3.scope\n",
        f"0::/system.slice/docker-{A[:12]}.scope\n",
        f"0::/system.slice/docker-{A}0.scope\n",
        f"0::/system.slice/docker-{A.upper()}.scope\n",
        f"0::/machine.slice/libpod-conmon-{A}.scope\n",
        f"0::/system.slice/docker-{A}.scope.d\n",
        f"0::/system.slice/backup-{A}.service\n",
    ],
)
def test_a_process_of_the_host_is_in_no_container(tmp_path: Path, cgroup: str) -> None:
    assert process(tmp_path, cgroup=cgroup, mountinfo=HOST_MOUNTS).container_of(42) is None


@pytest.mark.parametrize("mountinfo", [CONTAINER_MOUNTS, PODMAN_MOUNTS])
def test_in_a_private_cgroup_namespace_the_mounts_tell(tmp_path: Path, mountinfo: str) -> None:
    assert process(tmp_path, cgroup="0::/\n", mountinfo=mountinfo).container_of(42) == A


def test_the_cgroup_is_believed_before_the_mounts(tmp_path: Path) -> None:
    pids = process(tmp_path, cgroup=f"0::/docker/{B}\n", mountinfo=CONTAINER_MOUNTS)
    assert pids.container_of(42) == B


def test_a_process_that_is_gone_is_in_no_container(tmp_path: Path) -> None:
    assert ProcCgroups(tmp_path).container_of(42) is None


def test_a_process_that_goes_between_two_looks_is_in_no_container(tmp_path: Path) -> None:
    assert process(tmp_path, cgroup="0::/\n").container_of(42) is None


def test_a_cgroup_that_cannot_be_read_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "42" / "cgroup").mkdir(parents=True)
    assert ProcCgroups(tmp_path).container_of(42) is None


def test_bytes_that_are_no_text_are_no_error(tmp_path: Path) -> None:
    (tmp_path / "42").mkdir()
    (tmp_path / "42" / "cgroup").write_bytes(b"0::/\xff\xfe\n1:name=systemd:/docker/" + A.encode() + b"\n")
    assert ProcCgroups(tmp_path).container_of(42) == A


@pytest.mark.parametrize("pid", [0, -1, 2**31])
def test_a_number_that_is_no_pid_is_in_no_container(pid: int) -> None:
    assert ProcCgroups().container_of(pid) is None


def test_this_process_and_its_parent_are_where_the_kernel_says() -> None:
    pids = ProcCgroups()
    assert pids.container_of(os.getpid()) == pids.container_of(os.getppid())


def test_the_name_of_a_process_is_the_one_that_ps_shows(tmp_path: Path) -> None:
    (tmp_path / "42").mkdir()
    (tmp_path / "42" / "comm").write_text("ollama runner\n")
    proc = ProcCgroups(tmp_path)
    assert proc.name_of(42) == "ollama runner"
    assert proc.name_of(43) is None


def test_processes_on_other_machines_are_of_no_container_and_have_no_name() -> None:
    pids = NoPids()
    assert (pids.container_of(os.getpid()), pids.name_of(os.getpid())) == (None, None)
