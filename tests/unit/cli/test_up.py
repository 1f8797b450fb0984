"""`up` names what it is going to do, asks, and says what it cannot do."""

from __future__ import annotations

import asyncio
import io
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner

from manager.adapters.docker_answers import not_pulled
from manager.adapters.docker_engine import DockerEngine
from manager.cli import machine, up
from manager.cli.commands import program
from manager.cli.failures import MISUSED, CommandError
from manager.cli.up import ImagesMissingError
from manager.settings import load_settings

if TYPE_CHECKING:
    from pathlib import Path


def test_without_an_engine_that_can_be_started_it_says_so_and_serves_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/none.sock", "HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-m", "manager", "up", "--yes"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert result.returncode == 1
    assert f"the Docker Engine at unix://{tmp_path}/none.sock does not answer" in result.stderr
    assert "check DOCKER_HOST or engine.url" in result.stderr


def test_a_mistake_in_the_configuration_ends_it_before_anything_is_changed(tmp_path: Path) -> None:
    (tmp_path / "ollama-manager.yaml").write_text("instances: {cpu: {template: none-such}}\n")
    result = subprocess.run(
        [sys.executable, "-m", "manager", "up", "--yes"],
        cwd=tmp_path, env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == MISUSED
    assert "none-such" in result.stderr


def test_it_needs_each_image_and_each_named_volume_once(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("instances: {cpu: {template: ollama-cpu}, two: {template: ollama-cpu}}\ngpus: none\n")
    need = up.needed(load_settings(file))
    assert len(need.images) == 1
    assert need.images[0].startswith("ollama/ollama:")
    assert need.volumes == ("ollama-models",)


@pytest.mark.parametrize(("cards", "needs"), [((), 0), (("a card",), 1)])
def test_without_a_container_no_engine_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cards: tuple[str, ...], needs: int
) -> None:
    monkeypatch.setattr(up, "read_cards", lambda: (cards, None))
    monkeypatch.setattr(machine, "why_no_engine", lambda _url: pytest.fail("it asks for the engine"))
    file = tmp_path / "config.yaml"
    file.write_text("instances: {nas: {driver: external, url: 'http://127.0.0.1:1'}}\n")
    loaded = load_settings(file)
    assert len(up.needed(loaded).images) == needs
    if not needs:
        up.prepare(loaded, yes=False)


def test_without_a_terminal_nothing_is_asked_and_nothing_changed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(CommandError, match="no terminal") as caught:
        up._ask(["pull the image x"], yes=False)
    assert caught.value.exit_code == MISUSED
    assert "pull the image x" in capsys.readouterr().err
    up._ask(["pull the image x"], yes=True)


@pytest.mark.parametrize(("answer", "goes_on"), [(True, True), (False, False)])
def test_the_answer_counts(monkeypatch: pytest.MonkeyPatch, *, answer: bool, goes_on: bool) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(click, "confirm", lambda *_, **__: answer)
    if goes_on:
        up._ask(["pull the image x"], yes=False)
    else:
        with pytest.raises(CommandError, match="nothing was changed"):
            up._ask(["pull the image x"], yes=False)


def test_an_image_that_cannot_be_pulled_is_named_once() -> None:
    error = ImagesMissingError({"a:1": not_pulled("a:1", "no such host").message, "b:1": "no progress"})
    assert error.message == "2 images cannot be pulled"
    assert [line.count("a:1") + line.count("b:1") for line in error.lines] == [1, 1]
    assert ImagesMissingError({"b:1": "no progress"}).message == "an image cannot be pulled"


async def test_a_pull_that_stands_still_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "NO_PROGRESS_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        engine = DockerEngine(f"tcp://127.0.0.1:{silent.getsockname()[1]}", 5)
        why = await up.pull(engine, "ollama/ollama:latest")
        engine.close()
    assert why == "no progress for 0.2 s"
    await asyncio.sleep(0)


def test_programs_that_are_not_installed_are_named_with_their_packages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "which", lambda _program: None)
    with pytest.raises(CommandError) as caught:
        machine.install([machine.DOCKERD, machine.IPTABLES])
    assert caught.value.message == "not installed: dockerd, iptables"
    assert any("apt-get install docker.io iptables" in line for line in caught.value.lines)


def test_the_engine_of_this_machine_is_started_by_root_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "which", lambda program: f"/usr/bin/{program}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(CommandError):
        machine.how_to_start(machine.SYSTEM_SOCKET, "refused")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert machine.how_to_start(machine.SYSTEM_SOCKET, "refused") == (
        "start the Docker Engine of this machine",
    )
    monkeypatch.setattr(machine, "which", {"apt-get": "/usr/bin/apt-get"}.get)
    assert machine.how_to_start(machine.SYSTEM_SOCKET, "refused")[0] == (
        "install docker.io iptables (apt-get)"
    )


def test_where_images_are_missing_the_stand_in_of_a_clone_gets_the_options(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def prepare(_loaded: object, *, yes: bool) -> None:
        assert yes
        raise ImagesMissingError({"ollama/ollama:1": "no such host"})

    executed: list[list[str]] = []

    def execute(_program: str, command: list[str]) -> None:
        executed.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(up, "prepare", prepare)
    monkeypatch.setattr(os, "execvp", execute)
    config = tmp_path / "a b.yaml"
    config.touch()
    options = ["up", "--yes", "--port", "11500", "--config", str(config), "--take-over"]
    result = CliRunner().invoke(program, options)
    assert (result.exit_code, executed) == (1, [])
    assert result.stderr.startswith("error: an image cannot be pulled\n")
    result = CliRunner().invoke(program, [*options, "--without-images", "python -m stand_in"])
    assert "ollama/ollama:1: no such host" in result.stderr
    assert executed == [["python", "-m", "stand_in", "--port=11500", f"--config={config}", "--take-over"]]
