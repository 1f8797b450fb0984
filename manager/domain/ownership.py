"""Whose container it is: several state directories may use one engine and, by mistake, one manager id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from manager.domain.instance import ContainerFacts

LABEL_OWNER = "ollama-manager.owner"


@dataclass(frozen=True, slots=True)
class Owner:
    """The owner of a state directory.

    Attributes:
        id: a random id that the state directory keeps; every container is labelled with it.
        taken_over: the ids of lost state directories, whose containers were taken over.
    """

    id: str
    taken_over: frozenset[str] = frozenset()

    def owns(self, facts: ContainerFacts) -> bool:
        """Whether a container is not another owner's.

        One without the label was made by an older version or by hand.
        """
        label = facts.labels.get(LABEL_OWNER)
        return label is None or label == self.id or label in self.taken_over


def foreign(owner: Owner, containers: Iterable[ContainerFacts]) -> tuple[ContainerFacts, ...]:
    """The containers that belong to another owner."""
    return tuple(facts for facts in containers if not owner.owns(facts))


def whose(facts: ContainerFacts, *, manager_id: str, is_of_manager: bool) -> str:
    """Say whose container it is that has the name of one of ours.

    Args:
        facts: the container.
        manager_id: ours.
        is_of_manager: it has the labels of our manager id.
    """
    if is_of_manager:
        return (
            f"the container {facts.name!r} belongs to another daemon with manager_id {manager_id!r} "
            f"(owner {owner_of(facts)}); give this daemon a manager_id of its own"
        )
    return (
        f"a container named {facts.name!r} exists and is not managed by {manager_id!r}; rename or remove it"
    )


def owner_of(facts: ContainerFacts) -> str | None:
    """The id of the owner that a container is labelled with."""
    return facts.labels.get(LABEL_OWNER)
