"""What every folder of tests may ask for by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings

from tests.support.fixtures import docker_client, engine, manager_id, new_daemon
from tests.support.host import leave_network
from tests.support.postgres import postgres

__all__ = ["docker_client", "engine", "manager_id", "new_daemon", "postgres"]

# How long an example takes says something about the machine, not about what is tested.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


def pytest_configure() -> None:
    leave_network()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each operation that schemathesis tests an id of its own.

    pytest-xdist takes items of one id for one item, and runs the first of them alone.
    """
    for item in items:
        label = getattr(item, "operation_label", None)
        if label is not None:
            item._id = replace(item.id, params=label)  # there is no public way
