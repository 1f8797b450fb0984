"""The scores of models by benchmarks, for routing."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.services.world import Revision


class BenchmarkScores:
    """The latest score of each model on each instance. `Benchmarks` owns them, others read.

    Implements `domain.scoring.Benchmarks`. New scores advance the revision of routing.
    """

    def __init__(self, revision: Revision) -> None:
        self._revision = revision
        self._scores: Mapping[tuple[str, str], float] = MappingProxyType({})

    def of(self, instance: str, key: str) -> float | None:
        """Return the score of a model (`model_key`) on an instance; None where nothing was measured."""
        return self._scores.get((instance, key))

    def all(self) -> Mapping[tuple[str, str], float]:
        """Return a snapshot of all scores, by instance and key of the model."""
        return self._scores

    def replace(self, scores: Mapping[tuple[str, str], float]) -> None:
        """Put others in force."""
        if scores != self._scores:
            self._scores = MappingProxyType(dict(scores))
            self._revision.advance()
