"""The values of a role as they are written on the command line: `KEY=VALUE`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from manager.cli.failures import MISUSED, CommandError
from manager.domain.durations import EXPECTED, parse_duration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping


class Kind(NamedTuple):
    """The notation of a value. `read` raises ValueError."""

    expected: str
    read: Callable[[str], Any]


def _whole(text: str) -> int:
    return int(text)


def _flag(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _names(text: str) -> list[str]:
    return [] if text == "[]" else [name.strip() for name in text.split(",")]


def _durations(text: str) -> list[float]:
    return [] if text == "[]" else [parse_duration(one) for one in text.split(",")]


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("no object")  # noqa: TRY004  (told as any other wrong value)
    return value


_TEXT = Kind("text", str)
_WHOLE = Kind("a whole number", _whole)
_FLAG = Kind("true or false", _flag)
_SECONDS = Kind(EXPECTED.removeprefix("expected "), parse_duration)
_NAMES = Kind("names with commas between them, or [] for none", _names)
_DURATIONS = Kind("durations with commas between them such as 45,1m, or [] for none", _durations)
_OBJECT = Kind('a JSON object such as {"temperature": 0}', _object)

KINDS: Mapping[str, Kind] = {
    "model": _TEXT,
    "target": _TEXT,
    "policy": _TEXT,
    "kind": _TEXT,
    "fallbacks": _NAMES,
    "body.defaults": _OBJECT,
    "body.overrides": _OBJECT,
    "system.text": _TEXT,
    "system.mode": _TEXT,
    "think": _FLAG,
    "instances": _NAMES,
    "reserved": _WHOLE,
    "concurrency": _WHOLE,
    "queue.length": _WHOLE,
    "queue.wait_s": _SECONDS,
    "weight": _WHOLE,
    "attempt_timeouts_s": _DURATIONS,
    "mode": _TEXT,
    "keep_warm": _NAMES,
    "paid_fallback": _FLAG,
    "strategy": _TEXT,
}


def read_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """Return the values by key; empty text and `null` are None, which takes a value back.

    Raises:
        CommandError: one is wrong; it names the key, what was given and what is allowed.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise CommandError(f"{pair!r}; expected KEY=VALUE", exit_code=MISUSED)
        check_key(key)
        if key in values:
            raise CommandError(f"{key} is given twice; expected it once", exit_code=MISUSED)
        values[key] = _value(key, text.strip())
    return values


def check_key(key: str) -> None:
    """Raise CommandError for a key that no role has."""
    if key in KINDS:
        return
    import difflib  # noqa: PLC0415

    near = difflib.get_close_matches(key, KINDS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise CommandError(
        f"{key!r} is no setting of a role; {hint}allowed: {', '.join(KINDS)}", exit_code=MISUSED
    )


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values as the API takes them: `queue.length` is inside `queue`."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        outer, _, inner = key.partition(".")
        if inner:
            result.setdefault(outer, {})[inner] = value
        else:
            result[outer] = value
    return result


def flat(values: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the entries of one effective role by key, each with `value` and `source`."""
    return {
        key: values[outer][inner] if inner else values[outer]
        for key in KINDS
        for outer, _, inner in (key.partition("."),)
    }


def shown(value: object) -> str:
    """Return a value as a person reads it: a list with commas, anything else that is no text as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ",".join(map(shown, value)) or "[]"
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, ensure_ascii=False)


def _value(key: str, text: str) -> Any:
    if text in ("", "null"):
        return None
    kind = KINDS[key]
    try:
        return kind.read(text)
    except (ValueError, LookupError):
        raise CommandError(f"{key}: {text!r}; expected {kind.expected}", exit_code=MISUSED) from None
