"""A daemon that the tests of one file share, with one instance of each kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.support.collections import Collection, embedding_gateway, new_collection
from tests.support.embedding_server import EmbeddingServer
from tests.support.fixtures import making_daemons, new_manager_id
from tests.support.ollama import RunningOllama, running_ollama

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.daemon import Daemon
    from tests.support.engine import Engine
    from tests.support.gateway import Gateway


@dataclass(frozen=True, slots=True)
class Api:
    """`cpu` and `second` are containers, `nas` is the external server, `gone` one that nobody answers at."""

    daemon: Daemon
    nas: RunningOllama
    manager_id: str


@pytest.fixture(scope="module")
def api(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    manager_id = new_manager_id()
    with (
        running_ollama() as nas,
        making_daemons(engine, tmp_path_factory.mktemp("api"), manager_id) as make,
    ):
        instances = {
            "cpu": {"template": "sim"},
            "second": {"template": "sim", "ttl_s": 60},
            "nas": {"driver": "external", "url": nas.url, "device": "cpu"},
            "gone": {"driver": "external", "url": "http://127.0.0.1:9"},
        }
        # The simulated image has no registry: what is allowed to be pulled fails, which is what is tested.
        daemon = make(instances=instances)
        yield Api(daemon.start(), nas, manager_id)


@pytest.fixture
def daemon(api: Api) -> Iterator[Daemon]:
    """The shared daemon with its containers stopped and its overrides undone, before and after."""
    yield api.daemon
    for instance in ("cpu", "second"):
        api.daemon.stopped(instance, force=True)
        api.daemon.call("PATCH", f"instances/{instance}", json={"ttl_s": None, "pinned": None})


@pytest.fixture(scope="module")
def embedding_server() -> Iterator[EmbeddingServer]:
    with EmbeddingServer() as server:
        yield server


@pytest.fixture(scope="module")
def gateway(embedding_server: EmbeddingServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A daemon without an engine, in front of a server that embeds."""
    with embedding_gateway(tmp_path_factory.mktemp("collections"), embedding_server) as gateway:
        yield gateway


@pytest.fixture
def docs(gateway: Gateway, embedding_server: EmbeddingServer) -> Iterator[Collection]:
    """An empty collection of the test's own."""
    with new_collection(gateway, embedding_server) as collection:
        yield collection
