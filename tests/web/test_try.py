"""Try it: conversations through the gateway, and the same requests as code."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import expect

from tests.support.daemon import wait_for
from tests.support.gateway import gateway_over
from tests.support.scripted import END, RefusedError, said, scripted_ollama

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from playwright.sync_api import Page

    from tests.support.browser import Visit
    from tests.support.gateway import Gateway
    from tests.support.scripted import ScriptedOllama

    NewVisit = Callable[..., Visit]

MODELS = ("smart:latest",)
# The smallest PNG.
PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
# Quotes of every language, expansions of shells and templates, line ends, and what is invisible.
HOSTILE = (
    """it's "quoted" $HOME `id` $(id) \\ \\n !! %s {{7*7}} ${7*7}\n\ttab\r\nend </script>"""
    """<img src=x onerror=a()> 'EOF' \u2028\u2029 \u202egnp.exe \x1b[31m \x7f \U0001f389 """
    "\U0001f468\u200d\U0001f469 \xfc"
)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, ScriptedOllama]]:
    """A gateway in front of a simulated Ollama (`plain`), and of one that the tests write (`smart`)."""
    with ExitStack() as stack:
        smart = stack.enter_context(scripted_ollama(MODELS))
        gateway = stack.enter_context(
            gateway_over(
                tmp_path_factory.mktemp("try"),
                ("plain",),
                config={"roles": {"thinking": {"model": "tiny"}, "embedding": {"model": "minilm"}}},
                instances={"smart": {"driver": "external", "url": smart.url, "device": "cpu"}},
            )
        )
        gateway.wait_for_phase("smart", "ready")
        yield gateway, smart


@pytest.fixture
def gateway(rig: tuple[Gateway, ScriptedOllama]) -> Gateway:
    rig[0].servers["plain"].set(tokens=32, tokens_per_s=0, error_at_byte=-1)
    return rig[0]


@pytest.fixture
def smart(rig: tuple[Gateway, ScriptedOllama]) -> ScriptedOllama:
    rig[1].answer = lambda _body: [said("fine"), said("", **END)]
    rig[1].asked.clear()
    return rig[1]


def opened(gateway: Gateway, visitor: Visit, model: str = "tiny:latest") -> Page:
    page = visitor.page
    page.goto(f"{gateway.url}/ui/try?model={model}")
    expect(page.get_by_label("Role or model")).to_have_value(model)
    return page


def ask(page: Page, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.get_by_role("button", name="Send", exact=True).click()


def fact(page: Page, name: str) -> Any:
    return page.locator(f"[data-fact='{name}']").last


def request_id(page: Page) -> str:
    return str(page.locator("[data-id]").last.inner_text()).split()[0]


def test_an_answer_says_who_gave_it_and_how_long_each_stage_took(
    gateway: Gateway, new_visit: NewVisit
) -> None:
    gateway.servers["plain"].set(tokens_per_s=200)
    page = opened(gateway, new_visit(), "thinking")
    ask(page, "Hello")
    expect(page.locator("#try-turns [data-text]").last).to_contain_text("the quick brown fox")
    expect(fact(page, "instance")).to_have_text("plain")
    expect(fact(page, "model")).to_have_text("tiny")
    expect(fact(page, "provider")).to_have_text("local")
    expect(fact(page, "tokens")).to_have_text("7, 32")
    for name in ("queue", "load", "first", "total", "write"):
        expect(fact(page, name)).to_contain_text("s")
    expect(fact(page, "start")).to_have_text("\N{EN DASH}")  # nothing was started: unknown, not zero
    expect(page.locator("[data-fallback]")).to_be_hidden()
    link = page.get_by_role("link", name="Why this instance?")
    expect(link).to_have_attribute("href", f"/ui/requests?id={request_id(page)}")
    assert gateway.get(f"requests/{request_id(page)}")["effective_target"] == "plain"


def test_stop_cancels_the_request_and_keeps_what_was_said(gateway: Gateway, new_visit: NewVisit) -> None:
    gateway.servers["plain"].set(tokens=100_000, tokens_per_s=50)
    page = opened(gateway, new_visit())
    ask(page, "Never end")
    expect(page.locator("#try-turns [data-text]").last).to_contain_text("quick")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("Stopped.")).to_be_visible()
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled()
    ended = wait_for(lambda: gateway.get(f"requests/{request_id(page)}"), lambda one: one["outcome"])
    assert ended["outcome"] == "client_gone"
    wait_for(lambda: gateway.instance("plain")["in_flight"], lambda count: count == 0)


def test_a_conversation_has_turns_is_regenerated_and_cleared(
    gateway: Gateway, smart: ScriptedOllama, new_visit: NewVisit
) -> None:
    page = opened(gateway, new_visit(), "smart:latest")
    page.get_by_label("System prompt").fill("Be brief.")
    ask(page, "one")
    expect(page.get_by_text("fine")).to_have_count(1)
    ask(page, "two")
    expect(page.get_by_text("fine")).to_have_count(2)
    page.get_by_role("button", name="Regenerate").click()
    wait_for(lambda: len(smart.asked) == 3)
    assert smart.asked[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "fine"},
        {"role": "user", "content": "two"},
    ]
    assert smart.asked[2]["messages"] == smart.asked[1]["messages"]
    expect(page.get_by_text("fine")).to_have_count(2)
    page.get_by_role("button", name="Clear").click()
    expect(page.get_by_text("Nothing asked yet.")).to_be_visible()
    ask(page, "three")
    wait_for(lambda: len(smart.asked) == 4)
    assert [one["content"] for one in smart.asked[3]["messages"]] == ["Be brief.", "three"]


def test_a_tool_call_is_shown_and_its_result_goes_back(
    gateway: Gateway, smart: ScriptedOllama, new_visit: NewVisit
) -> None:
    call = {"function": {"name": "get_weather", "arguments": {"city": "Bern"}}}

    def answer(body: dict[str, Any]) -> list[dict[str, Any]]:
        if body["messages"][-1]["role"] == "tool":
            return [said("It rains."), said("", **END)]
        return [said("", thinking="Which city?"), said("", tool_calls=[call]), said("", **END)]

    smart.answer = answer
    page = opened(gateway, new_visit(), "smart:latest")
    page.get_by_text("Tools", exact=True).click()
    page.get_by_label("Offer tools to the model").check()
    definitions = page.get_by_label("Definitions of the tools (JSON)")
    example = definitions.input_value()
    definitions.fill("[{")
    ask(page, "Weather?")
    expect(page.get_by_text("This is not JSON")).to_be_visible()
    expect(page.get_by_label("Your message")).to_have_value("Weather?")
    assert not smart.asked
    definitions.fill(example)
    page.get_by_role("button", name="Send", exact=True).click()
    expect(page.get_by_text('get_weather({"city":"Bern"})')).to_be_visible()
    expect(page.get_by_text("Which city?")).to_be_visible()
    page.get_by_label("Result of get_weather").fill("rain")
    page.get_by_role("button", name="Send the results").click()
    expect(page.get_by_text("It rains.")).to_be_visible()
    first, second = smart.asked
    assert first["tools"] == json.loads(example)
    assert second["messages"][1:] == [
        {"role": "assistant", "content": "", "tool_calls": [call], "thinking": "Which city?"},
        {"role": "tool", "tool_name": "get_weather", "content": "rain"},
    ]


def test_options_pictures_and_a_schema_are_sent(
    gateway: Gateway, smart: ScriptedOllama, new_visit: NewVisit, tmp_path: Path
) -> None:
    picture = tmp_path / "dot.png"
    picture.write_bytes(PICTURE)
    visitor = new_visit()
    page = opened(gateway, visitor, "smart:latest")
    page.get_by_label("Instance").select_option("smart")
    page.get_by_text("More options").click()
    page.get_by_label("Temperature").fill("0.3")
    page.get_by_label("Most tokens").fill("12")
    page.get_by_label("Thinking").select_option("high")
    page.get_by_label("Structured output").select_option("schema")
    page.get_by_label("Keep the model for").fill("-1")
    page.locator("#try-attach").set_input_files([picture, picture])
    expect(page.get_by_role("button", name="Remove dot.png")).to_have_count(2)
    page.get_by_role("button", name="Remove dot.png").first.click()
    visitor.assert_accessible()
    ask(page, "What is it?")
    expect(page.get_by_text("fine")).to_be_visible()
    expect(page.get_by_role("img", name="dot.png")).to_be_visible()
    (asked,) = smart.asked
    assert asked["messages"] == [
        {"role": "user", "content": "What is it?", "images": [base64.b64encode(PICTURE).decode()]}
    ]
    assert asked["options"] == {"temperature": 0.3, "num_predict": 12}
    assert (asked["think"], asked["keep_alive"]) == ("high", -1)
    assert asked["format"]["required"] == ["answer"]
    assert gateway.get(f"requests/{request_id(page)}")["requested_target"] == "smart"


def test_a_wrong_option_is_pointed_at_and_nothing_is_sent(
    gateway: Gateway, smart: ScriptedOllama, new_visit: NewVisit
) -> None:
    page = opened(gateway, new_visit(), "smart:latest")
    page.get_by_text("More options").click()
    page.get_by_label("Temperature").fill("99")
    page.get_by_text("More options").click()
    ask(page, "Hot?")
    expect(page.get_by_label("Temperature")).to_be_focused()
    expect(page.get_by_label("Your message")).to_have_value("Hot?")
    assert not smart.asked


def test_a_fallback_stands_above_the_answer(
    tmp_path: Path, smart: ScriptedOllama, new_visit: NewVisit
) -> None:
    config = {"roles": {"thinking": {"model": "smart:latest", "instances": ["away", "smart"]}}}
    with gateway_over(
        tmp_path,
        (),
        config=config,
        instances={
            "away": {"driver": "external", "url": "http://127.0.0.1:9", "priority": 5},
            "smart": {"driver": "external", "url": smart.url},
        },
    ) as gateway:
        gateway.wait_for_phase("smart", "ready")
        page = opened(gateway, new_visit(), "thinking")
        ask(page, "Who?")
        warning = page.locator("[data-fallback]")
        expect(warning).to_contain_text("Fallback: smart answered. Reason: ")
        reason = gateway.get(f"requests/{request_id(page)}")["fallback_reason"]
        expect(warning).to_contain_text(reason)


def test_errors_are_words_with_the_id_of_the_request(
    gateway: Gateway, smart: ScriptedOllama, new_visit: NewVisit
) -> None:
    def refuses(_body: dict[str, Any]) -> list[dict[str, Any]]:
        raise RefusedError(400, "the <b>prompt</b> is too long")

    visitor = new_visit()
    page = opened(gateway, visitor, "smart:latest")
    smart.answer = refuses
    ask(page, "x")
    problem = page.locator("[data-problem-of-answer]").last
    expect(problem).to_contain_text("the <b>prompt</b> is too long")
    expect(problem).to_contain_text(request_id(page))
    visitor.expect_problem("400")
    smart.answer = lambda _body: [said("half "), {"error": "the runner has died"}]
    page.get_by_role("button", name="Regenerate").click()
    expect(problem).to_contain_text("the runner has died")
    expect(problem).to_contain_text(request_id(page))
    expect(page.locator("#try-turns [data-text]").last).to_contain_text("half")
    smart.answer = lambda _body: [said("all well"), said("", **END)]
    page.get_by_role("button", name="Regenerate").click()
    expect(page.get_by_text("all well")).to_be_visible()
    assert [one["role"] for one in smart.asked[-1]["messages"]] == ["user"]


def test_markdown_is_shown_and_nothing_else_is_parsed(
    gateway: Gateway, smart: ScriptedOllama, new_visit: NewVisit
) -> None:
    text = "## Plan\n\nUse **care** and `rm`.\n\n```sh\nls\n\n'a'\n```\n[x](javascript:alert(1)) <b>no</b>"
    smart.answer = lambda _body: [*(said(letter) for letter in text), said("", **END)]
    page = opened(gateway, new_visit(), "smart:latest")
    ask(page, "How?")
    answer = page.locator("#try-turns [data-text]").last
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled()
    expect(answer.locator("h4")).to_have_text("Plan")
    expect(answer.locator("strong")).to_have_text("care")
    expect(answer.locator("code").first).to_have_text("rm")
    expect(answer.locator("pre code")).to_have_text("ls\n\n'a'")
    expect(answer).to_contain_text("[x](javascript:alert(1)) <b>no</b>")
    assert answer.locator("a, b").count() == 0


def test_a_long_answer_stays_fast(gateway: Gateway, smart: ScriptedOllama, new_visit: NewVisit) -> None:
    words = "word " * 20 + "\n\n"
    smart.answer = lambda _body: [*(said(words) for _ in range(40_000)), said("", **END)]
    page = opened(gateway, new_visit(), "smart:latest")
    page.evaluate(
        """() => { window.longest = 0; let last = performance.now();
        const look = () => { const now = performance.now(); longest = Math.max(longest, now - last);
        last = now;         requestAnimationFrame(look); }; requestAnimationFrame(look); }"""
    )
    ask(page, "All of it")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled(timeout=60_000)
    assert page.locator("#try-turns [data-text] p").count() >= 40_000
    assert page.evaluate("longest") < 5_000, "the page stood still"


def test_vectors_and_single_prompts_are_asked_for_too(
    gateway: Gateway, smart: ScriptedOllama, new_visit: NewVisit
) -> None:
    page = opened(gateway, new_visit(), "smart:latest")
    page.get_by_label("Way of asking").select_option("generate")
    smart.answer = lambda _body: [{"response": "whole"}, {"response": "", **END}]
    ask(page, "once")
    expect(page.get_by_text("whole")).to_be_visible()
    assert (smart.asked[0]["_path"], smart.asked[0]["prompt"]) == ("/api/generate", "once")
    page.get_by_label("Way of asking").select_option("embed")
    expect(page.get_by_label("Role or model").locator("option[value='smart:latest']")).to_have_count(0)
    page.get_by_label("Role or model").select_option("embedding")
    ask(page, "a line\nanother line")
    expect(page.get_by_text("384 numbers")).to_have_count(2)
    expect(page.get_by_text("Similarity to the first line")).to_be_visible()
    expect(fact(page, "instance")).to_have_text("plain")


# --- as code --------------------------------------------------------------------------------------


def snippet(page: Page, language: str) -> str:
    page.get_by_role("button", name=language, exact=True).click()
    return str(page.locator("#try-snippet").text_content())


@pytest.mark.parametrize("language", ["curl", "Python (ollama)", "Python (openai)", "JavaScript"])
def test_the_code_sends_the_same_request_whatever_the_texts_are(
    gateway: Gateway, smart: ScriptedOllama, new_visit: NewVisit, tmp_path: Path, language: str
) -> None:
    page = opened(gateway, new_visit(), "smart:latest")
    page.get_by_label("System prompt").fill(HOSTILE)
    page.get_by_text("Tools", exact=True).click()
    page.get_by_label("Offer tools to the model").check()
    page.get_by_text("The same request as code").click()
    page.get_by_label("Your message").evaluate("(box, text) => { box.value = text; }", HOSTILE)
    page.get_by_role("button", name="Send", exact=True).click()
    expect(page.get_by_text("fine")).to_be_visible()
    code = snippet(page, language)
    assert not any(character in code for character in "\u2028\u202e\x1b\x7f\u200d"), "nothing hides in it"
    program = {"curl": ["bash"], "JavaScript": ["node"]}.get(language, [sys.executable])
    if shutil.which(program[0]) is None:
        pytest.skip(f"there is no {program[0]}")
    file = tmp_path / ("code.mjs" if language == "JavaScript" else "code")
    file.write_text(code, encoding="utf-8")
    done = subprocess.run([*program, str(file)], capture_output=True, timeout=60, text=True, check=False)
    assert done.returncode == 0, f"{code}\n{done.stderr}"
    assert "fine" in done.stdout
    clicked, ran = smart.asked
    assert ran["messages"] == clicked["messages"]
    assert ran["tools"] == clicked["tools"]
    system, user = ran["messages"]
    assert user["content"] == HOSTILE.replace("\r\n", "\n")
    assert system["content"] == HOSTILE.replace("\r\n", "\n").strip()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_the_page_is_accessible_fits_and_works_by_keyboard(
    gateway: Gateway, smart: ScriptedOllama, new_visit: NewVisit, width: int, scheme: str
) -> None:
    smart.answer = lambda _body: [said("long" * 400 + " " + "x" * 3000), said("", **END)]
    visitor = new_visit(width=width, scheme=scheme)
    page = opened(gateway, visitor, "smart:latest")
    visitor.assert_accessible()
    page.get_by_label("Your message").focus()
    page.keyboard.type("y" * 300)
    page.keyboard.press("Control+Enter")
    expect(page.get_by_text("longlong")).to_be_visible()
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled()
    for summary in page.locator("details > summary").all():
        if summary.is_visible():
            summary.focus()
            page.keyboard.press("Enter")
    visitor.assert_accessible()
    visitor.assert_fits()
