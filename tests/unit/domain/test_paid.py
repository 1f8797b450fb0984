"""Paid servers are the last resort: when one may answer, with which model, and why it may not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.instance import DeviceKind
from manager.domain.models import model_key
from manager.domain.paid import offer
from manager.domain.roles import Fallback, Policy, RequestKind, Role, RoutingSettings, Strategy
from manager.domain.routing import Candidate, Decision, RequestFacts, Snapshot, State, decide
from manager.errors import Reason

GENERATE, EMBED = RequestKind.GENERATE, RequestKind.EMBED
PAYS = Role("pays", GENERATE, "m", paid_fallback=True)
ON = Fallback(enabled=True)


def local(id_: str = "cpu", *models: str, out: Reason | None = None) -> Candidate:
    return Candidate(
        id_,
        DeviceKind.CPU,
        State.OUT if out else State.READY,
        models={model_key(name): name for name in models or ("m",)},
        why_out=out,
    )


def cloud(id_: str = "openai", *stands_in: str, model: str = "gpt", out: Reason | None = None) -> Candidate:
    return Candidate(
        id_,
        None,
        State.OUT if out else State.READY,
        models={},
        why_out=out,
        detail="said so" if out else "",
        paid=True,
        offers=(offer(model, stands_in or ("pays",)),),
    )


def routed(
    model: str,
    *candidates: Candidate,
    roles: tuple[Role, ...] = (PAYS,),
    fallback: Fallback = ON,
    kind: RequestKind = GENERATE,
    **facts: Any,
) -> Decision:
    settings = RoutingSettings({one.name: one for one in roles}, fallback=fallback)
    return decide(RequestFacts(model, kind, **facts), settings, Snapshot(candidates))


def ways(decision: Decision) -> list[tuple[str, str, str, Reason | None]]:
    return [
        (instance, group.model, group.because, group.fallback)
        for group in decision.groups
        for instance in group.instances
    ]


def passed(decision: Decision) -> dict[str, tuple[Reason, str]]:
    return {one.instance: (one.reason, one.detail) for one in decision.passed_over}


def refusal(decision: Decision) -> tuple[str, Reason, str]:
    assert decision.refused is not None
    assert not decision.groups
    return decision.refused.what, decision.refused.reason, decision.refused.message


def test_the_cloud_comes_last_behind_every_local_attempt() -> None:
    decision = routed("pays", cloud(), local("a"), local("b"))
    assert ways(decision) == [
        ("a", "m", "running", None),
        ("b", "m", "running", None),
        ("openai", "gpt", "paid", Reason.INSTANCE_UNAVAILABLE),
    ]
    assert decision.groups[-1].choice > decision.groups[0].choice, "it stands in for no busy instance"


def test_where_nothing_local_can_answer_its_reason_is_that_of_the_fallback() -> None:
    for candidates, why in (
        ([local("a", out=Reason.BREAKER_OPEN)], Reason.BREAKER_OPEN),
        ([local("a", out=Reason.ENGINE_UNAVAILABLE)], Reason.ENGINE_UNAVAILABLE),
        ([local("a", "other")], Reason.MODEL_MISSING),
        ([], Reason.MODEL_MISSING),
    ):
        decision = routed("pays", *candidates, cloud())
        assert ways(decision) == [("openai", "gpt", "paid", why)]
        assert decision.refused is None


def test_a_role_without_a_model_of_its_own_can_be_for_the_cloud_alone() -> None:
    role = replace(PAYS, name="paid-emergency", model=None)
    decision = routed("paid-emergency", local(), cloud("openai", "paid-emergency"), roles=(role,))
    assert ways(decision) == [("openai", "gpt", "paid", Reason.MODEL_MISSING)]
    assert (decision.role, decision.policy) == ("paid-emergency", Policy.AUTO)
    without = routed("paid-emergency", local(), roles=(role,))
    assert refusal(without)[:2] == ("unknown", Reason.MODEL_MISSING)
    off = routed("paid-emergency", cloud("openai", "paid-emergency"), roles=(role,), fallback=Fallback())
    assert refusal(off) == (
        "local_only",
        Reason.POLICY,
        "'gpt' on openai costs money and may not answer: fallback.enabled is off",
    )


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"fallback": Fallback()}, Reason.POLICY, "fallback.enabled is off"),
        ({"fallback": replace(ON, force_local=True)}, Reason.LOCAL_ONLY, "fallback.force_local is on"),
        ({"local_only": True}, Reason.LOCAL_ONLY, "the request, or its key, permits local servers only"),
        ({"fallback": replace(ON, order=("other",))}, Reason.POLICY, "not in fallback.order"),
        (
            {"roles": (replace(PAYS, paid_fallback=False),)},
            Reason.POLICY,
            "the role 'pays' has no paid_fallback",
        ),
        (
            {"roles": (replace(PAYS, policy=Policy.CPU_ONLY),)},
            Reason.POLICY,
            "the role 'pays' has the policy cpu_only",
        ),
    ],
)
def test_each_rule_keeps_the_cloud_away_and_is_named(
    changes: dict[str, Any], reason: Reason, detail: str
) -> None:
    decision = routed("pays", local(), cloud(), **changes)
    assert [way[0] for way in ways(decision)] == ["cpu"]
    assert passed(decision)["openai"] == (reason, detail)
    alone = routed("pays", local("cpu", out=Reason.BREAKER_OPEN), cloud(), **changes)
    assert refusal(alone)[:2] == ("unavailable", Reason.BREAKER_OPEN), "the local reason is what is reported"


def test_a_request_without_a_role_never_costs_anything() -> None:
    decision = routed("m", local("cpu", "other"), cloud("openai", "m"))
    assert refusal(decision)[:2] == ("unknown", Reason.MODEL_MISSING)
    assert passed(decision)["openai"] == (Reason.POLICY, "only a role with paid_fallback may use it")


def test_a_lane_that_may_pay_is_enough_for_a_model_that_something_stands_in_for() -> None:
    assert ways(routed("x", local(), cloud("openai", "x"), lane="pays")) == [
        ("openai", "gpt", "paid", Reason.MODEL_MISSING)
    ]
    decision = routed("x", local(), cloud("openai", "y"), lane="pays")
    assert passed(decision)["openai"][1] == "none of its models is for the role 'pays' or its model"
    assert refusal(decision)[0] == "unknown"


@pytest.mark.parametrize(
    "facts", [{"model": "gpt"}, {"model": "m@openai"}, {"model": "m", "instance": "openai"}]
)
def test_the_name_of_a_paid_model_or_a_pin_grants_nothing(facts: dict[str, Any]) -> None:
    what, reason, message = refusal(routed(facts.pop("model"), local("cpu", "other"), cloud(), **facts))
    assert (what, reason) == ("local_only", Reason.POLICY)
    assert "on openai costs money and may not answer: only a role with paid_fallback may use it" in message


def test_a_pin_under_a_role_that_may_pay_is_obeyed_and_is_no_fallback() -> None:
    assert ways(routed("pays@openai", local(), cloud())) == [("openai", "gpt", "paid", None)]
    decision = routed("pays@cpu", local(), cloud())
    assert [way[0] for way in ways(decision)] == ["cpu"]
    assert passed(decision)["openai"] == (Reason.POLICY, "the request names another instance")


def test_the_model_that_is_named_goes_before_that_of_the_role_and_that_before_that_of_the_model() -> None:
    offers = (offer("by-model", ["x"]), offer("by-role", ["pays"]), offer("named", ["pays"]))
    server = replace(cloud(), offers=offers)
    assert ways(routed("named", local(), server, lane="pays"))[0][1] == "named"
    assert ways(routed("x", local(), server, lane="pays"))[0][1] == "by-role"
    only_models = replace(server, offers=(offer("z", ["z"]), *offers[:1]))
    assert ways(routed("x", local(), only_models, lane="pays"))[0][1] == "by-model"


def test_several_are_asked_in_the_order_of_the_settings() -> None:
    both = (cloud("one"), cloud("two"))
    assert [way[0] for way in ways(routed("pays", *both))] == ["one", "two"]
    order = replace(ON, order=("two", "one"))
    assert [way[0] for way in ways(routed("pays", *both, fallback=order))] == ["two", "one"]


def test_one_that_is_out_of_reach_is_passed_over_with_its_reason() -> None:
    decision = routed("pays", local("cpu", "other"), cloud(out=Reason.BREAKER_OPEN))
    assert passed(decision)["openai"] == (Reason.BREAKER_OPEN, "said so")
    assert refusal(decision) == (
        "unavailable",
        Reason.BREAKER_OPEN,
        "openai has 'gpt' and cannot be used now (breaker_open; said so)",
    )
    plain = replace(cloud(out=Reason.INSTANCE_UNAVAILABLE), detail="")
    assert (
        refusal(routed("pays", plain))[2] == "openai has 'gpt' and cannot be used now (instance_unavailable)"
    )


def test_force_local_is_an_error_where_only_the_cloud_could_answer() -> None:
    decision = routed("pays", local("cpu", "other"), cloud(), fallback=replace(ON, force_local=True))
    assert refusal(decision)[:2] == ("local_only", Reason.LOCAL_ONLY)


def test_an_embedding_keeps_its_model() -> None:
    role = Role("embedding", EMBED, "bge-m3", paid_fallback=True)
    other = cloud("openai", "embedding", model="text-embedding-3")
    decision = routed("embedding", other, roles=(role,), kind=EMBED)
    assert decision.refused is not None
    assert "vectors of two models cannot be compared" in passed(decision)["openai"][1]
    same = cloud("openai", "embedding", model="bge-m3")
    assert ways(routed("embedding", same, roles=(role,), kind=EMBED))[0][:2] == ("openai", "bge-m3")


def test_the_time_of_the_last_place_holds_for_the_cloud() -> None:
    role = replace(PAYS, attempt_timeouts_s=(45.0, 60.0), instances=("cpu",))
    assert routed("pays", local(), cloud(), roles=(role,)).groups[-1].timeout_s == 60.0


def test_local_decisions_do_not_see_the_cloud() -> None:
    roles = (Role("free", GENERATE, "x"),)
    for fallback in (Fallback(), ON):
        with_cloud = routed("x", local(), cloud(), roles=roles, fallback=fallback)
        without = routed("x", local(), roles=roles, fallback=fallback)
        assert with_cloud.refused == without.refused
        assert with_cloud.groups == without.groups


@given(
    named=st.sampled_from(["pays", "free", "m", "gpt", "m@openai", "pays@openai", "free@cpu"]),
    lane=st.sampled_from([None, "pays", "free"]),
    fallback=st.builds(
        Fallback, st.booleans(), st.booleans(), st.sampled_from([(), ("openai",), ("claude",)])
    ),
    local_only=st.booleans(),
    out=st.sampled_from([None, Reason.BREAKER_OPEN]),
)
def test_nothing_is_paid_unless_everything_permits_it(
    named: str, lane: str | None, fallback: Fallback, local_only: bool, out: Reason | None
) -> None:
    roles = (PAYS, Role("free", GENERATE, "m"))
    decision = routed(
        named,
        local(out=out),
        cloud("openai", "pays", "free", "m"),
        cloud("claude", "m"),
        roles=roles,
        fallback=fallback,
        lane=lane,
        local_only=local_only,
    )
    paid = [group for group in decision.groups if group.because == "paid"]
    if paid:
        assert fallback.enabled
        assert not fallback.force_local
        assert not local_only
        assert decision.role == "pays"
        assert not fallback.order or {group.instances[0] for group in paid} <= {*fallback.order}
        assert list(decision.groups[-len(paid) :]) == paid
    told = {one.instance for one in decision.passed_over} | {group.instances[0] for group in paid}
    assert {"openai", "claude"} <= told


def test_a_strategy_orders_local_instances_and_a_paid_server_stays_the_last_resort() -> None:
    role = replace(PAYS, strategy=Strategy.LEAST_LOADED)
    decision = routed("pays", local("a"), local("b"), cloud(), roles=(role,))
    load = {"a": 1, "b": 0, "openai": 0}
    assert [one.instance for one in decision.in_order(load)] == ["b", "a", "openai"]
    only = routed("pays", cloud(), roles=(role,))
    assert [one.instance for one in only.in_order(load)] == ["openai"]
