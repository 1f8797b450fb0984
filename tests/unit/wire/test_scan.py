"""The scanner finds what a parser finds, wherever its windows end, and does bounded work a step."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire import scan as scan_module
from manager.wire.scan import Field, NotJsonError, Scan, folded, string_in
from manager.wire.steps import run

if TYPE_CHECKING:
    from collections.abc import Iterator

TEXTS = st.text(st.sampled_from('ab"\\/[]{},: \n\té☃\U0001f600'), max_size=12) | st.text(max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
LAYOUTS = st.sampled_from([{}, {"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False}])


@pytest.fixture(params=[2, 3, 5, 16, 65_536])
def windows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Look at so few bytes at a time that every kind of text is cut somewhere."""
    monkeypatch.setattr(scan_module, "STEP_BYTES", request.param)
    monkeypatch.setattr(scan_module, "_FIRST_WINDOW", min(request.param, 512))
    monkeypatch.setattr(scan_module, "_FLAT_BYTES", request.param if request.param > 16 else 0)
    return iter(())


def fields_in(raw: bytes) -> list[tuple[str, Any]]:
    scan = Scan(memoryview(raw))
    run(scan.space())
    return [(name, json.loads(raw[start:end])) for name, start, end in run(scan.fields())]


def elements_in(raw: bytes) -> list[Any]:
    scan = Scan(memoryview(raw), 1)
    found: list[Any] = []
    while (place := run(scan.next_element(first=not found))) is not None:
        found.append(json.loads(raw[slice(*place)]))
    return found


@pytest.mark.usefixtures("windows")
@given(st.dictionaries(TEXTS, VALUES, max_size=5), LAYOUTS, st.binary(max_size=3))
def test_the_fields_are_those_that_a_parser_finds(
    document: dict[str, Any], layout: dict[str, Any], rest: bytes
) -> None:
    raw = json.dumps(document, **layout).encode()
    assert fields_in(raw + rest) == list(document.items())
    scan = Scan(memoryview(raw + rest))
    run(scan.fields())
    assert scan.at == len(raw)


@pytest.mark.usefixtures("windows")
@given(st.lists(VALUES, max_size=5), LAYOUTS)
def test_the_elements_are_those_that_a_parser_finds(document: list[Any], layout: dict[str, Any]) -> None:
    assert elements_in(json.dumps(document, **layout).encode()) == document


@pytest.mark.usefixtures("windows")
@given(VALUES, LAYOUTS)
def test_a_value_that_is_cut_anywhere_has_no_end(value: Any, layout: dict[str, Any]) -> None:
    raw = json.dumps({"x": [value]}, **layout).encode().rstrip()
    for end in range(len(raw)):
        with pytest.raises(NotJsonError):
            run(Scan(memoryview(raw[:end])).value())


@given(st.binary(max_size=60) | st.text(st.sampled_from('[]{},:"\\ 1tn'), max_size=60).map(str.encode))
def test_whatever_comes_is_read_or_refused(raw: bytes) -> None:
    scan = Scan(memoryview(raw.lstrip(b" \t\r\n")))
    try:
        run(scan.value())
    except NotJsonError:
        with pytest.raises(ValueError, match=r"."):
            json.loads(raw.decode("utf-8", "replace"))
    else:
        assert 0 < scan.at <= len(raw)


def test_every_field_has_its_place_also_where_a_name_comes_twice() -> None:
    raw = b'{"a": 1, "a" :[2] ,"\\u0062":"}"}'
    assert run(Scan(memoryview(raw)).fields()) == [Field("a", 6, 7), Field("a", 14, 17), Field("b", 28, 31)]


def test_a_number_has_a_bounded_length() -> None:
    for raw in (b"[%b]" % (b"1" * 1000), b"1" * 1000):
        run(Scan(memoryview(raw)).value())
    with pytest.raises(NotJsonError):
        run(Scan(memoryview(b"1" * 5000)).value())


@pytest.mark.parametrize("size", [10, 100])
@pytest.mark.parametrize(
    "unit", [b"[],", b"[[]],", b'"",', b'"\\"",', b"1,", b" ", b'{"a":{"b":1}},', b"[" * 9 + b"]" * 9 + b","]
)
def test_the_work_of_a_step_is_bounded(unit: bytes, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No window is larger than a step, and there is a step for every STEP_BYTES."""
    step = 4096
    monkeypatch.setattr(scan_module, "STEP_BYTES", step)
    raw = b"[[" + unit * size * step + b"1]]"
    scan, seen = Scan(memoryview(raw)), 0
    for _ in scan.value():
        assert scan.at - seen <= 3 * step
        seen = scan.at
    assert scan.at == len(raw)


def test_many_small_values_are_many_steps() -> None:
    raw = memoryview(b"[" + b"[]," * 10_000 + b"1]")
    scan, first = Scan(raw, 1), True

    def count() -> Iterator[None]:
        nonlocal first
        while (yield from scan.next_element(first=first)) is not None:
            first = False

    steps = sum(1 for _ in count())
    assert steps >= 10_000 * 256 // 65_536


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("model", "model"),
        ("MoDeL", "model"),
        ("option\u017f", "options"),
        ("\u212aEEP_alive", "keep_alive"),
        ("\u00c9", "\u00c9"),
        ("M\u00e9", "m\u00e9"),
        ("\u0130", "\u0130"),
        ("", ""),
    ],
)
def test_names_are_folded_as_the_server_folds_them(name: str, same: str) -> None:
    assert folded(name) == same


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b'"a"', "a"),
        (b'"\\u0061\\n"', "a\n"),
        (b'"\xff"', "\ufffd"),
        (b'"\\ud800x"', "\ufffdx"),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
    ],
)
def test_a_string_is_read_as_the_server_reads_it(raw: bytes, text: str) -> None:
    assert string_in(raw) == text


@pytest.mark.parametrize("raw", [b'"\n"', b'"\\x"', b"5", b"\xff", b"[", b'"a', b"NaN"])
def test_what_is_no_string_is_none(raw: bytes) -> None:
    with pytest.raises(NotJsonError):
        string_in(raw)
