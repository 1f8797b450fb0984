from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manager.domain.keys import Scope
from manager.services.live import Frame
from manager.web.ends import Ends
from manager.web.feed import CLOCKS_S, Feed, Feeds, Rendered, changes
from manager.web.page import Facts, Fragment, Page, element_id
from manager.web.viewer import Viewer

if TYPE_CHECKING:
    from collections.abc import Mapping

NOBODY = Viewer(None, frozenset(Scope))


class Renderer:
    """Counts what it renders."""

    def __init__(self) -> None:
        self.rendered: list[str] = []

    def render(self, template: str, context: Mapping[str, Any]) -> str:
        self.rendered.append(context["id"])
        return f"{template} {context['value']}"


def fragments(sections: Mapping[str, Any], _viewer: Viewer) -> dict[str, Fragment]:
    return {one["id"]: Fragment("t", {"value": one["value"]}) for one in sections["instances"]}


PAGE = Page("overview", "/ui", fragments=fragments)


def frame(revision: int, **values: object) -> Frame:
    instances = [{"id": id_, "value": value, "ttl_remaining_s": None} for id_, value in values.items()]
    return Frame(revision, {"instances": instances})


def test_only_what_has_changed_is_rendered() -> None:
    renderer: Any = Renderer()
    feed = Feed(PAGE, NOBODY, renderer)
    assert feed.at(frame(1, a=1, b=1), 0.0) == {"a": Rendered(1, "t 1"), "b": Rendered(1, "t 1")}
    assert feed.at(frame(1, a=9, b=9), 0.0)["a"].html == "t 1"  # the same revision
    assert feed.at(frame(2, a=1, b=2), 0.0) == {"a": Rendered(1, "t 1"), "b": Rendered(2, "t 2")}
    assert renderer.rendered == ["a", "b", "b"]


def test_clocks_that_were_set_anew_are_seen_without_a_change() -> None:
    renderer: Any = Renderer()
    feed = Feed(PAGE, NOBODY, renderer)
    feed.at(frame(1, a=1), 0.0)
    assert feed.at(frame(1, a=2), CLOCKS_S)["a"] == Rendered(2, "t 2")


def test_facts_beside_the_sections_are_seen_with_each_change_of_their_key() -> None:
    renderer: Any = Renderer()
    built: list[int] = []

    def facts(_page: Page) -> Facts:
        return Facts(key, lambda: built.append(key) or {"instances": [{"id": "a", "value": key}]})  # type: ignore[func-returns-value]

    feed, key = Feed(PAGE, NOBODY, renderer, facts), 1
    assert feed.at(frame(1, a=0), 0.0)["a"] == Rendered(1, "t 1")
    feed.at(frame(1, a=0), 0.0)
    assert built == [1]
    key = 2
    assert feed.at(frame(1, a=0), 0.0)["a"] == Rendered(2, "t 2")


def test_viewers_of_a_kind_share_a_feed_that_names_none_of_them() -> None:
    feeds = Feeds(Renderer())  # type: ignore[arg-type]
    read = frozenset({Scope.READ})
    assert feeds.of(PAGE, Viewer("one", read)) is feeds.of(PAGE, Viewer("two", read))
    assert feeds.of(PAGE, Viewer("one", read)) is not feeds.of(PAGE, NOBODY)
    assert feeds.of(PAGE, Viewer("one", read))._viewer.name is None


def test_a_subscriber_gets_all_parts_then_the_changed_ones() -> None:
    seen: dict[str, int] = {}
    one, two = Rendered(1, "one"), Rendered(1, "two")
    first = changes(seen, {"a": one, "b": two})
    assert first is not None
    assert list(first) == [("a", "one"), ("b", "two")]
    then = changes(seen, {"a": one, "b": Rendered(2, "new")})
    assert then is not None
    assert list(then) == [("b", "new")]
    assert changes(seen, {"a": one}) is None  # a part has gone
    again = changes(seen, {"a": one})
    assert again is not None
    assert list(again) == []


def instance(left_s: float | None) -> dict[str, Any]:
    clocks = {"last_used_at": "then", "last_seen_at": "now"}
    return {"id": "a", "ttl_remaining_s": left_s, **clocks}


def ends_at(ends: Ends, left_s: float | None, now: float) -> float | None:
    (one,) = ends.without_clocks({"instances": [instance(left_s)], "gpus": 1}, now)["instances"]
    assert set(one) == {"id", "ttl_ends_at"}
    end: float | None = one["ttl_ends_at"]
    return end


def test_the_end_of_a_ttl_stays_until_it_is_set_anew() -> None:
    ends = Ends()
    assert ends_at(ends, 10.0, 100.0) == 110.0
    assert ends_at(ends, 9.2, 101.2) == 110.0  # a reading is a little late
    assert ends_at(ends, 10.0, 105.0) == 115.0
    assert ends_at(ends, None, 106.0) is None
    assert ends_at(ends, 10.0, 106.0) == 116.0


def test_names_with_odd_characters_have_ids_of_their_own() -> None:
    ids = [element_id("role", name) for name in ("a b", "a_b", "a.b", 'a"b', "ab")]
    assert len(set(ids)) == len(ids)
    assert all(id_.replace("-", "").replace("_", "").isalnum() for id_ in ids)


def test_what_was_encoded_is_forgotten_with_a_change() -> None:
    feed = Feed(PAGE, NOBODY, Renderer())  # type: ignore[arg-type]
    feed.at(frame(1, a=1), 0.0)
    feed.events["a",] = b"a"
    feed.at(frame(1, a=1), 0.0)
    assert feed.events == {("a",): b"a"}
    feed.at(frame(2, a=2), 0.0)
    assert feed.events == {}
