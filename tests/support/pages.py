"""The pages of a daemon in a browser, and what the tests of several pages ask of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from playwright.sync_api import expect

if TYPE_CHECKING:
    from playwright.sync_api import Locator

    from tests.support.browser import Visit
    from tests.support.daemon import Daemon


def knobs(**values: Any) -> dict[str, Any]:
    """Return a template of the simulated Ollama with these knobs."""
    return {"env": {f"OLLAMA_SIM_{name.upper()}": str(value) for name, value in values.items()}}


def opened(visitor: Visit, daemon: Daemon, path: str) -> Visit:
    """Open a page, and wait until it is live."""
    visitor.page.goto(f"{daemon.url}{path}")
    wait_until_live(visitor)
    return visitor


def wait_until_live(visitor: Visit) -> None:
    expect(visitor.page.locator("html[data-live=on]")).to_be_attached()


def card(visitor: Visit, instance: str) -> Locator:
    """Return the card of an instance on its page."""
    return visitor.page.get_by_role("article", name=instance, exact=True)


def button(visitor: Visit, instance: str, name: str) -> Locator:
    """Return a button of an instance, which may be among its settings."""
    return card(visitor, instance).get_by_role("button", name=name, exact=True)


def open_settings(visitor: Visit, instance: str) -> None:
    """Open the settings of an instance, if they are not open."""
    if card(visitor, instance).locator("details.instance-more[open]").count() == 0:
        card(visitor, instance).get_by_text("Settings and details").click()


def state(visitor: Visit, instance: str) -> Locator:
    """Return the word of the state of an instance."""
    return card(visitor, instance).locator("header .state")
