"""Decisions are made over a snapshot, which is taken anew whenever something that it depends on changes."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

import pytest

from manager.domain.drained import Drained
from manager.domain.instance import DeviceKind, Explanation, Phase
from manager.domain.models import MOST_NAME_LENGTH
from manager.domain.roles import BodyChanges, RequestKind, Role
from manager.domain.routing import RequestFacts, State
from manager.errors import Reason
from manager.services.routing import router as module
from tests.support.attempts import FACTS
from tests.support.instances import Ground

if TYPE_CHECKING:
    from manager.domain.routing import Candidate
    from manager.services.routing.router import Attempts


def candidate(ground: Ground, name: str) -> Candidate:
    found = ground.router.snapshot().get(name)
    assert found is not None
    return found


def names(attempts: Attempts) -> list[str]:
    found = []
    while (one := attempts.next()) is not None:
        found.append(one.instance)
    return found


# --- the snapshot ---


def test_an_open_breaker_takes_an_instance_out_at_once_and_its_end_brings_it_back() -> None:
    ground = Ground("a", "b")
    assert candidate(ground, "a").state is State.READY
    for _ in range(2):
        ground.breakers.failed("a", ground.breakers.admit("a"), Reason.ATTEMPT_TIMEOUT)
    found = candidate(ground, "a")
    assert (found.state, found.why_out) == (State.OUT, Reason.BREAKER_OPEN)
    assert found.detail.startswith("breaker open after 2 failures in a row, the last one attempt_timeout")
    assert names(ground.router.attempts(FACTS)) == ["b"]
    ground.fleet.clock.advance(30)
    assert candidate(ground, "a").state is State.READY, "the next request tries it"
    ground.breakers.admit("a")
    found = candidate(ground, "a")
    assert found.why_out is Reason.BREAKER_OPEN, "one request at a time"
    ground.breakers.reset("a")
    assert (candidate(ground, "a").state, candidate(ground, "a").detail) == (State.READY, "")


def test_an_instance_that_does_not_run_is_not_held_back_by_its_breaker() -> None:
    ground = Ground("a")
    for _ in range(2):
        ground.breakers.failed("a", ground.breakers.admit("a"), Reason.ATTEMPT_TIMEOUT)
    ground["a"].endpoint = None
    ground["a"].phase = Phase.STOPPED
    ground.revision.advance()
    assert candidate(ground, "a").state is State.STARTABLE
    ground["a"].phase = Phase.UNAVAILABLE
    ground.revision.advance()
    assert candidate(ground, "a").why_out is Reason.INSTANCE_UNAVAILABLE


def test_an_overloaded_instance_is_known_at_once_and_for_as_long_as_it_lasts() -> None:
    ground = Ground("a", "b")
    assert names(ground.router.attempts(FACTS)) == ["a", "b"]
    ground.overload.saturated("a", 5)
    assert candidate(ground, "a").overloads is not None
    assert names(ground.router.attempts(FACTS)) == ["b", "a"]
    ground.fleet.clock.advance(5.1)
    assert candidate(ground, "a").overloads is None
    assert names(ground.router.attempts(FACTS)) == ["a", "b"]


def test_a_candidate_says_what_routing_has_to_know_of_an_instance() -> None:
    ground = Ground()
    serves = frozenset({RequestKind.EMBED})
    one = ground.fleet.add("gpu0", device=DeviceKind.GPU, priority=7, serves=serves)
    one.reads("Tiny", "qwen3:8b")
    one.loaded = ("tiny:latest",)
    found = candidate(ground, "gpu0")
    assert (found.id, found.device, found.priority, found.serves) == ("gpu0", DeviceKind.GPU, 7, serves)
    assert (found.state, found.why_out) == (State.READY, None)
    assert found.models == {"tiny:latest": "Tiny", "qwen3:8b": "qwen3:8b"}
    assert found.loaded == {"tiny:latest"}


def test_an_instance_whose_models_nobody_has_read_may_have_any() -> None:
    ground = Ground()
    one = ground.fleet.add("a")
    assert ground.router.models_of(one) is None  # type: ignore[arg-type]
    assert candidate(ground, "a").models is None


@pytest.mark.parametrize("phase", [Phase.STOPPED, Phase.STARTING, Phase.DRAINING, Phase.FAILED])
def test_what_does_not_run_can_be_started_and_holds_no_model(phase: Phase) -> None:
    ground = Ground("a")
    ground["a"].endpoint, ground["a"].phase = None, phase
    ground["a"].loaded = ("tiny",)
    found = candidate(ground, "a")
    assert (found.state, found.why_out, found.loaded) == (State.STARTABLE, None, frozenset())


def test_what_is_silent_is_out_while_it_is_silent() -> None:
    ground = Ground("a")
    ground["a"].is_silent = True
    assert candidate(ground, "a").why_out is Reason.INSTANCE_UNHEALTHY
    ground["a"].is_silent = False
    ground.fleet.clock.advance(1.1)
    assert candidate(ground, "a").state is State.READY


@pytest.mark.parametrize(
    ("explanation", "reason"),
    [(None, Reason.INSTANCE_UNAVAILABLE), (Explanation(Reason.GPU_MISSING, "no card"), Reason.GPU_MISSING)],
)
def test_what_is_unavailable_is_out_and_says_why(explanation: Explanation | None, reason: Reason) -> None:
    ground = Ground("a")
    one = ground["a"]
    one.endpoint, one.phase, one.explanation = None, Phase.UNAVAILABLE, explanation
    assert (candidate(ground, "a").state, candidate(ground, "a").why_out) == (State.OUT, reason)


@pytest.mark.parametrize(("reason", "detail"), [(None, "drained"), ("moves", "drained: moves")])
def test_what_is_drained_is_out_and_says_so(reason: str | None, detail: str) -> None:
    ground = Ground("a", "b")
    ground["a"].drained = Drained(datetime(2026, 8, 1, tzinfo=UTC), reason=reason)
    found = candidate(ground, "a")
    assert (found.state, found.why_out, found.detail) == (
        State.OUT,
        Reason.INSTANCE_UNAVAILABLE,
        detail,
    )
    decision = ground.router.decide(FACTS)
    assert [(one.instance, one.detail) for one in decision.passed_over] == [("a", detail)]
    ground["b"].drained = ground["a"].drained
    ground.revision.advance()
    refused = ground.router.decide(FACTS).refused
    assert refused is not None
    assert (refused.what, refused.reason) == ("unavailable", Reason.INSTANCE_UNAVAILABLE)
    assert f"(instance_unavailable; {detail})" in refused.message


def test_an_instance_that_ends_is_the_last_of_those_to_be_started_and_no_worse() -> None:
    ground = Ground("a", "b")
    for one in (ground["a"], ground["b"]):
        one.endpoint, one.phase = None, Phase.STOPPED
    ground["a"].spec = replace(ground["a"].spec, priority=1000)
    ground["b"].spec = replace(ground["b"].spec, priority=-1000)
    assert names(ground.router.attempts(FACTS)) == ["a", "b"]
    ground["a"].ends, ground["a"].phase = True, Phase.STOPPING
    ground.revision.advance()
    assert names(ground.router.attempts(FACTS)) == ["b", "a"]


def test_a_snapshot_is_kept_until_something_changes_or_a_second_has_passed() -> None:
    ground = Ground("a")
    first = ground.router.snapshot()
    ground["a"].is_silent = True  # which advances no revision
    ground.fleet.clock.advance(0.9)
    assert ground.router.snapshot() is first
    ground.fleet.clock.advance(0.2)
    assert ground.router.snapshot() is not first


def test_every_change_makes_a_new_snapshot() -> None:
    ground = Ground("a")
    seen = [ground.router.snapshot()]
    ground.revision.advance()
    seen.append(ground.router.snapshot())
    ground.settings.change()
    seen.append(ground.router.snapshot())
    ground.lists.read("elsewhere", ({"name": "qwen3:8b"},), 1.0)
    seen.append(ground.router.snapshot())
    assert len({id(one) for one in seen}) == len(seen)
    assert ground.router.snapshot() is seen[-1]


def test_what_an_instance_has_listed_meanwhile_is_in_the_next_snapshot() -> None:
    ground = Ground("a")
    ground.router.snapshot()
    ground["a"].reads("other")
    ground.revision.advance()
    assert candidate(ground, "a").models == {"other:latest": "other"}
    kept = ground.router.snapshot()
    assert ground.router.snapshot() is kept, "the reading of a list is no change after the snapshot"


# --- decisions ---


def test_a_decision_is_kept_as_long_as_its_snapshot() -> None:
    ground = Ground("a")
    first = ground.router.decide(FACTS)
    assert ground.router.decide(FACTS) is first
    ground.revision.advance()
    assert ground.router.decide(FACTS) is not first
    assert ground.router.decide(FACTS) == first


def test_decisions_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_DECISIONS", 10)
    ground = Ground("a")
    for number in range(35):
        ground.router.decide(FACTS._replace(model=f"model{number}"))
        assert len(ground.router._decisions) <= 10
    assert MOST_NAME_LENGTH < 10_000, "and so is each name"


def test_the_changes_to_a_body_are_worked_out_once_for_each_model_and_role() -> None:
    ground = Ground("a")
    role = Role("thinking", RequestKind.GENERATE, model="tiny", changes=BodyChanges(think=True))
    ground.settings.change(roles={"thinking": role})
    one = ground.router.attempts(FACTS._replace(model="thinking")).next()
    assert one is not None
    first = ground.router.changes_for(one)
    assert first.think is True
    assert ground.router.changes_for(one) is first
    assert ground.router.changes_for(one._replace(role=None)).think is None
    ground.settings.change(roles={})
    ground.router.snapshot()
    assert ground.router.changes_for(one).think is None


def test_what_is_known_of_the_fleet_is_the_fleets_to_say() -> None:
    ground = Ground("a")
    ground.fleet.is_known = False
    assert not ground.router.is_known
    assert ground.router.version == ground.settings.version + ground.lists.version
    assert ground.router.load() is ground.fleet.in_flight


async def test_the_first_look_is_waited_for_as_long_as_is_said() -> None:
    ground = Ground("a")
    await ground.router.known(within_s=3.5)
    assert ground.fleet.waited_s == [3.5]


# --- attempts ---


def test_equal_instances_are_tried_by_their_load_at_that_moment() -> None:
    ground = Ground("a", "b", "c")
    held = [ground[name].try_lease() for name in ("a", "a", "b")]
    assert all(held)
    attempts = ground.router.attempts(FACTS)
    first = attempts.next()
    assert first is not None
    assert first.instance == "c"
    for lease in held[:2]:
        assert lease is not None
        lease.release()
    assert names(attempts) == ["a", "b"]


def test_whether_another_could_follow_does_not_take_it_away() -> None:
    ground = Ground("a", "b")
    attempts = ground.router.attempts(FACTS)
    assert attempts.more
    assert attempts.more
    assert len(names(attempts)) == 2
    assert (attempts.more, attempts.next()) == (False, None)


def test_instances_that_a_request_has_failed_on_are_those_before_the_latest() -> None:
    attempts = Ground("a", "b").router.attempts(FACTS)
    seen = [attempts.failed_on]
    for _ in range(2):
        attempts.next()
        seen.append(attempts.failed_on)
    assert [len(one) for one in seen] == [0, 0, 1]


@pytest.mark.parametrize("peeks", [False, True])
def test_no_other_instance_is_started_once_that_is_said(*, peeks: bool) -> None:
    ground = Ground("a", "b", "c")
    ground["a"].loaded = ("tiny",)
    ground["b"].endpoint = ground["c"].endpoint = None
    attempts = ground.router.attempts(FACTS)
    attempts.next()
    assert not peeks or attempts.more
    attempts.start_no_other()
    assert not attempts.more
    ground.fleet.add("d").reads("tiny")
    ground.settings.change()
    assert names(attempts) == ["d"], "whatever the settings have become, only what runs"


def test_what_runs_stays_when_no_other_is_started() -> None:
    ground = Ground("a", "b")
    ground["a"].loaded = ("tiny",)
    attempts = ground.router.attempts(FACTS)
    attempts.next()
    assert attempts.more
    attempts.start_no_other()
    assert attempts.more
    assert names(attempts) == ["b"]


def test_after_a_change_of_the_settings_only_new_ways_are_tried() -> None:
    ground = Ground("a", "b", "c")
    attempts = ground.router.attempts(FACTS)
    made = attempts.next()
    assert made is not None
    assert attempts.more
    ground.settings.change()
    assert sorted([made.instance, *names(attempts)]) == ["a", "b", "c"]


def test_a_pull_may_follow_where_the_model_was_missing() -> None:
    ground = Ground("a")
    facts = RequestFacts("tiny", RequestKind.GENERATE)
    attempts = ground.router.attempts(facts)
    made = attempts.next()
    assert made is not None
    assert made.because == "running"
    ground["a"].reads()
    ground.settings.change(auto_pull=True)
    following = attempts.next()
    assert following is not None
    assert (following.instance, following.because) == ("a", "pull")
    assert attempts.next() is None


def test_a_pull_that_was_made_is_not_made_again_after_a_change_of_the_settings() -> None:
    ground = Ground("a")
    ground["a"].reads()
    ground.settings.change(auto_pull=True)
    attempts = ground.router.attempts(FACTS)
    made = attempts.next()
    assert made is not None
    assert made.because == "pull"
    ground.settings.change(auto_pull=True)
    assert attempts.next() is None


def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("routing.router", "models.model_lists"):
        monkeypatch.setattr(f"manager.services.{place}.volume_of", lambda _spec: "shared")


def unread(*names_: str) -> Ground:
    ground = Ground()
    for name in names_:
        ground.fleet.add(name).endpoint = None
    return ground


@pytest.mark.parametrize("peeks", [False, True])
def test_the_first_of_many_on_a_volume_lists_it_for_all(
    monkeypatch: pytest.MonkeyPatch, *, peeks: bool
) -> None:
    shared(monkeypatch)
    ground = unread("a", "b", "c", "d")
    attempts = ground.router.attempts(FACTS)
    first = attempts.next()
    assert first is not None
    assert first.because == "unread"
    assert not peeks or attempts.more
    ground[first.instance].reads("other")
    ground.lists.take(cast("Any", ground[first.instance]))
    assert attempts.next() is None


def test_each_volume_that_was_never_listed_is_one_attempt() -> None:
    ground = unread("a", "b")
    attempts = ground.router.attempts(FACTS)
    seen = []
    while (made := attempts.next()) is not None:
        seen.append(made.instance)
        ground[made.instance].reads("other")
        ground.lists.take(cast("Any", ground[made.instance]))
    assert sorted(seen) == ["a", "b"]


def test_where_it_may_be_pulled_the_one_that_was_started_does_that(monkeypatch: pytest.MonkeyPatch) -> None:
    shared(monkeypatch)
    ground = unread("a", "b", "c")
    ground.settings.change(auto_pull=True)
    attempts = ground.router.attempts(FACTS)
    first = attempts.next()
    assert first is not None
    ground[first.instance].endpoint = "http://x"
    ground[first.instance].reads()
    ground.lists.take(cast("Any", ground[first.instance]))
    following = attempts.next()
    assert following is not None
    assert (following.instance, following.because) == (first.instance, "pull")


def test_a_new_list_brings_back_no_other_role() -> None:
    ground = Ground("a", "b")
    ground["b"].reads("small")
    roles = (
        Role("thinking", RequestKind.GENERATE, "tiny", fallbacks=("output",)),
        Role("output", RequestKind.GENERATE, "small"),
    )
    ground.settings.change(roles={role.name: role for role in roles})
    attempts = ground.router.attempts(FACTS._replace(model="thinking"))
    first = attempts.next()
    assert first is not None
    assert (first.instance, first.role) == ("a", "thinking")
    assert attempts.more
    attempts.leave_role()
    assert not attempts.more
    ground["b"].reads("small", "more")
    ground.lists.take(cast("Any", ground["b"]))
    assert attempts.next() is None


def test_after_a_failed_pull_only_running_instances_pull_and_no_other_is_started() -> None:
    ground = Ground("a", "b", "c")
    for name in ("a", "b", "c"):
        ground[name].reads()
    ground["b"].endpoint, ground["b"].phase = None, Phase.STOPPED
    ground.settings.change(auto_pull=True)
    ground.revision.advance()
    attempts = ground.router.attempts(FACTS)
    first = attempts.next()
    assert first is not None
    assert first.because == "pull"
    assert attempts.more
    attempts.pull_failed()
    assert names(attempts) == [name for name in ("a", "c") if name != first.instance]
    attempts = ground.router.attempts(FACTS)
    attempts.start_no_other()
    attempts.pull_failed()
    assert names(attempts) == []
