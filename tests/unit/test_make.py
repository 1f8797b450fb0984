"""What the Makefile gives to uv, and what `make run` does with ARGS."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools import run

ROOT = Path(__file__).resolve().parents[2]
PRINT = "--eval=shown: ; @echo $$UV_SYSTEM_CERTS $$UV_NATIVE_TLS"


@pytest.mark.parametrize(
    ("given", "shown"), [({}, "true true"), ({"UV_SYSTEM_CERTS": "false"}, "false true")]
)
def test_uv_trusts_what_the_system_trusts_unless_it_is_told_not_to(given: dict[str, str], shown: str) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("UV_")} | given
    done = subprocess.run(
        ["make", "-s", "UV=true", PRINT, "shown"],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == shown.split()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--prot", "1"], "No such option"),
        (["--port", "x"], "'x' is not a valid integer"),
        (["--port"], "requires an argument"),
        (["serve"], "unexpected extra argument"),
    ],
)
def test_a_mistake_in_args_is_told_before_anything_is_prepared(
    arguments: list[str], problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "prepare", lambda *_args, **_options: pytest.fail("it prepares"))
    monkeypatch.setattr(sys, "argv", ["run", *arguments])
    with pytest.raises(SystemExit) as caught:
        run.main()
    assert caught.value.code == 2
    assert problem in capsys.readouterr().err


def test_args_are_those_of_up() -> None:
    given = run.options(["--port", "11500", "--config", "c.yaml", "--stop-instances"])
    assert (given["port"], given["config"], given["host"]) == (11500, Path("c.yaml"), None)
    with pytest.raises(SystemExit) as caught:
        run.options(["--help"])
    assert caught.value.code == 0
