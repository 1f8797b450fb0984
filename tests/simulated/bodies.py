"""Request bodies, checked as Go's encoding/json checks them: the same mistakes get the same words."""

from __future__ import annotations

import json
from typing import Any

from .scheduler import BadDurationError, keep_alive_ns

_CHAT = {
    "model": "string", "messages": "[]api.Message", "stream": "bool", "options": "map[string]interface {}",
    "tools": "api.Tools", "keep_alive": "duration",
}  # fmt: skip
_GENERATE = {
    "model": "string", "prompt": "string", "suffix": "string", "system": "string", "template": "string",
    "context": "[]int", "stream": "bool", "raw": "bool", "options": "map[string]interface {}",
    "keep_alive": "duration",
}  # fmt: skip
_EMBED = {
    "model": "string", "truncate": "bool", "dimensions": "int", "options": "map[string]interface {}",
    "keep_alive": "duration",
}  # fmt: skip
_NAMED = {"model": "string", "name": "string", "stream": "bool"}

FIELDS: dict[str, dict[str, str]] = {
    "ChatRequest": _CHAT,
    "GenerateRequest": _GENERATE,
    "EmbedRequest": _EMBED,
    "EmbeddingRequest": {
        "model": "string", "prompt": "string", "options": "map[string]interface {}", "keep_alive": "duration",
    },
    "ShowRequest": {**_NAMED, "verbose": "bool"},
    "PullRequest": _NAMED,
    "PushRequest": _NAMED,
    "DeleteRequest": _NAMED,
    "CreateRequest": {**_NAMED, "from": "string", "system": "string", "files": "map[string]string"},
    "CopyRequest": {"source": "string", "destination": "string"},
    "ChatCompletionRequest": {
        "model": "string", "messages": "[]openai.Message", "stream": "bool", "max_tokens": "int",
        "stream_options": "openai.StreamOptions",
    },
    "CompletionRequest": {
        "model": "string", "prompt": "string", "stream": "bool", "max_tokens": "int",
        "stream_options": "openai.StreamOptions",
    },
    "EmbedRequest.openai": {"model": "string", "dimensions": "int", "encoding_format": "string"},
    "ResponsesRequest": {
        "model": "string", "stream": "bool", "max_output_tokens": "int", "instructions": "string",
    },
    "MessagesRequest": {
        "model": "string", "max_tokens": "int", "messages": "[]anthropic.MessageParam", "stream": "bool",
    },
}  # fmt: skip
"""The fields that are checked, by the name of Ollama's Go struct."""


class BadBodyError(Exception):
    """The body does not decode; the message is Go's."""


class MissingBodyError(BadBodyError):
    """EOF"""  # noqa: D415 - it is what Go says


def decode(body: bytes, struct: str) -> dict[str, Any]:
    """A request body as a dict in which `keep_alive` is in nanoseconds and null fields are left out.

    Raises MissingBodyError for an empty body, BadBodyError for one that is not JSON or not of the struct's
    types.
    """
    if not body.strip():
        raise MissingBodyError("EOF")
    try:
        value = json.loads(body)
    except UnicodeDecodeError:
        raise BadBodyError("invalid character '\\ufffd' looking for beginning of value") from None
    except json.JSONDecodeError as error:
        raise BadBodyError(_syntax_error(error)) from None
    go_name = struct.partition(".")[0]
    if not isinstance(value, dict):
        raise BadBodyError(f"json: cannot unmarshal {_go_kind(value)} into Go value of type api.{go_name}")
    request = {key: item for key, item in value.items() if item is not None}
    for field, go_type in FIELDS[struct].items():
        if field not in request:
            continue
        if go_type == "duration":
            try:
                request[field] = keep_alive_ns(request[field])
            except BadDurationError as error:
                raise BadBodyError(str(error)) from None
        elif not _fits(request[field], go_type):
            raise BadBodyError(
                f"json: cannot unmarshal {_go_kind(request[field])} into Go struct field {go_name}.{field} "
                f"of type {go_type}"
            )
    return request


def _syntax_error(error: json.JSONDecodeError) -> str:
    if error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated"):
        return "unexpected EOF"
    wanted = "object key string" if "property name" in error.msg else "value"
    return f"invalid character {error.doc[error.pos]!r} looking for beginning of {wanted}"


def _fits(value: object, go_type: str) -> bool:
    match go_type:
        case "string":
            return isinstance(value, str)
        case "bool":
            return isinstance(value, bool)
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "[]int" | "api.Tools":
            return isinstance(value, list)
        case _ if go_type.startswith("[]"):
            return isinstance(value, list) and all(isinstance(item, dict) for item in value)
        case _:
            return isinstance(value, dict)


def _go_kind(value: object) -> str:
    if isinstance(value, bool):
        return "bool"
    kinds = {str: "string", int: "number", float: "number", list: "array", dict: "object"}
    return kinds.get(type(value), "null")
