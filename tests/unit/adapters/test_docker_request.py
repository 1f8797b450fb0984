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
    assert host["Tmpfs"] == {"/tmp": "rw,size=1g"}
    assert host["LogConfig"] == {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "2"}}


def test_a_container_on_the_cpu_without_a_port_asks_for_neither_card_nor_port() -> None:
    body = create_body(CPU)
    assert not {"DeviceRequests", "PortBindings", "Privileged", "Devices"} & set(body["HostConfig"])
    left_to_the_image = ("ExposedPorts", "Cmd", "Entrypoint", "Volumes", "User", "Hostname")
    assert {body[key] for key in left_to_the_image} == {None}


def test_a_body_says_nothing_about_what_a_template_cannot_say() -> None:
    """Whatever a newer SDK adds by itself shows here."""
    body = create_body(replace(CPU, gpu="GPU-1", runtime=None, loopback_port=11500, shm_bytes=2**20))
    said = {key for key, value in body.items() if value not in (None, False)}
    assert said == {"Image", "Env", "Labels", "ExposedPorts", "HostConfig", "AttachStdout", "AttachStderr"}
    assert set(body["HostConfig"]) == {
        *("Memory", "MemorySwap", "PidsLimit", "ShmSize", "ReadonlyRootfs", "CapDrop", "SecurityOpt"),
        *("NetworkMode", "PortBindings", "RestartPolicy", "LogConfig", "Mounts", "Tmpfs", "DeviceRequests"),
    }


def test_a_container_without_limits_asks_for_none() -> None:
    host = create_body(replace(CPU, memory_bytes=None, pids=None))["HostConfig"]
    assert not {"Memory", "MemorySwap", "PidsLimit", "ShmSize"} & set(host)


def test_a_card_is_asked_for_by_its_id_and_never_by_a_number_of_cards() -> None:
    (device,) = create_body(replace(CPU, gpu="GPU-1", runtime=None))["HostConfig"]["DeviceRequests"]
    assert (device["Driver"], device["DeviceIDs"], device["Count"]) == ("nvidia", ["GPU-1"], 0)
    assert device["Capabilities"] == [["gpu"]]


def test_a_card_is_asked_for_by_the_container_device_interface_where_the_engine_wants_that() -> None:
    gpu = replace(CPU, gpu="GPU-1", runtime=None)
    (device,) = create_body(gpu, by_cdi=True)["HostConfig"]["DeviceRequests"]
    assert (device["Driver"], device["DeviceIDs"], device["Count"]) == ("cdi", ["nvidia.com/gpu=GPU-1"], 0)
    assert "DeviceRequests" not in create_body(CPU, by_cdi=True)["HostConfig"]


def test_several_cards_are_one_request_with_the_id_of_each() -> None:
    gpus = replace(CPU, gpu="GPU-1,GPU-2", runtime=None)
    (device,) = create_body(gpus)["HostConfig"]["DeviceRequests"]
    assert (device["Driver"], device["DeviceIDs"], device["Count"]) == ("nvidia", ["GPU-1", "GPU-2"], 0)
    (device,) = create_body(gpus, by_cdi=True)["HostConfig"]["DeviceRequests"]
    assert device["DeviceIDs"] == ["nvidia.com/gpu=GPU-1", "nvidia.com/gpu=GPU-2"]


def test_a_port_is_published_on_loopback_only() -> None:
    body = create_body(replace(CPU, loopback_port=11500))
    assert body["ExposedPorts"] == {"11434/tcp": {}}
    (binding,) = body["HostConfig"]["PortBindings"]["11434/tcp"]
    assert binding == {"HostIp": "127.0.0.1", "HostPort": "11500"}
