"""A backup is one moment of the state, and no half of it is ever left."""

from __future__ import annotations

import asyncio
import sqlite3
import tarfile
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from manager.adapters.owner import read_owner
from manager.adapters.registry.sql import open_registry
from manager.cli.backup import back_up
from manager.cli.failures import CommandError
from manager.domain.registry import InstanceRow
from manager.settings import load_settings

if TYPE_CHECKING:
    from pathlib import Path

    from manager.settings import Settings


def settings_of(tmp_path: Path) -> Settings:
    file = tmp_path / "config.yaml"
    file.write_text(f"state: {{dir: {tmp_path / 'state'}}}\n")
    (tmp_path / "state").mkdir(mode=0o700, exist_ok=True)
    return load_settings(file).settings


async def test_a_backup_is_restored_with_everything_that_was_stored(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    registry = await open_registry(settings.state.dir / "registry.sqlite3")
    await registry.save_instance(InstanceRow(id="cpu", starts=7, ttl_s=12.0))
    owner = read_owner(settings.state.dir)
    target = tmp_path / "backup.tar"
    # The daemon has it open, and goes on writing.
    names = await asyncio.to_thread(back_up, settings, target)
    await registry.save_instance(InstanceRow(id="cpu", starts=8, ttl_s=12.0))
    await registry.close()
    assert names == ["registry.sqlite3", "owner.json"]
    assert target.stat().st_mode & 0o777 == 0o600

    restored = tmp_path / "restored"
    restored.mkdir(mode=0o700)
    with tarfile.open(target) as archive:
        for entry in archive:
            content = archive.extractfile(entry)
            assert content is not None
            (restored / entry.name).write_bytes(content.read())
            (restored / entry.name).chmod(entry.mode)
    assert read_owner(restored) == owner
    with closing(sqlite3.connect(restored / "registry.sqlite3")) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    again = await open_registry(restored / "registry.sqlite3")
    assert (await again.instances())["cpu"].starts == 7
    await again.close()


def test_without_a_registry_there_is_nothing_to_back_up(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    with pytest.raises(CommandError, match="no registry"):
        back_up(settings, tmp_path / "backup.tar")
    assert not (tmp_path / "backup.tar").exists()


def test_an_existing_file_is_kept_and_a_damaged_registry_leaves_none(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    (settings.state.dir / "registry.sqlite3").write_bytes(b"no database, at all" * 100)
    target = tmp_path / "backup.tar"
    with pytest.raises(CommandError, match="cannot be copied"):
        back_up(settings, target)
    assert not target.exists()
    target.write_text("mine")
    with pytest.raises(CommandError, match="exists"):
        back_up(settings, target)
    assert target.read_text() == "mine"
