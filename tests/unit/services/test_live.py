"""Subscribers share the readings of a tick, skip what they are too slow for, and hear of changes only."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from manager.errors import Reason, UnavailableError
from manager.services.live import Frame, Live, Section
from tests.support.virtual import BEGIN_S, in_virtual_time

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

TICK_S = 0.5


class Source:
    """Sections that a test sets; counts what is read and built. A value has the number of its reading."""

    def __init__(self, **values: int) -> None:
        self.values = values
        self.reads = 0
        self.builds = 0

    def __call__(self) -> Mapping[str, Section]:
        self.reads += 1
        return {
            name: Section(value, partial(self._build, value, self.reads))
            for name, value in self.values.items()
        }

    def _build(self, value: int, reading: int) -> list[int]:
        self.builds += 1
        return [value, reading]


def live_of(source: Source, most: int = 256) -> Live:
    loop = asyncio.get_running_loop()
    return Live(source, now=loop.time, interval_s=TICK_S, most_subscribers=most)


def values(frame: Frame) -> dict[str, Any]:
    return {name: value[0] for name, value in frame.sections.items()}  # type: ignore[index]


async def now_or_never(frames: AsyncGenerator[Frame, None], *, within_s: float = 20.0) -> Frame | None:
    try:
        async with asyncio.timeout(within_s):
            return await anext(frames)
    except TimeoutError:
        return None


@in_virtual_time
async def test_the_first_frame_is_whole_and_comes_at_once_and_later_ones_have_the_changes() -> None:
    source = Source(a=1, b=1)
    async with aclosing(live_of(source).follow()) as frames:
        first = await anext(frames)
        assert asyncio.get_running_loop().time() == BEGIN_S
        assert (first.revision, values(first)) == (1, {"a": 1, "b": 1})
        source.values["b"] = 2
        second = await anext(frames)
        assert asyncio.get_running_loop().time() == pytest.approx(BEGIN_S + TICK_S)
        assert (second.revision, values(second)) == (2, {"b": 2})
        source.values |= {"a": 5, "b": 6}
        third = await anext(frames)
        assert (third.revision, values(third)) == (3, {"a": 5, "b": 6})
        assert await now_or_never(frames) is None, "nothing changes"


@in_virtual_time
async def test_all_subscribers_of_a_tick_share_one_reading_and_the_values() -> None:
    source = Source(a=1, b=1)
    live = live_of(source)
    got: list[list[Frame]] = [[] for _ in range(50)]

    async def follow(frames: list[Frame], delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        async for frame in live.follow():
            frames.append(frame)  # noqa: PERF401  (it never ends)

    tasks = [asyncio.create_task(follow(one, number / 1000)) for number, one in enumerate(got)]
    await asyncio.sleep(0.2)
    assert (source.reads, source.builds, live.subscribers) == (1, 2, 50)
    source.values["a"] = 2
    await asyncio.sleep(4 * TICK_S)
    assert source.reads == 5, "one a tick"
    assert source.builds == 3
    assert all(len(frames) == 2 and frames[1] is got[0][1] for frames in got)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert live.subscribers == 0
    await asyncio.sleep(10 * TICK_S)
    assert source.reads == 5, "nobody is there"


@in_virtual_time
async def test_a_slow_subscriber_skips_values_and_gets_the_latest_of_each_section() -> None:
    source = Source(a=1, b=1, c=1)
    live = live_of(source)
    async with aclosing(live.follow()) as slow, aclosing(live.follow()) as quick:
        await anext(slow)
        await anext(quick)
        seen = []
        for value in range(2, 6):
            source.values["a"] = value
            if value == 3:
                source.values["b"] = 9
            seen.append(values(await anext(quick)))
        assert seen == [{"a": 2}, {"a": 3, "b": 9}, {"a": 4}, {"a": 5}]
        frame = await anext(slow)
        assert values(frame) == {"a": 5, "b": 9}
        assert frame.revision == 5
        assert await now_or_never(slow) is None


@in_virtual_time
async def test_a_slow_subscriber_shares_the_values_of_its_tick_with_the_others() -> None:
    source = Source(a=1, b=1)
    live = live_of(source)
    async with aclosing(live.follow()) as slow, aclosing(live.follow()) as quick:
        await anext(slow)
        await anext(quick)
        source.values["b"] = 2
        await anext(quick)
        source.values["a"] = 2
        frame = await anext(quick)
        behind = await anext(slow)
        assert behind is not frame
        assert behind.sections["a"] is frame.sections["a"]


@in_virtual_time
async def test_a_newcomer_gets_clocks_of_now_although_they_change_nothing() -> None:
    source = Source(a=1)
    live = live_of(source)
    async with aclosing(live.follow()) as early:
        await anext(early)
        assert await now_or_never(early, within_s=5 * TICK_S) is None
    async with aclosing(live.follow()) as late:
        first = await anext(late)
        assert first.revision == 1
        assert first.sections["a"] == [1, source.reads]
        assert source.reads >= 5


@in_virtual_time
async def test_silence_is_broken_by_a_frame_without_sections() -> None:
    source = Source(a=1)
    async with aclosing(live_of(source).follow(idle_s=15)) as frames:
        await anext(frames)
        began = asyncio.get_running_loop().time()
        assert await anext(frames) == Frame(1, {})
        assert asyncio.get_running_loop().time() - began == pytest.approx(15, abs=TICK_S)
        source.values["a"] = 2
        assert values(await anext(frames)) == {"a": 2}


@in_virtual_time
async def test_one_subscriber_too_many_is_refused_until_another_leaves() -> None:
    live = live_of(Source(a=1), most=2)
    async with aclosing(live.follow()) as one:
        await anext(one)
        async with aclosing(live.follow()) as two:
            await anext(two)
            with pytest.raises(
                UnavailableError, match="2 clients follow the live channel; expected at most 2"
            ) as no:
                await anext(live.follow())
            assert no.value.reason is Reason.OVERLOADED
            assert no.value.retry_after_s
        async with aclosing(live.follow()) as three:
            await anext(three)
    assert live.subscribers == 0


@in_virtual_time
async def test_a_failing_reading_ends_its_subscriber_and_gives_its_place_back() -> None:
    source = Source(a=1)
    live = live_of(source)
    frames = live.follow()
    await anext(frames)
    source.values = None  # type: ignore[assignment]
    with pytest.raises(AttributeError):
        await anext(frames)
    assert live.subscribers == 0


@in_virtual_time
async def test_a_revision_is_kept_while_nobody_follows() -> None:
    source = Source(a=1)
    live = live_of(source)
    assert live.current().revision == live.current().revision == 1
    assert source.reads == 1, "one a tick"
    source.values["a"] = 2
    await asyncio.sleep(TICK_S)
    assert live.current() == Frame(2, {"a": [2, 2]})
