"""What every folder of tests may ask for by name."""

from __future__ import annotations

from hypothesis import settings

from tests.support.fixtures import docker_client, engine, manager_id, new_daemon
from tests.support.host import leave_network

__all__ = ["docker_client", "engine", "manager_id", "new_daemon"]

# How long an example takes says something about the machine, not about what is tested.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


def pytest_configure() -> None:
    leave_network()
