"""Refusals are all counted, and logged at a bounded rate in bounded memory."""

from __future__ import annotations

import pytest
import structlog

from manager.services.refusals import Refusals
from manager.wire.access import REASONS


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def refusals(clock: Clock) -> Refusals:
    return Refusals(now=clock)


def test_five_hundred_wrong_keys_are_counted_and_leave_three_lines(refusals: Refusals) -> None:
    with structlog.testing.capture_logs() as lines:
        for _ in range(500):
            refusals.refused("key_wrong", "192.0.2.7", "/api/runtime/compute/instances")
    assert refusals.counts["key_wrong"] == 500
    assert [line["refused_in_this_minute"] for line in lines] == [1, 10, 100]
    assert {(line["event"], line["reason"], line["address"], line["log_level"]) for line in lines} == {
        ("refused", "key_wrong", "192.0.2.7", "warning")
    }


def test_another_address_and_another_minute_get_lines_of_their_own(refusals: Refusals, clock: Clock) -> None:
    with structlog.testing.capture_logs() as lines:
        for address in ("a", "b", "a"):
            refusals.refused("key_missing", address, "/")
        clock.now = 60.0
        refusals.refused("key_missing", "a", "/")
    assert [line["address"] for line in lines] == ["a", "b", "a"]


def test_a_flood_from_many_addresses_leaves_a_bounded_number_of_lines(
    refusals: Refusals, clock: Clock
) -> None:
    with structlog.testing.capture_logs() as lines:
        for number in range(5000):
            refusals.refused("host_not_allowed", f"2001:db8::{number:x}", "/")
        assert len(lines) == 31
        assert [line["event"] for line in lines[-2:]] == ["refused", "refusals_not_logged"]
        clock.now = 60.0
        refusals.refused("host_not_allowed", "a", "/")
    assert lines[-1]["address"] == "a"
    assert refusals.counts["host_not_allowed"] == 5001
    assert len(refusals._by_address) <= 256


def test_the_address_seen_first_is_forgotten_at_the_bound(refusals: Refusals) -> None:
    for number in range(257):
        refusals.refused("key_wrong", str(number), "/")
    assert list(refusals._by_address) == [str(number) for number in range(1, 257)]


def test_the_labels_are_a_fixed_set_and_a_path_cannot_break_a_line(refusals: Refusals) -> None:
    with structlog.testing.capture_logs() as lines:
        refusals.refused("whatever a client can think of", "a", "/\n\x1b[31m\u2028" + "x" * 5000)
    assert set(refusals.counts) == {*REASONS, "other"}
    assert refusals.counts["other"] == 1
    (line,) = lines
    assert line["path"].isprintable()
    assert len(line["path"]) <= 200
