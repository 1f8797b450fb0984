from __future__ import annotations

import math
import struct
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from manager.domain.embeddings import (
    OPEN,
    Backfill,
    BackfillStatus,
    Counts,
    Recipe,
    Version,
    VersionState,
    dimensions_of,
    is_collection_name,
    unit_vector,
    vector_values,
)

NOW = datetime(2026, 8, 1, 12, 30, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)
RECIPE = Recipe("bge-m3", "sha256:abc", 1024)
VERSION = Version(1, 1, RECIPE, VersionState.BUILDING, NOW)
BACKFILL = Backfill(1, 2, BackfillStatus.RUNNING, 0.95, None, auto_cutover=True, project="p", started_at=NOW)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
RECIPES = st.builds(
    Recipe,
    model=st.sampled_from(["a", "b"]),
    digest=st.sampled_from([None, "a", "b"]),
    dimensions=st.sampled_from([1, 2]),
    prefix=st.sampled_from(["", "a", '","truncate":true,"']),
    truncate=st.booleans(),
    asked=st.sampled_from([None, 1, 2]),
)


# --- names ---


@pytest.mark.parametrize("name", ["a", "0", "a.b", "a-b_c.9", "a" * 63, "a-", "a_"])
def test_name(name: str) -> None:
    assert is_collection_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".a", "a.", "a..b", "-a", "_a", "A", "a/b", "a b", "ä", "a\n", "a" * 64, "a%2e"]
)
def test_no_name(name: str) -> None:
    assert not is_collection_name(name)


# --- versions ---


def identity(recipe: Recipe) -> tuple[Any, ...]:
    who = ("model", recipe.model) if recipe.digest is None else ("digest", recipe.digest)
    return *who, recipe.dimensions, recipe.prefix, recipe.truncate


@given(RECIPES, RECIPES)
def test_ids_differ_exactly_where_a_part_differs(one: Recipe, other: Recipe) -> None:
    assert (one.id == other.id) is (identity(one) == identity(other))


@pytest.mark.parametrize(
    "changed", [{"digest": "sha256:abd"}, {"dimensions": 512}, {"prefix": "query: "}, {"truncate": True}]
)
def test_each_part_changes_the_id(changed: dict[str, Any]) -> None:
    assert replace(RECIPE, **changed).id != RECIPE.id


@pytest.mark.parametrize("changed", [{"model": "bge-m3:latest"}, {"asked": 1024}])
def test_the_name_of_a_model_with_a_digest_does_not_count(changed: dict[str, Any]) -> None:
    assert replace(RECIPE, **changed).id == RECIPE.id


def test_the_id_is_the_same_in_every_release() -> None:
    # Versions that are stored keep their ids.
    assert RECIPE.id == VERSION.id == "cbca4071c4d6fcf4"


@pytest.mark.parametrize(
    ("state", "stale", "shown"),
    [
        (VersionState.BUILDING, None, "building"),
        (VersionState.BUILDING, NOW, "stale"),
        (VersionState.ACTIVE, None, "active"),
        (VersionState.ACTIVE, NOW, "stale"),
        (VersionState.ARCHIVED, None, "archived"),
        (VersionState.ARCHIVED, NOW, "archived"),
    ],
)
def test_shown_state(state: VersionState, stale: datetime | None, shown: str) -> None:
    assert replace(VERSION, state=state, stale_since=stale).shown_state == shown


ALLOWED = {
    (VersionState.BUILDING, VersionState.ACTIVE),
    (VersionState.BUILDING, VersionState.ARCHIVED),
    (VersionState.ACTIVE, VersionState.ARCHIVED),
    (VersionState.ARCHIVED, VersionState.BUILDING),
    (VersionState.ARCHIVED, VersionState.ACTIVE),
}


@pytest.mark.parametrize("state", VersionState)
@pytest.mark.parametrize("following", VersionState)
def test_moves_of_a_version(state: VersionState, following: VersionState) -> None:
    archived_at = NOW if state is VersionState.ARCHIVED else None
    version = replace(VERSION, state=state, activated_at=NOW, archived_at=archived_at)
    if (state, following) not in ALLOWED:
        with pytest.raises(
            ValueError, match=f"{version.id} is {state.value}: it cannot become {following.value}"
        ):
            version.moved(following, LATER)
        return
    moved = version.moved(following, LATER)
    assert moved.state is following
    assert moved.activated_at == (LATER if following is VersionState.ACTIVE else NOW)
    assert moved.archived_at == (LATER if following is VersionState.ARCHIVED else None)
    assert replace(moved, state=state, activated_at=NOW, archived_at=archived_at) == version


# --- counts ---

COUNTS = st.integers(0, 3_000_000_000).flatmap(
    lambda items: st.integers(0, items).flatmap(
        lambda rows: st.builds(Counts, st.just(items), st.just(rows), st.integers(0, items - rows))
    )
)


@given(COUNTS)
@example(Counts(0, 0))
@example(Counts(3_000_000_000, 2_999_999_999))
def test_coverage_is_1_exactly_where_all_items_have_a_vector(counts: Counts) -> None:
    assert 0.0 <= counts.coverage <= 1.0
    assert (counts.coverage == 1.0) is (counts.rows == counts.items)
    assert (counts.coverage == 0.0) is (counts.rows == 0 < counts.items)
    assert counts.missing == counts.items - counts.rows - counts.quarantined >= 0


@given(COUNTS, st.integers(1, 1000))
@example(Counts(20, 19), 950)
@example(Counts(20, 18), 950)
@example(Counts(39_596_000, 21_896_588), 553)
def test_a_threshold_is_reached_as_it_is_written(counts: Counts, thousandths: int) -> None:
    wanted = counts.items - counts.quarantined
    expected = counts.rows >= wanted * Fraction(thousandths, 1000) if wanted else counts.items == 0
    assert counts.reaches(thousandths / 1000) is expected


def test_an_empty_collection_can_be_switched_and_one_in_quarantine_cannot() -> None:
    assert Counts(0, 0).reaches(1)
    assert not Counts(3, 0, 3).reaches(0.1)
    assert Counts(3, 1, 2).reaches(1.0)


# --- backfills ---

FOLLOWING = {
    BackfillStatus.RUNNING: {"paused", "succeeded", "cancelled", "failed"},
    BackfillStatus.PAUSED: {"running", "cancelled"},
}


@pytest.mark.parametrize("status", BackfillStatus)
@pytest.mark.parametrize("following", BackfillStatus)
def test_moves_of_a_backfill(status: BackfillStatus, following: BackfillStatus) -> None:
    backfill = replace(BACKFILL, status=status, error="before")
    assert backfill.is_open is (status.value in {"running", "paused"}) is (status in OPEN)
    if following.value not in FOLLOWING.get(status, set()):
        with pytest.raises(ValueError, match=f"is {status.value}: it cannot become {following.value}"):
            backfill.moved(following, LATER)
        return
    moved = backfill.moved(following, LATER, "why")
    assert moved == replace(
        backfill, status=following, ended_at=None if moved.is_open else LATER, error="why"
    )
    assert backfill.moved(following, LATER).error is None


# --- vectors ---


@given(st.lists(FLOATS | st.integers(-(2**60), 2**60), min_size=1, max_size=20))
@example([5e-324, 5e-324])
@example([5e-324] * 3 + [-5e-324])
@example([1e-160, 1e-160])
@example([1.7e308, -1.7e308])
@example([1e39])
@example([3, 4])
def test_a_unit_vector_has_length_1_and_the_same_direction(values: list[float]) -> None:
    if not any(values):
        with pytest.raises(ValueError, match="zeros has no direction"):
            unit_vector(values)
        return
    packed = unit_vector(values)
    assert dimensions_of(packed) == len(values)
    found = vector_values(packed)
    assert math.hypot(*found) == pytest.approx(1, abs=1e-6)
    largest = max(map(abs, values))
    scaled = [value / largest for value in values]
    length = math.hypot(*scaled)
    assert found == pytest.approx([value / length for value in scaled], abs=1e-6)


def test_a_vector_is_little_endian_float32() -> None:
    assert unit_vector([3, 4]) == struct.pack("<2f", 0.6, 0.8)
    assert vector_values(struct.pack("<2f", 0.5, -2)) == [0.5, -2]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([1.0, math.nan], "expected finite numbers"),
        ([math.inf, 1.0], "expected finite numbers"),
        ([-math.inf, math.nan], "expected finite numbers"),
        ([10**400, 1.0], "expected finite numbers"),
        ([0.0, -0.0, 0], "a vector of zeros has no direction, and cannot be compared"),
        ([], "a vector of zeros has no direction, and cannot be compared"),
        ([True, 1.0], "expected numbers"),
        ([1.0, False], "expected numbers"),
        (["1"], "expected numbers"),
        ("12", "expected numbers"),
        ([None], "expected numbers"),
        ([[1.0]], "expected numbers"),
        ([1j], "expected numbers"),
    ],
)
def test_what_is_no_vector(values: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{problem}$"):
        unit_vector(values)
