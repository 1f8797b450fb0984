"""`local-only`: what is sent, and what it says the switch means now."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.cli.stand_in import Answer, error

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    from tests.unit.cli.stand_in import StandInDaemon

    Run = Callable[..., Result]

SETTINGS, EFFECTIVE = "/api/settings/models", "/api/settings/models/effective"


def effective(*, is_on: bool, is_enabled: bool = True, source: str = "override", **paying: bool) -> Answer:
    roles = {name: {"paid_fallback": {"value": value, "source": "file"}} for name, value in paying.items()}
    switch = {"value": is_on, "source": source}
    enabled = {"value": is_enabled, "source": "file"}
    return Answer({"roles": roles, "fallback": {"enabled": enabled}, "force_local": switch, "ignored": []})


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (effective(is_on=True, output=True), "local only: on (override) - no paid server is used"),
        (
            effective(is_on=False, is_enabled=False, source="default", output=True),
            "local only: off (default) - fallback.enabled is off, so no paid server is used",
        ),
        (
            effective(is_on=False, output=False),
            "local only: off (override) - no role has paid_fallback, so no paid server is used",
        ),
        (
            effective(is_on=False, source="file", output=True, control=False, thinking=True),
            "local only: off (file) - paid servers may answer for output, thinking where nothing local can",
        ),
    ],
)
def test_the_switch_is_shown_with_its_source_and_its_present_effect(
    daemon: StandInDaemon, run: Run, answer: Answer, line: str
) -> None:
    daemon.answers[f"GET {EFFECTIVE}"] = answer
    for arguments in (("local-only",), ("local-only", "show")):
        assert run(*arguments, "--url", daemon.url).stdout == f"{line}\n"
    shown = json.loads(run("local-only", "--json", "--url", daemon.url).stdout)
    assert shown == answer.body["force_local"]
    assert [one.method for one in daemon.seen if one.method == "POST"] == []


@pytest.mark.parametrize(("action", "value"), [("on", True), ("off", False), ("unset", None)])
def test_a_change_is_sent_and_what_is_in_force_then_is_told(
    daemon: StandInDaemon, run: Run, action: str, value: Any
) -> None:
    daemon.answers[f"POST {SETTINGS}"] = Answer({})
    daemon.answers[f"GET {EFFECTIVE}"] = effective(is_on=True)
    result = run("local-only", action, "--url", daemon.url)
    assert result.exit_code == 0, result.output
    (posted,) = [one for one in daemon.seen if one.method == "POST"]
    assert json.loads(posted.body) == {"force_local": value}
    assert result.stdout.startswith("local only: on (override)")


def test_a_refusal_and_a_wrong_word_are_told(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"POST {SETTINGS}"] = Answer(error("registry_unwritable", "the disk is full"), 503)
    result = run("local-only", "on", "--url", daemon.url)
    assert result.exit_code != 0
    assert "the disk is full" in result.stderr
    assert run("local-only", "maybe").exit_code == 2
