"""The page of usage, after real requests to a local server and to a paid one."""

from __future__ import annotations

import asyncio
import csv
import io
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import expect

from manager.web.words import UNKNOWN
from tests.support.billed import COST_USD, Billed, billed_gateway
from tests.support.daemon import wait_for
from tests.support.keyed import as_header, keyed_gateway
from tests.support.provider import refuses, speaks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from playwright.sync_api import Locator, Page

    from tests.support.browser import Visit
    from tests.support.relaying import Conversation

BUDGETS = [
    {"scope": "global", "period": "month", "soft_usd": COST_USD, "hard_usd": 1},
    {"scope": "project:lab", "period": "day", "hard_usd": 0},
    {"scope": "project:shop", "period": "day", "soft_usd": 0.5},
]
# Project, model as asked for, requests, and their status.
ASKED = [
    ("shop", "fast", 4, 200),
    ("shop", "pays", 2, 200),
    ("lab", "tiny", 3, 200),
    ("lab", "pays", 1, 402),
    ("lab", "nobody-has-it", 2, 404),
]
PAID_USD = 2 * COST_USD


@pytest.fixture(scope="module")
def billed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Billed]:
    with billed_gateway(tmp_path_factory.mktemp("billed"), budgets=BUDGETS) as billed:
        for project, model, count, status in ASKED:
            assert [billed.chat(model, project) for _ in range(count)] == [status] * count
        yield billed


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Billed]:
    """One for tests that send requests themselves."""
    with billed_gateway(tmp_path_factory.mktemp("busy"), budgets=BUDGETS) as busy:
        yield busy


@pytest.fixture
def page(billed: Billed, new_visit: Callable[..., Visit]) -> Page:
    return shown(billed, new_visit()).page


def shown(billed: Billed, visitor: Visit, query: str = "span=today") -> Visit:
    visitor.page.goto(f"{billed.gateway.url}/ui/usage?{query}")
    expect(visitor.page.locator("html[data-live=on]")).to_be_attached()
    return visitor


def figure(page: Page, name: str) -> str:
    return page.locator(f"[data-figure={name}] dd").inner_text()


def row(page: Page, name: str) -> list[str]:
    """The cells of a group in the table."""
    found = page.locator("#usage-groups tbody tr", has=page.get_by_role("rowheader", name=name, exact=True))
    return [cell.strip() for cell in found.locator("td").all_inner_texts()]


def table(page: Page, chart: str) -> dict[str, float]:
    """The sums of the columns of the table that a chart is drawn from, by their heads."""
    numbers: dict[str, float] = page.evaluate(
        """(id) => {
          const figure = document.getElementById(id);
          const heads = [...figure.querySelectorAll("thead th")].slice(1).map((head) => head.textContent);
          const rows = [...figure.querySelectorAll("tbody tr")];
          return Object.fromEntries(heads.map((head, place) => [head, rows.reduce(
            (sum, row) => sum + Number(row.querySelectorAll("td")[place].dataset.value ?? 0), 0)]));
        }""",
        f"chart-{chart}",
    )
    return numbers


def has_ink(page: Page, chart: str) -> bool:
    """Return whether a chart has pixels in the colour of each of its series; lines may cover each other."""
    found: bool = page.evaluate(
        """(id) => {
          const figure = document.getElementById(id);
          const canvas = figure.querySelector("canvas");
          if (!canvas) return false;
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          const isThere = (rect) => {
            const wanted = getComputedStyle(rect).fill.match(/\\d+/g).map(Number);
            let count = 0;
            for (let at = 0; at < data.length; at += 4) {
              const isInk = wanted.every((one, part) => Math.abs(data[at + part] - one) < 3);
              if (isInk && data[at + 3] > 200) count += 1;
            }
            return count > 10;
          };
          const keys = [...figure.querySelectorAll(".key rect")];
          return figure.dataset.chart === "bars" ? keys.every(isThere) : keys.some(isThere);
        }""",
        f"chart-{chart}",
    )
    return found


@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (360, "dark"), (360, "light"), (1280, "dark")]
)
def test_the_page_is_accessible_and_fits(
    billed: Billed, new_visit: Callable[..., Visit], width: int, scheme: str
) -> None:
    visitor = shown(billed, new_visit(width=width, scheme=scheme))
    for details in visitor.page.locator("figure details summary").all():
        details.click()
    visitor.assert_accessible()
    visitor.assert_fits()


def test_the_figures_are_those_of_the_api(billed: Billed, page: Page) -> None:
    total = billed.gateway.get("/api/v1/usage")["total"]
    assert (total["requests"], total["ok"], total["fallbacks"]) == (12, 9, 2)
    assert figure(page, "requests") == "12"
    assert figure(page, "ok_share") == "75 %"
    assert figure(page, "fallback_share") == "17 %"
    assert figure(page, "output_tokens") == str(total["output_tokens"])
    assert figure(page, "cost_usd") == f"${PAID_USD}"
    for name in ("mean_ms", "p50_ms", "p95_ms"):
        assert figure(page, name) == f"{total[name]:.0f} ms"


def test_each_model_has_its_share_and_its_numbers(page: Page) -> None:
    requests, share, answered, fallback_rate, *_, cost, mean, _p50, _p95 = row(page, "tiny")
    assert (requests, share, answered, fallback_rate, cost) == ("7", "58 %", "100 %", "0 %", "$0.00")
    assert mean.endswith(" ms")
    assert row(page, "gpt")[:4] == ["3", "25 %", "67 %", "67 %"]
    # Nothing was answered: there is no time, rather than one of zero.
    refused = row(page, "nobody-has-it")
    assert (refused[0], refused[2], refused[-3:]) == ("2", "0 %", [UNKNOWN] * 3)


def test_the_charts_are_drawn_from_the_tables_beside_them(page: Page) -> None:
    assert table(page, "requests") == {"tiny": 7, "gpt": 3, "nobody-has-it": 2}
    assert table(page, "cost") == {"gpt": pytest.approx(PAID_USD)}
    assert table(page, "fallbacks") == {"Fallback rate": pytest.approx(2 / 12)}
    assert table(page, "latency").keys() == {"Mean", "p50", "p95"}
    for name in ("requests", "tokens", "cost", "latency", "fallbacks"):
        assert has_ink(page, name), name


def test_the_legend_reads_the_bar_under_the_pointer(page: Page) -> None:
    chart = page.locator("#chart-requests")
    box = chart.locator(".u-over").bounding_box()
    assert box is not None
    hour = datetime.now(UTC).hour
    readings = chart.locator(".reading")
    expect(readings.first).to_have_text("7")
    # The chart has a bar for each hour until now; the last one has all that was asked.
    page.mouse.move(box["x"] + box["width"] * (hour + 0.4) / (hour + 1), box["y"] + box["height"] / 2)
    expect(chart.locator("[data-at]")).to_have_text(f"{datetime.now(UTC):%Y-%m-%d} {hour:02}:00")
    if hour:
        page.mouse.move(box["x"] + box["width"] * 0.2 / (hour + 1), box["y"] + box["height"] / 2)
        expect(readings.first).to_have_text("0")
    page.mouse.move(0, 0)
    expect(readings.first).to_have_text("7")
    expect(chart.locator("[data-at]")).to_have_text("")


def test_the_charts_follow_the_theme(page: Page) -> None:
    before = ink(page)
    page.locator("[data-theme-switch]").click()
    # The colours are other ones now: ink in them means that the chart was drawn anew.
    assert ink(page) != before
    assert has_ink(page, "requests")
    page.locator("[data-theme-switch]").click()
    assert ink(page) == before
    assert has_ink(page, "requests")


def ink(page: Page) -> str:
    colour: str = page.evaluate("getComputedStyle(document.querySelector('.chart .key rect')).fill")
    return colour


def test_a_refresh_brings_new_numbers_and_keeps_what_is_open(
    busy: Billed, new_visit: Callable[..., Visit]
) -> None:
    assert busy.chat("tiny") == 200
    page = shown(busy, new_visit()).page
    page.locator("#chart-requests summary").click()
    before = table(page, "requests")["tiny"]
    assert busy.chat("tiny") == 200
    page.get_by_role("button", name="Refresh").click()
    # Other tests ask for other models: the first line of the legend may be one of theirs.
    tiny = page.locator("#chart-requests li").filter(has=page.get_by_text("tiny", exact=True))
    expect(tiny.locator(".reading")).to_have_text(f"{before + 1:.0f}")
    assert table(page, "requests")["tiny"] == before + 1
    expect(page.locator("#chart-requests details[open]")).to_be_visible()
    expect(page.locator("#chart-requests canvas")).to_have_count(1)
    assert has_ink(page, "requests")


def test_a_view_is_a_link_and_its_table_is_a_file(billed: Billed, page: Page) -> None:
    page.get_by_label("Group by").select_option("project")
    expect(page.get_by_role("heading", name="By project")).to_be_visible()
    assert "by=project" in page.url
    assert "span=today" in page.url
    assert row(page, "lab")[0] == "6"
    address = page.url
    with page.expect_download() as download:
        page.get_by_role("link", name="Download this table as CSV").click()
    lines = csv.DictReader(io.StringIO(download.value.path().read_text()))
    assert {one["project"]: one["requests"] for one in lines}["lab"] == "6"
    page.goto("about:blank")
    page.goto(address)
    expect(page.get_by_role("heading", name="By project")).to_be_visible()


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("span=custom&from=2026-13-01", "Say the first day as a date"),
        ("span=custom&from=2026-02-01&to=2026-01-01", "is after the last one"),
        ("span=custom&from=2020-01-01&to=2026-01-01", "At most 400 days"),
        ("span=custom&from=%3Cscript%3E&by=%3Cscript%3E", "Say the first day as a date"),
    ],
)
def test_dates_that_cannot_be_are_refused_in_words(
    billed: Billed, new_visit: Callable[..., Visit], query: str, words: str
) -> None:
    visitor = shown(billed, new_visit(), query)
    expect(visitor.page.get_by_role("alert").filter(has_text=words)).to_be_visible()
    expect(visitor.page.locator("#usage-from")).to_have_attribute("aria-invalid", "true")
    visitor.assert_accessible()


def test_a_time_without_requests_says_so(billed: Billed, new_visit: Callable[..., Visit]) -> None:
    visitor = shown(billed, new_visit(), "span=custom&from=2026-01-01&to=2026-01-03")
    expect(visitor.page.get_by_text("No requests ended in this time.")).to_be_visible()
    expect(visitor.page.locator("[data-figure], canvas")).to_have_count(0)
    visitor.assert_accessible()


def test_the_share_of_each_role_is_shown(page: Page) -> None:
    shares = page.locator("#usage-roles .legend")
    expect(shares).to_contain_text("without a role")
    expect(shares).to_contain_text("fast: 3")


def test_budgets_show_their_money_and_their_state(billed: Billed, page: Page) -> None:
    of_api = {one["scope"]: one for one in billed.gateway.get("/api/v1/budgets")["budgets"]}
    assert of_api["global"]["spent_usd"] == pytest.approx(PAID_USD)
    everything = page.locator("[data-budget='global/month']")
    expect(everything).to_contain_text("soft limit reached")
    expect(everything).to_contain_text(f"${PAID_USD}")
    bar = everything.locator("svg.bar")
    assert width(bar.locator("rect").first) == pytest.approx(1000 * PAID_USD, abs=0.1)
    # The mark of the soft limit.
    assert float(bar.locator(".fill-limit").first.get_attribute("x") or 0) == pytest.approx(
        1000 * COST_USD, abs=0.1
    )
    expect(page.locator("[data-budget='project:lab/day']")).to_contain_text("used up")
    expect(page.locator("[data-budget='project:shop/day']")).to_contain_text("within its limits")
    notice = page.get_by_role("region", name="Budgets need a look")
    expect(notice).to_contain_text("project:lab")


def width(rect: Locator) -> float:
    return float(rect.get_attribute("width") or 0)


def test_money_that_is_reserved_has_its_part_of_the_bar(
    busy: Billed, new_visit: Callable[..., Visit]
) -> None:
    page = shown(busy, new_visit()).page
    asked, release = threading.Event(), threading.Event()

    async def waits(talk: Conversation) -> None:
        asked.set()
        await asyncio.to_thread(release.wait, 20)
        await speaks(talk)

    busy.provider.answer = waits
    everything = page.locator("[data-budget='global/month']")
    try:
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(busy.chat, "pays", "reserving")
            try:
                assert asked.wait(20)
                page.get_by_role("button", name="Refresh").click()
                reserved = busy.gateway.get("/api/v1/budgets")["budgets"][0]["reserved_usd"]
                assert reserved > 0
                expect(everything.locator("rect").nth(1)).to_have_attribute(
                    "width", str(round(1000 * reserved, 1))
                )
            finally:
                release.set()
            assert answer.result() == 200
    finally:
        busy.provider.answer = speaks


SETTINGS = "/api/settings/models"


@pytest.mark.parametrize(
    ("change", "state", "words"),
    [
        ({}, "off", "go to these paid servers, in this order, and cost money"),
        ({"force_local": True}, "on", "refused with 403 local_only"),
        ({"fallback": {"enabled": False}}, "off", "fallback.enabled is off"),
        ({"roles": {"pays": {"paid_fallback": False}}}, "off", "no role has paid_fallback"),
    ],
)
def test_the_force_local_switch_says_its_present_effect(
    busy: Billed, new_visit: Callable[..., Visit], change: dict[str, Any], state: str, words: str
) -> None:
    back = {"fallback": None, "roles": {"pays": {"paid_fallback": None}}}
    try:
        if change:
            assert busy.gateway.call("POST", SETTINGS, json=change).status_code == 200
        page = shown(busy, new_visit()).page
        switch = page.locator("#force-local")
        expect(switch.locator("h3 .state")).to_have_text(state)
        expect(switch).to_contain_text(words)
        if not change:
            expect(switch.locator(".tag")).to_have_text(["pays", "paid"])
    finally:
        answer = busy.gateway.call("POST", SETTINGS, json=back)
        assert answer.status_code == 200, answer.text


def test_the_switch_keeps_the_next_request_from_paid_servers(
    busy: Billed, new_visit: Callable[..., Visit]
) -> None:
    page = shown(busy, new_visit()).page
    switch = page.locator("#force-local")
    try:
        switch.get_by_role("button", name="Keep everything local").click()
        expect(switch.locator("h3 .state")).to_have_text("on")
        assert busy.chat("pays") == 403
        switch.get_by_role("button", name="Allow paid servers").click()
        page.get_by_role("button", name="Yes").click()
        expect(switch.locator("h3 .state")).to_have_text("off")
        assert busy.chat("pays") == 200
    finally:
        busy.gateway.call("POST", SETTINGS, json={"fallback": None})


def test_a_breaker_opens_before_ones_eyes_and_is_reset(busy: Billed, new_visit: Callable[..., Visit]) -> None:
    page = shown(busy, new_visit()).page
    line = page.locator("#breaker-paid")
    expect(line).to_contain_text("breaker closed")
    expect(line.get_by_role("button")).to_have_count(0)
    busy.provider.answer = refuses(500)
    try:
        wait_for(lambda: busy.chat("pays"), lambda _: breaker(busy)["state"] == "open")
    finally:
        busy.provider.answer = speaks
    expect(line).to_contain_text("breaker open")
    expect(line).to_contain_text(str(breaker(busy)["reason"]))
    expect(line.locator("time[data-until]")).to_have_text(re.compile(r"\d+ s"))
    line.get_by_role("button", name="Reset the breaker of paid").click()
    expect(line).to_contain_text("breaker closed")
    expect(line.get_by_role("button")).to_have_count(0)
    assert breaker(busy)["state"] == "closed"
    assert busy.chat("pays") == 200


def breaker(billed: Billed) -> dict[str, Any]:
    found: dict[str, Any] = billed.gateway.instance("paid")["breaker"]
    return found


def test_a_key_that_only_reads_sees_breakers_without_a_button(
    tmp_path: Path, new_visit: Callable[..., Visit]
) -> None:
    with keyed_gateway(tmp_path) as keyed:
        keyed.make("reader", "read")
        keyed.gateway.servers["one"].process.kill()
        wait_for(
            lambda: keyed.gateway.call(
                "POST", "/api/chat", json={"model": "tiny"}, headers=as_header(keyed.secrets["root"])
            ),
            lambda _: (
                keyed.ask("GET", "/api/runtime/compute/instances/one").json()["breaker"]["failures"] > 0
            ),
        )
        page = new_visit().page
        page.goto(f"{keyed.gateway.url}/sign-in?next=/ui/usage")
        page.get_by_label("Key").fill(keyed.secrets["reader"])
        page.get_by_role("button", name="Sign in").click()
        expect(page.locator("#breaker-one")).to_be_visible()
        expect(page.get_by_role("button", name="Reset")).to_have_count(0)
        expect(page.locator("#force-local").get_by_role("button")).to_have_count(0)
        page.close()  # before the daemon ends
