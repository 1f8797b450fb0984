"""Times as options: `--since` and `--until`."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    from tests.unit.cli.stand_in import StandInDaemon

    Run = Callable[..., Result]

OPTIONS = [
    ("usage", "--since", "from"),
    ("usage", "--until", "to"),
    ("requests", "--since", "since"),
    ("tiers stats", "--since", "from"),
    ("tiers stats", "--until", "to"),
]


@pytest.mark.parametrize(("command", "option", "parameter"), OPTIONS)
@pytest.mark.parametrize(("word", "days"), [("today", 0), ("yesterday", 1)])
def test_a_word_for_a_day_is_its_first_moment_here(
    run: Run, daemon: StandInDaemon, *, command: str, option: str, parameter: str, word: str, days: int
) -> None:
    run(*command.split(), option, word, "--url", daemon.url)
    (text,) = parse_qs(urlsplit(daemon.seen[0].path).query)[parameter]
    began = datetime.fromisoformat(text)
    now = datetime.now().astimezone()
    assert (began.hour, began.minute, began.second, began.microsecond) == (0, 0, 0, 0)
    assert began.date() == now.date() - timedelta(days=days)
    assert began.tzinfo is not None


@pytest.mark.parametrize(("command", "option", "parameter"), OPTIONS)
@pytest.mark.parametrize("given", ["15m", "7d", "90", "2026-03-01T12:00:00Z", "2026-03-01T13:00:00+01:00"])
def test_a_span_or_a_time_with_its_zone_is_sent_as_it_is(
    run: Run, daemon: StandInDaemon, *, command: str, option: str, parameter: str, given: str
) -> None:
    run(*command.split(), option, given, "--url", daemon.url)
    assert parse_qs(urlsplit(daemon.seen[0].path).query)[parameter] == [given]


@pytest.mark.parametrize(("command", "option"), [(command, option) for command, option, _ in OPTIONS])
@pytest.mark.parametrize("given", ["yestreday", "2026-03-01", "2026-13-01T00:00:00Z", "7dd", ""])
def test_anything_else_is_refused_with_what_is_allowed(
    run: Run, daemon: StandInDaemon, command: str, option: str, given: str
) -> None:
    result = run(*command.split(), option, given, "--url", daemon.url)
    assert (result.exit_code, daemon.seen) == (2, [])
    assert f"Invalid value for '{option}': '{given}': expected today, yesterday, a span" in result.stderr
