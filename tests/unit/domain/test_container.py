"""From a template to the container the engine is asked for."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from manager.domain.container import (
    LABEL_DEVICE,
    LABEL_HASH,
    LABEL_INSTANCE,
    LABEL_LOOPBACK_PORT,
    LABEL_MANAGER,
    LABEL_PORT,
    ContainerRequest,
    Mount,
    Reach,
    ServicePlace,
    cards_of_device,
    choose_reach,
    container_name,
    container_request,
    device_text,
    endpoint_of,
    is_ours,
    reader_request,
)
from manager.domain.instance import ContainerFacts, DeviceKind
from manager.domain.ownership import LABEL_OWNER, Owner
from manager.domain.template import CPU_ONLY_ENVIRONMENT, Template

MODELS = {"source": "ollama-models", "target": "/root/.ollama"}
GPU = "GPU-8c1f2d34"


def request(
    *,
    manager_id: str = "default",
    instance_id: str = "cpu",
    gpu: str | None = None,
    loopback_port: int | None = None,
    **values: Any,
) -> ContainerRequest:
    device = "cpu" if gpu is None else "gpu"
    template = Template.model_validate({"image": "ollama/ollama:1", "device": device, **values})
    return container_request(
        template, manager_id=manager_id, instance_id=instance_id, gpu=gpu, loopback_port=loopback_port
    )


def test_the_name_says_whose_container_it_is() -> None:
    assert container_name("default", "gpu0") == "default-ollama-gpu0"
    assert request(manager_id="lab", instance_id="gpu0").name == "lab-ollama-gpu0"


def test_a_cpu_container_is_cut_off_from_every_gpu_in_layers() -> None:
    asked = request(env={"OLLAMA_NUM_PARALLEL": 1})
    assert (asked.gpu, asked.runtime) == (None, "runc")
    assert asked.env == {**CPU_ONLY_ENVIRONMENT, "OLLAMA_NUM_PARALLEL": "1"}
    assert asked.labels[LABEL_DEVICE] == "cpu"


def test_a_gpu_container_sees_exactly_its_card() -> None:
    asked = request(gpu=GPU)
    assert (asked.gpu, asked.runtime) == (GPU, None)
    assert asked.env == {"NVIDIA_VISIBLE_DEVICES": GPU}
    assert asked.labels[LABEL_DEVICE] == GPU


def test_the_binding_wins_over_a_template_that_was_never_checked() -> None:
    assert request(env={"NVIDIA_VISIBLE_DEVICES": "all"}).env["NVIDIA_VISIBLE_DEVICES"] == "void"
    assert request(gpu=GPU, env={"NVIDIA_VISIBLE_DEVICES": "all"}).env["NVIDIA_VISIBLE_DEVICES"] == GPU


@pytest.mark.parametrize(("device", "gpu"), [("cpu", GPU), ("gpu", None)])
def test_a_gpu_for_the_cpu_or_none_for_a_gpu_is_a_defect(device: str, gpu: str | None) -> None:
    with pytest.raises(ValueError, match=f"template for {device} with gpu="):
        request(gpu=gpu, device=device)


def test_settings_of_the_template_are_carried_over() -> None:
    asked = request(
        port=8080,
        network="ollama-manager",
        limits={"memory": "8g", "pids": 64, "shm": "64m"},
        volumes=[MODELS, {"source": "/srv/models", "target": "/models", "read_only": True}],
        loopback_port=40001,
    )
    assert (asked.image, asked.port, asked.network, asked.loopback_port) == (
        "ollama/ollama:1",
        8080,
        "ollama-manager",
        40001,
    )
    assert (asked.memory_bytes, asked.pids, asked.shm_bytes) == (8 * 2**30, 64, 64 * 2**20)
    assert asked.mounts == (
        Mount(source="ollama-models", target="/root/.ollama", read_only=False, bind=False),
        Mount(source="/srv/models", target="/models", read_only=True, bind=True),
    )


@pytest.mark.parametrize(
    ("targets", "tmpfs"),
    [
        ([], {"/tmp", "/root/.ollama"}),
        (["/root/.ollama"], {"/tmp"}),
        (["/root/.ollama/"], {"/tmp"}),
        (["/root/.ollama/models"], {"/tmp", "/root/.ollama"}),
        (["/tmp", "/root/.ollama"], set()),
    ],
)
def test_what_must_be_writable_is_memory_unless_it_is_mounted(targets: list[str], tmpfs: set[str]) -> None:
    volumes = [{"source": "ollama-models", "target": target} for target in targets]
    assert set(request(volumes=volumes).tmpfs) == tmpfs


CHANGES: list[dict[str, Any]] = [
    {"image": "ollama/ollama:2"},
    {"env": {"OLLAMA_A": "1"}},
    {"volumes": [MODELS]},
    {"volumes": [MODELS | {"read_only": True}]},
    {"volumes": [MODELS | {"source": "/srv"}]},
    {"network": "other"},
    {"port": 1},
    {"limits": {"memory": "8g"}},
    {"limits": {"pids": 100}},
    {"limits": {"shm": "1g"}},
    {"loopback_port": 40001},
    {"gpu": GPU},
    {"gpu": "GPU-other"},
    {"manager_id": "lab"},
    {"instance_id": "other"},
]


def test_every_setting_changes_the_hash_and_equal_settings_do_not() -> None:
    hashes = [request(**change).labels[LABEL_HASH] for change in [{}, *CHANGES]]
    assert len(set(hashes)) == len(hashes)
    assert hashes == [request(**change).labels[LABEL_HASH] for change in [{}, *CHANGES]]
    assert all(re.fullmatch(r"[0-9a-f]{16}", one) for one in hashes)


def test_the_hash_does_not_depend_on_the_order_of_the_environment() -> None:
    one = request(env={"OLLAMA_A": "1", "OLLAMA_B": "2"})
    other = request(env={"OLLAMA_B": "2", "OLLAMA_A": "1"})
    assert one.labels == other.labels
    assert list(one.env) == list(other.env)


@pytest.mark.parametrize(
    ("labels", "ours"),
    [
        ({LABEL_MANAGER: "default", LABEL_INSTANCE: "cpu"}, True),
        ({LABEL_MANAGER: "other", LABEL_INSTANCE: "cpu"}, False),
        ({LABEL_MANAGER: "default", LABEL_INSTANCE: "gpu0"}, False),
        ({LABEL_MANAGER: "default"}, False),
        ({}, False),
    ],
)
def test_only_both_labels_make_a_container_ours(labels: dict[str, str], ours: bool) -> None:
    facts = ContainerFacts(
        id="1", name="default-ollama-cpu", image="ollama/ollama:1", status="running", labels=labels
    )
    assert is_ours(facts, manager_id="default", instance_id="cpu") is ours


@pytest.mark.parametrize(
    ("wanted", "in_container", "direct", "elsewhere", "reach"),
    [
        ("auto", False, True, False, Reach.ADDRESS),
        ("auto", False, False, False, Reach.LOOPBACK),
        ("auto", True, False, False, Reach.NAME),
        ("network", False, False, False, Reach.ADDRESS),
        ("network", True, True, False, Reach.NAME),
        ("loopback", True, True, False, Reach.LOOPBACK),
        ("auto", False, False, True, None),
        ("auto", True, False, True, Reach.NAME),
        ("network", False, False, True, Reach.ADDRESS),
        ("loopback", False, False, True, Reach.LOOPBACK),
    ],
)
def test_the_way_to_a_container_follows_from_where_the_daemon_runs(
    wanted: str, in_container: bool, direct: bool, elsewhere: bool, reach: Reach | None
) -> None:
    found = choose_reach(wanted, in_container=in_container, direct=direct, elsewhere=elsewhere)
    assert found is reach


def found(labels: dict[str, str]) -> ContainerFacts:
    return ContainerFacts(
        id="c1",
        name="m-ollama-cpu",
        image="ollama/ollama:1",
        status="running",
        labels=labels,
        address="10.0.0.2",
    )


@pytest.mark.parametrize(
    ("labels", "loopback_port", "by_name", "endpoint"),
    [
        ({LABEL_PORT: "11434"}, None, False, "http://10.0.0.2:11434"),
        ({LABEL_PORT: "11434"}, None, True, "http://m-ollama-cpu:11434"),
        ({LABEL_PORT: "11434", LABEL_LOOPBACK_PORT: "11500"}, None, False, "http://127.0.0.1:11500"),
        ({LABEL_PORT: "9999"}, 11500, False, "http://10.0.0.2:9999"),
        ({}, 11500, False, "http://127.0.0.1:11500"),
        ({}, None, False, "http://10.0.0.2:11434"),
    ],
)
def test_a_container_is_reached_the_way_it_was_made(
    labels: dict[str, str], loopback_port: int | None, by_name: bool, endpoint: str
) -> None:
    wanted = request(loopback_port=loopback_port)
    assert endpoint_of(found(labels), wanted, by_name=by_name) == endpoint


def test_a_container_without_an_address_cannot_be_reached() -> None:
    nowhere = replace(found({}), address=None)
    assert endpoint_of(nowhere, request(), by_name=False) is None


def test_a_reader_has_one_mount_for_reading_no_network_no_card_and_no_label_of_an_instance() -> None:
    template = Template.model_validate(
        {
            "image": "ollama/ollama:1",
            "device": "gpu",
            "env": {"OLLAMA_KEEP_ALIVE": "5m"},
            "volumes": [MODELS, {"source": "/srv/x", "target": "/x"}],
        }
    )
    for volume, bind in zip(template.volumes, (False, True), strict=True):
        request = reader_request(template, volume, manager_id="m", name="m-reader-1")
        assert (request.name, request.image, request.env) == ("m-reader-1", "ollama/ollama:1", {})
        assert request.mounts == (Mount(volume.source, volume.target, read_only=True, bind=bind),)
        assert (request.network, request.gpu, request.runtime) == ("none", None, None)
        assert request.labels == {"ollama-manager.reader": "m"}


def test_the_owner_is_a_label_that_does_not_change_the_template_hash() -> None:
    template = Template(image="ollama/ollama:1", device=DeviceKind.CPU)
    plain, owned = (
        container_request(
            template, manager_id="m", instance_id="cpu", gpu=None, loopback_port=None, owner=owner
        )
        for owner in (None, Owner("me"))
    )
    assert owned.labels == plain.labels | {LABEL_OWNER: "me"}
    facts = ContainerFacts("1", "m-ollama-cpu", "image", "running", labels=owned.labels)
    assert is_ours(facts, manager_id="m", instance_id="cpu", owner=Owner("me"))
    assert not is_ours(facts, manager_id="m", instance_id="cpu", owner=Owner("other"))


# Several cards


def test_the_cards_of_a_container_are_one_text_whatever_their_order() -> None:
    assert device_text(("GPU-b", "GPU-a")) == device_text(("GPU-a", "GPU-b")) == "GPU-a,GPU-b"
    assert device_text(()) is None
    assert cards_of_device("GPU-a,GPU-b") == ("GPU-a", "GPU-b")
    assert cards_of_device("MIG-GPU-a/1/2") == ("MIG-GPU-a/1/2",)
    assert cards_of_device("cpu") == cards_of_device("") == ()


def test_a_container_over_several_cards_has_all_of_them_in_its_label_its_environment_and_its_hash() -> None:
    one, both = (request(gpu=gpu) for gpu in ("GPU-a", "GPU-a,GPU-b"))
    assert both.env["NVIDIA_VISIBLE_DEVICES"] == both.gpu == both.labels[LABEL_DEVICE] == "GPU-a,GPU-b"
    assert both.runtime is None
    assert one.labels[LABEL_HASH] != both.labels[LABEL_HASH]


def test_the_hash_of_a_container_with_one_card_is_what_it_always_was() -> None:
    """Otherwise every container of an older version would be made anew."""
    assert request(gpu=GPU).labels[LABEL_HASH] == "52e9e24bbb38bca6"
    assert request().labels[LABEL_HASH] == "5661c98dab4737c7"


@pytest.mark.parametrize(
    ("made", "template_hash"),
    [
        ({}, "5661c98dab4737c7"),
        (
            {
                "instance_id": "gpu0",
                "gpu": GPU,
                "loopback_port": 40001,
                "volumes": [MODELS],
                "limits": {"memory": "8g", "pids": 64, "shm": "64m"},
                "env": {"OLLAMA_NUM_PARALLEL": 1},
            },
            "9541f57b2dd14885",
        ),
    ],
)
def test_the_hash_of_a_container_is_that_of_version_0_1(made: dict[str, Any], template_hash: str) -> None:
    """Another one would replace every container at an update."""
    assert request(**made).labels[LABEL_HASH] == template_hash


def service(
    place: ServicePlace, *, gpu: str | None = None, loopback_port: int | None = None
) -> ContainerRequest:
    template = Template.model_validate({"image": "ollama/ollama:1", "device": "gpu" if gpu else "cpu"})
    return container_request(
        template, manager_id="m", instance_id="a", gpu=gpu, loopback_port=loopback_port, service=place
    )


def test_a_service_is_on_its_own_network_at_the_port_of_its_node_and_has_no_runtime() -> None:
    asked = service(ServicePlace("swarm-net", 40001, ("node.id==n1",)))
    assert (asked.network, asked.host_port, asked.placement) == ("swarm-net", 40001, ("node.id==n1",))
    assert (asked.runtime, asked.loopback_port) == (None, None)
    assert asked.labels[LABEL_PORT] == "40001"
    assert asked.env == CPU_ONLY_ENVIRONMENT
    by_name = service(ServicePlace("swarm-net", None, ()))
    assert (by_name.host_port, by_name.labels[LABEL_PORT]) == (None, "11434")


def test_the_endpoint_of_a_service_is_the_port_of_its_node_or_its_name() -> None:
    asked = service(ServicePlace("swarm-net", 40001, ()))
    facts = ContainerFacts("1", asked.name, "i", "running", asked.labels, address="10.0.0.3")
    assert endpoint_of(facts, asked, by_name=False) == "http://10.0.0.3:40001"
    asked = service(ServicePlace("swarm-net", None, ()))
    facts = ContainerFacts("1", asked.name, "i", "running", asked.labels, address="10.0.0.3")
    assert endpoint_of(facts, asked, by_name=True) == "http://m-ollama-a:11434"


def test_network_port_and_placement_of_a_service_change_its_hash() -> None:
    places = [
        ServicePlace("one", 1, ()),
        ServicePlace("two", 1, ()),
        ServicePlace("one", 2, ()),
        ServicePlace("one", None, ()),
        ServicePlace("one", 1, ("node.id==n1",)),
    ]
    hashes = [service(place).labels[LABEL_HASH] for place in places]
    assert len(set(hashes)) == len(places)
    assert service(places[0]).labels[LABEL_HASH] == hashes[0]
