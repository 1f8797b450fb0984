"""Errors in the words of each dialect, whole or at the end of a stream that has begun."""

from __future__ import annotations

from typing import Any

import orjson

from manager.wire.routes import Dialect

_JSON = b"application/json; charset=utf-8"
_PLAIN_JSON = b"application/json"

# Source of the names: Ollama `openai/openai.go` NewError and `anthropic/anthropic.go` NewError.
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}
# OpenAI's own, which programs match on (https://platform.openai.com/docs/guides/error-codes).
_CODES = {402: "insufficient_quota", 429: "rate_limit_exceeded"}
# The name that each has for money that is used up (https://docs.anthropic.com/en/api/errors).
_NO_MONEY = 402
_NO_MONEY_TYPES = {Dialect.OPENAI: "insufficient_quota", Dialect.ANTHROPIC: "billing_error"}
_UNREADABLE = 400
_OVERLOADED = 503


def error_document(dialect: Dialect, status: int, message: str, request_id: str = "") -> dict[str, Any]:
    if dialect is Dialect.NATIVE:
        return {"error": message}
    kind = _NO_MONEY_TYPES[dialect] if status == _NO_MONEY else _TYPES.get(status, "api_error")
    if dialect is Dialect.OPENAI:
        return {"error": {"message": message, "type": kind, "param": None, "code": _CODES.get(status)}}
    if status == _OVERLOADED:
        kind = "overloaded_error"
    document: dict[str, Any] = {"type": "error", "error": {"type": kind, "message": message}}
    if request_id:  # clients show it; a path that no request record exists for has none
        document["request_id"] = f"req_{request_id}"
    return document


def error_body(dialect: Dialect, status: int, message: str, request_id: str = "") -> tuple[bytes, bytes]:
    """The body of an error, and its content type.

    Below `/v1` Ollama names the charset only where it could not even read the request.
    """
    kind = _JSON if dialect is Dialect.NATIVE or status == _UNREADABLE else _PLAIN_JSON
    return orjson.dumps(error_document(dialect, status, message, request_id)), kind


def error_in_stream(dialect: Dialect, status: int, message: str) -> bytes:
    """The line or event that ends a stream in which something went wrong."""
    document = orjson.dumps(error_document(dialect, status, message))
    if dialect is Dialect.NATIVE:
        return document + b"\n"
    if dialect is Dialect.OPENAI:
        return b"data: " + document + b"\n\n"
    return b"event: error\ndata: " + document + b"\n\n"


def message_of(body: bytes) -> str | None:
    """The message in an error of any dialect; None when there is none."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    found = document.get("error") if isinstance(document, dict) else None
    if isinstance(found, dict):
        found = found.get("message")
    return found if isinstance(found, str) else None
