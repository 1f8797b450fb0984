"""Rows of figures, each beside its target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

HEADINGS = ("what", "figure", "target", "")


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `target` is empty for figures that only explain another one."""

    what: str
    figure: str
    target: str = ""
    verdict: Literal["ok", "OVER", "FAILED", ""] = ""


def at_most(what: str, value: float, limit: float, unit: str, *, digits: int = 1, beside: str = "") -> Row:
    """A figure that must not be larger than `limit`; `beside` is printed after it."""
    shown = f"{value:.{digits}f}{unit}" + (f"  ({beside})" if beside else "")
    return Row(what, shown, f"<= {limit:g}{unit}", "ok" if value <= limit else "OVER")


def rendered(rows: list[Row]) -> str:
    cells = [HEADINGS, *((row.what, row.figure, row.target, row.verdict) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADINGS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def percentile(samples: list[float], share: float) -> float:
    """The smallest sample that at least `share` of all do not exceed (nearest rank)."""
    ordered = sorted(samples)
    rank = max(1, -(-len(ordered) * share // 1))
    return ordered[int(rank) - 1]
