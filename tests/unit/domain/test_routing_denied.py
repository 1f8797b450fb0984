"""Models that instances must not run: where requests for them go, and what they are told."""

from __future__ import annotations

from typing import Any

import pytest

from manager.domain.denial import Denials, DenyRules
from manager.domain.instance import DeviceKind
from manager.domain.models import model_key
from manager.domain.roles import Policy, RequestKind, Role, RoutingSettings
from manager.domain.routing import Candidate, Decision, PassedOver, RequestFacts, Snapshot, State, decide
from manager.errors import Reason

BIG = DenyRules(("*:32b",), max_parameters=14 * 10**9)
MODELS = ("qwen3:32b", "qwen3:8b", "copied:latest")
SIZES = {"copied:latest": 32 * 10**9, "qwen3:8b": 8 * 10**9}
LIFT = "`ollama-manager lift a --for 2h` permits it there for a time"


def instance(
    id_: str,
    rules: DenyRules | None = None,
    *,
    models: tuple[str, ...] | None = MODELS,
    state: State = State.READY,
    **more: Any,
) -> Candidate:
    denials = None if rules is None else Denials(rules, SIZES)
    known = None if models is None else {model_key(name): name for name in models}
    why = Reason.INSTANCE_UNHEALTHY if state is State.OUT else None
    return Candidate(
        id_, more.pop("device", DeviceKind.CPU), state, models=known, denials=denials, why_out=why, **more
    )


def routed(model: str, *instances: Candidate, pin: str | None = None, **settings: Any) -> Decision:
    roles = {role.name: role for role in settings.pop("roles", ())}
    facts = RequestFacts(model, RequestKind.GENERATE, pin)
    return decide(facts, RoutingSettings(roles, **settings), Snapshot(instances))


def where(decision: Decision) -> list[str]:
    return [one.instance for one in decision.in_order(dict.fromkeys("abc", 0))]


def refusal(decision: Decision) -> tuple[str, Reason, str]:
    assert decision.refused is not None
    return decision.refused.what, decision.refused.reason, decision.refused.message


@pytest.mark.parametrize(
    ("model", "rule"), [("Qwen3:32B", "deny_models *:32b"), ("copied", "max_parameters 14b")]
)
def test_an_instance_is_passed_over_for_a_model_that_it_must_not_run(model: str, rule: str) -> None:
    decision = routed(model, instance("a", BIG), instance("b"))
    assert where(decision) == ["b"]
    assert decision.passed_over == (PassedOver("a", model, Reason.HOST_DENIED, rule),)
    assert where(routed("qwen3:8b", instance("a", BIG), instance("b"))) == ["a", "b"]


def test_where_none_may_run_it_the_rule_and_what_lifts_it_are_named() -> None:
    decision = routed("qwen3:32b", instance("a", BIG), instance("b", DenyRules(("qwen*",))))
    assert refusal(decision) == (
        "denied",
        Reason.HOST_DENIED,
        f"'qwen3:32b' must not run on: a (deny_models *:32b), b (deny_models qwen*); {LIFT}",
    )


def test_a_pin_does_not_circumvent_the_rules() -> None:
    for decision in (
        routed("qwen3:32b@a", instance("a", BIG), instance("b")),
        routed("qwen3:32b", instance("a", BIG), instance("b"), pin="a"),
    ):
        assert where(decision) == []
        assert refusal(decision)[:2] == ("denied", Reason.HOST_DENIED)


def test_a_target_of_a_role_does_not_circumvent_them_either() -> None:
    role = Role("r", RequestKind.GENERATE, "qwen3:32b", target="a")
    assert refusal(routed("r", instance("a", BIG), instance("b"), roles=[role]))[0] == "denied"


def test_a_role_that_prefers_gpus_says_that_they_were_denied_it() -> None:
    role = Role("r", RequestKind.GENERATE, "qwen3:32b", policy=Policy.PREFER_GPU)
    gpu = instance("a", BIG, device=DeviceKind.GPU)
    decision = routed("r", gpu, instance("b"), roles=[role])
    assert [group.fallback for group in decision.groups] == [Reason.HOST_DENIED]


def test_the_fallback_of_a_role_follows_because_its_own_model_was_denied() -> None:
    roles = [
        Role("r", RequestKind.GENERATE, "qwen3:32b", fallbacks=("small",)),
        Role("small", RequestKind.GENERATE, "qwen3:8b"),
    ]
    decision = routed("r", instance("a", BIG), roles=roles)
    assert [(group.model, group.fallback) for group in decision.groups] == [("qwen3:8b", Reason.HOST_DENIED)]


def test_an_instance_that_may_run_it_and_is_away_counts_more_than_one_that_must_not() -> None:
    decision = routed("qwen3:32b", instance("a", BIG), instance("b", state=State.OUT))
    what, reason, message = refusal(decision)
    assert (what, reason) == ("unavailable", Reason.INSTANCE_UNHEALTHY)
    assert message.startswith("b has 'qwen3:32b'")


def test_a_denied_instance_that_is_away_is_denied_it_all_the_same() -> None:
    assert refusal(routed("qwen3:32b", instance("a", BIG, state=State.OUT)))[0] == "denied"


@pytest.mark.parametrize("models", [None, ()])
def test_a_denied_model_is_neither_looked_for_nor_pulled_there(models: tuple[str, ...] | None) -> None:
    rules = DenyRules(("*:70b",))
    denied = instance("a", rules, models=models)
    decision = routed("new:70b", denied, instance("b", models=()), auto_pull=True)
    assert where(decision) == ["b"]
    assert refusal(routed("new:70b", denied, auto_pull=True))[0] == "denied"


def test_a_model_that_a_denying_instance_is_known_to_lack_is_unknown() -> None:
    assert refusal(routed("new:70b", instance("a", DenyRules(("*:70b",)))))[0] == "unknown"
