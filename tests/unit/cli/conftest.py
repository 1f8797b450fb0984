from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import structlog
from click.testing import CliRunner, Result

from manager.cli.commands import program
from tests.unit.cli.stand_in import StandInDaemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NO_ENGINE = "tcp://127.0.0.1:1"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No configuration, state or engine of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith(("OLLAMA_MANAGER_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state-home"))
    # Not a socket file that is missing: the SDK leaves it to the garbage collector to close its end of that.
    monkeypatch.setenv("DOCKER_HOST", NO_ENGINE)
    monkeypatch.setenv("TERM", "xterm-256color")  # a dumb one is always 80 columns wide, to rich
    monkeypatch.chdir(tmp_path)
    configured = structlog.is_configured()
    yield
    if not configured:
        structlog.reset_defaults()


@pytest.fixture
def daemon() -> Iterator[StandInDaemon]:
    with StandInDaemon() as daemon:
        yield daemon


@pytest.fixture
def run() -> Callable[..., Result]:
    """Runs `ollama-manager` with some arguments, in this process."""

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(program, list(arguments))

    return run
