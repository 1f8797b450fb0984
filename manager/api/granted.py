"""The key that a request is served for, between the gate and the routes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Scope

    from manager.domain.keys import Grant


def keep_grant(scope: Scope, grant: Grant | None) -> None:
    """Keep the key of a request for its route."""
    scope.setdefault("state", {})["grant"] = grant


def grant_of(scope: Scope) -> Grant | None:
    """Return the key of a request; None where none is needed."""
    found: Grant | None = scope.get("state", {}).get("grant")
    return found
