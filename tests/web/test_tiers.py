"""Requests that leave the choice of the model to the daemon, on the pages that show them."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from playwright.sync_api import expect

from tests.support.gateway import gateway_over

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from playwright.sync_api import Locator, Page

    from tests.support.browser import Visit
    from tests.support.gateway import Gateway

    NewVisit = Callable[..., Visit]

HARD = "Compare both strategies step by step."
# Four requests that the daemon chooses for, one of which falls back, and one that names its model.
ASKED = [("auto", "hi"), ("auto", "ho"), ("auto:medium", "hi"), ("auto", HARD), ("tiny", "hi")]
CONFIG: dict[str, Any] = {
    "routing": {"auto": True},
    "roles": {
        "fast": {"model": "tiny"},
        "medium": {"model": "gone", "fallbacks": ["fast"]},
        "complex": {"model": "large"},
        "thinking": {"model": "tiny"},
    },
    "models": {
        "facts": {
            "tiny": {"expected_latency_ms": 200, "context_window": 8192, "cost_factor": 2},
            "quick": {"tier": "fast", "expected_latency_ms": 90, "capabilities": ["tools"]},
        }
    },
}
KNOBS = {"one": {"models": "tiny,minilm,large"}}
SCREENS = [(1280, "light"), (360, "dark"), (1280, "dark")]


def chat(gateway: Gateway, model: str, text: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "stream": False}
    answer = gateway.call("POST", "/api/chat", json=body)
    assert answer.status_code == 200, answer.text


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway_over(tmp_path_factory.mktemp("tiers"), knobs=KNOBS, config=CONFIG) as gateway:
        for model, text in ASKED:
            chat(gateway, model, text)
        yield gateway


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway without tiers, and with `auto` as a name like any other."""
    with gateway_over(
        tmp_path_factory.mktemp("plain"), config={"roles": {"thinking": {"model": "tiny"}}}
    ) as gateway:
        chat(gateway, "thinking", "hi")
        yield gateway


def shown(gateway: Gateway, visitor: Visit, path: str) -> Page:
    visitor.page.goto(f"{gateway.url}/ui/{path}")
    if not path.startswith("try"):
        expect(visitor.page.locator("html[data-live=on]")).to_be_attached()
    return visitor.page


def cells(table: Locator, name: str) -> list[str]:
    line = table.locator("tbody tr", has=table.page.get_by_role("rowheader", name=name, exact=True))
    return [cell.strip() for cell in line.locator("td").all_inner_texts()]


# --- usage ------------------------------------------------------------------------------------------------


def test_usage_has_the_share_of_each_tier_its_models_and_the_fallback_rate(
    gateway: Gateway, new_visit: NewVisit
) -> None:
    page = shown(gateway, new_visit(), "usage?span=today")
    tiers = page.locator("#usage-tiers")
    expect(tiers.locator(".legend").first).to_contain_text("fast: 50 %")
    assert cells(tiers.locator("[data-tiers=tier]"), "fast")[:4] == ["2", "50 %", "100 %", "0 %"]
    assert cells(tiers.locator("[data-tiers=tier]"), "medium")[:4] == ["1", "25 %", "100 %", "100 %"]
    assert cells(tiers.locator("[data-tiers=tier]"), "complex")[:4] == ["1", "25 %", "100 %", "0 %"]
    assert cells(tiers.locator("[data-tiers=model]"), "tiny")[:4] == ["3", "75 %", "100 %", "33 %"]
    assert cells(tiers.locator("[data-tiers=model]"), "large")[:2] == ["1", "25 %"]
    expect(tiers).to_contain_text("Requests that a tier below complex has answered: 3.")
    saved = gateway.get("/api/v1/llm/routing-stats")["saved"]["seconds"]
    expect(tiers.locator(".money")).to_contain_text("lost" if saved < 0 else "saved")
    expect(tiers.locator(".money")).to_contain_text(f"{abs(saved):.1f} s")


def test_the_tiers_of_a_time_without_requests_say_so(gateway: Gateway, new_visit: NewVisit) -> None:
    visitor = new_visit()
    page = shown(gateway, visitor, "usage?span=custom&from=2026-01-01&to=2026-01-03")
    expect(page.locator("#usage-tiers")).to_contain_text("No request went to a tier in this time.")
    expect(page.locator("#usage-tiers table")).to_have_count(0)
    visitor.assert_accessible()


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
@pytest.mark.parametrize("path", ["usage?span=today", "requests", "roles", "try?model=auto"])
def test_the_pages_are_accessible_and_fit(
    gateway: Gateway, new_visit: NewVisit, path: str, width: int, scheme: str
) -> None:
    visitor = new_visit(width=width, scheme=scheme)
    shown(gateway, visitor, path)
    visitor.assert_accessible()
    visitor.assert_fits()


# --- requests ---------------------------------------------------------------------------------------------


def test_a_request_says_how_its_model_was_chosen(gateway: Gateway, new_visit: NewVisit) -> None:
    visitor = new_visit()
    page = shown(gateway, visitor, "requests?role=complex")
    row = page.locator("#requests-rows > tr")
    expect(row).to_have_count(1)
    expect(row).to_contain_text("auto \N{RIGHTWARDS ARROW} strategy, complex (80 %)")
    expect(row).to_contain_text("it has 'strateg*', 0.")
    row.locator("a").first.click()
    choice = page.locator("#choice")
    expect(choice.locator("dd").nth(0)).to_have_text("auto")
    record = gateway.call("GET", "requests", params={"role": "complex"}).json()["requests"][0]
    found = choice.locator("dd").all_inner_texts()
    assert found[:5] == ["auto", "strategy", "complex", "80 %", "it has 'strateg*'"]
    assert found[5] == f"{record['routing_ms']:.2f} ms"
    visitor.assert_accessible()


def test_a_request_that_names_its_model_says_nothing_of_a_choice(
    gateway: Gateway, new_visit: NewVisit
) -> None:
    page = shown(gateway, new_visit(), "requests?model=tiny")
    rows = page.locator("#requests-rows > tr")
    expect(rows).to_have_count(4)
    expect(rows.filter(has_text="auto")).to_have_count(3)
    rows.filter(has_not_text="auto").locator("a").first.click()
    expect(page.get_by_role("heading", name="Timeline")).to_be_visible()
    expect(page.locator("#choice")).to_have_count(0)


# --- roles ------------------------------------------------------------------------------------------------


def test_a_tier_has_its_models_in_order_with_what_is_stated(gateway: Gateway, new_visit: NewVisit) -> None:
    page = shown(gateway, new_visit(), "roles")
    fast = page.locator("[data-role=fast] [data-tier] li")
    context = "8\N{NARROW NO-BREAK SPACE}192 tokens of context"
    stated = f"200 ms to the first token, {context}, cost factor 2"
    expect(fast).to_have_text(
        [f"1. tiny \N{EN DASH} {stated}", "2. quick \N{EN DASH} 90 ms to the first token, tools"]
    )
    expect(page.locator("[data-role=complex] [data-tier] li")).to_have_text(["1. large"])
    expect(page.locator("[data-role=thinking] [data-tier]")).to_have_count(0)
    auto = page.locator("#auto")
    expect(auto.locator(".state")).to_have_text("on")
    expect(auto).to_contain_text("Set by routing.auto in the configuration")
    expect(auto.get_by_role("button")).to_have_count(0)


# --- without tiers ----------------------------------------------------------------------------------------


def test_nothing_is_shown_of_tiers_where_there_are_none(plain: Gateway, new_visit: NewVisit) -> None:
    page = shown(plain, new_visit(), "usage?span=today")
    expect(page.locator("#usage-roles")).to_be_visible()
    expect(page.locator("#usage-tiers")).to_have_count(0)
    page = shown(plain, new_visit(), "roles")
    expect(page.locator("#auto .state")).to_have_text("off")
    expect(page.locator("[data-tier]")).to_have_count(0)
    page = shown(plain, new_visit(), "try?model=thinking")
    expect(page.get_by_label("Role or model")).to_have_value("thinking")
    expect(page.locator("#try-model option[value=auto]")).to_have_count(0)


def test_a_reload_that_changes_facts_and_auto_reaches_an_open_page(
    tmp_path: Path, new_visit: NewVisit
) -> None:
    with gateway_over(tmp_path, config=CONFIG) as gateway:
        page = shown(gateway, new_visit(), "roles")
        expect(page.locator("#auto .state")).to_have_text("on")
        config = yaml.safe_load(gateway.config_file.read_text())
        config |= {
            "routing": {"auto": False},
            "models": {"facts": {"other": {"tier": "fast", "temperature": 0}}},
        }
        gateway.configure(config)
        assert gateway.process is not None
        gateway.process.send_signal(signal.SIGHUP)
        expect(page.locator("#auto .state")).to_have_text("off")
        expect(page.locator("[data-role=fast] [data-tier] li").last).to_have_text(
            "2. other \N{EN DASH} temperature 0"
        )
        page.close()  # before the daemon ends


# --- try it -----------------------------------------------------------------------------------------------


def test_a_conversation_leaves_the_choice_and_each_answer_says_it(
    tmp_path: Path, new_visit: NewVisit
) -> None:
    with gateway_over(tmp_path, knobs=KNOBS, config=CONFIG) as gateway:
        conversation(shown(gateway, new_visit(), "try?model=auto"))


def conversation(page: Page) -> None:
    chooser = page.get_by_label("Role or model")
    expect(chooser).to_have_value("auto")
    expect(chooser.locator("option:checked")).to_have_text("auto (chosen by your message)")
    expect(chooser.locator("option[value='auto:complex']")).to_have_count(1)
    page.get_by_label("Your message").fill(HARD)
    page.get_by_role("button", name="Send", exact=True).click()
    choice = page.locator("#try-turns [data-choice]")
    expect(choice).to_have_text("Task: strategy. Tier: complex.")
    expect(page.locator("[data-fact=model]").last).to_have_text("large")
    expect(page.get_by_role("button", name="Regenerate")).to_be_enabled()
    chooser.select_option("tiny:latest")
    page.get_by_label("Your message").fill("Hello")
    page.get_by_role("button", name="Send", exact=True).click()
    expect(page.locator("[data-fact=model]").last).to_have_text("tiny:latest")
    expect(choice.last).to_have_attribute("hidden", "")
