"""One request as a page shows it: its state, its stages, its tokens. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from manager.domain.explanation import fallback_words
from manager.domain.record import LOCAL
from manager.web.state import BAD, OFF, OK, WARN, WORK
from manager.web.words import short_time, unix_s

if TYPE_CHECKING:
    from collections.abc import Mapping

_KINDS = {
    "ok": OK,
    "client_error": WARN,
    "client_gone": OFF,
    "refused": BAD,
    "upstream_error": BAD,
    "timeout": BAD,
    "cut": WARN,
}
_OPEN = "open"
# The colours of the stages (`page.css`).
_FILLS = {"queue": "foreign", "start": "3", "load": "4", "first": "1", "stream": "2", "silence": "bad"}
# A stage is drawn at least so wide, of 1000.
_NARROWEST = 4.0


class Stage(NamedTuple):
    """A part of a request's time. `x` and `width` are thousandths of the whole."""

    name: str
    fill: str
    begin_ms: float
    took_ms: float
    x: float
    width: float


def row(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a list shows of a request. That of an open one holds no clocks.

    Args:
        record: the values of an `api.requests.RequestBody`.
    """
    is_open = record["open"]
    outcome = _OPEN if is_open else record["outcome"]
    return {
        "id": record["request_id"],
        "open": is_open,
        "began_at": unix_s(record["ts"]),
        "outcome": outcome,
        "kind": WORK if is_open else _KINDS.get(outcome, WARN),
        "status": record["status"] or None,
        "project": record["project_id"],
        "key": record["key"],
        "role": record["role"],
        "lane": record["lane"],
        "model": record["model"],
        "path": record["path"],
        "asked": record["requested_target"],
        "target": record["effective_target"],
        "provider": None if record["provider"] == LOCAL else record["provider"],
        "attempts": record["attempts"],
        "choice": choice(record),
        "fallback": fallback(record),
        "reason": None if record["fallback"] else record["fallback_reason"],
        "answers": record["ttfb_ms"] is not None,
        "queue_ms": record["queue_ms"],
        "start_ms": record["start_ms"],
        "load_ms": record["load_ms"],
        "first_ms": record["ttfb_ms"],
        "took_ms": None if is_open else record["duration_ms"],
        "input_tokens": record["input_tokens"],
        "output_tokens": record["output_tokens"],
        "rate": None if is_open else tokens_per_s(record),
        "is_least_rate": not record["stream"],
        "cost_usd": record["cost_usd"] if record["provider"] != LOCAL else None,
    }


def choice(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how the model of a request was chosen by its words; None where the request named one."""
    if record["tier"] is None:
        return None
    return {
        "requested": record["requested_model"],
        "task": record["task_type"],
        "tier": record["tier"],
        "confidence": record["task_confidence"],
        "why": record["task_reasoning"],
        "took": short_time(record["routing_ms"]),
    }


def fallback(record: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the reason of a fallback, as a code and in words; None without one."""
    reason = record["fallback_reason"]
    if not record["fallback"] or reason is None:
        return None
    return {"code": reason, "words": fallback_words(reason, record["fallback_from"])}


def tokens_per_s(record: Mapping[str, Any]) -> float | None:
    """Return how fast the answer was written.

    An answer in one piece does not say when its first token was written: the speed is at least what the whole
    time of the server gives.
    """
    tokens, first_ms = record["output_tokens"], record["ttfb_ms"]
    if not tokens or first_ms is None:
        return None
    if record["stream"]:
        # The first token is there when the time begins.
        tokens, took_ms = tokens - 1, record["duration_ms"] - first_ms
    else:
        took_ms = record["duration_ms"] - record["queue_ms"] - (record["start_ms"] or 0.0)
    return tokens * 1000 / took_ms if tokens > 0 and took_ms > 0 else None


def stages(record: Mapping[str, Any]) -> list[Stage]:
    """Return how the time of a request was spent, in order. Stages without a time are left out."""
    whole_ms = record["duration_ms"]
    if whole_ms <= 0:
        return []
    first_ms = record["ttfb_ms"]
    found, at_ms = [], 0.0

    def add(name: str, took_ms: float) -> None:
        nonlocal at_ms
        took_ms = min(took_ms, whole_ms - at_ms)
        if took_ms > 0:
            x, width = at_ms / whole_ms * 1000, max(took_ms / whole_ms * 1000, _NARROWEST)
            x = min(x, 1000 - width)
            found.append(Stage(name, _FILLS[name], at_ms, took_ms, round(x, 1), round(width, 1)))
            at_ms += took_ms

    add("queue", record["queue_ms"])
    add("start", record["start_ms"] or 0.0)
    if first_ms is None:
        add("silence", whole_ms - at_ms)
        return found
    add("load", min(record["load_ms"] or 0.0, max(0.0, first_ms - at_ms)))
    add("first", first_ms - at_ms)
    add("stream", whole_ms - at_ms)
    return found
