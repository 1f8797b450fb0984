"""Models of one name that differ between instances: an event for each change."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NoReturn

from manager.domain.wording import digests_text, listed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.services.journal import Journal
    from manager.services.overview import ModelState, Overviews

_LOOK_S = 2.0
# Two stores of different sources may differ in thousands of models: an event names the first ones.
_MOST_NAMED = 8


class DifferingModels:
    """Owns the models that are known to differ.

    Args:
        overviews: has the digests of each model.
        journal: gets `models_differ` and `models_agree`, once a change.
    """

    def __init__(self, overviews: Overviews, journal: Journal) -> None:
        self._overviews = overviews
        self._journal = journal
        self._seen: Mapping[str, ModelState] | None = None
        self._known: dict[str, str] = {}  # in words, by the key of the model

    async def run(self) -> NoReturn:
        """Look every few seconds, until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(_LOOK_S)

    def look(self) -> None:
        """Record what has changed since the last look."""
        models = self._overviews.models()
        if models is self._seen:
            return
        self._seen = models
        before = self._known
        self._known = {
            key: digests_text(key, model.digests) for key, model in models.items() if len(model.digests) > 1
        }
        if changed := [text for key, text in self._known.items() if text != before.get(key)]:
            self._journal.record("models_differ", detail=listed(changed, _MOST_NAMED))
        if agreed := [key for key in before if key not in self._known]:
            self._journal.record("models_agree", detail=listed(agreed, _MOST_NAMED))
