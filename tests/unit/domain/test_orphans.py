"""Containers of ours that no instance watches."""

from __future__ import annotations

import pytest

from manager.domain.container import LABEL_INSTANCE, LABEL_MANAGER
from manager.domain.instance import ContainerFacts, ContainerStatus
from manager.domain.orphans import find_orphans


def container(
    name: str, instance: str | None, status: ContainerStatus = "running", id_: str = "0123"
) -> ContainerFacts:
    labels = {LABEL_MANAGER: "m"} | ({} if instance is None else {LABEL_INSTANCE: instance})
    return ContainerFacts(id=id_, name=name, image="ollama/ollama:1", status=status, labels=labels)


def orphans(*containers: ContainerFacts) -> list[tuple[str, str]]:
    found = find_orphans(containers, manager_id="m", is_configured={"cpu", "gpu0"}.__contains__)
    return [(one.name, one.why) for one in found]


def test_the_containers_of_configured_instances_are_no_orphans() -> None:
    assert orphans(container("m-ollama-cpu", "cpu"), container("m-ollama-gpu0", "gpu0", "exited")) == []


def test_a_container_that_was_renamed_or_whose_instance_is_gone_is_one_and_says_why() -> None:
    assert orphans(
        container("renamed", "cpu"),
        container("m-ollama-old", "old"),
        container("m-ollama-cpu", "cpu"),
        container("m-ollama-gpu0", None),
        container("m-ollama-cpu", "gpu0"),
    ) == [
        ("m-ollama-cpu", "the container of instance 'gpu0' is named m-ollama-gpu0; this one was renamed"),
        ("m-ollama-gpu0", "it is labelled with no instance"),
        ("m-ollama-old", "it is labelled as instance 'old', which is not configured"),
        ("renamed", "the container of instance 'cpu' is named m-ollama-cpu; this one was renamed"),
    ]


@pytest.mark.parametrize(
    ("status", "runs"), [("running", True), ("paused", True), ("exited", False), ("created", False)]
)
def test_an_orphan_says_whether_it_runs_and_how_it_is_removed(status: ContainerStatus, runs: bool) -> None:
    (orphan,) = find_orphans(
        [container("left", "old", status)], manager_id="m", is_configured=lambda _id: False
    )
    assert (orphan.is_running, orphan.remedy) == (runs, "docker rm -f left")
    assert (orphan.id, orphan.image, orphan.instance) == ("0123", "ollama/ollama:1", "old")


def test_an_orphan_among_services_is_removed_as_a_service() -> None:
    (orphan,) = find_orphans(
        [container("left", "old", "parked")],
        manager_id="m",
        is_configured=lambda _id: False,
        removal="docker service rm",
    )
    assert (orphan.is_running, orphan.remedy) == (False, "docker service rm left")
