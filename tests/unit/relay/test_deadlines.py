"""A phase of a connection lasts from its first look until it changes or makes progress."""

from __future__ import annotations

from manager.relay.deadlines import LEAST_PROGRESS_BYTES, Phase, Stopwatch


def test_a_phase_begins_at_the_first_look_that_finds_it() -> None:
    watch = Stopwatch()
    assert watch.age_s(Phase.HEAD, 0, 0, 100.0) == 0
    assert watch.age_s(Phase.HEAD, 0, 0, 130.0) == 30
    assert watch.age_s(Phase.BODY, 0, 0, 131.0) == 0
    assert watch.age_s(Phase.BODY, 0, 0, 132.0) == 1


def test_the_same_phase_of_another_request_begins_anew() -> None:
    watch = Stopwatch()
    watch.age_s(Phase.IDLE, 1, 0, 0.0)
    assert watch.age_s(Phase.IDLE, 2, 0, 4.0) == 0
    assert watch.age_s(Phase.IDLE, 2, 0, 8.0) == 4


def test_only_so_many_bytes_are_progress() -> None:
    watch = Stopwatch()
    watch.age_s(Phase.BODY, 0, 0, 0.0)
    assert watch.age_s(Phase.BODY, 0, LEAST_PROGRESS_BYTES - 1, 50.0) == 50
    assert watch.age_s(Phase.BODY, 0, LEAST_PROGRESS_BYTES, 60.0) == 0


def test_a_buffer_that_empties_is_progress_too() -> None:
    watch = Stopwatch()
    watch.age_s(Phase.UNREAD, 0, 8 * LEAST_PROGRESS_BYTES, 0.0)
    assert watch.age_s(Phase.UNREAD, 0, 4 * LEAST_PROGRESS_BYTES, 50.0) == 0
