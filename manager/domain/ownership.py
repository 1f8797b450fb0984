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
        manager_id: the manager id of its containers; None where an older version wrote the file.
    """

    id: str
    taken_over: frozenset[str] = frozenset()
    manager_id: str | None = None

    def owns(self, facts: ContainerFacts) -> bool:
        """Whether a container is not another owner's.

        One without the label was made by an older version or by hand.
        """
        label = facts.labels.get(LABEL_OWNER)
        return label is None or label == self.id or label in self.taken_over


def foreign(owner: Owner, containers: Iterable[ContainerFacts]) -> tuple[ContainerFacts, ...]:
    """The containers that belong to another owner."""
    return tuple(facts for facts in containers if not owner.owns(facts))


def left_behind(
    owner: Owner, manager_id: str, containers: Iterable[ContainerFacts]
) -> tuple[str, str] | None:
    """Return what is wrong with a changed manager id, and the remedy; None where nothing is.

    Names and labels of containers have the manager id in them: under a new one its former containers are
    not found, and go on without a manager. A start is refused therefore, instead of reporting them as
    removed. A former id without containers is forgotten.

    Args:
        owner: of the state directory.
        manager_id: the configured one.
        containers: those of `owner.manager_id`.
    """
    names = [facts.name for facts in containers if owner.owns(facts)]
    if not names or owner.manager_id in (None, manager_id):
        return None
    message = (
        f"manager_id was {owner.manager_id!r} and is {manager_id!r} now, and this state directory still has "
        f"containers under the former one: {', '.join(names)}"
    )
    remedy = (
        f"set manager_id: {owner.manager_id} again and stop them with `ollama-manager stop`, "
        f"or remove them: docker rm -f {' '.join(names)}"
    )
    return message, remedy


def whose(facts: ContainerFacts, *, manager_id: str, is_of_manager: bool, is_service: bool = False) -> str:
    """Say whose container it is that has the name of one of ours.

    Args:
        facts: the container.
        manager_id: ours.
        is_of_manager: it has the labels of our manager id.
        is_service: it is a service of Docker Swarm, which cannot be renamed.
    """
    if is_of_manager:
        kind = "service" if is_service else "container"
        return (
            f"the {kind} {facts.name!r} belongs to another daemon with manager_id {manager_id!r} "
            f"(owner {owner_of(facts)}); give this daemon a manager_id of its own"
        )
    if is_service:
        return (
            f"a service named {facts.name!r} exists and is not managed by {manager_id!r}; give this daemon "
            f"another manager_id, or remove the service: docker service rm {facts.name}"
        )
    return (
        f"a container named {facts.name!r} exists and is not managed by {manager_id!r}; rename or remove it"
    )


def owner_of(facts: ContainerFacts) -> str | None:
    """The id of the owner that a container is labelled with."""
    return facts.labels.get(LABEL_OWNER)
