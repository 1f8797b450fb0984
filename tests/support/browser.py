"""Chromium in front of the page: what it complains of, and what it asks of other machines, fails the test."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, ConsoleMessage, Page, Request

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_HERE = ("127.0.0.1", "localhost", "")
_SERIOUS = ("serious", "critical")


def chromium() -> str | None:
    """Return the path of Chromium; None where it is not installed."""
    return next((path for name in _PROGRAMS if (path := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Browser]:
    """Run Chromium without a window."""
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", "--disable-background-networking"]
        )
        try:
            yield running
        finally:
            running.close()


class Visit:
    """One person with a browser of their own: cookies, window and colours."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.problems: list[str] = []
        self.foreign: list[str] = []
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self._note(str(error)))
        page.on("request", self._look)

    def _hear(self, line: ConsoleMessage) -> None:
        if line.type == "error":
            self._note(f"{line.text} {line.location['url']}")

    def _note(self, problem: str) -> None:
        self.problems.append(problem)

    def _look(self, request: Request) -> None:
        if (urlsplit(request.url).hostname or "") not in _HERE:
            self.foreign.append(request.url)

    def expect_problem(self, words: str) -> None:
        """Take a problem that the test has caused off the list."""
        found = [one for one in self.problems if words in one]
        assert found, f"no problem with {words!r} among {self.problems}"
        self.problems = [one for one in self.problems if words not in one]

    def assert_accessible(self) -> None:
        """Have axe look at the page."""
        results: Any = Axe().run(self.page).response
        serious = [
            f"{one['impact']} {one['id']}: {one['help']} at {[node['target'] for node in one['nodes'][:3]]}"
            for one in results["violations"]
            if one["impact"] in _SERIOUS
        ]
        assert not serious, "\n".join(serious)

    def assert_fits(self) -> None:
        """Check that the page is not wider than the window."""
        wide = self.page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert wide <= 0, f"{wide} px wider than the window"


@contextmanager
def visit(running: Browser, *, width: int = 1280, scheme: Any = "light", **options: Any) -> Iterator[Visit]:
    """Open a window; nothing may go wrong in it until it is closed."""
    # Turning icons cost a core without a graphics card.
    options = {"reduced_motion": "reduce", **options}
    context = running.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
    context.set_default_timeout(45_000)
    expect.set_options(timeout=45_000)
    visitor = Visit(context.new_page())
    try:
        yield visitor
    finally:
        context.close()
    assert not visitor.problems, visitor.problems
    assert not visitor.foreign, visitor.foreign
