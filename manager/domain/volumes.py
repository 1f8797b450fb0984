"""Volumes of models: which one an instance keeps its models on, and which instance writes to it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from manager.domain.routing import State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from manager.domain.template import Template, Volume

_OLLAMA_MODELS = "/root/.ollama/models"


@dataclass(frozen=True, slots=True)
class Member:
    """An instance on a volume. `writable` is whether its template mounts the volume for writing."""

    id: str
    state: State
    priority: int = 0
    writable: bool = True


def model_store(template: Template) -> str:
    """Return the directory of the models inside a container (`envconfig/config.go` Models)."""
    return _normal(template.env.get("OLLAMA_MODELS", "").strip() or _OLLAMA_MODELS)


def models_mount(template: Template) -> Volume | None:
    """Return the volume that the models of a container lie on; None where they end with the container."""
    store = model_store(template)
    mounts = [volume for volume in template.volumes if _is_within(store, volume.target)]
    return max(mounts, key=lambda volume: len(volume.target), default=None)


# Every reading of the fleet asks this of each instance, and paths take long to take apart.
@lru_cache(maxsize=1024)
def _normal(path: str) -> str:
    return str(PurePosixPath("/", path))


@lru_cache(maxsize=1024)
def _is_within(path: str, directory: str) -> bool:
    return PurePosixPath(path).is_relative_to(directory)


def writers(members: Sequence[Member], configured: str | None) -> tuple[str, ...]:
    """The writers, in the order in which they are tried; the first that can be had is the one.

    Servers that share a volume know nothing of each other: two that pull the same model write the same file.
    So the operator's choice stands alone, and otherwise whoever runs comes before whoever would have to be
    started.

    Args:
        members: all instances on the volume, in the configured order.
        configured: the operator's choice, None where there is none.
    """
    if configured is not None:
        return (configured,)
    able = [member for member in members if member.writable and member.state is not State.OUT]
    return tuple(member.id for member in sorted(able, key=_order))


def readers(members: Sequence[Member]) -> tuple[str, ...]:
    """The instances to be asked about a volume, in the order in which they are tried."""
    return tuple(member.id for member in sorted(members, key=_order) if member.state is not State.OUT)


def _order(member: Member) -> tuple[bool, int]:
    return member.state is not State.READY, -member.priority
