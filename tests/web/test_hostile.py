"""Names, log lines and errors of other programs stand on every page as text, whatever is in them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import pytest
from playwright.sync_api import expect

from manager.web.pages import PAGES
from tests.support.daemon import wait_for
from tests.support.fixtures import making_daemons, new_manager_id
from tests.support.hostile import AS_NAMES, CORPUS, FOREIGN_ELEMENTS, IN_HEADERS
from tests.support.scripted import END, RefusedError, said, scripted_ollama

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from playwright.sync_api import Page

    from tests.support.browser import Visit
    from tests.support.daemon import Daemon
    from tests.support.engine import Engine
    from tests.support.scripted import ScriptedOllama

    NewVisit = Callable[..., Visit]

TAKEN = "document.documentElement.dataset.taken"


class Rig(NamedTuple):
    daemon: Daemon
    server: ScriptedOllama


@pytest.fixture(scope="module")
def rig(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A daemon that has met the whole corpus: in names, projects, log lines, errors and reasons."""
    with ExitStack() as stack:
        server = stack.enter_context(scripted_ollama(("tiny:latest", *AS_NAMES)))
        make = stack.enter_context(
            making_daemons(engine, tmp_path_factory.mktemp("hostile"), new_manager_id())
        )
        log_lines = "\n".join(one.replace("\x00", "")[:2000] for one in CORPUS)
        last_lines = "\n".join(CORPUS[:6])  # the reason of a failure has the end of the log only
        daemon = make(
            instances={
                "evil": {"driver": "external", "url": server.url},
                "failing": {"template": "failing"},
                "talking": {"template": "talking"},
            },
            templates={
                "failing": {"env": {"OLLAMA_SIM_CRASH": "load", "OLLAMA_SIM_VERSION": last_lines}},
                "talking": {"env": {"OLLAMA_SIM_VERSION": log_lines}},
            },
            config={"roles": {"thinking": {"model": "<img/src=x/onerror=alert(1)>"}}},
        ).start()
        wait_for(lambda: len(daemon.get("/api/tags")["models"]) > len(AS_NAMES) // 2)
        daemon.started("talking")
        daemon.started("failing")
        daemon.call("POST", "/api/chat", json=chat("tiny", "failing"))
        daemon.wait_for_phase("failing", "failed")
        assert CORPUS[0] in daemon.call("GET", "instances/talking/logs").text
        assert CORPUS[0] in "\n".join(daemon.instance("failing")["reason"]["log_tail"])
        meet(daemon, server)
        yield Rig(daemon, server)


def chat(model: str, instance: str = "evil") -> dict[str, Any]:
    return {"model": f"{model}@{instance}", "messages": [{"role": "user", "content": "x"}], "stream": False}


def meet(daemon: Daemon, server: ScriptedOllama) -> None:
    """Have requests of hostile projects fail with hostile errors; drain an instance for such a reason."""
    for place, text in enumerate(CORPUS):

        def refuses(_body: dict[str, Any], text: str = text) -> list[dict[str, Any]]:
            raise RefusedError(400, text)

        server.answer = refuses
        project = IN_HEADERS[place % len(IN_HEADERS)].strip()
        headers = {"X-Project-ID": project, "X-Intent": project}
        daemon.call("POST", "/api/chat", json=chat(AS_NAMES[place % len(AS_NAMES)]), headers=headers)
        daemon.call("POST", "/api/chat", json=chat("tiny"), headers=headers)
    server.answer = lambda _body: [said("fine", **END)]
    reason = CORPUS[1][:500]
    assert daemon.begin("evil", "drain").status_code in (200, 202, 422)
    assert daemon.call("POST", "instances/evil/drain", json={"reason": reason, "stop": False}).ok
    assert daemon.call("POST", "instances/evil/resume", json={}).ok


def assert_untouched(visitor: Visit) -> None:
    """Check that no text became a script, an element or a request; `Visit` checks the rest at its end."""
    page = visitor.page
    assert page.evaluate(TAKEN) is None, "a script ran"
    made = page.evaluate(
        "(selector) => document.querySelector(selector)?.outerHTML ?? null", FOREIGN_ELEMENTS
    )
    assert made is None, made
    visitor.assert_fits()


def watched(visitor: Visit) -> Page:
    visitor.page.on("dialog", lambda one: visitor.problems.append(f"dialog: {one.message}"))
    return visitor.page


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("one", PAGES, ids=lambda page: page.name)
def test_no_text_becomes_more_than_text(rig: Rig, new_visit: NewVisit, one: Any, width: int) -> None:
    visitor = new_visit(width=width)
    page = watched(visitor)
    page.goto(rig.daemon.url + one.path)
    page.wait_for_load_state("networkidle") if one.fragments is None else expect(
        page.locator("html[data-live=on]")
    ).to_be_attached()
    assert_untouched(visitor)
    for summary in page.locator("#region details:not([open]) > summary").all()[:40]:
        if summary.is_visible():
            summary.click()
    assert_untouched(visitor)
    # A change comes in by the live channel, is morphed into the page, and the page still works.
    text = IN_HEADERS[4]
    rig.daemon.call("POST", "/api/chat", json=chat(AS_NAMES[3]), headers={"X-Project-ID": text})
    if one.fragments is not None:
        expect(page.locator("html[data-live=on]")).to_be_attached()
        page.evaluate("window.page.refresh()")
        expect(page.locator("#region")).to_be_visible()
    expect(page.get_by_role("heading", level=1)).to_have_count(1)
    assert_untouched(visitor)
    page.get_by_role("button", name="Light or dark").click()
    expect(page.locator("html[data-theme]")).to_be_attached()


def test_a_hostile_name_is_read_on_the_overview_as_it_is(rig: Rig, new_visit: NewVisit) -> None:
    visitor = new_visit()
    page = watched(visitor)
    page.goto(f"{rig.daemon.url}/ui")
    expect(page.locator("html[data-live=on]")).to_be_attached()
    rig.server.answer = lambda _body: [said("fine", **END)]
    # Failures that other tests have caused may have opened it.
    assert rig.daemon.call("POST", "instances/evil/breaker/reset").ok
    for name in (AS_NAMES[0], AS_NAMES[4], AS_NAMES[8]):
        answer = rig.daemon.call("POST", "/api/chat", json=chat(name))
        assert answer.status_code == 200, answer.text
        expect(page.locator("#requests")).to_contain_text(name)
    assert_untouched(visitor)


def test_what_a_hostile_server_says_in_a_conversation_stays_text(rig: Rig, new_visit: NewVisit) -> None:
    visitor = new_visit()
    page = watched(visitor)
    everything = "\n\n".join(CORPUS)
    call = {"function": {"name": CORPUS[1], "arguments": {CORPUS[3]: CORPUS[0]}}}

    def answer(_body: dict[str, Any]) -> list[dict[str, Any]]:
        lines = [said(one, thinking=one) for one in CORPUS]
        return [
            *lines,
            said(everything),
            said("", tool_calls=[call]),
            {**said("", **END), "model": CORPUS[0]},
        ]

    page.goto(f"{rig.daemon.url}/ui/try")
    options = page.get_by_label("Role or model").locator("option")
    expect(options.nth(1)).to_be_attached()  # the first one stands there until the list has come
    values = [str(option.get_attribute("value")) for option in options.all()]
    assert CORPUS[0] in values
    for value in (CORPUS[0], CORPUS[3], "tiny:latest"):
        rig.server.answer = answer
        page.get_by_label("Role or model").select_option(value)
        page.get_by_label("Instance").select_option("evil")
        page.get_by_label("Your message").fill(everything)
        page.get_by_role("button", name="Send", exact=True).click()
        expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled()
        expect(page.locator("#try-turns [data-text]").last).to_contain_text(CORPUS[0])
        expect(page.locator("[data-call]").last).to_contain_text(CORPUS[1])
        assert_untouched(visitor)
        rig.server.answer = lambda _body: [said("x"), {"error": everything}]
        page.get_by_label("Result of").last.fill(CORPUS[9])
        page.get_by_role("button", name="Send the results").last.click()
        expect(page.locator("[data-problem-of-answer]").last).to_contain_text(CORPUS[0])
        page.get_by_text("The same request as code").click()
        for language in ("curl", "Python (ollama)", "Python (openai)", "JavaScript"):
            page.get_by_role("button", name=language, exact=True).click()
            expect(page.locator("#try-snippet")).to_contain_text("onerror=")
        page.get_by_text("The same request as code").click()
        assert_untouched(visitor)
        page.get_by_role("button", name="Clear").click()


@pytest.mark.parametrize("text", CORPUS, ids=range(len(CORPUS)))
def test_refused_addresses_and_forms_repeat_nothing_unescaped(rig: Rig, text: str) -> None:
    quoted = quote(text[:1500], safe="", errors="replace")
    browser = {"Accept": "text/html"}
    for path in (f"/ui/{quoted}", f"/sign-in?next={quoted}", f"/ui?x={quoted}", f"/ui/live?page={quoted}"):
        answer = rig.daemon.call("GET", path, headers=browser, allow_redirects=False)
        assert "<img" not in answer.text, path
        assert "evil.example/p" not in answer.headers.get("location", "")
        if any(mark in text for mark in '<>"') and "<" in text:
            assert text not in answer.text, path
