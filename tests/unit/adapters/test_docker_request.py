"""The one document that makes the engine create something."""

from __future__ import annotations

from dataclasses import replace

from manager.adapters.docker_request import create_body
from manager.domain.container import ContainerRequest, Mount

CPU = ContainerRequest(
    name="m-ollama-cpu",
    image="ollama/ollama:1",
    env={"OLLAMA_HOST": "0.0.0.0", "EMPTY": ""},
    labels={"ollama-manager.manager": "m"},
    mounts=(Mount("models", "/root/.ollama", read_only=False, bind=False), Mount("/srv", "/x", True, True)),
    tmpfs={"/tmp": "rw,size=1g"},
    network="ollama-manager",
    port=11434,
    loopback_port=None,
    gpu=None,
    runtime="runc",
    memory_bytes=2**30,
    shm_bytes=None,
    pids=512,
)


def test_a_container_gets_what_was_asked_for_and_is_confined_always() -> None:
    body = create_body(CPU)
    assert body["Image"] == "ollama/ollama:1"
    assert body["Env"] == ["OLLAMA_HOST=0.0.0.0", "EMPTY="]
    assert body["Labels"] == {"ollama-manager.manager": "m"}
    host = body["HostConfig"]
    assert (host["ReadonlyRootfs"], host["CapDrop"]) == (True, ["ALL"])
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert host["RestartPolicy"] == {"Name": "no"}
    assert (host["Memory"], host["MemorySwap"], host["PidsLimit"]) == (2**30, 2**30, 512)
    assert host["Mounts"] == [
        {"Target": "/root/.ollama", "Source": "models", "Type": "volume", "ReadOnly": False},
        {"Target": "/x", "Source": "/srv", "Type": "bind", "ReadOnly": True},
    ]
    assert (host["NetworkMode"], host["Runtime"]) == ("ollama-manager", "runc")


def test_a_container_on_the_cpu_without_a_port_asks_for_neither_card_nor_port() -> None:
    body = create_body(CPU)
    assert not {"DeviceRequests", "PortBindings", "Privileged", "Devices"} & set(body["HostConfig"])
    assert not {"ExposedPorts", "Cmd", "Entrypoint"} & set(body)


def test_a_card_is_asked_for_by_its_id_and_never_by_a_number_of_cards() -> None:
    (device,) = create_body(replace(CPU, gpu="GPU-1", runtime=None))["HostConfig"]["DeviceRequests"]
    assert device == {"Driver": "nvidia", "DeviceIDs": ["GPU-1"], "Capabilities": [["gpu"]]}


def test_a_port_is_published_on_loopback_only() -> None:
    body = create_body(replace(CPU, loopback_port=11500))
    assert body["ExposedPorts"] == {"11434/tcp": {}}
    (binding,) = body["HostConfig"]["PortBindings"]["11434/tcp"]
    assert binding == {"HostIp": "127.0.0.1", "HostPort": "11500"}
