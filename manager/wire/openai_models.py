"""The list of models of a server that speaks OpenAI's API, read leniently."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from manager.wire.listing import BLANK_DETAILS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# More models than this are not listed.
MOST_MODELS = 1000
_LONGEST_NAME = 512
_NOT_IN_A_NAME = re.compile(r"[\s\x00-\x1f\x7f]")
_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)


def read_models(body: Any) -> tuple[Mapping[str, Any], ...] | None:
    """Return an entry for each model, as `/api/tags` has them; None when the body is no such list."""
    models = body.get("data") if isinstance(body, dict) else None
    if not isinstance(models, list):
        return None
    found = (one for one in models if isinstance(one, dict) and _is_name(one.get("id")))
    return tuple(
        _entry(one["id"], one.get("created")) for one, _ in zip(found, range(MOST_MODELS), strict=False)
    )


def named_models(names: Iterable[str]) -> tuple[Mapping[str, Any], ...]:
    """Return the same entries for models that only the configuration names."""
    return tuple(_entry(name, None) for name in names)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST_NAME and _NOT_IN_A_NAME.search(value) is None


def _entry(name: str, created: Any) -> Mapping[str, Any]:
    """Return what such a server says of a model in the shape of Ollama's list: no size and no digest."""
    return {
        "name": name,
        "model": name,
        "modified_at": _time(created).isoformat().replace("+00:00", "Z"),
        "size": 0,
        "digest": "",
        "details": dict(BLANK_DETAILS),
    }


def _time(created: Any) -> datetime:
    if isinstance(created, bool) or not isinstance(created, int | float):
        return _BEGINNING
    try:
        return datetime.fromtimestamp(created, UTC).replace(microsecond=0)
    except (ValueError, OverflowError, OSError):
        return _BEGINNING
