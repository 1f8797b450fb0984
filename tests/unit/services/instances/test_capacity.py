"""Places of `max_running`: who gets one, what is stopped for it, and what is not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from manager.domain.container import container_name
from manager.domain.instance import Phase, Target
from manager.errors import (
    CancelledByStopError,
    ConflictError,
    EngineUnreachableError,
    LimitReachedError,
    ManagerError,
    Reason,
    StartFailedError,
    UnavailableError,
)
from tests.support.fleet_rig import MANAGER, Rig, until

if TYPE_CHECKING:
    from manager.services.instances.supervisor import Supervisor

GONE = "ollama/ollama:gone"
CRASHING = "ollama/ollama:2"


async def requested(rig: Rig, name: str, *keep: str) -> None:
    """What `Placement` does for a request."""
    try:
        lease = await rig[name].lease()
    except LimitReachedError:
        async with rig.capacity.place_for(name, keep=keep):
            lease = await rig[name].lease()
    lease.release()


# --- one rule for requests, operators and schedules ---


@pytest.mark.parametrize("way", ["request", "start", "begin_start"])
async def test_an_unused_instance_makes_way_whoever_asks(way: str) -> None:
    rig = Rig("a", "b", max_running=1)
    async with rig.running():
        assert await rig.capacity.start("a") is True
        if way == "request":
            await requested(rig, "b")
        elif way == "start":
            assert await rig.capacity.start("b") is True
        else:
            assert rig.capacity.begin_start("b") is True
            why = rig.capacity.waiting("b")
            assert why is not None
            assert (why.code, why.message) == (
                Reason.OVERLOADED,
                "lifecycle.max_running is 1; running already: a; another instance is stopped for it",
            )
            assert rig.capacity.begin_start("b") is True, "it is asked for already"
        await until(lambda: rig.view("b").phase is Phase.READY)
        assert rig.view("a").phase is Phase.STOPPED
        assert rig.capacity.waiting("b") is None
        assert rig.journal.details_of("stopping") == ["to make way for b"]
        assert await rig.capacity.start("b") is False, "it runs already"
        assert rig.capacity.begin_start("b") is False


@pytest.mark.parametrize("protection", ["lease", "pin"])
async def test_what_is_used_or_pinned_makes_way_for_nobody(protection: str) -> None:
    rig = Rig(max_running=1)
    rig.add("a", pinned=protection == "pin")
    rig.add("b")
    async with rig.running():
        await rig.capacity.start("a")
        lease = await rig["a"].lease() if protection == "lease" else None
        expected = r"max_running is 1; running already: a$"
        with pytest.raises(LimitReachedError, match=expected):
            await requested(rig, "b")
        with pytest.raises(LimitReachedError, match=expected):
            await rig.capacity.start("b")
        with pytest.raises(LimitReachedError, match=expected):
            rig.capacity.begin_start("b")
        assert rig.view("b").target is Target.STOPPED
        if lease is not None:
            lease.release()
            assert await rig.capacity.start("b") is True


async def test_an_instance_that_the_request_has_failed_on_is_kept() -> None:
    rig = Rig("a", "b", max_running=1)
    async with rig.running():
        await rig.capacity.start("a")
        with pytest.raises(LimitReachedError):
            await requested(rig, "b", "a")
        assert rig.view("a").phase is Phase.READY


async def test_many_that_want_a_place_at_once_stop_no_more_than_they_need() -> None:
    rig = Rig("a", "b", "c", "d", max_running=2)
    async with rig.running():
        await rig.capacity.start("a")
        await rig.capacity.start("b")
        outcomes = await asyncio.gather(
            *(rig.capacity.start(name) for name in ("c", "c", "d", "c", "d")), return_exceptions=True
        )
        assert [one for one in outcomes if isinstance(one, BaseException)] == []
        assert rig.running_ids() == {"c", "d"}


async def test_of_two_that_want_the_only_place_the_first_gets_it() -> None:
    rig = Rig("a", "b", "c", "d", max_running=2)
    async with rig.running():
        await rig.capacity.start("b")
        lease = await rig["a"].lease()
        outcomes = await asyncio.gather(
            rig.capacity.start("c"), rig.capacity.start("d"), return_exceptions=True
        )
        assert outcomes[0] is True
        assert isinstance(outcomes[1], LimitReachedError)
        lease.release()


async def test_an_instance_that_made_way_does_not_take_its_place_back() -> None:
    rig = Rig("a", "b", max_running=1)
    async with rig.running():
        await rig.capacity.start("a")
        rig.engine.stops.clear()
        starting = asyncio.ensure_future(rig.capacity.start("b"))
        await until(lambda: rig.view("a").phase is Phase.STOPPING)
        again = asyncio.ensure_future(rig["a"].start(explicit=False))
        await asyncio.sleep(0)
        rig.engine.stops.set()
        assert await starting is True
        with pytest.raises(LimitReachedError):
            await again
        assert rig.running_ids() == {"b"}


async def test_an_external_instance_has_no_place() -> None:
    rig = Rig("a", max_running=1)
    rig.add_external()
    async with rig.running():
        with pytest.raises(ConflictError):
            await rig.capacity.start("nas")
        with pytest.raises(ConflictError):
            rig.capacity.begin_stop("nas")


async def test_an_instance_that_stops_anyway_is_waited_for_and_nothing_else_is_stopped() -> None:
    rig = Rig("a", "b", "c", max_running=2)
    async with rig.running():
        await rig.capacity.start("a")
        await rig.capacity.start("b")
        rig.engine.stops.clear()
        rig.capacity.begin_stop("a")
        await until(lambda: rig.view("a").phase is Phase.STOPPING)
        starting = asyncio.ensure_future(rig.capacity.start("c"))
        await asyncio.sleep(0)
        rig.engine.stops.set()
        await starting
        assert rig.running_ids() == {"b", "c"}


async def test_an_instance_that_a_closer_look_finds_in_use_is_kept_for_the_next_in_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig("a", "b", "c", max_running=2)
    async with rig.running():
        await rig.capacity.start("a")
        await rig.capacity.start("b")

        async def in_use(_detail: str) -> bool:
            return False

        monkeypatch.setattr(rig["a"], "make_way", in_use)
        await rig.capacity.start("c")
        assert rig.running_ids() == {"a", "c"}


# --- nothing is stopped in vain ---


def a_victim(rig: Rig, **spec: object) -> Supervisor:
    return rig.add("good", **spec)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["request", "start"])
@pytest.mark.parametrize("hindrance", ["image", "card", "name", "reach"])
async def test_nothing_is_stopped_for_an_instance_that_cannot_start(way: str, hindrance: str) -> None:
    rig = Rig(max_running=1)
    a_victim(rig)
    rig.add("bad", gpu=hindrance == "card", image=GONE if hindrance == "image" else CRASHING)
    async with rig.running():
        await rig.capacity.start("good")
        if hindrance == "card":
            rig.cards.missing["bad"] = "GPU GPU-1 is not in this machine (any more)"
        if hindrance == "name":
            rig.engine.put("m-ollama-bad", "another")
        if hindrance == "reach":
            rig["bad"].reach = None
        with pytest.raises(ManagerError) as caught:
            await (requested(rig, "bad") if way == "request" else rig.capacity.start("bad"))
        assert (
            caught.value.code
            == {
                "image": "image_missing",
                "card": "gpu_missing",
                "name": "name_conflict",
                "reach": "instance_unavailable",
            }[hindrance]
        )
        assert not isinstance(caught.value, LimitReachedError)
        assert rig.view("good").phase is Phase.READY


async def test_nothing_is_stopped_for_an_instance_that_failed_a_short_time_ago() -> None:
    rig = Rig(max_running=1)
    a_victim(rig)
    rig.add("bad", image=CRASHING)
    rig.engine.crashing.add(CRASHING)
    async with rig.running():
        with pytest.raises(StartFailedError):
            await rig.capacity.start("bad")
        await rig.capacity.start("good")
        rig.ahead_s += 2.0  # its back-off is over
        with pytest.raises(StartFailedError, match="no other instance is stopped for bad") as caught:
            await requested(rig, "bad")
        assert caught.value.reason is Reason.CONTAINER_EXITED
        assert caught.value.log_tail == ("its last words",)
        assert rig.view("good").phase is Phase.READY
        rig.ahead_s += 60.0
        rig.engine.crashing.clear()
        await requested(rig, "bad")
        assert rig.running_ids() == {"bad"}


async def test_an_operator_may_try_a_failed_instance_again_at_once() -> None:
    rig = Rig(max_running=1)
    a_victim(rig)
    rig.add("bad", image=CRASHING)
    rig.engine.crashing.add(CRASHING)
    async with rig.running():
        with pytest.raises(StartFailedError):
            await rig.capacity.start("bad")
        await rig.capacity.start("good")
        rig.engine.crashing.clear()
        assert await rig.capacity.start("bad") is True
        assert rig.running_ids() == {"bad"}


@pytest.mark.parametrize("loss", ["image", "card"])
async def test_an_instance_that_could_not_start_again_is_not_stopped(loss: str) -> None:
    rig = Rig(max_running=1)
    a_victim(rig, gpu=loss == "card")
    rig.add("other", image=CRASHING)
    async with rig.running():
        await rig.capacity.start("good")
        if loss == "card":
            rig.cards.missing["good"] = "it is gone"
        else:
            rig.engine.images.discard("ollama/ollama:1")
        with pytest.raises(LimitReachedError, match="not stopped, for it could not start again: good"):
            await requested(rig, "other")
        with pytest.raises(LimitReachedError):
            await rig.capacity.start("other")
        assert rig.view("good").phase is Phase.READY


async def test_an_engine_that_does_not_answer_stops_nothing() -> None:
    rig = Rig("a", "b", max_running=1)
    async with rig.running():
        await rig.capacity.start("a")
        rig.engine.failing["has_image"] = EngineUnreachableError("it hangs")
        with pytest.raises(UnavailableError, match="it hangs"):
            await rig.capacity.start("b")
        assert rig.view("a").phase is Phase.READY
        assert await rig.capacity.stop("a") is True


# --- a start without waiting ---


async def test_a_start_that_waits_for_a_place_can_be_taken_back() -> None:
    rig = Rig("a", "b", max_running=1)
    async with rig.running():
        await rig.capacity.start("a")
        rig.engine.stops.clear()
        assert rig.capacity.begin_start("b") is True
        assert rig.capacity.begin_stop("b") is True, "before anything was done"
        assert rig.capacity.waiting("b") is None
        assert rig.capacity.begin_start("b") is True
        await until(lambda: rig.view("a").phase is Phase.STOPPING)
        assert await rig.capacity.stop("b") is True
        rig.engine.stops.set()
        await until(lambda: rig.view("a").phase is Phase.STOPPED)
        assert rig.capacity.begin_stop("b") is False
        assert rig.view("b").phase is Phase.STOPPED
        assert await rig.capacity.start("b") is True


async def test_a_start_without_waiting_that_gets_no_place_says_why() -> None:
    rig = Rig(max_running=1)
    a_victim(rig)
    rig.add("bad", image=GONE)
    async with rig.running():
        await rig.capacity.start("good")
        assert rig.capacity.begin_start("bad") is True
        await until(lambda: "start_refused" in rig.journal.kinds)
        assert ("start_refused", "bad", Reason.IMAGE_MISSING) in rig.journal.events
        assert rig.capacity.waiting("bad") is None
        assert rig.view("good").phase is Phase.READY


async def test_a_start_without_waiting_whose_card_is_gone_is_refused_at_once() -> None:
    rig = Rig(max_running=1)
    a_victim(rig)
    rig.add("bad", gpu=True)
    async with rig.running():
        await rig.capacity.start("good")
        rig.cards.missing["bad"] = "it is gone"
        with pytest.raises(UnavailableError) as caught:
            rig.capacity.begin_start("bad")
        assert caught.value.reason is Reason.GPU_MISSING


async def test_a_stop_cancels_a_start_that_has_its_place() -> None:
    rig = Rig("a", max_running=1)
    async with rig.running():
        starting = asyncio.ensure_future(rig.capacity.start("a"))
        await asyncio.sleep(0)
        await rig.capacity.stop("a")
        with pytest.raises(CancelledByStopError):
            await starting


# --- prewarm ---


async def test_a_container_that_runs_already_has_its_place_before_any_prewarm() -> None:
    rig = Rig("low", max_running=1)
    rig.add("pre", prewarm=True, priority=10)
    rig.engine.put(container_name(MANAGER, "low"), "low")
    async with rig.running():
        assert rig.running_ids() == {"low"}
        assert ("prewarm_waits", "pre", Reason.OVERLOADED) in rig.journal.events


async def test_the_end_of_all_instances_starts_no_instance_that_waits_for_a_place() -> None:
    rig = Rig(max_running=1)
    rig.add("first", prewarm=True, priority=1)
    rig.add("late", prewarm=True)
    async with rig.running():
        await until(lambda: rig.view("first").phase is Phase.READY)
        await rig.capacity.stop_all()
        assert rig.running_ids() == set()
        with pytest.raises(LimitReachedError, match="ends"):
            await rig.capacity.start("late")
        assert rig.running_ids() == set()


async def test_a_prewarmed_instance_waits_for_a_place_says_so_and_stops_nothing() -> None:
    rig = Rig(max_running=1)
    rig.add("late", prewarm=True)
    rig.add("first", prewarm=True, priority=1)
    async with rig.running():
        await until(lambda: rig.view("first").phase is Phase.READY)
        assert rig.view("late").phase is Phase.STOPPED
        why = rig.capacity.waiting("late")
        assert why is not None
        assert (why.code, why.message) == (
            Reason.OVERLOADED,
            "lifecycle.max_running is 1; running already: first; it starts when a place is free",
        )
        assert ("prewarm_waits", "late", Reason.OVERLOADED) in rig.journal.events
        await rig.capacity.stop("first")
        await until(lambda: rig.view("late").phase is Phase.READY)
        assert rig.capacity.waiting("late") is None


async def test_a_stop_takes_back_the_wait_of_a_prewarmed_instance() -> None:
    rig = Rig(max_running=1)
    rig.add("first", prewarm=True, priority=1)
    rig.add("late", prewarm=True)
    async with rig.running():
        await until(lambda: rig.capacity.waiting("late"))
        assert rig.capacity.begin_stop("late") is True
        assert rig.capacity.waiting("late") is None
        assert await rig.capacity.stop("first") is True
        seen = rig.cards.readings
        await until(lambda: rig.cards.readings > seen + 3)  # as often as places are looked for
        assert rig.view("late").phase is Phase.STOPPED


async def test_a_waiting_instance_that_a_request_starts_waits_no_longer() -> None:
    rig = Rig(max_running=1)
    rig.add("first", prewarm=True, priority=1)
    rig.add("late", prewarm=True)
    async with rig.running():
        await until(lambda: rig.view("first").phase is Phase.READY)
        await requested(rig, "late")
        await until(lambda: rig.capacity.waiting("late") is None)
        assert rig.running_ids() == {"late"}


async def test_a_sweep_without_a_daemon_prewarms_nothing() -> None:
    rig = Rig(resume_idle_clock=True)
    rig.add("a", prewarm=True)
    async with rig.running():
        assert rig.capacity.waiting("a") is None
        assert rig.view("a").phase is Phase.STOPPED


async def test_an_operator_who_does_not_wait_may_try_a_failed_instance_again_at_once() -> None:
    rig = Rig(max_running=1)
    a_victim(rig)
    rig.add("bad", image=CRASHING)
    rig.engine.crashing.add(CRASHING)
    async with rig.running():
        with pytest.raises(StartFailedError):
            await rig.capacity.start("bad")
        await rig.capacity.start("good")
        rig.engine.crashing.clear()
        assert rig.capacity.begin_start("bad") is True
        await until(lambda: rig.running_ids() == {"bad"})
        assert "start_refused" not in rig.journal.kinds
