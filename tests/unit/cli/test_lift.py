"""`lift`, against an HTTP server that answers like a daemon."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from tests.unit.cli.stand_in import API, Answer, ready

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    from tests.unit.cli.stand_in import StandInDaemon

    Run = Callable[..., Result]


def test_lift_names_the_end_and_the_reason(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"POST {API}/instances/cpu/lift"] = Answer({"instance": ready("cpu"), "changed": True})
    before = datetime.now(UTC).replace(microsecond=0)
    result = run("lift", "cpu", "--for", "2h", "--reason", "maintenance", "--url", daemon.url)
    assert result.exit_code == 0, result.stderr
    (seen,) = daemon.seen
    body = json.loads(seen.body)
    until = datetime.fromisoformat(body["until"])
    assert timedelta(0) <= until - before - timedelta(hours=2) < timedelta(seconds=30)
    assert body["reason"] == "maintenance"
    assert result.stdout == f"the deny rules of cpu are lifted until {until:%Y-%m-%dT%H:%M:%SZ}\n"


@pytest.mark.parametrize(
    ("changed", "words"), [(True, "are in force again"), (False, "were in force already")]
)
def test_lift_ends(daemon: StandInDaemon, run: Run, changed: bool, words: str) -> None:
    body = {"instance": ready("cpu"), "changed": changed}
    daemon.answers[f"DELETE {API}/instances/cpu/lift"] = Answer(body)
    result = run("lift", "cpu", "--end", "--url", daemon.url)
    assert (result.exit_code, result.stdout) == (0, f"the deny rules of cpu {words}\n")


@pytest.mark.parametrize("options", [(), ("--for", "2h", "--end")])
def test_lift_wants_a_time_or_an_end(daemon: StandInDaemon, run: Run, options: tuple[str, ...]) -> None:
    result = run("lift", "cpu", *options, "--url", daemon.url)
    assert result.exit_code == 2
    assert "give either --for TIME or --end" in result.stderr
    assert daemon.seen == []


def test_lift_says_which_times_it_takes(daemon: StandInDaemon, run: Run) -> None:
    result = run("lift", "cpu", "--for", "soon", "--url", daemon.url)
    assert result.exit_code == 2
    assert "'soon': expected seconds, or a duration such as 90s, 15m, 2h, 1h30m or 30d" in result.stderr
