"""Requests and slots: queued before an attempt, spilled to the next instance, refused, given back."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.history import decision_values
from manager.domain.judgement import Judgement
from manager.domain.roles import RequestKind, Role, RoutingSettings
from manager.domain.routing import Refused
from manager.errors import Reason
from manager.services.routing.attempting import WAIT, Trouble, first_target
from manager.services.routing.router import Attempts
from tests.support.attempts import FACTS, Stage, attempt, decision, shown, unavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from manager.domain.routing import Attempt
    from manager.services.routing.attempting import Attempting

ORDERED = (attempt("a"), attempt("b", fallback=Reason.INSTANCE_UNAVAILABLE))
APART = (attempt("a"), attempt("b", fallback=Reason.GPU_MISSING)._replace(choice=1))


def staged(
    monkeypatch: pytest.MonkeyPatch,
    attempts: Sequence[Attempt],
    *roles: Role,
    slots: dict[str, int | None] | None = None,
) -> Stage:
    stage = Stage()
    stage.use_clock(monkeypatch)
    stage.router.decision = decision(*attempts, role=roles[0].name if roles else None)
    stage.settings.routing = RoutingSettings({role.name: role for role in roles})
    stage.slots_of = {"a": 1, "b": 1} if slots is None else slots
    stage.settings.version += 1
    stage.slots.refresh()
    return stage


def role(name: str = "x", **values: Any) -> Role:
    return Role(name, RequestKind.GENERATE, "tiny", **values)


def in_use(stage: Stage) -> dict[str, int]:
    return {one.id: one.in_use for one in stage.slots.instances() if one.in_use}


def entered(stage: Stage, where: str) -> Attempting:
    one = stage.request()
    assert shown(one.enter(FACTS)) == where
    one.sent()
    return one


def full(one: Attempting) -> list[tuple[str, Reason, str]]:
    passed_over = decision_values(one.seen)["passed_over"]
    return [(each["instance"], each["reason"], each["detail"]) for each in passed_over]


def test_a_request_holds_a_slot_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = staged(monkeypatch, [attempt("a")])
    one = entered(stage, "a")
    assert in_use(stage) == {"a": 1}
    one.close("ok")
    one.close("ok")
    assert in_use(stage) == {}


async def test_a_request_without_a_slot_waits_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = staged(monkeypatch, [attempt("a")])
    first, second = entered(stage, "a"), stage.request()
    assert second.enter(FACTS) is WAIT
    assert second.waits_for == "a slot, 0 ahead in the queue"
    waiting = asyncio.ensure_future(second.wait())
    await asyncio.sleep(0)
    stage.clock.advance(1.2)
    first.close("ok")
    assert shown(await waiting) == "a"
    second.sent()
    assert second.record.queue_ms == pytest.approx(1200)
    assert second.waits_for == "a"
    second.close("ok")
    assert in_use(stage) == stage.placement.held == {}


def test_a_full_instance_is_passed_by_for_one_that_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = staged(monkeypatch, ORDERED)
    entered(stage, "a")
    second = entered(stage, "b")
    assert (second.record.fallback, second.record.fallback_reason) == (True, Reason.OVERLOADED)
    assert second.record.fallback_from == "a"
    assert full(second) == [("a", Reason.OVERLOADED, "all its slots are taken")]
    equal = staged(monkeypatch, [attempt("a"), attempt("b")])
    entered(equal, "a")
    assert entered(equal, "b").record.fallback is False


async def test_a_fallback_is_used_only_after_the_time_in_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = staged(monkeypatch, APART, role(queue_wait_s=0.0))
    entered(stage, "a")
    second = stage.request()
    assert second.enter(FACTS) is WAIT
    assert shown(await second.wait()) == "b"
    assert second.record.fallback_reason is Reason.OVERLOADED
    assert full(second) == [("a", Reason.OVERLOADED, "no slot became free within 0 s")]


def test_a_fallback_is_used_at_once_where_the_queue_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = staged(monkeypatch, APART, role(queue_length=0))
    first = entered(stage, "a")
    assert full(first) == []
    second = entered(stage, "b")
    assert second.record.fallback_reason is Reason.QUEUE_FULL
    assert full(second) == [("a", Reason.QUEUE_FULL, "the queue of the role 'x' is full")]


async def test_a_request_that_has_left_a_queue_does_not_return_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = staged(monkeypatch, APART, role(queue_wait_s=0.0))
    entered(stage, "a")
    other = stage.request()
    assert other.enter(FACTS) is WAIT
    assert shown(await other.wait()) == "b"
    second = stage.request()
    assert second.enter(FACTS) is WAIT
    found = await first_target(second, WAIT)
    assert isinstance(found, Trouble)
    assert found.reason is Reason.OVERLOADED


async def test_the_recheck_keeps_a_request_at_its_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = staged(monkeypatch, APART, role(queue_length=0), role("y"))
    entered(stage, "a")
    stage.router.decision = decision(*APART, role="y")
    holder = stage.request()
    holder.record.role = "y"
    stage.router.decision = decision(attempt("b"), role="y")
    assert shown(holder.enter(FACTS)) == "b"
    stage.router.decision = decision(*APART, role="y")
    second = stage.request()
    assert second.enter(FACTS) is WAIT  # for `a`
    attempts = second._attempts
    assert isinstance(attempts, Attempts)
    attempts.skip()  # as after the time in that queue
    assert second._choose() == ("b",)
    assert second._choose() == ("b",)


async def test_all_waits_of_a_request_together_have_the_time_of_the_role(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = staged(monkeypatch, [attempt("a")], role(queue_wait_s=10.0))
    entered(stage, "a")
    one = stage.request()
    assert one.enter(FACTS) is WAIT
    one._queued_s = 10.0  # it has waited for another slot before
    found = await one.wait()
    assert isinstance(found, Trouble)
    assert found.reason is Reason.OVERLOADED


def test_a_full_queue_refuses_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = staged(monkeypatch, [attempt("a")], role(queue_length=0))
    entered(stage, "a")
    found = stage.request().enter(FACTS)
    message = "the queue of the role 'x' is full (queue_full)"
    assert found == Trouble(Reason.QUEUE_FULL, message, 1.0, refused="queue_full")


async def test_the_end_of_the_time_in_the_queue_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = staged(monkeypatch, [attempt("a")], role(queue_wait_s=0.0))
    entered(stage, "a")
    second = stage.request()
    assert second.enter(FACTS) is WAIT
    stage.clock.advance(3.0)
    found = await second.wait()
    message = "no slot became free within 0 s (overloaded)"
    assert found == Trouble(Reason.OVERLOADED, message, refused="overloaded")
    assert second.record.queue_ms == pytest.approx(3000)
    assert stage.slots.lanes()[0].queued == 0


async def test_a_request_that_another_daemon_lets_not_wait_is_refused_in_its_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = staged(monkeypatch, [attempt("a")])
    entered(stage, "a")
    second = stage.request()
    assert second.enter(FACTS) is WAIT
    waits = asyncio.ensure_future(second.wait())
    await asyncio.sleep(0)
    assert second.place is not None
    second.place.settle("refused")
    found = await waits
    assert isinstance(found, Trouble)
    assert (found.reason, found.refused) == (Reason.OVERLOADED, "overloaded")
    assert "no more requests may wait" in found.message
    assert second.place is None


def test_slots_that_are_reserved_for_others_are_no_place_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    safe = role("safe", reserved=1, instances=("a",))
    stage = staged(monkeypatch, [attempt("a")], role(), safe)
    found = stage.request().enter(FACTS)
    assert isinstance(found, Trouble)
    assert (found.reason, found.refused) == (Reason.POLICY, "policy")


async def test_the_wait_of_a_client_that_leaves_the_queue_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = staged(monkeypatch, [attempt("a")])
    entered(stage, "a")
    one = stage.request()
    assert one.enter(FACTS) is WAIT
    stage.clock.advance(50.0)
    one.close("client_gone")
    assert one.record.queue_ms == 50_000


def test_the_time_of_a_failed_attempt_is_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = staged(monkeypatch, ORDERED)
    one = entered(stage, "a")
    stage.clock.advance(45.0)
    assert shown(one.failed(Reason.ATTEMPT_TIMEOUT, "", sent=True)) == "b"
    one.sent()
    assert one.record.queue_ms == 0


def test_an_unload_reaches_the_model_of_a_role_for_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = staged(monkeypatch, [attempt("a", role="deep")])
    stage.router.decision = replace(stage.router.decision, role="deep", is_async=True)
    assert shown(stage.request().enter_running(FACTS)) == "a"


async def test_a_client_that_leaves_gives_its_place_back_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = staged(monkeypatch, [attempt("a")])
    first, second, third = entered(stage, "a"), stage.request(), stage.request()
    assert [one.enter(FACTS) for one in (second, third)] == [WAIT, WAIT]
    waiting = asyncio.ensure_future(second.wait())
    await asyncio.sleep(0)
    first.close("ok")  # the slot is given to the second, which does not know it yet
    waiting.cancel()
    second.close("client_gone")
    assert shown(await third.wait()) == "a"
    third.close("ok")
    assert in_use(stage) == {}


async def test_a_failed_attempt_gives_its_slot_back_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = staged(monkeypatch, ORDERED)
    one = entered(stage, "a")
    assert shown(one.failed(Reason.ATTEMPT_TIMEOUT, "", sent=True)) == "b"
    assert in_use(stage) == {"b": 1}
    one.sent()
    assert isinstance(one.failed(Reason.ATTEMPT_TIMEOUT, "", sent=True), Trouble)
    assert in_use(stage) == {}


async def test_a_start_again_keeps_the_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = staged(monkeypatch, [attempt("a")])
    stage.placement.gone.add("a")
    one = stage.request()
    assert shown(one.enter(FACTS)) == "a"
    assert one.failed(Reason.UPSTREAM_UNREACHABLE, "", sent=False) is WAIT
    assert in_use(stage) == {"a": 1}
    assert shown(await one.wait()) == "a"
    assert in_use(stage) == {"a": 1}


async def test_a_start_that_fails_gives_the_slot_back(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = staged(monkeypatch, [attempt("a", "startable")])
    stage.placement.prepares["a"] = unavailable()
    one = stage.request()
    assert one.enter(FACTS) is WAIT
    assert in_use(stage) == {"a": 1}
    assert isinstance(await one.wait(), Trouble)
    assert in_use(stage) == {}


async def test_a_request_that_no_instance_is_left_for_is_decided_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = staged(monkeypatch, [attempt("a")])
    entered(stage, "a")
    second = stage.request()
    assert second.enter(FACTS) is WAIT
    waiting = asyncio.ensure_future(second.wait())
    await asyncio.sleep(0)
    away = Refused("unavailable", Reason.INSTANCE_UNAVAILABLE, "a is drained")
    stage.router.decision = decision(refused=away)
    list(stage.slots.choose_again())
    found = await waiting
    assert isinstance(found, Trouble)
    assert found.message == "a is drained"
    assert stage.slots.lanes()[-1].queued == 0


async def test_a_request_that_has_failed_before_reports_that(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = staged(monkeypatch, ORDERED)
    one = entered(stage, "a")
    entered(stage, "b")
    assert one.answered(Judgement(Reason.UPSTREAM_ERROR), "broken") is WAIT
    waiting = asyncio.ensure_future(one.wait())
    await asyncio.sleep(0)
    stage.router.decision = decision(refused=Refused("unavailable", Reason.INSTANCE_UNAVAILABLE, "gone"))
    list(stage.slots.choose_again())
    found = await waiting
    assert isinstance(found, Trouble)
    assert found.message == "broken"


async def test_a_slot_of_an_instance_that_is_no_choice_any_more_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = staged(monkeypatch, ORDERED)
    one = entered(stage, "a")
    other = entered(stage, "b")
    assert one.answered(Judgement(Reason.UPSTREAM_ERROR), "broken") is WAIT
    waiting = asyncio.ensure_future(one.wait())
    await asyncio.sleep(0)
    other.close("ok")
    stage.router.decision = decision(attempt("c"))
    stage.router.version += 1  # the settings change between the slot and its use
    assert shown(await waiting) == "c"
    one.close("ok")
    assert in_use(stage) == {}


async def test_a_first_slot_that_is_no_choice_any_more_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = staged(monkeypatch, [attempt("a")], slots={"a": 1, "c": 1})
    first, second = entered(stage, "a"), stage.request()
    assert second.enter(FACTS) is WAIT
    waiting = asyncio.ensure_future(second.wait())
    await asyncio.sleep(0)
    first.close("ok")
    stage.router.decision = decision(attempt("c"))
    second._choose()  # as the recheck of the queue does
    assert shown(await waiting) == "c"
    assert in_use(stage) == {"c": 1}


def test_a_request_under_way_takes_a_slot_when_limits_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = staged(monkeypatch, [attempt("a")], slots={"a": None})
    one = entered(stage, "a")
    assert not stage.slots.is_on
    assert (one.lane, one.holds) == (None, "a")
    stage.slots_of = {"a": 1}
    stage.slots.refresh()
    assert in_use(stage) == {"a": 1}
    assert stage.request().enter(FACTS) is WAIT
    one.close("ok")


def test_a_role_for_runs_refuses_a_request_and_takes_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = staged(monkeypatch, [attempt("a")])
    stage.router.decision = replace(stage.router.decision, role="deep", is_async=True)
    found = stage.request().enter(FACTS)
    message = "the role 'deep' takes runs only (async_only): POST /api/v1/runs"
    assert found == Trouble(Reason.POLICY, message, refused="async_only")
    run = stage.request()
    run.is_run = True
    assert shown(run.enter(FACTS)) == "a"


async def test_a_run_waits_as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = staged(monkeypatch, [attempt("a")], role(queue_length=0, queue_wait_s=0.0))
    first, run = entered(stage, "a"), stage.request()
    run.is_run = True
    assert run.enter(FACTS) is WAIT
    waiting = asyncio.ensure_future(run.wait())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    first.close("ok")
    assert shown(await waiting) == "a"


async def test_an_attempt_has_the_time_of_its_place_whatever_the_server_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed = attempt("a", "running")._replace(timeout_s=5.0)
    stage = staged(monkeypatch, [timed, attempt("b")], slots={})
    stage.placement.loading["a"] = True
    one = entered(stage, "a")
    assert one.look(stage.clock.advance(4.9)) is None
    assert one.look(stage.clock.advance(0.2)) is WAIT
    assert shown(await one.wait()) == "b"
