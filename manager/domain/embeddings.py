"""Collections of vectors, the versions of their embeddings, and the move from one version to the next.

A version is one way to make vectors: the build of the model, the dimension, the prefix, truncation and
normalisation. Vectors of two versions are never comparable, so each version has a table of its own, and a
query reads one table.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from array import array
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

# Bounds of what clients send.
MOST_COLLECTIONS = 1000
MOST_VERSIONS = 16
MOST_ITEMS_AT_ONCE = 1000
MOST_HITS = 1000
MOST_ID_CHARACTERS = 512
MOST_TEXT_CHARACTERS = 100_000
MOST_METADATA_BYTES = 16 * 1024
MOST_DIMENSIONS = 8192
MOST_PREFIX_CHARACTERS = 1000
# An item that failed so often in a backfill is put into quarantine.
MOST_FAILURES = 3
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9_-]|\.(?!\.)){0,62}")
_ID_CHARACTERS = 16
_FLOAT_BYTES = 4
# A shorter vector may have a length that is inexact: floats below 1e-308 have fewer digits.
_SAFE_LENGTH = 1e-290


def is_collection_name(name: str) -> bool:
    """Return whether a collection can have this name, which is one segment of a path."""
    return _NAME.fullmatch(name) is not None and not name.endswith(".")


NAME_RULE: Final = (
    "expected up to 63 of a-z, 0-9, `-`, `_` and single dots, with a letter or digit first and no dot last"
)


class VersionState(StrEnum):
    """The state of a version. Queries read the `active` one unless they name another.

    `building` gets vectors by a backfill and by every write; `archived` gets none.
    """

    BUILDING = "building"
    ACTIVE = "active"
    ARCHIVED = "archived"


STALE: Final = "stale"
_NEXT: Mapping[VersionState, frozenset[VersionState]] = MappingProxyType(
    {
        VersionState.BUILDING: frozenset({VersionState.ACTIVE, VersionState.ARCHIVED}),
        VersionState.ACTIVE: frozenset({VersionState.ARCHIVED}),
        VersionState.ARCHIVED: frozenset({VersionState.BUILDING, VersionState.ACTIVE}),
    }
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that the vectors of one version have in common.

    Attributes:
        model: its name.
        digest: of the build; None where no server has said it, and only vectors from outside are taken.
        dimensions: the length of each vector.
        prefix: is put before each text.
        truncate: whether the server may cut texts that are too long; otherwise they are errors.
        asked: the number of dimensions that the server is asked for; None: it is not asked.
    """

    model: str
    digest: str | None
    dimensions: int
    prefix: str = ""
    truncate: bool = False
    asked: int | None = None

    @property
    def id(self) -> str:
        """The version: 16 hexadecimal digits of a SHA-256.

        It covers digest, dimension, prefix, truncation and normalisation. The name of the model counts only
        where there is no digest. Where the vectors were computed does not count.
        """
        named = {"digest": self.digest} if self.digest is not None else {"model": self.model}
        facts = {
            **named,
            "dimensions": self.dimensions,
            "prefix": self.prefix,
            "truncate": self.truncate,
            "normalised": True,
        }
        text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:_ID_CHARACTERS]


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a collection. `key` names its table, and is never used again.

    `stale_since` is when its build of the model was found replaced by another one, None where it was not.
    `policy` is where the first vectors were computed: it is recorded and no part of the identity.
    """

    key: int
    collection: int
    recipe: Recipe
    state: VersionState
    created_at: datetime
    activated_at: datetime | None = None
    archived_at: datetime | None = None
    stale_since: datetime | None = None
    policy: str | None = None

    @property
    def id(self) -> str:
        return self.recipe.id

    @property
    def shown_state(self) -> str:
        """The state for clients: an active or building version that is stale is `stale`."""
        if self.stale_since is not None and self.state is not VersionState.ARCHIVED:
            return STALE
        return self.state.value

    def moved(self, state: VersionState, at: datetime) -> Version:
        """Return the version in another state.

        Raises:
            ValueError: that state cannot follow.
        """
        if state not in _NEXT[self.state]:
            raise ValueError(f"{self.id} is {self.state.value}: it cannot become {state.value}")
        if state is VersionState.ACTIVE:
            return replace(self, state=state, activated_at=at, archived_at=None)
        return replace(self, state=state, archived_at=at if state is VersionState.ARCHIVED else None)


@dataclass(frozen=True, slots=True)
class Collection:
    """A collection. The values are for its next version; each version has its own.

    Attributes:
        key: of the store; never used again.
        name: as clients say it.
        model: the model whose vectors it has.
        prefix: is put before each text, also before the text of a query.
        asked: the number of dimensions that servers are asked for, None where they decide.
        truncate: see `Recipe`.
        keep_text: whether texts are stored. Without them no other version can be made of the items.
        created_at: when it was made.
    """

    key: int
    name: str
    model: str
    prefix: str
    asked: int | None
    truncate: bool
    keep_text: bool
    created_at: datetime


class Counts(NamedTuple):
    """The items of a collection, those that a version has vectors of, and those in quarantine there."""

    items: int
    rows: int
    quarantined: int = 0

    @property
    def coverage(self) -> float:
        """The share of the items that have a vector, from 0 to 1; 1 exactly where all have one."""
        return self.rows / self.items if self.items else 1.0

    @property
    def missing(self) -> int:
        """The items that have no vector and are not in quarantine."""
        return self.items - self.rows - self.quarantined

    def reaches(self, threshold: float) -> bool:
        """Return whether the share of the items that are not in quarantine is large enough to cut over.

        A collection whose items are all in quarantine has nothing to cut over to.
        """
        wanted = self.items - self.quarantined
        if wanted == 0:
            return self.items == 0
        # As it is written: 19 of 20 reach 0.95, whatever a product of floats says.
        return self.rows >= wanted * Fraction(str(threshold))


class BackfillStatus(StrEnum):
    """The status of a backfill."""

    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    CANCELLED = "cancelled"
    FAILED = "failed"


OPEN: Final = frozenset({BackfillStatus.RUNNING, BackfillStatus.PAUSED})
_FOLLOWING: Mapping[BackfillStatus, frozenset[BackfillStatus]] = MappingProxyType(
    {
        BackfillStatus.RUNNING: frozenset(BackfillStatus) - {BackfillStatus.RUNNING},
        BackfillStatus.PAUSED: frozenset({BackfillStatus.RUNNING, BackfillStatus.CANCELLED}),
        BackfillStatus.SUCCEEDED: frozenset(),
        BackfillStatus.CANCELLED: frozenset(),
        BackfillStatus.FAILED: frozenset(),
    }
)


@dataclass(frozen=True, slots=True)
class Backfill:
    """The latest backfill of a collection, as it is stored.

    Attributes:
        collection: its key.
        version: the key of the version that it fills.
        status: see `BackfillStatus`.
        threshold: the share at which it may cut over.
        rate: items a second at most; None: as fast as the servers are free.
        auto_cutover: whether the version becomes active at the end.
        project: of the requests.
        lane: that the client has named, None where it has not.
        started_at: when it began.
        ended_at: when it ended.
        error: why it failed, or why it did not cut over.
    """

    collection: int
    version: int
    status: BackfillStatus
    threshold: float
    rate: float | None
    auto_cutover: bool
    project: str
    started_at: datetime
    ended_at: datetime | None = None
    error: str | None = None

    @property
    def is_open(self) -> bool:
        return self.status in OPEN

    def moved(self, status: BackfillStatus, at: datetime, error: str | None = None) -> Backfill:
        """Return the backfill in another status.

        Raises:
            ValueError: that status cannot follow.
        """
        if status not in _FOLLOWING[self.status]:
            raise ValueError(f"the backfill is {self.status.value}: it cannot become {status.value}")
        return replace(self, status=status, ended_at=None if status in OPEN else at, error=error)


class Failure(NamedTuple):
    """An item that a backfill could not embed."""

    id: str
    attempts: int
    message: str
    quarantined: bool


def unit_vector(values: Sequence[float]) -> bytes:
    """Return a vector of length 1 in the same direction, as little-endian float32.

    Raises:
        ValueError: it has no direction, or a value that is no finite number.
    """
    if not all(kind is not bool and issubclass(kind, int | float) for kind in set(map(type, values))):
        raise ValueError("expected numbers")
    try:
        length = math.hypot(*values)
    except OverflowError:
        raise ValueError("expected finite numbers") from None
    if not _SAFE_LENGTH < length < 1 / _SAFE_LENGTH:
        largest = max(map(abs, values), default=0.0)
        if not all(map(math.isfinite, values)):
            raise ValueError("expected finite numbers")
        if largest == 0.0:
            raise ValueError("a vector of zeros has no direction, and cannot be compared")
        # The length itself may be too large for a float, or so small that it is inexact.
        values = [value / largest for value in values]
        length = math.hypot(*values)
    floats = array("f", [value / length for value in values])
    if sys.byteorder != "little":  # pragma: no cover
        floats.byteswap()
    return floats.tobytes()


def dimensions_of(vector: bytes) -> int:
    """Return the number of values of a packed vector."""
    return len(vector) // _FLOAT_BYTES


def vector_values(vector: bytes) -> list[float]:
    """Return the values of a packed vector."""
    floats = array("f")
    floats.frombytes(vector)
    if sys.byteorder != "little":  # pragma: no cover
        floats.byteswap()
    return floats.tolist()
