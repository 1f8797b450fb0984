"""Runs the cases that the command line names, or all, and prints the outcome of each as JSON."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Cases = Mapping[str, Callable[[], object]]


def report(cases: Cases, only: list[str]) -> None:
    outcomes = {name: _outcome(cases[name]) for name in only or cases}
    sys.stdout.write(json.dumps(outcomes, default=str) + "\n")


def _outcome(case: Callable[[], object]) -> object:
    try:
        return case()
    except Exception as error:  # noqa: BLE001  (an error is an outcome)
        return f"{type(error).__name__}: {error}"
