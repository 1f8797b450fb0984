"""The page of usage, after real requests to a local server and to a paid one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from manager.web.words import UNKNOWN
from tests.support.billed import COST_USD, Billed, billed_gateway

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from playwright.sync_api import Page

    from tests.support.browser import Visit

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
    """Return whether a chart has bars or lines: pixels in the colour of its first series."""
    found: bool = page.evaluate(
        """(id) => {
          const figure = document.getElementById(id);
          const canvas = figure.querySelector("canvas");
          if (!canvas) return false;
          const wanted = getComputedStyle(figure.querySelector(".key rect")).fill.match(/\\d+/g).map(Number);
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          let count = 0;
          for (let at = 0; at < data.length; at += 4) {
            const isInk = wanted.every((one, part) => Math.abs(data[at + part] - one) < 3);
            if (isInk && data[at + 3] > 200) count += 1;
          }
          return count > 20;
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
