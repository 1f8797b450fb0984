"""The access check that follows from the settings."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import pytest
import yaml

import manager.app
from manager.settings import load_settings
from manager.wire.access import Access

if TYPE_CHECKING:
    from pathlib import Path

KEY = "correct-horse-battery-staple"
DEFAULT = ["localhost", "127.0.0.1", "[::1]"]


def reason(home: Path, server: dict[str, Any], host: str) -> str | None:
    """Why a request for this Host with the right key is refused, None if it is served."""
    key_file = home / "key"
    key_file.write_text(KEY)
    key_file.chmod(0o600)
    config = home / "config.yaml"
    config.write_text(yaml.safe_dump({"server": {"key_file": str(key_file), **server}}))
    settings = load_settings(config, environ={"HOME": str(home)}).settings
    access = Access(**manager.app._access_rules(settings, KEY))
    refusal = access.refusal("/api/tags", [(b"host", host.encode()), (b"x-api-key", KEY.encode())])
    return refusal.reason if refusal else None


@pytest.mark.parametrize(
    ("server", "served"),
    [
        ({}, False),
        ({"host": "localhost"}, False),
        ({"host": "::1"}, False),
        ({"host": "0.0.0.0"}, True),
        ({"host": "::"}, True),
        ({"host": "gpu.example.com"}, True),
        ({"host": "0.0.0.0", "allowed_hosts": DEFAULT}, True),
        ({"host": "0.0.0.0", "allowed_hosts": [*DEFAULT, "other.example"]}, False),
        ({"host": "0.0.0.0", "allowed_hosts": ["gpu.example.com"]}, True),
        ({"allowed_hosts": ["gpu.example.com"]}, True),
    ],
)
def test_a_public_name_is_a_host_where_it_is_configured_or_other_machines_need_a_key(
    tmp_path: Path, server: dict[str, Any], served: bool
) -> None:
    assert reason(tmp_path, server, "gpu.example.com:11435") == (None if served else "host_not_allowed")


def test_the_machines_own_names_are_hosts(tmp_path: Path) -> None:
    short = socket.gethostname().partition(".")[0]
    for host in (socket.gethostname(), short.upper(), f"{short}.local", "0.0.0.0:11435", "box.local"):
        assert reason(tmp_path, {}, host) is None


def test_the_name_listened_on_is_a_host_even_where_others_are_configured(tmp_path: Path) -> None:
    server = {"host": "gpu.example.com", "allowed_hosts": ["other.example"]}
    assert reason(tmp_path, server, "gpu.example.com") is None
