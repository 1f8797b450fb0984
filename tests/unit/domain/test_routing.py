"""Where a request may go, in which order, and why: every policy and every fallback, and what always holds."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.classification import Tier
from manager.domain.facts import ModelFacts
from manager.domain.instance import DeviceKind
from manager.domain.models import model_key
from manager.domain.overload import Overloads
from manager.domain.roles import Policy, RequestKind, Role, RoutingSettings, Strategy
from manager.domain.routing import (
    Attempt,
    Candidate,
    Decision,
    PassedOver,
    RequestFacts,
    Snapshot,
    State,
    decide,
)
from manager.errors import Reason

if TYPE_CHECKING:
    from collections.abc import Mapping

CPU, GPU = DeviceKind.CPU, DeviceKind.GPU
GENERATE, EMBED = RequestKind.GENERATE, RequestKind.EMBED
UNREAD = None
Way = tuple[str, str, Reason | None]


def instance(
    id_: str,
    device: DeviceKind | None = CPU,
    *models: str | None,
    state: State = State.READY,
    loaded: str = "",
    priority: int = 0,
    out: Reason | None = None,
) -> Candidate:
    """One that has the model `m`, unless it is said otherwise; UNREAD for a list that nobody has read."""
    names = models or ("m",)
    return Candidate(
        id=id_,
        device=device,
        state=State.OUT if out else state,
        priority=priority,
        models=None if names == (UNREAD,) else {model_key(name): name for name in names if name},
        loaded=frozenset({model_key(loaded)} if loaded else ()),
        why_out=out,
    )


def role(name: str, model: str | None = "m", **values: Any) -> Role:
    return Role(name, values.pop("kind", GENERATE), model, **values)


def routed(
    model: str,
    *instances: Candidate,
    roles: tuple[Role, ...] = (),
    kind: RequestKind = GENERATE,
    pin: str | None = None,
    lane: str | None = None,
    auto_pull: bool = False,
) -> Decision:
    settings = RoutingSettings({one.name: one for one in roles}, auto_pull=auto_pull)
    return decide(RequestFacts(model, kind, pin, lane), settings, Snapshot(instances))


def attempts(decision: Decision) -> list[Attempt]:
    return [group.attempt(instance) for group in decision.groups for instance in group.instances]


def ways(decision: Decision) -> list[Way]:
    assert decision.refused is None
    return [(one.instance, one.because, one.fallback) for one in attempts(decision)]


def where(decision: Decision) -> list[str]:
    return [way[0] for way in ways(decision)]


def passed_over(decision: Decision) -> dict[str, Reason]:
    return {one.instance: one.reason for one in decision.passed_over}


def refusal(decision: Decision) -> tuple[str, Reason, str]:
    assert decision.refused is not None
    assert attempts(decision) == []
    return decision.refused.what, decision.refused.reason, decision.refused.message


# --- order ----------------------------------------------------------------------------------------


def test_who_holds_the_model_wins_over_who_runs_and_that_over_who_would_have_to_be_started() -> None:
    decision = routed(
        "m",
        instance("stopped", state=State.STARTABLE, priority=9),
        instance("runs", priority=5),
        instance("warm", loaded="m"),
    )
    assert ways(decision) == [
        ("warm", "loaded", None),
        ("runs", "running", None),
        ("stopped", "startable", None),
    ]


def test_another_model_in_memory_makes_no_instance_warm() -> None:
    decision = routed("m", instance("a", CPU, "m", "n", loaded="n"), instance("b", priority=1))
    assert ways(decision) == [("b", "running", None), ("a", "running", None)]


def test_of_equals_the_higher_priority_goes_first() -> None:
    decision = routed("m", instance("a"), instance("b", priority=2), instance("c", priority=1))
    assert where(decision) == ["b", "c", "a"]
    assert [group.instances for group in decision.groups] == [("b",), ("c",), ("a",)]


def test_of_full_equals_the_one_with_the_fewest_requests_in_flight_goes_first() -> None:
    decision = routed("m", instance("a"), instance("b"), instance("c", priority=-1))
    assert [one.instance for one in decision.in_order({"a": 2, "b": 1, "c": 0})] == ["b", "a", "c"]
    assert [one.instance for one in decision.in_order({"a": 1, "b": 1, "c": 0})] == ["a", "b", "c"]


def test_the_load_is_looked_at_anew_for_each_attempt() -> None:
    load = {"a": 0, "b": 1, "c": 2}
    order = routed("m", instance("a"), instance("b"), instance("c")).in_order(load)
    assert next(order).instance == "a"
    load["b"] = 3
    assert [one.instance for one in order] == ["c", "b"]


def test_whose_models_nobody_has_read_comes_last_and_those_that_run_before_the_others() -> None:
    decision = routed(
        "m",
        instance("stopped-unread", CPU, UNREAD, state=State.STARTABLE, priority=9),
        instance("unread", CPU, UNREAD),
        instance("has-it", state=State.STARTABLE, priority=-9),
        instance("has-it-not", CPU, "n"),
    )
    assert ways(decision) == [
        ("has-it", "startable", None),
        ("unread", "unread", None),
        ("stopped-unread", "unread", None),
    ]
    assert decision.passed_over == ()


def test_a_model_is_found_by_any_of_its_spellings() -> None:
    decision = routed("library/M", instance("a", CPU, "m:latest"))
    assert attempts(decision) == [Attempt("a", "library/M", None, "running")]


# --- overload -------------------------------------------------------------------------------------

FULL, SLOW = Overloads("full", {}), Overloads("", {"m:latest": "slow"})


def test_an_overloaded_instance_is_passed_over_while_another_is_available_and_attempted_last() -> None:
    for overloads, why in ((FULL, "full"), (SLOW, "slow")):
        preferred = replace(instance("a", loaded="m", priority=9), overloads=overloads)
        decision = routed("m", preferred, instance("b", loaded="m"), instance("c", state=State.STARTABLE))
        assert where(decision) == ["b", "a", "c"]
        assert decision.passed_over == (PassedOver("a", "m", Reason.OVERLOADED, why),)
        assert decision.first({"a": 0, "b": 9}) == Attempt("b", "m", None, "loaded")


def test_an_overloaded_instance_is_used_where_it_is_the_only_one() -> None:
    for overloads in (FULL, SLOW):
        decision = routed("m", replace(instance("a", loaded="m"), overloads=overloads))
        assert (where(decision), decision.passed_over) == (["a"], ())


def test_slowness_of_another_model_changes_nothing() -> None:
    slow = replace(instance("a", loaded="m", priority=1), overloads=Overloads("", {"n:latest": "slow"}))
    decision = routed("m", slow, instance("b", loaded="m"))
    assert (where(decision), decision.passed_over) == (["a", "b"], ())


def test_a_card_that_refuses_requests_is_a_reason_to_fall_back_and_a_slow_one_is_not() -> None:
    thinking = role("thinking", policy=Policy.PREFER_GPU)
    cpu = instance("cpu", loaded="m")
    card = instance("gpu0", GPU, loaded="m")
    decision = routed("thinking", replace(card, overloads=FULL), cpu, roles=(thinking,))
    assert ways(decision) == [("cpu", "loaded", Reason.OVERLOADED), ("gpu0", "loaded", None)]
    decision = routed("thinking", replace(card, overloads=SLOW), cpu, roles=(thinking,))
    assert where(decision) == ["gpu0", "cpu"]


def test_a_slow_instance_at_the_first_place_of_a_role_is_a_reason_to_use_the_second() -> None:
    alert = role("alert", instances=("a", "b"))
    slow = replace(instance("a", loaded="m"), overloads=SLOW)
    decision = routed("alert", slow, instance("b", loaded="m"), roles=(alert,))
    assert ways(decision) == [("b", "loaded", Reason.OVERLOADED), ("a", "loaded", None)]


def test_an_overloaded_instance_is_told_of_once_where_two_roles_lead_to_it() -> None:
    roles = (role("one", fallbacks=("two",)), role("two"))
    decision = routed("one", replace(instance("a", loaded="m"), overloads=FULL), instance("b"), roles=roles)
    assert where(decision) == ["b", "a"]
    assert decision.passed_over == (PassedOver("a", "m", Reason.OVERLOADED, "full"),)


# --- what cannot be used now ----------------------------------------------------------------------


def test_who_is_not_well_is_passed_over_with_the_reason() -> None:
    decision = routed("m", instance("a", out=Reason.INSTANCE_UNHEALTHY), instance("b"))
    assert ways(decision) == [("b", "running", None)]
    assert decision.passed_over == (PassedOver("a", "m", Reason.INSTANCE_UNHEALTHY),)


def test_where_none_can_be_used_now_it_says_so_and_why() -> None:
    decision = routed(
        "m", instance("a", out=Reason.GPU_MISSING), instance("b", out=Reason.INSTANCE_UNHEALTHY)
    )
    assert refusal(decision) == (
        "unavailable",
        Reason.GPU_MISSING,
        "a has 'm' and cannot be used now (gpu_missing)",
    )


def test_what_is_only_supposed_of_an_instance_that_is_away_is_told_as_that() -> None:
    away = instance("a", CPU, UNREAD, out=Reason.INSTANCE_UNAVAILABLE)
    assert refusal(routed("m", away))[2].startswith("a may have 'm' and cannot be used now")


# A server that was never reached: its list may have any name, and makes none of them likely.
NAS = instance("nas", None, UNREAD, out=Reason.UPSTREAM_UNREACHABLE)
NOT_ASKED = "; could not be asked: nas (upstream_unreachable)"


def test_an_unknown_name_is_a_404_although_a_server_could_not_be_asked() -> None:
    assert refusal(routed("nope", instance("a"), NAS)) == (
        "unknown",
        Reason.MODEL_MISSING,
        f"model 'nope' not found; models: m{NOT_ASKED}",
    )
    empty = instance("a", CPU, "")
    assert refusal(routed("nope", empty, NAS))[2] == f"model 'nope' not found; models: none{NOT_ASKED}"
    gone = instance("g", GPU, UNREAD, out=Reason.GPU_MISSING)
    text = (
        "model 'nope' not found; models: m; could not be asked: nas (upstream_unreachable), g (gpu_missing)"
    )
    assert refusal(routed("nope", instance("a"), NAS, gone))[2] == text


def test_a_lane_does_not_make_an_unknown_name_more_likely() -> None:
    lane = role("lane", "m")
    decision = routed("nope", instance("a"), NAS, roles=(lane,), lane="lane")
    assert refusal(decision)[:2] == ("unknown", Reason.MODEL_MISSING)
    bare = role("bare", None)
    assert refusal(routed("nope", instance("a"), NAS, roles=(bare,), lane="bare"))[0] == "unknown"


@pytest.mark.parametrize(
    "decision",
    [
        routed("nope", NAS),
        routed("nope@nas", instance("a"), NAS),
        routed("nope", instance("a"), NAS, pin="nas"),
        routed("r", instance("a"), NAS, roles=(role("r", "nope"),)),
        routed("nope", instance("a"), NAS, roles=(role("r", target="nas"),), lane="r"),
        routed("nope", instance("a"), NAS, roles=(role("r", "nope"),), lane="r"),
    ],
    ids=["nothing is known", "a pin", "a header", "a role's model", "a lane's target", "a lane's model"],
)
def test_what_was_named_on_purpose_is_a_503_while_its_server_is_away(decision: Decision) -> None:
    assert refusal(decision) == (
        "unavailable",
        Reason.UPSTREAM_UNREACHABLE,
        "nas may have 'nope' and cannot be used now (upstream_unreachable)",
    )


def test_an_engine_that_is_away_makes_no_name_unknown() -> None:
    away = instance("b", CPU, UNREAD, out=Reason.ENGINE_UNAVAILABLE)
    assert refusal(routed("nope", instance("a"), away))[:2] == ("unavailable", Reason.ENGINE_UNAVAILABLE)
    assert refusal(routed("nope", instance("a"), NAS, away))[0] == "unavailable"


def test_a_model_that_policy_forbids_elsewhere_is_not_unknown() -> None:
    cpu_nas = replace(NAS, device=CPU)
    only = role("r", None, policy=Policy.CPU_ONLY)
    decision = routed("m", instance("g", GPU), cpu_nas, roles=(only,), lane="r")
    assert refusal(decision)[0] == "unavailable"


def test_a_model_that_could_be_pulled_is_not_unknown() -> None:
    away = instance("a", out=Reason.INSTANCE_UNHEALTHY)
    assert refusal(routed("nope", away, NAS, auto_pull=True))[0] == "unavailable"


# --- unknown names --------------------------------------------------------------------------------


def test_for_an_unknown_name_it_is_said_what_there_is() -> None:
    decision = routed(
        "nope",
        instance("a", CPU, "n", "m:8b"),
        instance("b", CPU, "n"),
        roles=(role("output"), role("r", None)),
    )
    text = "model 'nope' not found; models: m:8b, n; roles: output"
    assert refusal(decision) == ("unknown", Reason.MODEL_MISSING, text)


def test_where_there_is_nothing_it_says_that_too() -> None:
    assert refusal(routed("nope"))[2] == "model 'nope' not found; models: none"
    assert refusal(routed("nope@a"))[2] == "there is no instance 'a'; there is: none"


def test_no_more_names_are_listed_than_somebody_reads() -> None:
    many = instance("a", CPU, *(f"m{number:03}" for number in range(60)))
    text = refusal(routed("nope", many))[2]
    assert (
        text
        == "model 'nope' not found; models: "
        + ", ".join(f"m{number:03}" for number in range(10))
        + " and 50 more"
    )


def test_every_text_that_names_instances_roles_or_lanes_names_ten_at_most() -> None:
    crowd = [instance(f"a{number}") for number in range(30)]
    roles = tuple(role(f"r{number}", "x") for number in range(30))
    texts = [
        refusal(routed("nope", instance("a"), roles=roles))[2],
        refusal(routed("m@nowhere", *crowd))[2],
        refusal(routed("m@b", *crowd, instance("b", CPU, "n")))[2],
        refusal(routed("m", *crowd, roles=roles, lane="nowhere"))[2],
        refusal(routed("r", *crowd, roles=(role("r", target="gone"),)))[2],
        refusal(
            routed(
                "r", *(instance(f"g{n}", GPU) for n in range(30)), roles=(role("r", policy=Policy.CPU_ONLY),)
            )
        )[2],
    ]
    for text in texts:
        assert "and 20 more" in text, text
        assert len(text) < 200, text


def test_a_request_for_vectors_is_told_in_the_words_that_ollama_has_for_those() -> None:
    text = 'model "nope" not found, try pulling it first; models: m'
    assert refusal(routed("nope", instance("a"), kind=EMBED))[2] == text
    away = routed("m@b", instance("a"), instance("b", CPU, "n"), kind=EMBED)
    assert refusal(away)[2] == 'model "m" not found, try pulling it first; it is not on b, but on: a'


# --- pins -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "pin"), [("m@b", None), ("m", "b"), ("m@b", "a")])
def test_a_pin_beside_the_name_or_in_it_is_held_and_that_in_it_counts(model: str, pin: str | None) -> None:
    decision = routed(model, instance("a", loaded="m"), instance("b"), instance("c", CPU, UNREAD), pin=pin)
    assert ways(decision) == [("b", "running", None)]
    assert passed_over(decision) == {"a": Reason.POLICY, "c": Reason.POLICY}
    assert decision.requested_target == "b"
    assert attempts(decision)[0].model == "m"


def test_a_pinned_instance_that_is_not_well_is_not_left_for_another() -> None:
    decision = routed("m@b", instance("a"), instance("b", out=Reason.INSTANCE_UNHEALTHY))
    assert refusal(decision)[:2] == ("unavailable", Reason.INSTANCE_UNHEALTHY)
    assert refusal(decision)[2].startswith("b has 'm'")


def test_a_pinned_instance_without_the_model_is_told_from_one_that_is_away() -> None:
    decision = routed("m@b", instance("a"), instance("b", CPU, "n"), instance("c", CPU, UNREAD))
    text = "model 'm' not found; it is not on b, but on: a"
    assert refusal(decision) == ("unknown", Reason.MODEL_MISSING, text)


def test_a_model_that_nobody_has_is_unknown_wherever_it_is_pinned_to() -> None:
    decision = routed("nope@a", instance("a"), instance("b", CPU, UNREAD))
    assert refusal(decision)[:2] == ("unknown", Reason.MODEL_MISSING)


@pytest.mark.parametrize(("model", "pin"), [("m@nowhere", None), ("m", "nowhere"), ("output@nowhere", None)])
def test_a_pin_to_no_instance_is_refused_and_says_which_there_are(model: str, pin: str | None) -> None:
    decision = routed(model, instance("a"), instance("b"), roles=(role("output"),), pin=pin)
    text = "there is no instance 'nowhere'; there is: a, b"
    assert refusal(decision) == ("unknown", Reason.INSTANCE_UNAVAILABLE, text)
    assert decision.requested_target == "nowhere"


@pytest.mark.parametrize("model", ["m@B", "m@", "@a", "m@a@", "m@1a", "m@" + "a" * 33])
def test_what_is_no_id_of_an_instance_is_part_of_the_name(model: str) -> None:
    assert refusal(routed(model, instance("a"))) == ("impossible", Reason.MODEL_MISSING, "invalid model name")


def test_a_role_can_be_pinned_and_its_target_gives_way() -> None:
    asked = role("output", target="a")
    decision = routed("output@b", instance("a"), instance("b"), roles=(asked,))
    assert ways(decision) == [("b", "running", None)]
    assert (decision.role, decision.requested_target) == ("output", "b")


def test_a_pin_is_held_by_every_role_that_is_fallen_back_to() -> None:
    roles = (role("output", "n", fallbacks=("control",)), role("control", "m", target="a"))
    decision = routed("output@b", instance("a"), instance("b"), roles=roles)
    assert ways(decision) == [("b", "running", Reason.MODEL_MISSING)]


@pytest.mark.parametrize("policy", Policy)
def test_a_pin_does_not_outweigh_cpu_only(policy: Policy) -> None:
    decision = routed("output@g", instance("g", GPU), instance("c"), roles=(role("output", policy=policy),))
    if policy is Policy.CPU_ONLY:
        text = "policy cpu_only permits none of: g"
        assert refusal(decision) == ("contradiction", Reason.POLICY, text)
    else:
        assert ways(decision) == [("g", "running", None)]


# --- roles ----------------------------------------------------------------------------------------


def test_a_role_stands_for_its_model() -> None:
    decision = routed("output", instance("a"), roles=(role("output"),))
    assert attempts(decision) == [Attempt("a", "m", "output", "running")]
    assert (decision.role, decision.policy, decision.requested_target) == ("output", Policy.AUTO, None)


@pytest.mark.parametrize("name", ["output", "Output", " OUTPUT "])
def test_a_role_with_a_model_wins_over_a_model_of_its_name(name: str) -> None:
    decision = routed(name, instance("a", CPU, "output", "m"), roles=(role("output"),))
    assert attempts(decision) == [Attempt("a", "m", "output", "running")]


def test_a_copy_of_a_model_under_a_roles_name_changes_nothing_for_the_role() -> None:
    """As found: an embedding role for the CPU alone was answered on a GPU after such a copy (S1)."""
    asked = role("embedding", "minilm", kind=EMBED, policy=Policy.CPU_ONLY, target="c")
    here = (instance("c", CPU, "minilm", "embedding"), instance("g", GPU, "minilm", "embedding"))
    assert attempts(routed("embedding", *here, roles=(asked,), kind=EMBED)) == [
        Attempt("c", "minilm", "embedding", "running")
    ]


@pytest.mark.parametrize("name", ["output:latest", "OUTPUT:latest", "library/output", "output:8b"])
def test_a_model_under_a_roles_name_is_reached_by_name_and_tag(name: str) -> None:
    decision = routed(name, instance("a", CPU, "output", "output:8b", "m"), roles=(role("output"),))
    assert [(one.model, one.role) for one in attempts(decision)] == [(name, None)]


def test_name_and_tag_mean_the_role_where_no_model_has_that_name() -> None:
    """Lists name roles so, and clients (Open WebUI) add that tag to any name without one."""
    decision = routed("gpt-4.1:latest", instance("a"), roles=(role("gpt-4.1"),))
    assert attempts(decision) == [Attempt("a", "m", "gpt-4.1", "running")]
    assert refusal(routed("gpt-4.1:8b", instance("a"), roles=(role("gpt-4.1"),)))[0] == "unknown"
    pulls = routed("gpt-4.1:latest", instance("a"), roles=(role("gpt-4.1"),), auto_pull=True)
    assert [one.because for one in attempts(pulls)] == ["running"]


def test_a_role_without_a_model_does_not_hide_a_model_of_its_name() -> None:
    decision = routed("output", instance("a", CPU, "output"), roles=(role("output", None),))
    assert attempts(decision) == [Attempt("a", "output", None, "running")]


def test_a_request_for_vectors_that_names_the_model_of_the_role_embedding_obeys_that_role() -> None:
    here = (instance("c", CPU, "minilm", "m"), instance("g", GPU, "minilm", "m"))
    only = role("embedding", "minilm", kind=EMBED, policy=Policy.CPU_ONLY)
    decision = routed("MiniLM:latest", *here, roles=(only,), kind=EMBED)
    assert attempts(decision) == [Attempt("c", "MiniLM:latest", "embedding", "running")]
    assert (decision.role, decision.policy) == ("embedding", Policy.CPU_ONLY)
    assert refusal(routed("minilm@g", *here, roles=(only,), kind=EMBED))[0] == "contradiction"
    placed = role("embedding", "minilm", kind=EMBED, target="g", fallbacks=("other",))
    other = role("other", "library/minilm", kind=EMBED, target="c")
    decision = routed("minilm", *here, roles=(placed, other), kind=EMBED)
    assert [(one.instance, one.model, one.role) for one in attempts(decision)] == [
        ("g", "minilm", "embedding"),
        ("c", "minilm", "other"),
    ]
    assert decision.requested_target == "g"


def test_only_requests_for_vectors_of_that_model_obey_the_role_embedding() -> None:
    here = (instance("c", CPU, "minilm", "m"), instance("g", GPU, "minilm", "m"))
    rules = role("embedding", "minilm", kind=EMBED, target="c")
    assert where(routed("m", *here, roles=(rules,), kind=EMBED)) == ["c", "g"]
    assert where(routed("minilm", *here, roles=(rules,))) == ["c", "g"]
    assert where(routed("minilm", *here, roles=(role("other", "minilm", kind=EMBED, target="c"),))) == [
        "c",
        "g",
    ]
    lane = role("fast", "x", kind=EMBED, target="g")
    decision = routed("minilm", *here, roles=(rules, lane), kind=EMBED, lane="fast")
    assert (where(decision), decision.role) == (["g"], "fast")
    none = role("embedding", None, kind=EMBED, target="c")
    assert where(routed("minilm", *here, roles=(none,), kind=EMBED)) == ["c", "g"]


def test_a_role_without_a_model_is_unknown_and_says_where_to_name_one() -> None:
    decision = routed("output", instance("a"), roles=(role("output", None, policy=Policy.PREFER_GPU),))
    text = "the role 'output' has no model; set one under roles.output.model"
    assert refusal(decision) == ("unknown", Reason.MODEL_MISSING, text)
    assert (decision.role, decision.policy) == ("output", Policy.PREFER_GPU)


def test_a_role_without_a_model_has_those_that_it_falls_back_to() -> None:
    roles = (role("output", None, fallbacks=("other",)), role("other", "m"), role("third", "m"))
    decision = routed("output", instance("a"), roles=roles)
    assert attempts(decision) == [Attempt("a", "m", "other", "running", Reason.MODEL_MISSING)]
    roles = (role("output", None, fallbacks=("other", "third")), role("other", "x"), role("third", "m"))
    decision = routed("output", instance("a"), roles=roles)
    assert attempts(decision) == [Attempt("a", "m", "third", "running", Reason.MODEL_MISSING, choice=9)]


def test_an_embedding_without_a_model_gets_none_from_others() -> None:
    roles = (role("embedding", None, kind=EMBED, fallbacks=("other",)), role("other", "m", kind=EMBED))
    assert refusal(routed("embedding", instance("a"), roles=roles, kind=EMBED))[0] == "unknown"


def test_a_role_whose_model_is_missing_is_not_offered_in_its_place() -> None:
    roles = (role("output", "x"), role("other", "m"))
    text = "model 'x' not found; it is the model of the role 'output'; models: m; roles: other"
    same = routed("x", instance("a"), roles=(role("x", "x:latest"), role("other", "m")))
    assert refusal(same)[2] == "model 'x:latest' not found; models: m; roles: other"
    assert refusal(routed("output", instance("a"), roles=roles))[2] == text
    assert refusal(routed("output@a", instance("a"), roles=roles))[2] == text


def test_a_role_does_only_what_it_is_for() -> None:
    decision = routed("embedding", instance("a"), roles=(role("embedding", kind=EMBED, target="a"),))
    text = "the role 'embedding' does embed, and this request wants to generate"
    assert refusal(decision) == ("contradiction", Reason.POLICY, text)
    assert decision.requested_target == "a"


def test_a_lane_puts_the_rules_of_a_role_on_a_model_but_not_its_fallbacks() -> None:
    lane = role("output", "other", policy=Policy.CPU_ONLY, fallbacks=("control",))
    decision = routed("m", instance("g", GPU), instance("c"), roles=(lane, role("control")), lane="output")
    assert attempts(decision) == [Attempt("c", "m", "output", "running")]
    assert (decision.role, decision.policy) == ("output", Policy.CPU_ONLY)


def test_a_lane_for_something_else_is_refused_and_names_those_that_fit() -> None:
    roles = (role("thinking", "x", policy=Policy.CPU_ONLY), role("embedding", "y", kind=EMBED, target="b"))
    decision = routed("m", instance("a", GPU), instance("b"), roles=roles, kind=EMBED, lane="thinking")
    text = "X-Lane: the lane 'thinking' does generate, and this request wants to embed; lanes for that: "
    assert refusal(decision) == ("unknown_lane", Reason.POLICY, f"{text}embedding")
    decision = routed("m", instance("a", GPU), instance("b"), roles=roles, kind=EMBED, lane="embedding")
    assert (where(decision), decision.role) == (["b"], "embedding")


@pytest.mark.parametrize("model", ["m", "nope", "output", "m@g", "m@nowhere", "nowhere"])
def test_a_lane_that_is_no_role_is_refused_and_names_the_lanes(model: str) -> None:
    roles = (role("output"), role("control", None))
    text = "there is no lane 'nowhere'; lanes: output, control"
    decision = routed(model, instance("g", GPU), roles=roles, lane="nowhere")
    assert refusal(decision) == ("unknown_lane", Reason.POLICY, text)


def test_a_lane_is_named_in_any_case_and_an_empty_one_is_none() -> None:
    roles = (role("output", policy=Policy.CPU_ONLY),)
    assert routed("m", instance("c"), roles=roles, lane="Output").role == "output"
    assert routed("m", instance("c"), roles=roles, lane="").role is None


def test_a_role_that_is_asked_for_by_its_name_counts_more_than_the_lane() -> None:
    roles = (role("output"), role("control", policy=Policy.CPU_ONLY))
    assert where(routed("output", instance("g", GPU), roles=roles, lane="control")) == ["g"]


# --- policy auto ----------------------------------------------------------------------------------


def test_auto_takes_any_device() -> None:
    everywhere = (instance("c"), instance("g", GPU), instance("x", None))
    decision = routed("output", *everywhere, roles=(role("output"),))
    assert ways(decision) == [(id_, "running", None) for id_ in ("c", "g", "x")]


@pytest.mark.parametrize("policy", [Policy.AUTO, Policy.CPU_ONLY])
def test_a_target_is_held(policy: Policy) -> None:
    asked = role("output", target="b", policy=policy)
    decision = routed("output", instance("a", loaded="m"), instance("b"), roles=(asked,))
    assert ways(decision) == [("b", "running", None)]
    assert passed_over(decision) == {"a": Reason.POLICY}
    away = routed("output", instance("a"), instance("b", out=Reason.START_FAILED), roles=(asked,))
    assert refusal(away)[:2] == ("unavailable", Reason.START_FAILED)
    lacks = routed("output", instance("a"), instance("b", CPU, "n"), roles=(asked,))
    assert refusal(lacks) == (
        "unknown",
        Reason.MODEL_MISSING,
        "model 'm' not found; it is not on b, but on: a",
    )
    gone = routed("output", instance("a"), roles=(asked,))
    assert refusal(gone)[:2] == ("unavailable", Reason.INSTANCE_UNAVAILABLE)
    assert "there is no instance 'b'" in refusal(gone)[2]


# --- policy cpu_only ------------------------------------------------------------------------------


def test_cpu_only_takes_what_is_declared_to_be_on_the_cpu_and_nothing_else() -> None:
    everywhere = (instance("g", GPU, loaded="m"), instance("x", None), instance("c", state=State.STARTABLE))
    decision = routed("output", *everywhere, roles=(role("output", policy=Policy.CPU_ONLY),))
    assert ways(decision) == [("c", "startable", None)]
    assert passed_over(decision) == {"g": Reason.POLICY, "x": Reason.POLICY}


def test_cpu_only_is_refused_where_only_others_have_the_model() -> None:
    everywhere = (instance("g", GPU), instance("x", None), instance("c", CPU, "n"))
    decision = routed("output", *everywhere, roles=(role("output", policy=Policy.CPU_ONLY),))
    text = "policy cpu_only permits none of: g, x"
    assert refusal(decision) == ("contradiction", Reason.POLICY, text)


def test_cpu_only_is_no_contradiction_where_nobody_has_the_model() -> None:
    asked = role("output", policy=Policy.CPU_ONLY)
    decision = routed("output", instance("x", None, UNREAD), instance("c", CPU, "n"), roles=(asked,))
    assert refusal(decision)[:2] == ("unknown", Reason.MODEL_MISSING)


def test_cpu_only_reaches_as_far_as_the_fallbacks() -> None:
    roles = (
        role("output", "n", policy=Policy.CPU_ONLY, fallbacks=("control",)),
        role("control", "m", policy=Policy.PREFER_GPU, target="g"),
    )
    decision = routed("output", instance("g", GPU), instance("c"), roles=roles)
    assert ways(decision) == [("c", "running", Reason.MODEL_MISSING)]
    only_gpus = routed("output", instance("g", GPU), roles=roles)
    assert refusal(only_gpus)[0] == "unknown"
    assert passed_over(only_gpus) == {"g": Reason.POLICY}


# --- policy prefer_gpu ----------------------------------------------------------------------------

PREFERS = role("output", policy=Policy.PREFER_GPU)


def test_prefer_gpu_starts_a_gpu_before_it_takes_a_warm_cpu() -> None:
    decision = routed(
        "output", instance("c", loaded="m"), instance("g", GPU, state=State.STARTABLE), roles=(PREFERS,)
    )
    assert ways(decision) == [("g", "startable", None), ("c", "loaded", Reason.INSTANCE_UNAVAILABLE)]


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ((), Reason.GPU_MISSING),
        ((instance("g", GPU, "n"),), Reason.MODEL_MISSING),
        ((instance("g", GPU, out=Reason.VRAM_INSUFFICIENT),), Reason.VRAM_INSUFFICIENT),
        ((instance("g", GPU, UNREAD, out=Reason.INSTANCE_UNAVAILABLE),), Reason.INSTANCE_UNAVAILABLE),
        ((instance("x", None, out=Reason.INSTANCE_UNHEALTHY),), Reason.GPU_MISSING),
    ],
)
def test_prefer_gpu_falls_back_to_the_cpu_and_says_why(others: tuple[Candidate, ...], reason: Reason) -> None:
    decision = routed("output", instance("c"), *others, roles=(PREFERS,))
    assert ways(decision) == [("c", "running", reason)]


def test_the_first_reason_why_no_gpu_answers_is_told() -> None:
    outs = (instance("g", GPU, out=Reason.GPU_MISSING), instance("h", GPU, out=Reason.INSTANCE_UNHEALTHY))
    assert ways(routed("output", *outs, instance("c"), roles=(PREFERS,))) == [
        ("c", "running", Reason.GPU_MISSING)
    ]


def test_a_cpu_that_has_the_model_comes_before_a_gpu_that_may_have_it() -> None:
    decision = routed("output", instance("g", GPU, UNREAD), instance("c"), roles=(PREFERS,))
    assert ways(decision) == [("c", "running", Reason.MODEL_MISSING), ("g", "unread", None)]


def test_the_target_of_one_that_prefers_gpus_is_left_for_other_gpus_and_then_for_the_cpu() -> None:
    asked = replace(PREFERS, target="h")
    everywhere = [
        instance("c", loaded="m"),
        instance("x", None),
        instance("g", GPU, loaded="m"),
        instance("h", GPU, state=State.STARTABLE),
    ]
    decision = routed("output", *everywhere, roles=(asked,))
    then = Reason.INSTANCE_UNAVAILABLE
    assert ways(decision) == [
        ("h", "startable", None),
        ("g", "loaded", then),
        ("c", "loaded", then),
        ("x", "running", then),
    ]
    everywhere[3] = instance("h", GPU, out=Reason.START_FAILED)
    decision = routed("output", *everywhere, roles=(asked,))
    assert [way[0::2] for way in ways(decision)] == [(id_, Reason.START_FAILED) for id_ in ("g", "c", "x")]
    everywhere[3] = instance("h", GPU, "n")
    assert ways(routed("output", *everywhere, roles=(asked,)))[0] == ("g", "loaded", Reason.MODEL_MISSING)
    everywhere.pop()
    assert ways(routed("output", *everywhere, roles=(asked,)))[0] == (
        "g",
        "loaded",
        Reason.INSTANCE_UNAVAILABLE,
    )


def test_one_that_prefers_gpus_may_have_the_cpu_for_its_target() -> None:
    decision = routed("output", instance("c"), instance("g", GPU), roles=(replace(PREFERS, target="c"),))
    assert where(decision) == ["c", "g"]


def test_where_neither_gpu_nor_cpu_can_be_used_the_target_is_told_of() -> None:
    outs = (instance("c", out=Reason.ENGINE_UNAVAILABLE), instance("g", GPU, out=Reason.GPU_MISSING))
    decision = routed("output", *outs, roles=(replace(PREFERS, target="g"),))
    assert refusal(decision)[:2] == ("unavailable", Reason.GPU_MISSING)


# --- fallbacks of roles ---------------------------------------------------------------------------


def test_a_role_falls_back_to_others_in_order_and_through_them() -> None:
    roles = (
        role("one", "m", fallbacks=("two", "three")),
        role("two", "n", fallbacks=("four",)),
        role("three", "o"),
        role("four", "p"),
    )
    decision = routed("one", instance("a", CPU, "m", "n", "o", "p"), roles=roles)
    then = Reason.INSTANCE_UNAVAILABLE
    assert attempts(decision) == [
        Attempt("a", "m", "one", "running"),
        Attempt("a", "n", "two", "running", then, choice=9),
        Attempt("a", "o", "three", "running", then, choice=18),
        Attempt("a", "p", "four", "running", then, choice=27),
    ]
    assert decision.role == "one"


def test_roles_that_fall_back_to_each_other_are_gone_through_once() -> None:
    roles = (role("one", "m", fallbacks=("one", "two")), role("two", "n", fallbacks=("one", "two")))
    decision = routed("two", instance("a", CPU, "m", "n"), roles=roles)
    assert [one.model for one in attempts(decision)] == ["n", "m"]


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (instance("b", CPU, "x"), Reason.MODEL_MISSING),
        (instance("b", CPU, "n", out=Reason.INSTANCE_UNHEALTHY), Reason.INSTANCE_UNHEALTHY),
        (instance("b", GPU, "n"), Reason.POLICY),
    ],
)
def test_what_a_role_falls_back_for_is_why_it_has_no_place_itself(first: Candidate, reason: Reason) -> None:
    roles = (role("one", "n", policy=Policy.CPU_ONLY, fallbacks=("two",)), role("two", "m"))
    others = (instance("away", CPU, out=Reason.GPU_FALLBACK), instance("a"))
    assert ways(routed("one", first, *others, roles=roles)) == [("a", "running", reason)]


def test_a_role_that_is_fallen_back_to_without_a_model_hands_on_to_its_own() -> None:
    roles = (
        role("one", "x", fallbacks=("two",)),
        role("two", None, fallbacks=("three",)),
        role("three", "m"),
    )
    assert where(routed("one", instance("a"), roles=roles)) == ["a"]


def test_no_role_falls_back_to_one_that_does_something_else_or_is_none() -> None:
    roles = (role("one", "x", fallbacks=("embedding", "gone")), role("embedding", "m", kind=EMBED))
    assert refusal(routed("one", instance("a"), roles=roles))[0] == "unknown"


def test_an_embedding_may_change_its_place_but_not_its_model() -> None:
    roles = (
        role("embedding", "m", kind=EMBED, target="b", fallbacks=("other", "same")),
        role("other", "n", kind=EMBED),
        role("same", "library/M:latest", kind=EMBED),
    )
    decision = routed("embedding", instance("a", CPU, "m", "n"), instance("b"), roles=roles, kind=EMBED)
    assert attempts(decision) == [
        Attempt("b", "m", "embedding", "running"),
        Attempt("a", "library/M:latest", "same", "running", Reason.INSTANCE_UNAVAILABLE, choice=9),
    ]
    assert decision.passed_over == ()


@pytest.mark.parametrize("targets", [("a", None), (None, "b")])
def test_what_two_roles_pass_over_is_told_once_with_the_reason_that_says_most(
    targets: tuple[str | None, str | None],
) -> None:
    roles = (role("one", target=targets[0], fallbacks=("two",)), role("two", target=targets[1]))
    outs = (instance("a", out=Reason.INSTANCE_UNHEALTHY), instance("b", out=Reason.START_FAILED))
    decision = routed("one", *outs, roles=roles)
    assert sorted(decision.passed_over) == [
        PassedOver("a", "m", Reason.INSTANCE_UNHEALTHY),
        PassedOver("b", "m", Reason.START_FAILED),
    ]


# --- the instances of a role ---


def test_a_role_uses_only_its_instances_in_their_order() -> None:
    here = (instance("a", priority=9), instance("b", state=State.STARTABLE), instance("c"))
    decision = routed("output", *here, roles=(role("output", instances=("b", "c")),))
    assert where(decision) == ["b", "c"]
    assert decision.passed_over == (
        PassedOver("a", "m", Reason.POLICY, "not among the instances of the role"),
    )
    assert [one.choice for one in attempts(decision)] == [0, 0]


@pytest.mark.parametrize("policy", [Policy.AUTO, Policy.PREFER_GPU])
def test_a_target_is_what_was_preferred_wherever_it_stands_among_the_instances(policy: Policy) -> None:
    only = role("output", instances=("b", "c"), target="c", policy=policy, attempt_timeouts_s=(45, 60))
    here = (instance("b", GPU), instance("c", GPU))
    first, *_ = attempts(routed("output", *here, roles=(only,)))
    assert (first.instance, first.fallback, first.timeout_s) == ("c", None, 60)


def test_the_second_instance_of_a_role_is_a_fallback_from_the_first() -> None:
    only = role("output", instances=("b", "c"))
    out = replace(instance("b", out=Reason.BREAKER_OPEN), detail="after 2 time-outs")
    decision = routed("output", out, instance("c"), roles=(only,))
    assert ways(decision) == [("c", "running", Reason.BREAKER_OPEN)]
    assert decision.passed_over == (PassedOver("b", "m", Reason.BREAKER_OPEN, "after 2 time-outs"),)
    both = routed("output", instance("b"), instance("c"), roles=(only,))
    assert [one.fallback for one in attempts(both)] == [None, Reason.INSTANCE_UNAVAILABLE]


def test_policy_and_pin_hold_within_the_instances_of_a_role() -> None:
    here = (instance("g", GPU), instance("c"), instance("d"))
    cpu = role("output", instances=("g", "d", "c"), policy=Policy.CPU_ONLY)
    assert where(routed("output", *here, roles=(cpu,))) == ["d", "c"]
    gpu = role("output", instances=("c", "g"), policy=Policy.PREFER_GPU)
    decision = routed("output", *here, roles=(gpu,))
    assert where(decision) == ["g", "c"]
    assert [one.choice for one in attempts(decision)] == [0, 3]
    assert refusal(routed("output@d", *here, roles=(gpu,)))[1:] == (
        Reason.POLICY,
        "d is barred: the role may use only: c, g",
    )


def test_a_model_that_is_only_outside_the_instances_of_a_role_is_missing() -> None:
    here = (instance("a"), instance("b", CPU, "n"), instance("g", GPU))
    roles = (role("output", instances=("b",)),)
    what, reason, message = refusal(routed("output", *here, roles=roles))
    assert (what, reason) == ("unknown", Reason.MODEL_MISSING)
    assert message.endswith("; the role may use only: b; it is on: a, g")
    decision = routed("output", *here, roles=roles, auto_pull=True)
    assert ways(decision) == [("b", "pull", None)]
    barred = role("output", instances=("g",), policy=Policy.CPU_ONLY)
    assert refusal(routed("output", *here, roles=(barred,)))[2] == "policy cpu_only permits none of: g"


def test_an_instance_that_may_have_the_model_stands_in_for_none_that_has_it() -> None:
    here = (instance("a"), instance("b", state=State.STARTABLE), instance("c", CPU, UNREAD))
    assert [(one.instance, one.choice) for one in attempts(routed("m", *here))] == [
        ("a", 0),
        ("b", 0),
        ("c", 1),
    ]


def test_attempts_have_the_time_of_their_place() -> None:
    here = (instance("a"), instance("b"), instance("c"))
    timed = role("output", instances=("c", "a", "b"), attempt_timeouts_s=(45, 60))
    decision = routed("output", *here, roles=(timed,))
    assert [(one.instance, one.timeout_s) for one in attempts(decision)] == [("c", 45), ("a", 60), ("b", 60)]
    assert attempts(routed("m", *here))[0].timeout_s is None


def test_a_role_for_runs_only_says_so_in_its_decision() -> None:
    assert routed("output", instance("a"), roles=(role("output", mode="async"),)).is_async
    assert not routed("output", instance("a"), roles=(role("output"),)).is_async
    assert not routed("m", instance("a")).is_async


# --- pulls ----------------------------------------------------------------------------------------


def test_a_model_that_nobody_has_is_pulled_only_where_that_is_wanted() -> None:
    here = (
        instance("a", state=State.STARTABLE, priority=1),
        instance("b"),
        instance("c", out=Reason.GPU_MISSING),
    )
    assert refusal(routed("n", *here))[0] == "unknown"
    decision = routed("n", *here, auto_pull=True)
    assert ways(decision) == [("b", "pull", None), ("a", "pull", None)]
    assert passed_over(decision) == {"c": Reason.GPU_MISSING}


def test_who_may_have_a_model_is_asked_before_it_is_pulled() -> None:
    decision = routed("n", instance("a"), instance("b", CPU, UNREAD), auto_pull=True)
    assert ways(decision) == [("b", "unread", None), ("a", "pull", None)]


def test_a_model_that_somebody_has_is_not_pulled_to_others() -> None:
    decision = routed("m", instance("a", out=Reason.START_FAILED), instance("b", CPU, "n"), auto_pull=True)
    assert refusal(decision)[:2] == ("unavailable", Reason.START_FAILED)


def test_a_pull_keeps_to_pins_and_policies() -> None:
    here = (instance("c"), instance("g", GPU), instance("x", None))
    assert where(routed("n@g", *here, auto_pull=True)) == ["g"]
    only = role("output", "n", policy=Policy.CPU_ONLY)
    assert where(routed("output", *here, roles=(only,), auto_pull=True)) == ["c"]
    away = (instance("c", out=Reason.INSTANCE_UNHEALTHY),)
    assert refusal(routed("n", *away, auto_pull=True))[2].startswith("c could pull 'n'")


# --- what always holds ----------------------------------------------------------------------------

IDS = ["a", "b", "c", "d"]
ROLES = ["r", "s", "t", "embedding"]


STATES = [
    (State.READY, None),
    (State.STARTABLE, None),
    (State.OUT, Reason.INSTANCE_UNHEALTHY),
    (State.OUT, Reason.GPU_MISSING),
]
LISTS: list[tuple[tuple[str, ...] | None, str | None]] = [
    (("m",), None),
    (("m",), "m"),
    (None, None),
    ((), None),
    (("n", "o"), "o"),
    (("m", "n", "o"), "n"),
]
# Every draw takes its time: whole candidates, roles and requests are drawn, not their parts.
CANDIDATES = [
    Candidate(
        id="",
        device=device,
        state=state,
        priority=priority,
        models=None if names is None else {model_key(name): name for name in names},
        loaded=frozenset({model_key(loaded)} if loaded and state is State.READY else ()),
        why_out=out,
    )
    for device, (state, out), priority, (names, loaded) in product([CPU, GPU, None], STATES, [0, 1], LISTS)
]
FALLBACKS = [(), *([name] for name in ROLES), ["s", "t"], ["embedding", "r", "nobody"]]
WISHES = [
    Role("", kind, model, target, policy, tuple(fallbacks))
    for kind, model, target, policy, fallbacks in product(
        [GENERATE, EMBED], ["m", "n", "library/M", None], [None, "a", "d"], Policy, FALLBACKS
    )
]
REQUESTS = [
    RequestFacts(f"{name}@{place}" if place else name, kind, pin, lane)
    for name, kind, place, pin, lane in product(
        [*ROLES, "m", "nope"], [GENERATE, EMBED], [None, None, "b"], [None, None, "c"], [None, "r", "s"]
    )
]

OVERLOADS = [
    None,
    None,
    Overloads("full", {}),
    Overloads("", {"m:latest": "slow"}),
    Overloads("full", {"x": ""}),
]

snapshots = st.lists(st.none() | st.sampled_from(CANDIDATES), max_size=len(IDS)).map(
    lambda drawn: Snapshot(
        tuple(replace(one, id=id_) for id_, one in zip(IDS, drawn, strict=False) if one is not None)
    )
)
settings = st.builds(
    lambda drawn, auto_pull: RoutingSettings(
        {name: replace(one, name=name) for name, one in zip(ROLES, drawn, strict=False)}, auto_pull=auto_pull
    ),
    st.lists(st.sampled_from(WISHES), max_size=len(ROLES)),
    st.booleans(),
)
requests = st.sampled_from(REQUESTS)
anything = given(requests, settings, snapshots)


def pin_of(request: RequestFacts) -> str | None:
    return request.model.partition("@")[2] or request.instance


@anything
def test_cpu_only_never_yields_a_gpu_nor_what_does_not_say_what_it_is(
    request: RequestFacts, settings: RoutingSettings, snapshot: Snapshot
) -> None:
    decision = decide(request, settings, snapshot)
    for attempt in attempts(decision):
        rules = {decision.policy, *([settings.roles[attempt.role].policy] if attempt.role else [])}
        found = snapshot.get(attempt.instance)
        assert found is not None
        assert Policy.CPU_ONLY not in rules or found.device is CPU


@anything
def test_a_pin_is_never_left_and_a_target_only_by_those_that_prefer_gpus(
    request: RequestFacts, settings: RoutingSettings, snapshot: Snapshot
) -> None:
    decision = decide(request, settings, snapshot)
    for attempt in attempts(decision):
        pin = pin_of(request)
        if pin is not None:
            assert attempt.instance == pin == decision.requested_target
        elif attempt.role is not None and settings.roles[attempt.role].policy is not Policy.PREFER_GPU:
            assert settings.roles[attempt.role].target in (None, attempt.instance)


@anything
def test_the_same_question_gets_the_same_decision(
    request: RequestFacts, settings: RoutingSettings, snapshot: Snapshot
) -> None:
    first = decide(request, settings, snapshot)
    again = Snapshot(tuple(replace(candidate) for candidate in snapshot.candidates))
    assert (
        decide(request._replace(), replace(settings), again) == first == decide(request, settings, snapshot)
    )


@anything
def test_every_instance_that_has_the_model_or_may_have_it_is_tried_or_passed_over_and_only_once(
    request: RequestFacts, settings: RoutingSettings, snapshot: Snapshot
) -> None:
    decision = decide(request, settings, snapshot)
    told = [(one.instance, model_key(one.model)) for one in attempts(decision)]
    told += [(one.instance, model_key(one.model)) for one in decision.passed_over]
    assert len(told) == len(set(told))
    asked_for = request.model.partition("@")[0]
    keys = {key for _, key in told}
    lane = settings.roles.get(request.lane or "")
    lane_known = request.lane is None or (lane is not None and lane.kind is request.kind)
    pin_known = pin_of(request) is None or snapshot.get(pin_of(request) or "")
    if asked_for == "m" and lane_known and pin_known:
        keys.add(model_key("m"))
    for key in keys:
        expected = {one.id for one in (*snapshot.having(key), *snapshot.unread())}
        if settings.auto_pull and not snapshot.having(key):
            expected = {one.id for one in snapshot.candidates}
        assert {instance for instance, model in told if model == key} == expected
    for one in decision.passed_over:
        candidate = snapshot.get(one.instance)
        assert candidate is not None
        assert one.reason in (Reason.POLICY, candidate.why_out)


@given(requests, settings, snapshots, st.lists(st.sampled_from(OVERLOADS), min_size=len(IDS)))
def test_overload_changes_the_order_alone_and_is_told(
    request: RequestFacts, settings: RoutingSettings, snapshot: Snapshot, loads: list[Overloads | None]
) -> None:
    before = decide(request, settings, snapshot)
    loaded = [
        replace(one, overloads=load if one.state is State.READY else None)
        for one, load in zip(snapshot.candidates, loads, strict=False)
    ]
    after = decide(request, settings, Snapshot(tuple(loaded)))
    assert sorted(one[:4] for one in attempts(after)) == sorted(one[:4] for one in attempts(before))
    assert after.refused == before.refused
    overloaded = {one.id for one in loaded if one.overloads is not None}
    told = [one for one in after.passed_over if one.reason is Reason.OVERLOADED]
    assert {one.instance for one in told} <= overloaded
    assert all(one.detail in ("full", "slow") for one in told)
    others = [one for one in after.passed_over if one.reason is not Reason.OVERLOADED]
    assert others == list(before.passed_over)
    if not told:
        assert [one[:4] for one in attempts(after)] == [one[:4] for one in attempts(before)] or overloaded
    for one in told:
        key = model_key(one.model)
        order = [way.instance for way in attempts(after) if model_key(way.model) == key]
        assert set(order[: order.index(one.instance)]) - overloaded, "another one goes first"


@anything
def test_it_is_refused_exactly_where_there_is_no_attempt(
    request: RequestFacts, settings: RoutingSettings, snapshot: Snapshot
) -> None:
    decision = decide(request, settings, snapshot)
    assert (decision.refused is None) == bool(attempts(decision))
    assert all(group.instances for group in decision.groups)


@anything
def test_only_what_can_be_used_is_attempted_and_for_the_reason_given(
    request: RequestFacts, settings: RoutingSettings, snapshot: Snapshot
) -> None:
    for attempt in attempts(decide(request, settings, snapshot)):
        found = snapshot.get(attempt.instance)
        assert found is not None
        key = model_key(attempt.model)
        assert found.why_out is None
        assert attempt.because == because(found, key)
        assert attempt.because != "pull" or (settings.auto_pull and not snapshot.having(key))


def because(candidate: Candidate, key: str) -> str:
    if candidate.models is None:
        return "unread"
    if key not in candidate.models:
        return "pull"
    if candidate.state is State.STARTABLE:
        return "startable"
    return "loaded" if key in candidate.loaded else "running"


@anything
def test_a_reason_for_a_fallback_is_given_exactly_where_an_attempt_is_not_what_was_preferred(
    request: RequestFacts, settings: RoutingSettings, snapshot: Snapshot
) -> None:
    decision = decide(request, settings, snapshot)
    for attempt in attempts(decision):
        found = snapshot.get(attempt.instance)
        assert found is not None
        preferred = attempt.role == decision.role
        rules = settings.roles.get(attempt.role or "")
        if preferred and rules and rules.policy is Policy.PREFER_GPU and pin_of(request) is None:
            preferred = found.device is GPU if rules.target is None else found.id == rules.target
        assert (attempt.fallback is None) == preferred


@anything
def test_an_embedding_never_changes_its_model(
    request: RequestFacts, settings: RoutingSettings, snapshot: Snapshot
) -> None:
    request = request._replace(kind=EMBED)
    assert len({model_key(one.model) for one in attempts(decide(request, settings, snapshot))}) <= 1


@anything
def test_an_answer_comes_only_from_roles_of_the_kind_that_was_asked_for(
    request: RequestFacts, settings: RoutingSettings, snapshot: Snapshot
) -> None:
    decision = decide(request, settings, snapshot)
    for attempt in attempts(decision):
        if attempt.role is not None and attempt.role != request.lane:
            assert settings.roles[attempt.role].kind is request.kind


@given(requests, settings, snapshots, st.dictionaries(st.sampled_from(IDS), st.integers(0, 3)))
def test_in_order_is_each_attempt_once_group_by_group_and_the_least_loaded_first(
    request: RequestFacts, settings: RoutingSettings, snapshot: Snapshot, load: Mapping[str, int]
) -> None:
    load = dict.fromkeys(IDS, 0) | dict(load)
    decision = decide(request, settings, snapshot)
    order = list(decision.in_order(load))
    for group in decision.groups:
        part, order = order[: len(group.instances)], order[len(group.instances) :]
        assert sorted(part) == sorted(map(group.attempt, group.instances))
        assert [load[one.instance] for one in part] == sorted(load[id_] for id_ in group.instances)
    assert order == []


@anything
def test_the_groups_of_one_role_go_by_what_is_there_then_preference_then_warmth_then_priority(
    request: RequestFacts, settings: RoutingSettings, snapshot: Snapshot
) -> None:
    decision = decide(request, settings, snapshot)
    for group in decision.groups:
        attempts = map(group.attempt, group.instances)
        assert len({rank(one, request, settings, snapshot) for one in attempts}) == 1
    for one, then in pairwise(group.attempt(group.instances[0]) for group in decision.groups):
        if (one.role, one.model) == (then.role, then.model):
            assert rank(one, request, settings, snapshot) < rank(then, request, settings, snapshot)


def rank(
    attempt: Attempt, request: RequestFacts, settings: RoutingSettings, snapshot: Snapshot
) -> tuple[int, ...]:
    found = snapshot.get(attempt.instance)
    assert found is not None
    rules = settings.roles.get(attempt.role or "")
    preference = 0
    if rules and rules.policy is Policy.PREFER_GPU and pin_of(request) is None and found.id != rules.target:
        preference = int(rules.target is not None) + int(found.device is not GPU)
    there = {"unread": 1, "pull": 2}.get(attempt.because, 0)
    warmth = (
        ["loaded", "running", "startable"].index(because(found, model_key(attempt.model))) if not there else 0
    )
    return there, preference, warmth or int(found.state is State.STARTABLE), -found.priority


# --- conversations --------------------------------------------------------------------------------


HELD = role("output", instances=("b", "c", "d"))


def leaning(decision: Decision, place: str, **load: float) -> tuple[str, Reason | None, float | None] | None:
    busy = {"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0, **load}
    found = decision.leaning(place, busy)
    return None if found is None else (found.instance, found.fallback, found.timeout_s)


def test_a_conversation_goes_before_the_order_of_a_roles_instances() -> None:
    here = tuple(instance(one, loaded="m") for one in "abcd")
    timed = replace(HELD, attempt_timeouts_s=(45, 60, 90))
    decision = routed("output", *here, roles=(timed,))
    assert decision.has_equals
    assert where(decision) == ["b", "c", "d"]
    assert leaning(decision, "d") == ("d", None, 90), "it is no fallback"
    assert leaning(decision, "c", c=1, b=1) == ("c", None, 60)
    assert leaning(decision, "c", c=1) is None, "it is busier"
    assert leaning(decision, "b") is None, "it is first anyway"
    assert leaning(decision, "a") is None, "it is none of them"


def test_a_conversation_waits_for_no_load_and_does_not_change_where_a_request_may_go() -> None:
    here = (instance("b"), instance("c"), instance("d", state=State.STARTABLE))
    decision = routed("output", *here, roles=(HELD,))
    assert leaning(decision, "c") is None, "it would have to load the model"
    assert leaning(decision, "d") is None
    slow = replace(instance("c", loaded="m"), overloads=Overloads("busy", {}))
    decision = routed("output", instance("b", loaded="m"), slow, roles=(HELD,))
    assert leaning(decision, "c") is None, "it is overloaded"
    gpus = replace(HELD, policy=Policy.PREFER_GPU)
    both = (instance("b", GPU, loaded="m"), instance("c", CPU, loaded="m"))
    decision = routed("output", *both, roles=(gpus,))
    assert (where(decision), decision.has_equals) == (["b", "c"], False)
    assert leaning(decision, "c") is None, "it is a fallback"


def test_a_conversation_does_not_change_the_model_of_a_tier() -> None:
    fast = role("fast", instances=("b", "c"))
    settings = RoutingSettings({"fast": fast}, facts={"n": ModelFacts("n", Tier.FAST)})
    here = (instance("b", loaded="m"), instance("c", CPU, "n", loaded="n"))
    decision = decide(RequestFacts("fast", GENERATE), settings, Snapshot(here))
    assert [(one.instances, one.model, one.choice) for one in decision.groups] == [
        (("b",), "m", 0),
        (("c",), "n", 0),
    ]
    assert leaning(decision, "c") is None, "another model is there"


def test_priorities_hold_for_conversations_where_no_role_orders_the_instances() -> None:
    here = (instance("a", loaded="m", priority=1), instance("b", loaded="m"))
    decision = routed("m", *here)
    assert (where(decision), decision.has_equals, leaning(decision, "b")) == (["a", "b"], False, None)
    assert routed("m", *(instance(one) for one in "ab")).has_equals
    assert not routed("output", instance("b"), roles=(HELD,)).has_equals


# --- strategies -----------------------------------------------------------------------------------

OTHERS = [one for one in Strategy if one is not Strategy.WARM_FIRST]


def in_bands(decision: Decision) -> list[list[str]]:
    return [[one for group in band for one in group.instances] for band in decision.bands]


def banded(*instances: Candidate, **values: Any) -> Decision:
    return routed("r", *instances, roles=(role("r", strategy=Strategy.LEAST_LOADED, **values),))


def test_a_role_that_takes_its_instances_warm_first_has_no_bands() -> None:
    assert routed("r", instance("a"), instance("b"), roles=(role("r"),)).bands == ()
    assert routed("m", instance("a")).bands == ()
    assert routed("nope", instance("a")).first({}) is None


@pytest.mark.parametrize("strategy", OTHERS)
def test_a_strategy_orders_those_that_run_and_after_them_those_to_be_started(strategy: Strategy) -> None:
    decision = routed(
        "r",
        instance("stopped", state=State.STARTABLE, priority=9),
        instance("stopped-too", state=State.STARTABLE, priority=8),
        instance("cold", priority=5),
        instance("warm", loaded="m"),
        instance("unread", CPU, UNREAD),
        roles=(role("r", strategy=strategy),),
    )
    assert in_bands(decision) == [["warm", "cold"], ["stopped", "stopped-too"], ["unread"]]
    assert [one.because for one in attempts(decision)] == [
        *("loaded", "running", "startable", "startable", "unread")
    ]


def test_the_fewest_requests_in_flight_win_over_a_loaded_model_and_never_over_a_start() -> None:
    decision = banded(
        instance("warm", loaded="m"),
        instance("cold"),
        instance("stopped", state=State.STARTABLE),
        instance("stopped-too", state=State.STARTABLE),
    )
    load = {"warm": 1, "cold": 0, "stopped": 0, "stopped-too": -1}
    order = list(decision.in_order(load))
    assert [one.instance for one in order] == ["cold", "warm", "stopped-too", "stopped"]
    assert decision.first(load) == order[0]
    equal = dict.fromkeys(load, 3)
    assert [one.instance for one in decision.in_order(equal)] == ["warm", "cold", "stopped", "stopped-too"]


def test_ranks_say_what_a_band_is_compared_by() -> None:
    decision = banded(instance("a"), instance("b"), instance("c", state=State.STARTABLE))
    load = {"a": 0, "b": 1, "c": 0}
    ranks = lambda band, given: {"a": 2, "b": 1, "c": given["c"] + len(band)}  # noqa: E731
    assert [one.instance for one in decision.in_order(load, ranks)] == ["b", "a", "c"]
    assert decision.first(load, ranks) == Attempt("b", "m", "r", "running")


def test_a_strategy_leaves_the_order_of_instances_aside_and_keeps_their_time_outs() -> None:
    decision = banded(
        instance("a"),
        instance("b"),
        instance("c"),
        instances=("c", "b"),
        attempt_timeouts_s=(45, 60),
    )
    assert in_bands(decision) == [["b", "c"]]
    assert {one.instance: (one.timeout_s, one.fallback) for one in attempts(decision)} == {
        "b": (60, None),
        "c": (45, None),
    }
    assert passed_over(decision) == {"a": Reason.POLICY}
    assert not decision.by_place
    assert decision.has_equals
    assert decision.leaning("c", {"b": 1, "c": 0}) is None


def test_a_card_stays_before_the_cpu_and_the_fallback_is_visible() -> None:
    decision = banded(
        instance("cpu", loaded="m"), instance("g", GPU), instance("h", GPU), policy=Policy.PREFER_GPU
    )
    assert in_bands(decision) == [["g", "h"], ["cpu"]]
    assert [one.fallback for one in decision.in_order({"g": 9, "h": 8, "cpu": 0})] == [
        *(None, None, Reason.INSTANCE_UNAVAILABLE)
    ]


def test_an_overloaded_instance_goes_after_the_others_of_its_band() -> None:
    for overloads in (FULL, SLOW):
        decision = banded(
            replace(instance("a", loaded="m"), overloads=overloads),
            instance("b", loaded="m"),
            instance("c"),
            instance("d", state=State.STARTABLE),
        )
        assert in_bands(decision) == [["b", "c"], ["a"], ["d"]]
        assert passed_over(decision) == {"a": Reason.OVERLOADED}


def test_a_fallback_keeps_its_own_strategy() -> None:
    warm = role("s", "n")
    least = role("r", strategy=Strategy.LEAST_LOADED, fallbacks=("s",))
    here = (instance("a", CPU, "m", "n"), instance("b", CPU, "m", "n"))
    decision = routed("r", *here, instance("c", CPU, "n", loaded="n"), roles=(least, warm))
    assert in_bands(decision) == [["a", "b"], ["c"], ["a", "b"]]
    assert [one.fallback for one in attempts(decision)][2:] == [Reason.INSTANCE_UNAVAILABLE] * 3
    by_place = replace(warm, fallbacks=("r",), instances=("c", "a"))
    decision = routed("s", *here, instance("c", CPU, "n"), roles=(least, by_place))
    assert in_bands(decision) == [["c"], ["a"], ["a", "b"]]
    assert decision.has_equals, "the next of its instances"


@given(
    requests,
    settings,
    snapshots,
    st.sampled_from(OTHERS),
    st.lists(st.sampled_from(OVERLOADS), min_size=len(IDS)),
)
def test_a_strategy_changes_the_order_alone(
    request: RequestFacts,
    settings: RoutingSettings,
    snapshot: Snapshot,
    strategy: Strategy,
    loads: list[Overloads | None],
) -> None:
    snapshot = Snapshot(
        tuple(
            replace(one, overloads=load if one.state is State.READY else None)
            for one, load in zip(snapshot.candidates, loads, strict=False)
        )
    )
    roles = {name: replace(one, strategy=strategy) for name, one in settings.roles.items()}
    before = decide(request, settings, snapshot)
    after = decide(request, replace(settings, roles=roles), snapshot)
    assert sorted(attempts(after), key=str) == sorted(attempts(before), key=str)
    assert (after.refused, after.passed_over) == (before.refused, before.passed_over)
    if after.bands:
        assert [group for band in after.bands for group in band] == list(after.groups)
    # What has to be started never goes before what runs, where both stand in for each other.
    for one, then in pairwise(attempts(after)):
        if one.choice == then.choice and one.because == "startable":
            assert then.because == "startable"
