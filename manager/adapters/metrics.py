"""The state of the fleet as Prometheus metrics, read when they are scraped and kept nowhere else."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from manager.domain.breaker import BreakerState
from manager.domain.embeddings import Counts
from manager.domain.instance import Health, Phase
from manager.domain.money import in_usd
from manager.domain.rollout import Stage
from manager.services.traffic import BUCKETS_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from prometheus_client import Metric

    from manager.domain.benchmark_results import Latest
    from manager.domain.budgets import Balance
    from manager.domain.gpu import Gpu
    from manager.services.accounts.ledger import BudgetState
    from manager.services.embeddings.counting import CountedCollection, CountedVersion
    from manager.services.lanes.slots import Slots
    from manager.services.overview import Overviews
    from manager.services.refusals import Refusals
    from manager.services.requests_history import History
    from manager.services.routing.rollout import Rollout
    from manager.services.traffic import Traffic

_PREFIX = "ollama_manager"
# Keys may have budgets of their own; those of the configuration come first.
_MOST_BUDGETS = 200
# The oldest collections have series of their own, so that a new one takes no other's place.
_MOST_COLLECTIONS = 100
# A report from outside may name any instance.
_MOST_SCORES = 500
# The label of all others together. No collection can have that name, and no version that id.
_OTHERS = "*"

_BREAKER_STATES = {BreakerState.CLOSED: 0.0, BreakerState.HALF_OPEN: 1.0, BreakerState.OPEN: 2.0}


class FleetMetrics:
    """A collector over live state; `render` gives the text."""

    def __init__(
        self,
        overviews: Overviews,
        traffic: Traffic,
        refusals: Refusals,
        slots: Slots,
        *,
        log_lines_dropped: Callable[[], int],
        history: History,
        rollout: Rollout,
        budgets: Callable[[], Sequence[BudgetState]],
        collections: Callable[[], Sequence[CountedCollection]],
        benchmarks: Callable[[], Sequence[Latest]],
    ) -> None:
        self._overviews = overviews
        self._refusals = refusals
        self._traffic = traffic
        self._slots = slots
        self._log_lines_dropped = log_lines_dropped
        self._history = history
        self._rollout = rollout
        self._budgets = budgets
        self._collections = collections
        self._benchmarks = benchmarks
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def describe(self) -> Iterator[Metric]:
        """Nothing: it keeps the library from collecting at registration."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        overview = self._overviews.current()
        phases = GaugeMetricFamily(
            f"{_PREFIX}_instance_phase", "1 for the phase an instance is in", labels=["instance", "phase"]
        )
        in_flight = GaugeMetricFamily(f"{_PREFIX}_in_flight", "Open leases", labels=["target"])
        starts = CounterMetricFamily(
            f"{_PREFIX}_starts", "Starts since the daemon began", labels=["instance", "result"]
        )
        breakers = GaugeMetricFamily(
            f"{_PREFIX}_breaker_state", "0 closed, 1 half-open, 2 open", labels=["instance"]
        )
        healthy = GaugeMetricFamily(
            f"{_PREFIX}_instance_healthy", "Whether the probes of a server succeed", labels=["instance"]
        )
        for state in overview.instances:
            if state.view.health is not Health.UNKNOWN:
                healthy.add_metric([state.view.spec.id], float(state.view.health is Health.HEALTHY))
            breakers.add_metric([state.view.spec.id], _BREAKER_STATES[state.breaker.state])
            view, instance_id = state.view, state.view.spec.id
            for phase in Phase:
                phases.add_metric([instance_id, phase.value], float(view.phase is phase))
            in_flight.add_metric([instance_id], view.in_flight)
            if view.spec.driver.has_container:
                starts.add_metric([instance_id, "ok"], state.starts_done)
                starts.add_metric([instance_id, "failed"], state.starts_failed)
        engine = GaugeMetricFamily(f"{_PREFIX}_engine_up", "Whether the container engine answers")
        engine.add_metric([], float(overview.engine_up))
        dropped = CounterMetricFamily(
            f"{_PREFIX}_log_lines_dropped", "Lines of the log that could not be written"
        )
        dropped.add_metric([], self._log_lines_dropped())
        refused = CounterMetricFamily(
            f"{_PREFIX}_refusals", "Requests refused by access control", labels=["reason"]
        )
        for reason, count in self._refusals.counts.items():
            refused.add_metric([reason], count)
        orphans = GaugeMetricFamily(
            f"{_PREFIX}_orphans", "Containers with the manager's label that belong to no instance"
        )
        orphans.add_metric([], len(overview.orphans))
        kept = CounterMetricFamily(
            f"{_PREFIX}_history_requests", "Requests that ended, by what the history did", labels=["result"]
        )
        kept.add_metric(["stored"], self._history.stored)
        kept.add_metric(["dropped"], self._history.dropped)
        yield from (phases, healthy, in_flight, breakers, starts, engine, orphans, dropped, refused, kept)
        yield from _cards([card.gpu for card in overview.cards])
        yield from self._money()
        yield from self._stages()
        yield from self._lanes()
        yield from _embeddings(self._collections())
        yield _scores(self._benchmarks())
        yield from self._requests()

    def _money(self) -> Iterator[Metric]:
        labels = ["scope", "period"]
        spent = GaugeMetricFamily(
            f"{_PREFIX}_budget_spent_usd", "Spent of a budget in its current period", labels=labels
        )
        reserved = GaugeMetricFamily(
            f"{_PREFIX}_budget_reserved_usd", "The most that open requests may still cost", labels=labels
        )
        limit = GaugeMetricFamily(
            f"{_PREFIX}_budget_limit_usd", "The limits of a budget", labels=[*labels, "limit"]
        )
        balances: dict[tuple[str, str], Balance] = {}
        limits: dict[tuple[str, str, str], int] = {}
        # A key may have a limit of its own and one of the configuration: the lower one is in force.
        for budget, balance, _ in self._budgets()[:_MOST_BUDGETS]:
            names = (budget.scope, budget.period.value)
            balances[names] = balance
            for kind, most in (("soft", budget.soft_micro_usd), ("hard", budget.hard_micro_usd)):
                if most is not None:
                    limits[*names, kind] = min(most, limits.get((*names, kind), most))
        for names, balance in balances.items():
            spent.add_metric(names, in_usd(balance.spent))
            reserved.add_metric(names, in_usd(balance.reserved))
        for labelled, most in limits.items():
            limit.add_metric(labelled, in_usd(most))
        yield from (spent, reserved, limit)

    def _stages(self) -> Iterator[Metric]:
        stage = GaugeMetricFamily(f"{_PREFIX}_rollout_stage", "1 for the stage in force", labels=["stage"])
        for one in Stage:
            stage.add_metric([one.value], float(self._rollout.stages.stage is one))
        differences = CounterMetricFamily(
            f"{_PREFIX}_rollout_disagreements",
            "Answers of the raw server that differ from the decision beside them",
            labels=["reason"],
        )
        for reason, count in self._rollout.disagreements.items():
            differences.add_metric([reason.value], count)
        yield from (stage, differences)

    def _lanes(self) -> Iterator[Metric]:
        in_flight = GaugeMetricFamily(
            f"{_PREFIX}_lane_in_flight", "Requests of a lane that have a slot", labels=["lane"]
        )
        queued = GaugeMetricFamily(
            f"{_PREFIX}_lane_queued", "Requests of a lane that wait for a slot", labels=["lane"]
        )
        for lane in self._slots.lanes():
            in_flight.add_metric([lane.name], lane.in_flight)
            queued.add_metric([lane.name], lane.queued)
        slots = GaugeMetricFamily(f"{_PREFIX}_slots", "Slots, where they are limited", labels=["instance"])
        in_use = GaugeMetricFamily(f"{_PREFIX}_slots_in_use", "Slots in use", labels=["instance"])
        for one in self._slots.instances():
            in_use.add_metric([one.id], one.in_use)
            if one.slots is not None:
                slots.add_metric([one.id], one.slots)
        yield from (in_flight, queued, slots, in_use)

    def _requests(self) -> Iterator[Metric]:
        traffic = self._traffic
        for name, text, labels, counts in (
            ("requests", "Requests that ended", ["target", "role", "outcome"], traffic.requests),
            ("fallbacks", "Answers from elsewhere than asked", ["from", "to", "reason"], traffic.fallbacks),
            ("target_errors", "Attempts that failed", ["target", "reason"], traffic.target_errors),
        ):
            counter = CounterMetricFamily(f"{_PREFIX}_{name}", text, labels=labels)
            for values, count in counts.items():
                counter.add_metric(list(values), count)
            yield counter
        tokens = CounterMetricFamily(
            f"{_PREFIX}_tokens", "Tokens of requests that ended", labels=["role", "project", "direction"]
        )
        cost = CounterMetricFamily(
            f"{_PREFIX}_cost_usd", "Cost of requests that ended", labels=["role", "project"]
        )
        for (role, project), used in traffic.used.items():
            tokens.add_metric([role, project, "input"], used.input_tokens)
            tokens.add_metric([role, project, "output"], used.output_tokens)
            cost.add_metric([role, project], used.cost_usd)
        yield from (tokens, cost)
        for name, text, histograms in (
            ("request_duration", "From a request's head to the end of its answer", traffic.durations),
            ("time_to_first_token", "From a request's head to that of its answer", traffic.first_tokens),
        ):
            family = HistogramMetricFamily(f"{_PREFIX}_{name}_seconds", text, labels=["target"])
            for target, histogram in histograms.items():
                bounds = [*map(str, BUCKETS_S), "+Inf"]
                family.add_metric(
                    [target], list(zip(bounds, accumulate(histogram.counts), strict=True)), histogram.total_s
                )
            yield family


def _embeddings(collections: Sequence[CountedCollection]) -> Iterator[Metric]:
    """Yield the gauges of collections, and those of their versions."""
    known = GaugeMetricFamily(f"{_PREFIX}_collections", "Collections")
    known.add_metric([], len(collections))
    yield known
    own, others = collections[:_MOST_COLLECTIONS], collections[_MOST_COLLECTIONS:]
    shown: list[tuple[str, Sequence[CountedCollection]]] = [(one.name, (one,)) for one in own]
    if others:
        shown.append((_OTHERS, others))
    for name, text, of_collection in _OF_COLLECTIONS:
        family = GaugeMetricFamily(f"{_PREFIX}_collection_{name}", text, labels=["collection"])
        for label, found in shown:
            family.add_metric([label], of_collection(found))
        yield family
    series = [(one.name, version.id, (version,)) for one in own for version in one.versions]
    rest = tuple(version for one in others for version in one.versions)
    for name, text, of_version in _OF_VERSIONS:
        family = GaugeMetricFamily(
            f"{_PREFIX}_collection_version_{name}", text, labels=["collection", "version"]
        )
        for label, version_id, versions in series:
            family.add_metric([label, version_id], of_version(versions))
        if rest:
            family.add_metric([_OTHERS, _OTHERS], of_version(rest))
        yield family


def _coverage(versions: Sequence[CountedVersion]) -> float:
    """Return the share of the items that have a vector, over all versions; 1 exactly where all have one."""
    return Counts(
        sum(one.counts.items for one in versions), sum(one.counts.rows for one in versions)
    ).coverage


# Of one collection or version, or of several: then sums, and 1 where it is so of any.
_OF_COLLECTIONS: tuple[tuple[str, str, Callable[[Sequence[CountedCollection]], float]], ...] = (
    ("items", "Items of a collection", lambda found: sum(one.items for one in found)),
    (
        "backfill_running",
        "1 while a backfill of a collection runs",
        lambda found: float(any(one.is_filled for one in found)),
    ),
    (
        "backfill_failed",
        "1 where the latest backfill of a collection has failed",
        lambda found: float(any(one.has_failed for one in found)),
    ),
)
_OF_VERSIONS: tuple[tuple[str, str, Callable[[Sequence[CountedVersion]], float]], ...] = (
    ("rows", "Items that a version has vectors of", lambda found: sum(one.counts.rows for one in found)),
    ("coverage_ratio", "Share of the items that a version has vectors of", _coverage),
    (
        "quarantined",
        "Items that a backfill could not embed for a version",
        lambda found: sum(one.counts.quarantined for one in found),
    ),
    (
        "active",
        "1 for the version that queries read",
        lambda found: float(any(one.is_active for one in found)),
    ),
    (
        "stale",
        "1 for a version whose build of the model was replaced",
        lambda found: float(any(one.is_stale for one in found)),
    ),
)


def _cards(gpus: Sequence[Gpu]) -> Iterator[Metric]:
    """Yield a gauge for each thing that is measured. A card is not in those that it does not support."""
    for name, text, values in (
        ("memory_used_bytes", "Memory in use on a card, by anyone", [gpu.vram_used_bytes for gpu in gpus]),
        ("memory_total_bytes", "Memory of a card", [gpu.vram_total_bytes for gpu in gpus]),
        ("lost", "1 for a card that cannot be used", [float(gpu.lost is not None) for gpu in gpus]),
        (
            "utilisation_percent",
            "Share of the last sampling period in which a kernel ran on a card",
            [gpu.utilisation_percent for gpu in gpus],
        ),
        ("temperature_celsius", "Temperature of a card's chip", [gpu.temperature_c for gpu in gpus]),
        ("power_watts", "Power that a card draws", [gpu.power_watts for gpu in gpus]),
        ("power_limit_watts", "Power that a card may draw", [gpu.power_limit_watts for gpu in gpus]),
    ):
        family = GaugeMetricFamily(f"{_PREFIX}_gpu_{name}", text, labels=["uuid"])
        for gpu, value in zip(gpus, values, strict=True):
            if value is not None:
                family.add_metric([gpu.uuid], value)
        yield family


def _scores(latest: Sequence[Latest]) -> Metric:
    score = GaugeMetricFamily(
        f"{_PREFIX}_benchmark_score",
        "The latest score of a model on an instance, 0 to 1",
        labels=["instance", "model"],
    )
    for one in latest[:_MOST_SCORES]:
        score.add_metric(list(one.target), one.score)
    return score
