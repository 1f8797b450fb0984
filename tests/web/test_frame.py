"""The frame of every page, and the overview of a machine without instances."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Route

    from tests.support.browser import Visit
    from tests.support.fixtures import NewDaemon


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_the_overview_is_live_accessible_and_fits(
    new_daemon: NewDaemon, new_visit: Callable[..., Visit], width: int, scheme: str
) -> None:
    daemon = new_daemon(instances={}).start()
    visitor = new_visit(width=width, scheme=scheme)
    visitor.page.goto(f"{daemon.url}/")
    expect(visitor.page).to_have_url(f"{daemon.url}/ui")
    expect(visitor.page.locator("html[data-live=on]")).to_be_attached()
    expect(visitor.page.get_by_role("heading", name="Overview")).to_be_visible()
    visitor.assert_accessible()
    visitor.assert_fits()


@pytest.mark.parametrize("late", ["hx-sse", "htmx-4", "page.js"])
def test_the_live_channel_is_joined_whichever_script_comes_late(
    new_daemon: NewDaemon, new_visit: Callable[..., Visit], late: str
) -> None:
    daemon = new_daemon(instances={}).start()
    visitor = new_visit()
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    visitor.page.route(re.compile(re.escape(late)), hold)
    visitor.page.goto(f"{daemon.url}/ui", wait_until="commit")
    expect(visitor.page.get_by_role("heading", name="Overview")).to_be_visible()
    assert visitor.page.locator("html[data-live=on]").count() == 0, "it says so once it is true"
    visitor.page.wait_for_timeout(300)  # what begins too early begins within this time
    for route in held:
        route.continue_()
    expect(visitor.page.locator("html[data-live=on]")).to_be_attached()


def test_a_phone_shows_the_present_section_and_the_live_dot_in_few_lines(
    new_daemon: NewDaemon, new_visit: Callable[..., Visit]
) -> None:
    daemon = new_daemon(instances={}).start()
    visitor = new_visit(width=360)
    visitor.page.goto(f"{daemon.url}/ui/usage")
    expect(visitor.page.locator(".nav [aria-current]")).to_be_in_viewport(ratio=1)
    expect(visitor.page.locator(".live-on .icon")).to_be_visible()
    brand, theme = (visitor.page.locator(one).bounding_box() for one in (".brand", "[data-theme-switch]"))
    assert brand is not None
    assert theme is not None
    assert theme["y"] < brand["y"] + brand["height"]
    assert visitor.page.evaluate("scrollY") == 0
    visitor.assert_accessible()
    visitor.assert_fits()
