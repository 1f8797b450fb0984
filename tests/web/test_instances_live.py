"""The page of the instances while the daemon comes and goes, and for keys that may only look."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import requests
from playwright.sync_api import expect

from tests.support.pages import button, card, opened, state, wait_until_live

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.browser import Visit
    from tests.support.fixtures import NewDaemon

    NewVisit = Callable[..., Visit]

INSTANCES = {"cpu": {"template": "sim"}, "other": {"template": "sim"}}


def test_a_lost_connection_is_told_and_the_page_is_right_afterwards(
    new_daemon: NewDaemon, new_visit: NewVisit
) -> None:
    daemon = new_daemon(instances=INSTANCES).start()
    daemon.started("cpu")
    visitor = opened(new_visit(), daemon, "/ui/instances")
    expect(state(visitor, "cpu")).to_have_text("ready")
    daemon.stop()
    expect(visitor.page.locator("html[data-live=lost]")).to_be_attached()
    expect(visitor.page.get_by_text("Connection lost, trying again").first).to_be_visible()
    # While nobody answers, a button says so.
    button(visitor, "other", "Start").click()
    expect(visitor.page.locator("#toasts")).to_contain_text("The daemon did not answer.")
    # Other instances, and other states, once it is back.
    daemon.configure({**daemon.config, "instances": {**INSTANCES, "new": {"template": "sim"}}})
    daemon.start()
    daemon.stopped("cpu")
    wait_until_live(visitor)
    expect(state(visitor, "cpu")).to_have_text("stopped")
    expect(card(visitor, "new")).to_be_visible()
    button(visitor, "other", "Start").click()
    expect(state(visitor, "other")).to_have_text("ready")
    assert daemon.instance("other")["phase"] == "ready"
    for words in ("ERR_", "htmx:"):
        visitor.expect_problem(words)


def test_a_key_that_may_only_look_sees_no_buttons(new_daemon: NewDaemon, new_visit: NewVisit) -> None:
    daemon = new_daemon(instances=INSTANCES).start()
    root = _key(daemon.url, "root", "admin", None)
    reader = _key(daemon.url, "reader", "read", root)
    operator = _key(daemon.url, "operator", "operator", root)
    visitors = {}
    for name, secret in (("reader", reader), ("operator", operator)):
        visitor = visitors[name] = new_visit()
        visitor.page.goto(f"{daemon.url}/ui/instances")
        visitor.expect_problem("401")
        visitor.page.get_by_label("Key").fill(secret)
        visitor.page.get_by_role("button", name="Sign in").click()
        wait_until_live(visitor)
    looking, working = visitors["reader"], visitors["operator"]
    expect(looking.page.get_by_text("Your key may look at everything here")).to_be_visible()
    names = [one.inner_text() for one in card(looking, "cpu").get_by_role("button").all()]
    assert names == ["Logs"]
    assert looking.page.locator("[hx-post], [hx-patch], [hx-delete], [data-order]").count() == 0
    looking.assert_accessible()
    # What an operator does is seen by both; the log is open to both.
    button(working, "cpu", "Start").click()
    expect(state(working, "cpu")).to_have_text("ready")
    expect(state(looking, "cpu")).to_have_text("ready")
    assert [one.inner_text() for one in card(looking, "cpu").get_by_role("button").all()] == ["Logs"]
    button(looking, "cpu", "Logs").click()
    expect(looking.page.get_by_role("log")).to_contain_text("server config")
    refused = daemon.call("POST", "instances/cpu/stop", headers={"Authorization": f"Bearer {reader}"})
    assert refused.status_code == 403


def _key(url: str, name: str, scope: str, by: str | None) -> str:
    headers: dict[str, Any] = {} if by is None else {"Authorization": f"Bearer {by}"}
    made = requests.post(
        f"{url}/api/v1/keys", json={"name": name, "scopes": [scope]}, headers=headers, timeout=10
    )
    assert made.status_code == 201, made.text
    secret: str = made.json()["secret"]
    return secret
