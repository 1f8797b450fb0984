"""A page: its address, who may see it, what it shows, and which parts of it change live."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from fastapi import Request

    from manager.api.backend import Backend
    from manager.web.viewer import Viewer

    Sections = Mapping[str, Any]

_ODD = re.compile(r"[^a-zA-Z0-9-]")


def element_id(kind: str, name: str) -> str:
    """Return the id of an element for something with a name, which may hold any character."""
    return f"{kind}-{_ODD.sub(lambda odd: f'_{ord(odd[0]):x}_', name)}"


class Fragment(NamedTuple):
    """A part of a page that changes live: the element with this id.

    Fragments with equal contexts are rendered once. Contexts hold no clocks, since each change of one costs
    a rendering: `ends.Ends` turns what is left of a time into a moment.
    """

    template: str
    context: Mapping[str, Any]


class Facts(NamedTuple):
    """Further sections for fragments; `key` differs after each change that is to be seen at once."""

    key: object
    build: Callable[[], Sections]


NO_FACTS = Facts(None, dict)


async def _nothing(_backend: Backend, _viewer: Viewer, _request: Request) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class Page:
    """One page.

    Attributes:
        name: of its texts, and of its template `pages/NAME.html`.
        path: its address.
        scope: a key needs it to see the page; None: any key.
        fragments: returns the live parts from the sections of the live channel, by the id of their element,
            in their order. The same sections and viewer give the same fragments. None: nothing is live.
        facts: returns what `fragments` needs beside the sections of the live channel, as further sections.
            They are built with each change of a section or of their key, and every few seconds.
        context: returns what the template shows besides.
    """

    name: str
    path: str
    scope: str | None = "read"
    fragments: Callable[[Sections, Viewer], Mapping[str, Fragment]] | None = None
    facts: Callable[[Backend], Facts] | None = None
    context: Callable[[Backend, Viewer, Request], Awaitable[Mapping[str, Any]]] = field(default=_nothing)
