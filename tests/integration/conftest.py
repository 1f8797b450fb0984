"""The fixtures themselves are in `tests/support`, for other folders too."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from tests.support.engine import PrivateEngine
from tests.support.fixtures import FAST, NewDaemon, write_templates
from tests.support.inside import EngineEvents, NewInside, only_mine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import docker

    from tests.support.engine import Engine

__all__ = ["FAST", "NewDaemon", "write_templates"]


@pytest_asyncio.fixture
async def new_inside(engine: Engine, tmp_path: Path, manager_id: str) -> AsyncIterator[NewInside]:
    """Makes daemons on the test's event loop and the shared engine; nothing of them is left afterwards."""
    with only_mine(engine, manager_id):
        async with AsyncExitStack() as stack:
            yield NewInside(stack, tmp_path, manager_id, engine.url)


@pytest.fixture
def engine_events(engine: Engine, docker_client: docker.DockerClient, manager_id: str) -> EngineEvents:
    log = engine.event_log if isinstance(engine, PrivateEngine) else None
    return EngineEvents(docker_client, manager_id, log)
