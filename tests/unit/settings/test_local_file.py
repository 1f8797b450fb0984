"""A configuration that was only found in the current directory: whose it must be to count (A8)."""

from __future__ import annotations

import grp
import os
import pwd
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from manager.errors import ConfigurationError
from manager.settings import load_settings
from tests.support.users import NOBODY, acting_as, give, open_directory

if TYPE_CHECKING:
    from collections.abc import Iterator

FILE = Path("ollama-manager.yaml")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, root's and reachable for every user, with a configuration."""
    with open_directory() as place:
        monkeypatch.chdir(place)
        FILE.write_text("server: {port: 11600}\n")
        FILE.chmod(0o644)
        yield place
        os.chdir("/")


def port() -> int:
    return load_settings(environ={"HOME": "/home/someone"}).settings.server.port


def refused() -> str:
    with pytest.raises(ConfigurationError) as caught:
        port()
    (line,) = caught.value.message.splitlines()
    assert "counts only if file and directory belong to" in line
    assert "name it: --config ollama-manager.yaml" in line
    return line


def test_ones_own_counts(here: Path) -> None:
    assert port() == 11600
    give(here)
    give(FILE)
    with acting_as():
        assert port() == 11600


def test_roots_counts_for_everybody(here: Path) -> None:
    with acting_as():
        assert port() == 11600


def test_somebody_elses_is_refused_and_read_when_it_is_named(here: Path) -> None:
    give(FILE)
    line = refused()
    assert f"ollama-manager.yaml belongs to nobody (uid {NOBODY}) (mode 0644)" in line
    assert "belong to root (uid 0) and nobody else" in line
    assert load_settings(FILE, environ={}).settings.server.port == 11600
    assert load_settings(environ={"OLLAMA_MANAGER_CONFIG": str(FILE)}).settings.server.port == 11600


def test_in_a_directory_of_somebody_else_it_is_refused(here: Path) -> None:
    give(here)
    assert f"{here} belongs to nobody" in refused()


@pytest.mark.parametrize("mode", [0o666, 0o646, 0o664, 0o660])
def test_one_that_others_can_write_to_is_refused(here: Path, mode: int) -> None:
    FILE.chmod(mode)
    assert f"others may write to ollama-manager.yaml (mode {mode:04o})" in refused()


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_in_a_directory_that_others_can_write_to_it_is_refused(here: Path, mode: int) -> None:
    here.chmod(mode)
    assert f"others may write to {here} (mode {mode:04o})" in refused()


def test_in_a_sticky_directory_ones_own_counts_and_somebody_elses_does_not(here: Path) -> None:
    here.chmod(0o1777)
    assert port() == 11600
    give(FILE)
    refused()


def test_a_link_counts_if_link_and_file_do(here: Path) -> None:
    FILE.rename("real.yaml")
    FILE.symlink_to("real.yaml")
    assert port() == 11600
    give(FILE)
    refused()
    FILE.unlink()
    FILE.symlink_to("real.yaml")
    give(Path("real.yaml"))
    refused()


def test_a_private_group_is_nobody_else(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian and Fedora give every user a group of its own and the umask 002."""
    account = pwd.struct_passwd(("me", "x", NOBODY, NOBODY, "", "/", "/bin/sh"))
    members: list[str] = []
    monkeypatch.setattr(pwd, "getpwuid", lambda _uid: account)
    monkeypatch.setattr(grp, "getgrgid", lambda _gid: grp.struct_group(("me", "x", NOBODY, members)))
    for path, mode in ((here, 0o775), (FILE, 0o664)):
        give(path)
        path.chmod(mode)
    with acting_as():
        assert port() == 11600
        members.append("me")
        assert port() == 11600
        members.append("you")
        refused()


def test_a_group_that_nobody_knows_is_others(here: Path) -> None:
    os.chown(FILE, 0, 54321)
    FILE.chmod(0o664)
    refused()


@pytest.mark.timeout(20)
def test_a_fifo_and_a_link_to_nowhere_do_not_count(here: Path) -> None:
    FILE.unlink()
    FILE.symlink_to("gone")
    assert port() == 11435
    FILE.unlink()
    os.mkfifo(FILE)
    assert "ollama-manager.yaml is a FIFO" in refused()


def test_where_there_is_none_whose_directory_it_is_does_not_matter(here: Path) -> None:
    FILE.unlink()
    here.chmod(0o777)
    assert port() == 11435
