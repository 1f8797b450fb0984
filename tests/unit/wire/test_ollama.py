"""What Ollama's status routes answer: as recorded, and as no server should answer."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.ollama import (
    name_of,
    parameters_of,
    read_available,
    read_loaded,
    read_time,
    read_version,
)

RECORDINGS = Path(__file__).parents[2] / "contract" / "recordings"

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["models", "name"]), inner),
    max_leaves=8,
)


def recorded(name: str) -> Any:
    return json.loads((RECORDINGS / f"{name}.json").read_text(encoding="utf-8"))["json"]


def test_the_version_is_read_as_recorded() -> None:
    assert read_version(recorded("03-version")) == "0.24.0"


def test_loaded_models_are_read_as_recorded() -> None:
    body = recorded("08-ps-loaded")
    (model,) = read_loaded(body) or ()
    (entry,) = body["models"]
    assert (model.name, model.digest) == (entry["name"], entry["digest"])
    assert (model.size_bytes, model.vram_bytes) == (entry["size"], entry["size_vram"])
    assert model.entry == entry
    assert model.expires_at is not None
    assert model.expires_at.tzinfo is UTC
    assert read_loaded(recorded("06-ps-empty")) == ()


def test_a_model_that_stays_for_ever_expires_centuries_ahead() -> None:
    (model,) = read_loaded(recorded("69-ps-forever")) or ()
    assert model.expires_at is not None
    assert model.expires_at.year > 2300  # which is how Ollama says it


def test_available_models_are_read_as_recorded() -> None:
    body = recorded("04-tags")
    assert read_available(body) == tuple(body["models"])


def test_an_entry_without_a_name_is_called_by_its_model_and_missing_figures_are_zero() -> None:
    (model,) = read_loaded({"models": [{"model": "tiny:latest"}]}) or ()
    assert (model.name, model.digest, model.size_bytes, model.vram_bytes) == ("tiny:latest", "", 0, 0)
    assert model.expires_at is None
    entries = read_available({"models": [{"model": "tiny:latest"}, {}]}) or ()
    assert [name_of(entry) for entry in entries] == ["tiny:latest", ""]


@pytest.mark.parametrize("figure", [None, "5", 5.5, True, -1, [5]])
def test_a_figure_that_is_no_count_is_zero(figure: object) -> None:
    (model,) = read_loaded({"models": [{"name": "tiny", "size": figure, "size_vram": figure}]}) or ()
    assert (model.size_bytes, model.vram_bytes) == (0, 0)


@pytest.mark.parametrize("body", [None, [], "models", 7, {}, {"models": None}, {"models": {"name": "x"}}])
def test_another_body_is_not_an_answer(body: object) -> None:
    assert read_loaded(body) is None
    assert read_available(body) is None
    assert read_version(body) is None


def test_what_is_no_entry_is_left_out() -> None:
    body = {"models": [7, None, "tiny", {"name": "tiny"}]}
    assert read_available(body) == ({"name": "tiny"},)
    assert len(read_loaded(body) or ()) == 1


@pytest.mark.parametrize("version", [None, 24, ["0.24.0"]])
def test_a_version_that_is_no_text_is_none(version: object) -> None:
    assert read_version({"version": version}) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-01-02T03:04:05Z", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("2026-01-02T03:04:05.1Z", datetime(2026, 1, 2, 3, 4, 5, 100_000, tzinfo=UTC)),
        ("2026-01-02T03:04:05.123456789Z", datetime(2026, 1, 2, 3, 4, 5, 123_456, tzinfo=UTC)),
        (
            "2026-01-02T03:04:05.5-05:30",
            datetime(2026, 1, 2, 3, 4, 5, 500_000, tzinfo=timezone(-timedelta(hours=5, minutes=30))),
        ),
    ],
)
def test_a_time_is_read_with_any_fraction_and_zone(text: str, expected: datetime) -> None:
    time = read_time(text)
    assert time == expected
    assert time is not None
    assert time.tzinfo is UTC


@pytest.mark.parametrize(
    "text",
    [
        None,
        7,
        "",
        "soon",
        "2026-01-02",
        "2026-01-02 03:04:05Z",
        "2026-01-02T03:04:05",
        "2026-13-02T03:04:05Z",
        "2026-01-02T25:04:05Z",
        "2026-01-02T03:04:05+99:00",
        "9999-12-31T23:59:59-01:00",  # beyond what a clock can be compared with
        "0001-01-01T00:00:00+01:00",
        "12026-01-02T03:04:05Z",
        "2026-01-02T03:04:05Z\n",
    ],
)
def test_what_is_no_time_is_none(text: object) -> None:
    assert read_time(text) is None


@given(st.datetimes(min_value=datetime(2, 1, 1), max_value=datetime(9998, 1, 1)), st.integers(0, 999))  # noqa: DTZ001
def test_every_time_that_go_writes_is_read_to_the_microsecond(time: datetime, nanos: int) -> None:
    text = f"{time:%Y-%m-%dT%H:%M:%S}".rjust(19, "0") + f".{time.microsecond:06}{nanos:03}Z"
    assert read_time(text) == time.replace(tzinfo=UTC)


@given(anything)
def test_nothing_a_server_can_say_is_an_error(body: object) -> None:
    for read in (read_version, read_loaded, read_available, read_time):
        read(body)
        read({"models": body, "version": body})
        read({"models": [body, {"name": body, "size": body, "expires_at": body}]})


@pytest.mark.parametrize(
    ("entry", "count"),
    [
        ({"details": {"parameter_size": "14.8B"}}, 14_800_000_000),
        ({"details": {"parameter_size": "8x7B"}}, None),
        ({"details": {"parameter_size": ""}}, None),
        ({"details": {"parameter_size": 7}}, None),
        ({"details": None}, None),
        ({}, None),
    ],
)
def test_an_entry_gives_its_number_of_parameters_or_none(entry: dict[str, Any], count: int | None) -> None:
    assert parameters_of(entry) == count
