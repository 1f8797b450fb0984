"""The page of the roles in front of a gateway: what its tests do and look at."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from playwright.sync_api import expect

from tests.support.gateway import gateway_over

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Locator, Page

    from tests.support.browser import Visit
    from tests.support.gateway import Gateway

SETTINGS, EFFECTIVE = "/api/settings/models", "/api/settings/models/effective"
ROLES = {
    "output": {"model": "tiny", "instances": ["cpu", "card"]},
    "embedding": {"model": "minilm", "policy": "prefer_gpu"},
}
INSTANCES: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu", "slots": 4},
    "card": {"device": "gpu"},
    "gone": {"driver": "external", "url": "http://127.0.0.1:9", "device": "gpu"},
}


@contextmanager
def gateway_with_roles(home: Path) -> Iterator[Gateway]:
    """A gateway with a CPU, a card, and a server that nobody runs; `output` and `embedding` have models."""
    with gateway_over(home, ("cpu", "card"), config={"roles": ROLES}, instances=INSTANCES) as gateway:
        yield gateway


def reset(gateway: Gateway) -> None:
    """Take every change of the settings back."""
    roles = dict.fromkeys(gateway.get(SETTINGS)["roles"])
    changed(gateway, roles=roles, rollout=None, fallback=None)


def changed(gateway: Gateway, **change: Any) -> None:
    answer = gateway.call("POST", SETTINGS, json=change)
    assert answer.status_code == 200, answer.text


def setting(gateway: Gateway, role: str, key: str) -> tuple[Any, str]:
    found = gateway.get(EFFECTIVE)["roles"][role]
    for part in key.split("."):
        found = found[part]
    return found["value"], found["source"]


def asked(gateway: Gateway, role: str) -> dict[str, str]:
    """The headers of an answer to a chat with a role."""
    body = {"model": role, "messages": [{"role": "user", "content": "hello"}], "stream": False}
    answer = gateway.call("POST", "/api/chat", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.headers)


def opened(visitor: Visit, gateway: Gateway, role: str) -> Locator:
    """The card of a role on a page that has just been opened, its settings open."""
    visitor.page.goto(f"{gateway.url}/ui/roles")
    expect(visitor.page.locator("html[data-live=on]")).to_be_attached()
    card = visitor.page.get_by_role("article", name=role)
    card.locator("summary").click()
    return card


def field(card: Locator, label: str) -> Locator:
    return card.locator(f'[data-setting][data-label="{label}"]')


def save(card: Locator) -> None:
    card.get_by_role("button", name="Save").click()


def told(page: Page) -> Locator:
    """What the page says that has changed in effect."""
    return page.locator("#changes")
