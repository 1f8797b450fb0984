from __future__ import annotations

import pytest

from manager.domain.instance import ContainerFacts
from manager.domain.ownership import LABEL_OWNER, Owner, foreign, owner_of


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
