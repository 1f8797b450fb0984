from __future__ import annotations

import pytest

from manager.domain.instance import ContainerFacts
from manager.domain.ownership import LABEL_OWNER, Owner, foreign, left_behind, owner_of


def container(owner: str | None) -> ContainerFacts:
    labels = {} if owner is None else {LABEL_OWNER: owner}
    return ContainerFacts("1", "m-ollama-cpu", "image", "running", labels=labels)


@pytest.mark.parametrize(
    ("label", "owns"), [(None, True), ("me", True), ("lost", True), ("other", False), ("", False)]
)
def test_a_container_with_the_label_of_another_owner_is_foreign(label: str | None, *, owns: bool) -> None:
    owner = Owner("me", frozenset({"lost"}))
    facts = container(label)
    assert owner.owns(facts) is owns
    assert foreign(owner, [facts]) == (() if owns else (facts,))
    assert owner_of(facts) == label


@pytest.mark.parametrize("label", [None, "me", "lost"])
def test_containers_under_a_former_manager_id_are_named_with_both_ids_and_the_remedy(
    label: str | None,
) -> None:
    owner = Owner("me", frozenset({"lost"}), "m")
    others = [container("other")]
    wrong = left_behind(owner, "n", [container(label), *others])
    assert wrong is not None
    message, remedy = wrong
    assert message == (
        "manager_id was 'm' and is 'n' now, and this state directory still has containers under the former "
        "one: m-ollama-cpu"
    )
    assert remedy == (
        "set manager_id: m again and stop them with `ollama-manager stop`, or remove them: "
        "docker rm -f m-ollama-cpu"
    )
    assert left_behind(owner, "m", [container(label)]) is None, "nothing was changed"
    assert left_behind(owner, "n", []) is None
    assert left_behind(owner, "n", others) is None, "not ours"
    assert left_behind(Owner("me"), "n", [container(label)]) is None, "no former id is known"
