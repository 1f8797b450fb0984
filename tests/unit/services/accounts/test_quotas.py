"""Quotas of keys: never above a bound, nothing leaks, and the day begins at midnight (UTC)."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.usage import Span, Sums
from manager.services.accounts import quotas as module
from manager.services.accounts.quotas import Exceeded, Place, Quotas
from manager.services.ports import KeyUse
from tests.support.keys import grant

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager.domain.keys import Grant
    from manager.domain.record import RequestRecord

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Clock:
    """One clock for both: seconds since noon."""

    def __init__(self) -> None:
        self.s = 0.0
        self.quotas = Quotas(now=lambda: self.s, utcnow=lambda: NOON + timedelta(seconds=self.s))

    def enter(self, of: Grant) -> Place | Exceeded:
        entry = self.quotas.enter(of)
        assert entry is not None
        return entry

    def begin(self, of: Grant) -> Place:
        entry = self.enter(of)
        assert isinstance(entry, Place), entry
        return entry

    def refuse(self, of: Grant) -> Exceeded:
        entry = self.enter(of)
        assert isinstance(entry, Exceeded)
        return entry


def key(name: str = "ci", **limits: Any) -> Grant:
    return replace(grant(name), **limits)


def used(inputs: int | None = None, outputs: int | None = None) -> RequestRecord:
    return cast("RequestRecord", SimpleNamespace(input_tokens=inputs, output_tokens=outputs))


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_key_without_limits_is_not_counted(clock: Clock) -> None:
    assert clock.quotas.enter(key()) is None
    assert clock.quotas.enter(key(micro_usd_per_month=0)) is None
    assert not clock.quotas._uses


# --- requests in flight ---------------------------------------------------------------------------


def test_a_key_has_so_many_requests_in_flight_and_others_are_not_touched(clock: Clock) -> None:
    ci, other = key(concurrency=2), key("other", concurrency=1)
    first, _ = clock.begin(ci), clock.begin(ci)
    assert clock.refuse(ci) == (
        "the key 'ci' is at its concurrency of 2",
        1.0,
    )
    clock.begin(other)
    first.leave(used())
    clock.begin(ci)
    assert clock.quotas.in_flight("ci") == 2
    assert clock.quotas.in_flight("nobody") == 0


def test_a_request_leaves_once(clock: Clock) -> None:
    ci = key(concurrency=2, tokens_per_day=100)
    first, _ = clock.begin(ci), clock.begin(ci)
    first.leave(used(1, 2))
    first.leave(used(1, 2))
    assert clock.quotas.in_flight("ci") == 1
    assert clock.quotas._uses["ci"].tokens == 3


# --- requests a minute ----------------------------------------------------------------------------


def test_a_key_begins_so_many_requests_a_minute(clock: Clock) -> None:
    ci = key(rpm=2)
    clock.begin(ci)
    clock.s = 30
    clock.begin(ci)
    assert clock.refuse(ci) == ("the key 'ci' is at its rpm of 2", 31)
    clock.s = 60.05
    assert clock.refuse(ci).retry_after_s == 1
    clock.s = 60.1
    clock.begin(ci)
    assert clock.refuse(ci).retry_after_s == 30


def test_a_refused_request_counts_for_nothing(clock: Clock) -> None:
    ci = key(rpm=1, concurrency=1)
    place = clock.begin(ci)
    for _ in range(5):
        clock.refuse(ci)
    place.leave(used())
    assert clock.quotas.in_flight("ci") == 0
    clock.s = 61
    clock.begin(ci)


@given(st.integers(1, 5), st.lists(st.floats(0, 30, allow_nan=False), max_size=60))
def test_no_minute_ever_has_more_requests_than_the_limit(rpm: int, pauses: list[float]) -> None:
    clock, limited, begun = Clock(), key(rpm=rpm), []
    for pause in pauses:
        clock.s += pause
        entry = clock.enter(limited)
        if isinstance(entry, Place):
            begun.append(clock.s)
        else:
            # The time that is told is never too early.
            later = Clock()
            later.s = clock.s + entry.retry_after_s
            assert len([one for one in begun if one > later.s - 60]) < rpm
    for first, one in zip(begun, begun[rpm:], strict=False):
        assert one - first >= 60
    assert len(clock.quotas._uses["ci"].begun if begun else ()) <= module._SLICES + 1


def test_a_key_takes_the_same_memory_however_many_requests_it_may_send(clock: Clock) -> None:
    ci = key(rpm=10**9)
    for tick in range(20_000):
        clock.s = tick / 100
        clock.begin(ci).leave(used())
    use = clock.quotas._uses["ci"]
    assert len(use.begun) <= module._SLICES + 1
    assert use.minute == sum(count for _, count in use.begun)
    assert 6000 <= use.minute <= 6010


# --- tokens a day ---------------------------------------------------------------------------------


def test_a_key_has_so_many_tokens_until_midnight(clock: Clock) -> None:
    ci = key(tokens_per_day=100)
    first, second = clock.begin(ci), clock.begin(ci)
    first.leave(used(60, 39))
    clock.begin(ci)  # one token is left
    second.leave(used(None, 5))
    exceeded = clock.refuse(ci)
    assert exceeded.message == ("the key 'ci' has used 104 tokens today (UTC); its tokens_per_day are 100")
    assert exceeded.retry_after_s == 12 * 3600
    clock.s = 12 * 3600 - 0.25
    assert clock.refuse(ci).retry_after_s == 1
    clock.s = 12 * 3600
    clock.begin(ci).leave(used(100))
    clock.refuse(ci)


def test_the_tokens_of_a_request_count_on_the_day_of_its_end(clock: Clock) -> None:
    ci = key(tokens_per_day=10)
    clock.s = 12 * 3600 - 1
    place = clock.begin(ci)
    clock.s += 2
    place.leave(used(10))
    clock.refuse(ci)


class Store:
    def __init__(self, sums: dict[str, tuple[int, int]]) -> None:
        self._sums = sums
        self.asked: list[Any] = []

    async def usage(self, wanted: Span, by: tuple[str, ...], *, now_s: int) -> Any:
        self.asked.append((wanted, by, now_s))
        found = {
            (name,): Sums(input_tokens=inputs, output_tokens=outputs)
            for name, (inputs, outputs) in self._sums.items()
        }
        return found, wanted


async def test_the_tokens_of_the_day_survive_a_restart(clock: Clock) -> None:
    store = Store({"ci": (70, 29), "loose": (10**9, 0), "": (5, 5)})
    await clock.quotas.load(cast("Any", store), ["ci", "fresh"])
    midnight = int(datetime(2026, 3, 1, tzinfo=UTC).timestamp())
    assert store.asked == [(Span(midnight, midnight + 86_400), ("key",), int(NOON.timestamp()))]
    assert list(clock.quotas._uses) == ["ci"]
    ci = key(tokens_per_day=100)
    clock.begin(ci).leave(used(1))
    clock.refuse(ci)


async def test_nothing_is_read_where_no_key_has_a_limit(clock: Clock) -> None:
    store = Store({})
    await clock.quotas.load(cast("Any", store), [])
    assert store.asked == []


# --- bounded memory -------------------------------------------------------------------------------


def test_at_the_bound_keys_that_are_idle_are_forgotten(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_USES", 4)
    limits = {"rpm": 1, "tokens_per_day": 1}
    clock.begin(key("busy", **limits))
    clock.begin(key("spent", **limits)).leave(used(1))
    clock.begin(key("idle", **limits)).leave(used())
    clock.s = 61
    clock.begin(key("recent", **limits)).leave(used())
    clock.begin(key("new", **limits))
    assert list(clock.quotas._uses) == ["busy", "spent", "recent", "new"]
    clock.refuse(key("spent", **limits))
    # More names than there can be keys: the oldest idle ones go, whatever they have used.
    clock.begin(key("newest", **limits))
    assert list(clock.quotas._uses) == ["busy", "recent", "new", "newest"]


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.booleans(), st.floats(0, 20), st.integers(0, 3)), max_size=80
    )
)
def test_whatever_happens_the_bounds_hold_and_all_counts_return_to_zero(
    steps: list[tuple[str, bool, float, int]],
) -> None:
    clock = Clock()
    limits = {name: key(name, concurrency=2, rpm=3, tokens_per_day=20) for name in "ab"}
    open_: dict[str, list[Place]] = {"a": [], "b": []}
    tokens = {"a": 0, "b": 0}
    for name, leaves, pause, count in steps:
        clock.s += pause
        if leaves and open_[name]:
            open_[name].pop().leave(used(count, count))
            tokens[name] += 2 * count
        else:
            entry = clock.enter(limits[name])
            if isinstance(entry, Place):
                assert tokens[name] < 20
                open_[name].append(entry)
        assert clock.quotas.in_flight(name) == len(open_[name]) <= 2
    for name, places in open_.items():
        for place in places:
            place.leave(used())
        assert clock.quotas.in_flight(name) == 0


def shared(gateways: int) -> tuple[list[Clock], Callable[[], None]]:
    """Gateways that share a database; what is returned too has each of them tell the others."""
    clocks, rows, number = [Clock() for _ in range(gateways)], {}, iter(range(10**9))

    def tell() -> None:
        for name, clock in enumerate(clocks):
            uses = clock.quotas.own_uses()
            rows.update({(str(name), key): (next(number), use) for key, use in uses.items()})
            clock.quotas.was_told(uses)
        for name, clock in enumerate(clocks):
            clock.quotas.take_others({at: row for at, row in rows.items() if at[0] != str(name)})

    return clocks, tell


def test_requests_of_the_minute_count_at_all_gateways() -> None:
    (one, other), tell = shared(2)
    for _ in range(2):
        one.begin(key(rpm=3))
    other.begin(key(rpm=3))
    tell()
    for clock in (one, other):
        assert "rpm of 3" in clock.refuse(key(rpm=3)).message
        assert clock.quotas.enter(key("free")) is None
        clock.begin(key("other", rpm=3))
    one.s = other.s = 61
    tell()
    other.begin(key(rpm=3))


def test_a_gateway_that_is_told_of_others_alone_says_when_it_is_worth_a_try() -> None:
    (one, other), tell = shared(2)
    one.begin(key(rpm=1))
    tell()
    assert other.refuse(key(rpm=1)).retry_after_s >= 1


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=200), st.integers(1, 20))
def test_gateways_go_beyond_a_limit_by_what_the_others_admit_between_two_looks(
    asked: list[tuple[int, bool]], rpm: int
) -> None:
    clocks, tell = shared(3)
    admitted, since, most = 0, [0, 0, 0], 0
    for gateway, tells in asked:
        if isinstance(clocks[gateway].enter(key(rpm=rpm)), Place):
            admitted += 1
            since[gateway] += 1
            # What this gateway does not know of.
            most = max(most, sum(since) - since[gateway])
        assert admitted <= rpm + most
        if tells:
            tell()
            since = [0, 0, 0]


def test_the_minute_of_a_gateway_that_has_ended_is_over_after_a_minute() -> None:
    (one, other), tell = shared(2)
    one.begin(key(rpm=1))
    tell()
    rows = {("0", "ci"): (1, KeyUse(1, "2026-03-01", 0))}
    for seconds in (0, 30, 60):
        other.s = seconds
        other.quotas.take_others(rows)
        other.refuse(key(rpm=1))
    other.s = 61
    other.quotas.take_others(rows)
    other.begin(key(rpm=1))


def test_without_news_of_others_for_a_minute_a_gateway_counts_its_own() -> None:
    (one, other), tell = shared(2)
    one.begin(key(rpm=1))
    tell()
    other.s = 59
    other.refuse(key(rpm=1))
    other.s = 60
    other.begin(key(rpm=1))


def test_tokens_of_the_day_count_at_all_gateways_until_midnight() -> None:
    (one, other), tell = shared(2)
    one.begin(key(tokens_per_day=10)).leave(used(4, 3))
    other.begin(key(tokens_per_day=10)).leave(used(2, 1))
    tell()
    for clock in (one, other):
        assert "10 tokens today" in clock.refuse(key(tokens_per_day=10)).message
        clock.s = 3600  # however long ago they were told
        clock.refuse(key(tokens_per_day=10))
        clock.s = 12 * 3600
        clock.begin(key(tokens_per_day=10))


def test_only_what_has_changed_is_told_and_a_minute_with_requests_each_time() -> None:
    (clock,), _ = shared(1)
    quotas = clock.quotas
    clock.begin(key("calm", tokens_per_day=9)).leave(used(1, 1))
    clock.begin(key("busy", rpm=9))
    clock.begin(key("here", concurrency=9))
    day = "2026-03-01"
    assert quotas.own_uses() == {"calm": KeyUse(0, day, 2), "busy": KeyUse(1, day, 0)}
    assert quotas.own_uses().keys() == {"calm", "busy"}, "nothing is told until it is known to be"
    quotas.was_told(quotas.own_uses())
    assert quotas.own_uses() == {"busy": KeyUse(1, day, 0)}
    clock.s = 61
    assert quotas.own_uses() == {"busy": KeyUse(0, day, 0)}
    quotas.was_told(quotas.own_uses())
    assert quotas.own_uses() == {}
    clock.s = 12 * 3600
    assert quotas.own_uses().keys() == {"calm", "busy"}
