"""What every folder of tests may ask for by name."""

from __future__ import annotations

from tests.support.fixtures import docker_client, engine, manager_id, new_daemon

__all__ = ["docker_client", "engine", "manager_id", "new_daemon"]
