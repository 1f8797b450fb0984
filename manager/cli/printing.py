"""Answers on stdout: JSON as the API gives it, or rows in columns."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING

import click

from manager.cli.failures import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NONE = "-"
UNKNOWN = "unknown"
_GAP = "  "


def print_json(document: object) -> None:
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def print_rows(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a heading and a line for each row. None in a cell is `-`."""
    for line in table(heading, rows):
        click.echo(line)


def table(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return a heading and a line for each row. None in a cell is `-`."""
    return aligned([tuple(heading), *(tuple(map(cell, row)) for row in rows)])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line for each row, in columns."""
    columns = Columns()
    columns.widen(rows)
    return [columns.line(row) for row in rows]


class Columns:
    """The widths of columns, which only grow: rows that come later are aligned with the earlier ones."""

    def __init__(self) -> None:
        self._widths: list[int] = []

    def widen(self, rows: Sequence[Sequence[str]]) -> None:
        for row in rows:
            self._widths += [0] * (len(row) - len(self._widths))
            for index, text in enumerate(row):
                self._widths[index] = max(self._widths[index], len(text))

    def line(self, row: Sequence[str]) -> str:
        """Return the row; nothing is cut off."""
        self.widen([row[:-1]])  # the last one has no right edge
        return _GAP.join(text.ljust(width) for text, width in zip(row, self._widths, strict=False)).rstrip()


def cell(value: object) -> str:
    """Return a value as `one_line`; `-` for None and for nothing."""
    return NONE if value is None else one_line(str(value)) or NONE


def one_line(text: str) -> str:
    """Return text as one line that cannot steer the terminal."""
    return " ".join(printable(text).split())


def local_time(text: str) -> str:
    """Return an RFC 3339 time in the zone of this machine."""
    try:
        return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return text
