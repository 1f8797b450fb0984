"""The order of instances by the strategy of a role: whose turn it is, the load, or a score."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from manager.domain.models import model_key
from manager.domain.roles import Strategy
from manager.domain.scoring import (
    NO_BENCHMARKS,
    Signals,
    family_of,
    of_benchmark,
    of_latency,
    of_queue,
    of_throughput,
    overlap,
    same_family,
    score,
    words_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.domain.roles import RoutingSettings
    from manager.domain.routing import Band, Candidate, Load, RequestFacts, Snapshot
    from manager.domain.scoring import Benchmarks, Weights
    from manager.services.routing.overload import Overload

# Roles whose turn is kept; at the bound all begin again.
MOST_TURNS = 1024
_WRAPS_AT = 2**31
# Models of requests whose scores are kept until the next snapshot.
_MOST_SCORES = 1024


class Wish(NamedTuple):
    """The words and the families of models that a request wants."""

    words: frozenset[str]
    families: frozenset[str] = frozenset()


class Ranking:
    """Owns the turns of roles, and the scores of instances for as long as a snapshot lives.

    Args:
        overload: knows the times to the first token, and the speeds.
        benchmarks: the results of benchmarks.
    """

    def __init__(self, overload: Overload, benchmarks: Benchmarks = NO_BENCHMARKS) -> None:
        self._overload = overload
        self._benchmarks = benchmarks
        self._turns: dict[str, int] = {}
        self._scores: dict[tuple[str, str | None, str | None, str], dict[str, float]] = {}
        self._scored: Snapshot | None = None

    def turn(self, role: str | None) -> int:
        """Return whose turn it is in a role, without taking it."""
        return self._turns.get(role or "", 0)

    def take_turn(self, role: str | None) -> int:
        """Return whose turn it is in a role; the next request is another one's."""
        name = role or ""
        turn = self._turns.pop(name, 0)
        if len(self._turns) >= MOST_TURNS:
            self._turns.clear()
        self._turns[name] = (turn + 1) % _WRAPS_AT
        return turn

    def ranks(  # noqa: PLR0917  (all that an order depends on)
        self,
        facts: RequestFacts,
        band: Band,
        load: Load,
        settings: RoutingSettings,
        snapshot: Snapshot,
        turn: int,
    ) -> Load:
        """Return what the instances of a band are compared by, the lowest first."""
        first = band[0]
        role = None if first.role is None else settings.roles.get(first.role)
        if role is None or role.strategy in (Strategy.WARM_FIRST, Strategy.LEAST_LOADED):
            return load
        if role.strategy is Strategy.ROUND_ROBIN:
            # By id: loads and priorities change from one request to the next, and would skip a turn.
            ids = sorted(instance for group in band for instance in group.instances)
            return {instance: (place - turn) % len(ids) for place, instance in enumerate(ids)}
        known = self._known(facts, first.role, first.model, snapshot)
        wish = wish_of(facts, first.role, first.model)
        for group in band:
            for instance in group.instances:
                if instance not in known and (candidate := snapshot.get(instance)) is not None:
                    signals = self.signals(wish, candidate, first.model, in_flight=None)
                    known[instance] = _without_queue(signals, settings.weights)
        return _Scores(known, load, settings.weights)

    def signals(self, wish: Wish, candidate: Candidate, model: str, *, in_flight: float | None) -> Signals:
        """Return the signals of a model on an instance; what nothing was measured of is None."""
        key = model_key(model)
        return Signals(
            text=overlap(wish.words, (*(candidate.models or {}).values(), model)),
            family=same_family(wish.families, model),
            loaded=None if candidate.paid else float(key in candidate.loaded),
            latency=of_latency(self._overload.recent_ms(candidate.id, key)),
            throughput=of_throughput(self._overload.tokens_per_s(candidate.id, key)),
            queue=None if in_flight is None else of_queue(in_flight),
            benchmark=of_benchmark(self._benchmarks.of(candidate.id, key)),
        )

    def _known(
        self, facts: RequestFacts, role: str | None, model: str, snapshot: Snapshot
    ) -> dict[str, float]:
        if self._scored is not snapshot or len(self._scores) >= _MOST_SCORES:
            self._scored = snapshot
            self._scores.clear()
        return self._scores.setdefault((facts.model, facts.lane, role, model), {})


def wish_of(facts: RequestFacts, role: str | None, model: str, text: str = "") -> Wish:
    """Return the wish of a request: its words, and the family of the model that answers."""
    words = words_of(facts.model) | words_of(facts.lane or "") | words_of(role or "") | words_of(text)
    return Wish(words, frozenset({family_of(model)}))


class _Scores:
    """Ranks by score, the highest first. The requests in flight are read with every look: they change."""

    __slots__ = ("_known", "_load", "_weight")

    def __init__(self, known: Mapping[str, float], load: Load, weights: Weights) -> None:
        self._known = known
        self._load = load
        self._weight = weights.queue

    def __getitem__(self, instance: str) -> float:
        return -(self._known.get(instance, 0.0) + self._weight * of_queue(self._load[instance]))


def _without_queue(signals: Signals, weights: Weights) -> float:
    """Return the part of a score that stays while a snapshot lives, times the sum of the weights."""
    others = weights._replace(queue=0.0)
    return score(signals, others) * sum(others)
