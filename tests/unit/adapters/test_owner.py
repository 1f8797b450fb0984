"""The owner file of a state directory, and the claim to a manager id."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from manager.adapters.owner import ManagerIdLock, keep_manager_id, read_owner, take_over
from manager.domain.ownership import Owner
from manager.errors import ManagerError, ManagerIdHeldError

ENGINE = "unix:///var/run/docker.sock"


def test_a_state_directory_has_one_owner_for_good(tmp_path: Path) -> None:
    owner = read_owner(tmp_path)
    assert owner == read_owner(tmp_path)
    assert stat.S_IMODE((tmp_path / "owner.json").stat().st_mode) == 0o600
    (tmp_path / "other").mkdir()
    assert read_owner(tmp_path / "other").id != owner.id


def test_a_take_over_is_kept_and_bounded(tmp_path: Path) -> None:
    owner = read_owner(tmp_path)
    for number in range(40):
        owner = take_over(tmp_path, owner, frozenset({f"lost{number}"}))
        assert f"lost{number}" in owner.taken_over
    assert read_owner(tmp_path) == owner
    assert len(owner.taken_over) == 16


def test_the_manager_id_is_kept_beside_a_take_over(tmp_path: Path) -> None:
    owner = read_owner(tmp_path)
    assert owner.manager_id is None
    owner = keep_manager_id(tmp_path, owner, "m")
    assert (owner.manager_id, read_owner(tmp_path)) == ("m", owner)
    owner = take_over(tmp_path, owner, frozenset({"lost"}))
    owner = keep_manager_id(tmp_path, owner, "n")
    assert read_owner(tmp_path) == owner == Owner(owner.id, frozenset({"lost"}), "n")
    before = (tmp_path / "owner.json").stat().st_ino
    assert keep_manager_id(tmp_path, owner, "n") is owner
    assert (tmp_path / "owner.json").stat().st_ino == before, "not written again"


def test_the_owner_file_of_an_older_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "owner.json").write_text('{"id": "x", "taken_over": ["y"]}')
    assert read_owner(tmp_path) == Owner("x", frozenset({"y"}))


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"id":"x","taken_over":3}', b"\xff" * 20])
def test_a_damaged_owner_file_is_left_as_it_is_and_says_what_to_do(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "owner.json"
    path.write_bytes(content)
    with pytest.raises(ManagerError, match="--take-over"):
        read_owner(tmp_path)
    assert path.read_bytes() == content


def test_a_planted_link_is_neither_followed_nor_overwritten(tmp_path: Path) -> None:
    treasure = tmp_path / "treasure"
    treasure.write_text("precious")
    state = tmp_path / "state"
    state.mkdir()
    (state / "owner.json.new").symlink_to(treasure)
    read_owner(state)
    assert treasure.read_text() == "precious"
    (state / "owner.json").unlink()
    (state / "owner.json").symlink_to(treasure)
    with pytest.raises(ManagerError, match="cannot be read"):
        read_owner(state)


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ManagerError, match="cannot be written"):
        read_owner(tmp_path / "missing")


def test_a_manager_id_is_served_once_an_engine(tmp_path: Path) -> None:
    name = tmp_path.name + str(os.getpid())
    first, second = ManagerIdLock(name, ENGINE), ManagerIdLock(name, ENGINE)
    first.acquire()
    with pytest.raises(ManagerIdHeldError, match=f"process {os.getpid()}"):
        second.acquire()
    others = (
        ManagerIdLock(name, "unix:///other.sock"),
        ManagerIdLock(name + "x", ENGINE),
        *(ManagerIdLock(name, ENGINE, Path(f"/state/{which}")) for which in ("one", "two")),
    )
    for other in others:
        other.acquire()
        other.release()
    first.release()
    first.release()
    second.acquire()
    second.release()


def test_one_engine_has_one_claim_under_all_names_of_its_socket(tmp_path: Path) -> None:
    (tmp_path / "real").touch()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    first = ManagerIdLock("m", f"unix://{tmp_path}/real")
    first.acquire()
    with pytest.raises(ManagerIdHeldError):
        ManagerIdLock("m", f"unix://{tmp_path}/link").acquire()
    first.release()


def test_a_killed_daemon_leaves_no_claim_behind(tmp_path: Path) -> None:
    code = (
        "import sys,time;from manager.adapters.owner import ManagerIdLock;"
        f"lock=ManagerIdLock({tmp_path.name!r}, {ENGINE!r});lock.acquire();"
        "print('held',flush=True);time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        lock = ManagerIdLock(tmp_path.name, ENGINE)
        with pytest.raises(ManagerIdHeldError, match=f"process {process.pid}"):
            lock.acquire()
        process.kill()
        process.wait()
        lock.acquire()
        lock.release()


def test_a_stranger_that_took_the_name_does_not_keep_the_daemon_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = ManagerIdLock(tmp_path.name, ENGINE), ManagerIdLock(tmp_path.name, ENGINE)
    first.acquire()
    monkeypatch.setattr(ManagerIdLock, "holder", lambda _self: (4711, os.geteuid() + 1))
    second.acquire()
    first.release()
    second.release()


def test_a_full_backlog_is_a_holder_that_says_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ManagerIdLock(tmp_path.name, ENGINE)
    first.acquire()
    asking = []
    for _ in range(3):
        question = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        question.setblocking(False)
        question.connect_ex(first._address)
        asking.append(question)
    with pytest.raises(ManagerIdHeldError):
        ManagerIdLock(tmp_path.name, ENGINE).acquire()
    for question in asking:
        question.close()
    first.release()


def test_a_system_without_abstract_sockets_goes_without_the_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(socket.socket):
        def bind(self, _address: object) -> None:
            raise FileNotFoundError(2, "no such file")

    monkeypatch.setattr("manager.adapters.owner.socket.socket", Refusing)
    lock = ManagerIdLock("m", ENGINE)
    lock.acquire()
    lock.release()
