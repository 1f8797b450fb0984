"""Answers of Ollama's status routes, read leniently: a field that is missing or odd is never an error."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from manager.domain.instance import Model
from manager.domain.models import parameter_count

if TYPE_CHECKING:
    from collections.abc import Mapping

_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:\d\d)")


def read_version(body: Any) -> str | None:
    """The version `/api/version` tells, None when this is not Ollama's answer."""
    version = body.get("version") if isinstance(body, dict) else None
    return version if isinstance(version, str) else None


def read_loaded(body: Any) -> tuple[Model, ...] | None:
    """The models in memory from `/api/ps`, None when the body is not its answer."""
    entries = _entries(body)
    if entries is None:
        return None
    return tuple(
        Model(
            name=name_of(entry),
            digest=str(entry.get("digest") or ""),
            size_bytes=_count(entry.get("size")),
            vram_bytes=_count(entry.get("size_vram")),
            expires_at=read_time(entry.get("expires_at")),
            entry=entry,
        )
        for entry in entries
    )


def read_available(body: Any) -> tuple[Mapping[str, Any], ...] | None:
    """The models in an answer of `/api/tags`; None when the body is no such answer."""
    entries = _entries(body)
    return None if entries is None else tuple(entries)


def name_of(entry: Mapping[str, Any]) -> str:
    """The name of the model that an entry of a list is about, empty where it has none."""
    return str(entry.get("name") or entry.get("model") or "")


def parameters_of(entry: Mapping[str, Any]) -> int | None:
    """The number of parameters that an entry of a list gives (`details.parameter_size`); None without one."""
    details = entry.get("details")
    size = details.get("parameter_size") if isinstance(details, dict) else None
    try:
        return parameter_count(size) if isinstance(size, str) else None
    except ValueError:
        return None


def read_time(text: Any) -> datetime | None:
    """Go's RFC 3339 time, which has up to nine digits after the second; None when it is not one.

    "Never" comes as a time three centuries ahead. One beyond what a clock can be compared with is None too.
    """
    match = _TIME.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        return None
    micros = (match[2] or "")[:6].ljust(6, "0")
    zone = "+00:00" if match[3] == "Z" else match[3]
    try:
        return datetime.fromisoformat(f"{match[1]}.{micros}{zone}").astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _entries(body: Any) -> list[dict[str, Any]] | None:
    models = body.get("models") if isinstance(body, dict) else None
    if not isinstance(models, list):
        return None
    return [entry for entry in models if isinstance(entry, dict)]


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
