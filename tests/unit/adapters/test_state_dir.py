"""The state directory under attack: whose it may be, and what planted files can do (A7)."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from manager.adapters.locks import FileLocks, Holder, StateDirLock, read_holder
from manager.errors import ConfigurationError, ManagerError, UnavailableError
from tests.support.users import NOBODY, acting_as, give, open_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def state(tmp_path: Path) -> Path:
    directory = tmp_path / "state"
    directory.mkdir(mode=0o700)
    return directory


@pytest.fixture
def treasure(tmp_path: Path) -> Iterator[Path]:
    """A file that no planted name in the state directory may change."""
    file = tmp_path / "treasure"
    file.write_text("precious\n")
    file.chmod(0o640)
    before = file.stat()
    yield file
    after = file.stat()
    assert file.read_text() == "precious\n"
    assert (after.st_ino, after.st_mode, after.st_mtime_ns) == (
        before.st_ino,
        before.st_mode,
        before.st_mtime_ns,
    )


def refused(state_dir: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        StateDirLock(state_dir, "default").acquire()
    assert caught.value.message.startswith(f"the state directory {state_dir} cannot be used: ")
    return caught.value.message


def accepted(state_dir: Path) -> None:
    lock = StateDirLock(state_dir, "default")
    lock.acquire()
    try:
        assert read_holder(state_dir) == lock._holder
    finally:
        lock.release()


# Whose directory


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o711, 0o2700])
def test_a_directory_that_only_its_user_can_write_to_is_used(state: Path, mode: int) -> None:
    state.chmod(mode)
    accepted(state)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o720, 0o702])
def test_a_directory_that_others_can_write_to_is_refused(state: Path, mode: int) -> None:
    state.chmod(mode)
    message = refused(state)
    assert f"others may write to {state} (mode {mode:04o}); close it with: chmod go-w {state}" in message
    assert list(state.iterdir()) == []


def test_a_directory_of_another_user_is_refused(state: Path) -> None:
    give(state)
    message = refused(state)
    assert f"{state} belongs to nobody (uid {NOBODY}), and this runs as root (uid 0)" in message
    assert list(state.iterdir()) == []


def test_a_directory_of_root_is_refused_for_another_user() -> None:
    with open_directory() as place:
        (place / "state").mkdir(mode=0o755)
        with acting_as():
            assert "belongs to root (uid 0), and this runs as nobody" in refused(place / "state")


def test_another_user_has_a_directory_of_its_own() -> None:
    with open_directory() as place:
        give(place)
        with acting_as():
            accepted(place / "deep" / "state")
        assert stat.S_IMODE((place / "deep" / "state").stat().st_mode) == 0o700


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_missing_directories_are_made_closed_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        accepted(tmp_path / "a" / "b" / "state")
    finally:
        os.umask(before)
    for made in ("a", "a/b", "a/b/state"):
        assert stat.S_IMODE((tmp_path / made).stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "a/b/state").iterdir()} == {0o600}


# What leads to it


@pytest.mark.parametrize("depth", ["state", "deep/er/state"])
@pytest.mark.parametrize("there_already", [True, False])
def test_below_a_directory_that_everybody_can_write_to_it_is_refused(
    tmp_path: Path, depth: str, there_already: bool
) -> None:
    parent = tmp_path / "shared"
    parent.mkdir()
    directory = parent / depth
    if there_already:
        directory.mkdir(mode=0o700, parents=True)
    parent.chmod(0o777)
    assert f"every user may write to {parent} (mode 0777), which leads to it" in refused(directory)
    assert directory.exists() is there_already


def test_below_a_sticky_directory_it_is_used(tmp_path: Path) -> None:
    parent = tmp_path / "shared"
    parent.mkdir()
    parent.chmod(0o1777)
    accepted(parent / "state")


def test_below_a_directory_that_a_group_can_write_to_it_is_used(tmp_path: Path) -> None:
    parent = tmp_path / "shared"
    parent.mkdir()
    parent.chmod(0o2775)
    accepted(parent / "state")


def test_below_a_directory_of_another_user_it_is_refused(tmp_path: Path) -> None:
    parent = tmp_path / "theirs"
    (parent / "state").mkdir(mode=0o700, parents=True)
    give(parent)
    assert f"{parent}, which leads to it, belongs to nobody" in refused(parent / "state")


def test_a_link_of_ones_own_leads_to_the_directory(state: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("state")
    accepted(tmp_path / "link")
    assert [file.name for file in state.iterdir()] == ["daemon.lock"]


@pytest.mark.parametrize("rest", ["", "/below"])
def test_a_link_of_another_user_is_refused(state: Path, tmp_path: Path, rest: str) -> None:
    link = tmp_path / "link"
    link.symlink_to(state)
    give(link)
    assert f"{link}, which leads to it, belongs to nobody" in refused(Path(f"{link}{rest}"))
    assert list(state.iterdir()) == []


def test_what_a_link_leads_through_counts_too(tmp_path: Path) -> None:
    shared = tmp_path / "open"
    (shared / "state").mkdir(mode=0o700, parents=True)
    shared.chmod(0o777)
    (tmp_path / "link").symlink_to("open/../open/state")
    assert f"every user may write to {shared} (mode 0777)" in refused(tmp_path / "link")


def test_a_link_to_nowhere_and_a_loop_of_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    refused(tmp_path / "nowhere")
    assert not (tmp_path / "gone").exists()
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop" / "state")
    refused(tmp_path / "loop")


def test_a_full_disk_is_no_mistake_of_the_configuration(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(ManagerError, match=r"No space left on device$") as caught:
        StateDirLock(state / "missing", "default").acquire()
    assert not isinstance(caught.value, ConfigurationError)


# What was planted in it


def link(path: Path, treasure: Path) -> None:
    path.symlink_to(treasure)


def dangling_link(path: Path, treasure: Path) -> None:
    path.symlink_to(treasure.with_name("made"))


def hard_link(path: Path, treasure: Path) -> None:
    path.hardlink_to(treasure)


def fifo(path: Path, _treasure: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path, _treasure: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def a_directory(path: Path, _treasure: Path) -> None:
    path.mkdir()


def theirs(path: Path, _treasure: Path) -> None:
    path.touch(mode=0o600)
    give(path)


def open_to_all(path: Path, _treasure: Path) -> None:
    path.touch()
    path.chmod(0o666)


PLANTED = [link, dangling_link, hard_link, fifo, a_socket, a_directory, theirs, open_to_all]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("plant", PLANTED)
def test_an_odd_lock_is_refused_at_once(
    state: Path, treasure: Path, plant: Callable[[Path, Path], None]
) -> None:
    plant(state / "daemon.lock", treasure)
    assert f"{state / 'daemon.lock'}" in refused(state)
    assert sorted(path.name for path in state.iterdir()) == ["daemon.lock"]
    assert not treasure.with_name("made").exists()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("plant", PLANTED)
async def test_an_odd_lock_of_an_instance_is_refused_at_once(
    state: Path, treasure: Path, plant: Callable[[Path, Path], None]
) -> None:
    (state / "locks").mkdir(mode=0o700)
    plant(state / "locks" / "gpu0.lock", treasure)
    with pytest.raises(UnavailableError, match=r"the lock of instance gpu0 cannot be taken: .*gpu0\.lock"):
        async with FileLocks(state / "locks", 5).hold("gpu0"):
            pytest.fail("it was held")
    assert not treasure.with_name("made").exists()


async def test_a_planted_directory_of_locks_is_refused(state: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    give(elsewhere)
    (state / "locks").symlink_to(elsewhere)
    with pytest.raises(UnavailableError, match="belongs to nobody"):
        async with FileLocks(state / "locks", 5).hold("gpu0"):
            pytest.fail("it was held")
    assert list(elsewhere.iterdir()) == []


@pytest.mark.timeout(20)
@pytest.mark.parametrize("plant", [one for one in PLANTED if one is not a_directory])
@pytest.mark.parametrize("name", ["daemon.json", "daemon.json.new"])
def test_an_odd_description_is_replaced_and_changes_nothing_else(
    state: Path, treasure: Path, name: str, plant: Callable[[Path, Path], None]
) -> None:
    plant(state / name, treasure)
    lock = StateDirLock(state, "default")
    lock.acquire()
    lock.describe(url="http://127.0.0.1:11435")
    described = (state / "daemon.json").lstat()
    assert stat.S_ISREG(described.st_mode)
    assert (described.st_uid, stat.S_IMODE(described.st_mode), described.st_nlink) == (0, 0o600, 1)
    assert read_holder(state) == lock._holder
    lock.release()
    assert [path.name for path in state.iterdir()] == ["daemon.lock"]
    assert not treasure.with_name("made").exists()


# What is read of it


@pytest.mark.timeout(20)
@pytest.mark.parametrize("plant", PLANTED)
def test_looking_at_an_odd_lock_never_waits(
    state: Path, treasure: Path, plant: Callable[[Path, Path], None]
) -> None:
    plant(state / "daemon.lock", treasure)
    try:
        assert read_holder(state) is None
    except ConfigurationError as error:
        assert "cannot be read" in error.message  # noqa: PT017  (either will do)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("plant", [one for one in PLANTED if one not in (theirs, open_to_all)])
def test_looking_at_an_odd_description_leaves_the_pid(
    state: Path, treasure: Path, plant: Callable[[Path, Path], None]
) -> None:
    lock = StateDirLock(state, "default")
    lock.acquire()
    (state / "daemon.json").unlink()
    plant(state / "daemon.json", treasure)
    assert read_holder(state) == Holder(pid=os.getpid())
    lock.release()


def test_a_link_to_the_description_or_the_lock_of_another_daemon_is_not_followed(
    state: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    theirs = StateDirLock(other, "other")
    theirs.acquire()
    theirs.describe(url="http://127.0.0.1:1")
    (state / "daemon.lock").symlink_to(other / "daemon.lock")
    (state / "daemon.json").symlink_to(other / "daemon.json")
    with pytest.raises(ConfigurationError, match="cannot be read: Too many levels of symbolic links"):
        read_holder(state)
    (state / "daemon.lock").unlink()
    lock = StateDirLock(state, "default")
    lock.acquire()
    (state / "daemon.json").unlink()
    (state / "daemon.json").symlink_to(other / "daemon.json")
    assert read_holder(state) == Holder(pid=os.getpid())
    lock.release()
    theirs.release()


def test_a_description_without_an_end_is_not_read(state: Path) -> None:
    lock = StateDirLock(state, "default")
    lock.acquire()
    with (state / "daemon.json").open("wb") as stream:
        stream.truncate(2**40)  # a sparse file
    assert read_holder(state) == Holder(pid=os.getpid())
    (state / "daemon.json").write_text("[" * 4000)
    assert read_holder(state) == Holder(pid=os.getpid())
    lock.release()


def owner_of(state: Path) -> int | None:
    holder = read_holder(state)
    assert holder is not None
    assert holder.url == "http://127.0.0.1:1"
    return holder.owner_uid


def test_the_owner_of_a_description_is_known_only_where_nobody_else_can_have_written_it(state: Path) -> None:
    lock = StateDirLock(state, "default")
    lock.acquire()
    lock.describe(url="http://127.0.0.1:1")
    assert owner_of(state) == 0
    for one in (state / "daemon.json", state / "daemon.lock", state):
        give(one)
        assert owner_of(state) is None or one == state
    assert owner_of(state) == NOBODY
    for mode in (0o770, 0o1777):
        state.chmod(mode)
        assert owner_of(state) is None
    lock.release()
