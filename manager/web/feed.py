"""The live parts of pages, rendered once for all viewers of one kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from manager.web.ends import Ends
from manager.web.page import NO_FACTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from manager.services.live import Frame
    from manager.web.page import Facts, Fragment, Page
    from manager.web.rendering import Renderer
    from manager.web.viewer import Viewer

# Moments, such as the end of a TTL, are computed anew this often, since other programs may renew them.
CLOCKS_S = 5.0


class Rendered(NamedTuple):
    """A fragment in its present form; `version` grows with each change of the HTML."""

    version: int
    html: str


def _no_facts(_page: Page) -> Facts:
    return NO_FACTS


class Feed:
    """The fragments of one page for one kind of viewer. Renders what has changed since the last frame.

    `facts` reads what the page needs beside the sections of a frame (`Page.facts`). `events` holds what was
    encoded since the last change, by the ids of the parts: followers that miss the same parts share it.
    """

    def __init__(
        self,
        page: Page,
        viewer: Viewer,
        renderer: Renderer,
        facts: Callable[[Page], Facts] = _no_facts,
    ) -> None:
        self._page = page
        self._facts = facts
        self._viewer = viewer
        self._renderer = renderer
        self._ends = Ends()
        self._rendered_for: tuple[int, int, object] | None = None
        self._sources: Mapping[str, Fragment] = {}
        self._rendered: dict[str, Rendered] = {}
        self.events: dict[tuple[str, ...], bytes] = {}

    def at(self, frame: Frame, now: float) -> Mapping[str, Rendered]:
        """Return the fragments by the id of their element, in the order of the page.

        A clock that was set anew, such as a TTL, is seen within `CLOCKS_S`.

        Args:
            frame: a full one.
            now: Unix seconds.
        """
        if self._page.fragments is None:
            return {}
        facts = self._facts(self._page)
        wanted = (frame.revision, int(now // CLOCKS_S), facts.key)
        if wanted != self._rendered_for:
            sections = {**self._ends.without_clocks(frame.sections, now), **facts.build()}
            sources = self._page.fragments(sections, self._viewer)
            self._rendered = {id_: self._render(id_, fragment) for id_, fragment in sources.items()}
            self._sources, self._rendered_for = sources, wanted
            self.events.clear()
        return self._rendered

    def _render(self, id_: str, fragment: Fragment) -> Rendered:
        before = self._rendered.get(id_)
        if before is not None and self._sources[id_] == fragment:
            return before
        html = self._renderer.render(
            fragment.template, {"id": id_, "viewer": self._viewer, **fragment.context}
        )
        if before is not None and before.html == html:
            return before
        return Rendered(1 if before is None else before.version + 1, html)


class Feeds:
    """Owns the feeds: one for each page and kind of viewer, so that their number is bounded."""

    def __init__(self, renderer: Renderer, facts: Callable[[Page], Facts] = _no_facts) -> None:
        self._renderer = renderer
        self._facts = facts
        self._feeds: dict[tuple[str, Any], Feed] = {}

    def of(self, page: Page, viewer: Viewer) -> Feed:
        """Return the feed of a page for a viewer."""
        key = (page.name, viewer.kind)
        if key not in self._feeds:
            # No name: what one key sees is rendered for all keys of its kind.
            self._feeds[key] = Feed(page, viewer._replace(name=None), self._renderer, self._facts)
        return self._feeds[key]


def changes(seen: dict[str, int], fragments: Mapping[str, Rendered]) -> Iterator[tuple[str, str]] | None:
    """Return the id and HTML of each fragment that changed since `seen`, and bring `seen` up to date.

    None: fragments have come or gone, so that the whole region of the page is to be replaced.
    """
    if seen and seen.keys() != fragments.keys():
        seen.clear()
        seen.update({id_: one.version for id_, one in fragments.items()})
        return None
    changed = [(id_, one) for id_, one in fragments.items() if seen.get(id_) != one.version]
    seen.update({id_: one.version for id_, one in changed})
    return iter([(id_, one.html) for id_, one in changed])
