"""A manifest of servers, which another program writes, brings external instances."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from manager.domain.roles import RequestKind
from manager.errors import ConfigurationError
from manager.settings import load_settings

if TYPE_CHECKING:
    from pathlib import Path

    from manager.settings.load import LoadedSettings

WHISPER = 'servers:\n  - {name: whisper, url: "http://127.0.0.1:9000", models: [whisper-1]}\n'


def load(tmp_path: Path, manifest: str | None, config: str = "") -> LoadedSettings:
    file = tmp_path / "config.yaml"
    file.write_text(f"discovery: {{manifest: servers.yaml}}\n{config}")
    if manifest is not None:
        (tmp_path / "servers.yaml").write_text(manifest)
    return load_settings(file, environ={})


def test_a_server_of_a_manifest_transcribes_beside_the_usual_instance(tmp_path: Path) -> None:
    loaded = load(tmp_path, WHISPER)
    instances = loaded.settings.instances
    assert list(instances) == ["whisper", "cpu"]
    whisper = instances["whisper"]
    assert (whisper.driver, whisper.protocol, whisper.url) == ("external", "openai", "http://127.0.0.1:9000")
    assert whisper.serves == (RequestKind.TRANSCRIBE,)
    assert loaded.source_of("instances.whisper.url").endswith("servers.yaml:2")


def test_the_configuration_stands_above_the_manifest(tmp_path: Path) -> None:
    loaded = load(
        tmp_path, WHISPER, "instances: {whisper: {priority: 5}, gpu0: {template: ollama-gpu, device: auto}}"
    )
    assert list(loaded.settings.instances) == ["whisper", "gpu0"]
    assert (loaded.settings.instances["whisper"].priority, loaded.settings.instances["whisper"].driver) == (
        5,
        "external",
    )


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "discovery.manifest: '"),
        ("servers: 5", "servers: 5; expected a list of servers"),
        ("", "servers: None; expected a list of servers"),
        ("more: 1\nservers: []", "servers.yaml:1: more: unknown key; allowed: servers"),
        ("servers: [x]", "servers.0: 'x'; expected a mapping with name, url"),
        ("servers: [{url: x}]", "servers.0: {'url': 'x'}; expected a mapping"),
        (
            WHISPER + "  - {name: whisper, url: x}\n",
            "servers.yaml:3: servers.1.name: 'whisper' is there twice",
        ),
        ("servers: [{name: w, url: 'http://x', template: t}]", "servers.0.template: unknown key"),
        ("servers: [{name: w, url: 'ftp://x'}]", "servers.yaml:1: instances.w.url"),
        ("servers: [{name: W, url: 'http://x'}]", "servers.yaml:1: instances.W"),
        ("servers: [", "not YAML"),
        (
            "servers:\n" + "".join(f"  - {{name: w{at}, url: 'http://x'}}\n" for at in range(257)),
            "257 servers; expected at most 256",
        ),
    ],
)
def test_a_manifest_that_is_none_is_refused_with_its_place(
    tmp_path: Path, manifest: str | None, message: str
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load(tmp_path, manifest)
    assert message in refused.value.message


def test_a_manifest_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("discovery: {manifest: 5}")
    with pytest.raises(ConfigurationError, match="discovery"):
        load_settings(file, environ={})
