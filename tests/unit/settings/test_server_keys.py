"""Keys for servers: taken from a variable or a file, and never shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from manager.domain.instance import KeySource
from manager.errors import Reason, UnavailableError
from manager.settings.server_keys import read_server_key

if TYPE_CHECKING:
    from pathlib import Path


def test_a_key_comes_from_a_variable_or_from_a_file_read_anew_each_time(tmp_path: Path) -> None:
    assert read_server_key(KeySource(env="K"), {"K": " sk-1 "}) == "sk-1"
    file = tmp_path / "key"
    for key in ("first", "second"):
        file.write_text(f"{key}\n")
        assert read_server_key(KeySource(file=file), {}) == key


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("", "is empty"),
        (" \n", "is empty"),
        ("secret one\n", "has spaces, several lines"),
        ("secret\none\n", "has spaces, several lines"),
        ("sécret", "has spaces, several lines or characters that are not ASCII"),
        ("s" * 5000, "has more than 4096 characters"),
    ],
)
def test_what_is_no_key_is_said_by_the_name_of_its_place(
    tmp_path: Path, content: str | None, why: str
) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UnavailableError) as refused:
        read_server_key(KeySource(file=file), {})
    assert refused.value.message.startswith(f"no key: {file} {why}")
    assert refused.value.reason is Reason.INSTANCE_UNAVAILABLE
    assert "secret" not in refused.value.message
    assert refused.value.__cause__ is None


def test_a_directory_is_no_key(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="no key"):
        read_server_key(KeySource(file=tmp_path), {})


@pytest.mark.parametrize("environ", [{}, {"K": ""}, {"K": "  "}])
def test_a_variable_without_a_value_is_named(environ: dict[str, str]) -> None:
    with pytest.raises(UnavailableError, match="no key: the environment variable K is not set"):
        read_server_key(KeySource(env="K"), environ)
