"""A browser for the tests of a file, and windows of it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from tests.support.browser import browser, chromium, visit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from playwright.sync_api import Browser

    from tests.support.browser import Visit


# A busy machine takes its time: five seconds, Playwright's own limit, are not enough there.
expect.set_options(timeout=20_000)


# Playwright keeps an event loop in this thread: tests of other files have loops of their own.
@pytest.fixture(scope="module")
def running_browser() -> Iterator[Browser]:
    if chromium() is None:
        pytest.skip("there is no Chromium")
    with browser() as running:
        yield running


@pytest.fixture
def new_visit(running_browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Opens windows (`width`, `scheme`, and what Playwright's contexts take); they are closed at the end."""
    with ExitStack() as stack:

        def open_window(**options: Any) -> Visit:
            return stack.enter_context(visit(running_browser, **options))

        yield open_window
