"""Findings of `doctor`, and their text."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import click

from manager.cli.failures import coloured, printable

if TYPE_CHECKING:
    from collections.abc import Sequence


class Verdict(StrEnum):
    FINE = "ok"
    WARNING = "warning"
    BROKEN = "broken"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: `remedy` is what to do, empty where nothing has to be done."""

    check: str
    verdict: Verdict
    message: str
    remedy: str = ""


def fine(check: str, message: str) -> Finding:
    return Finding(check, Verdict.FINE, message)


def warning(check: str, message: str, remedy: str) -> Finding:
    return Finding(check, Verdict.WARNING, message, remedy)


def broken(check: str, message: str, remedy: str) -> Finding:
    return Finding(check, Verdict.BROKEN, message, remedy)


def skipped(check: str, message: str) -> Finding:
    return Finding(check, Verdict.SKIPPED, message)


_SIGNS = {
    Verdict.FINE: ("✓", "ok", "green"),
    Verdict.WARNING: ("!", "!!", "yellow"),
    Verdict.BROKEN: ("✗", "XX", "red"),
    Verdict.SKIPPED: ("-", "--", "bright_black"),
}


def as_json(findings: Sequence[Finding]) -> str:
    checks = [asdict(finding) for finding in findings]
    return json.dumps({"ok": not any_broken(findings), "checks": checks}, indent=2, ensure_ascii=False)


def any_broken(findings: Sequence[Finding]) -> bool:
    return any(finding.verdict is Verdict.BROKEN for finding in findings)


def show(finding: Finding) -> None:
    """A line with sign, check and message, further lines below the message, the remedy last."""
    colours = coloured(sys.stdout)
    sign, in_ascii, colour = _SIGNS[finding.verdict]
    if not (sys.stdout.encoding or "").lower().startswith("utf"):
        sign = in_ascii
    first, *more = printable(finding.message).splitlines() or [""]
    styled = click.style(sign, fg=colour, bold=True) if colours else sign
    click.echo(f"{styled} {finding.check:<16} {first}")
    indent = " " * (len(sign) + 18)
    for line in more:
        click.echo(indent + line)
    for line in printable(finding.remedy).splitlines():
        text = f"{indent}-> {line}"
        click.echo(click.style(text, fg=colour) if colours else text)


def conclusion(findings: Sequence[Finding]) -> str:
    faults = sum(finding.verdict is Verdict.BROKEN for finding in findings)
    warnings = sum(finding.verdict is Verdict.WARNING for finding in findings)
    if not faults and not warnings:
        return "Everything is in order."
    parts = [
        f"{number} {word}{'s' if number > 1 else ''}"
        for number, word in ((faults, "fault"), (warnings, "warning"))
        if number
    ]
    return f"{' and '.join(parts)}."
