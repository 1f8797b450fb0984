"""Where requests with a key may go, what the others are told, and that no attempt is ever beyond a key."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.instance import DeviceKind
from manager.domain.keys import Permit
from manager.domain.models import model_key
from manager.domain.overload import Overloads
from manager.domain.roles import Fallback, Policy, RequestKind, Role, RoutingSettings
from manager.domain.routing import Decision, RequestFacts, Snapshot, decide, names_of_models
from manager.domain.runs import RunCaller, is_of
from manager.errors import Reason
from tests.support.keys import grant
from tests.support.runs import a_run
from tests.unit.domain.test_paid import cloud, local
from tests.unit.domain.test_routing import (
    IDS,
    ROLES,
    attempts,
    instance,
    refusal,
    requests,
    role,
    settings,
    snapshots,
    where,
)

GPU, CPU = DeviceKind.GPU, DeviceKind.CPU
GENERATE, EMBED = RequestKind.GENERATE, RequestKind.EMBED
FLEET = (
    instance("a", GPU, "big", "small", "vec"),
    instance("b", CPU, "small", "vec"),
    instance("c", CPU, "other", "big"),
)
SETTINGS = RoutingSettings(
    {
        one.name: one
        for one in (
            role("think", "big", fallbacks=("chat",)),
            role("chat", "small", fallbacks=("spare",)),
            role("spare", "other"),
            role("embedding", "vec", kind=EMBED),
        )
    }
)


def permit(roles: str = "", models: str = "", instances: str = "") -> Permit:
    return Permit(
        "ci",
        frozenset(roles.split()) if roles else None,
        tuple(models.split()) if models else None,
        frozenset(instances.split()) if instances else None,
    )


def routed(
    model: str,
    limits: Permit | None,
    *,
    pin: str | None = None,
    lane: str | None = None,
    kind: RequestKind = GENERATE,
    fleet: Snapshot | None = None,
    auto_pull: bool = False,
) -> Decision:
    facts = RequestFacts(model, kind, pin, lane, limits)
    return decide(facts, replace(SETTINGS, auto_pull=auto_pull), fleet or Snapshot(FLEET))


def only(what: str, permitted: str, name: str) -> str:
    return f"the key 'ci' may use only the {what} {permitted}, not '{name}'"


@pytest.mark.parametrize(
    ("model", "limits", "lane", "expected"),
    [
        # Roles: the one that is asked for, and those that it falls back to.
        ("think", permit("think"), None, [("a", "big"), ("c", "big")]),
        ("think", permit("think spare"), None, [("a", "big"), ("c", "big"), ("c", "other")]),
        ("chat", permit("chat spare"), None, [("a", "small"), ("b", "small"), ("c", "other")]),
        ("chat", permit("chat"), None, [("a", "small"), ("b", "small")]),
        # A model by its name: roles alone permit none, models do, and so does a lane whose model it is.
        ("small", permit("chat", "small"), None, [("a", "small"), ("b", "small")]),
        ("small", permit("chat", "SMALL:latest"), None, [("a", "small"), ("b", "small")]),
        ("small", permit("chat"), "chat", [("a", "small"), ("b", "small")]),
        ("other", permit("chat", "o*"), "chat", [("c", "other")]),
        # Models: of each attempt.
        ("chat", permit(models="s*"), None, [("a", "small"), ("b", "small")]),
        ("chat", permit(models="small o?her:*"), None, [("a", "small"), ("b", "small"), ("c", "other")]),
        ("chat", permit(models="other"), None, [("c", "other")]),
        # Instances: of each attempt.
        ("big", permit(instances="c"), None, [("c", "big")]),
        ("chat", permit(instances="b c"), None, [("b", "small"), ("c", "other")]),
        ("big@c", permit(instances="c"), None, [("c", "big")]),
    ],
)
def test_a_key_is_served_within_its_limits(
    model: str, limits: Permit, lane: str | None, expected: list[tuple[str, str]]
) -> None:
    decision = routed(model, limits, lane=lane)
    assert [(one.instance, one.model) for one in attempts(decision)] == expected


@pytest.mark.parametrize(
    ("model", "limits", "pin", "lane", "message"),
    [
        ("think", permit("chat"), None, None, only("roles", "chat", "think")),
        ("think", permit("chat spare", "*"), None, None, only("roles", "chat, spare", "think")),
        ("big", permit("chat"), None, None, only("roles", "chat", "big")),
        ("big", permit("chat"), None, "chat", only("roles", "chat", "big")),
        ("big", permit("chat", "*"), None, "think", only("roles", "chat", "think")),
        ("big", permit(models="s* vec"), None, None, only("models", "s*, vec", "big:latest")),
        ("think", permit(models="vec"), None, None, only("models", "vec", "big:latest")),
        ("big", permit(instances="b"), None, None, only("instances", "b", "a")),
        ("small", permit(instances="b"), "a", None, only("instances", "b", "a")),
        ("small@a", permit(instances="b"), None, None, only("instances", "b", "a")),
        ("nowhere", permit(models="s*"), None, None, only("models", "s*", "nowhere:latest")),
    ],
)
def test_what_a_key_does_not_permit_is_forbidden_with_the_limit(
    model: str, limits: Permit, pin: str | None, lane: str | None, message: str
) -> None:
    assert refusal(routed(model, limits, pin=pin, lane=lane)) == ("forbidden", Reason.POLICY, message)


def test_what_a_key_does_not_permit_is_passed_over_with_the_limit() -> None:
    decision = routed("chat", permit(instances="b c"))
    assert [(one.instance, one.reason, one.detail) for one in decision.passed_over] == [
        ("a", Reason.POLICY, only("instances", "b, c", "a"))
    ]
    decision = routed("chat", permit("chat"))
    assert [(one.instance, one.model, one.detail) for one in decision.passed_over] == [
        ("c", "other", only("roles", "chat", "spare"))
    ]


def test_the_fallback_of_a_key_is_a_matter_of_policy() -> None:
    assert [one.fallback for one in attempts(routed("chat", permit(models="other")))] == [Reason.POLICY]
    gpus = RoutingSettings({"r": role("r", "m", policy=Policy.PREFER_GPU)})
    facts = RequestFacts("r", GENERATE, permit=permit(instances="b"))
    decision = decide(facts, gpus, Snapshot((instance("a", GPU), instance("b"))))
    assert [(one.instance, one.fallback) for one in attempts(decision)] == [("b", Reason.POLICY)]


def test_a_permitted_instance_that_is_away_is_a_503_that_names_no_other() -> None:
    fleet = Snapshot((instance("a", GPU), instance("b", out=Reason.INSTANCE_UNHEALTHY)))
    what, reason, message = refusal(routed("m", permit(instances="b"), fleet=fleet))
    assert (what, reason) == ("unavailable", Reason.INSTANCE_UNHEALTHY)
    assert message == "b has 'm' and cannot be used now (instance_unhealthy)"


def test_an_embedding_model_obeys_its_role_with_a_key_too() -> None:
    assert where(routed("vec", permit("embedding"), kind=EMBED)) == ["a", "b"]
    assert where(routed("vec", permit("chat", "vec"), kind=EMBED)) == ["a", "b"]
    assert refusal(routed("vec", permit("chat"), kind=EMBED))[2] == only("roles", "chat", "vec")


@pytest.mark.parametrize(
    ("decision", "told", "kept"),
    [
        (routed("nope", permit(instances="b")), ["small", "vec"], ["big", "other"]),
        (routed("nope", permit(models="s* nope")), ["small"], ["big", "other", "vec"]),
        (routed("spare@b", permit("spare", instances="b")), ["other' not found"], ["on: c", "chat", "think"]),
        (routed("x", permit(instances="b"), pin="nowhere"), ["there is: b"], ["a,", "c"]),
        (routed("x", permit("chat"), lane="nowhere"), ["lanes: chat"], ["think", "spare"]),
        (routed("x", permit("chat"), lane="embedding"), ["lanes for that: chat"], ["think", "spare"]),
    ],
)
def test_a_text_names_nothing_that_a_key_does_not_permit(
    decision: Decision, told: list[str], kept: list[str]
) -> None:
    refused = decision.refused
    assert refused is not None
    message = refused.message.partition("; ")[2] if "not found" not in told[0] else refused.message
    assert all(one in refused.message for one in told), refused
    assert not any(one in message for one in kept), refused


def test_the_models_that_a_client_may_see() -> None:
    fleet = Snapshot(FLEET)
    assert names_of_models(fleet, None) == ["big", "other", "small", "vec"]
    assert names_of_models(fleet, permit(models="s*")) == ["small"]
    assert names_of_models(fleet, permit(instances="b")) == ["small", "vec"]
    assert names_of_models(fleet, permit("chat")) == []
    assert names_of_models(fleet, permit("chat", "*")) == ["big", "other", "small", "vec"]


def test_a_model_is_pulled_where_a_key_may_use_it() -> None:
    decision = routed("other", permit(instances="a b"), auto_pull=True)
    assert [(one.instance, one.because) for one in attempts(decision)] == [("a", "pull"), ("b", "pull")]
    assert refusal(routed("new", permit(models="other"), auto_pull=True))[0] == "forbidden"


@pytest.mark.parametrize(
    ("patterns", "name", "is_permitted"),
    [
        ("qwen3*", "qwen3.example.org/a/b", False),
        ("qwen3:*", "qwen3:80/a/b", False),
        ("qwen3:*", "library/Qwen3", True),
        ("*", "hf.co/a/b", True),
        ("*/b:*", "hf.co/a/b", True),
        ("hf.co/a/*", "hf.co/a/b:q4", True),
        ("hf.co/a/*", "hf.co/c/b:q4", False),
        ("qwen3", "qwen3:8b", False),
    ],
)
def test_a_pattern_permits_no_model_of_another_host_by_chance(
    patterns: str, name: str, is_permitted: bool
) -> None:
    assert (not permit(models=patterns).limit_of_model(model_key(name))) is is_permitted


# --- paid servers ---------------------------------------------------------------------------------

PAYS = Role("pays", GENERATE, "m", paid_fallback=True)


def paid(model: str, limits: Permit, *, there: str = "m", lane: str | None = None) -> Decision:
    wishes = RoutingSettings({"pays": PAYS}, fallback=Fallback(enabled=True))
    facts = RequestFacts(model, GENERATE, None, lane, limits)
    return decide(facts, wishes, Snapshot((cloud("openai", "pays", "x"), local("a", there))))


@pytest.mark.parametrize(
    ("model", "limits", "lane", "expected"),
    [
        ("pays", permit("pays"), None, ["a", "openai"]),
        ("pays", permit("pays", "m gpt"), None, ["a", "openai"]),
        ("pays", permit(models="m"), None, ["a"]),
        ("pays", permit(models="gpt"), None, ["openai"]),
        ("pays", permit(instances="a"), None, ["a"]),
        ("pays", permit(instances="openai"), None, ["openai"]),
        ("m", permit("pays"), "pays", ["a", "openai"]),
    ],
)
def test_a_paid_server_answers_within_the_limits_of_a_key(
    model: str, limits: Permit, lane: str | None, expected: list[str]
) -> None:
    assert where(paid(model, limits, lane=lane)) == expected


@pytest.mark.parametrize(
    ("decision", "message"),
    [
        (paid("x", permit("pays"), lane="pays"), only("roles", "pays", "x")),
        (paid("gpt", permit(models="m"), lane="pays"), only("models", "m", "gpt:latest")),
        (paid("gpt", permit(instances="a"), lane="pays"), only("instances", "a", "openai")),
        (paid("pays", permit(models="m x"), there="n"), only("models", "m, x", "gpt:latest")),
    ],
)
def test_a_paid_server_that_a_key_does_not_permit_is_forbidden(decision: Decision, message: str) -> None:
    assert refusal(decision) == ("forbidden", Reason.POLICY, message)


def test_a_permitted_instance_that_is_away_outweighs_a_paid_one_that_is_not_permitted() -> None:
    wishes = RoutingSettings({"pays": PAYS}, fallback=Fallback(enabled=True))
    facts = RequestFacts("pays", GENERATE, permit=permit(instances="a"))
    away = local("a", out=Reason.INSTANCE_UNHEALTHY)
    decision = decide(facts, wishes, Snapshot((cloud("openai", "pays"), away)))
    assert refusal(decision)[:2] == ("unavailable", Reason.INSTANCE_UNHEALTHY)
    assert [(one.instance, one.reason, one.detail) for one in decision.passed_over][-1] == (
        "openai",
        Reason.POLICY,
        only("instances", "a", "openai"),
    )


# --- what always holds ----------------------------------------------------------------------------

PAID = (cloud("p", "r", "m"), cloud("q", "s", model="o"))
permits = st.builds(
    Permit,
    st.just("ci"),
    st.none() | st.frozensets(st.sampled_from(ROLES)),
    st.none() | st.sampled_from([("m",), ("n", "o"), ("*",), ("[mn]:*",), ("x",)]),
    st.none() | st.frozensets(st.sampled_from([*IDS, "p", "q"])),
)
MATCHING = {
    ("m",): ["m:latest"],
    ("n", "o"): ["n:latest", "o:latest"],
    ("[mn]:*",): ["m:latest", "n:latest"],
    ("x",): [],
}


@given(requests, settings, snapshots, permits)
def test_no_attempt_is_ever_beyond_the_key(
    request: RequestFacts, wishes: RoutingSettings, snapshot: Snapshot, limits: Permit
) -> None:
    # With paid servers, for roles that may use them.
    paying = {name: replace(one, paid_fallback=True) for name, one in wishes.roles.items()}
    wishes = replace(wishes, roles=paying, fallback=Fallback(enabled=True))
    snapshot = Snapshot(snapshot.candidates + PAID)
    decision = decide(request._replace(permit=limits), wishes, snapshot)
    able = snapshot.serving(request.kind)
    name = request.model.partition("@")[0]
    named = wishes.role_meant(name, is_model=lambda key: bool(able.having(key)))
    for attempt in attempts(decision):
        assert limits.instances is None or attempt.instance in limits.instances
        if limits.models is not None:
            assert limits.models == ("*",) or model_key(attempt.model) in MATCHING[limits.models]
        if attempt.because == "paid" and limits.roles is not None:
            assert attempt.role in limits.roles or limits.models is not None
        if limits.roles is None:
            continue
        if named is not None or attempt.role == request.lane is not None:
            assert attempt.role in limits.roles
        if named is None and limits.models is None and attempt.because != "paid":
            of_role = wishes.roles[attempt.role or ""].model
            assert attempt.role in limits.roles
            assert of_role is not None
            assert model_key(of_role) == model_key(attempt.model)


@given(requests, settings, snapshots, permits)
def test_a_key_adds_no_attempt_and_says_why_there_is_none(
    request: RequestFacts, wishes: RoutingSettings, snapshot: Snapshot, limits: Permit
) -> None:
    wishes = replace(wishes, auto_pull=False)
    decision = decide(request._replace(permit=limits), wishes, snapshot)
    anyway = decide(request, wishes, snapshot)
    places = {(one.instance, one.model, one.role) for one in attempts(decision)}
    assert places <= {(one.instance, one.model, one.role) for one in attempts(anyway)}
    if anyway.groups and not decision.groups:
        assert refusal(decision)[0] in ("forbidden", "unavailable")
    if decision.refused is not None and decision.refused.what == "forbidden":
        assert decision.refused.message.startswith("the key 'ci' may use only the ")
    if anyway.refused is None and decision.refused is None:
        assert decision.role == anyway.role


@given(requests, settings, snapshots)
def test_a_key_that_permits_everything_changes_nothing(
    request: RequestFacts, wishes: RoutingSettings, snapshot: Snapshot
) -> None:
    every = Permit("ci", frozenset(ROLES), ("*",), frozenset(IDS))
    decision = decide(request._replace(permit=every), wishes, snapshot)
    assert replace(decision, request=request) == decide(request, wishes, snapshot)


def test_an_overloaded_instance_that_is_not_permitted_is_told_once() -> None:
    fleet = Snapshot((replace(instance("a"), overloads=Overloads("full", {})), instance("b")))
    decision = routed("m", permit(instances="b"), fleet=fleet)
    assert where(decision) == ["b"]
    assert [(one.instance, one.reason) for one in decision.passed_over] == [("a", Reason.POLICY)]


def test_a_role_without_a_model_answers_within_the_key() -> None:
    roles = {"r": Role("r", GENERATE, None, fallbacks=("s", "t")), "s": role("s"), "t": role("t", "n")}
    facts = RequestFacts("r", GENERATE, permit=permit("r t"))
    decision = decide(facts, RoutingSettings(roles), Snapshot((instance("a", CPU, "m", "n"),)))
    assert [(one.model, one.role) for one in attempts(decision)] == [("n", "t")]


def test_a_run_belongs_to_the_key_that_submitted_it_and_to_no_later_one_of_its_name() -> None:
    run = a_run(caller=RunCaller("default", key="ci"))
    at = run.created_at
    before, after = at - timedelta(seconds=1), at + timedelta(seconds=1)
    assert is_of(run, replace(grant("ci"), created_at=before))
    assert is_of(run, replace(grant("ci"), created_at=at))
    assert not is_of(run, replace(grant("ci"), created_at=after))
    assert not is_of(run, replace(grant("other"), created_at=before))
    assert not is_of(a_run(), replace(grant("ci"), created_at=before))
