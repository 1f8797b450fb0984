"""The file with the key: what is taken, what is refused, and that its content is never shown."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from manager.errors import ConfigurationError
from manager.settings import key_weaknesses, read_keys
from tests.support.users import NOBODY, acting_as, give, need_root, open_directory

if TYPE_CHECKING:
    from pathlib import Path

KEY = "0123456789abcdef"


def key_file(tmp_path: Path, content: bytes, mode: int = 0o600) -> Path:
    file = tmp_path / "key"
    file.write_bytes(content)
    file.chmod(mode)
    return file


def read_key(file: Path, daemon_uid: int | None = None) -> str:
    """The only key of a file."""
    (key,) = read_keys((file,), daemon_uid=daemon_uid)
    return key


@pytest.mark.parametrize("content", [KEY, KEY + "\n", KEY + "\r\n", f"  {KEY} \n\n"])
@pytest.mark.parametrize("mode", [0o400, 0o600, 0o640])
def test_a_key_is_a_line_in_a_closed_file(tmp_path: Path, content: str, mode: int) -> None:
    assert read_key(key_file(tmp_path, content.encode(), mode)) == KEY


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "empty; expected a line with the key"),
        (b"\n", "empty; expected a line with the key"),
        (b"  \n", "empty; expected a line with the key"),
        (b"secret-one-0123456\nsecret two\n", "line 2: the key holds a space or something that is not ASCII"),
        (b"secret-0123456789\n" * 4000, "more than 65536 bytes; expected a key a line"),
        (
            b"\n".join(b"secret-%d" % number for number in range(33)),
            "33 keys in all files; expected at most 32",
        ),
        (b"secret" * 1000, "a key of more than 4096 characters"),
        (b"secret with spaces", "the key holds a space or something that is not ASCII; expected neither"),
        ("sécrét-0123456789".encode(), "the key holds a space or something that is not ASCII"),
        (b"secret\x00secret\x00secret", "the key holds a space or something that is not ASCII"),
    ],
)
def test_what_is_no_key_is_refused_without_being_shown(tmp_path: Path, content: bytes, problem: str) -> None:
    file = key_file(tmp_path, content)
    with pytest.raises(ConfigurationError) as caught:
        read_key(file)
    assert caught.value.message.startswith(f"{file}: server.key_file: {problem}")
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("content", "mode", "weakness"),
    [(KEY, 0o644, "open to every user"), (KEY, 0o444, "open to every user"), ("secret", 0o600, "guessed")],
)
def test_a_weak_key_is_taken_and_its_weakness_told_without_showing_it(
    tmp_path: Path, content: str, mode: int, weakness: str
) -> None:
    file = key_file(tmp_path, content.encode(), mode)
    assert read_key(file) == content
    (told,) = key_weaknesses((file,), (content,))
    assert weakness in told
    assert content not in told


def test_every_line_of_every_file_is_a_key_and_the_first_one_is_for_our_own_commands(tmp_path: Path) -> None:
    first = key_file(tmp_path, b"new-key-0123456789\n\nold-key-0123456789\r\n")
    second = tmp_path / "second"
    second.write_text("old-key-0123456789\nthird-key-01234567")
    second.chmod(0o600)
    keys = read_keys((first, second))
    assert keys == ("new-key-0123456789", "old-key-0123456789", "third-key-01234567")
    assert key_weaknesses((first, second), keys) == ()
    assert read_keys(()) == ()


def test_a_good_key_has_no_weakness(tmp_path: Path) -> None:
    assert key_weaknesses((key_file(tmp_path, KEY.encode()),), (KEY,)) == ()


def test_what_is_no_readable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file or directory; expected a readable file"):
        read_key(tmp_path / "gone")
    with pytest.raises(ConfigurationError, match="not a regular file"):
        read_key(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigurationError, match="not a regular file"):
        read_key(tmp_path / "pipe")
    with pytest.raises(ConfigurationError, match="not a path; expected a readable file"):
        read_key(tmp_path / "a\0b")


@pytest.mark.timeout(20)
def test_a_link_leads_to_a_key_but_not_to_a_fifo(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(key_file(tmp_path, KEY.encode()))
    assert read_key(tmp_path / "link") == KEY
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to-pipe").symlink_to("pipe")
    with pytest.raises(ConfigurationError, match="not a regular file"):
        read_key(tmp_path / "to-pipe")


@pytest.mark.parametrize(
    ("owner", "group", "mode", "may_have_it"),
    [
        (0, 0, 0o600, False),
        (0, 0, 0o644, False),  # the directory on the way to it may be closed
        (0, 0, 0o640, False),
        (0, NOBODY, 0o640, True),
        (0, NOBODY, 0o600, False),
        (NOBODY, 0, 0o600, True),
        (NOBODY, 0, 0o000, True),
        (1234, 1234, 0o640, False),
    ],
)
def test_a_key_is_for_a_daemon_of_ones_own_or_one_that_can_read_it_itself(
    tmp_path: Path, owner: int, group: int, mode: int, may_have_it: bool
) -> None:
    file = key_file(tmp_path, KEY.encode(), mode)
    need_root()
    os.chown(file, owner, group)
    assert read_key(file, daemon_uid=0) == KEY
    if may_have_it:
        assert read_key(file, daemon_uid=NOBODY) == KEY
    else:
        with pytest.raises(ConfigurationError, match="not a file of nobody") as caught:
            read_key(file, daemon_uid=NOBODY)
        assert KEY not in caught.value.message
    (tmp_path / "link").symlink_to(file)
    give(tmp_path / "link")  # whose link it is says nothing
    if not may_have_it:
        with pytest.raises(ConfigurationError, match="not a file of nobody"):
            read_key(tmp_path / "link", daemon_uid=NOBODY)


def test_a_user_without_an_account_is_in_no_group(tmp_path: Path) -> None:
    file = key_file(tmp_path, KEY.encode(), 0o640)
    need_root()
    os.chown(file, 0, 54321)
    with pytest.raises(ConfigurationError, match="not a file of uid 54321"):
        read_key(file, daemon_uid=54321)


def test_a_daemon_of_root_may_have_the_key_of_everybody_who_asks_it() -> None:
    with open_directory() as place:
        file = key_file(place, KEY.encode())
        give(file)
        with acting_as():
            assert read_key(file, daemon_uid=0) == read_key(file, daemon_uid=NOBODY) == KEY
            with pytest.raises(ConfigurationError):
                read_key(file, daemon_uid=1234)
