"""Values of options that several commands have."""

from __future__ import annotations

import click

from manager.domain.durations import parse_duration


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
