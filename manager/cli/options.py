"""Values of options that several commands have."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime, time, timedelta
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeVar

import click

from manager.domain.durations import parse_duration

if TYPE_CHECKING:
    from collections.abc import Callable

Command = TypeVar("Command", bound="Callable[..., Any]")

_MOST_LAST = 10_000
_DAYS = {"today": 0, "yesterday": 1}
_WHEN = "today, yesterday, a span such as 15m or 7d, or a time with its zone such as 2026-03-01T12:00:00Z"


class Finite(click.FloatRange):
    """A number between bounds that is neither NaN nor infinite: JSON has none of these."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not isfinite(number):
            self.fail(f"{value!r} is no finite number.", param, ctx)
        return number


def follow_option(words: str) -> Callable[[Command], Command]:
    """`-f`, which goes on with what comes."""
    return click.option("-f", "--follow", is_flag=True, help=words)


def last_option(name: str, default: int, words: str) -> Callable[[Command], Command]:
    """The number of the last entries to print."""
    return click.option(
        name,
        type=click.IntRange(1, _MOST_LAST),
        default=default,
        show_default=True,
        metavar="N",
        help=words,
    )


def seconds(_context: click.Context, _option: click.Parameter, value: str | None) -> float | None:
    """Return the seconds of a duration above zero, such as 90s or 2h; for the `callback` of an option."""
    if value is None:
        return None
    try:
        parsed = parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: {error}") from error
    if parsed <= 0:
        raise click.BadParameter(f"{value!r}: expected more than zero")
    return parsed


def when(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    """Return a time or a span as it is, a word for a day as its first moment here; for `callback`."""
    if value in _DAYS:
        day = datetime.now().astimezone().date() - timedelta(days=_DAYS[value])
        return datetime.combine(day, time()).astimezone().isoformat()
    if value is None or _is_span(value) or _is_time(value):
        return value
    raise click.BadParameter(f"{value!r}: expected {_WHEN}")


def _is_span(text: str) -> bool:
    with suppress(ValueError):
        parse_duration(text)
        return True
    return False


def _is_time(text: str) -> bool:
    with suppress(ValueError):
        return datetime.fromisoformat(text).tzinfo is not None
    return False
