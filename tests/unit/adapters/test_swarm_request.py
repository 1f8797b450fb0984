"""The specification of a service is the container that was asked for, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from manager.adapters.docker_request import LOG_OPTIONS
from manager.adapters.swarm_request import service_spec, with_replicas
from manager.domain.container import ContainerRequest, Mount

CPU = ContainerRequest(
    name="m-ollama-cpu",
    image="ollama/ollama:1",
    env={"A": "1", "B": "x=y"},
    labels={"ollama-manager.manager": "m"},
    mounts=(
        Mount("ollama-models", "/root/.ollama", read_only=False, bind=False),
        Mount("more", "/more", read_only=True, bind=False),
    ),
    tmpfs={"/tmp": "rw,size=1g"},
    network="swarm-net",
    port=11434,
    loopback_port=None,
    gpu=None,
    runtime=None,
    memory_bytes=8 * 2**30,
    pids=64,
    shm_bytes=None,
    host_port=None,
    placement=("node.role==worker",),
)


def spec(
    request: ContainerRequest = CPU, *, node_id: str | None = None, stop_timeout_s: float = 30.0
) -> dict[str, Any]:
    return service_spec(request, replicas=0, node_id=node_id, stop_timeout_s=stop_timeout_s)


def test_a_service_is_the_whole_container_and_starts_nothing_by_itself() -> None:
    made = spec()
    assert (made["Name"], made["Labels"]) == ("m-ollama-cpu", {"ollama-manager.manager": "m"})
    assert made["Mode"] == {"Replicated": {"Replicas": 0}}
    task = made["TaskTemplate"]
    assert task["RestartPolicy"] == {"Condition": "none"}
    assert task["LogDriver"] == {"Name": "json-file", "Options": LOG_OPTIONS}
    assert task["ContainerSpec"] == {
        "Image": "ollama/ollama:1",
        "Env": ["A=1", "B=x=y"],
        "Mounts": [
            {"Type": "volume", "Source": "ollama-models", "Target": "/root/.ollama", "ReadOnly": False},
            {"Type": "volume", "Source": "more", "Target": "/more", "ReadOnly": True},
            {"Type": "tmpfs", "Target": "/tmp", "TmpfsOptions": {"SizeBytes": 2**30, "Mode": 0o1777}},
        ],
        "ReadOnly": True,
        "CapabilityDrop": ["ALL"],
        "Privileges": {"NoNewPrivileges": True},
        "StopGracePeriod": 30_000_000_000,
    }


def test_shared_memory_is_a_tmpfs_of_that_size() -> None:
    mounts = spec(replace(CPU, shm_bytes=2**26))["TaskTemplate"]["ContainerSpec"]["Mounts"]
    assert mounts[-1] == {
        "Type": "tmpfs",
        "Target": "/dev/shm",
        "TmpfsOptions": {"SizeBytes": 2**26, "Mode": 0o1777},
    }


def test_limits_are_given_as_far_as_there_are_any() -> None:
    assert spec()["TaskTemplate"]["Resources"] == {"Limits": {"MemoryBytes": 8 * 2**30, "Pids": 64}}
    none = spec(replace(CPU, memory_bytes=None, pids=None))
    assert none["TaskTemplate"]["Resources"] == {"Limits": {}}


def test_cards_bind_a_service_to_their_node_and_are_not_reserved() -> None:
    task = spec(replace(CPU, gpu="GPU-1,GPU-2"), node_id="n1")["TaskTemplate"]
    # Swarm ends tasks with reserved generic resources at each change of their node.
    assert "Reservations" not in task["Resources"]
    assert task["Placement"] == {"Constraints": ["node.role==worker", "node.id==n1"]}


def test_without_a_card_swarm_chooses_within_the_placement() -> None:
    assert spec()["TaskTemplate"]["Placement"] == {"Constraints": ["node.role==worker"]}


def test_a_service_is_on_its_network_or_has_a_port_on_its_node() -> None:
    made = spec()
    assert made["TaskTemplate"]["Networks"] == [{"Target": "swarm-net"}]
    assert made["EndpointSpec"] == {"Mode": "dnsrr"}
    made = spec(replace(CPU, host_port=40001))
    assert made["TaskTemplate"]["Networks"] == []
    assert made["EndpointSpec"] == {
        "Mode": "dnsrr",
        "Ports": [{"Protocol": "tcp", "TargetPort": 11434, "PublishedPort": 40001, "PublishMode": "host"}],
    }


def test_a_container_has_a_second_to_end_at_least() -> None:
    assert spec(stop_timeout_s=0)["TaskTemplate"]["ContainerSpec"]["StopGracePeriod"] == 1_000_000_000


def test_a_service_that_is_to_run_gets_a_new_task_in_any_case() -> None:
    made = spec()
    first = with_replicas(made, 1)
    assert first["Mode"] == {"Replicated": {"Replicas": 1}}
    assert first["TaskTemplate"] == made["TaskTemplate"] | {"ForceUpdate": 1}
    assert with_replicas(first, 1)["TaskTemplate"]["ForceUpdate"] == 2
    assert with_replicas(made | {"TaskTemplate": {"ForceUpdate": None}}, 1)["TaskTemplate"] == {
        "ForceUpdate": 1
    }


def test_a_service_that_is_to_end_keeps_the_rest_of_its_specification() -> None:
    running = with_replicas(spec(), 1)
    stopped = with_replicas(running, 0)
    assert stopped == running | {"Mode": {"Replicated": {"Replicas": 0}}}
    assert running["Mode"] == {"Replicated": {"Replicas": 1}}, "what was given is left as it was"
