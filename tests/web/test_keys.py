"""The page of keys: each button is pressed, and the next request with the key shows what it did."""

from __future__ import annotations

import re
import socket
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from tests.support.daemon import wait_for
from tests.support.gateway import Gateway, gateway_over
from tests.support.keyed import KEYS, Keyed, as_header, keyed_gateway

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from playwright.sync_api import Locator, Page

    from tests.support.browser import Visit

SECRET = re.compile(r"om_[A-Za-z0-9_-]{43}")
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": False}
ROLES = {"roles": {"fast": {"model": "tiny"}}}
HOSTILE = '"><img src=x onerror=alert(1)><script>alert(2)</script>'


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    with keyed_gateway(tmp_path_factory.mktemp("keyed"), config=ROLES) as keyed:
        yield keyed


@pytest.fixture
def visitor(keyed: Keyed, new_visit: Callable[..., Visit]) -> Visit:
    return signed_in(keyed, new_visit())


def signed_in(keyed: Keyed, visitor: Visit, key: str = "root", path: str = "/ui/keys") -> Visit:
    page = visitor.page
    page.goto(f"{keyed.gateway.url}/sign-in?next={path}")
    page.get_by_label("Key").fill(keyed.secrets[key])
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_load_state()
    return visitor


def status(gateway: Gateway, secret: str | None, path: str = "/api/tags") -> int:
    headers = {} if secret is None else as_header(secret)
    return gateway.call("GET", path, headers=headers).status_code


def entry(page: Page, name: str) -> Locator:
    return page.locator(f"[data-key={name}]")


def open_form(page: Page, button: str = "New key") -> Locator:
    page.get_by_role("button", name=button).click()
    dialog = page.locator("#create-key")
    expect(dialog).to_be_visible()
    return dialog


def secret_in(page: Page) -> str:
    """The secret in the dialog that shows it."""
    text = page.locator("#secret-text")
    expect(page.locator("#secret")).to_be_visible()
    expect(text).to_have_text(SECRET)
    return text.inner_text()


def close_secret(page: Page) -> None:
    page.get_by_role("button", name="I have stored it").click()
    expect_wiped(page)


def expect_wiped(page: Page) -> None:
    """The dialog closes, and is wiped in its event `close`, which comes a task after it is hidden."""
    expect(page.locator("#secret")).to_be_hidden()
    expect(page.locator("#secret-text")).to_be_empty()


def wait_until_wiped(page: Page, secret: str) -> None:
    """The event that wipes a secret comes a moment after its dialog is hidden."""
    wait_for(lambda: left_behind(page), lambda kept: secret not in kept)


def left_behind(page: Page) -> str:
    """All that the browser still has of a page: document, controls, address, history, storage."""
    kept: str = page.evaluate(
        """async () => JSON.stringify([
          document.documentElement.outerHTML,
          [...document.querySelectorAll("input, textarea, select")].map((one) => one.value),
          location.href, document.title, document.referrer, history.state,
          { ...localStorage }, { ...sessionStorage }, document.cookie,
          performance.getEntriesByType("resource").map((one) => one.name),
          getSelection().toString(), await caches.keys(),
          (await indexedDB.databases()).map((one) => one.name),
        ])"""
    )
    return kept


@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (360, "dark"), (360, "light"), (1280, "dark")]
)
def test_the_page_and_its_dialogs_are_accessible_and_fit(
    keyed: Keyed, new_visit: Callable[..., Visit], width: int, scheme: str
) -> None:
    visitor = signed_in(keyed, new_visit(width=width, scheme=scheme))
    page = visitor.page
    expect(entry(page, "root")).to_be_visible()
    visitor.assert_accessible()
    visitor.assert_fits()
    dialog = open_form(page)
    dialog.locator("summary").click()
    visitor.assert_accessible()
    dialog.get_by_role("button", name="Cancel").click()
    entry(page, "root").get_by_role("button", name="Revoke").click()
    expect(page.get_by_text("the last key that can manage keys")).to_be_visible()
    visitor.assert_accessible()
    visitor.assert_fits()


def test_a_key_with_every_limit_is_made_and_works_in_the_next_request(keyed: Keyed, visitor: Visit) -> None:
    page = visitor.page
    dialog = open_form(page)
    dialog.get_by_label("Name").fill("shop")
    dialog.get_by_role("checkbox", name="client").check()
    dialog.locator("summary").click()
    dialog.get_by_label("Project").fill(HOSTILE)
    dialog.get_by_label("Expires after (days)").fill("90")
    dialog.get_by_role("checkbox", name="fast").check()
    dialog.get_by_role("checkbox", name="one", exact=True).check()
    dialog.get_by_role("textbox", name="Models").fill(f"tiny, {HOSTILE}")
    dialog.get_by_label("Requests at once").fill("4")
    dialog.get_by_label("Requests a minute").fill("600")
    dialog.get_by_label("Tokens a day").fill("1000000")
    dialog.get_by_label("US dollars a month").fill("12.5")
    dialog.get_by_label("Local servers only").check()
    dialog.get_by_role("button", name="Make the key").click()
    secret = secret_in(page)
    close_secret(page)
    expect(entry(page, "shop")).to_contain_text(HOSTILE)
    expect(entry(page, "shop")).to_contain_text("4 at once, 600 a minute")
    made = keyed.listed("shop")
    names = ("scopes", "project", "roles", "instances", "models", "concurrency", "rpm", "tokens_per_day")
    assert [made[name] for name in names] == [
        ["client"], HOSTILE, ["fast"], ["one"], ["tiny", HOSTILE], 4, 600, 1_000_000,
    ]  # fmt: skip
    assert (made["usd_per_month"], made["local_only"]) == (12.5, True)
    assert made["expires_at"] is not None
    answer = keyed.gateway.call("POST", "/api/chat", json=CHAT, headers=as_header(secret))
    assert answer.status_code == 200
    assert status(keyed.gateway, secret, "/api/v1/usage") == 403


def test_after_its_dialog_a_secret_is_nowhere_in_the_browser(keyed: Keyed, visitor: Visit) -> None:
    page = visitor.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    dialog = open_form(page)
    dialog.get_by_label("Name").fill("once")
    dialog.get_by_role("checkbox", name="read").check()
    dialog.get_by_role("button", name="Make the key").click()
    secret = secret_in(page)
    assert status(keyed.gateway, secret, "/metrics") == 200
    page.get_by_role("button", name="Copy").click()
    expect(page.locator("#secret-told")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == secret
    assert secret in left_behind(page), "it is looked for where it was"
    close_secret(page)
    expect(entry(page, "once")).to_be_visible()
    wait_until_wiped(page, secret)
    # Neither the way back nor a reload bring it again.
    page.goto(f"{keyed.gateway.url}/ui")
    assert secret not in left_behind(page)
    page.go_back()
    expect(entry(page, "once")).to_be_visible()
    assert secret not in left_behind(page)
    page.reload()
    assert secret not in left_behind(page)


def test_one_press_of_escape_does_not_lose_a_secret(keyed: Keyed, visitor: Visit) -> None:
    page = visitor.page
    dialog = open_form(page)
    dialog.get_by_label("Name").fill("escaped")
    dialog.get_by_role("checkbox", name="client").check()
    page.keyboard.press("Enter")
    secret = secret_in(page)
    page.keyboard.press("Escape")
    expect(page.locator("#secret-told")).to_contain_text("not been copied")
    assert secret_in(page) == secret
    page.keyboard.press("Escape")
    expect_wiped(page)
    assert secret not in left_behind(page)
    assert status(keyed.gateway, secret) == 200


def test_a_rotated_key_opens_with_both_secrets_until_the_overlap_is_over(
    keyed: Keyed, visitor: Visit
) -> None:
    page, old = visitor.page, keyed.make("turn")
    page.get_by_role("button", name="Refresh").click()
    entry(page, "turn").get_by_role("button", name="Rotate").click()
    expect(page.locator("#rotate-key")).to_contain_text("Rotate turn")
    page.locator("#rotate-key").get_by_role("button", name="Make a new secret").click()
    new = secret_in(page)
    close_secret(page)
    expect(entry(page, "turn")).to_contain_text("ends in 23 h 59 min")
    assert [status(keyed.gateway, one) for one in (old, new)] == [200, 200]
    entry(page, "turn").get_by_role("button", name="Rotate").click()
    page.get_by_label("The earlier secret ends after").fill("0")
    page.locator("#rotate-key").get_by_role("button", name="Make a new secret").click()
    newest = secret_in(page)
    close_secret(page)
    assert [status(keyed.gateway, one) for one in (old, new, newest)] == [401, 401, 200]


def test_what_is_no_overlap_is_refused_at_its_field(keyed: Keyed, visitor: Visit) -> None:
    page = visitor.page
    keyed.make("steady")
    page.get_by_role("button", name="Refresh").click()
    entry(page, "steady").get_by_role("button", name="Rotate").click()
    page.get_by_label("The earlier secret ends after").fill("soon")
    page.locator("#rotate-key").get_by_role("button", name="Make a new secret").click()
    expect(page.locator("#rotate-problem")).to_contain_text("'soon'")
    assert len(keyed.listed("steady")["secrets"]) == 1
    visitor.expect_problem("422")


@pytest.mark.parametrize("cuts", [False, True])
def test_a_revoked_key_opens_nothing_and_its_streams_are_cut_on_demand(
    keyed: Keyed, visitor: Visit, cuts: bool
) -> None:
    page, name = visitor.page, f"gone-{int(cuts)}"
    secret = keyed.make(name, "read")
    stream = opened_stream(keyed.gateway, secret)
    page.get_by_role("button", name="Refresh").click()
    entry(page, name).get_by_role("button", name="Revoke").click()
    dialog = page.locator("#revoke-key")
    expect(dialog.get_by_text("This browser is signed in")).to_be_hidden()
    dialog.get_by_label("cut off requests").set_checked(cuts)
    assert status(keyed.gateway, secret) == 200
    dialog.get_by_role("button", name="Revoke the key").click()
    expect(page.locator("#keys").locator(f"[data-key={name}]")).to_have_count(0)
    assert status(keyed.gateway, secret) == 401
    assert has_ended(stream) is cuts
    stream.close()
    page.locator("#ended-keys > summary").click()
    expect(entry(page, name)).to_contain_text("revoked")


def opened_stream(gateway: Gateway, secret: str) -> socket.socket:
    """The stream of events, from which the first line was read."""
    stream = socket.create_connection(("127.0.0.1", gateway.port), timeout=20)
    stream.sendall(
        f"GET /api/runtime/compute/live HTTP/1.1\r\nHost: localhost:{gateway.port}\r\n"
        f"Authorization: Bearer {secret}\r\n\r\n".encode()
    )
    assert b"200 OK" in stream.recv(65536)
    return stream


def has_ended(stream: socket.socket) -> bool:
    """Return whether the server ends the stream now; an open one says something within its keep-alive."""
    stream.settimeout(3)
    try:
        while data := stream.recv(65536):
            if data.endswith(b"0\r\n\r\n"):
                return True
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True


def test_a_name_is_forgotten_only_after_a_question(keyed: Keyed, visitor: Visit) -> None:
    page = visitor.page
    keyed.make("leaving")
    keyed.ask("DELETE", f"{KEYS}/leaving")
    page.get_by_role("button", name="Refresh").click()
    page.locator("#ended-keys > summary").click()
    forget = entry(page, "leaving").get_by_role("button", name="Forget")
    forget.click()
    page.locator("#confirm").get_by_role("button", name="No").click()
    assert keyed.listed("leaving")["state"] == "revoked"
    forget.click()
    page.locator("#confirm").get_by_role("button", name="Yes").click()
    expect(entry(page, "leaving")).to_have_count(0)
    assert all(one["name"] != "leaving" for one in keyed.ask("GET", KEYS).json()["keys"])


@pytest.mark.parametrize(
    ("fields", "problem", "words"),
    [
        ({"Name": HOSTILE}, "new-name-problem", HOSTILE),
        ({"Name": "fine", "Requests a minute": "many"}, "new-rpm-problem", "'many'"),
        ({"Name": "fine", "US dollars a month": "-1"}, "new-usd_per_month-problem", "-1"),
    ],
)
def test_what_cannot_be_is_refused_at_its_field(
    keyed: Keyed, visitor: Visit, fields: dict[str, str], problem: str, words: str
) -> None:
    page = visitor.page
    dialog = open_form(page)
    dialog.locator("summary").click()
    dialog.get_by_role("checkbox", name="client").check()
    for label, value in fields.items():
        dialog.get_by_label(label).fill(value)
    dialog.get_by_role("button", name="Make the key").click()
    expect(page.locator(f"#{problem}")).to_contain_text(words)
    expect(page.locator("#secret")).to_be_hidden()
    assert all(one["name"] != "fine" for one in keyed.ask("GET", KEYS).json()["keys"])
    visitor.expect_problem("422")


@pytest.mark.parametrize("scope", ["read", "operator", "client"])
def test_a_key_without_admin_gets_no_page_of_keys_and_is_told_so(
    keyed: Keyed, new_visit: Callable[..., Visit], scope: str
) -> None:
    keyed.make(f"only-{scope}", scope)
    visitor = signed_in(keyed, new_visit(), f"only-{scope}")
    expect(visitor.page.get_by_role("heading")).to_have_text("Not with this key")
    expect(visitor.page.locator("body")).to_contain_text(f"the key 'only-{scope}' has the scope {scope}")
    expect(visitor.page.locator("body")).to_contain_text("needs admin")
    visitor.assert_accessible()
    visitor.expect_problem("403")
    if scope != "client":
        visitor.page.get_by_role("link", name="Usage").click()
        expect(visitor.page.get_by_role("heading", name="Usage", exact=True)).to_be_visible()
        expect(visitor.page.get_by_role("link", name="Keys")).to_have_count(0)


def test_without_a_browser_the_refusal_is_json_as_before(keyed: Keyed) -> None:
    keyed.make("program", "read")
    answer = keyed.ask("GET", "/ui/keys", key="program")
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")


# --- the first key --------------------------------------------------------------------------------


@pytest.fixture
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway_over(tmp_path_factory.mktemp("open")) as gateway:
        yield gateway


def make_first(page: Page, gateway: Gateway) -> str:
    page.goto(f"{gateway.url}/ui/keys")
    notice = page.locator("#no-keys")
    expect(notice).to_contain_text("every request without a key is refused with 401")
    expect(notice).to_contain_text("those of this browser")
    dialog = open_form(page, "Make the first key")
    expect(dialog.get_by_role("checkbox", name="admin")).to_be_checked()
    dialog.get_by_label("Name").fill("first")
    dialog.get_by_role("button", name="Make the key").click()
    secret = secret_in(page)
    assert status(gateway, None) == 401
    return secret


def test_the_first_key_leads_to_signing_in_with_it(opened: Gateway, new_visit: Callable[..., Visit]) -> None:
    visitor = new_visit()
    page = visitor.page
    secret = make_first(page, opened)
    visitor.assert_accessible()
    page.get_by_role("button", name="Sign in with it").click()
    expect(entry(page, "first")).to_contain_text("this browser")
    wait_until_wiped(page, secret)
    assert page.url == f"{opened.url}/ui/keys"


def test_closing_the_first_secret_leads_to_the_form_to_sign_in(
    opened: Gateway, new_visit: Callable[..., Visit]
) -> None:
    visitor = new_visit()
    page = visitor.page
    secret = make_first(page, opened)
    page.get_by_role("button", name="I have stored it").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    page.get_by_label("Key").fill(secret)
    page.get_by_role("button", name="Sign in").click()
    expect(entry(page, "first")).to_be_visible()
    # Its own key: the browser is signed out with it, and says so before.
    entry(page, "first").get_by_role("button", name="Revoke").click()
    expect(page.get_by_text("This browser is signed in with this key")).to_be_visible()
    page.get_by_role("button", name="Revoke the key", exact=True).click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    assert status(opened, secret) == 401


def test_a_first_key_that_cannot_manage_keys_is_refused_in_words(
    opened: Gateway, new_visit: Callable[..., Visit]
) -> None:
    visitor = new_visit()
    page = visitor.page
    page.goto(f"{opened.url}/ui/keys")
    dialog = open_form(page, "Make the first key")
    dialog.get_by_label("Name").fill("first")
    dialog.get_by_role("checkbox", name="admin").uncheck()
    dialog.get_by_role("checkbox", name="client").check()
    dialog.get_by_role("button", name="Make the key").click()
    expect(dialog.locator("[data-problem]")).to_contain_text("this one could not manage keys")
    assert status(opened, None) == 200
    visitor.expect_problem("409")
