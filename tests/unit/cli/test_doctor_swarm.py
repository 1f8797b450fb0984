"""What `doctor` says of a swarm."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from manager.adapters.swarm_engine import SwarmEngine
from manager.cli.doctor_swarm import hardening_finding, nodes_finding, placement_finding, swarm_findings
from manager.cli.findings import Verdict
from manager.domain.container import LABEL_INSTANCE, LABEL_MANAGER
from manager.domain.instance import ContainerFacts, DeviceKind, Driver, InstanceSpec, Limits
from manager.domain.swarm import Node
from manager.errors import EngineError, Reason
from manager.settings import load_settings

if TYPE_CHECKING:
    from pathlib import Path

    from manager.cli.findings import Finding
    from manager.settings import Settings

BOX = Node(
    "n1",
    "gpu-box",
    "10.0.0.3",
    is_up=True,
    is_active=True,
    is_manager=False,
    cards=("GPU-1", "GPU-2"),
    labels={},
)
DESK = Node("n2", "desk", "10.0.0.2", is_up=True, is_active=True, is_manager=True, cards=(), labels={})
SPEC = InstanceSpec(
    "far", Driver.SWARM, DeviceKind.CPU, Limits(900, 5, 5, 5, 2, 15, 1), placement=("node.hostname==gpu-box",)
)


def settings_of(tmp_path: Path, text: str) -> Settings:
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    return load_settings(file, environ={"HOME": "/home/someone"}).settings


def found(
    monkeypatch: pytest.MonkeyPatch,
    settings: Settings,
    *specs: InstanceSpec,
    nodes: tuple[Node, ...] | EngineError = (BOX, DESK),
    listed: tuple[ContainerFacts, ...] | EngineError = (),
) -> list[Finding]:
    async def read_nodes(_engine: SwarmEngine) -> tuple[Node, ...]:
        if isinstance(nodes, EngineError):
            raise nodes
        return nodes

    async def listing(_engine: SwarmEngine, _manager: str) -> Any:
        if isinstance(listed, EngineError):
            raise listed
        return listed

    monkeypatch.setattr(SwarmEngine, "nodes", read_nodes)
    monkeypatch.setattr(SwarmEngine, "list_containers", listing)
    return list(swarm_findings(settings, specs))


def refused(message: str) -> EngineError:
    return EngineError(message, reason=Reason.START_FAILED)


def test_without_services_nothing_is_asked_or_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "")
    assert found(monkeypatch, settings, nodes=refused("it is not asked")) == []


def test_an_engine_that_is_no_manager_node_is_a_fault_and_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = settings_of(tmp_path, "swarm: {instances: auto}")
    (one,) = found(monkeypatch, settings, nodes=refused("This node is not a swarm manager. Use docker swarm"))
    assert (one.check, one.verdict) == ("swarm", Verdict.BROKEN)
    assert "docker swarm init" in one.remedy
    (one,) = found(monkeypatch, settings, nodes=refused("rpc error: no leader"))
    assert one.remedy == "check engine.url, and that a majority of the manager nodes run"


def test_a_swarm_as_it_should_be_is_shown_with_its_nodes_and_cards(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = settings_of(tmp_path, "swarm: {instances: auto}")
    swarm, services = found(monkeypatch, settings, SPEC)
    assert (swarm.verdict, swarm.message) == (Verdict.FINE, "2 nodes: gpu-box (2 cards), desk")
    assert (services.verdict, services.message) == (
        Verdict.FINE,
        "0 of manager 'default', each of an instance",
    )


def test_nodes_that_are_down_are_a_warning_and_drained_ones_are_named() -> None:
    down = nodes_finding([replace(BOX, is_up=False), replace(DESK, is_active=False)])
    assert down.verdict is Verdict.WARNING
    assert down.message == "2 nodes: gpu-box (2 cards, down), desk (drained or paused)"
    drained = nodes_finding([replace(BOX, is_active=False, cards=("GPU-1",))])
    assert (drained.verdict, drained.message) == (
        Verdict.FINE,
        "1 node: gpu-box (1 card, drained or paused)",
    )


def test_a_node_or_a_card_that_is_not_there_is_named_with_its_instance() -> None:
    gone = replace(SPEC, placement=("node.id==n9",))
    card = replace(SPEC, id="near", placement=(), device="GPU-9")
    several = replace(SPEC, id="both", placement=(), devices=("GPU-1", "GPU-9"))
    one = placement_finding([SPEC, gone, card, several], [BOX, DESK])
    assert one is not None
    assert (one.check, one.verdict) == ("placement", Verdict.WARNING)
    assert one.message.splitlines() == [
        "far wants node n9, which is not in the swarm",
        "near wants GPU-9, which no node advertises",
        "both wants GPU-1, GPU-9, which no node advertises",
    ]
    right = [SPEC, replace(SPEC, placement=("node.id==n2",)), replace(SPEC, devices=("GPU-1", "GPU-2"))]
    assert placement_finding(right, [BOX, DESK]) is None


@pytest.mark.parametrize(
    ("version", "is_old"), [("20.10.24+dfsg1", True), ("24.0.9", True), ("25.0.0", False), ("", False)]
)
def test_an_engine_that_ignores_a_security_option_of_services_is_named(version: str, *, is_old: bool) -> None:
    one = hardening_finding([DESK, replace(BOX, engine=version)])
    assert (one is not None) is is_old
    if one is not None:
        assert one.message == (
            f"engines older than 25.0 (API 1.44) ignore no-new-privileges: gpu-box ({version})"
        )


def test_services_of_no_instance_are_named_with_the_command_that_removes_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def service(instance: str) -> ContainerFacts:
        labels = {LABEL_MANAGER: "default", LABEL_INSTANCE: instance}
        return ContainerFacts(instance, f"default-ollama-{instance}", "image", "running", labels)

    listed = (service("far"), service("old"), service("gpu-box-gpu0"))
    settings = settings_of(tmp_path, "instances: {far: {driver: swarm, template: ollama-cpu}}")
    *_, services = found(monkeypatch, settings, SPEC, listed=listed)
    assert services.verdict is Verdict.WARNING
    assert services.remedy == (
        "nothing watches them; `docker service rm default-ollama-gpu-box-gpu0`, "
        "`docker service rm default-ollama-old` removes them"
    )
    finding = settings_of(tmp_path, "swarm: {instances: auto}")
    *_, services = found(monkeypatch, finding, SPEC, listed=listed)
    assert "default-ollama-gpu-box-gpu0" not in services.remedy
    *_, services = found(monkeypatch, finding, SPEC, listed=refused("no list"))
    assert (services.verdict, services.message) == (Verdict.BROKEN, "no list")
