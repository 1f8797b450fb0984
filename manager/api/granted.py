"""The key that a request of the control API is served for, and the open requests of each key."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import Scope

    from manager.domain.keys import Grant, Permit


# The message of a cancellation.
CUT = "the key was revoked"


def keep_grant(scope: Scope, grant: Grant | None) -> None:
    """Keep the key of a request for its route."""
    scope.setdefault("state", {})["grant"] = grant


def grant_of(scope: Scope) -> Grant | None:
    """Return the key of a request; None where none is needed."""
    found: Grant | None = scope.get("state", {}).get("grant")
    return found


def permit_of(scope: Scope) -> Permit | None:
    """Return what the key of a request permits; None where it may use everything."""
    grant = grant_of(scope)
    return None if grant is None else grant.permit


class OpenByKey:
    """The open requests to the control API that are served for a key, as tasks; one a connection at most."""

    def __init__(self) -> None:
        self._open: dict[str, set[asyncio.Task[object]]] = {}

    @contextmanager
    def serving(self, grant: Grant | None) -> Iterator[None]:
        """Count the current task among the open requests of a key."""
        task = asyncio.current_task()
        if grant is None or task is None:
            yield
            return
        tasks = self._open.setdefault(grant.name, set())
        tasks.add(task)
        try:
            yield
        finally:
            tasks.discard(task)
            if not tasks and self._open.get(grant.name) is tasks:
                del self._open[grant.name]

    def cut(self, name: str) -> int:
        """End the open requests of a key, but for the one that asks for this; return how many."""
        found = self._open.get(name, set()) - {asyncio.current_task()}
        for task in found:
            task.cancel(CUT)
        return len(found)
