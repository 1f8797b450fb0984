"""Keys from outside: the API that manages them, the scope of each route, and the ways to present one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
import requests

from manager.domain.keys import INCLUDED, Scope
from manager.wire.keys import session_cookie
from manager.wire.scopes import TABLE
from tests.api.raw_http import Answer, request, say
from tests.support.daemon import ROOT, wait_for
from tests.support.keyed import KEYS, Keyed, as_header, keyed_gateway

if TYPE_CHECKING:
    from collections.abc import Iterator

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": False}
SECRET = re.compile(r"om_[A-Za-z0-9_-]{43}")
INSTANCES = "/api/runtime/compute/instances"


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    with keyed_gateway(tmp_path_factory.mktemp("keyed")) as keyed:
        for scope in Scope:
            keyed.make(scope.value, scope.value)
        yield keyed


def ask_raw(keyed: Keyed, raw: bytes) -> Answer:
    """Send the bytes; the connection stays open meanwhile, as a client keeps it."""
    return say(keyed.gateway.port, raw, end=False)


def error_of(answer: requests.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


# --- making, listing, rotating, revoking ----------------------------------------------------------


def test_a_secret_is_in_the_answer_that_made_it_and_nowhere_else(keyed: Keyed) -> None:
    answer = keyed.ask("POST", KEYS, json={"name": "once", "scopes": ["client", "read"], "project": "shop"})
    made = answer.json()
    assert (answer.status_code, answer.headers["cache-control"]) == (201, "no-store")
    assert SECRET.fullmatch(made["secret"])
    listed = keyed.listed("once")
    assert listed == {name: value for name, value in made.items() if name != "secret"}
    assert listed["secrets"][0]["prefix"] == made["secret"][:8]
    assert (listed["state"], listed["scopes"], listed["project"]) == ("active", ["client", "read"], "shop")
    assert made["secret"] not in keyed.ask("GET", KEYS).text
    stored = b"".join(
        file.read_bytes() for file in keyed.gateway.state_dir.iterdir() if "registry" in file.name
    )
    assert listed["name"].encode() in stored
    assert made["secret"].encode() not in stored


@pytest.mark.parametrize(
    ("body", "status", "code", "field"),
    [
        ({"name": "client", "scopes": ["client"]}, 409, "key_exists", None),
        ({"name": "A", "scopes": ["client"]}, 422, "invalid_request", "body.name"),
        ({"name": "server.key_file", "scopes": ["client"]}, 422, "invalid_request", "body.name"),
        ({"name": "x" * 64, "scopes": ["client"]}, 422, "invalid_request", "body.name"),
        ({"name": "x", "scopes": []}, 422, "invalid_request", "body.scopes"),
        ({"name": "x", "scopes": ["root"]}, 422, "invalid_request", "body.scopes.0"),
        ({"name": "x", "scopes": ["client"], "rpm": 0}, 422, "invalid_request", "body.rpm"),
        ({"name": "x", "scopes": ["client"], "rpm": 1.5}, 422, "invalid_request", "body.rpm"),
        ({"name": "x", "scopes": ["client"], "limits": 1}, 422, "invalid_request", "body.limits"),
        ({"name": "x", "scopes": ["client"], "models": []}, 422, "invalid_request", "body.models"),
        ({"name": "x", "scopes": ["client"], "models": ["a", "a"]}, 422, "invalid_request", "body.models"),
        ({"name": "x", "scopes": ["client"], "roles": ["nope"]}, 422, "invalid_request", "body.roles.0"),
        (
            {"name": "x", "scopes": ["client"], "instances": ["nope"]},
            422,
            "invalid_request",
            "body.instances.0",
        ),
        (
            {"name": "x", "scopes": ["client"], "usd_per_month": 1e-7},
            422,
            "invalid_request",
            "body.usd_per_month",
        ),
        ({"name": "x", "scopes": ["client"], "expires_s": 0}, 422, "invalid_request", "body.expires_s"),
        ({"name": "x", "scopes": ["client"], "project": "a\nb"}, 422, "invalid_request", "body.project"),
    ],
)
def test_a_key_that_cannot_be_is_refused_with_the_field(
    keyed: Keyed, body: dict[str, Any], status: int, code: str, field: str | None
) -> None:
    answer = keyed.ask("POST", KEYS, json=body)
    assert error_of(answer) == (status, code)
    if field is not None:
        assert answer.json()["error"]["details"]["fields"][0]["field"] == field


def test_an_unknown_role_or_instance_is_refused_with_those_that_there_are(keyed: Keyed) -> None:
    body = {"name": "x", "scopes": ["client"], "instances": ["gpu9"], "roles": ["nope"]}
    message = keyed.ask("POST", KEYS, json=body).json()["error"]["message"]
    assert "body.instances.0: 'gpu9'; allowed: one" in message
    assert "body.roles.0: 'nope'; allowed:" in message


def test_a_key_ends_at_its_time_by_itself(keyed: Keyed) -> None:
    keyed.make("short", expires_s=1.5)
    assert keyed.ask("GET", "/api/tags", key="short").status_code == 200
    wait_for(lambda: keyed.ask("GET", "/api/tags", key="short").status_code, lambda s: s == 401, within_s=5)
    assert keyed.listed("short")["state"] == "expired"
    assert error_of(keyed.ask("POST", f"{KEYS}/short/rotate", json={})) == (409, "key_not_active")


def test_both_secrets_of_a_rotated_key_open_until_the_overlap_is_over(keyed: Keyed) -> None:
    old = keyed.make("turn")
    answer = keyed.ask("POST", f"{KEYS}/turn/rotate", json={"overlap_s": 2})
    new = answer.json()["secret"]
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
    assert [one["prefix"] for one in answer.json()["secrets"]] == [old[:8], new[:8]]
    for secret in (old, new):
        assert keyed.gateway.call("GET", "/api/tags", headers=as_header(secret)).status_code == 200
    ask_old = lambda: keyed.gateway.call("GET", "/api/tags", headers=as_header(old)).status_code  # noqa: E731
    wait_for(ask_old, lambda status: status == 401, within_s=6)
    assert keyed.gateway.call("GET", "/api/tags", headers=as_header(new)).status_code == 200


def test_without_an_overlap_the_earlier_secret_ends_at_once(keyed: Keyed) -> None:
    old = keyed.make("turn-now")
    new = keyed.ask("POST", f"{KEYS}/turn-now/rotate", json={"overlap_s": 0}).json()["secret"]
    assert keyed.gateway.call("GET", "/api/tags", headers=as_header(old)).status_code == 401
    assert keyed.gateway.call("GET", "/api/tags", headers=as_header(new)).status_code == 200


def test_a_key_has_a_bounded_number_of_secrets(keyed: Keyed) -> None:
    keyed.make("many")
    statuses = [keyed.ask("POST", f"{KEYS}/many/rotate", json={}).status_code for _ in range(4)]
    assert statuses == [200, 200, 200, 409]
    assert keyed.ask("POST", f"{KEYS}/many/rotate", json={"overlap_s": 0}).status_code == 200


def test_a_revoked_key_opens_nothing_from_then_on_and_its_name_is_free(keyed: Keyed) -> None:
    secret = keyed.make("gone")
    with requests.Session() as session:  # one connection, whose head is remembered
        session.headers.update(as_header(secret))
        url = f"{keyed.gateway.url}/api/chat"
        assert [session.post(url, json=CHAT).status_code for _ in range(4)] == [200] * 4
        answer = keyed.ask("DELETE", f"{KEYS}/gone")
        assert (answer.status_code, answer.json()["key"]["state"]) == (200, "revoked")
        assert session.post(url, json=CHAT).status_code == 401
    assert keyed.ask("DELETE", f"{KEYS}/gone").status_code == 200, "twice is no error"
    assert error_of(keyed.ask("DELETE", f"{KEYS}/nobody")) == (404, "unknown_key")
    again = keyed.make("gone")
    assert again != secret
    assert keyed.gateway.call("GET", "/api/tags", headers=as_header(secret)).status_code == 401


def test_use_of_a_key_is_seen_in_the_list(keyed: Keyed) -> None:
    keyed.make("used")
    assert keyed.listed("used")["last_used_at"] is None
    keyed.ask("POST", "/api/chat", key="used", json=CHAT)
    wait_for(lambda: keyed.listed("used")["last_used_at"], within_s=5)


def command(keyed: Keyed, *arguments: str, key: str | None = "root") -> subprocess.CompletedProcess[str]:
    """Run `ollama-manager` with a key in its environment, beside the configuration of the daemon."""
    environment = {name: value for name, value in os.environ.items() if name != "OLLAMA_MANAGER_KEY"}
    if key is not None:
        environment["OLLAMA_MANAGER_KEY"] = keyed.secrets[key]
    program = [sys.executable, "-m", "manager", *arguments, "--config", str(keyed.gateway.config_file)]
    return subprocess.run(
        program, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_commands_take_their_key_from_the_environment(keyed: Keyed) -> None:
    made = command(keyed, "keys", "create", "by-hand", "--scope", "client", "--model", "tiny*")
    assert made.returncode == 0, made.stderr
    assert SECRET.fullmatch(made.stdout.strip())
    assert keyed.gateway.call("GET", "/api/tags", headers=as_header(made.stdout.strip())).status_code == 200
    assert "by-hand" in command(keyed, "keys", "list").stdout
    assert "revoked" in command(keyed, "keys", "revoke", "by-hand").stdout
    assert command(keyed, "status", key="read").returncode == 0
    refused = command(keyed, "keys", "list", key="read")
    assert refused.returncode == 2
    assert "needs admin" in refused.stderr
    keyless = command(keyed, "status", key=None)
    assert keyless.returncode == 2
    assert "$OLLAMA_MANAGER_KEY" in keyless.stderr
    doctor = command(keyed, "doctor", key="read")
    assert "no key" not in doctor.stdout + doctor.stderr
    assert "no key" in (told := command(keyed, "doctor", key=None)).stdout + told.stderr


# --- scopes ---------------------------------------------------------------------------------------


def concrete(path: str) -> str:
    return re.sub(r"\{\w+\*?\}", "x", path)


ROUTES = [
    (method, concrete(path), scopes)
    for methods, path, scopes in TABLE
    for method in methods.split()
    if not path.startswith(("/api/v1/usage", "/api/v1/budgets"))
]


@pytest.mark.parametrize("scope", Scope)
def test_a_key_opens_the_routes_of_its_scopes_and_no_other(keyed: Keyed, scope: Scope) -> None:
    """Routes that are not opened are all asked; of those that are, the ones that change nothing."""
    for method, path, needed in ROUTES:
        opens = not needed or any(INCLUDED[scope] & {one} for one in needed)
        if opens and (method != "GET" or path.endswith(("/events", "/live"))):
            continue
        answer = keyed.ask(method, path, key=scope.value)
        assert (answer.status_code == 403) is not opens, (method, path, answer.text)
        if not opens and method != "HEAD":
            assert f"the key {scope.value!r} has the scope {scope}" in answer.text, (method, path)


def test_without_a_key_no_route_answers(keyed: Keyed) -> None:
    for method, path, _ in ROUTES:
        assert keyed.ask(method, path, key=None).status_code == 401, (method, path)
    assert keyed.ask("GET", "/healthz", key=None).status_code == 200


@pytest.mark.parametrize("path", ["/nope", "/api/runtime/compute/nope", "/v1/nope", "/api/v1/nope/x"])
def test_a_path_that_does_not_exist_is_unknown_to_every_key_and_closed_without_one(
    keyed: Keyed, path: str
) -> None:
    for scope in Scope:
        assert keyed.ask("GET", path, key=scope.value).status_code == 404
    assert keyed.ask("GET", path, key=None).status_code == 401


def test_a_method_that_a_path_lacks_is_405_to_every_key(keyed: Keyed) -> None:
    for scope in Scope:
        answer = keyed.ask("DELETE", "/api/tags", key=scope.value)
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/api/chat", lambda body, text: body == {"error": text(body["error"])}),
        ("/v1/chat/completions", lambda body, text: text(body["error"]["message"])),
        ("/v1/messages", lambda body, text: body["type"] == "error" and text(body["error"]["message"])),
        (INSTANCES, lambda body, text: text(body["error"]["message"])),
    ],
)
@pytest.mark.parametrize(
    "refusal", [(None, 401, "no key: present"), ("wrong", 401, "the key is wrong"), ("read", 403, "needs")]
)
def test_a_refusal_has_the_dialect_of_its_route(
    keyed: Keyed, path: str, shape: Any, refusal: tuple[str | None, int, str]
) -> None:
    key, status, words = refusal
    keyed.secrets["wrong"] = "om_" + "x" * 43
    method = "DELETE" if path == INSTANCES and key == "read" else "POST"
    path = f"{INSTANCES}/one/lift" if method == "DELETE" else path
    answer = keyed.ask(method, path, key=key, json=CHAT)
    assert answer.status_code == status

    def text(message: str) -> str:
        assert words in message
        return message

    assert shape(answer.json(), text)


# --- in the path ----------------------------------------------------------------------------------


def test_a_key_in_the_path_opens_what_it_opens_in_a_header(keyed: Keyed) -> None:
    secret = keyed.secrets["client"]
    base = f"/key/{secret}"
    assert keyed.gateway.call("POST", f"{base}/api/chat", json=CHAT).status_code == 200
    assert keyed.gateway.call("GET", f"{base}/api/tags").json()["models"]
    assert keyed.gateway.call("GET", base).text == "Ollama is running"
    assert keyed.gateway.call("GET", f"{base}/metrics").status_code == 403
    assert keyed.gateway.call("GET", f"{base}/nope").status_code == 404
    assert keyed.gateway.call("GET", f"/key/{keyed.secrets['read']}{INSTANCES}").status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/key/{}/api/tags", "//key//{}//api/tags", "/x/../key/{}/api/tags", "/%6bey/{}/api/tags/",
     "http://localhost/key/{}/api/tags", "/key/{}/key/{}/api/tags", "/key/{}/./api/tags?x=1"],
)  # fmt: skip
def test_every_spelling_of_such_a_path_is_the_same_path(keyed: Keyed, path: str) -> None:
    secret = keyed.secrets["client"]
    raw = path.replace("{}", secret)
    assert ask_raw(keyed, request(raw)).status == 200
    encoded = "".join(f"%{ord(one):02x}" for one in secret)
    assert ask_raw(keyed, request(path.replace("{}", encoded))).status == 200


@pytest.mark.parametrize(
    "path",
    ["/key/api/tags", "/key//api/tags", "/key", "/key/", "/KEY/{}/api/tags", "/key/{}%2Fapi/tags",
     "/key%2F{}/api/tags", "/key/{}x/api/tags", "/key/{}/../api/tags", "/api/tags/key/{}",
     "/api/tags?key={}", "/{}/api/tags"],
)  # fmt: skip
def test_anything_else_is_no_key(keyed: Keyed, path: str) -> None:
    answer = ask_raw(keyed, request(path.replace("{}", keyed.secrets["client"])))
    assert answer.status == 401
    assert not SECRET.search(answer.body.decode())


def test_two_keys_that_differ_are_refused_wherever_they_are(keyed: Keyed) -> None:
    client, read = keyed.secrets["client"], keyed.secrets["read"]
    header = f"Authorization: Bearer {read}"
    for raw in (
        request(f"/key/{client}/api/tags", header),
        request(f"/key/{client}/api/tags", "X-API-Key: ollama"),
        request(f"/key/{client}/key/{read}/api/tags"),
        request("/api/tags", header, f"X-API-Key: {client}"),
    ):
        answer = ask_raw(keyed, raw)
        assert answer.status == 401, raw
        assert b"different keys" in answer.body
        assert not SECRET.search(answer.body.decode())
    same = request(f"/key/{client}/api/tags", f"Authorization: Bearer {client}")
    assert ask_raw(keyed, same).status == 200
    no_key = request("/api/tags", header, "X-API-Key: ollama")
    assert ask_raw(keyed, no_key).status == 200, "what is no key confuses nothing"


def test_a_client_cannot_send_the_header_that_stands_for_a_key_in_the_path(keyed: Keyed) -> None:
    raw = request("/api/tags", f":key: {keyed.secrets['client']}")
    assert ask_raw(keyed, raw).status == 400


# --- pages ----------------------------------------------------------------------------------------

BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def signed_in(keyed: Keyed, key: str, next_path: str = "/docs") -> requests.Response:
    form = {"key": keyed.secrets[key], "next": next_path}
    headers = {"Origin": keyed.gateway.url, "Sec-Fetch-Site": "same-origin"}
    return keyed.gateway.call("POST", "/sign-in", data=form, headers=headers, allow_redirects=False)


def cookie_of(answer: requests.Response) -> str:
    return str(answer.cookies[name_of(answer)])


def name_of(answer: requests.Response) -> str:
    """Return the name of the cookie at the address of a daemon."""
    return session_cookie(urlsplit(str(answer.url)).netloc.encode())


def test_a_browser_without_a_session_gets_the_form_and_with_one_the_page(keyed: Keyed) -> None:
    answer = keyed.gateway.call("GET", "/docs", headers=BROWSER)
    assert (answer.status_code, answer.headers["content-type"]) == (401, "text/html; charset=utf-8")
    assert 'action="/sign-in"' in answer.text
    assert keyed.gateway.call("GET", "/docs").json()["error"]["code"] == "unauthorized"
    answer = signed_in(keyed, "read")
    assert (answer.status_code, answer.headers["location"]) == (303, "/docs")
    set_cookie = answer.headers["set-cookie"].lower()
    assert {"httponly", "samesite=strict", "path=/"} <= {part.strip() for part in set_cookie.split(";")}
    assert keyed.secrets["read"] not in str(answer.headers)
    cookies = {name_of(answer): cookie_of(answer)}
    docs = keyed.gateway.call("GET", "/docs", headers=BROWSER, cookies=cookies)
    assert docs.status_code == 200
    assert docs.headers["referrer-policy"] == "same-origin"
    asset = re.search(r'(?:src|href)="(/static-offline-docs/[^"]+)"', docs.text)
    assert asset is not None
    for path in (asset[1], "/openapi.json", INSTANCES):
        assert keyed.gateway.call("GET", path, cookies=cookies).status_code == 200, path
    assert keyed.gateway.call("GET", KEYS, cookies=cookies).status_code == 403, "its key has no more"


def test_a_wrong_key_signs_nobody_in(keyed: Keyed) -> None:
    keyed.secrets["nobody"] = "om_" + "y" * 43
    answer = signed_in(keyed, "nobody")
    assert answer.status_code == 401
    assert "wrong, revoked or expired" in answer.text
    assert "set-cookie" not in answer.headers
    assert keyed.secrets["nobody"] not in answer.text


@pytest.mark.parametrize(
    "elsewhere",
    [
        "https://evil.example/",
        "//evil.example",
        "/\\evil.example",
        "/api/tags",
        "/ui/..//evil.example",
        "/ui/../api/tags",
        "/ui//evil.example",
        "",
    ],
)
def test_a_sign_in_leads_nowhere_else(keyed: Keyed, elsewhere: str) -> None:
    assert signed_in(keyed, "read", elsewhere).headers["location"] == "/ui"


def test_a_form_with_more_fields_than_ours_opens_nothing(keyed: Keyed) -> None:
    fields = {f"x{number}": "1" for number in range(50)}
    answer = keyed.gateway.call("POST", "/sign-in", data=fields, headers={"Origin": keyed.gateway.url})
    assert answer.status_code == 401


@pytest.mark.parametrize(
    ("method", "path", "headers", "is_served"),
    [
        ("GET", INSTANCES, {"Sec-Fetch-Site": "same-origin"}, True),
        ("GET", INSTANCES, {"Sec-Fetch-Site": "none"}, True),
        ("GET", INSTANCES, {}, True),
        ("GET", INSTANCES, {"Sec-Fetch-Site": "same-site"}, False),
        ("GET", INSTANCES, {"Sec-Fetch-Site": "cross-site"}, False),
        ("POST", "/api/chat", {"Sec-Fetch-Site": "same-origin"}, True),
        ("POST", "/api/chat", {"Origin": "{url}"}, True),
        ("POST", "/api/chat", {}, False),
        ("POST", "/api/chat", {"Sec-Fetch-Site": "none"}, False),
        ("POST", "/api/chat", {"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:3000"}, False),
        ("POST", "/api/chat", {"Origin": "http://127.0.0.1:3000"}, False),
        ("POST", "/api/chat", {"Origin": "http://127.0.0.1:3000", "Sec-Fetch-Site": "same-origin"}, False),
        ("POST", "/sign-out", {"Sec-Fetch-Site": "cross-site"}, False),
    ],
)
def test_a_session_serves_pages_of_the_daemon_only(
    keyed: Keyed, method: str, path: str, headers: dict[str, str], is_served: bool
) -> None:
    session = signed_in(keyed, "admin")
    cookies = {"other": "x", name_of(session): cookie_of(session)}
    sent = {name: value.replace("{url}", keyed.gateway.url) for name, value in headers.items()}
    answer = keyed.gateway.call(
        method, path, headers=sent, cookies=cookies, json=CHAT if method == "POST" else None
    )
    assert answer.status_code == (200 if is_served else 401), answer.text


def test_a_session_ends_with_its_key_and_with_the_sign_out(keyed: Keyed) -> None:
    keyed.make("visitor", "read")
    first, second = (cookie_of(signed_in(keyed, "visitor")) for _ in range(2))
    own = {"Sec-Fetch-Site": "same-origin"}
    name = session_cookie(f"127.0.0.1:{keyed.gateway.port}".encode())

    def status(session: str) -> int:
        return keyed.gateway.call("GET", INSTANCES, cookies={name: session}).status_code

    assert [status(first), status(second)] == [200, 200]
    answer = keyed.gateway.call(
        "POST", "/sign-out", headers=own, cookies={name: first}, allow_redirects=False
    )
    assert (answer.status_code, answer.headers["location"]) == (303, "/sign-in")
    assert [status(first), status(second)] == [401, 200]
    keyed.ask("DELETE", f"{KEYS}/visitor")
    assert status(second) == 401
    assert status(keyed.secrets["admin"]) == 401, "a key is no session"


def test_a_page_elsewhere_cannot_sign_a_browser_in(keyed: Keyed) -> None:
    form = {"key": keyed.secrets["admin"]}
    for origin in ("https://evil.example", "http://127.0.0.1:1", "null"):
        answer = keyed.gateway.call("POST", "/sign-in", data=form, headers={"Origin": origin})
        assert error_of(answer) == (403, "origin_not_allowed")


def test_the_description_says_that_a_key_is_needed(keyed: Keyed) -> None:
    document = keyed.ask("GET", "/openapi.json").json()
    assert document["security"] == [{"bearer": []}, {"x_api_key": []}]
    assert document["paths"]["/healthz"]["get"]["security"] == []
    assert "/sign-in" not in document["paths"]
    assert not SECRET.search(json.dumps(document))
