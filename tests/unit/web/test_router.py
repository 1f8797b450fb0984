from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from manager.services.live import Frame
from manager.web.feed import Rendered
from manager.web.router import _digest, _lines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Live:
    """Frames one after the other; the fragments of each are those of the feed."""

    def __init__(self, count: int) -> None:
        self.count = count

    async def follow(self, *, idle_s: float) -> AsyncIterator[Frame]:
        assert idle_s
        for revision in range(self.count):
            yield self.current(revision)

    def current(self, revision: int = 0) -> Frame:
        return Frame(revision, {})


class Feed:
    def __init__(self, *ids: str) -> None:
        self.left = list(ids)
        self.events: dict[tuple[str, ...], bytes] = {}

    def at(self, _frame: Frame, _now: float) -> dict[str, Rendered]:
        id_ = self.left.pop(0)
        self.events.clear()
        return {id_: Rendered(1, f"<i>{id_}</i>")}


async def events(page: str, *ids: str) -> list[str]:
    """The kinds of the events for a page with a part of that id, while the part is of these ids."""
    live: Any = Live(len(ids))
    feed: Any = Feed(*ids)
    permission: Any = SimpleNamespace(holds=lambda: True)
    lines = [line async for line in _lines(live, feed, _digest([page]), permission)]
    return ["refresh" if b"event: refresh" in line else "parts" if b"<i>" in line else "" for line in lines]


async def test_a_page_gets_the_parts_that_it_has_and_is_fetched_again_for_others() -> None:
    assert await events("a", "a", "a", "b", "b") == ["parts", "refresh"]


async def test_a_page_that_is_out_of_date_at_first_is_fetched_again_for_each_change_after_it() -> None:
    assert await events("a", "b", "c", "c") == ["refresh", "refresh"]
