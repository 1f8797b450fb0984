"""The page of runs and schedules, with real runs and sweeps."""

from __future__ import annotations

import re
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import expect

from manager.web.pages.runs import MOST_SHOWN_BYTES
from tests.support.daemon import Daemon, wait_for
from tests.support.fixtures import making_daemons

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from playwright.sync_api import Locator, Page

    from tests.support.browser import Visit
    from tests.support.engine import Engine

RUNS = "/api/v1/runs"
HOSTILE = "<script>window.hit=1</script><img src=x onerror=window.hit=1>"


@pytest.fixture(scope="module")
def daemon(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with making_daemons(engine, tmp_path_factory.mktemp("runs"), f"t{uuid.uuid4().hex[:8]}") as make:
        yield make(
            instances={
                "cpu": {"template": "sim"},
                "slow": {"template": "slow"},
                "long": {"template": "long"},
                "idle": {"template": "sim"},
            },
            templates={
                "slow": {"env": {"OLLAMA_SIM_TOKENS_PER_S": "0.2"}},
                "long": {"env": {"OLLAMA_SIM_TOKENS": "900"}},
            },
            lifecycle={"probe_interval_s": 600, "resync_interval_s": 600},
            config={
                "roles": {"tool_selector": {"model": "tiny", "target": "cpu"}},
                "schedules": [
                    {"cron": "0 8 * * mon-fri", "action": "start", "instance": "slow"},
                    {"cron": "30 22 1,15 * *", "action": "reap", "timezone": "Asia/Tokyo"},
                ],
            },
        ).start()


@pytest.fixture
def visitor(daemon: Daemon, new_visit: Callable[..., Visit]) -> Visit:
    return new_visit()


def chat(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], **more}


def submitted(daemon: Daemon, model: str = "tiny@cpu", **more: Any) -> str:
    answer = daemon.call("POST", RUNS, json={"path": "/api/chat", "body": chat(model), **more})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def wait_for_status(daemon: Daemon, run_id: str, status: str) -> dict[str, Any]:
    found: dict[str, Any] = wait_for(
        lambda: daemon.get(f"{RUNS}/{run_id}"), lambda run: run["status"] == status, within_s=60
    )
    return found


def form(visitor: Visit) -> Locator:
    visitor.page.get_by_role("button", name="New run").click()
    return visitor.page.get_by_role("dialog", name="New run")


def newest(daemon: Daemon) -> dict[str, Any]:
    found: dict[str, Any] = daemon.get(f"{RUNS}?limit=1")["runs"][0]
    return found


def test_a_run_goes_from_the_form_to_its_result(visitor: Visit, daemon: Daemon) -> None:
    page = visitor.page
    page.goto(f"{daemon.url}/ui/runs")
    dialog = form(visitor)
    dialog.get_by_label("Body (JSON)").fill('{"model": "tiny@cpu", "stream": false, "messages": []}')
    dialog.get_by_label("Lane").select_option("tool_selector")
    dialog.get_by_label("Keep the result").fill("600")
    dialog.get_by_label("It may be executed again").check()
    visitor.assert_accessible()
    dialog.get_by_role("button", name="Queue the run").click()
    expect(dialog).to_be_hidden()
    expect(page.get_by_text("The run is queued.")).to_be_visible()
    run = newest(daemon)
    assert (run["lane"], run["expires_s"], run["idempotent"]) == ("tool_selector", 600, True)
    row = page.locator(f"#{run['id']}")
    expect(row.locator(".state-ok")).to_have_text("succeeded")
    expect(row).to_contain_text(re.compile(r"(9|10) min \d\d s"))
    row.get_by_role("link").click()
    expect(page).to_have_url(f"{daemon.url}/ui/runs?id={run['id']}")
    answer = daemon.call("GET", f"{RUNS}/{run['id']}/result")
    shown = page.locator("#result pre")
    expect(shown).to_contain_text(answer.json()["created_at"])
    expect(page.locator("#result")).to_contain_text("Status 200 · application/json")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.path().read_bytes() == answer.content
    page.get_by_role("link", name=wait_for_status(daemon, run["id"], "succeeded")["request_id"]).click()
    expect(page.locator(".summary")).to_contain_text("cpu")


def test_what_is_no_json_object_is_told_at_its_field_and_not_sent(visitor: Visit, daemon: Daemon) -> None:
    page, sent = visitor.page, list[str]()
    page.goto(f"{daemon.url}/ui/runs")
    page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    dialog = form(visitor)
    body = dialog.get_by_label("Body (JSON)")
    for text in ('{"model": ', "[1]", "null", ""):
        body.fill(text)
        dialog.get_by_role("button", name="Queue the run").click()
        expect(body).to_have_attribute("aria-invalid", "true")
        expect(dialog.locator("#run-body-problem")).to_contain_text("Expected one JSON object.")
        expect(body).to_be_focused()
    assert not sent
    body.fill('{"messages": []}')
    dialog.get_by_role("button", name="Queue the run").click()
    expect(dialog.locator("#run-body-problem")).to_contain_text("missing; expected the name of a model")
    visitor.expect_problem("422")
    body.fill('{"model": "tiny"}')
    dialog.get_by_label("Keep the result").fill("999999999999")
    dialog.get_by_role("button", name="Queue the run").click()
    expect(dialog.locator("#run-expires-problem")).to_contain_text("runs.retention_s")
    visitor.expect_problem("422")
    dialog.get_by_role("button", name="Close").click()
    expect(dialog).to_be_hidden()


def test_each_route_has_an_example_that_keeps_what_was_written(visitor: Visit, daemon: Daemon) -> None:
    visitor.page.goto(f"{daemon.url}/ui/runs")
    dialog = form(visitor)
    body, path = dialog.get_by_label("Body (JSON)"), dialog.get_by_label("Route")
    path.select_option("/v1/embeddings")
    expect(body).to_have_value(re.compile('"input"'))
    path.select_option("/api/generate")
    expect(body).to_have_value(re.compile('"prompt"'))
    body.fill('{"mine": 1}')
    path.select_option("/v1/messages")
    expect(body).to_have_value('{"mine": 1}')


def test_a_run_is_cancelled_in_the_list_and_on_its_own_page(visitor: Visit, daemon: Daemon) -> None:
    page = visitor.page
    first, second = submitted(daemon, "tiny@slow"), submitted(daemon, "tiny@slow")
    page.goto(f"{daemon.url}/ui/runs")
    row = page.locator(f"#{first}")
    expect(row.locator(".state-work")).to_have_text("running")
    row.get_by_role("button", name="Cancel").click()
    page.get_by_role("dialog").get_by_role("button", name="Yes").click()
    expect(row.locator(".state-off")).to_have_text("cancelled")
    wait_for_status(daemon, first, "cancelled")
    page.goto(f"{daemon.url}/ui/runs?id={second}")
    expect(page.get_by_text("The result appears here when the run has ended.")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("dialog").get_by_role("button", name="Yes").click()
    expect(page.locator("#run .state-off")).to_have_text("cancelled")
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0)
    wait_for_status(daemon, second, "cancelled")
    page.goto(f"{daemon.url}/ui/runs?status=cancelled")
    expect(page.locator("#runs tbody tr")).to_have_count(len(daemon.get(f"{RUNS}?status=cancelled")["runs"]))
    page.get_by_label("Status").select_option("interrupted")
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_text("No run has this status.")).to_be_visible()


def test_a_run_that_others_submit_appears_by_itself_and_expires(visitor: Visit, daemon: Daemon) -> None:
    waits = submitted(daemon, "tiny@slow")
    visitor.page.goto(f"{daemon.url}/ui/runs")
    expect(visitor.page.locator(f"#{waits}")).to_be_visible()
    run_id = submitted(daemon, expires_s=1)
    row = visitor.page.locator(f"#{run_id}")
    expect(row).to_be_visible()
    expect(row.locator(".state-off")).to_have_text("expired")
    assert daemon.call("DELETE", f"{RUNS}/{waits}").ok
    visitor.page.goto(f"{daemon.url}/ui/runs?id={run_id}")
    expect(visitor.page.get_by_text("The result is no longer kept.")).to_be_visible()


def test_a_result_is_only_text_and_only_its_beginning_is_shown(visitor: Visit, daemon: Daemon) -> None:
    page = visitor.page
    answer = daemon.call(
        "POST",
        RUNS,
        json={"path": "/api/chat", "body": chat(HOSTILE, stream=False)},
        headers={"X-Project-ID": HOSTILE, "X-Lane": ""},
    )
    run_id = answer.json()["id"]
    wait_for_status(daemon, run_id, "failed")
    page.goto(f"{daemon.url}/ui/runs")
    expect(page.locator(f"#{run_id}")).to_contain_text(HOSTILE)
    page.locator(f"#{run_id}").get_by_role("link").click()
    expect(page.locator("#result pre")).to_contain_text(HOSTILE)
    run_id = submitted(daemon, "tiny@long")
    run = wait_for_status(daemon, run_id, "succeeded")
    assert run["result"]["size_bytes"] > MOST_SHOWN_BYTES
    page.goto(f"{daemon.url}/ui/runs?id={run_id}")
    expect(page.get_by_text("The beginning of the result.")).to_be_visible()
    text = page.locator("#result pre").text_content() or ""
    assert len(text.encode()) <= MOST_SHOWN_BYTES + 2
    whole = daemon.call("GET", f"{RUNS}/{run_id}/result").content.decode()
    assert whole.startswith(text[:-4])
    page.goto(f"{daemon.url}/ui/runs?id=%3Cscript%3Ewindow.hit=1%3C/script%3E")
    expect(page.get_by_text("This run is not known.")).to_be_visible()
    assert page.evaluate("window.hit") is None


# --- schedules --------------------------------------------------------------------------------------


def test_schedules_are_told_in_words_with_their_next_times(visitor: Visit, daemon: Daemon) -> None:
    visitor.page.goto(f"{daemon.url}/ui/runs")
    rows = visitor.page.locator("#schedules tbody tr")
    expect(rows).to_have_count(3)
    expect(rows.nth(0)).to_contain_text("at 08:00, Monday to Friday")
    expect(rows.nth(0)).to_contain_text("0 8 * * mon-fri")
    expect(rows.nth(0).get_by_role("link", name="slow")).to_be_visible()
    expect(rows.nth(0).locator("td").nth(2)).to_have_text(re.compile(r"((Mon|Tue|Wed|Thu|Fri) .* 08:00){3}"))
    expect(rows.nth(1).locator("td").nth(2)).to_have_text(re.compile(r"(22:30.*){3}Asia/Tokyo"))
    expect(rows.nth(1)).to_contain_text("not since the daemon began")
    expect(rows.nth(2)).to_contain_text("every 600 s")
    listed = daemon.get("schedules")
    assert listed["count"] == 3
    assert [len(one["next"]) for one in listed["schedules"]] == [3, 3, 0]
    assert all(one["next"][0].endswith("13:30:00.000Z") for one in listed["schedules"][1:2]), "Tokyo is ahead"


def opened_sweep(page: Page, daemon: Daemon) -> Locator:
    """Open the dialog while `idle` counts as unused: on a busy machine its processor time looks like use."""
    dialog = page.get_by_role("dialog", name="Sweep idle instances")
    row = dialog.locator("li", has=page.locator("strong", has_text=re.compile("^idle$")))
    for _ in range(20):
        wait_for(
            lambda: daemon.call("POST", "reap", params={"dry_run": "true"}).json()["instances"],
            lambda found: any(one["action"] == "would_stop" for one in found),
        )
        page.get_by_role("button", name="Sweep idle instances now").click()
        expect(row).to_be_visible()
        if "would be stopped" in row.inner_text():
            return dialog
        dialog.get_by_role("button", name="Close").click()
    raise AssertionError("idle never counted as unused")


def test_a_sweep_shows_first_what_it_would_stop(visitor: Visit, daemon: Daemon) -> None:
    page = visitor.page
    daemon.started("idle")
    assert daemon.call("PATCH", "instances/idle", json={"ttl_s": 1}).ok
    page.goto(f"{daemon.url}/ui/runs")
    dialog = opened_sweep(page, daemon)
    expect(dialog).to_contain_text("idle past its TTL of 1 s")
    visitor.assert_accessible()
    dialog.get_by_role("button", name="Close").click()
    assert daemon.instance("idle")["phase"] == "ready"
    opened_sweep(page, daemon).get_by_role("button", name="Stop these now").click()
    expect(page.get_by_text("Stopped: idle")).to_be_visible()
    expect(dialog).to_be_hidden()
    assert daemon.instance("idle")["phase"] == "stopped"
    page.get_by_role("button", name="Sweep idle instances now").click()
    expect(dialog.get_by_role("button", name="Stop these now")).to_be_disabled()


# --- looks, and who sees what -----------------------------------------------------------------------


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_the_page_is_accessible_and_fits(
    daemon: Daemon, new_visit: Callable[..., Visit], width: int, scheme: str
) -> None:
    visitor = new_visit(width=width, scheme=scheme)
    run_id = submitted(daemon)
    wait_for_status(daemon, run_id, "succeeded")
    for query in ("", f"?id={run_id}", "?status=interrupted"):
        visitor.page.goto(f"{daemon.url}/ui/runs{query}")
        visitor.assert_accessible()
        visitor.assert_fits()
    visitor.page.goto(f"{daemon.url}/ui/runs")
    visitor.page.keyboard.press("Tab")
    visitor.page.get_by_role("button", name="New run").focus()
    visitor.page.keyboard.press("Enter")
    expect(visitor.page.get_by_role("dialog", name="New run")).to_be_visible()
    visitor.assert_fits()
    visitor.page.keyboard.press("Escape")
    expect(visitor.page.get_by_role("dialog", name="New run")).to_be_hidden()


@pytest.fixture
def keyed(engine: Engine, tmp_path: Path) -> Iterator[tuple[Daemon, dict[str, str]]]:
    """A daemon, and the header of a key for each scope; it outlives the windows of a test."""
    admin = tmp_path / "key"
    admin.write_text("s3cret-of-the-admin-0123456789abcdef\n")
    admin.chmod(0o600)
    with making_daemons(engine, tmp_path, f"t{uuid.uuid4().hex[:8]}") as make:
        daemon = make(config={"server": {"key_file": str(admin)}}).start(until_ready=False)
        daemon.wait_until_alive()
        bearer = {"Authorization": f"Bearer {admin.read_text().strip()}"}
        wait_for(lambda: daemon.call("GET", "/readyz", headers=bearer).status_code, lambda code: code == 200)
        keys = {}
        for name, scope in (
            ("mine", "client"),
            ("other", "client"),
            ("reader", "read"),
            ("opera", "operator"),
        ):
            answer = daemon.call(
                "POST", "/api/v1/keys", json={"name": name, "scopes": [scope]}, headers=bearer
            )
            assert answer.status_code == 201, answer.text
            keys[name] = f"Bearer {answer.json()['secret']}"
        yield daemon, keys


def test_a_key_sees_its_own_runs_and_what_its_scope_permits(
    keyed: tuple[Daemon, dict[str, str]], new_visit: Callable[..., Visit]
) -> None:
    daemon, keys = keyed
    body = {"path": "/api/chat", "body": chat("tiny")}
    answer = daemon.call("POST", RUNS, json=body, headers={"Authorization": keys["mine"]})
    run_id = answer.json()["id"]
    seen = {}
    for name, header in keys.items():
        page = new_visit(extra_http_headers={"Authorization": header}).page
        page.goto(f"{daemon.url}/ui/runs")
        expect(page.get_by_role("link", name="Runs")).to_be_visible()
        parts = (f"#{run_id}", "#new-run", "#schedules", "#reap", ".empty")
        seen[name] = [page.locator(part).count() > 0 for part in parts]
        page.goto(f"{daemon.url}/ui/runs?id={run_id}")
        seen[name].append(page.locator("#run").count() > 0)
    assert seen == {
        "mine": [True, True, False, False, False, True],
        "other": [False, True, False, False, True, False],
        "reader": [False, False, True, False, True, False],
        "opera": [True, False, True, True, False, True],
    }
