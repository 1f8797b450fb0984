"""What an instance is not there for it is not asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.instance import DeviceKind
from manager.domain.roles import RequestKind, Role, RoutingSettings
from manager.domain.routing import Candidate, RequestFacts, Snapshot, State, decide
from manager.errors import Reason

TRANSCRIBE, GENERATE = RequestKind.TRANSCRIBE, RequestKind.GENERATE
BOTH = {"whisper:latest": "whisper", "tiny:latest": "tiny"}
USUAL = Candidate(
    "cpu", DeviceKind.CPU, State.READY, models=BOTH, serves=frozenset({GENERATE, RequestKind.EMBED})
)
HEARS = Candidate("hears", DeviceKind.CPU, State.READY, models=BOTH, serves=frozenset({TRANSCRIBE}))
UNREAD = replace(HEARS, id="unread", models=None)


def settings(*roles: Role, auto_pull: bool = False) -> RoutingSettings:
    return RoutingSettings({role.name: role for role in roles}, auto_pull=auto_pull)


def where(facts: RequestFacts, *candidates: Candidate, auto_pull: bool = False) -> list[str]:
    decision = decide(facts, settings(auto_pull=auto_pull), Snapshot(candidates))
    return [instance for group in decision.groups for instance in group.instances]


def test_each_kind_goes_where_it_is_served() -> None:
    assert where(RequestFacts("whisper", TRANSCRIBE), USUAL, HEARS) == ["hears"]
    assert where(RequestFacts("tiny", GENERATE), HEARS, USUAL) == ["cpu"]
    assert where(RequestFacts("tiny", RequestKind.EMBED), HEARS, USUAL) == ["cpu"]
    assert where(RequestFacts("tiny", GENERATE), replace(HEARS, serves=frozenset(RequestKind))) == ["hears"]


@pytest.mark.parametrize("kind", RequestKind)
def test_an_instance_serves_every_kind_unless_it_says_otherwise(kind: RequestKind) -> None:
    plain = Candidate("plain", DeviceKind.CPU, State.READY, models=BOTH)
    assert where(RequestFacts("tiny", kind), plain) == ["plain"]


def test_nobody_is_started_or_pulls_for_what_it_does_not_do() -> None:
    assert where(RequestFacts("nope", GENERATE), UNREAD, USUAL) == []
    assert where(RequestFacts("whisper", TRANSCRIBE), USUAL, UNREAD) == ["unread"]
    assert where(RequestFacts("nope", TRANSCRIBE), USUAL, HEARS, auto_pull=True) == ["hears"]


@pytest.mark.parametrize("pin", [None, "cpu"])
def test_where_nobody_does_it_that_is_said(pin: str | None) -> None:
    decision = decide(RequestFacts("whisper", TRANSCRIBE, pin), settings(), Snapshot((USUAL,)))
    assert decision.refused is not None
    assert (decision.refused.what, decision.refused.reason) == ("contradiction", Reason.POLICY)
    who = "cpu does not" if pin else "no instance does"
    assert decision.refused.message == (
        f"this request wants to transcribe, and {who}; one that does says so in its `serves`"
    )


def test_a_role_whose_target_does_something_else_is_told_so() -> None:
    role = Role("ears", TRANSCRIBE, "whisper", target="cpu")
    decision = decide(RequestFacts("ears", TRANSCRIBE), settings(role), Snapshot((USUAL, HEARS)))
    assert decision.refused is not None
    assert decision.refused.message == "'cpu', which the role's target is, does not transcribe"


def test_a_role_goes_before_a_model_that_does_something_else() -> None:
    role = Role("tiny", TRANSCRIBE, "whisper")
    hears = replace(HEARS, models={"whisper:latest": "whisper"})
    decision = decide(RequestFacts("tiny", TRANSCRIBE), settings(role), Snapshot((USUAL, hears)))
    assert [group.model for group in decision.groups] == ["whisper"]


def test_without_any_instance_a_model_is_just_not_there() -> None:
    decision = decide(RequestFacts("whisper", TRANSCRIBE), settings(), Snapshot(()))
    assert decision.refused is not None
    assert decision.refused.reason is Reason.MODEL_MISSING


KINDS = st.frozensets(st.sampled_from(RequestKind), min_size=1)


@given(st.lists(KINDS, max_size=6), st.sampled_from(RequestKind), st.booleans())
def test_an_attempt_is_always_one_of_those_that_serve(
    serves: list[frozenset[RequestKind]], kind: RequestKind, auto_pull: bool
) -> None:
    candidates = [replace(USUAL, id=f"i{number}", serves=kinds) for number, kinds in enumerate(serves)]
    able = [one.id for one in candidates if kind in one.serves]
    for model in ("tiny", "nope"):
        found = where(RequestFacts(model, kind), *candidates, auto_pull=auto_pull)
        assert set(found) <= set(able)
        assert found == [] or model == "tiny" or auto_pull
    assert sorted(where(RequestFacts("tiny", kind), *candidates)) == sorted(able)


def test_what_everybody_does_is_decided_over_all_as_they_are() -> None:
    snapshot = Snapshot((USUAL, replace(USUAL, id="other")))
    assert all(snapshot.serving(kind) is snapshot for kind in USUAL.serves)
    assert snapshot.serving(TRANSCRIBE).candidates == ()
