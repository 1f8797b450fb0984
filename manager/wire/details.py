"""A model's context length and what it can do, out of `/api/show`, beside what a list says of it."""

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
_LENGTH = "context_length"


class _Show(msgspec.Struct):
    """The parts of an answer that count; an answer has up to hundreds of kilobytes of others."""

    capabilities: list[str] | None = None
    model_info: dict[str, msgspec.Raw] | None = None


_SHOW = msgspec.json.Decoder(_Show)
_TEXT = msgspec.json.Decoder(str)
_COUNT = msgspec.json.Decoder(int)


@dataclass(frozen=True, slots=True)
class Details:
    """The longest context that a model was made for, and what it can do; None where that is unknown."""

    context_length: int | None
    capabilities: tuple[str, ...] | None


def read_show(body: bytes) -> Details | None:
    """Read an answer of `/api/show`; None where it is none."""
    try:
        shown = _SHOW.decode(body)
    except ValueError:
        return None
    named = None if shown.capabilities is None else tuple(shown.capabilities[:_MOST_CAPABILITIES])
    return Details(_context_length(shown.model_info or {}), named)


def lacks_details(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry of `/api/tags` does not say all of it; newer servers do."""
    details = entry.get(_NAMED)
    return _CAN not in entry or not isinstance(details, dict) or not details.get(_LENGTH)


def with_details(entry: Mapping[str, Any], found: Details) -> Mapping[str, Any]:
    """Return an entry of `/api/tags` with what it does not say itself, where newer servers say it."""
    details = entry.get(_NAMED)
    details = details if isinstance(details, dict) else {}
    changed = dict(entry)
    if found.context_length is not None and not details.get(_LENGTH):
        changed[_NAMED] = {**details, _LENGTH: found.context_length}
    if found.capabilities is not None and _CAN not in entry:
        changed[_CAN] = list(found.capabilities)
    return changed


def details_of(entry: Mapping[str, Any]) -> Details:
    """Return what an entry of `/api/tags` says."""
    details = entry.get(_NAMED)
    length = details.get(_LENGTH) if isinstance(details, dict) else None
    can = entry.get(_CAN)
    return Details(
        length if isinstance(length, int) and not isinstance(length, bool) and length > 0 else None,
        tuple(str(one) for one in can[:_MOST_CAPABILITIES]) if isinstance(can, list) else None,
    )


def _context_length(info: Mapping[str, msgspec.Raw]) -> int | None:
    """Read the value of `ARCHITECTURE.context_length`; models with several parts have several of them."""
    try:
        length = _COUNT.decode(info[f"{_TEXT.decode(info[_ARCHITECTURE])}.{_LENGTH}"])
    except (LookupError, ValueError):
        return None
    return length if length > 0 else None
