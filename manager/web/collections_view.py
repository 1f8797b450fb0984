"""Collections as the page shows them: plain values for templates, made of what the services say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from manager.domain.embeddings import BackfillStatus, Counts, VersionState
from manager.web.state import BAD, OFF, OK, WARN, WORK
from manager.web.words import unix_s

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.domain.embeddings import Backfill, Version
    from manager.services.embeddings.switching import Overview

# Of a digest; the API has all of it.
SHORT_DIGEST = 12
_NONE = Counts(0, 0)
_NEARLY_ALL = 0.99
_KINDS = {"active": OK, "building": WORK, "archived": OFF, "stale": BAD}
_BACKFILL_KINDS = {
    BackfillStatus.RUNNING: WORK,
    BackfillStatus.PAUSED: WARN,
    BackfillStatus.SUCCEEDED: OK,
    BackfillStatus.CANCELLED: OFF,
    BackfillStatus.FAILED: BAD,
}


class Progress(NamedTuple):
    """How a backfill gets on: items a second, and why it does not get on; None where that is unknown."""

    items_per_s: float | None
    waits_for: str | None


NO_PROGRESS = Progress(None, None)


def collection_values(overview: Overview, progress: Progress) -> dict[str, Any]:
    """Return a collection with the state of its active version and its latest backfill.

    `total` is the number of items: in templates `items` is a method of each mapping.
    """
    shelved = overview.shelved
    collection, active = shelved.collection, shelved.active
    counts = _counts(overview, active)
    state = active.shown_state if active is not None else "empty"
    return {
        "name": collection.name,
        "model": collection.model,
        "prefix": collection.prefix,
        "dimensions": active.recipe.dimensions if active is not None else collection.asked,
        "truncate": collection.truncate,
        "keep_text": collection.keep_text,
        "created_at": collection.created_at.timestamp(),
        "total": overview.items,
        "versions": len(shelved.versions),
        "version": active.id if active is not None else None,
        "state": state,
        "kind": _KINDS.get(state, OFF),
        "is_stale": active is not None and active.stale_since is not None,
        "stale_since": unix_s(active.stale_since) if active is not None else None,
        "active_model": active.recipe.model if active is not None else None,
        "coverage": _share(counts) if active is not None else None,
        "rows": counts.rows,
        "lacking": overview.items - counts.rows if active is not None else 0,
        "missing": max(0, counts.missing) if active is not None else 0,
        "backfill": _backfill(overview, shelved.backfill, progress),
    }


def version_values(overview: Overview) -> list[dict[str, Any]]:
    """Return the versions, the active one first, then the newest."""
    shelved = overview.shelved
    backfill, previous = shelved.backfill, shelved.previous
    filled = backfill.version if backfill is not None and backfill.is_open else None
    versions = sorted(
        shelved.versions.values(), key=lambda one: (one.state is not VersionState.ACTIVE, -one.key)
    )
    return [
        {
            **_version(one, _counts(overview, one)),
            "is_previous": previous is not None and previous.key == one.key,
            "may_cut_over": one.state is not VersionState.ACTIVE,
            "may_remove": one.state is not VersionState.ACTIVE and one.key != filled,
        }
        for one in versions
    ]


def _version(version: Version, counts: Counts) -> dict[str, Any]:
    recipe, state = version.recipe, version.shown_state
    return {
        "id": version.id,
        "model": recipe.model,
        "digest": recipe.digest and recipe.digest.removeprefix("sha256:")[:SHORT_DIGEST],
        "dimensions": recipe.dimensions,
        "prefix": recipe.prefix,
        "truncate": recipe.truncate,
        "state": state,
        "kind": _KINDS[state],
        "is_active": version.state is VersionState.ACTIVE,
        "is_stale": version.stale_since is not None and version.state is not VersionState.ARCHIVED,
        "total": counts.items,
        "rows": counts.rows,
        "quarantined": counts.quarantined,
        "coverage": _share(counts),
        "bar": _bar(counts),
        "created_at": version.created_at.timestamp(),
        "activated_at": unix_s(version.activated_at),
    }


def _backfill(overview: Overview, backfill: Backfill | None, progress: Progress) -> Mapping[str, Any] | None:
    if backfill is None:
        return None
    version = overview.shelved.versions.get(backfill.version)
    counts = _counts(overview, version)
    is_running = backfill.status is BackfillStatus.RUNNING
    speed = progress.items_per_s if is_running else None
    missing = max(0, counts.missing)
    return {
        "version": version.id if version is not None else None,
        "model": version.recipe.model if version is not None else None,
        "status": backfill.status.value,
        "kind": _BACKFILL_KINDS[backfill.status],
        "is_open": backfill.is_open,
        "is_running": is_running,
        "threshold": backfill.threshold,
        "rate": backfill.rate,
        "auto_cutover": backfill.auto_cutover,
        "total": counts.items,
        "rows": counts.rows,
        "missing": missing,
        "quarantined": counts.quarantined,
        "coverage": _share(counts),
        "bar": _bar(counts),
        "items_per_s": speed,
        "eta_s": missing / speed if speed else None,
        "waits_for": progress.waits_for if is_running else None,
        "error": backfill.error,
        "started_at": backfill.started_at.timestamp(),
        "ended_at": unix_s(backfill.ended_at),
    }


def _share(counts: Counts) -> float:
    """Return the coverage in a form that is not rounded to all where something is missing."""
    return counts.coverage if counts.rows >= counts.items else min(counts.coverage, _NEARLY_ALL)


def _bar(counts: Counts) -> Mapping[str, float]:
    """Return the shares of a bar: what has a vector, and what is in quarantine. Nothing is a full bar."""
    items = max(1, counts.items)
    return {"rows": counts.rows / items if counts.items else 1.0, "quarantined": counts.quarantined / items}


def _counts(overview: Overview, version: Version | None) -> Counts:
    found = None if version is None else overview.counts.get(version.key)
    return found if found is not None else _NONE._replace(items=overview.items)
