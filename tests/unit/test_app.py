"""What the composition root makes of the settings: the access check, and the owner of the containers."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any, cast

import pytest
import yaml

import manager.claims
import manager.daemon
from manager.adapters.owner import keep_manager_id, read_owner
from manager.domain.instance import ContainerFacts
from manager.errors import EngineUnreachableError, ManagerIdChangedError
from manager.settings import load_settings
from manager.wire.access import Access
from tests.support.keys import keys

if TYPE_CHECKING:
    from pathlib import Path

    from manager.settings import Settings

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
    access = Access(**manager.daemon.access_rules(settings), keys=keys(KEY))
    refusal = access.check(
        "GET", "/api/tags", [(b"host", host.encode()), (b"x-api-key", KEY.encode())]
    ).refusal
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


# --- whose containers ---


class Engine:
    """Lists containers by manager id, or is away."""

    def __init__(self, **containers: ContainerFacts) -> None:
        self.containers = containers
        self.is_away = False

    async def list_containers(self, manager_id: str) -> tuple[ContainerFacts, ...]:
        if self.is_away:
            raise EngineUnreachableError("it is away")
        return (self.containers[manager_id],) if manager_id in self.containers else ()


def renamed(home: Path) -> Settings:
    """The settings of a state directory whose manager id was changed from `old` to `new`."""
    keep_manager_id(home, read_owner(home), "old")
    environ = {"HOME": str(home), "OLLAMA_MANAGER_STATE__DIR": str(home), "OLLAMA_MANAGER_MANAGER_ID": "new"}
    environ["OLLAMA_MANAGER_LIFECYCLE__PROBE_INTERVAL_S"] = "0.01"
    return load_settings(environ=environ).settings


LEFT = ContainerFacts("1", "old-ollama-cpu", "image", "running")


async def test_a_changed_manager_id_with_containers_under_the_former_one_is_refused(tmp_path: Path) -> None:
    settings, engine = renamed(tmp_path), cast("Any", Engine(old=LEFT))
    for takes_over in (False, True):
        with pytest.raises(ManagerIdChangedError, match=r"'old' and is 'new' now.*old-ollama-cpu"):
            await manager.claims.settled_owner(engine, settings, read_owner(tmp_path), takes_over=takes_over)
    assert read_owner(tmp_path).manager_id == "old"


async def test_a_changed_manager_id_without_containers_is_taken_over(tmp_path: Path) -> None:
    settings, engine = renamed(tmp_path), cast("Any", Engine())
    owner = await manager.claims.settled_owner(engine, settings, read_owner(tmp_path), takes_over=False)
    assert owner.manager_id == read_owner(tmp_path).manager_id == "new"


async def test_a_former_manager_id_is_kept_until_the_engine_was_asked(tmp_path: Path) -> None:
    settings, engine = renamed(tmp_path), Engine(old=LEFT)
    engine.is_away = True
    owner = await manager.claims.settled_owner(
        cast("Any", engine), settings, read_owner(tmp_path), takes_over=False
    )
    assert owner.manager_id == read_owner(tmp_path).manager_id == "old"
    later = asyncio.ensure_future(manager.claims.refuse_foreign_later(cast("Any", engine), settings, owner))
    done, _ = await asyncio.wait({later}, timeout=0.05)
    assert not done
    engine.is_away = False
    with pytest.raises(ManagerIdChangedError):
        await later
    engine.containers.clear()
    await manager.claims.refuse_foreign_later(cast("Any", engine), settings, owner)
    assert read_owner(tmp_path).manager_id == "new"
