from __future__ import annotations

from manager.domain.instance import ContainerFacts
from manager.domain.ownership import LABEL_OWNER, whose


def test_a_container_of_another_state_directory_is_never_advised_to_be_removed() -> None:
    facts = ContainerFacts("1", "m-ollama-cpu", "image", "running", {LABEL_OWNER: "me"})
    ours = whose(facts, manager_id="m", is_of_manager=True)
    assert "owner me" in ours
    assert "remove" not in ours
    assert "rename or remove it" in whose(facts, manager_id="m", is_of_manager=False)


def test_a_service_is_removed_as_a_service_and_is_never_advised_to_be_renamed() -> None:
    facts = ContainerFacts("1", "m-ollama-cpu", "image", "running", {LABEL_OWNER: "me"})
    assert whose(facts, manager_id="m", is_of_manager=True, is_service=True).startswith("the service 'm-oll")
    assert whose(facts, manager_id="m", is_of_manager=False, is_service=True) == (
        "a service named 'm-ollama-cpu' exists and is not managed by 'm'; give this daemon another "
        "manager_id, or remove the service: docker service rm m-ollama-cpu"
    )
