"""Coverage of several processes that run tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = """
def sign(number):
    if number < 0:
        return -1
    return 1
"""
TEST = """
import subprocess
import sys
from product import sign

def test_{name}():
    assert sign({number}) == {expected}
    subprocess.run([sys.executable, "-c", "from product import sign; sign(-1)"], check=True)
"""
SETTINGS = "[run]\nbranch = true\nsource = product\n"


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    ours = ("COV", "PYTEST")  # of the run that this test is part of
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=directory,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith(ours)},
            "PYTHONPATH": f"{directory}{os.pathsep}{ROOT}",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("number", "missed"), [(-1, False), (1, True)], ids=["all", "a branch missed"])
def test_the_processes_count_together_and_a_branch_that_none_takes_is_missed(
    tmp_path: Path, number: int, missed: bool
) -> None:
    (tmp_path / "product.py").write_text(PRODUCT)
    (tmp_path / ".coveragerc").write_text(SETTINGS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    for name, given in (("first", 1), ("second", number)):
        text = TEST.format(name=name, number=given, expected=1 if given > 0 else -1)
        (tmp_path / f"test_{name}.py").write_text(text)
    workers = ("-p", "xdist", "-n", "2", "--dist", "loadfile")
    done = run(tmp_path, "pytest", "-p", "tests.tools.measured", "-p", "no:cacheprovider", *workers)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob(".coverage.*"))) == 2
    assert run(tmp_path, "coverage", "combine").returncode == 0
    report = run(tmp_path, "coverage", "report", "--show-missing", "--fail-under=100")
    assert (report.returncode == 2) is missed, report.stdout
