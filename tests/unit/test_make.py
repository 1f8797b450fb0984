"""What the Makefile gives to uv."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

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
