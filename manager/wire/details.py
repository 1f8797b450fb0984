"""A model's context length, length of vectors and capabilities, out of `/api/show`, beside a list's entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

# Ollama knows eight capabilities (0.33 `types/model/capability.go`).
_MOST_CAPABILITIES = 64
_ARCHITECTURE = "general.architecture"
_NAMED, _CAN = "details", "capabilities"
_LENGTH, _VECTOR = "context_length", "embedding_length"


class _Show(msgspec.Struct):
    """The parts of an answer that count; an answer has up to hundreds of kilobytes of others."""

    capabilities: list[str] | None = None
    model_info: dict[str, msgspec.Raw] | None = None


_SHOW = msgspec.json.Decoder(_Show)
_TEXT = msgspec.json.Decoder(str)
_COUNT = msgspec.json.Decoder(int)


@dataclass(frozen=True, slots=True)
class Details:
    """The longest context that a model was made for, what it can do, and the length of its vectors.

    None where that is unknown.
    """

    context_length: int | None
    capabilities: tuple[str, ...] | None
    embedding_length: int | None = None


def read_show(body: bytes) -> Details | None:
    """Read an answer of `/api/show`; None where it is none."""
    try:
        shown = _SHOW.decode(body)
    except ValueError:
        return None
    named = None if shown.capabilities is None else tuple(shown.capabilities[:_MOST_CAPABILITIES])
    info = shown.model_info or {}
    return Details(_length(info, _LENGTH), named, _length(info, _VECTOR))


def lacks_details(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry of `/api/tags` does not say all of it; newer servers do."""
    details = entry.get(_NAMED)
    return _CAN not in entry or not isinstance(details, dict) or not details.get(_LENGTH)


def with_details(entry: Mapping[str, Any], found: Details) -> Mapping[str, Any]:
    """Return an entry of `/api/tags` with what it does not say itself, where newer servers say it."""
    details = entry.get(_NAMED)
    details = details if isinstance(details, dict) else {}
    changed = dict(entry)
    lengths = {_LENGTH: found.context_length, _VECTOR: found.embedding_length}
    unsaid = {name: count for name, count in lengths.items() if count is not None and not details.get(name)}
    if unsaid:
        changed[_NAMED] = {**details, **unsaid}
    if found.capabilities is not None and _CAN not in entry:
        changed[_CAN] = list(found.capabilities)
    return changed


def details_of(entry: Mapping[str, Any]) -> Details:
    """Return what an entry of `/api/tags` says."""
    details = entry.get(_NAMED)
    details = details if isinstance(details, dict) else {}
    can = entry.get(_CAN)
    return Details(
        _count(details.get(_LENGTH)),
        tuple(str(one) for one in can[:_MOST_CAPABILITIES]) if isinstance(can, list) else None,
        _count(details.get(_VECTOR)),
    )


def _count(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None


def _length(info: Mapping[str, msgspec.Raw], name: str) -> int | None:
    """Read the value of `ARCHITECTURE.NAME`; models with several parts have several of them."""
    try:
        length = _COUNT.decode(info[f"{_TEXT.decode(info[_ARCHITECTURE])}.{name}"])
    except (LookupError, ValueError):
        return None
    return length if length > 0 else None
