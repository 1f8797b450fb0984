"""The metrics by their documented names, as Prometheus reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manager.domain.embeddings import Counts
from manager.domain.instance import Phase
from manager.services.embeddings.counting import CountedCollection, CountedVersion
from manager.services.refusals import Refusals
from manager.services.traffic import BUCKETS_S, Traffic
from manager.wire.access import REASONS
from tests.support.gpu_machine import GIB
from tests.support.records import a_record
from tests.support.scraping import busy, scraped

if TYPE_CHECKING:
    from prometheus_client import Metric

LABELS = {
    "ollama_manager_requests": ("target", "role", "outcome"),
    "ollama_manager_fallbacks": ("from", "to", "reason"),
    "ollama_manager_target_errors": ("target", "reason"),
    "ollama_manager_request_duration_seconds": ("target",),
    "ollama_manager_time_to_first_token_seconds": ("target",),
    "ollama_manager_tokens": ("role", "project", "direction"),
    "ollama_manager_cost_usd": ("role", "project"),
    "ollama_manager_in_flight": ("target",),
    "ollama_manager_instance_phase": ("instance", "phase"),
    "ollama_manager_breaker_state": ("instance",),
    "ollama_manager_gpu_memory_used_bytes": ("uuid",),
    "ollama_manager_gpu_memory_total_bytes": ("uuid",),
    "ollama_manager_gpu_lost": ("uuid",),
    "ollama_manager_gpu_utilisation_percent": ("uuid",),
    "ollama_manager_gpu_temperature_celsius": ("uuid",),
    "ollama_manager_gpu_power_watts": ("uuid",),
    "ollama_manager_gpu_power_limit_watts": ("uuid",),
    "ollama_manager_instance_healthy": ("instance",),
    "ollama_manager_budget_spent_usd": ("scope", "period"),
    "ollama_manager_budget_reserved_usd": ("scope", "period"),
    "ollama_manager_budget_limit_usd": ("scope", "period", "limit"),
    "ollama_manager_starts": ("instance", "result"),
    "ollama_manager_engine_up": (),
    "ollama_manager_orphans": (),
    "ollama_manager_log_lines_dropped": (),
    "ollama_manager_refusals": ("reason",),
    "ollama_manager_rollout_stage": ("stage",),
    "ollama_manager_rollout_disagreements": ("reason",),
    "ollama_manager_history_requests": ("result",),
    "ollama_manager_lane_in_flight": ("lane",),
    "ollama_manager_lane_queued": ("lane",),
    "ollama_manager_slots": ("instance",),
    "ollama_manager_slots_in_use": ("instance",),
    "ollama_manager_benchmark_score": ("instance", "model"),
    "ollama_manager_collections": (),
    "ollama_manager_collection_items": ("collection",),
    "ollama_manager_collection_backfill_running": ("collection",),
    "ollama_manager_collection_backfill_failed": ("collection",),
    "ollama_manager_collection_version_rows": ("collection", "version"),
    "ollama_manager_collection_version_coverage_ratio": ("collection", "version"),
    "ollama_manager_collection_version_quarantined": ("collection", "version"),
    "ollama_manager_collection_version_active": ("collection", "version"),
    "ollama_manager_collection_version_stale": ("collection", "version"),
}
TYPES = {
    "ollama_manager_requests": "counter",
    "ollama_manager_fallbacks": "counter",
    "ollama_manager_target_errors": "counter",
    "ollama_manager_tokens": "counter",
    "ollama_manager_cost_usd": "counter",
    "ollama_manager_starts": "counter",
    "ollama_manager_log_lines_dropped": "counter",
    "ollama_manager_refusals": "counter",
    "ollama_manager_history_requests": "counter",
    "ollama_manager_rollout_disagreements": "counter",
    "ollama_manager_request_duration_seconds": "histogram",
    "ollama_manager_time_to_first_token_seconds": "histogram",
}


def values(family: Metric, **labels: str) -> list[float]:
    return [one.value for one in family.samples if labels.items() <= one.labels.items()]


def test_every_metric_has_its_documented_name_type_and_labels() -> None:
    families = scraped(busy())
    assert set(families) == set(LABELS)
    for name, family in families.items():
        assert family.type == TYPES.get(name, "gauge"), name
        assert family.documentation
        for one in family.samples:
            assert set(one.labels) - {"le"} == set(LABELS[name]), name
    samples = {one.name for family in families.values() for one in family.samples}
    for counter in ("requests", "fallbacks", "target_errors", "starts"):
        assert f"ollama_manager_{counter}_total" in samples


def test_counts_are_those_of_the_traffic() -> None:
    families = scraped(busy())
    requests = families["ollama_manager_requests"]
    assert values(requests, target="gpu0", role="thinking", outcome="ok") == [3]
    assert values(requests, target="", role="", outcome="refused") == [1]
    fallbacks = families["ollama_manager_fallbacks"]
    assert values(fallbacks, **{"from": "gpu1", "to": "gpu0", "reason": "instance_unavailable"}) == [1]
    assert values(families["ollama_manager_target_errors"], target="gpu1", reason="upstream_unreachable") == [
        1
    ]


def test_refusals_are_counted_by_reason_from_zero() -> None:
    refusals = Refusals(now=lambda: 0.0)
    for reason in ("key_wrong", "key_wrong", "/made/up"):
        refusals.refused(reason, "192.0.2.1", "/")
    family = scraped(busy(), refusals)["ollama_manager_refusals"]
    assert {one.labels["reason"]: one.value for one in family.samples} == {
        **dict.fromkeys((*REASONS, "other"), 0),
        "key_wrong": 2,
        "other": 1,
    }


def test_histograms_count_up_over_the_documented_buckets() -> None:
    families = scraped(busy())
    for name, expected, total_s in (
        ("request_duration", {0.05: 0, 0.1: 1, 1.0: 1, 2.5: 2, 600.0: 2, float("inf"): 3}, 701.5705),
        ("time_to_first_token", {0.005: 1, 0.01: 2, float("inf"): 2}, 0.0101),
    ):
        family = families[f"ollama_manager_{name}_seconds"]
        buckets = {float(one.labels["le"]): one.value for one in family.samples if "le" in one.labels}
        assert list(buckets) == [*BUCKETS_S, float("inf")]
        assert expected.items() <= buckets.items()
        assert sorted(buckets.values()) == list(buckets.values())
        count = next(one.value for one in family.samples if one.name.endswith("_count"))
        total = next(one.value for one in family.samples if one.name.endswith("_sum"))
        assert count == buckets[float("inf")]
        assert abs(total - total_s) < 1e-6


def test_the_state_of_the_fleet_is_read_when_it_is_scraped() -> None:
    families = scraped(Traffic(lambda record: None))
    phases = families["ollama_manager_instance_phase"]
    assert {one.labels["phase"] for one in phases.samples} == {phase.value for phase in Phase}
    assert [one.labels["phase"] for one in phases.samples if one.value] == ["ready"] * 3
    assert values(families["ollama_manager_in_flight"], target="gpu0") == [3]
    starts = families["ollama_manager_starts"]
    assert values(starts, instance="gpu0", result="ok") == [4]
    assert values(starts, instance="gpu0", result="failed") == [1]
    healthy = families["ollama_manager_instance_healthy"]
    assert [(one.labels["instance"], one.value) for one in healthy.samples] == [("gpu0", 1), ("nas", 0)]
    assert values(families["ollama_manager_engine_up"]) == [1]
    assert values(families["ollama_manager_orphans"]) == [2]
    assert values(families["ollama_manager_history_requests"], result="stored") == [40]
    assert values(families["ollama_manager_history_requests"], result="dropped") == [2]


def test_what_a_card_does_not_tell_is_absent_and_never_zero() -> None:
    families = scraped(Traffic(lambda record: None))
    for name, expected in (
        ("memory_used_bytes", [("GPU-1", 20 * GIB)]),
        ("memory_total_bytes", [("GPU-1", 24 * GIB)]),
        ("lost", [("GPU-1", 0), ("GPU-2", 1)]),
        ("utilisation_percent", [("GPU-1", 0)]),
        ("temperature_celsius", [("GPU-1", 61)]),
        ("power_watts", [("GPU-1", 412.5)]),
        ("power_limit_watts", [("GPU-1", 700)]),
    ):
        samples = families[f"ollama_manager_gpu_{name}"].samples
        assert [(one.labels["uuid"], one.value) for one in samples] == expected, name


def test_budgets_are_in_dollars_and_a_limit_that_is_none_is_absent() -> None:
    families = scraped(Traffic(lambda record: None))
    month = {"scope": "global", "period": "month"}
    assert values(families["ollama_manager_budget_spent_usd"], **month) == [20.5]
    assert values(families["ollama_manager_budget_reserved_usd"], **month) == [1.0]
    limits = families["ollama_manager_budget_limit_usd"]
    assert values(limits, **month) == values(limits, **month, limit="hard") == [30.0]
    assert values(limits, scope="project:a", limit="soft") == [1.0]
    assert values(limits, scope="key:k") == [3.0], "a series that stands twice spoils a whole scrape"
    assert len(values(families["ollama_manager_budget_spent_usd"], scope="key:k")) == 1


def test_lanes_and_slots_are_those_of_the_moment() -> None:
    families = scraped(Traffic(lambda record: None))
    assert values(families["ollama_manager_lane_in_flight"], lane="thinking") == [2]
    assert values(families["ollama_manager_lane_queued"], lane="thinking") == [5]
    assert [(one.labels["instance"], one.value) for one in families["ollama_manager_slots"].samples] == [
        ("gpu0", 2)
    ]
    assert values(families["ollama_manager_slots_in_use"], instance="cpu") == [3]


def test_names_of_models_roles_and_instances_cannot_break_the_text() -> None:
    traffic = Traffic(lambda record: None)
    traffic.ended(a_record(role='a"\\\nb'))
    assert values(scraped(traffic)["ollama_manager_requests"], role='a"\\\nb') == [1]


def test_collections_and_their_versions_have_a_series_each() -> None:
    families = scraped(busy())

    def found(name: str) -> dict[tuple[str, ...], float]:
        return {tuple(one.labels.values()): one.value for one in families[f"ollama_manager_{name}"].samples}

    first, second = ("docs", "0123456789abcdef"), ("docs", "fedcba9876543210")
    assert found("collections") == {(): 2}
    assert found("collection_items") == {("docs",): 200, ("empty",): 0}
    assert found("collection_backfill_running") == {("docs",): 1, ("empty",): 0}
    assert found("collection_backfill_failed") == {("docs",): 0, ("empty",): 1}
    assert found("collection_version_rows") == {first: 200, second: 50}
    assert found("collection_version_coverage_ratio") == {first: 1, second: 0.25}
    assert found("collection_version_quarantined") == {first: 0, second: 2}
    assert found("collection_version_active") == {first: 1, second: 0}
    assert found("collection_version_stale") == {first: 1, second: 0}


def test_collections_beyond_a_hundred_share_one_series() -> None:
    def one(number: int, *, is_stale: bool = False) -> CountedCollection:
        version = CountedVersion(f"{number:016x}", Counts(10, 5, 1), is_active=True, is_stale=is_stale)
        return CountedCollection(f"c{number}", 10, is_filled=False, has_failed=is_stale, versions=(version,))

    many = [*(one(number) for number in range(102)), one(102, is_stale=True)]
    families = scraped(busy(), collections=many)
    for name, expected in {
        "items": 30,
        "backfill_running": 0,
        "backfill_failed": 1,
        "version_rows": 15,
        "version_coverage_ratio": 0.5,
        "version_quarantined": 3,
        "version_active": 1,
        "version_stale": 1,
    }.items():
        family = families[f"ollama_manager_collection_{name}"]
        assert len(family.samples) == 101, name
        assert values(family, collection="*") == [expected], name
    assert values(families["ollama_manager_collections"]) == [103]
    assert values(families["ollama_manager_collection_items"], collection="c99") == [10]
    families = scraped(busy(), collections=many[:100])
    assert values(families["ollama_manager_collection_items"], collection="*") == []


def test_the_score_of_each_model_is_a_series_up_to_a_bound() -> None:
    family = scraped(busy())["ollama_manager_benchmark_score"]
    assert values(family, instance="cpu", model="m0:latest") == [0.25]
    assert len(family.samples) == 500
