"""The limits of the process."""

from __future__ import annotations

import pytest

from manager.serving import connection_budget


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
