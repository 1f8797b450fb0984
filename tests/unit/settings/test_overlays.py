"""Overlays of environments: which file counts, how it is merged, and what a wrong one is answered."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from manager.cli.commands import program
from manager.cli.effective import effective_yaml
from manager.errors import ConfigurationError
from manager.settings import load
from manager.settings.load import load_settings
from manager.settings.overlays import read_overlay

HOME = {"HOME": "/home/someone"}
PROD = HOME | {"OLLAMA_MANAGER_ENV": "prod"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration of this machine plays a part."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "SYSTEM_FILE", tmp_path / "etc" / "config.yaml")


def write(
    base: str, overlay: str | None = None, *, directory: str = ".", name: str = "ollama-manager.yaml"
) -> Path:
    file = Path(directory, name)
    file.parent.mkdir(exist_ok=True)
    file.write_text(base)
    if overlay is not None:
        Path(directory, "ollama-manager.prod.yaml").write_text(overlay)
    return file


def refusal(environ: dict[str, str], file: Path | None = None) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(file, environ=environ)
    return caught.value.message


def test_mappings_are_merged_and_lists_are_replaced() -> None:
    write(
        "server: {port: 11500, allowed_hosts: [a, b]}\ninstances: {cpu: {template: ollama-cpu, ttl_s: 60}}\n",
        "server:\n  allowed_hosts: [c]\ninstances:\n  cpu: {ttl_s: 5m}\n  nas: {driver: external, url: 'http://nas:1'}\n",
    )
    plain, prod = load_settings(environ=HOME), load_settings(environ=PROD)
    assert (plain.overlay, plain.settings.server.allowed_hosts) == (None, ("a", "b"))
    assert prod.overlay == Path("ollama-manager.prod.yaml")
    settings = prod.settings
    assert (settings.server.port, settings.server.allowed_hosts) == (11500, ("c",))
    assert list(settings.instances) == ["cpu", "nas"]
    assert (settings.instances["cpu"].template, settings.instances["cpu"].ttl_s) == ("ollama-cpu", 300)
    assert prod.source_of("server.port") == "file ollama-manager.yaml:1"
    assert prod.source_of("server.allowed_hosts") == "file ollama-manager.prod.yaml:2"
    shown = effective_yaml(prod)
    assert shown.startswith(
        "# configuration file: ollama-manager.yaml, overlaid by ollama-manager.prod.yaml\n"
    )
    assert "# file ollama-manager.prod.yaml:4" in shown


def test_the_environment_and_the_command_line_win_over_the_overlay() -> None:
    write("server: {port: 1000}\nlog: {level: info}\n", "server: {port: 2000}\nlog: {level: error}\n")
    assert load_settings(environ=PROD).settings.server.port == 2000
    environ = PROD | {"OLLAMA_MANAGER_SERVER__PORT": "3000"}
    found = load_settings(environ=environ)
    assert (found.settings.server.port, found.settings.log.level) == (3000, "error")
    found = load_settings(environ=environ, overrides={"server": {"port": 4000}})
    assert found.settings.server.port == 4000


def test_a_variable_spells_a_name_that_only_the_overlay_has() -> None:
    write("instances: {}\n", "instances: {big-gpu: {driver: external, url: 'http://nas:1', priority: 1}}\n")
    found = load_settings(environ=PROD | {"OLLAMA_MANAGER_INSTANCES__BIG_GPU__PRIORITY": "7"})
    assert found.settings.instances["big-gpu"].priority == 7


def test_an_overlay_stands_beside_the_file_whatever_that_is_called() -> None:
    file = write("server: {port: 1000}\n", "state: {dir: here}\n", directory="conf", name="config.yaml")
    found = load_settings(file, environ=PROD)
    assert found.settings.state.dir == Path.cwd() / "conf" / "here"


def test_a_wrong_value_is_reported_where_it_was_written() -> None:
    write("server: {port: 1000}\n", "server:\n  port: none\n")
    assert refusal(PROD).startswith("ollama-manager.prod.yaml:2: server.port: 'none'")
    write("server:\n  port: none\n", "log: {level: info}\n")
    assert refusal(PROD).startswith("ollama-manager.yaml:2: server.port: 'none'")
    write("{}", "server: [\n")
    assert refusal(PROD).startswith("ollama-manager.prod.yaml:2: not YAML")


@pytest.mark.parametrize("name", ["../prod", "a.b", "x" * 33, "-a", "a b"])
def test_a_name_that_could_lead_elsewhere_is_refused(name: str) -> None:
    write("{}")
    message = refusal(HOME | {"OLLAMA_MANAGER_ENV": name})
    assert message.startswith(f"--env or $OLLAMA_MANAGER_ENV: {name!r}; expected a name")


def test_a_missing_overlay_and_a_missing_file_are_refused() -> None:
    expected = "--env or $OLLAMA_MANAGER_ENV: 'prod'; "
    assert refusal(PROD).startswith(f"{expected}there is no configuration file")
    write("{}")
    assert refusal(PROD).startswith(
        f"{expected}ollama-manager.prod.yaml cannot be read (No such file or directory)"
    )
    assert load_settings(environ=HOME | {"OLLAMA_MANAGER_ENV": " "}).overlay is None
    assert read_overlay(None, HOME) is None


def test_an_overlay_that_others_can_write_counts_only_beside_a_file_that_was_named() -> None:
    file = write("{}", "server: {port: 2000}\n")
    Path("ollama-manager.prod.yaml").chmod(0o666)
    assert "others may write to ollama-manager.prod.yaml" in refusal(PROD)
    assert load_settings(file, environ=PROD).settings.server.port == 2000


LEAVES = st.integers(0, 3) | st.booleans() | st.none() | st.lists(st.integers(0, 3), max_size=2)
TREES = st.recursive(
    st.dictionaries(st.sampled_from("abc"), LEAVES, max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), LEAVES | inner, max_size=3),
    max_leaves=8,
)


def merged(base: Any, overlay: Any) -> Any:
    if isinstance(base, dict) and isinstance(overlay, dict):
        return {
            key: merged(base.get(key), overlay[key]) if key in overlay else base[key]
            for key in {**base, **overlay}
        }
    return overlay


@given(TREES, TREES)
def test_every_overlay_is_merged_alike(base: dict[str, Any], overlay: dict[str, Any]) -> None:
    """`body.defaults` takes any tree, so that it shows what was merged."""
    with tempfile.TemporaryDirectory() as directory:
        for name, tree in (("ollama-manager.yaml", base), ("ollama-manager.prod.yaml", overlay)):
            role = {"kind": "generate", "body": {"defaults": {"options": tree}}}
            Path(directory, name).write_text(yaml.safe_dump({"roles": {"extra": role}}))
        found = load_settings(Path(directory, "ollama-manager.yaml"), environ=PROD)
    assert found.settings.roles["extra"].body.defaults == {"options": merged(base, overlay)}


def test_the_option_names_the_overlay_for_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OLLAMA_MANAGER_ENV", raising=False)
    monkeypatch.setenv("OLLAMA_MANAGER_URL", "")
    file = write("state: {dir: state}\n", "server: {port: 2000}\n")
    runner = CliRunner()
    for environment, options, port in (
        ("prod", [], "2000"),
        ("gone", ["--env", "prod"], "2000"),
        ("", [], "11435"),
    ):
        monkeypatch.setenv("OLLAMA_MANAGER_ENV", environment)
        found = runner.invoke(program, ["config", "show", "--config", str(file), *options])
        assert (found.exit_code, f"  port: {port} " in found.output) == (0, True), found.output
        assert os.environ["OLLAMA_MANAGER_ENV"] == environment
    for command in (["serve"], ["status"], ["doctor"], ["config", "show"]):
        found = runner.invoke(program, [*command, "--config", str(file), "--env", "staging"])
        assert found.exit_code == (1 if command == ["doctor"] else 2), found.output
        assert "ollama-manager.staging.yaml cannot be read" in found.output + found.stderr
