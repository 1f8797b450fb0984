"""The limits of the process, and its interpreter."""

from __future__ import annotations

import gc
import sys

import pytest

from manager.serving import connection_budget, tune_interpreter


@pytest.mark.parametrize("descriptors", [16, 64, 128, 256, 1024, 4096, 20_000, 2**20])
@pytest.mark.parametrize("instances", [0, 1, 12, 100])
def test_connections_and_one_upstream_connection_for_each_fit_into_the_limit(
    descriptors: int, instances: int
) -> None:
    most, spare = connection_budget(descriptors, instances)
    assert most >= 4
    assert spare >= 4
    if descriptors > 80 + 4 * instances:
        assert 2 * (most + spare) + 64 + 4 * instances <= descriptors


def test_the_usual_limits_serve_many() -> None:
    assert connection_budget(1024, 4).most >= 450
    assert connection_budget(20_000, 4).most >= 9_000


def test_a_daemon_that_is_built_collects_garbage_which_its_start_did_not() -> None:
    threshold, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.disable()
    try:
        tune_interpreter()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.enable()
        gc.unfreeze()
        gc.set_threshold(*threshold)
        sys.setswitchinterval(interval)
