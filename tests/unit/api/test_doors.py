"""Errors that a person in a browser meets are pages, whatever made them; programs get JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from manager.api.doors import page_after
from manager.api.errors import error_response
from tests.support.gated_app import gate_before

BROWSER = (b"accept", b"text/html,application/xhtml+xml")


async def answered(app: Any, path: str = "/ui", *headers: tuple[bytes, bytes]) -> tuple[Any, str]:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    gate = gate_before(app)
    scope = {
        "type": "http",
        "method": "GET",
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"localhost"), *headers],
    }
    try:
        await gate(scope, receive, send)
    except ZeroDivisionError:
        sent.append("raised")
    start, *rest = sent
    bodies = b"".join(one.get("body", b"") for one in rest if isinstance(one, dict))
    return start, bodies.decode() + ("raised" if rest[-1] == "raised" else "")


def refuses(status: int, message: str) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        answer = error_response(status, "code", message, headers={"Retry-After": "7"})
        await answer(scope, receive, send)

    return app


def headers_of(start: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in start["headers"]:
        key = name.decode().lower()
        found[key] = f"{found[key]}, {value.decode()}" if key in found else value.decode()
    return found


@pytest.mark.parametrize(
    ("status", "title"),
    [
        (403, "Not with this key"),
        (404, "There is no such page"),
        (503, "Not available now"),
        (418, "This did not work"),
    ],
)
async def test_an_error_is_a_page_in_words(status: int, title: str) -> None:
    start, page = await answered(refuses(status, "because of <script>x</script>"), "/ui", BROWSER)
    headers = headers_of(start)
    assert (start["status"], headers["content-type"]) == (status, "text/html; charset=utf-8")
    assert f"<h1>{title}</h1>" in page
    assert "because of &lt;script&gt;x&lt;/script&gt;" in page
    assert headers["retry-after"] == "7"
    assert "script-src 'self';" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]


async def test_a_program_gets_the_error_as_it_is() -> None:
    for path, headers in (("/ui", ()), ("/api/runtime/compute/gpus", (BROWSER,))):
        start, body = await answered(refuses(503, "why"), path, *headers)
        assert (start["status"], json.loads(body)["error"]["message"]) == (503, "why")


async def test_a_defect_is_a_page_and_still_reaches_the_log() -> None:
    async def app(*_: Any) -> None:
        raise ZeroDivisionError

    start, page = await answered(app, "/ui", BROWSER)
    assert start["status"] == 500
    assert "The daemon failed" in page
    assert page.endswith("raised")


async def test_a_page_that_is_served_is_left_alone() -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/html")]
        await send({"type": "http.response.start", "status": 404, "headers": headers})
        await send({"type": "http.response.body", "body": b"own", "more_body": False})

    assert (await answered(app, "/ui", BROWSER))[1] == "own"


@pytest.mark.parametrize("body", [b"", b"[]", b'{"error": 1}', b'{"error": {"message": 1}}', b"x"])
async def test_an_error_without_words_has_those_of_its_status(body: bytes) -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    assert "Not available now" in (await answered(app, "/ui", BROWSER))[1]


@pytest.mark.parametrize(
    ("wanted", "after"),
    [
        ("/ui", "/ui"),
        ("/docs", "/docs"),
        ("/ui/requests?id=aa162d-3&x=%20", "/ui/requests?id=aa162d-3&x=%20"),
        ("https://evil.example/ui", "/ui"),
        ("//evil.example/ui", "/ui"),
        ("/\\evil.example", "/ui"),
        ("/ui\\..\\evil", "/ui"),
        ("/uievil", "/ui"),
        ("/ui@evil.example", "/ui"),
        ("/ui\r\nSet-Cookie: a=b", "/ui"),
        ("/ui?x=\r\n", "/ui"),
        ("javascript:alert(1)", "/ui"),
        ("/api/tags", "/ui"),
        ("", "/ui"),
    ],
)
def test_what_follows_the_form_is_a_page_of_the_daemon(wanted: str, after: str) -> None:
    assert page_after([wanted]) == after
