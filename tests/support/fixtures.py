"""Fixtures of all tests on a real engine: one engine for those that leave it alone, a daemon for each test.

`tests/conftest.py` makes them known to pytest.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.simulated.image import IMAGE, ensure_simulated_image
from tests.support.daemon import Daemon
from tests.support.engine import Engine, acquire_engine

if TYPE_CHECKING:
    from pathlib import Path

    import docker

FAST = {"probe_interval_s": 0.5, "resync_interval_s": 1, "stop_timeout_s": 5, "start_timeout_s": 20}


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """A real engine that ends with the tests, with the simulated Ollama in it."""
    with acquire_engine() as found:
        ensure_simulated_image(found.client())
        yield found


@pytest.fixture
def docker_client(engine: Engine) -> Iterator[docker.DockerClient]:
    with closing(engine.client()) as client:
        yield client


@pytest.fixture
def manager_id() -> str:
    """Tests share an engine; each manages its own containers."""
    return new_manager_id()


def new_manager_id() -> str:
    return f"t{uuid.uuid4().hex[:8]}"


def write_templates(directory: Path, templates: Mapping[str, Mapping[str, Any]]) -> Path:
    """Container templates of the simulated Ollama: `sim` (CPU), `sim-gpu`, and those given."""
    directory.mkdir(parents=True, exist_ok=True)
    base: dict[str, Mapping[str, Any]] = {"sim": {}, "sim-gpu": {"device": "gpu"}}
    for name, content in {**base, **templates}.items():
        text = yaml.safe_dump({"image": IMAGE, "device": "cpu", **content})
        (directory / f"{name}.yaml").write_text(text, encoding="utf-8")
    return directory


NewDaemon = Callable[..., Daemon]


@pytest.fixture
def new_daemon(engine: Engine, tmp_path: Path, manager_id: str) -> Iterator[NewDaemon]:
    """As `making_daemons`, on the shared engine, for one test."""
    with making_daemons(engine, tmp_path, manager_id) as make:
        yield make


@contextmanager
def making_daemons(engine: Engine, directory: Path, manager_id: str) -> Iterator[NewDaemon]:
    """Makes daemons (not yet started) on an engine; afterwards nothing of them is left on it.

    Arguments of the maker: `instances` (default: `cpu` from template `sim`), `templates` (name -> what
    differs from the simulated Ollama's), `lifecycle` (added to fast defaults), `config` (other sections),
    `environment`, `name` (a second daemon needs another home), `engine_url`.
    """
    with ExitStack() as stack:

        def make(
            *,
            instances: Mapping[str, Any] | None = None,
            templates: Mapping[str, Mapping[str, Any]] | None = None,
            lifecycle: Mapping[str, Any] | None = None,
            config: Mapping[str, Any] | None = None,
            environment: Mapping[str, str] | None = None,
            name: str = "daemon",
            engine_url: str | None = None,
        ) -> Daemon:
            home = directory / name
            template_dir = write_templates(home / "templates", templates or {})
            full = {
                "manager_id": manager_id,
                "templates": {"dir": str(template_dir)},
                "gpus": "none",
                "instances": instances or {"cpu": {"template": "sim"}},
                "lifecycle": {**FAST, **(lifecycle or {})},
                **(config or {}),
            }
            return stack.enter_context(
                Daemon(home, full, engine_url=engine_url or engine.url, environment=environment)
            )

        yield make
    with closing(engine.client()) as client:
        for container in client.containers.list(
            all=True, filters={"label": f"ollama-manager.manager={manager_id}"}
        ):
            container.remove(force=True)
