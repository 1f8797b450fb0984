"""Whatever becomes of the attempts: no lease is left, nothing follows the first byte, each ends once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from manager.domain.breaker import BreakerLimits
from manager.domain.judgement import ABOUT_THE_REQUEST, Judgement
from manager.domain.record import Outcome
from manager.domain.routing import Because
from manager.domain.target import Target
from manager.errors import Reason
from manager.services.routing.attempting import WAIT, Trouble
from tests.support.attempts import FACTS, Stage, attempt, decision, target, unavailable

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from manager.services.routing.attempting import Step

T = TypeVar("T")

SOUND = BreakerLimits(2, 30, 300)
REASONS = st.sampled_from([*Reason])
# What may become of a request that was given a target.
EVENTS = st.sampled_from(
    [
        "cannot connect",
        "stale",
        "dies",
        "first byte is late",
        "is silent",
        "total deadline",
        "our own lack",
        "error",
        "unknown error",
        "missing",
        "about the request",
        "sign of life",
        "spent",
        "settings change",
        "client leaves",
    ]
)
PREPARED = st.sampled_from(["leases", "starts", "fails", "defect"])


class Play:
    """One request and what it is put through."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.one = stage.request()
        self.sends: list[str] = []
        self.killed = self.defect = False

    def run(self, events: list[str]) -> None:
        """Go from step to step until the request has an outcome or the events are used up."""
        step: Step | None = self.one.enter(FACTS)
        coming = iter(events)
        while not isinstance(step, Trouble):
            step = self._settled(step)
            if not isinstance(step, Target) or self.defect:
                return
            self._check(step)
            event = next(coming, "client leaves")
            if event not in ("cannot connect", "our own lack"):
                self.sends.append(step.instance)
                self.one.sent()
            step = self._happens(event)
            if step is None:
                return

    def _settled(self, step: Step | None) -> Step | None:
        while step is WAIT:
            assert sum(self.stage.placement.held.values()) == (1 if self.one.is_waiting else 0)
            try:
                step = finished(self.one.wait())
            except ZeroDivisionError:
                self.defect = True
                return step
        return step

    def _check(self, to: Target) -> None:
        assert not self.one.is_delivered, "nothing follows the first byte"
        attempt = self.one.attempt
        assert attempt is not None
        assert not self.killed or attempt.because == "paid", "what may have killed a server goes to no other"
        assert self.stage.placement.held == {to.instance: 1}
        assert not self.one.is_waiting

    def _happens(self, event: str) -> Step | None:  # noqa: C901, PLR0911, PLR0912  (one line for each event)
        one, stage = self.one, self.stage
        match event:
            case "cannot connect":
                return one.failed(Reason.UPSTREAM_UNREACHABLE, "", sent=False)
            case "stale":
                return one.failed(Reason.UPSTREAM_UNREACHABLE, "", sent=False, stale=True)
            case "dies":
                self.killed = True
                return one.failed(Reason.UPSTREAM_ERROR, "", sent=True)
            case "first byte is late":
                return self._settled(one.look(stage.clock.advance(60)))
            case "is silent":
                stage.placement.silent.add(one.work.instance)
                return one.look(stage.clock.advance(1))
            case "total deadline":
                stage.clock.now = one.total_deadline
                step = one.look(stage.clock.now)
                assert isinstance(step, Trouble)
                return step
            case "our own lack":
                return one.failed(Reason.OVERLOADED, "", sent=False, ours=True)
            case "error":
                return one.answered(Judgement(Reason.OVERLOADED), "busy", "answer")
            case "unknown error":
                return one.answered(Judgement(Reason.UPSTREAM_ERROR, may_start=False), "what", "answer")
            case "missing":
                return one.answered(Judgement(Reason.MODEL_MISSING), "not found", "answer")
            case "about the request":
                return one.answered(ABOUT_THE_REQUEST)
            case "sign of life":
                one.delivered()
                return one.failed(Reason.ATTEMPT_TIMEOUT, "", sent=True)
            case "spent":
                one.spend()
                return one.failed(Reason.ATTEMPT_TIMEOUT, "", sent=True)
            case "settings change":
                stage.router.version += 1
                return one.failed(Reason.ATTEMPT_TIMEOUT, "", sent=True)
            case _:
                return None


def finished(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that waits for nothing."""
    try:
        work.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("it waits")


attempts = st.lists(
    st.tuples(st.sampled_from("abcde"), st.sampled_from(get_args(Because)), st.none() | REASONS),
    max_size=5,
    unique_by=lambda one: one[0],
)


@given(
    attempts,
    st.dictionaries(st.sampled_from("abcde"), PREPARED),
    st.sets(st.sampled_from("abcde")),
    st.sets(st.sampled_from("abcde")),
    st.lists(EVENTS, max_size=12),
    st.lists(st.sampled_from(get_args(Outcome)), min_size=1, max_size=3),
    st.dictionaries(st.sampled_from("abcde"), st.integers(1, 3)),
    st.sampled_from([BreakerLimits(2, 30, 300), BreakerLimits(1, 0.0, 0.0)]),
)
@example([("a", "loaded", None)], {}, {"a"}, set(), ["cannot connect", "cannot connect"], ["cut"], {}, SOUND)
@example(
    [("a", "loaded", None), ("b", "loaded", None)], {}, set(), {"a"}, ["stale", "stale"], ["ok"], {}, SOUND
)
@example(
    [("a", "loaded", None)], {"a": "defect"}, {"a"}, set(), ["stale", "stale"], ["refused", "ok"], {}, SOUND
)
def test_no_sequence_of_failures_leaks_a_lease_repeats_what_may_not_be_or_ends_twice(  # noqa: PLR0917
    ways: list[tuple[str, Because, Reason | None]],
    prepared: dict[str, str],
    gone: set[str],
    once: set[str],
    events: list[str],
    outcomes: list[Outcome],
    failures: dict[str, int],
    limits: BreakerLimits,
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        stage = Stage(breaker=limits)
        stage.use_clock(monkeypatch)
        for name, count in failures.items():  # of earlier requests
            for _ in range(count):
                stage.breakers.failed(name, stage.breakers.admit(name), Reason.UPSTREAM_ERROR)
        made = [attempt(name, because, fallback=reason) for name, because, reason in ways]
        stage.router.decision = decision(*made) if made else stage.router.decision
        stage.placement.gone = gone
        stage.placement.targets = {name: target(name, repeatable=False) for name in once}
        results: dict[str, Any] = {
            "leases": None,
            "starts": 5.0,
            "fails": unavailable(),
            "defect": ZeroDivisionError(),
        }
        stage.placement.prepares = {name: results[how] for name, how in prepared.items()}
        play = Play(stage)
        play.run(events)
        one = play.one
        assert sum(stage.placement.held.values()) <= 1
        for outcome in outcomes:
            one.close(outcome)
        assert stage.placement.held == {}
        assert sorted(stage.placement.released) == sorted(stage.placement.granted)
        assert [record.outcome for record in stage.ended] == outcomes[:1]
        assert stage.status.at_work() == {}
        assert not any(breaker.is_probed for breaker in stage.breakers._breakers.values())
        assert finished(one.wait()) is None, "nothing is left to wait for"
        for name in once:
            assert play.sends.count(name) <= 1
        # Each attempt once, each kept connection once more, and one recovery.
        assert len(play.sends) <= 2 * max(1, len(made)) + 2
        assert one.record.attempts >= len(play.sends)
        assert len(one.record.failed_attempts) <= one.record.attempts
