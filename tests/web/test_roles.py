"""The page of the roles: what is saved is in force in the next request, and nothing is shown that is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from tests.support.roles_page import (
    SETTINGS,
    asked,
    changed,
    field,
    gateway_with_roles,
    opened,
    reset,
    save,
    setting,
    told,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.browser import Visit
    from tests.support.gateway import Gateway

    NewVisit = Callable[..., Visit]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway_with_roles(tmp_path_factory.mktemp("roles")) as gateway:
        yield gateway


@pytest.fixture
def gateway(shared: Gateway) -> Iterator[Gateway]:
    """The shared gateway; changes of its settings are taken back."""
    yield shared
    reset(shared)


def test_what_is_saved_acts_on_the_next_request_and_is_told(gateway: Gateway, new_visit: NewVisit) -> None:
    assert asked(gateway, "output")["X-Instance"] == "cpu"
    visitor = new_visit()
    card = opened(visitor, gateway, "output")
    expect(card).to_contain_text("goes to cpu")
    card.get_by_label("Compute target", exact=True).select_option("card")
    card.get_by_label("Concurrency", exact=True).fill("3")
    save(card)
    expect(told(visitor.page)).to_contain_text("Changed in effect")
    expect(told(visitor.page)).to_contain_text(
        "output Compute target: auto (default) \N{RIGHTWARDS ARROW} card (override)"
    )
    expect(told(visitor.page)).to_contain_text("output Concurrency: no limit (default)")
    assert asked(gateway, "output")["X-Instance"] == "card"
    assert setting(gateway, "output", "concurrency") == (3, "override")
    expect(card).to_contain_text("goes to card")
    expect(card).to_contain_text("0/3 in flight")
    assert setting(gateway, "output", "weight") == (1, "default")  # what was not touched was not sent


def test_the_model_of_a_role_can_be_another_one(gateway: Gateway, new_visit: NewVisit) -> None:
    visitor = new_visit()
    card = opened(visitor, gateway, "control")
    expect(card).to_contain_text("No model yet")
    card.get_by_label("Model", exact=True).fill("tiny")
    card.get_by_label("Model", exact=True).press("Enter")
    expect(told(visitor.page)).to_contain_text("control Model: none (default)")
    assert asked(gateway, "control")["X-Model"].startswith("tiny")


def test_each_value_has_its_source_and_an_override_goes_back_in_one_click(
    gateway: Gateway, new_visit: NewVisit
) -> None:
    changed(gateway, roles={"output": {"model": "other"}})
    visitor = new_visit()
    card = opened(visitor, gateway, "output")
    expect(field(card, "Model")).to_have_attribute("data-source", "override")
    expect(field(card, "Model").locator(".tag")).to_have_text("override")
    expect(field(card, "Instances").locator(".tag")).to_have_text("file")
    expect(field(card, "Weight").locator(".tag")).to_have_text("default")
    expect(field(card, "Instances").get_by_role("button")).to_have_count(0)
    card.get_by_role("button", name="Reset Model of output to tiny (file)").click()
    expect(told(visitor.page)).to_contain_text("other (override) \N{RIGHTWARDS ARROW} tiny (file)")
    expect(card.get_by_label("Model", exact=True)).to_have_value("tiny")
    assert setting(gateway, "output", "model") == ("tiny", "file")


def test_all_changes_of_a_role_go_back_at_once(gateway: Gateway, new_visit: NewVisit) -> None:
    changed(gateway, roles={"output": {"model": "other", "weight": 7}})
    visitor = new_visit()
    card = opened(visitor, gateway, "output")
    expect(card).to_contain_text("2 changed here")
    card.get_by_role("button", name="Reset all").click()
    visitor.page.get_by_role("button", name="Yes").click()
    expect(field(card, "Weight")).to_have_attribute("data-source", "default")
    assert setting(gateway, "output", "model") == ("tiny", "file")


def test_a_refused_value_says_why_at_its_field(gateway: Gateway, new_visit: NewVisit) -> None:
    visitor = new_visit()
    card = opened(visitor, gateway, "output")
    card.get_by_label("Queue length", exact=True).fill("many")
    card.get_by_label("Weight", exact=True).fill("0")
    card.get_by_label("Body overrides, JSON", exact=True).fill("{nonsense")
    save(card)
    expect(field(card, "Queue length").locator(".problem")).to_have_text("'many'; expected a whole number")
    expect(field(card, "Weight").locator(".problem")).to_contain_text("0; expected")
    expect(field(card, "Body overrides, JSON").locator(".problem")).to_contain_text("expected")
    expect(card.get_by_label("Queue length", exact=True)).to_have_attribute("aria-invalid", "true")
    expect(card.get_by_label("Queue length", exact=True)).to_be_focused()
    visitor.expect_problem("422")
    for label, value in (("Queue length", "100"), ("Weight", "1"), ("Body overrides, JSON", "")):
        card.get_by_label(label, exact=True).fill(value)
    # What contradicts another setting stands at the field in question, too.
    card.get_by_label("Instances", exact=True).fill("nowhere")
    save(card)
    expect(field(card, "Instances").locator(".problem")).to_contain_text("'nowhere' is no instance")
    expect(field(card, "Weight").locator(".problem")).to_be_empty()
    visitor.expect_problem("422")
    assert setting(gateway, "output", "instances") == (["cpu", "card"], "file")


def test_only_controls_that_take_effect_are_shown(gateway: Gateway, new_visit: NewVisit) -> None:
    visitor = new_visit()
    card = opened(visitor, gateway, "output")
    expect(card.get_by_label("Reserved slots", exact=True)).to_be_visible()
    card.get_by_label("Instances", exact=True).fill("")
    expect(card.get_by_label("Reserved slots", exact=True)).to_be_hidden()
    expect(card.get_by_label("Place of the system prompt", exact=True)).to_be_hidden()
    card.get_by_label("System prompt", exact=True).fill("Be brief.")
    expect(card.get_by_label("Place of the system prompt", exact=True)).to_be_visible()
    expect(card.get_by_label("Paid fallback", exact=True)).to_have_count(0)  # there is no paid server
    expect(visitor.page.get_by_label("Managed roles")).to_be_hidden()
    vectors = visitor.page.get_by_role("article", name="embedding")
    vectors.locator("summary").click()
    expect(vectors.get_by_label("Thinking", exact=True)).to_have_count(0)
    expect(vectors.get_by_label("Compute target", exact=True)).to_have_count(0)
    empty = visitor.page.get_by_role("article", name="control")
    empty.locator("summary").click()
    expect(empty.get_by_label("Model", exact=True)).to_have_value("")
    expect(empty.get_by_label("Keep warm on", exact=True)).to_be_hidden()


def test_every_kind_of_value_is_sent_as_the_api_takes_it(gateway: Gateway, new_visit: NewVisit) -> None:
    visitor = new_visit()
    card = opened(visitor, gateway, "output")
    for label, value in {
        "Instances": "card",
        "Fallback roles": "thinking, control",
        "Keep warm on": "card",
        "Queue length": "5",
        "Queue wait, seconds": "2.5",
        "Attempt timeouts, seconds": "45, 60",
        "Body overrides, JSON": '{"options": {"temperature": 0}}',
        "System prompt": "Be brief.",
    }.items():
        card.get_by_label(label, exact=True).fill(value)
    card.get_by_label("Fallback policy", exact=True).select_option("prefer_gpu")
    card.get_by_label("Thinking", exact=True).select_option("false")
    card.get_by_label("Place of the system prompt", exact=True).select_option("append")
    card.get_by_label("Mode", exact=True).select_option("async")
    card.get_by_label("Strategy", exact=True).select_option("scored")
    save(card)
    expect(told(visitor.page)).to_contain_text("Changed in effect")
    role = gateway.get(SETTINGS)["roles"]["output"]
    assert role["instances"] == role["keep_warm"] == ["card"]
    assert role["fallbacks"] == ["thinking", "control"]
    assert role["queue"] == {"length": 5, "wait_s": 2.5}
    assert role["attempt_timeouts_s"] == [45, 60]
    assert role["body"]["overrides"] == {"options": {"temperature": 0}}
    assert role["system"] == {"text": "Be brief.", "mode": "append"}
    assert (role["policy"], role["think"], role["mode"]) == ("prefer_gpu", False, "async")
    assert role["strategy"] == "scored"
    card.get_by_label("Instances", exact=True).fill("")
    card.get_by_label("Keep warm on", exact=True).fill("")
    save(card)
    expect(field(card, "Instances")).to_have_attribute("data-source", "file")
    assert setting(gateway, "output", "keep_warm") == ([], "override")


def test_a_model_that_nobody_has_is_warned_of(gateway: Gateway, new_visit: NewVisit) -> None:
    visitor = new_visit()
    card = opened(visitor, gateway, "output")
    card.get_by_label("Model", exact=True).fill("no/such:model")
    save(card)
    expect(card.locator(".notice-warn")).to_contain_text("no instance is known to have the model")
    link = card.get_by_role("link", name="Pull no/such:model")
    expect(link).to_have_attribute("href", "/ui/models?pull=no/such%3Amodel")


def test_a_hostile_name_is_text(gateway: Gateway, new_visit: NewVisit) -> None:
    name = "<img/src=x/onerror=alert(1)>'\"{{7*7}}"
    changed(gateway, roles={"output": {"model": name}, "embedding": {"model": name}})
    visitor = new_visit()
    card = opened(visitor, gateway, "output")
    expect(card.get_by_label("Model", exact=True)).to_have_value(name)
    expect(card.locator(".notice-warn")).to_contain_text("<img/src=x/onerror=alert(1)>")
    expect(visitor.page.locator("#embeddings dl")).to_contain_text(name)
    changed(gateway, roles={"output": None})
    expect(told(visitor.page)).to_contain_text(name)
    expect(visitor.page.locator("img")).to_have_count(0)


def test_two_windows_overwrite_nothing_of_each_other(gateway: Gateway, new_visit: NewVisit) -> None:
    first, second = new_visit(), new_visit()
    here, there = opened(first, gateway, "output"), opened(second, gateway, "output")
    there.get_by_label("Weight", exact=True).fill("9")  # typed, not saved
    here.get_by_label("Concurrency", exact=True).fill("4")
    here.get_by_label("Model", exact=True).fill("other")
    save(here)
    # The other window is brought up to date, says so, and keeps what is being typed.
    expect(told(second.page)).to_contain_text("Changed elsewhere")
    expect(told(second.page)).to_contain_text(
        "output Model: tiny (file) \N{RIGHTWARDS ARROW} other (override)"
    )
    expect(there.get_by_label("Model", exact=True)).to_have_value("other")
    expect(there.get_by_label("Weight", exact=True)).to_have_value("9")
    with second.page.expect_request(f"**{SETTINGS}") as sent:
        save(there)
    assert sent.value.post_data_json == {"roles": {"output": {"weight": 9}}}
    expect(told(second.page)).to_contain_text("output Weight: 1 (default)")
    role = gateway.get(SETTINGS)["roles"]["output"]
    assert (role["concurrency"], role["model"], role["weight"]) == (4, "other", 9)
    expect(here.get_by_label("Weight", exact=True)).to_have_value("9")


def test_a_value_that_changes_while_it_is_typed_is_shown_beside_it(
    gateway: Gateway, new_visit: NewVisit
) -> None:
    visitor = new_visit()
    card = opened(visitor, gateway, "output")
    card.get_by_label("Weight", exact=True).fill("9")
    expect(field(card, "Weight")).to_contain_text("In force: 1")
    changed(gateway, roles={"output": {"weight": 5}})
    expect(field(card, "Weight")).to_contain_text("In force: 5")
    expect(card.get_by_label("Weight", exact=True)).to_have_value("9")


def test_a_role_is_added_used_and_removed(gateway: Gateway, new_visit: NewVisit) -> None:
    visitor = new_visit()
    page = visitor.page
    opened(visitor, gateway, "output")
    page.get_by_role("button", name="Add a role").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Name").fill("Not A Name")
    dialog.get_by_role("button", name="Add", exact=True).click()
    expect(dialog.locator("#new-role-problem")).to_contain_text("expected")
    visitor.expect_problem("422")
    dialog.get_by_label("Name").fill("gpt-4.1")
    dialog.get_by_role("button", name="Add", exact=True).click()
    expect(dialog.locator("#new-role-problem")).to_contain_text("needs its kind")
    visitor.expect_problem("422")
    dialog.get_by_label("Kind of work").select_option("generate")
    dialog.get_by_label("Model").fill("tiny")
    dialog.get_by_role("button", name="Add", exact=True).click()
    expect(dialog).to_be_hidden()
    card = page.get_by_role("article", name="gpt-4.1")
    expect(card).to_be_visible()
    expect(told(page)).to_contain_text("gpt-4.1 added")
    assert asked(gateway, "gpt-4.1")["X-Model"].startswith("tiny")
    # Its name has a dot, which is no path.
    card.locator("summary").click()
    card.get_by_label("Concurrency", exact=True).fill("2")
    save(card)
    expect(told(page)).to_contain_text("gpt-4.1 Concurrency")
    card.get_by_role("button", name="Reset Concurrency of gpt-4.1 to no limit (default)").click()
    expect(card.get_by_label("Concurrency", exact=True)).to_have_value("")
    card.get_by_role("button", name="Remove the role").click()
    page.get_by_role("button", name="Yes").click()
    expect(card).to_have_count(0)
    expect(told(page)).to_contain_text("gpt-4.1 removed")
    assert "gpt-4.1" not in gateway.get(SETTINGS)["roles"]


def test_the_load_of_a_lane_is_live(gateway: Gateway, new_visit: NewVisit) -> None:
    visitor = new_visit()
    card = opened(visitor, gateway, "output")
    changed(gateway, roles={"output": {"concurrency": 1}})
    expect(card).to_contain_text("0/1 in flight")
    gateway.servers["cpu"].set(tokens=200, tokens_per_s=50)
    body = {"model": "output", "messages": [{"role": "user", "content": "hello"}], "stream": True}
    try:
        with gateway.call("POST", "/api/chat", json=body, stream=True) as answer:
            assert answer.status_code == 200
            expect(card).to_contain_text("1/1 in flight")
        expect(card).to_contain_text("0/1 in flight")
    finally:
        gateway.servers["cpu"].set(tokens=8, tokens_per_s=0)


def test_everything_works_by_keyboard(gateway: Gateway, new_visit: NewVisit) -> None:
    visitor = new_visit()
    page = visitor.page
    page.goto(f"{gateway.url}/ui/roles")
    expect(page.locator("html[data-live=on]")).to_be_attached()
    card = page.get_by_role("article", name="output")
    card.locator("summary").focus()
    page.keyboard.press("Enter")
    weight = card.get_by_label("Weight", exact=True)
    for _ in range(60):
        page.keyboard.press("Tab")
        if weight.evaluate("one => one === document.activeElement"):
            break
    expect(weight).to_be_focused()
    page.keyboard.type("6")
    page.keyboard.press("Enter")
    expect(told(page)).to_contain_text("output Weight: 1 (default) \N{RIGHTWARDS ARROW} 6 (override)")
    expect(weight).to_be_focused()
    page.keyboard.press("Shift+Tab")
    expect(card.get_by_role("button", name="Reset Weight of output to 1 (default)")).to_be_focused()
    page.keyboard.press("Enter")
    expect(weight).to_have_value("1")
    expect(weight).to_be_focused()  # the button has gone


@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (1280, "dark"), (360, "light"), (360, "dark")]
)
def test_the_page_is_accessible_and_fits(
    gateway: Gateway, new_visit: NewVisit, width: int, scheme: str
) -> None:
    changed(gateway, roles={"output": {"model": "nobody-has-this-model:latest", "weight": 3}})
    visitor = new_visit(width=width, scheme=scheme)
    card = opened(visitor, gateway, "output")
    card.get_by_label("Concurrency", exact=True).fill("-1")
    save(card)
    expect(field(card, "Concurrency").locator(".problem")).not_to_be_empty()
    visitor.expect_problem("422")
    card.get_by_label("Concurrency", exact=True).fill("2")
    save(card)
    expect(told(visitor.page)).to_contain_text("Changed in effect")
    visitor.assert_accessible()
    visitor.assert_fits()
    visitor.page.get_by_role("button", name="Add a role").click()
    visitor.assert_accessible()
    visitor.assert_fits()
