"""Answers of the gateway: whole ones, written straight to ASGI, framed as Ollama frames them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import orjson

from manager.wire.dialect import error_body
from manager.wire.routes import Dialect

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import Send

    from manager.wire.head import Header

JSON = b"application/json; charset=utf-8"
PLAIN_JSON = b"application/json"
TEXT = b"text/plain; charset=utf-8"
# Ollama's own routing answers without a charset.
_PLAIN_TEXT = b"text/plain"


async def answer(
    send: Send, status: int, kind: bytes | None, body: bytes, headers: list[Header] | None = None
) -> None:
    """Send a whole answer; `kind` is its content type, None where there is none."""
    lines = [(b"Content-Type", kind)] if kind is not None else []
    lines += [*(headers or ()), (b"Content-Length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})


async def answer_json(send: Send, document: Mapping[str, Any], dialect: Dialect) -> None:
    kind = JSON if dialect is Dialect.NATIVE else PLAIN_JSON
    await answer(send, 200, kind, orjson.dumps(document))


async def answer_error(
    send: Send, dialect: Dialect, status: int, message: str, headers: Mapping[str, str] | None = None
) -> None:
    body, kind = error_body(dialect, status, message)
    lines = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    await answer(send, status, kind, body, lines)


async def answer_wrong_method(send: Send, allowed: tuple[str, ...]) -> None:
    allow = ", ".join(allowed).encode()
    await answer(send, 405, _PLAIN_TEXT, b"405 method not allowed", [(b"Allow", allow)])


def json_bytes(value: object) -> bytes:
    """Return JSON of values that servers and clients have given."""
    try:
        return orjson.dumps(value)
    except TypeError:  # half a surrogate pair in a name, or an integer beyond 64 bits
        return json.dumps(value, separators=(",", ":")).encode()
