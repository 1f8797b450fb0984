"""The page of requests, with real requests through the gateway."""

from __future__ import annotations

import json
import re
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from urllib.parse import urlencode

import pytest
import requests
from playwright.sync_api import expect

from tests.support.daemon import Daemon, wait_for
from tests.support.fixtures import making_daemons

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from playwright.sync_api import Locator

    from tests.support.browser import Visit
    from tests.support.engine import Engine

CHAT = "/api/chat"
HOSTILE = (
    "<script>window.hit=1</script>",
    "<img src=x onerror=window.hit=1>",
    "\"' onmouseover=window.hit=1 x='",
    "{{ 7 * 7 }}",
    "javascript:window.hit=1",
    "a&b=c#d?e/../%2e%2e",
)
# More than a page of the history.
MANY = 60


def chat(
    daemon: Daemon, model: str, *, project: str = "", lane: str = "", stream: bool = True
) -> requests.Response:
    headers = {"X-Project-ID": project, "X-Lane": lane}
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    return daemon.call("POST", CHAT, json=body, headers=headers)


@pytest.fixture(scope="module")
def daemon(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """`alert-fast` falls back from `full` to `cpu`; `slow` answers for minutes; `thinking` is refused."""
    with making_daemons(engine, tmp_path_factory.mktemp("requests"), f"t{uuid.uuid4().hex[:8]}") as make:
        daemon = make(
            instances={
                "cpu": {"template": "loads"},
                "full": {"template": "full"},
                "slow": {"template": "slow"},
                "nas": {"driver": "external", "url": "http://127.0.0.1:9"},
            },
            templates={
                "loads": {"env": {"OLLAMA_SIM_LOAD_S": "0.3"}},
                "full": {"env": {"OLLAMA_SIM_QUEUE_FULL": "true"}},
                "slow": {"env": {"OLLAMA_SIM_TOKENS_PER_S": "0.2"}},
            },
            config={
                "roles": {
                    "alert-fast": {"model": "tiny", "instances": ["full", "cpu"]},
                    "thinking": {"model": "tiny", "target": "nas"},
                }
            },
        ).start()
        daemon.started("full")
        assert chat(daemon, "alert-fast", project="alerts").status_code == 200
        assert chat(daemon, "thinking", project="alerts").status_code == 503
        for one in HOSTILE:
            chat(daemon, one, stream=False, project=one, lane=one)
            chat(daemon, one, project=one)
        for number in range(MANY):
            assert chat(daemon, "tiny@cpu", stream=False, project=f"bulk-{number % 2}").ok
        yield daemon


@pytest.fixture
def visitor(daemon: Daemon, new_visit: Callable[..., Visit]) -> Visit:
    return new_visit()


def at(visitor: Visit, daemon: Daemon, query: str = "") -> Locator:
    """Open the page; return the rows of the history."""
    visitor.page.goto(f"{daemon.url}/ui/requests{query}")
    expect(visitor.page.locator("html[data-live=on]")).to_be_attached()
    return visitor.page.locator("#requests-rows > tr")


def listed(daemon: Daemon, **filters: Any) -> list[dict[str, Any]]:
    answer = daemon.call("GET", "requests", params=filters)
    found: list[dict[str, Any]] = answer.json()["requests"]
    return found


def the(daemon: Daemon, **filters: Any) -> dict[str, Any]:
    (one,) = listed(daemon, **filters)
    return one


class Open:
    """A request that is open until it is cancelled or closed."""

    def __init__(self, daemon: Daemon, **headers: str) -> None:
        body = {"model": "tiny@slow", "messages": [{"role": "user", "content": "hi"}]}
        self.answer = requests.post(daemon.url + CHAT, json=body, headers=headers, stream=True, timeout=120)
        self.id = self.answer.headers["X-Request-Id"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.answer.close()


# --- the history ------------------------------------------------------------------------------------


def test_a_fallback_is_seen_by_colour_shape_and_words_and_a_refusal_with_its_reason(
    visitor: Visit, daemon: Daemon
) -> None:
    rows = at(visitor, daemon, "?project=alerts")
    expect(rows).to_have_count(2)
    refused, fell = rows.nth(0), rows.nth(1)
    mark = fell.locator(".fell")
    expect(mark).to_have_text("Fallback: full was overloaded")
    expect(mark).to_have_attribute("title", "overloaded")
    expect(mark.locator("use")).to_have_attribute("href", "#icon-warn")
    expect(mark).to_have_css("border-left-style", "solid")
    expect(fell.locator(".state-ok")).to_have_text("answered")
    expect(fell).to_contain_text("alerts")
    expect(fell).to_contain_text("alert-fast")
    one = the(daemon, role="alert-fast")
    assert one["fallback"], one
    expect(fell).to_contain_text(f"{one['input_tokens']} → {one['output_tokens']}")
    expect(fell).to_contain_text("free")
    expect(refused.locator(".state-bad")).to_have_text("refused")
    expect(refused.get_by_title(the(daemon, role="thinking")["fallback_reason"])).to_be_visible()
    expect(refused.locator(".fell")).to_have_count(0)
    visitor.assert_accessible()
    # Where the columns behind are out of sight, the outcome says it.
    visitor.page.set_viewport_size({"width": 360, "height": 800})
    expect(fell.locator(".fell-mark")).to_have_text("Fallback")
    expect(fell.locator(".fell-mark")).to_be_visible()
    box = fell.locator(".fell-mark").bounding_box()
    assert box is not None
    assert box["x"] + box["width"] <= 360


@pytest.mark.parametrize(
    ("filters", "count"),
    [
        ({"project": "alerts"}, 2),
        ({"role": "thinking"}, 1),
        ({"outcome": "refused", "role": "thinking"}, 1),
        ({"project": "alerts", "instance": "cpu"}, 1),
        ({"project": "alerts", "outcome": "ok", "model": "tiny:latest", "since": "1h"}, 1),
        ({"project": "alerts", "key": "nobody"}, 0),
        ({"project": "bulk-1"}, MANY // 2),
    ],
)
def test_a_view_is_a_link_and_the_form_makes_it(
    visitor: Visit, daemon: Daemon, filters: dict[str, str], count: int
) -> None:
    at(visitor, daemon)
    form = visitor.page.get_by_role("form", name="Filters")
    labels = {"since": "Ended since"}
    for name, value in filters.items():
        control = form.get_by_label(labels.get(name, name.capitalize()))
        if name in ("role", "instance", "outcome"):
            control.select_option(value)
        else:
            control.fill(value)
    form.get_by_role("button", name="Search").click()
    rows = visitor.page.locator("#requests-rows > tr")
    expect(rows).to_have_count(count)
    assert len(listed(daemon, **filters)) == count
    for name, value in filters.items():
        expect(form.get_by_label(labels.get(name, name.capitalize()))).to_have_value(value)
    visitor.page.reload()
    expect(rows).to_have_count(count)
    if not count:
        expect(visitor.page.locator("#requests-empty")).to_contain_text("No request matches.")
    form.get_by_role("link", name="Clear").click()
    expect(visitor.page).to_have_url(f"{daemon.url}/ui/requests")


def test_a_wrong_filter_is_told_at_its_field(visitor: Visit, daemon: Daemon) -> None:
    at(visitor, daemon, "?since=yesterday-ish&project=alerts")
    since = visitor.page.get_by_label("Ended since")
    expect(since).to_have_attribute("aria-invalid", "true")
    expect(since).to_have_value("yesterday-ish")
    described = since.get_attribute("aria-describedby")
    expect(visitor.page.locator(f"#{described}")).to_contain_text("such as 15m or 2h")
    visitor.assert_accessible()


def test_older_pages_lead_to_the_first_request_and_back(visitor: Visit, daemon: Daemon) -> None:
    rows = at(visitor, daemon, "?since=1h")
    expect(rows).to_have_count(50)
    seen: list[str | None] = []
    while True:
        seen += [rows.nth(number).get_attribute("id") for number in range(rows.count())]
        older = visitor.page.get_by_role("link", name="Older")
        if not older.count():
            break
        older.click()
        expect(visitor.page).to_have_url(re.compile("since=1h&before="))
        expect(visitor.page.get_by_role("link", name="Newest")).to_be_visible()
        expect(visitor.page.locator("#requests-now")).to_be_hidden()
    ended = [one["request_id"] for one in listed(daemon, limit=1000) if not one["open"]]
    assert seen == [f"r-{id_}" for id_ in ended]
    expect(visitor.page.get_by_text("No older requests.")).to_be_visible()
    visitor.page.get_by_role("link", name="Newest").click()
    expect(visitor.page).to_have_url(f"{daemon.url}/ui/requests?since=1h")


def test_names_from_headers_and_bodies_are_only_text(visitor: Visit, daemon: Daemon) -> None:
    for one in HOSTILE:
        rows = at(visitor, daemon, "?" + urlencode({"project": one}))
        expect(rows).to_have_count(2)
        expect(rows.first).to_contain_text(one)
        expect(visitor.page.get_by_label("Project")).to_have_value(one)
        rows.first.get_by_role("link").click()
        expect(visitor.page.locator("dl.facts")).to_contain_text(one)
        params = urlencode({"view": "explain", "model": one, "lane": one, "instance": one[:90], "key": one})
        visitor.page.goto(f"{daemon.url}/ui/requests?{params}")
        expect(visitor.page.get_by_label("Model or role")).to_have_value(one)
        expect(visitor.page.get_by_label("Name of a key")).to_have_attribute("aria-invalid", "true")
    assert visitor.page.evaluate("window.hit") is None


# --- live -------------------------------------------------------------------------------------------


def test_a_new_request_comes_to_the_top_and_waits_while_the_list_is_read(
    visitor: Visit, daemon: Daemon
) -> None:
    page = visitor.page
    rows = at(visitor, daemon, "?project=live")
    expect(rows).to_have_count(0)
    news = page.locator("[data-news]")
    expect(news).to_be_disabled()
    assert chat(daemon, "tiny@cpu", project="live").ok
    expect(rows).to_have_count(1)
    expect(rows.locator("time")).not_to_be_empty()
    rows.first.hover()
    assert chat(daemon, "tiny@cpu", project="live").ok
    expect(news).to_have_text("1 new request")
    first = rows.first.get_attribute("id")
    assert rows.count() == 1, "no row moves under the pointer"
    page.get_by_role("heading", name="History").hover()
    expect(rows).to_have_count(2)
    expect(rows.nth(1)).to_have_id(str(first))
    expect(news).to_be_disabled()
    # A selection is not lost either.
    rows.nth(1).locator("td").nth(2).evaluate("one => getSelection().selectAllChildren(one)")
    assert chat(daemon, "tiny@cpu", project="live").ok
    expect(news).to_have_text("1 new request")
    assert page.evaluate("String(getSelection())").strip() == "live"
    news.click()
    expect(rows).to_have_count(3)
    # Another project is not of this view.
    assert chat(daemon, "tiny@cpu", project="other").ok
    assert chat(daemon, "tiny@cpu", project="live").ok
    page.evaluate("getSelection().removeAllRanges()")
    expect(rows).to_have_count(4)
    assert len(listed(daemon, project="live")) == 4


def test_a_paused_list_stays_until_it_goes_on(visitor: Visit, daemon: Daemon) -> None:
    page = visitor.page
    rows = at(visitor, daemon, "?project=paused")
    pause = page.get_by_role("button", name="Pause")
    pause.click()
    expect(pause).to_have_attribute("aria-pressed", "true")
    assert chat(daemon, "tiny@cpu", project="paused").ok
    newest = the(daemon, project="paused")["request_id"]
    expect(page.locator("#requests-pulse")).to_have_attribute("data-newest", newest)
    assert rows.count() == 0
    pause.click()
    expect(rows).to_have_count(1)


def test_an_old_page_does_not_change(visitor: Visit, daemon: Daemon) -> None:
    rows = at(visitor, daemon)
    visitor.page.get_by_role("link", name="Older").click()
    expect(visitor.page.get_by_role("link", name="Newest")).to_be_visible()
    before = rows.first.get_attribute("id")
    assert chat(daemon, "tiny@cpu", project="late").ok
    newest = the(daemon, project="late")["request_id"]
    expect(visitor.page.locator("#requests-pulse")).to_have_attribute("data-newest", newest)
    assert rows.first.get_attribute("id") == before
    expect(visitor.page.locator("[data-news]")).to_have_count(0)


def test_an_open_request_is_on_top_and_is_cancelled_with_its_button(visitor: Visit, daemon: Daemon) -> None:
    page = visitor.page
    rows = at(visitor, daemon, "?project=long")
    opened = page.locator("#requests-open tbody > tr")
    expect(page.get_by_text("No request is open.")).to_be_visible()
    with Open(daemon, **{"X-Project-ID": "long"}) as one, Open(daemon, **{"X-Project-ID": "else"}) as other:
        mine = page.locator(f"#open-{one.id}")
        expect(mine.locator(".state-work")).to_have_text("answers")
        expect(mine.locator("time")).to_have_text(re.compile(r"\d+ s"))
        expect(page.locator(f"#open-{other.id}")).to_be_hidden()
        mine.get_by_role("button", name="Cancel").click()
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("Its client gets an error.")
        dialog.get_by_role("button", name="No").click()
        assert the(daemon, project="long")["open"]
        mine.get_by_role("button", name="Cancel").click()
        dialog.get_by_role("button", name="Yes").click()
        expect(mine).to_have_count(0)
        expect(rows).to_have_count(1)
        expect(rows.locator(".state-warn")).to_have_text("cut off")
        assert the(daemon, project="long")["fallback_reason"] == "cancelled"
        assert json.loads(one.answer.content.splitlines()[-1])["error"]
    expect(opened).to_have_count(0)


# --- one request --------------------------------------------------------------------------------------


def test_a_click_explains_a_request_with_stages_attempts_and_candidates(
    visitor: Visit, daemon: Daemon
) -> None:
    page = visitor.page
    rows = at(visitor, daemon, "?project=alerts&outcome=ok")
    rows.first.locator("td").nth(3).click()
    one = daemon.get(f"requests/{the(daemon, role='alert-fast')['request_id']}")
    expect(page).to_have_url(f"{daemon.url}/ui/requests?id={one['request_id']}")
    expect(page.locator(".summary")).to_have_text(one["summary"])
    expect(page.locator(".notice .fell")).to_contain_text("full was overloaded")
    timeline = page.locator(".timeline tbody tr")
    assert one["load_ms"] >= 300
    expect(timeline.filter(has_text="Start of the instance")).to_have_count(1)
    expect(timeline.filter(has_text="Load of the model").get_by_role("img")).to_be_visible()
    expect(timeline.last).to_contain_text("Stream")
    expect(timeline.last.get_by_role("img")).to_have_accessible_name(re.compile("^from .* to .*ms|s$"))
    attempts = page.locator("section", has=page.get_by_role("heading", name="Attempts")).locator("tbody tr")
    expect(attempts).to_have_count(len(one["decision"]["attempts"]))
    expect(attempts.last).to_contain_text("cpu")
    passed = page.locator("section", has=page.get_by_role("heading", name="Passed over")).locator("tbody tr")
    expect(passed).to_have_count(len(one["decision"]["passed_over"]))
    for candidate in one["decision"]["passed_over"]:
        expect(passed.filter(has_text=candidate["words"]).first).to_be_visible()
    expect(page.locator("dl.facts")).to_contain_text(one["trace_id"])
    visitor.assert_accessible()


def test_a_refused_request_says_why_no_instance_was_asked(visitor: Visit, daemon: Daemon) -> None:
    one = daemon.get(f"requests/{the(daemon, role='thinking')['request_id']}")
    at(visitor, daemon, f"?id={one['request_id']}")
    expect(visitor.page.locator(".notice-bad .summary")).to_have_text(one["summary"])
    expect(visitor.page.get_by_text("No instance was asked.")).to_contain_text(
        one["decision"]["refused"]["reason"]
    )
    expect(visitor.page.get_by_text("nas could not be reached").first).to_be_visible()


def test_an_open_request_is_explained_while_it_goes_on_and_cancelled_there(
    visitor: Visit, daemon: Daemon
) -> None:
    page = visitor.page
    with Open(daemon, **{"X-Project-ID": "watched"}) as one:
        at(visitor, daemon, f"?id={one.id}")
        expect(page.locator(".notice-work")).to_contain_text("open")
        page.get_by_role("button", name="Cancel").click()
        page.get_by_role("dialog").get_by_role("button", name="Yes").click()
        expect(page.locator(".notice-warn .summary")).to_contain_text("cancelled")
        expect(page.get_by_role("button", name="Cancel")).to_have_count(0)


def test_an_unknown_request_is_said_to_be_unknown(visitor: Visit, daemon: Daemon) -> None:
    at(visitor, daemon, "?id=%3Cb%3Enobody")
    expect(visitor.page.get_by_text("This request is not known.")).to_be_visible()
    expect(visitor.page.get_by_text("there is no request '<b>nobody'")).to_be_visible()


# --- what would happen ----------------------------------------------------------------------------------


def test_the_form_says_where_a_request_would_go_and_why_not_elsewhere(visitor: Visit, daemon: Daemon) -> None:
    page = visitor.page
    at(visitor, daemon)
    page.get_by_role("link", name="What would happen?").click()
    page.get_by_label("Model or role").fill("tiny")
    page.get_by_label("Kind").select_option("generate")
    page.get_by_label("Instance X-Instance").select_option("cpu")
    page.get_by_role("button", name="Explain").click()
    said = daemon.get("explain?model=tiny&instance=cpu")
    expect(page.locator("#explanation .summary")).to_have_text(said["summary"])
    order = page.locator("section", has=page.get_by_role("heading", name="Order of candidates"))
    expect(order.locator("tbody tr")).to_have_count(len(said["attempts"]))
    expect(order.locator("tbody tr").first).to_contain_text("cpu")
    passed = page.locator("section", has=page.get_by_role("heading", name="Passed over")).locator("tbody tr")
    expect(passed).to_have_count(len(said["passed_over"]))
    expect(page.get_by_label("Instance X-Instance")).to_have_value("cpu")
    visitor.assert_accessible()
    page.get_by_label("Instance X-Instance").select_option("")
    page.get_by_label("Model or role").fill("thinking")
    page.get_by_label("X-Local-Only: true").check()
    page.get_by_role("button", name="Explain").click()
    expect(page.locator("#explanation.notice-bad")).to_contain_text("It would be refused")
    expect(page.get_by_label("X-Local-Only: true")).to_be_checked()
    asked = daemon.call("POST", "routing/explain", json={"model": "thinking", "local_only": True}).json()
    expect(page.locator("#explanation")).to_contain_text(asked["refused"]["message"])
    page.get_by_label("Name of a key").fill("nobody")
    page.get_by_role("button", name="Explain").click()
    expect(page.locator("#p-key")).to_have_text("no key 'nobody' is in force")


# --- looks, and who sees what -----------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["", "?view=explain&model=alert-fast", "?project=alerts"])
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_the_page_is_accessible_and_fits(
    daemon: Daemon, new_visit: Callable[..., Visit], query: str, width: int, scheme: str
) -> None:
    visitor = new_visit(width=width, scheme=scheme)
    with Open(daemon, **{"X-Project-ID": "open-ones"}) as one:
        at(visitor, daemon, query)
        if not query:
            expect(visitor.page.locator(f"#open-{one.id}")).to_be_visible()
        visitor.assert_accessible()
        visitor.assert_fits()
        visitor.page.goto(f"{daemon.url}/ui/requests?id={one.id}")
        visitor.assert_accessible()
        visitor.assert_fits()


@pytest.fixture
def keyed(engine: Engine, tmp_path: Path) -> Iterator[Keyed]:
    """A daemon that needs a key; it outlives the windows of a test that asks for it first."""
    admin = tmp_path / "key"
    admin.write_text("s3cret-of-the-admin-0123456789abcdef\n")
    admin.chmod(0o600)
    with making_daemons(engine, tmp_path, f"t{uuid.uuid4().hex[:8]}") as make:
        daemon = make(
            instances={"slow": {"template": "slow"}},
            templates={"slow": {"env": {"OLLAMA_SIM_TOKENS_PER_S": "0.2"}}},
            config={"server": {"key_file": str(admin)}},
        ).start(until_ready=False)
        daemon.wait_until_alive()
        bearer = {"Authorization": f"Bearer {admin.read_text().strip()}"}
        wait_for(lambda: daemon.call("GET", "/readyz", headers=bearer).status_code, lambda code: code == 200)
        keys = {}
        for name, scope in (("reader", "read"), ("opera", "operator")):
            answer = daemon.call(
                "POST", "/api/v1/keys", json={"name": name, "scopes": [scope]}, headers=bearer
            )
            assert answer.status_code == 201, answer.text
            keys[name] = answer.json()["secret"]
        yield Keyed(daemon, bearer, keys)


class Keyed(NamedTuple):
    daemon: Daemon
    admin: dict[str, str]
    keys: dict[str, str]


def test_only_an_operator_gets_a_cancel_button(keyed: Keyed, new_visit: Callable[..., Visit]) -> None:
    with Open(keyed.daemon, **keyed.admin) as one:
        for name, count in (("reader", 0), ("opera", 1)):
            visitor = new_visit(extra_http_headers={"Authorization": f"Bearer {keyed.keys[name]}"})
            visitor.page.goto(f"{keyed.daemon.url}/ui/requests")
            row = visitor.page.locator(f"#open-{one.id}")
            expect(row).to_contain_text("Key")
            expect(row.get_by_role("button", name="Cancel")).to_have_count(count)
            visitor.page.goto(f"{keyed.daemon.url}/ui/requests?id={one.id}")
            expect(visitor.page.locator(".summary")).to_be_visible()
            expect(visitor.page.get_by_role("button", name="Cancel")).to_have_count(count)
