"""What the routes need of the running daemon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from manager.domain.routing import Decision, RequestFacts
    from manager.services.catalogue import Catalogue
    from manager.services.fleet import Fleet
    from manager.services.gpus import Gpus
    from manager.services.journal import Journal
    from manager.services.model_settings import ModelSettings
    from manager.services.ports import Engine


class Router(Protocol):
    """Where requests would go."""

    def decide(self, facts: RequestFacts) -> Decision:
        """The decision for a request. Starts nothing and asks nobody."""
        ...

    def load(self) -> Mapping[str, int]:
        """Requests in flight by instance."""
        ...


@dataclass(frozen=True, slots=True)
class Backend:
    """Handed to every router by `app.py`.

    `may_pull` says whether the operator allows an image.
    """

    fleet: Fleet
    gpus: Gpus
    journal: Journal
    engine: Engine
    catalogue: Catalogue
    model_settings: ModelSettings
    router: Router
    may_pull: Callable[[str], bool]
    render_metrics: Callable[[], bytes]
