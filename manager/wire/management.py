"""Requests that manage models: which model they name, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from manager.domain.models import split_pin
from manager.wire.body import BadBodyError, dumped, parsed

# The server takes both, the first one before the second (Ollama `api/types.go`).
_NAMING = ("model", "name")
# Never part of what makes two pulls the same.
_HOW = frozenset({*_NAMING, "stream"})


@dataclass(frozen=True, slots=True)
class ManagementBody:
    """`model` is the name alone; `instance` is what it, or another name in the request, was pinned to."""

    document: dict[str, Any]
    model: str
    instance: str | None
    stream: bool

    def raw(self, **changes: Any) -> bytes:
        """The bytes to send, with these fields changed."""
        return dumped({**self.document, **changes})

    def rest(self) -> bytes:
        """What the request says beside the model, alike for requests that mean the same."""
        said = {key: value for key, value in self.document.items() if key not in _HOW}
        return dumped(dict(sorted(said.items())))

    def text(self, key: str) -> str:
        value = self.document.get(key)
        return value if isinstance(value, str) else ""


def read_named(raw: bytes) -> ManagementBody:
    """Read a request about one model.

    Raises:
        BadBodyError: it is no JSON object, or names no model.
    """
    document = _object(raw)
    named = {key: _text(document, key) for key in _NAMING}
    full = next((name for name in named.values() if name), "")
    if not full:
        raise BadBodyError("model is required")
    model, instance = split_pin(full)
    document = {key: value for key, value in document.items() if key not in _NAMING}
    return ManagementBody({"model": model, **document}, model, instance, _stream(document))


def read_copy(raw: bytes) -> ManagementBody:
    """Read a request for a copy, which stays on the volume of its source.

    Raises:
        BadBodyError: it is no JSON object, names no source, or a source and a destination pinned apart.
    """
    document = _object(raw)
    source, instance = split_pin(_text(document, "source"))
    destination, other = split_pin(_text(document, "destination"))
    if not source:
        raise BadBodyError("source is required")
    if instance is not None and other is not None and instance != other:
        raise BadBodyError(f"a copy stays where its source is: {instance!r} and {other!r} are two instances")
    document |= {"source": source, "destination": destination}
    return ManagementBody(document, source, instance or other, stream=False)


def _object(raw: bytes) -> dict[str, Any]:
    """The request with its keys in lower case, as the server reads them in any; the last one counts."""
    if not raw.strip():
        raise BadBodyError("missing request body")
    document = parsed(raw)
    if not isinstance(document, dict):
        raise BadBodyError("the request body must be a JSON object")
    return {key.lower(): value for key, value in document.items()}


def _text(document: dict[str, Any], key: str) -> str:
    value = document.get(key)
    if value is not None and not isinstance(value, str):
        raise BadBodyError(f"{key} must be a string")
    return (value or "").strip()


def _stream(document: dict[str, Any]) -> bool:
    stream = document.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise BadBodyError("stream must be true or false")
    return stream is not False
