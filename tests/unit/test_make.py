"""What the Makefile gives to uv, and what `make run` runs."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from manager.cli.commands import up

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


def test_make_run_is_up_with_its_args() -> None:
    make = [
        "make",
        "--no-print-directory",
        "-n",
        "--old-file=setup",
        "BIN=bin",
        "run",
        "ARGS=--port 11500 --config c.yaml",
    ]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(make, cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
    words = shlex.split(done.stdout.removeprefix("exec "))
    assert words[:4] == ["bin/python", "-m", "manager", "up"]
    with up.make_context("ollama-manager up", words[4:]) as context:
        given = context.params
    assert (given["yes"], given["port"], given["config"]) == (True, 11500, Path("c.yaml"))
    assert given["without_images"] == "bin/python -m tests.tools.simulated"
