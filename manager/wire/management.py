"""Requests that manage models: which model they name, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manager.domain.models import INVALID_NAME, is_possible, split_pin
from manager.wire.body import BadBodyError, dumped, flag_in, name_in, read_fields, text_of
from manager.wire.steps import run

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.wire.body import Buffer
    from manager.wire.steps import Steps

# The server takes both, the first one before the second (Ollama `api/types.go`).
_NAMING = ("model", "name")
# Beside the model all that a pull reads (Ollama `api/types.go` PullRequest).
_PULL_FIELDS = ("insecure", "password", "username")
_NO_VALUES = (b"null", b"{}", b"[]", b'""', b"false", b"0")


@dataclass(frozen=True, slots=True)
class ManagementBody:
    """`model` is the name alone; `instance` is what it, or another name in the request, was pinned to.

    `fields` are the JSON values that are sent on, by name.
    """

    fields: Mapping[str, Buffer]
    model: str
    instance: str | None
    stream: bool

    def raw(self, **changes: Any) -> bytes:
        """Return the bytes to send, with these fields changed."""
        fields = {**self.fields, **{name: dumped(value) for name, value in changes.items()}}
        pieces = [piece for name, value in fields.items() for piece in (b",", dumped(name), b":", value)]
        return b"".join([b"{", *pieces[1:], b"}"])

    def rest(self) -> bytes:
        """Return what else a server reads in a pull: alike for two pulls that are the same."""
        values = map(self.fields.get, _PULL_FIELDS)
        return b",".join(b"" if value is None else bytes(value) for value in values)

    def text(self, key: str) -> str:
        """Return the text of a field that names something; empty if it has none, or a longer one."""
        return text_of(self.fields.get(key)) or ""

    def has(self, key: str) -> bool:
        """Whether a field has a value that is not empty."""
        value = self.fields.get(key)
        return value is not None and (len(value) > len(b"false") or bytes(value) not in _NO_VALUES)


def read_named(raw: bytes) -> ManagementBody:
    """As `reading_named`, at once, for a body of at most SMALL_BYTES."""
    return run(reading_named([raw]))


def read_copy(raw: bytes) -> ManagementBody:
    """As `reading_copy`, at once, for a body of at most SMALL_BYTES."""
    return run(reading_copy([raw]))


def reading_named(parts: list[bytes]) -> Steps[ManagementBody]:
    """Read a request about one model, in steps.

    Args:
        parts: the body as it was received; the list is emptied.

    Raises:
        BadBodyError: it is no JSON object, or names no model.
    """
    fields = yield from read_fields(parts)
    names = [name_in(fields, key).strip() for key in _NAMING]
    full = next(filter(None, names), "")
    if not full:
        raise BadBodyError("model is required")
    model, instance = split_pin(full)
    if not is_possible(model):
        raise BadBodyError(INVALID_NAME)
    name_in(fields, "from")
    rest = {key: value for key, value in fields.items() if key not in _NAMING}
    return ManagementBody(
        {"model": dumped(model), **rest}, model, instance, flag_in(fields, "stream") is not False
    )


def reading_copy(parts: list[bytes]) -> Steps[ManagementBody]:
    """Read a request for a copy, which stays on the volume of its source, in steps.

    Args:
        parts: the body as it was received; the list is emptied.

    Raises:
        BadBodyError: it is no JSON object, names no source, or a source and a destination pinned apart.
    """
    fields = yield from read_fields(parts)
    source, instance = split_pin(name_in(fields, "source").strip())
    destination, other = split_pin(name_in(fields, "destination").strip())
    if not source:
        raise BadBodyError("source is required")
    for key, name in (("source", source), ("destination", destination)):
        if not is_possible(name):
            raise BadBodyError(f"{key} {dumped(name).decode()} is invalid")
    if instance is not None and other is not None and instance != other:
        raise BadBodyError(f"a copy stays where its source is: {instance!r} and {other!r} are two instances")
    names = {"source": dumped(source), "destination": dumped(destination)}
    return ManagementBody({**fields, **names}, source, instance or other, stream=False)
