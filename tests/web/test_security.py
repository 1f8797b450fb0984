"""Sign-in, sessions, scopes, and pages of other origins, against the real daemon and Chromium."""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
import requests
from playwright.sync_api import expect

from manager.web.pages import PAGES
from tests.support.certificates import Authority
from tests.support.daemon import wait_for
from tests.support.gateway import Gateway, gateway_over
from tests.support.keyed import Keyed, keyed_gateway
from tests.support.scripted import END, RefusedError, said, scripted_ollama

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from playwright.sync_api import Page

    from tests.support.browser import Visit
    from tests.support.scripted import ScriptedOllama

    NewVisit = Callable[..., Visit]

BROWSER = {"Accept": "text/html"}
SCOPES = {"root": "admin", "watcher": "read", "worker": "operator", "program": "client"}


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedOllama]:
    with scripted_ollama() as running:
        yield running


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, server: ScriptedOllama) -> Iterator[Keyed]:
    instances = {"one": {"driver": "external", "url": server.url}}
    with keyed_gateway(tmp_path_factory.mktemp("keyed"), (), instances=instances) as running:
        for name, scope in SCOPES.items():
            if name != "root":
                running.make(name, scope)
        wait_for(lambda: running.ask("GET", "/api/tags").json()["models"])
        yield running


def sign_in(page: Page, keyed: Keyed, key: str, path: str = "/ui") -> None:
    page.goto(keyed.gateway.url + path)
    page.get_by_label("Key").fill(keyed.secrets[key])
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url(lambda url: "sign-in" not in url)


def is_signed_in(keyed: Keyed, cookies: dict[str, str]) -> bool:
    return keyed.gateway.call("GET", "/api/version", cookies=cookies).status_code == 200


def cookies_of(page: Page) -> dict[str, str]:
    return {one["name"]: one["value"] for one in page.context.cookies()}


def read_pages() -> list[str]:
    return [page.path for page in PAGES if page.scope == "read" and page.path != "/ui"]


# --- signing in -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_the_form_looks_like_the_page_and_says_what_is_wrong(
    keyed: Keyed, new_visit: NewVisit, width: int, scheme: str
) -> None:
    visitor = new_visit(width=width, scheme=scheme)
    page = visitor.page
    page.goto(f"{keyed.gateway.url}/ui")
    visitor.expect_problem("401")
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    expect(page.get_by_label("Key")).to_be_focused()
    page.get_by_label("Key").fill("om_wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_text("This key is wrong, revoked or expired.")).to_be_visible()
    visitor.expect_problem("401")
    visitor.assert_accessible()
    visitor.assert_fits()
    page.get_by_label("Key").fill(keyed.secrets["root"])
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Overview")).to_be_visible()
    expect(page.locator("html[data-live=on]")).to_be_attached()
    visitor.assert_fits()


def test_wrong_keys_are_counted(keyed: Keyed) -> None:
    def count() -> float:
        text = keyed.ask("GET", "/metrics").text
        line = next(one for one in text.splitlines() if 'refusals_total{reason="key_wrong"}' in one)
        return float(line.split()[-1])

    before = count()
    keyed.gateway.call("POST", "/sign-in", data={"key": "om_x"}, headers={"Origin": keyed.gateway.url})
    assert count() == before + 1


def test_no_script_reads_the_cookie_and_it_holds_no_key(keyed: Keyed, new_visit: NewVisit) -> None:
    visitor = new_visit()
    sign_in(visitor.page, keyed, "root")
    visitor.expect_problem("401")
    (cookie,) = visitor.page.context.cookies()
    assert cookie["name"] == f"ollama_manager_session_{keyed.gateway.port}"
    assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Strict", "/")
    assert keyed.secrets["root"] not in str(cookie)
    assert visitor.page.evaluate("document.cookie") == ""
    assert keyed.secrets["root"] not in visitor.page.content()
    assert visitor.page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])") == "[{},{}]"


def test_the_form_leads_back_to_the_page_with_its_query(keyed: Keyed, new_visit: NewVisit) -> None:
    visitor = new_visit()
    sign_in(visitor.page, keyed, "root", "/ui/try?model=tiny:latest&instance=one")
    visitor.expect_problem("401")
    expect(visitor.page).to_have_url(f"{keyed.gateway.url}/ui/try?model=tiny:latest&instance=one")
    expect(visitor.page.get_by_label("Instance")).to_have_value("one")


@pytest.mark.parametrize(
    "elsewhere", ["https://example.org/", "//example.org/ui", "/\\example.org", "data:,x"]
)
def test_a_link_to_the_form_leads_nowhere_else(keyed: Keyed, new_visit: NewVisit, elsewhere: str) -> None:
    page = new_visit().page
    page.goto(f"{keyed.gateway.url}/sign-in?next={quote(elsewhere)}")
    page.get_by_label("Key").fill(keyed.secrets["root"])
    page.get_by_role("button", name="Sign in").click()
    expect(page).to_have_url(f"{keyed.gateway.url}/ui")


# --- the end of a session -------------------------------------------------------------------------


def test_an_open_page_says_that_its_key_was_revoked(keyed: Keyed, new_visit: NewVisit) -> None:
    keyed.make("passing", "admin")
    visitor = new_visit()
    page = visitor.page
    sign_in(page, keyed, "passing")
    visitor.expect_problem("401")
    expect(page.locator("html[data-live=on]")).to_be_attached()
    keyed.ask("DELETE", "/api/v1/keys/passing")
    expect(page.get_by_role("heading", name="You are signed out")).to_be_visible()
    assert not is_signed_in(keyed, cookies_of(page))
    visitor.assert_accessible()
    page.get_by_role("link", name="Sign in").click()
    expect(page).to_have_url(f"{keyed.gateway.url}/sign-in?next=%2Fui")


def test_the_live_channel_of_a_revoked_key_ends(keyed: Keyed) -> None:
    keyed.make("follower", "read")
    headers = {"Authorization": f"Bearer {keyed.secrets['follower']}"}
    with keyed.gateway.call(
        "GET", "/ui/live?page=overview", headers=headers, stream=True, timeout_s=20
    ) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith(b"data: ")
        keyed.ask("DELETE", "/api/v1/keys/follower")
        rest = list(lines)
    assert rest[-3:] == [b"event: over", b"data: -", b""]


def test_signing_out_ends_the_session_in_every_window(keyed: Keyed, new_visit: NewVisit) -> None:
    visitor = new_visit()
    page = visitor.page
    sign_in(page, keyed, "root")
    visitor.expect_problem("401")
    other = page.context.new_page()
    other.goto(f"{keyed.gateway.url}/ui")
    cookies = cookies_of(page)
    assert is_signed_in(keyed, cookies)
    page.get_by_role("button", name="Sign out").click()
    expect(page).to_have_url(f"{keyed.gateway.url}/sign-in")
    assert not is_signed_in(keyed, cookies)
    assert not page.context.cookies()
    expect(other.get_by_role("heading", name="You are signed out")).to_be_visible()


def test_the_conversation_says_that_the_session_is_over(keyed: Keyed, new_visit: NewVisit) -> None:
    keyed.make("talker", "client")
    visitor = new_visit()
    page = visitor.page
    sign_in(page, keyed, "talker")
    visitor.expect_problem("401")
    expect(page.get_by_label("Role or model")).to_have_value("tiny:latest")
    keyed.ask("DELETE", "/api/v1/keys/talker")
    page.get_by_label("Your message").fill("Still there?")
    page.get_by_role("button", name="Send", exact=True).click()
    expect(page.get_by_role("heading", name="You are signed out")).to_be_visible()
    visitor.expect_problem("401")


def test_a_page_opened_without_keys_ends_with_the_first_key(tmp_path: Path, new_visit: NewVisit) -> None:
    with gateway_over(tmp_path, ()) as gateway:
        visitor = new_visit()
        visitor.page.goto(f"{gateway.url}/ui")
        expect(visitor.page.locator("html[data-live=on]")).to_be_attached()
        gateway.call("POST", "/api/v1/keys", json={"name": "root", "scopes": ["admin"]})
        expect(visitor.page.get_by_role("heading", name="You are signed out")).to_be_visible()


# --- scopes ---------------------------------------------------------------------------------------


def test_a_client_sees_the_conversation_and_its_runs_only(keyed: Keyed, new_visit: NewVisit) -> None:
    visitor = new_visit()
    page = visitor.page
    sign_in(page, keyed, "program")
    visitor.expect_problem("401")
    expect(page).to_have_url(f"{keyed.gateway.url}/ui/try")
    sections = page.get_by_role("navigation", name="Sections")
    expect(sections.get_by_role("link")).to_have_text(["Runs", "Try it"])
    page.get_by_label("Your message").fill("Hello")
    expect(page.get_by_label("Role or model")).to_have_value("tiny:latest")
    page.get_by_role("button", name="Send", exact=True).click()
    expect(page.get_by_text("fine")).to_be_visible()
    expect(page.get_by_role("link", name="Why this instance?")).to_have_count(0)
    page.get_by_text("The same request as code").click()
    expect(page.locator("#try-snippet")).to_contain_text("$OLLAMA_MANAGER_KEY")
    code = page.locator("#try-snippet").text_content() or ""
    assert not any(value in code for value in cookies_of(page).values())
    for path in read_pages():
        page.goto(keyed.gateway.url + path)
        expect(page.get_by_role("heading", name="Not with this key")).to_be_visible()
        visitor.expect_problem("403")


def test_a_reader_has_no_conversation_and_the_refusal_says_so(keyed: Keyed, new_visit: NewVisit) -> None:
    visitor = new_visit()
    page = visitor.page
    sign_in(page, keyed, "watcher")
    visitor.expect_problem("401")
    expect(page.get_by_role("link", name="Try it")).to_have_count(0)
    page.goto(f"{keyed.gateway.url}/ui/try")
    visitor.expect_problem("403")
    expect(page.get_by_role("heading", name="Not with this key")).to_be_visible()
    expect(page.get_by_text("the key 'watcher' has the scope read")).to_be_visible()
    visitor.assert_accessible()
    visitor.assert_fits()
    page.get_by_role("link", name="Overview").click()
    expect(page.get_by_role("heading", name="Overview")).to_be_visible()
    page.goto(f"{keyed.gateway.url}/ui/try")
    page.get_by_role("button", name="Sign out, use another key").click()
    expect(page).to_have_url(f"{keyed.gateway.url}/sign-in")
    visitor.expect_problem("403")


@pytest.mark.parametrize("name", ["runs", "keys", "try", "nothing", ""])
def test_a_page_without_live_parts_has_no_live_channel(keyed: Keyed, name: str) -> None:
    # One scope opens the channel of all pages: no page of another scope may have parts in it.
    with keyed.ask("GET", f"/ui/live?page={name}", stream=True) as answer:
        assert answer.status_code == 422


def test_half_a_character_of_a_model_is_no_failure_of_the_page(keyed: Keyed, server: ScriptedOllama) -> None:
    def refuses(_body: dict[str, Any]) -> list[dict[str, Any]]:
        raise RefusedError(400, "half \ud83d")

    def run_of(answer: Callable[[dict[str, Any]], Any]) -> str:
        server.answer = answer
        body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": False}
        made = keyed.ask("POST", "/api/v1/runs", json={"path": "/api/chat", "body": body})
        run: str = made.json()["id"]
        wait_for(lambda: keyed.ask("GET", f"/api/v1/runs/{run}").json()["ended_at"])
        return run

    before = server.answer
    try:
        for answer in (lambda _body: [said("half \ud83d", **END)], refuses):
            page = keyed.ask("GET", f"/ui/runs?id={run_of(answer)}", headers=BROWSER)
            assert page.status_code == 200
            assert "half ?" in page.text
    finally:
        server.answer = before


# --- headers --------------------------------------------------------------------------------------


def test_every_page_of_html_has_the_policy(keyed: Keyed) -> None:
    admin, reader = ({"Authorization": f"Bearer {keyed.secrets[name]}"} for name in ("root", "watcher"))
    cases: list[tuple[str, dict[str, str], int]] = [(page.path, admin, 200) for page in PAGES]
    cases += [
        ("/sign-in", {}, 200),
        ("/ui", {}, 401),
        ("/ui/try", reader, 403),
        ("/ui/no%3Cb%3Esuch", admin, 404),
        ("/ui/static/nothing.js", {}, 404),
        ("/ui", {"Host": "evil.example"}, 403),
        ("/ui", {"Origin": "https://evil.example"}, 403),
    ]
    for path, headers, status in cases:
        answer = keyed.gateway.call("GET", path, headers={**BROWSER, **headers})
        assert answer.status_code == status, (path, answer.text)
        assert answer.headers["content-type"].startswith("text/html"), path
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy, path
        assert "unsafe" not in policy, path
        assert "frame-ancestors 'none'" in policy, path
        assert answer.headers["x-content-type-options"] == "nosniff", path
        assert answer.headers["cache-control"] == "no-store", path
        assert "<b>such" not in answer.text
        assert keyed.secrets["root"] not in answer.text


def test_the_description_of_the_api_still_works(keyed: Keyed, new_visit: NewVisit) -> None:
    visitor = new_visit()
    sign_in(visitor.page, keyed, "root", "/docs")
    visitor.expect_problem("401")
    expect(visitor.page.get_by_role("heading", name="Ollama Endpoint Manager")).to_be_visible()


# --- pages elsewhere ------------------------------------------------------------------------------


@contextmanager
def origin(html: str) -> Iterator[int]:
    """Serve a page on another port; return the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(html.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield running.server_address[1]
        finally:
            running.shutdown()


_ATTACK = """<!doctype html><meta charset=utf-8><iframe name=out></iframe>
<iframe name=chat></iframe><iframe name=drain></iframe>
<form id=out method=post target=out action="{url}/sign-out"></form>
<form id=chat method=post target=chat enctype="text/plain" action="{url}/api/chat">
<input name='{{"model":"tiny","messages":[{{"role":"user","content":"a' value='b"}}]}}'></form>
<form id=drain method=post target=drain enctype="text/plain" action="{url}{drain}"></form>
<img src="{url}/api/runtime/compute/instances"><img src="{url}/api/tags">
<script src="{url}/api/tags"></script><link rel=stylesheet href="{url}/api/tags">
"""


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_page_of_another_origin_can_use_no_session(
    keyed: Keyed, server: ScriptedOllama, new_visit: NewVisit, host: str
) -> None:
    visitor = new_visit()
    page = visitor.page
    sign_in(page, keyed, "root")
    cookies = cookies_of(page)
    url, drain = keyed.gateway.url, "/api/runtime/compute/instances/one/drain"
    server.asked.clear()
    statuses: dict[str, set[int]] = {}
    page.on("response", lambda one: statuses.setdefault(one.request.method, set()).add(one.status))
    with origin(_ATTACK.format(url=url, drain=drain)) as port:
        statuses.clear()
        page.goto(f"http://{host}:{port}/")
        page.wait_for_load_state()
        for form in ("out", "chat", "drain"):
            # The frame loads once more when the refusal has come, whichever process of the browser holds it.
            page.evaluate(
                """(form) => new Promise((resolve) => {
                  document.querySelector(`iframe[name=${form}]`).addEventListener("load", resolve);
                  document.getElementById(form).submit();
                })""",
                form,
            )
        calls = page.evaluate(
            """async ([url, drain]) => {
              const results = [];
              const body = '{"model":"tiny","messages":[]}';
              const simple = [drain, "/sign-out", "/api/chat"].map((path) => [path, "no-cors", "text/plain"]);
              const others = ["/api/chat", drain, "/api/v1/keys"]
                .map((path) => [path, "cors", "application/json"]);
              for (const [path, mode, type] of [...simple, ...others]) {
                try {
                  const answer = await fetch(url + path, { method: "POST", mode, credentials: "include",
                    headers: { "Content-Type": type }, body });
                  results.push(answer.status);
                } catch (error) { results.push("blocked"); }
              }
              for (const path of ["/api/runtime/compute/instances", "/api/v1/keys", "/ui"]) {
                try { results.push((await fetch(url + path, { credentials: "include" })).status); }
                catch (error) { results.push("blocked"); }
              }
              return results;
            }""",
            [url, drain],
        )
        page.goto("about:blank")
    # 0: an answer that the page cannot look into. 401: one of Ollama's routes, which pages may read.
    assert set(calls) <= {0, 401, "blocked"}, calls
    assert statuses["POST"] <= {401, 403}, statuses
    assert not server.asked, "a model was asked"
    assert keyed.ask("GET", "/api/runtime/compute/instances/one").json()["drained"] is None
    assert len(keyed.ask("GET", "/api/v1/keys").json()["keys"]) >= len(SCOPES)
    assert is_signed_in(keyed, cookies), "the session was ended from elsewhere"
    visitor.problems.clear()  # the browser complains of each refusal


def test_a_change_without_evidence_of_its_origin_is_refused(keyed: Keyed, new_visit: NewVisit) -> None:
    visitor = new_visit()
    sign_in(visitor.page, keyed, "root")
    visitor.expect_problem("401")
    cookies = cookies_of(visitor.page)
    path = "instances/one/drain"
    for headers in ({}, {"Sec-Fetch-Site": "none"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "null"}):
        answer = keyed.gateway.call("POST", path, cookies=cookies, headers=headers, json={})
        assert answer.status_code in (401, 403), headers
    assert keyed.ask("GET", "/api/runtime/compute/instances/one").json()["drained"] is None


# --- several daemons, and TLS ---------------------------------------------------------------------


def test_the_sessions_of_two_daemons_on_one_host_stay_apart(
    keyed: Keyed, tmp_path: Path, new_visit: NewVisit
) -> None:
    with keyed_gateway(tmp_path, ()) as second:
        visitor = new_visit()
        page = visitor.page
        for one in (keyed, second):
            sign_in(page, one, "root")
            visitor.expect_problem("401")
        assert len(cookies_of(page)) == 2
        for one in (keyed, second):
            page.goto(f"{one.gateway.url}/ui")
            expect(page.get_by_role("heading", name="Overview")).to_be_visible()
        page.get_by_role("button", name="Sign out").click()
        expect(page).to_have_url(f"{second.gateway.url}/sign-in")
        page.goto(f"{keyed.gateway.url}/ui")
        expect(page.get_by_role("heading", name="Overview")).to_be_visible()


def test_the_cookie_is_secure_over_tls(tmp_path: Path, new_visit: NewVisit) -> None:
    pair = Authority(tmp_path / "ca").sign("served")
    key_file = tmp_path / "key"
    key_file.write_text("om_" + "k" * 43)
    key_file.chmod(0o600)
    config: dict[str, Any] = {
        "server": {
            "tls": {"certificate": str(pair.certificate), "key": str(pair.key)},
            "key_file": str(key_file),
        },
        "gpus": "none",
        "instances": {},
    }
    with ExitStack() as stack:
        daemon = stack.enter_context(
            Gateway(tmp_path / "home", config, engine_url="unix:///nonexistent.sock")
        )
        daemon.url = f"https://localhost:{daemon.port}"
        daemon.start(until_ready=False)
        authority = str(tmp_path / "ca" / "authority.pem")

        def status() -> int:
            try:
                return requests.get(f"{daemon.url}/healthz", verify=authority, timeout=5).status_code
            except requests.RequestException:
                return 0

        wait_for(status, lambda one: one == 200)
        visitor = new_visit(ignore_https_errors=True)
        page = visitor.page
        page.goto(f"{daemon.url}/ui/try")
        visitor.expect_problem("401")
        page.get_by_label("Key").fill("om_" + "k" * 43)
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("heading", name="Try it")).to_be_visible()
        (cookie,) = page.context.cookies()
        assert (cookie["secure"], cookie["httpOnly"], cookie["sameSite"]) == (True, True, "Strict")
        # The page asks for models: the daemon may end only after it.
        page.goto("about:blank")
