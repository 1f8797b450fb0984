"""Settings of TLS: what fits, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from manager.errors import ConfigurationError
from manager.settings import load_settings

HOME = {"HOME": "/home/someone"}
FAR = {"driver": "external", "url": "https://far.example:8443"}
PAIR = {"certificate": "c.pem", "key": "c.key"}


def loaded(tmp_path: Path, environ: dict[str, str] | None = None, **config: Any) -> Any:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return load_settings(file, environ=HOME | (environ or {})).settings


def test_files_are_relative_to_the_configuration(tmp_path: Path) -> None:
    settings = loaded(
        tmp_path, server={"tls": PAIR}, instances={"far": FAR | {"tls": PAIR | {"ca": "~/ca.pem"}}}
    )
    assert settings.server.tls.files == (tmp_path / "c.pem", tmp_path / "c.key")
    tls = settings.instances["far"].tls
    assert tls.files == (tmp_path / "c.pem", tmp_path / "c.key")
    assert tls.ca == Path("~/ca.pem").expanduser()
    assert loaded(tmp_path).server.tls.files is None


def test_variables_name_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    environ = {
        "OLLAMA_MANAGER_SERVER__TLS__CERTIFICATE": "a.pem",
        "OLLAMA_MANAGER_SERVER__TLS__KEY": "/a.key",
        "OLLAMA_MANAGER_INSTANCES__FAR__TLS__CA": "123",
    }
    settings = loaded(tmp_path, environ, instances={"far": FAR})
    assert settings.server.tls.files == (tmp_path / "a.pem", Path("/a.key"))
    assert settings.instances["far"].tls.ca == tmp_path / "123"


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"server": {"tls": {"key": "k"}}}, "server.tls.certificate: missing beside key"),
        ({"server": {"tls": {"certificate": "k"}}}, "server.tls.key: missing beside certificate"),
        ({"server": {"tls": {"certificate": "", "key": "k"}}}, "server.tls.certificate: ''; expected a path"),
        ({"server": {"tls": {"ca": "k"}}}, "server.tls.ca: unknown key"),
        (
            {"instances": {"far": FAR | {"tls": {"key": "k"}}}},
            "instances.far.tls.certificate: missing beside key",
        ),
        ({"instances": {"far": FAR | {"tls": {}}}}, "instances.far.tls: says nothing"),
        (
            {"instances": {"far": FAR | {"url": "http://far.example", "tls": {"ca": "k"}}}},
            "instances.far.tls: only for a url with https://; the url is http://far.example",
        ),
        (
            {"instances": {"cpu": {"template": "ollama-cpu", "tls": {"ca": "k"}}}},
            "instances.cpu.tls: only for servers that somebody else runs",
        ),
        (
            {"instances": {"far": FAR | {"tls": {"ca": "a"}}, "two": FAR | {"tls": {"ca": "b"}}}},
            "instances.two.tls: differs from that of far",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, config: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        loaded(tmp_path, **config)
    assert problem in caught.value.message


def test_equal_files_for_one_server_are_fine(tmp_path: Path) -> None:
    both = {
        "far": FAR | {"tls": {"ca": "a"}},
        "two": FAR | {"tls": {"ca": "a"}},
        "http": FAR | {"url": "http://x"},
    }
    assert len(loaded(tmp_path, instances=both).instances) == 3
