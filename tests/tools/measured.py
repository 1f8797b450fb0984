"""Coverage of the processes in which pytest-xdist runs tests: `-p tests.tools.measured`.

Coverage begins when pytest loads the plugin, before a test imports the product. The processes that tests
start are not measured: only what a test itself calls counts. Each process writes a data file of its own,
which `coverage combine` puts together.
"""

from __future__ import annotations

import os

import coverage

_WORKER = "PYTEST_XDIST_WORKER"
_measurement = coverage.Coverage(data_suffix=True) if _WORKER in os.environ else None
if _measurement is not None:
    _measurement.start()


def pytest_unconfigure() -> None:
    if _measurement is not None:
        _measurement.stop()
        _measurement.save()
