"""Reading YAML: plain data with a line for every key, and a place for everything that is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from manager.settings.yaml_file import Document, read_document

if TYPE_CHECKING:
    from pathlib import Path


def read(tmp_path: Path, text: str | bytes) -> Document:
    file = tmp_path / "f.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_document(file)


def problems(tmp_path: Path, text: str | bytes) -> list[str]:
    return [str(one).removeprefix(f"{tmp_path}/") for one in read(tmp_path, text).problems]


def test_every_key_and_item_has_its_line(tmp_path: Path) -> None:
    document = read(tmp_path, "# first\na:\n  b: 1\n  c:\n    - x\n    - {d: 2,\n       e: 3}\n")
    assert document.data == {"a": {"b": 1, "c": ["x", {"d": 2, "e": 3}]}}
    assert document.lines == {
        ("a",): 2,
        ("a", "b"): 3,
        ("a", "c"): 4,
        ("a", "c", 0): 5,
        ("a", "c", 1): 6,
        ("a", "c", 1, "d"): 6,
        ("a", "c", 1, "e"): 7,
    }
    assert document.place(("a", "c", 1, "e")).endswith("f.yaml:7")
    assert document.place(("a", "c", 9, "e")).endswith("f.yaml:4")
    assert document.place(("z",)).endswith("f.yaml:1")
    assert document.problems == []


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "\ufeff"])
def test_an_empty_file_is_an_empty_mapping(tmp_path: Path, text: str) -> None:
    document = read(tmp_path, text)
    assert (document.data, document.problems) == ({}, [])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("null", None),
        ("~", None),
        ("", None),
        ("true", True),
        ("False", False),
        ("0", 0),
        ("-12", -12),
        ("+3", 3),
        ("1.5", 1.5),
        (".5", 0.5),
        ("1.5e3", 1500.0),
        (".inf", float("inf")),
        ("-.INF", float("-inf")),
        ("text", "text"),
        # What YAML 1.1 makes booleans, times, dates and odd numbers of.
        ("yes", "yes"),
        ("off", "off"),
        ("08:30", "08:30"),
        ("0000:01:00.0", "0000:01:00.0"),
        ("2024-01-31", "2024-01-31"),
        ("0123", "0123"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("1e3", "1e3"),
        ("9" * 30, "9" * 30),
        # Quotes, blocks and !!str make text of anything.
        ("'1'", "1"),
        ('"true"', "true"),
        ("|\n  1\n", "1\n"),
        ("!!str 1", "1"),
        ("''", ""),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(tmp_path: Path, text: str, value: Any) -> None:
    document = read(tmp_path, f"a: {text}\n")
    assert document.problems == []
    assert document.data == {"a": value}
    assert type((document.data or {})["a"]) is type(value)


def test_the_spelling_of_a_scalar_is_kept(tmp_path: Path) -> None:
    assert read(tmp_path, "a: 1.10\nb: '1.10'").texts == {("a",): "1.10", ("b",): "1.10"}


def test_an_alias_stands_for_what_it_names(tmp_path: Path) -> None:
    assert read(tmp_path, "a: &x {b: 1}\nc: *x\n").data == {"a": {"b": 1}, "c": {"b": 1}}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3: a: given twice, first in line 1; expected each key once"),
        ("a:\n  b: 1\n  'b': 2\n", "f.yaml:3: a.b: given twice, first in line 2; expected each key once"),
        (
            "a: !!python/object:os.system x",
            "f.yaml:1: a: the tag !!python/object:os.system; expected a value",
        ),
        ("a: !!binary eA==", "f.yaml:1: a: the tag !!binary; expected a value without a tag"),
        ("a: !!set {x}", "f.yaml:1: a: the tag !!set; expected a value without a tag"),
        ("a: !!omap [x: 1]", "f.yaml:1: a: the tag !!omap; expected a value without a tag"),
        ("a: !own 1", "f.yaml:1: a: the tag !own; expected a value without a tag"),
        (
            "a: &x {b: 1}\nc: {<<: *x}",
            "f.yaml:2: c.<<: merge keys are not read; expected the keys themselves",
        ),
        ("a: 1\n? [x, y]\n: 2\n", "f.yaml:2: a key that is not text; expected a plain name"),
        ("a:\n  ? {x: y}\n  : 2\n", "f.yaml:2: a: a key that is not text; expected a plain name"),
        ("? !!int 1\n: 2\n", "f.yaml:1: a key that is not text; expected a plain name"),
        ("- a\n- b\n", "f.yaml:1: expected a mapping of keys to values"),
        ("\ntext", "f.yaml:2: expected a mapping of keys to values"),
        ("''", "f.yaml:1: expected a mapping of keys to values"),
        ("!!python/name:os.system", "f.yaml:1: the tag !!python/name:os.system; expected a value without a"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2: a second document; expected one document a file"),
        ("a: 1\n---\n", "f.yaml:2: a second document; expected one document a file"),
        ("a: [1\n", "f.yaml:2: not YAML: while parsing a flow sequence, expected ',' or ']'"),
        ("a: 1\n\tb: 2\n", "f.yaml:2: not YAML: while scanning for the next token, found character '\\t'"),
        ("a: *nowhere", "f.yaml:1: not YAML: found undefined alias 'nowhere'"),
        ("a: 1\nb: \x07\n", "f.yaml:2: not YAML: special characters are not allowed"),
        (b"a: 1\nb: \xff\n", "f.yaml:2: not UTF-8 text"),
        ("a: &x [*x]", "f.yaml:1: not YAML: it unfolds too far, at most 32 levels and 20000 values"),
        ("a: " + "[" * 600, "f.yaml:1: nested too deeply; at most 32 levels"),
        ("#" * 2**20 + "\n", "f.yaml:1: too large; at most 1048576 bytes are read"),
    ],
)
def test_what_is_refused_has_its_line(tmp_path: Path, text: str | bytes, problem: str) -> None:
    (found,) = problems(tmp_path, text)
    assert found.startswith(problem)


def test_a_small_file_cannot_describe_a_huge_tree(tmp_path: Path) -> None:
    lines = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for before, after in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]")
    (found,) = problems(tmp_path, "\n".join(lines))
    assert "it unfolds too far" in found


def test_a_file_that_is_wrong_in_one_key_is_still_read(tmp_path: Path) -> None:
    assert read(tmp_path, "a: 1\na: 2\nb: 3\n").data == {"a": 1, "b": 3}
    assert read(tmp_path, "a: 1\n? [x]\n: 2\n").data is None


def test_a_missing_file_is_the_callers_business(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_document(tmp_path / "gone.yaml")
