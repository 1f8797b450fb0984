"""The services of collections over the real stores, with a stand-in for what embeds."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NoReturn

from manager.adapters.collections import SqlCollections, open_collections
from manager.adapters.vectors import LanceVectors
from manager.domain.embeddings import unit_vector
from manager.errors import CollectionConflictError, NotEmbeddedError, Reason
from manager.services.embeddings.backfilling import Backfilling
from manager.services.embeddings.embedder import Embedded, Embedder, RefusedTextError, Wanted
from manager.services.embeddings.querying import Querying
from manager.services.embeddings.shelf import Shelf
from manager.services.embeddings.switching import Switching
from manager.services.embeddings.tending import Tending
from manager.services.embeddings.writing import Writing
from manager.services.requests import Origin
from manager.services.routing.whole import Asking
from tests.support.embedding_server import digest_of, vector_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

MODEL = "minilm"
BAD = "bad"
ORIGIN = Origin(None, None, "tests", None, local_only=False, trace=None, fault=None)
ASKING = Asking(ORIGIN, None, "/api/v1/collections/{name}/items")


class CrashError(BaseException):
    """The end of the process."""


class Builds:
    """Embeds as one server would. `builds` are the digests that models have.

    Attributes:
        before: called with the texts before each batch; it may wait.
        is_down: no server answers.
    """

    def __init__(self) -> None:
        self.builds = {MODEL: digest_of("first")}
        self.before: Callable[[Sequence[str]], Any] | None = None
        self.is_down = False
        self.texts: list[str] = []

    async def embed(self, wanted: Wanted, texts: Sequence[str], asking: Asking) -> Embedded:
        if self.before is not None:
            await self.before(texts)
        if self.is_down:
            raise NotEmbeddedError("no server", reason=Reason.UPSTREAM_UNREACHABLE, refused=None)
        digest = self.builds[wanted.model]
        if wanted.digest is not None and wanted.digest != digest:
            raise CollectionConflictError("version_stale", "another build")
        for at, text in enumerate(texts):
            if text.startswith(BAD):
                raise RefusedTextError("too long", at)
        self.texts += texts
        vectors = [unit_vector(vector_of(digest, wanted.prefix + text, wanted.asked or 16)) for text in texts]
        return Embedded(vectors, digest, "one", "auto")

    def digests_of(self, model: str) -> Mapping[str, tuple[str, ...]]:
        return {self.builds[model]: ("one",)} if model in self.builds else {}

    async def refresh(self) -> None:
        """Nothing is remembered that could be old."""


class Journal:
    """Takes events."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def record(self, kind: str, **_: Any) -> None:
        self.events.append(kind)


class Crashing:
    """Passes calls on, and ends the process at one of them: before it, or after it has happened."""

    def __init__(self, inner: Any, rig: Rig) -> None:
        self._inner = inner
        self._rig = rig

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not asyncio.iscoroutinefunction(found):
            return found

        async def call(*args: Any, **options: Any) -> Any:
            self._rig.step(name, is_before=True)
            result = await found(*args, **options)
            self._rig.step(name, is_before=False)
            return result

        return call


class Rig:
    """One process after the other over one directory."""

    def __init__(self, directory: Path, embeds: Builds | None = None) -> None:
        self.directory = directory
        self.embeds = embeds or Builds()
        self.journal = Journal()
        self.steps_left: int | None = None
        self.crashed = False
        self._tasks: list[asyncio.Task[Any]] = []

    async def open(self) -> None:
        self.crashed, self.steps_left = False, None
        self.store: SqlCollections = await open_collections(self.directory / "embeddings.sqlite3")
        self.tables = LanceVectors(self.directory / "vectors")
        shelf = self.shelf = Shelf(Crashing(self.store, self), Crashing(self.tables, self))
        await shelf.load()
        embeds: Embedder = self.embeds  # type: ignore[assignment]
        journal: Any = self.journal
        digests_of, refresh = self.embeds.digests_of, self.embeds.refresh
        self.tending = Tending(shelf, journal, digests_of=digests_of, refresh=refresh, utcnow=utcnow)
        self.switching = Switching(shelf, journal, digests_of=digests_of, refresh=refresh, utcnow=utcnow)
        self.writing = Writing(shelf, embeds, self.tending, digests_of=digests_of, utcnow=utcnow)
        self.querying = Querying(shelf, embeds, self.tending)
        self.backfilling = Backfilling(shelf, embeds, self.switching, self.tending, journal, utcnow=utcnow)
        loops = (self.tending.run, self.tending.follow_builds, self.backfilling.run)
        self._tasks = [asyncio.ensure_future(self._running(loop)) for loop in loops]
        await shelf.ready()

    async def _running(self, loop: Callable[[], Any]) -> None:
        try:
            await loop()
        except BaseExceptionGroup as group:
            if group.subgroup(CrashError) is None:
                raise
        except CrashError:
            return

    def step(self, name: str, *, is_before: bool) -> None:
        """End the process here if it is its time; a process that has ended does nothing more."""
        if self.crashed and is_before:
            self._crash()
        if self.steps_left is not None and not self.crashed:
            if self.steps_left == 0:
                self._crash()
            self.steps_left -= 1

    def _crash(self) -> NoReturn:
        self.crashed = True
        raise CrashError

    async def close(self, *, well: bool = True) -> None:
        """End the process; not `well`: as a crash does."""
        if not well:
            self.crashed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.tables.close()
        if well:
            await self.store.close()
        else:
            await self.store.abandon()


def utcnow() -> datetime:
    return datetime.now(UTC)
