"""Renders templates. Everything is escaped: names, log lines and errors are hostile input."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from manager.web import words
from manager.web.page import element_id
from manager.web.static import static_files, static_url
from manager.web.texts import read_texts

if TYPE_CHECKING:
    from collections.abc import Mapping

_CODE = re.compile("`([^`]+)`")


def prose(text: str) -> Markup:
    """Return a text with the words between backticks as code."""
    return Markup(_CODE.sub(r"<code>\1</code>", str(escape(text))))  # noqa: S704  (the text is escaped)


_FILTERS = {
    "prose": prose,
    "size": words.size,
    "duration": words.duration,
    "ms": words.milliseconds,
    "count": words.count,
    "usd": words.usd,
    "percent": words.percent,
    "unix": words.unix_s,
    "seconds": words.seconds_text,
    "rate": words.rate,
}


class Renderer:
    """Owns the templates. They are compiled once, in a thread: that takes tens of milliseconds.

    The static files are read and compressed then, too.
    """

    def __init__(self) -> None:
        self.texts = read_texts()
        self._environment = Environment(
            loader=PackageLoader(__package__),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
            cache_size=-1,
        )
        self._environment.filters.update(_FILTERS)
        self._environment.globals.update(
            t=self.texts,
            static_url=static_url,
            element_id=element_id,
            unknown=words.UNKNOWN,
        )
        self._is_compiled = False

    async def prepare(self) -> None:
        """Compile all templates and read the static files, the first time."""
        if not self._is_compiled:
            await asyncio.to_thread(self._compile)
            self._is_compiled = True

    def render(self, template: str, context: Mapping[str, Any]) -> str:
        """Render a template, such as `pages/overview.html`."""
        return self._environment.get_template(template).render(context)

    def _compile(self) -> None:
        static_files()
        for name in self._environment.list_templates(extensions=("html",)):
            self._environment.get_template(name)
