"""The page of the roles: the embeddings runtime, what acts on every request, and who may change what."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from tests.support.gateway import gateway_over
from tests.support.keyed import Keyed
from tests.support.roles_page import (
    EFFECTIVE,
    SETTINGS,
    changed,
    field,
    gateway_with_roles,
    opened,
    reset,
    save,
    told,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.browser import Visit
    from tests.support.gateway import Gateway

    NewVisit = Callable[..., Visit]

PAID = {
    "driver": "cloud",
    "protocol": "openai",
    "url": "http://127.0.0.1:9/v1",
    "key_env": "TEST_PAID_KEY",
    "models": {"gpt": {"input_usd_per_mtok": 1, "output_usd_per_mtok": 2, "for": ["far"]}},
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway_with_roles(tmp_path_factory.mktemp("roles")) as gateway:
        yield gateway


@pytest.fixture
def gateway(shared: Gateway) -> Iterator[Gateway]:
    """The shared gateway; changes of its settings are taken back."""
    yield shared
    reset(shared)


def test_the_embeddings_runtime_is_pinned_and_its_fallback_cannot_be_overlooked(
    gateway: Gateway, new_visit: NewVisit
) -> None:
    visitor = new_visit()
    page = visitor.page
    opened(visitor, gateway, "output")
    runtime = page.locator("#embeddings")
    expect(runtime.locator("dl")).to_contain_text("minilm")
    expect(runtime.locator("dl")).to_contain_text("384")
    expect(runtime.locator("dl")).to_contain_text("card GPU")
    for id_, word in (("cpu", "Running"), ("card", "Running"), ("gone", "Unavailable")):
        expect(runtime.get_by_role("listitem").filter(has_text=id_)).to_contain_text(word)
    expect(runtime.locator(".notice-warn")).to_have_count(0)
    runtime.get_by_label("Compute target", exact=True).select_option("card")
    runtime.get_by_role("button", name="Save").click()
    expect(told(page)).to_contain_text("embedding Compute target: auto (default)")
    assert gateway.get(SETTINGS)["embedding_target_instance"] == "card"
    gateway.call("POST", "/api/runtime/compute/instances/card/drain", json={"reason": "test"})
    try:
        expect(runtime.locator(".notice-warn")).to_contain_text("Embeddings run on the CPU")
        answer = gateway.call("POST", "/api/embed", json={"model": "embedding", "input": "a"})
        assert answer.headers["X-Instance"] == "cpu"
        expect(runtime).to_contain_text("was answered by cpu as a fallback")
        expect(page.get_by_role("article", name="embedding")).to_contain_text("falls back to")
    finally:
        gateway.call("POST", "/api/runtime/compute/instances/card/resume")
    expect(runtime.locator("dl")).to_contain_text("card GPU")
    runtime.get_by_label("Fallback policy", exact=True).select_option("cpu_only")
    runtime.get_by_role("button", name="Save").click()
    # The pin to a GPU and the policy contradict each other: the API names the target.
    expect(runtime.locator(".problem", has_text="does not run on the CPU only")).to_be_visible()
    visitor.expect_problem("422")


def test_the_switch_for_paid_servers_acts_at_once(gateway: Gateway, new_visit: NewVisit) -> None:
    visitor = new_visit()
    opened(visitor, gateway, "output")
    switch = visitor.page.locator("#local-only")
    expect(switch).to_contain_text("Off. No paid server is configured")
    switch.get_by_role("button", name="Keep everything local").click()
    expect(switch).to_contain_text("On.")
    assert gateway.get(SETTINGS)["force_local"] is True
    switch.get_by_role("button", name="Allow paid servers").click()
    visitor.page.get_by_role("button", name="Yes").click()
    expect(switch).to_contain_text("Off.")
    assert gateway.get(EFFECTIVE)["force_local"] == {"value": False, "source": "override"}
    switch.get_by_role("button", name="Reset Local only").click()
    expect(switch.locator(".tag")).to_have_text("default")


def test_the_stage_of_the_rollout_changes_after_a_question(gateway: Gateway, new_visit: NewVisit) -> None:
    visitor = new_visit()
    opened(visitor, gateway, "output")
    rollout = visitor.page.locator("#rollout")
    expect(rollout).to_contain_text("all requests are managed")
    rollout.get_by_label("Stage", exact=True).select_option("lanes")
    rollout.get_by_role("button", name="Save").click()
    visitor.page.get_by_role("button", name="Yes").click()
    expect(rollout.locator(".problem:not(:empty)").first).to_be_visible()
    visitor.expect_problem("422")
    rollout.get_by_label("Managed roles", exact=True).fill("output")
    rollout.get_by_label("Raw server", exact=True).fill(gateway.servers["cpu"].url)
    rollout.get_by_role("button", name="Save").click()
    visitor.page.get_by_role("button", name="No", exact=True).click()
    assert gateway.get(SETTINGS)["rollout"]["stage"] == "all"
    rollout.get_by_role("button", name="Save").click()
    visitor.page.get_by_role("button", name="Yes").click()
    expect(rollout).to_contain_text("requests of the managed roles are managed")
    expect(told(visitor.page)).to_contain_text("Rollout Stage: all (default)")
    assert gateway.get(SETTINGS)["rollout"] == {
        "stage": "lanes",
        "lanes": ["output"],
        "raw_url": gateway.servers["cpu"].url,
    }


@pytest.fixture
def paying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    monkeypatch.setenv("TEST_PAID_KEY", "secret")
    config = {
        "roles": {"far": {"kind": "generate", "paid_fallback": True}, "own": {"kind": "generate"}},
        "fallback": {"enabled": True},
    }
    with gateway_over(tmp_path, ("cpu",), config=config, instances={"paid": PAID}) as gateway:
        yield gateway


def test_paid_servers_are_named_and_kept_out_at_once(paying: Gateway, new_visit: NewVisit) -> None:
    visitor = new_visit()
    card = opened(visitor, paying, "far")
    expect(card.get_by_label("Paid fallback", exact=True)).to_be_checked()
    switch = visitor.page.locator("#local-only")
    expect(switch).to_contain_text("Off: paid servers (paid) may answer for far where nothing local can.")
    explained = paying.call("POST", "routing/explain", json={"model": "far"}).json()
    assert [one["instance"] for one in explained["attempts"]] == ["paid"]
    switch.get_by_role("button", name="Keep everything local").click()
    expect(switch).to_contain_text("On: every request stays on local servers.")
    body = {"model": "far", "messages": [], "stream": False}
    assert paying.call("POST", "/api/chat", json=body).status_code == 403
    card.get_by_label("Paid fallback", exact=True).uncheck()
    save(card)
    expect(told(visitor.page)).to_contain_text(
        "far Paid fallback: on (file) \N{RIGHTWARDS ARROW} off (override)"
    )
    expect(switch).to_contain_text("On: every request")
    switch.get_by_role("button", name="Allow paid servers").click()
    visitor.page.get_by_role("button", name="Yes").click()
    expect(switch).to_contain_text("Off. No role has paid fallback")


def test_a_change_that_fits_no_more_is_named_and_taken_back(paying: Gateway, new_visit: NewVisit) -> None:
    changed(paying, roles={"own": {"weight": 5}, "far": {"fallbacks": ["own"]}})
    roles = {name: one for name, one in paying.config["roles"].items() if name != "own"}
    paying.configure({**paying.config, "roles": roles})
    assert paying.process is not None
    paying.process.send_signal(signal.SIGHUP)
    visitor = new_visit()
    opened(visitor, paying, "far")
    gone = visitor.page.locator("#region .notice", has_text="roles.own.weight was changed here")
    left = visitor.page.locator("#region .notice", has_text="roles.far.fallbacks was changed here")
    for notice in (gone, left):
        expect(notice).to_contain_text("'own'", timeout=20_000)
        notice.get_by_role("button", name="Take it back").click()
        expect(notice).to_have_count(0)
    assert paying.get(EFFECTIVE)["ignored"] == []


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[Keyed]:
    with gateway_over(tmp_path, ("cpu",), config={"roles": {"output": {"model": "tiny"}}}) as gateway:
        yield Keyed(gateway)


def test_a_key_that_may_only_read_sees_values_and_no_controls(keyed: Keyed, new_visit: NewVisit) -> None:
    secret = keyed.make("reader", "read")
    answer = keyed.ask("POST", SETTINGS, json={"roles": {"output": {"weight": 4}}})
    assert answer.status_code == 200, answer.text
    visitor = new_visit()
    page = visitor.page
    page.goto(f"{keyed.gateway.url}/ui/roles")
    visitor.expect_problem("401")
    page.get_by_label("Key").fill(secret)
    page.get_by_role("button", name="Sign in").click()
    card = page.get_by_role("article", name="output")
    card.locator("summary").click()
    expect(field(card, "Weight")).to_contain_text("4")
    expect(field(card, "Weight").locator(".tag")).to_have_text("override")
    expect(page.locator("#region :is(input, select, textarea, button)")).to_have_count(0)
    expect(page.get_by_role("button", name="Add a role")).to_have_count(0)
    expect(page.locator("#region")).to_contain_text("it lacks the scope operator")
    # What an operator changes reaches this page too.
    assert keyed.ask("POST", SETTINGS, json={"roles": {"output": {"weight": 8}}}).status_code == 200
    expect(field(card, "Weight")).to_contain_text("8")
    assert keyed.ask("POST", SETTINGS, key="reader", json={}).status_code == 403
    visitor.assert_accessible()
