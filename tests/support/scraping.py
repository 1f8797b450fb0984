"""A daemon's metrics as Prometheus reads them, from a fleet with something in every family."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from prometheus_client.parser import text_string_to_metric_families

from manager.adapters.metrics import FleetMetrics
from manager.domain.benchmark_results import Latest
from manager.domain.benchmarks import Target
from manager.domain.breaker import BreakerState
from manager.domain.budgets import Balance, Budget, Period
from manager.domain.embeddings import Counts
from manager.domain.instance import Driver, Health, Phase
from manager.errors import Reason
from manager.services.accounts.ledger import BudgetState
from manager.services.embeddings.counting import CountedCollection, CountedVersion
from manager.services.lanes.slots import LaneState, SlotState
from manager.services.refusals import Refusals
from manager.services.routing.rollout import Rollout
from manager.services.traffic import Traffic
from tests.support.gpu_machine import GIB, card
from tests.support.records import a_record

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from prometheus_client import Metric

CARDS = (
    replace(
        card("GPU-1", free=4 * GIB),
        utilisation_percent=0,
        temperature_c=61,
        power_watts=412.5,
        power_limit_watts=700,
    ),
    replace(card("GPU-2", free=None, lost="it is lost")),
)
BUDGETS = (
    BudgetState(Budget("global", Period.MONTH, None, 30_000_000), Balance(20_500_000, 1_000_000), "ok"),
    # The limit of a key, and one that the configuration gives to the same key.
    BudgetState(Budget("key:k", Period.MONTH, None, 9_000_000), Balance(5, 0), "ok"),
    BudgetState(Budget("key:k", Period.MONTH, None, 3_000_000), Balance(5, 0), "ok"),
    BudgetState(Budget("project:a", Period.DAY, 1_000_000, 2_000_000), Balance(0, 0), "ok"),
)
SLOTS = SimpleNamespace(
    lanes=lambda: [LaneState("thinking", 2, 5, 1.5, 4, 1)],
    instances=lambda: [SlotState("gpu0", 2, 1, 1), SlotState("cpu", None, 3, 0)],
)
COLLECTIONS = (
    CountedCollection(
        "docs",
        200,
        is_filled=True,
        has_failed=False,
        versions=(
            CountedVersion("0123456789abcdef", Counts(200, 200), is_active=True, is_stale=True),
            CountedVersion("fedcba9876543210", Counts(200, 50, 2), is_active=False, is_stale=False),
        ),
    ),
    CountedCollection("empty", 0, is_filled=False, has_failed=True, versions=()),
)


def scraped(
    traffic: Traffic,
    refusals: Refusals | None = None,
    collections: Sequence[CountedCollection] = COLLECTIONS,
) -> Mapping[str, Metric]:
    """Return what a daemon renders in which each family has a sample, by the name of the family."""

    def state(id_: str, driver: Driver, **values: Any) -> Any:
        health = values.pop("health", Health.UNKNOWN)
        spec = SimpleNamespace(id=id_, driver=driver)
        view = SimpleNamespace(spec=spec, phase=Phase.READY, in_flight=3, health=health)
        breaker = SimpleNamespace(state=BreakerState.OPEN if id_ == "nas" else BreakerState.CLOSED)
        return SimpleNamespace(
            view=view, **{"starts_done": 0, "starts_failed": 0, "breaker": breaker, **values}
        )

    cards = [SimpleNamespace(gpu=gpu) for gpu in CARDS]
    overview = SimpleNamespace(
        instances=[
            state("gpu0", Driver.DOCKER, starts_done=4, starts_failed=1, health=Health.HEALTHY),
            state("gpu1", Driver.DOCKER),
            state("nas", Driver.EXTERNAL, health=Health.UNHEALTHY),
        ],
        cards=cards,
        orphans=("one", "two"),
        engine_up=True,
    )
    benchmarks = [
        Latest(Target("gpu0" if number else "cpu", f"m{number}:latest"), 0.25, ()) for number in range(501)
    ]
    metrics = FleetMetrics(
        cast("Any", SimpleNamespace(current=lambda: overview)),
        traffic,
        refusals or Refusals(now=lambda: 0.0),
        cast("Any", SLOTS),
        log_lines_dropped=lambda: 7,
        history=cast("Any", SimpleNamespace(stored=40, dropped=2)),
        rollout=Rollout(),
        budgets=lambda: BUDGETS,
        collections=lambda: collections,
        benchmarks=lambda: benchmarks,
    )
    text = metrics.render().decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def busy() -> Traffic:
    """Return the traffic of some requests that were answered, refused, and sent elsewhere."""
    traffic = Traffic(lambda record: None)
    traffic.ended(a_record(ttfb_ms=5.0, duration_ms=70.0))
    traffic.ended(a_record(ttfb_ms=5.1, duration_ms=700_000.0))
    traffic.ended(
        a_record(
            fallback_from="gpu1", fallback=True, fallback_reason=Reason.INSTANCE_UNAVAILABLE, ttfb_ms=None
        )
    )
    traffic.ended(a_record(outcome="refused", effective_target=None, role=None))
    traffic.failed("gpu1", Reason.UPSTREAM_UNREACHABLE)
    return traffic
