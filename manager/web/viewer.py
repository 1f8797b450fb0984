"""The person in front of a page: what their key permits, which shapes what is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from manager.api.granted import grant_of
from manager.domain.keys import INCLUDED, Scope

if TYPE_CHECKING:
    from starlette.requests import Request

    from manager.domain.keys import Grant


class Viewer(NamedTuple):
    """Hashable. `name` is that of the key; None where the daemon needs none, and everything is permitted."""

    name: str | None
    scopes: frozenset[Scope]

    @property
    def kind(self) -> frozenset[Scope]:
        """What fragments are rendered for: viewers of one kind see the same."""
        return self.scopes

    def may(self, scope: str) -> bool:
        """Return whether the viewer may use what needs a scope."""
        return Scope(scope) in self.scopes


def viewer_of(request: Request) -> Viewer:
    """Return who sends a request."""
    return viewer_for(grant_of(request.scope))


def viewer_for(grant: Grant | None) -> Viewer:
    """Return the viewer with a key; None where none is needed."""
    if grant is None:
        return Viewer(None, frozenset(Scope))
    return Viewer(grant.name, frozenset().union(*(INCLUDED[one] for one in grant.scopes)))
