from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from manager.services.instances.idle_clock import IdleClock

if TYPE_CHECKING:
    from manager.services.world import World

NOON = datetime(2026, 8, 1, 12, 0, tzinfo=UTC)


class Clocks:
    """The monotonic clock and the wall clock, which a suspend and an operator move apart."""

    def __init__(self) -> None:
        self.monotonic = 1000.0
        self.wall = NOON

    def world(self) -> World:
        return cast("World", SimpleNamespace(now=lambda: self.monotonic, utcnow=lambda: self.wall))

    def run_s(self, seconds: float) -> None:
        self.monotonic += seconds
        self.wall += timedelta(seconds=seconds)


def remaining(clock: IdleClock) -> float | None:
    return clock.remaining_s(60, pinned=False, in_flight=0)


def test_the_clock_runs_from_the_last_use() -> None:
    clocks = Clocks()
    clock = IdleClock(clocks.world(), None)
    assert remaining(clock) is None
    clock.used()
    clocks.run_s(20)
    assert remaining(clock) == 40
    assert clock.last_used_at == NOON
    clock.used()
    assert remaining(clock) == 60


def test_a_suspend_is_not_idle_time() -> None:
    clocks = Clocks()
    clock = IdleClock(clocks.world(), None)
    clock.used()
    clocks.wall += timedelta(hours=8)  # the monotonic clock stands still in a suspend
    assert remaining(clock) == 60


def test_a_wall_clock_that_is_set_moves_nothing() -> None:
    clocks = Clocks()
    clock = IdleClock(clocks.world(), None)
    clock.used()
    clocks.wall -= timedelta(days=400)
    clocks.run_s(20)
    assert remaining(clock) == 40


def test_a_stopped_clock_has_nothing_left_to_run() -> None:
    clocks = Clocks()
    clock = IdleClock(clocks.world(), None)
    clock.used()
    clock.stop()
    assert remaining(clock) is None
    assert clock.unused_since(0) is None
    assert clock.last_used_at == NOON


def test_a_resumed_clock_goes_on_from_the_stored_use() -> None:
    clocks = Clocks()
    clock = IdleClock(clocks.world(), NOON - timedelta(seconds=45))
    clock.resume(None)
    assert remaining(clock) == 15
    clocks.run_s(20)
    assert remaining(clock) == 0


def test_a_container_that_was_started_after_its_last_use_is_idle_since_then() -> None:
    clocks = Clocks()
    clock = IdleClock(clocks.world(), NOON - timedelta(hours=2))
    clock.resume(NOON - timedelta(seconds=10))
    assert remaining(clock) == 50
    clock = IdleClock(clocks.world(), NOON - timedelta(seconds=5))
    clock.resume(NOON - timedelta(seconds=10))
    assert remaining(clock) == 55


def test_with_no_use_stored_a_resumed_clock_starts_now() -> None:
    clocks = Clocks()
    clock = IdleClock(clocks.world(), None)
    clock.resume(None)
    assert (remaining(clock), clock.last_used_at) == (60, NOON)


def test_a_stored_use_of_the_future_is_one_of_now() -> None:
    clocks = Clocks()
    clock = IdleClock(clocks.world(), NOON + timedelta(hours=1))
    clock.resume(None)
    assert remaining(clock) == 60


def test_an_instance_in_use_is_not_unused() -> None:
    clocks = Clocks()
    clock = IdleClock(clocks.world(), None)
    clock.used()
    assert clock.unused_since(0) == 1000
    assert clock.unused_since(1) is None
