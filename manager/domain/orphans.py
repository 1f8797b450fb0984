"""Containers with the manager's label that belong to no instance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from manager.domain.container import LABEL_INSTANCE, container_name
from manager.domain.instance import ALIVE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from manager.domain.instance import ContainerFacts


@dataclass(frozen=True, slots=True)
class Orphan:
    """A container that no instance watches, and why; it is never started, stopped or removed.

    `instance` is what its label says, None without that label. `remedy` is a command.
    """

    id: str
    name: str
    image: str
    instance: str | None
    is_running: bool
    why: str
    remedy: str


def find_orphans(
    containers: Iterable[ContainerFacts],
    *,
    manager_id: str,
    is_configured: Callable[[str], bool],
    removal: str = "docker rm -f",
) -> tuple[Orphan, ...]:
    """Return the orphans among the containers of a manager, by name.

    A container belongs to the instance that it is labelled with if it has that instance's name too: by the
    name it is inspected, stopped and replaced.

    Args:
        containers: all that have the manager's label.
        manager_id: the manager's.
        is_configured: whether there is an instance of that id.
        removal: the command that removes one of them by its name.
    """
    found = []
    for facts in containers:
        instance = facts.labels.get(LABEL_INSTANCE)
        expected = None if instance is None else container_name(manager_id, instance)
        if instance is None:
            why = "it is labelled with no instance"
        elif not is_configured(instance):
            why = f"it is labelled as instance {instance!r}, which is not configured"
        elif facts.name != expected:
            why = f"the container of instance {instance!r} is named {expected}; this one was renamed"
        else:
            continue
        orphan = Orphan(
            id=facts.id,
            name=facts.name,
            image=facts.image,
            instance=instance,
            is_running=facts.status in ALIVE,
            why=why,
            remedy=f"{removal} {facts.name}",
        )
        found.append(orphan)
    return tuple(sorted(found, key=lambda one: one.name))
