"""`up` on a real engine: what it makes, what it says, and that it serves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import requests
from docker.errors import NotFound

from tests.simulated.image import IMAGE, ensure_simulated_image
from tests.support.daemon import free_port, wait_for
from tests.support.engine import PrivateEngine, private_engine_obstacles, unconnected
from tests.support.fixtures import write_templates

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def empty_engine() -> Iterator[PrivateEngine]:
    """An engine without images that reaches no registry: nothing listens at its proxy."""
    if private_engine_obstacles():
        pytest.skip("; ".join(private_engine_obstacles()))
    with unconnected() as engine:
        yield engine


def environment(engine: PrivateEngine, home: Path) -> dict[str, str]:
    rest = {name: value for name, value in os.environ.items() if not name.startswith("OLLAMA_MANAGER_")}
    return {**rest, "DOCKER_HOST": engine.url, "XDG_STATE_HOME": str(home)}


def up(engine: PrivateEngine, home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "manager", "up", *options],
        cwd=home, env=environment(engine, home), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def has_volume(engine: PrivateEngine, name: str) -> bool:
    try:
        engine.client().volumes.get(name)
    except NotFound:
        return False
    return True


@pytest.mark.timeout(180)
def test_it_changes_nothing_unasked_and_says_what_cannot_be_had(
    empty_engine: PrivateEngine, tmp_path: Path
) -> None:
    asked = up(empty_engine, tmp_path)
    assert asked.returncode == 2, asked.stderr
    assert "pull the image ollama/ollama:" in asked.stderr
    assert "create the volume ollama-models" in asked.stderr
    assert not has_volume(empty_engine, "ollama-models")

    agreed = up(empty_engine, tmp_path, "--yes")
    assert agreed.returncode == 1, agreed.stderr
    assert "an image cannot be pulled" in agreed.stderr
    (line,) = (line for line in agreed.stderr.splitlines() if line.startswith("  | "))
    assert line.count("ollama/ollama:") == 1, "its name is told once"
    assert "Traceback" not in agreed.stderr
    assert has_volume(empty_engine, "ollama-models")


@pytest.mark.timeout(180)
def test_it_serves_once_nothing_is_missing(empty_engine: PrivateEngine, tmp_path: Path) -> None:
    ensure_simulated_image(empty_engine.client())
    templates = write_templates(tmp_path / "templates", {"ollama-cpu": {"image": IMAGE}})
    (tmp_path / "ollama-manager.yaml").write_text(
        f"templates: {{dir: {templates}}}\ngpus: none\nallow: {{images: ['{IMAGE}']}}\n"
    )
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    log = tmp_path / "log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "manager", "up", "--yes", "--port", str(port)],
            cwd=tmp_path, env=environment(empty_engine, tmp_path),
            stdin=subprocess.DEVNULL, stdout=sink, stderr=sink,
        )  # fmt: skip
    try:
        wait_for(lambda: process.poll() is not None or _answers(f"{url}/readyz"), within_s=60)
        assert process.poll() is None, log.read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.RequestException:
        return False
