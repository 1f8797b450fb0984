"""Settings of Docker Swarm: what may be written, what is refused, and which instances nodes give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.instance import DeviceKind, Driver
from manager.errors import ConfigurationError
from manager.settings import load_settings, load_templates, resolve_instances
from manager.settings.section import FoundIds
from manager.settings.templates import node_spec

if TYPE_CHECKING:
    from pathlib import Path

    from manager.settings import Settings

ENVIRON = {"HOME": "/home/someone"}
CPU = "driver: swarm, template: ollama-cpu"
GPU = "driver: swarm, template: ollama-gpu"
CARD = "GPU-8c1f2d34-0b5a-4c1e-9f37-2a6d1e5b7c90"
OTHER = "GPU-8c1f2d34-0b5a-4c1e-9f37-2a6d1e5b7c91"


def read(tmp_path: Path, text: str) -> Any:
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    return load_settings(file, environ=ENVIRON)


def resolved(tmp_path: Path, text: str) -> Any:
    loaded = read(tmp_path, text)
    return resolve_instances(loaded, load_templates(loaded.settings))


def test_without_a_word_of_it_there_is_no_swarm(tmp_path: Path) -> None:
    settings = read(tmp_path, "").settings
    assert not settings.uses_swarm
    assert settings.found_ids == FoundIds(cards=True)
    swarm = settings.swarm
    assert (swarm.reach, swarm.network, swarm.instances) == ("auto", "ollama-manager-swarm", "none")
    assert (swarm.resource, swarm.gpu_exporter) == ("NVIDIA-GPU", None)


@pytest.mark.parametrize(
    "text", [f"instances: {{a: {{{CPU}}}}}", "swarm: {instances: auto}", "swarm: {instances: all}"]
)
def test_an_instance_of_the_driver_or_nodes_that_give_some_need_the_swarm(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text).settings.uses_swarm


def test_an_instance_of_driver_swarm_has_a_placement_and_cards_of_one_node(tmp_path: Path) -> None:
    placed = "placement: ['node.hostname == gpu-box', node.labels.rack!=b]"
    cpu, gpu, both = resolved(
        tmp_path,
        f"gpus: none\ninstances: {{a: {{{CPU}, {placed}}}, b: {{{GPU}, device: {CARD}}}, "
        f"c: {{{GPU}, device: [{CARD}, {OTHER}]}}}}",
    )
    assert (cpu.driver, cpu.device_kind) == (Driver.SWARM, DeviceKind.CPU)
    assert cpu.placement == ("node.hostname==gpu-box", "node.labels.rack!=b")
    assert (gpu.device_kind, gpu.device, gpu.placement) == (DeviceKind.GPU, CARD, ())
    assert (both.device, both.devices) == (None, (CARD, OTHER))


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("swarm: {reach: loopback}", "swarm.reach: 'loopback'; expected 'auto', 'network' or 'host'"),
        ("swarm: {instances: many}", "swarm.instances: 'many'; expected 'none', 'auto' or 'all'"),
        ("swarm: {network: host}", "swarm.network: 'host'; expected the name of an overlay network, such as"),
        ("swarm: {network: 'a b'}", "swarm.network: 'a b'; expected the name of an overlay network, such as"),
        ("swarm: {network: ingress}", "swarm.network: 'ingress'; expected the name of an overlay network"),
        ("swarm: {resource: 'a=b'}", "swarm.resource: 'a=b'; expected a kind of generic resource, such as"),
        ("swarm: {gpu_exporter: 'nodes:9400'}", "swarm.gpu_exporter: 'nodes:9400'; expected"),
        ("swarm: {gpu_exporter: 'ftp://{node}/'}", "swarm.gpu_exporter: 'ftp://{node}/'; expected"),
        ("swarm: {nodes: 1}", "swarm.nodes: unknown key; allowed: reach, network, instances, resource,"),
        (
            "instances: {a: {driver: swarm}}",
            "instances.a.template: missing; an instance of driver swarm needs a template",
        ),
        (
            f"instances: {{a: {{{CPU}, url: 'http://x:1'}}}}",
            "instances.a.url: only for driver external; the endpoint follows from the node",
        ),
        (
            f"instances: {{a: {{{CPU}, placement: [gpu-box]}}}}",
            "instances.a.placement.0: 'gpu-box'; expected a constraint such as node.hostname==gpu-box",
        ),
        (
            f"instances: {{a: {{{CPU}, placement: {['node.role==worker'] * 17}}}}}",
            "instances.a.placement: a list; expected at most 16",
        ),
        (
            f"instances: {{a: {{{GPU}, device: auto}}}}",
            "instances.a.device: 'auto'; expected the UUID of a card that a node advertises (GPU-… or MIG-…)",
        ),
        (
            f"instances: {{a: {{{GPU}, device: '00000000:41:00.0'}}}}",
            "instances.a.device: '00000000:41:00.0'; expected the UUID of a card that a node advertises",
        ),
        (
            f"instances: {{a: {{{CPU}, protocol: openai}}}}",
            "instances.a.protocol: only for the drivers external and cloud",
        ),
        (
            "instances: {a: {template: ollama-cpu, placement: [node.role==worker]}}",
            "instances.a.placement: only for driver swarm, whose services run on several nodes",
        ),
        (
            "instances: {a: {driver: external, url: 'http://x:1', placement: [node.role==worker]}}",
            "instances.a.placement: only for driver swarm, whose services run on several nodes",
        ),
        (
            f"manager_id: {'m' * 32}\ninstances: {{{'a' * 32}: {{{CPU}}}}}",
            f"instances.{'a' * 32}: its container's name has 72 characters; at most",
        ),
    ],
)
def test_a_refusal_names_the_key_what_was_given_and_what_is_allowed(
    tmp_path: Path, text: str, refusal: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(tmp_path, text)
    assert refusal in caught.value.message
    assert f"{tmp_path}/c.yaml:" in caught.value.message


@pytest.mark.parametrize(
    ("instance", "refusal"),
    [
        (
            GPU,
            "instances.a.device: missing; driver swarm needs the UUID of the card, as a node advertises it",
        ),
        (f"{CPU}, device: {CARD}", f"instances.a.device: '{CARD}' contradicts the template 'ollama-cpu'"),
        ("driver: swarm, template: gone", "instances.a.template: 'gone' is no template; known: ollama-cpu"),
    ],
)
def test_an_instance_that_contradicts_its_template_is_refused(
    tmp_path: Path, instance: str, refusal: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        resolved(tmp_path, f"gpus: none\ninstances: {{a: {{{instance}}}}}")
    assert refusal in caught.value.message


def with_bind(tmp_path: Path, more: str) -> str:
    directory = tmp_path / "templates"
    directory.mkdir()
    for name in ("ollama-cpu", "named"):
        source = "/srv/models" if name == "ollama-cpu" else "ollama-models"
        volume = f"{{source: {source}, target: /models, read_only: true}}"
        text = f"image: ollama/ollama:1\ndevice: cpu\nvolumes: [{volume}]\n"
        (directory / f"{name}.yaml").write_text(text, encoding="utf-8")
    return f"templates: {{dir: {directory}}}\nallow: {{binds: [/srv/models]}}\ngpus: none\n{more}"


def test_a_directory_of_another_node_cannot_be_mounted(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        resolved(tmp_path, with_bind(tmp_path, f"instances: {{a: {{{CPU}}}}}"))
    assert (
        "instances.a.template: 'ollama-cpu' mounts the directory /srv/models, which cannot be checked on "
        "another node; expected a template with named volumes for driver swarm"
    ) in caught.value.message


def test_a_named_volume_can_be_mounted(tmp_path: Path) -> None:
    (one,) = resolved(tmp_path, with_bind(tmp_path, "instances: {a: {driver: swarm, template: named}}"))
    assert one.template_name == "named"


def test_a_writer_of_a_volume_is_named_with_the_volume_of_its_node(tmp_path: Path) -> None:
    instance = f"gpus: none\ninstances: {{a: {{{CPU}, placement: [node.hostname==gpu-box]}}}}\n"
    (one,) = resolved(tmp_path, f"{instance}models: {{writers: {{ollama-models@gpu-box: a}}}}")
    assert one.id == "a"
    with pytest.raises(ConfigurationError) as caught:
        resolved(tmp_path, f"{instance}models: {{writers: {{ollama-models: a}}}}")
    assert "models.writers.ollama-models: 'a' cannot write to it; it has: ollama-models@gpu-box" in (
        caught.value.message
    )


# --- instances that nodes give ---


def settings_of(tmp_path: Path, text: str = "") -> tuple[Settings, Any]:
    loaded = read(tmp_path, text)
    return loaded.settings, load_templates(loaded.settings)


def test_a_node_gives_an_instance_for_its_cpu_and_for_a_card(tmp_path: Path) -> None:
    settings, templates = settings_of(tmp_path)
    cpu = node_spec("gpu-box-cpu", settings, templates, card=None, placement="node.id==n1")
    assert (cpu.driver, cpu.template_name, cpu.device_kind) == (Driver.SWARM, "ollama-cpu", DeviceKind.CPU)
    assert (cpu.placement, cpu.device) == (("node.id==n1",), None)
    gpu = node_spec("gpu-box-gpu0", settings, templates, card=CARD, placement="node.id==n1")
    assert (gpu.template_name, gpu.device_kind, gpu.device) == ("ollama-gpu", DeviceKind.GPU, CARD)


def test_a_node_gives_nothing_where_its_template_is_missing_or_mounts_a_directory(tmp_path: Path) -> None:
    settings, templates = settings_of(tmp_path, with_bind(tmp_path, ""))
    with pytest.raises(
        ConfigurationError,
        match=r"a-gpu0 was found by swarm.instances: expected a template 'ollama-gpu' with device: gpu "
        r"\(known: named, ollama-cpu\)",
    ):
        node_spec("a-gpu0", settings, templates, card=CARD, placement="node.id==n1")
    with pytest.raises(
        ConfigurationError, match=r"a-cpu was found by swarm.instances: 'ollama-cpu' mounts the"
    ):
        node_spec("a-cpu", settings, templates, card=None, placement="node.id==n1")


def test_a_node_gives_nothing_where_the_name_of_the_service_is_too_long(tmp_path: Path) -> None:
    settings, templates = settings_of(tmp_path, f"manager_id: {'m' * 32}")
    instance_id = "a" * 28 + "-cpu"
    with pytest.raises(ConfigurationError, match=r"name has 72 characters, at most 63: shorten manager_id"):
        node_spec(instance_id, settings, templates, card=None, placement="node.id==n1")


# --- ids of instances that are found later ---

CARDS = FoundIds(cards=True)
NODES = FoundIds(nodes=True)


@pytest.mark.parametrize(
    ("found", "instance_id", "on_gpu"),
    [
        (FoundIds(), "gpu0", None),
        (FoundIds(), "gpu-box-cpu", None),
        (CARDS, "gpu0", True),
        (CARDS, "gpu12", True),
        (CARDS, "gpu01", None),
        (CARDS, "gpu-box-gpu0", None),
        (NODES, "gpu0", None),
        (NODES, "gpu-box-gpu0", True),
        (NODES, "gpu-box-cpu", False),
        (NODES, "gpu-box-gpu01", None),
        (NODES, "gpu-box", None),
        (NODES, "-cpu", None),
        (NODES, "cpu", None),
        (NODES, "1box-cpu", None),
    ],
)
def test_an_instance_that_may_be_found_later_says_whether_it_is_on_a_card(
    found: FoundIds, instance_id: str, on_gpu: bool | None
) -> None:
    assert found.on_gpu(instance_id) is on_gpu


def test_the_ids_that_may_be_found_are_named_with_the_settings_that_find_them() -> None:
    assert FoundIds().words == ()
    assert CARDS.words == ("gpuN (gpus: auto)",)
    assert NODES.words == ("HOST-cpu", "HOST-gpuN (swarm.instances)")
    assert FoundIds(cards=True, nodes=True).words == (*CARDS.words, *NODES.words)


def test_a_role_and_a_schedule_may_name_an_instance_of_a_node(tmp_path: Path) -> None:
    text = (
        "gpus: none\nswarm: {instances: auto}\nroles: {output: {model: tiny, target: gpu-box-gpu0}}\n"
        "schedules: [{cron: '0 8 * * *', action: start, instance: gpu-box-cpu}]\n"
        "models: {writers: {ollama-models@n1: gpu-box-cpu}}"
    )
    assert read(tmp_path, text).settings.roles["output"].target == "gpu-box-gpu0"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("roles: {output: {model: tiny, target: gpu-box}}", "roles.output.target"),
        ("schedules: [{cron: '0 8 * * *', action: start, instance: gpu-box}]", "schedules.0.instance"),
    ],
)
def test_a_name_that_no_node_can_give_is_refused_with_those_that_one_can(
    tmp_path: Path, text: str, key: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(tmp_path, f"gpus: none\nswarm: {{instances: auto}}\n{text}")
    assert f"{key}: 'gpu-box' is no instance; expected " in caught.value.message
    assert "HOST-gpuN (swarm.instances)" in caught.value.message
