"""What the routes need of the running daemon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager.services.fleet import Fleet
    from manager.services.gpus import Gpus
    from manager.services.journal import Journal
    from manager.services.ports import Engine


@dataclass(frozen=True, slots=True)
class Backend:
    """Handed to every router by `app.py`.

    `may_pull` says whether the operator allows an image.
    """

    fleet: Fleet
    gpus: Gpus
    journal: Journal
    engine: Engine
    may_pull: Callable[[str], bool]
    render_metrics: Callable[[], bytes]
