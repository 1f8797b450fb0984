"""A store of collections in plain dicts, and steps that are made in it and in the real one.

Run as a program, it makes steps in the real store and says which ones are done:
`python -m tests.support.collecting <file> <seed> <first step>`.
"""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import subprocess
import sys
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from manager.adapters.collections import open_collections
from manager.domain.embeddings import (
    MOST_FAILURES,
    Backfill,
    BackfillStatus,
    Collection,
    Counts,
    Failure,
    Recipe,
    Version,
    VersionState,
)
from manager.services.embeddings.ports import Found, Lacking, StoredItem

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

    from manager.adapters.collections import SqlCollections

    Choose: TypeAlias = Callable[[Sequence[Any]], Any]

NOW = datetime(2026, 8, 1, 12, 30, 15, 123456, tzinfo=UTC)
ALL = 10_000
ROOT = Path(__file__).parents[2]


def a_collection(name: str = "docs") -> Collection:
    return Collection(0, name, "bge-m3", "", None, truncate=False, keep_text=True, created_at=NOW)


def a_version(collection: int, digest: str = "d1", state: VersionState = VersionState.ACTIVE) -> Version:
    return Version(0, collection, Recipe("bge-m3", digest, 3), state, NOW)


def an_item(number: int, name: str, metadata: bytes = b"{}") -> StoredItem:
    return StoredItem(number, name, f"text {number}", metadata, NOW + timedelta(microseconds=number))


def a_backfill(collection: int, version: int) -> Backfill:
    return Backfill(
        collection,
        version,
        BackfillStatus.RUNNING,
        0.95,
        None,
        auto_cutover=True,
        project="p",
        started_at=NOW,
    )


@dataclass
class Step:
    """A call of the store: the name of a method and its arguments."""

    method: str
    given: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)

    async def make(self, store: SqlCollections) -> Any:
        return await getattr(store, self.method)(*self.given, **self.options)


@asynccontextmanager
async def opened(path: Path, **options: Any) -> AsyncIterator[SqlCollections]:
    store = await open_collections(path, **options)
    try:
        yield store
    finally:
        await store.close()


async def filled(store: SqlCollections, count: int = 3, name: str = "docs") -> tuple[int, int]:
    """Make a collection with items `i0`, `i1`, … that all have vectors; return its key and its version's."""
    collection = await store.create(a_collection(name))
    version = await store.add_version(a_version(collection))
    first = await store.allocate(count)
    items = [an_item(first + place, f"i{place}") for place in range(count)]
    assert await store.put(collection, items, {version: [item.number for item in items]}, version)
    return collection, version


async def numbers_of(store: SqlCollections, collection: int) -> dict[str, int]:
    return {item.id: item.number for item in await store.page(collection, None, ALL)}


def rows_of(path: Path, table: str) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def child(*argv: str) -> subprocess.Popen[str]:
    """Start Python with what it needs of this project."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *argv], stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )


class Model:
    """What the store has, by the words of its port. Each method returns what the store's one returns."""

    def __init__(self) -> None:
        self.keys = {"collection": 1, "version": 1, "number": 1}
        self.collections: dict[int, Collection] = {}
        self.versions: dict[int, Version] = {}
        self.backfills: dict[int, Backfill] = {}
        self.items: dict[int, dict[str, StoredItem]] = {}
        self.vectors: dict[int, dict[int, datetime]] = {}
        self.failures: dict[int, dict[int, Failure]] = {}
        self.waste: dict[int, set[int]] = {}

    def take(self, step: Step) -> Any:
        return getattr(self, step.method)(*step.given, **step.options)

    def create(self, collection: Collection) -> int:
        key = self.allocate(1, "collection")
        self.collections[key] = replace(collection, key=key)
        self.items[key] = {}
        return key

    def remove(self, collection: int) -> None:
        for version in [one for one in self.versions.values() if one.collection == collection]:
            self.remove_version(version.key)
        self.collections.pop(collection, None)
        self.items.pop(collection, None)

    def add_version(self, version: Version) -> int:
        key = self.allocate(1, "version")
        self.versions[key] = replace(version, key=key)
        self.vectors[key], self.failures[key], self.waste[key] = {}, {}, set()
        return key

    def save_versions(self, *versions: Version) -> None:
        self.versions.update({one.key: one for one in versions if one.key in self.versions})

    def remove_version(self, version: int) -> None:
        for kept in (self.versions, self.vectors, self.failures, self.waste):
            kept.pop(version, None)
        self.backfills = {key: one for key, one in self.backfills.items() if one.version != version}

    def save_backfill(self, backfill: Backfill) -> None:
        known = self.versions.get(backfill.version)
        if known is not None and known.collection == backfill.collection:
            self.backfills[backfill.collection] = backfill

    def begin_backfill(self, backfill: Backfill, *changed: Version) -> None:
        self.save_backfill(backfill)
        self.save_versions(*changed)
        if backfill.version in self.failures:
            self.failures[backfill.version] = {}

    def switch(
        self,
        wanted: Version,
        replaced: Version | None,
        collection: Collection,
        allowed: Callable[[Counts], bool],
    ) -> Counts | None:
        counts = self.counts(wanted.key)
        if wanted.key not in self.versions or not allowed(counts):
            return counts
        self.save_versions(wanted, *([replaced] if replaced else []))
        self.collections[collection.key] = collection
        return None

    def allocate(self, count: int, kind: str = "number") -> int:
        self.keys[kind] += count
        return self.keys[kind] - count

    def put(
        self, collection: int, items: Sequence[StoredItem], marks: dict[int, list[int]], active: int
    ) -> bool:
        known = self.versions.get(active)
        if known is None or known.collection != collection or known.state is not VersionState.ACTIVE:
            return False
        for item in items:
            self.delete(collection, item.id)
            self.items[collection][item.id] = item
        times = {item.number: item.created_at for item in items}
        for version, numbers in marks.items():
            if version in self.versions:
                self.vectors[version].update({number: times[number] for number in numbers})
                self.waste[version] -= set(numbers)
        return True

    def delete(self, collection: int, item: str) -> bool:
        gone = self.items.get(collection, {}).pop(item, None)
        if gone is None:
            return False
        for version in self.vectors:
            self.failures[version].pop(gone.number, None)
            if self.vectors[version].pop(gone.number, None):
                self.waste[version].add(gone.number)
        return True

    def mark(self, version: int, numbers: Sequence[int], at: datetime) -> int:
        there = set(numbers) & self.numbers(version).keys()
        if version in self.versions:
            self.vectors[version].update(dict.fromkeys(there, at))
            self.waste[version] = (self.waste[version] | set(numbers)) - self.vectors[version].keys()
            for number in there:
                self.failures[version].pop(number, None)
        return len(there)

    def failed(self, version: int, number: int, message: str, *, at_once: bool) -> Failure | None:
        item = self.numbers(version).get(number)
        if item is None or number in self.vectors[version]:
            return None
        last = self.failures[version].get(number, Failure(item.id, 0, "", quarantined=False))
        attempts = last.attempts + 1
        quarantined = last.quarantined or at_once or attempts >= MOST_FAILURES
        self.failures[version][number] = Failure(item.id, attempts, message, quarantined)
        return self.failures[version][number]

    def unmark(self, version: int, numbers: Sequence[int] | None) -> int:
        marked = self.vectors.get(version, {})
        gone = set(marked) if numbers is None else marked.keys() & set(numbers)
        for number in gone:
            del marked[number]
        if version in self.versions:
            self.waste[version] = set() if numbers is None else self.waste[version] | gone
        return len(gone)

    def add_rubbish(self, version: int, numbers: Sequence[int]) -> None:
        if version in self.versions:
            self.waste[version] |= set(numbers) - self.vectors[version].keys()

    def swept(self, version: int, numbers: Sequence[int]) -> None:
        if version in self.versions:
            self.waste[version] -= set(numbers)

    def numbers(self, version: int) -> dict[int, StoredItem]:
        """Return the items that a version can have vectors of."""
        known = self.versions.get(version)
        items = {} if known is None else self.items[known.collection]
        return {item.number: item for item in items.values()}

    def counts(self, version: int) -> Counts:
        if version not in self.versions:
            return Counts(0, 0)
        quarantined = sum(one.quarantined for one in self.failures[version].values())
        return Counts(len(self.numbers(version)), len(self.vectors[version]), quarantined)

    def all_counts(self) -> dict[int, Counts]:
        return {version: self.counts(version) for version in self.versions}

    def item_counts(self) -> dict[int, int]:
        return {key: len(items) for key, items in self.items.items()}

    def seen(self) -> dict[str, Any]:
        """Return all that the store says of itself, as `seen` does of the real one."""
        found: dict[str, Any] = {
            "collections": tuple(self.collections.values()),
            "versions": tuple(self.versions.values()),
            "backfills": tuple(one for _, one in sorted(self.backfills.items())),
            "counts": self.all_counts(),
            "items": self.item_counts(),
        }
        for key, items in self.items.items():
            found[f"page {key}"] = tuple(item for _, item in sorted(items.items()))
            for item in items.values():
                at = {
                    key: marked[item.number] for key, marked in self.vectors.items() if item.number in marked
                }
                found[f"item {key} {item.id}"] = (item, at)
        for key, marked in self.vectors.items():
            numbers, failures = self.numbers(key), sorted(self.failures[key].items())
            quarantined = [number for number, one in failures if one.quarantined]
            missing = [
                numbers[number] for number in sorted(numbers.keys() - marked.keys() - set(quarantined))
            ]
            found[f"version {key}"] = (
                frozenset(marked),
                frozenset(marked),
                {
                    number: Found(number, numbers[number].id, numbers[number].metadata, at)
                    for number, at in marked.items()
                },
                tuple(missing),
                tuple(one for _, one in failures),
                Lacking(
                    tuple(one.id for one in missing), tuple(numbers[number].id for number in quarantined)
                ),
                tuple(sorted(self.waste[key])),
            )
        return found


async def seen(store: SqlCollections) -> dict[str, Any]:
    """Return all that the store says of itself, one fact in several ways where there are several."""
    collections, versions = await store.collections(), await store.versions()
    found: dict[str, Any] = {
        "collections": collections,
        "versions": versions,
        "backfills": await store.backfills(),
        "counts": await store.all_counts(),
        "items": await store.item_counts(),
    }
    for collection in collections:
        page = await store.page(collection.key, None, ALL)
        found[f"page {collection.key}"] = page
        for item in page:
            found[f"item {collection.key} {item.id}"] = await store.item(collection.key, item.id)
    for version in versions:
        key = version.key
        marked = await store.marked(key)
        found[f"version {key}"] = (
            marked,
            await store.matching(key, lambda _: True),
            await store.found(key, [*range(200), *marked]),
            await store.missing(key, 0, ALL),
            await store.failures(key, ALL),
            await store.lacking(key, ALL),
            await store.rubbish(key, ALL),
        )
    return found


async def state_of(path: Path) -> tuple[bool, dict[str, Any]]:
    async with opened(path) as store:
        return await store.was_closed(), await seen(store)


IDS = ("a", "b", "c", "ä", "d/e", "")


def next_step(model: Model, choose: Choose) -> Step:  # noqa: C901, PLR0911, PLR0912
    """Choose the next step. Keys may be of what is gone; at most two collections are there at a time."""

    def some(values: Iterable[Any]) -> list[Any]:
        return [one for one in values if choose((True, False))]

    if not model.collections or (len(model.collections) == 1 and choose(range(12)) == 0):
        return Step("create", (a_collection(f"docs-{model.keys['collection']}"),))
    # The last key is often one that is gone, or was never there.
    collection = choose([*model.collections, *model.collections, model.keys["collection"] - 1])
    mine = [one for one in model.versions.values() if one.collection == collection]
    active = [one for one in mine if one.state is VersionState.ACTIVE]
    if collection in model.collections and (not mine or (len(mine) < 3 and choose(range(8)) == 0)):
        state = VersionState.BUILDING if active else VersionState.ACTIVE
        return Step("add_version", (a_version(collection, f"d{model.keys['version']}", state),))
    version = choose([*(one.key for one in mine), model.keys["version"] - 1])
    known = model.versions.get(version)
    numbers = [*range(max(1, model.keys["number"] - 12), model.keys["number"] + 1)]
    method = choose(
        ("put",) * 6
        + ("mark", "mark", "unmark", "failed", "failed", "delete", "add_rubbish", "swept")
        + ("save_backfill", "begin_backfill", "switch", "save_versions", "remove_version", "remove")
    )
    match method:
        case "put":
            names = some(IDS)
            first = model.keys["number"]
            model.allocate(len(names))
            items = [an_item(first + place, name) for place, name in enumerate(names)]
            marks = {key: some([item.number for item in items]) for key in some([version, *model.versions])}
            marks = {key: marked for key, marked in marks.items() if key in {one.key for one in mine}}
            return Step(method, (collection, items, marks, choose([one.key for one in active] or [version])))
        case "mark":
            return Step(method, (version, some(numbers), NOW + timedelta(microseconds=choose(range(9)))))
        case "unmark":
            return Step(method, (version, None if choose(range(5)) == 0 else some(numbers)))
        case "failed":
            given = (version, choose(numbers), f"why {choose(range(3))}")
            return Step(method, given, {"at_once": choose(range(4)) == 0})
        case "delete":
            return Step(method, (collection, choose(IDS)))
        case "add_rubbish" | "swept":
            return Step(method, (version, some(numbers)))
        case "save_backfill":
            return Step(method, (a_backfill(collection, version),))
        case "begin_backfill":
            return Step(method, (a_backfill(collection, version), *([known] if known else [])))
        case "switch" if (
            known in mine and known.state is VersionState.BUILDING and collection in model.collections
        ):
            threshold = choose((0.0, 0.5, 1.0))
            return Step(
                method,
                (
                    known.moved(VersionState.ACTIVE, NOW),
                    active[0].moved(VersionState.ARCHIVED, NOW) if active else None,
                    replace(model.collections[collection], asked=version),
                    lambda counts: counts.coverage >= threshold,
                ),
            )
        case "save_versions" if known in mine and not active:
            return Step(method, (replace(known, state=VersionState.ACTIVE, stale_since=NOW),))
        case "remove_version" | "remove" if choose(range(3)) == 0:
            return Step(method, (version if method == "remove_version" else collection,))
    return Step("swept", (version, []))


def steps(seed: int, model: Model) -> Callable[[], Step]:
    """Return what returns the next step, the same ones for a seed."""
    choose = random.Random(seed).choice
    return lambda: next_step(model, choose)


async def main(path: str, seed: str, first: str) -> None:
    model = Model()
    following = steps(int(seed), model)
    for _ in range(int(first)):
        model.take(following())
    store = await open_collections(Path(path))
    for done in range(int(first), sys.maxsize):
        step = following()
        assert await step.make(store) == model.take(step), step
        sys.stdout.write(f"{done + 1}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
