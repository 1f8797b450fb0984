"""Collections as the page shows them: states, coverage, and how a backfill gets on."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from manager.domain.embeddings import (
    Backfill,
    BackfillStatus,
    Collection,
    Counts,
    Recipe,
    Version,
    VersionState,
)
from manager.services.embeddings.shelf import Shelved
from manager.services.embeddings.switching import Overview
from manager.web.collections_view import NO_PROGRESS, Progress, collection_values, version_values

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
COLLECTION = Collection(7, "docs", "minilm", "doc: ", None, truncate=False, keep_text=True, created_at=NOW)
FIRST = Version(1, 7, Recipe("minilm", "sha256:" + "ab" * 32, 384, "doc: "), VersionState.ACTIVE, NOW, NOW)
SECOND = Version(2, 7, Recipe("large", "cd" * 32, 1024), VersionState.BUILDING, NOW)
BACKFILL = Backfill(
    7,
    2,
    BackfillStatus.RUNNING,
    threshold=0.95,
    rate=None,
    auto_cutover=True,
    project="default",
    started_at=NOW,
)


def overview(
    *versions: Version, items: int = 100, backfill: Backfill | None = None, **counts: Counts
) -> Overview:
    """Return a collection; `counts` are those of the versions `v1`, `v2` and so on."""
    shelved = Shelved(COLLECTION)
    shelved.take(*versions)
    shelved.backfill = backfill
    return Overview(shelved, items, {int(name[1:]): found for name, found in counts.items()})


def shown(found: Overview, progress: Progress = NO_PROGRESS) -> dict[str, Any]:
    return collection_values(found, progress)


def test_a_collection_without_items_has_no_version_and_no_coverage() -> None:
    found = shown(overview(items=0))
    assert (found["state"], found["kind"], found["version"], found["coverage"]) == (
        "empty",
        "off",
        None,
        None,
    )
    assert found["lacking"] == 0
    assert found["backfill"] is None
    assert version_values(overview(items=0)) == []


def test_the_state_and_coverage_are_those_of_the_active_version() -> None:
    found = shown(overview(FIRST, SECOND, v1=Counts(100, 80, 5), v2=Counts(100, 100)))
    assert (found["state"], found["kind"], found["version"]) == ("active", "ok", FIRST.id)
    assert (found["coverage"], found["rows"], found["lacking"], found["missing"]) == (0.8, 80, 20, 15)
    assert (found["model"], found["dimensions"], found["versions"]) == ("minilm", 384, 2)


def test_a_stale_version_is_bad_and_says_since_when() -> None:
    stale = replace(FIRST, stale_since=NOW + timedelta(seconds=5))
    found = shown(overview(stale, v1=Counts(100, 100)))
    assert (found["state"], found["kind"], found["is_stale"]) == ("stale", "bad", True)
    assert found["stale_since"] == NOW.timestamp() + 5
    (version,) = version_values(overview(stale, v1=Counts(100, 100)))
    assert (version["state"], version["kind"], version["is_stale"], version["is_active"]) == (
        "stale",
        "bad",
        True,
        True,
    )


def test_an_archived_version_is_not_shown_as_stale() -> None:
    archived = replace(FIRST, state=VersionState.ARCHIVED, archived_at=NOW, stale_since=NOW)
    (version,) = version_values(overview(archived))
    assert (version["state"], version["kind"], version["is_stale"]) == ("archived", "off", False)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (Counts(10_000, 9_999), 0.99),
        (Counts(10_000, 10_000), 1.0),
        (Counts(10_000, 5_000), 0.5),
        (Counts(0, 0), 1.0),
    ],
)
def test_what_lacks_one_vector_is_not_shown_as_all(counts: Counts, expected: float) -> None:
    found = overview(FIRST, items=counts.items, v1=counts)
    assert shown(found)["coverage"] == expected
    assert version_values(found)[0]["coverage"] == expected


def test_a_bar_has_what_is_done_and_what_is_in_quarantine() -> None:
    found = version_values(overview(FIRST, v1=Counts(100, 80, 5)))
    assert found[0]["bar"] == {"rows": 0.8, "quarantined": 0.05}
    assert version_values(overview(FIRST, items=0))[0]["bar"] == {"rows": 1.0, "quarantined": 0.0}


def test_versions_come_active_first_then_newest_with_short_digests() -> None:
    oldest = replace(FIRST, state=VersionState.ARCHIVED, archived_at=NOW)
    active = replace(SECOND, state=VersionState.ACTIVE, activated_at=NOW)
    third = replace(SECOND, key=3, recipe=Recipe("other", None, 8))
    found = version_values(overview(oldest, active, third, v2=Counts(100, 100)))
    assert [one["id"] for one in found] == [active.id, third.id, oldest.id]
    assert [one["digest"] for one in found] == ["cdcdcdcdcdcd", None, "abababababab"]
    assert [one["total"] for one in found] == [100, 100, 100]
    assert [one["rows"] for one in found] == [100, 0, 0]
    assert [one["is_previous"] for one in found] == [False, False, True]


def test_no_button_is_offered_that_is_refused_in_any_case() -> None:
    oldest = replace(FIRST, key=3, state=VersionState.ARCHIVED, archived_at=NOW, recipe=Recipe("old", "x", 8))
    versions = version_values(overview(FIRST, SECOND, oldest, backfill=BACKFILL))
    assert [(one["may_cut_over"], one["may_remove"]) for one in versions] == [
        (False, False),
        (True, True),
        (True, False),
    ]
    paused = replace(BACKFILL, status=BackfillStatus.PAUSED)
    assert not version_values(overview(SECOND, backfill=paused))[0]["may_remove"]
    ended = replace(BACKFILL, status=BackfillStatus.SUCCEEDED, ended_at=NOW)
    assert version_values(overview(SECOND, backfill=ended))[0]["may_remove"]


def test_a_running_backfill_says_how_far_it_is_and_when_it_ends() -> None:
    found = overview(FIRST, SECOND, backfill=BACKFILL, v1=Counts(100, 100), v2=Counts(100, 40, 10))
    backfill = shown(found, Progress(5.0, "no slot is free"))["backfill"]
    assert (backfill["status"], backfill["kind"], backfill["is_open"]) == ("running", "work", True)
    assert (backfill["version"], backfill["model"]) == (SECOND.id, "large")
    assert (backfill["rows"], backfill["missing"], backfill["quarantined"]) == (40, 50, 10)
    assert (backfill["items_per_s"], backfill["eta_s"]) == (5.0, 10.0)
    assert backfill["waits_for"] == "no slot is free"
    assert (backfill["threshold"], backfill["rate"], backfill["auto_cutover"]) == (0.95, None, True)


@pytest.mark.parametrize(
    ("status", "kind", "is_open"),
    [
        (BackfillStatus.PAUSED, "warn", True),
        (BackfillStatus.SUCCEEDED, "ok", False),
        (BackfillStatus.CANCELLED, "off", False),
        (BackfillStatus.FAILED, "bad", False),
    ],
)
def test_a_backfill_that_does_not_run_has_no_speed_and_waits_for_nothing(
    status: BackfillStatus, kind: str, *, is_open: bool
) -> None:
    backfill = replace(BACKFILL, status=status, error="why")
    found = shown(overview(FIRST, SECOND, backfill=backfill), Progress(5.0, "x"))["backfill"]
    assert (found["kind"], found["is_open"], found["error"]) == (kind, is_open, "why")
    assert (found["items_per_s"], found["eta_s"], found["waits_for"]) == (None, None, None)


def test_the_version_of_an_old_backfill_may_be_gone() -> None:
    ended = replace(BACKFILL, status=BackfillStatus.CANCELLED, ended_at=NOW)
    backfill = shown(overview(FIRST, backfill=ended, v1=Counts(100, 100)))["backfill"]
    assert (backfill["version"], backfill["model"], backfill["rows"]) == (None, None, 0)
    assert backfill["ended_at"] == NOW.timestamp()
