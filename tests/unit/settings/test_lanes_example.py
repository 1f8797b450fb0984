"""docs/examples/lanes.yaml: five lanes on three servers, each of which resolves as its comments say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from manager.domain.instance import DeviceKind
from manager.domain.models import model_key
from manager.domain.roles import RequestKind
from manager.domain.routing import Candidate, PassedOver, RequestFacts, Snapshot, State, decide
from manager.errors import Reason
from manager.settings import load_settings, load_templates, resolve_instances
from manager.settings.routing import role_refusals, routing_settings
from manager.settings.section import FoundIds

if TYPE_CHECKING:
    from manager.domain.roles import RoutingSettings
    from manager.domain.routing import Decision

EXAMPLE = Path(__file__).resolve().parents[3] / "docs" / "examples" / "lanes.yaml"
LOADED = load_settings(EXAMPLE, environ={"HOME": "/home/someone"})
LANES = ("alert-fast", "code-review", "embedding", "deep-rca", "paid-emergency")
# The models of each server; nas has the large ones on its disk too.
MODELS = ("gemma3:4b", "qwen2.5-coder:7b", "bge-m3", "deepseek-r1:14b")
Way = tuple[str, float | None, Reason | None]


def settings() -> RoutingSettings:
    return routing_settings(LOADED.settings.roles, LOADED.settings.models)


def snapshot(*out: str) -> Snapshot:
    """All servers, of which those named have an open breaker."""
    return Snapshot(
        tuple(
            Candidate(
                id=name,
                device=DeviceKind.CPU if name == "nas" else DeviceKind.GPU,
                state=State.OUT if name in out else State.READY,
                models={model_key(model): model for model in MODELS},
                why_out=Reason.BREAKER_OPEN if name in out else None,
                detail="" if name not in out else "2 time-outs",
            )
            for name in LOADED.settings.instances
        )
    )


def decided(lane: str, *out: str, kind: RequestKind = RequestKind.GENERATE) -> Decision:
    return decide(RequestFacts(lane, kind), settings(), snapshot(*out))


def ways(decision: Decision) -> list[Way]:
    return [(one, group.timeout_s, group.fallback) for group in decision.groups for one in group.instances]


def test_it_has_the_five_lanes_and_contradicts_itself_nowhere() -> None:
    roles, instances = LOADED.settings.roles, LOADED.settings.instances
    assert set(LANES) <= set(roles)
    slots = {name: one.slots for name, one in instances.items()}
    gpu_of: dict[str, bool | None] = {name: one.device == ("gpu",) for name, one in instances.items()}
    assert list(role_refusals(roles, gpu_of, slots, found=FoundIds())) == []
    assert [spec.id for spec in resolve_instances(LOADED, load_templates(LOADED.settings))] == [*instances]


def test_alerts_go_to_three_servers_in_order_with_45_45_and_60_seconds() -> None:
    decision = decided("alert-fast")
    assert [(one, timeout_s) for one, timeout_s, _ in ways(decision)] == [
        ("gcp-a", 45),
        ("gcp-b", 45),
        ("nas", 60),
    ]
    assert not decision.is_async
    role = settings().roles["alert-fast"]
    assert (role.reserved, role.concurrency, role.queue_length, role.queue_wait_s) == (1, 4, 16, 10)
    assert role.keep_warm == ("gcp-a", "gcp-b")


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        (("gcp-a",), [("gcp-b", 45), ("nas", 60)]),
        (("gcp-a", "gcp-b"), [("nas", 60)]),
    ],
)
def test_an_alert_passes_over_servers_that_are_left_alone(
    out: tuple[str, ...], expected: list[tuple[str, float]]
) -> None:
    decision = decided("alert-fast", *out)
    assert ways(decision) == [(one, timeout_s, Reason.BREAKER_OPEN) for one, timeout_s in expected]
    assert decision.passed_over == tuple(
        PassedOver(one, "gemma3:4b", Reason.BREAKER_OPEN, "2 time-outs") for one in out
    )


def test_reviews_stay_on_the_two_large_servers() -> None:
    decision = decided("code-review")
    assert [(one, timeout_s) for one, timeout_s, _ in ways(decision)] == [("gcp-a", 120), ("gcp-b", 90)]
    assert [(one.instance, one.reason) for one in decision.passed_over] == [("nas", Reason.POLICY)]


@pytest.mark.parametrize("name", ["embedding", "bge-m3"])
def test_vectors_obey_their_role_by_its_name_and_by_that_of_its_model(name: str) -> None:
    decision = decided(name, kind=RequestKind.EMBED)
    assert decision.role == "embedding"
    assert [one for one, _, _ in ways(decision)] == ["gcp-a", "gcp-b", "nas"]
    assert {group.model for group in decision.groups} == {"bge-m3"}


def test_analyses_are_runs_and_meet_alerts_last() -> None:
    decision = decided("deep-rca")
    assert decision.is_async
    assert [(one, timeout_s) for one, timeout_s, _ in ways(decision)] == [("gcp-b", 600), ("gcp-a", 600)]


def test_the_paid_lane_answers_nothing_as_long_as_there_is_no_provider() -> None:
    decision = decided("paid-emergency")
    assert decision.groups == ()
    assert decision.refused is not None
    assert (decision.refused.what, decision.refused.reason) == ("unknown", Reason.MODEL_MISSING)
    assert "has no model" in decision.refused.message
    roles = settings().roles
    assert [name for name in LANES if roles[name].paid_fallback] == ["paid-emergency"]


def test_the_small_host_is_denied_large_models_and_a_dying_one_is_left_alone() -> None:
    instances, breaker = LOADED.settings.instances, LOADED.settings.breaker
    assert {name: one.slots for name, one in instances.items()} == {"gcp-a": 4, "gcp-b": 4, "nas": 2}
    assert instances["nas"].max_parameters == 5 * 10**9
    assert "*:14b" in instances["nas"].deny_models
    assert (breaker.failures, breaker.open_s, breaker.max_open_s) == (2, 30, 300)
