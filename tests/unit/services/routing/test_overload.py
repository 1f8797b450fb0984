"""The owner of what is known of the load of instances."""

from __future__ import annotations

import pytest

from manager.domain.overload import Overloads
from manager.services.routing import overload as module
from manager.services.routing.overload import Overload
from manager.services.world import Revision
from tests.support.attempts import Clock

FULL = Overloads("the server has too many requests", {})


class Bench:
    def __init__(self) -> None:
        self.clock = Clock()
        self.revision = Revision()
        self.overload = Overload(self.revision, now=self.clock)

    def answers(self, value_ms: float, times: int = 1, instance: str = "a", key: str = "m") -> None:
        for _ in range(times):
            self.clock.advance(0.1)
            self.overload.first_token(instance, key, value_ms)

    def slow(self, instance: str = "a", key: str = "m") -> None:
        self.answers(100, 30, instance, key)
        self.answers(900, 8, instance, key)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_the_recent_time_follows_the_last_answers(bench: Bench) -> None:
    assert bench.overload.recent_ms("a", "m") is None
    bench.answers(100, 100)
    assert bench.overload.recent_ms("a", "m") == 100.0
    bench.answers(160, 16)
    recent_ms = bench.overload.recent_ms("a", "m")
    assert recent_ms is not None
    assert recent_ms > 150.0, "the mean of all would be below 110"
    assert bench.overload.recent_ms("b", "m") is bench.overload.recent_ms("a", "n") is None


@pytest.mark.parametrize(
    ("told_s", "kept_s"), [(None, 1.0), (5.0, 5.0), (3600.0, 30.0), (float("inf"), 30.0)]
)
def test_a_server_that_refuses_requests_is_overloaded_for_as_long_as_it_says_within_bounds(
    bench: Bench, told_s: float | None, kept_s: float
) -> None:
    bench.overload.saturated("a", told_s)
    assert bench.revision.number == 1
    assert bench.overload.of("a") == FULL
    assert bench.overload.of("b") is None
    bench.clock.advance(kept_s - 0.01)
    assert bench.overload.of("a") == FULL
    bench.clock.advance(0.02)
    assert bench.overload.of("a") is None
    assert bench.overload._saturated_until == {}


def test_a_refusal_that_follows_extends_the_time_and_is_no_news(bench: Bench) -> None:
    bench.overload.saturated("a", 5)
    bench.clock.advance(4)
    bench.overload.saturated("a", None)
    assert bench.revision.number == 1
    bench.clock.advance(0.9)
    assert bench.overload.of("a") == FULL
    bench.overload.saturated("a", 0)
    assert bench.overload.of("a") == FULL, "a shorter time ends no longer one"


def test_a_model_that_becomes_slow_and_fast_again_is_news_each_time(bench: Bench) -> None:
    bench.answers(100, 30)
    assert (bench.overload.of("a"), bench.revision.number) == (None, 0)
    bench.answers(900, 8)
    found = bench.overload.of("a")
    assert found is not None
    assert (found.refuses, list(found.slow)) == ("", ["m"])
    assert found.slow["m"].startswith("first token after ")
    assert bench.revision.number == 1
    bench.answers(100, 20)
    assert (bench.overload.of("a"), bench.revision.number) == (None, 2)


def test_slowness_ends_with_time(bench: Bench) -> None:
    bench.slow()
    bench.clock.advance(10.1)
    assert bench.overload.of("a") is None
    assert bench.overload._slow == {}
    assert bench.revision.number == 2


def test_one_model_says_nothing_of_another_nor_of_another_instance(bench: Bench) -> None:
    bench.slow(key="m")
    bench.slow(key="n")
    bench.answers(100, 30, instance="b")
    found = bench.overload.of("a")
    assert found is not None
    assert set(found.slow) == {"m", "n"}
    assert bench.overload.of("b") is None
    bench.answers(100, 20, key="n")
    found = bench.overload.of("a")
    assert found is not None
    assert set(found.slow) == {"m"}


def test_a_new_server_has_the_usual_times_of_the_old_one_and_none_of_its_load(bench: Bench) -> None:
    bench.slow()
    bench.overload.saturated("a", 20)
    bench.overload.server_changed("a")
    bench.overload.server_changed("b")
    assert bench.overload.of("a") is None
    bench.answers(900, 2)
    assert bench.overload.of("a") is None
    bench.answers(900, 4)
    assert bench.overload.of("a") is not None


def test_kept_times_are_bounded_and_the_one_used_longest_ago_goes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_LATENCIES", 2)
    bench.slow(key="first")
    bench.answers(100, key="second")
    assert bench.overload.of("a") is not None
    bench.answers(100, key="third")
    assert set(bench.overload._latencies) == {("a", "second"), ("a", "third")}
    assert bench.overload.of("a") is None
    bench.answers(100, key="second")
    bench.answers(100, key="fourth")
    assert set(bench.overload._latencies) == {("a", "second"), ("a", "fourth")}


def test_a_model_is_slow_by_what_is_expected_of_it() -> None:
    bench = Bench()
    bench.overload = Overload(bench.revision, now=bench.clock, expected_ms={"m": 100.0}.get)
    bench.answers(300, 4)
    assert bench.overload.of("a") == Overloads("", {"m": "first token after 300 ms of late, expected 100 ms"})
    bench.answers(300, 4, key="n")
    assert bench.overload.of("a") == Overloads("", {"m": "first token after 300 ms of late, expected 100 ms"})


# --- speeds ---


def test_the_speed_follows_the_last_answers(bench: Bench) -> None:
    assert bench.overload.tokens_per_s("a", "m") is None
    bench.overload.generated("a", "m", 101, 2.0)
    assert bench.overload.tokens_per_s("a", "m") == 50.0
    bench.overload.generated("a", "m", 101, 1.0)
    assert bench.overload.tokens_per_s("a", "m") == 56.2
    assert bench.overload.tokens_per_s("b", "m") is bench.overload.tokens_per_s("a", "n") is None
    assert bench.revision.number == 0, "a speed changes no decision"


def test_an_answer_that_is_too_short_has_no_speed(bench: Bench) -> None:
    bench.overload.generated("a", "m", 7, 1.0)
    bench.overload.generated("a", "m", 100, 0.001)
    bench.overload.generated("a", "m", 100, -1.0)
    assert bench.overload.tokens_per_s("a", "m") is None
    bench.overload.generated("a", "m", 8, 1.0)
    bench.overload.generated("a", "m", 2, 1.0)
    assert bench.overload.tokens_per_s("a", "m") == 7.0


def test_speeds_are_bounded_and_the_one_used_longest_ago_is_forgotten(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_LATENCIES", 2)
    for key in ("m", "n", "m", "o"):
        bench.overload.generated("a", key, 11, 1.0)
    assert [bench.overload.tokens_per_s("a", key) for key in "mno"] == [10.0, None, 10.0]
