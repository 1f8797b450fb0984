"""The JSON of `/api/v1/collections`. Times are RFC 3339 in UTC, shares go from 0 to 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool

from manager.api.collection_bodies import DEFAULT_HITS
from manager.api.schemas import Time, time_json
from manager.domain.embeddings import (
    MOST_DIMENSIONS,
    MOST_HITS,
    MOST_ID_CHARACTERS,
    MOST_ITEMS_AT_ONCE,
    MOST_PREFIX_CHARACTERS,
    MOST_TEXT_CHARACTERS,
    NAME_RULE,
    BackfillStatus,
    VersionState,
    is_collection_name,
    vector_values,
)
from manager.domain.models import MOST_NAME_LENGTH

if TYPE_CHECKING:
    from collections.abc import Sequence

    from manager.domain.embeddings import Collection, Counts, Failure, Version
    from manager.services.embeddings.backfilling import BackfillState
    from manager.services.embeddings.ports import StoredItem
    from manager.services.embeddings.querying import Answer
    from manager.services.embeddings.switching import Overview
    from manager.services.embeddings.writing import ItemVectors, Written

MOST_AT_ONCE = 100


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Query(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _collection_name(name: str) -> str:
    if not is_collection_name(name):
        raise ValueError(NAME_RULE)
    return name


_State = Literal["active", "building", "archived", "stale"]
_Model = Annotated[str, Field(min_length=1, max_length=MOST_NAME_LENGTH)]
_Prefix = Annotated[str, Field(max_length=MOST_PREFIX_CHARACTERS)]
_Dimensions = Annotated[int, Field(strict=True, ge=1, le=MOST_DIMENSIONS)]
_Share = Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)]


class CollectionRequest(_Body):
    """A new collection.

    `model` null is the model of the role `embedding`. `prefix` is put before each text, that of a query too.
    `dimensions` is what servers are asked for, null where they decide. With `truncate` a server may cut texts
    that are too long. Without `keep_text` no other version can be made of the items.
    """

    name: Annotated[
        str,
        Field(
            json_schema_extra={"pattern": r"^[a-z0-9][a-z0-9_-]*(\.[a-z0-9_-]+)*$", "maxLength": 63},
        ),
        AfterValidator(_collection_name),
    ]
    model: _Model | None = None
    prefix: _Prefix = ""
    dimensions: _Dimensions | None = None
    truncate: StrictBool = False
    keep_text: StrictBool = True


class BackfillRequest(_Body):
    """A backfill. What is left out or null is as the collection has it.

    `threshold` is the share of the items, without those in quarantine, at which it may cut over; `rate` is
    items a second at most, null for as many as the servers are free for.
    """

    model: _Model | None = None
    prefix: _Prefix | None = None
    dimensions: _Dimensions | None = None
    truncate: StrictBool | None = None
    threshold: _Share = 1.0
    rate: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] | None = None
    auto_cutover: StrictBool = False


class RollbackRequest(_Body):
    """`threshold` null is that of the last backfill of the version, else 1."""

    threshold: _Share | None = None


class CutoverRequest(RollbackRequest):
    """The version that is to be active. `threshold` null is that of its last backfill, else 1."""

    version: Annotated[str, Field(min_length=1, max_length=64)]


class ItemRequest(_Body):
    """An item: a text or a vector, not both. Its vector gets the length 1."""

    id: Annotated[str, Field(min_length=1, max_length=MOST_ID_CHARACTERS)]
    text: Annotated[str, Field(min_length=1, max_length=MOST_TEXT_CHARACTERS)] | None = None
    vector: Annotated[list[float], Field(min_length=1, max_length=MOST_DIMENSIONS)] | None = None
    metadata: dict[str, Any] | None = None


class ItemsRequest(_Body):
    """Items that are written together, in place of those with the same ids."""

    items: Annotated[list[ItemRequest], Field(min_length=1, max_length=MOST_ITEMS_AT_ONCE)]


class QueryRequest(_Body):
    """A query with a text or a vector, not both.

    `version` null is the active one. `filter` has conditions on the metadata, all of which hold:
    `{"lang": "de", "year": {"$gte": 2020}}`.
    """

    text: Annotated[str, Field(min_length=1, max_length=MOST_TEXT_CHARACTERS)] | None = None
    vector: Annotated[list[float], Field(min_length=1, max_length=MOST_DIMENSIONS)] | None = None
    k: Annotated[int, Field(ge=1, le=MOST_HITS)] = DEFAULT_HITS
    version: str | None = None
    filter: dict[str, Any] | None = None


class ItemsQuery(_Query):
    """`after` is an id: the page has the items behind it."""

    after: Annotated[str, Field(max_length=MOST_ID_CHARACTERS)] | None = None
    limit: Annotated[int, Field(ge=1, le=MOST_AT_ONCE)] = MOST_AT_ONCE


class ItemQuery(_Query):
    vector: bool = False


class CollectionBody(_Body):
    """A collection.

    `model`, `prefix`, `dimensions` and `truncate` are those of its next version. `version`, `state` and
    `coverage` are those of the active version, null before the first item. `versions` is how many there are,
    `backfill` the status of the latest one.
    """

    name: str
    model: str
    prefix: str
    dimensions: int | None
    truncate: bool
    keep_text: bool
    created_at: Time
    version: str | None
    state: _State | None
    items: int
    coverage: float | None
    versions: int
    backfill: BackfillStatus | None


class CollectionsBody(_Body):
    collections: list[CollectionBody]
    count: int


class RemovedBody(_Body):
    """The name or the id of what is no more."""

    removed: str


class WrittenBody(_Body):
    """Items that were written; `versions` have vectors of all of them, the active one first."""

    written: int
    version: str
    versions: list[str]
    embedding_model: str
    embedding_dim: int
    embedding_version: str
    created_at: Time


class _Item(_Body):
    """An item. `text` is null where it is not kept, or where the client has given a vector."""

    id: str
    text: str | None
    metadata: dict[str, Any]
    created_at: Time


class ItemsBody(_Body):
    """A page in the order of the ids; `next` is `after` for the next page, null on the last one."""

    items: list[_Item]
    count: int
    next: str | None


class ItemVersionBody(_Body):
    """A version that has a vector of an item, written at `created_at`."""

    embedding_version: str
    embedding_model: str
    embedding_dim: int
    state: _State
    created_at: Time


class ItemBody(_Item):
    """An item and the versions with a vector of it; `embedding_…` and `vector` are of the active one."""

    embedding_model: str | None
    embedding_dim: int | None
    embedding_version: str | None
    versions: list[ItemVersionBody]
    vector: list[float] | None = None


class HitBody(_Body):
    """An item that a query has found; `score` is the cosine similarity, from -1 to 1."""

    id: str
    score: float
    metadata: dict[str, Any]
    embedding_version: str


class AnswerBody(_Body):
    """The nearest items, best first, all of one version; `version` is null before the first item.

    `active` is whether it is the active one. `coverage` is the share of the items that it has vectors of.
    """

    version: str | None
    active: bool
    state: _State | None
    model: str | None
    coverage: float
    items: list[HitBody]


class VersionBody(_Body):
    """A version of a collection.

    `rows` of `items` have a vector in it, `quarantined` could not be embedded. `digest` is that of the build,
    null where no server has said it. `policy` is where the first vectors were computed.
    """

    version: str
    model: str
    digest: str | None
    dimensions: int
    prefix: str
    truncate: bool
    policy: str | None
    state: _State
    items: int
    rows: int
    quarantined: int
    coverage: float
    created_at: Time
    activated_at: Time | None
    archived_at: Time | None
    stale_since: Time | None


class FailureBody(_Body):
    """An item that could not be embedded; in quarantine it is not tried any more."""

    id: str
    attempts: int
    message: str
    quarantined: bool


class BackfillBody(_Body):
    """The latest backfill of a collection.

    `missing` items have no vector yet and are not in quarantine. `items_per_s` and `eta_s` are null where
    they are unknown, `waits_for` where it gets on. At most 100 failures are listed.
    """

    version: str | None
    model: str | None
    status: BackfillStatus
    threshold: float
    rate: float | None
    auto_cutover: bool
    items: int | None
    rows: int | None
    missing: int | None
    quarantined: int | None
    coverage: float | None
    items_per_s: float | None
    eta_s: float | None
    waits_for: str | None
    error: str | None
    started_at: Time
    ended_at: Time | None
    failures: list[FailureBody]


def collection_body(overview: Overview) -> CollectionBody:
    shelved = overview.shelved
    collection: Collection = shelved.collection
    active, backfill = shelved.active, shelved.backfill
    counts = None if active is None else overview.counts.get(active.key)
    return CollectionBody(
        name=collection.name,
        model=collection.model,
        prefix=collection.prefix,
        dimensions=collection.asked,
        truncate=collection.truncate,
        keep_text=collection.keep_text,
        created_at=collection.created_at,
        version=active and active.id,
        state=active and _state(active),
        items=overview.items,
        coverage=None if counts is None else counts.coverage,
        versions=len(shelved.versions),
        backfill=backfill and backfill.status,
    )


def version_bodies(overview: Overview) -> list[VersionBody]:
    """Return all versions, the active one first, then the newest."""
    versions = sorted(
        overview.shelved.versions.values(),
        key=lambda one: (one.state is not VersionState.ACTIVE, -one.key),
    )
    return [_version_body(one, overview.counts.get(one.key), overview.items) for one in versions]


def _version_body(version: Version, counts: Counts | None, items: int) -> VersionBody:
    recipe = version.recipe
    return VersionBody(
        version=version.id,
        model=recipe.model,
        digest=recipe.digest,
        dimensions=recipe.dimensions,
        prefix=recipe.prefix,
        truncate=recipe.truncate,
        policy=version.policy,
        state=_state(version),
        items=items if counts is None else counts.items,
        rows=0 if counts is None else counts.rows,
        quarantined=0 if counts is None else counts.quarantined,
        coverage=0.0 if counts is None else counts.coverage,
        created_at=version.created_at,
        activated_at=version.activated_at,
        archived_at=version.archived_at,
        stale_since=version.stale_since,
    )


def backfill_body(state: BackfillState, failures: Sequence[Failure]) -> BackfillBody:
    backfill, version, counts = state.backfill, state.version, state.counts
    return BackfillBody(
        version=version and version.id,
        model=version and version.recipe.model,
        status=backfill.status,
        threshold=backfill.threshold,
        rate=backfill.rate,
        auto_cutover=backfill.auto_cutover,
        items=counts and counts.items,
        rows=counts and counts.rows,
        missing=counts and counts.missing,
        quarantined=counts and counts.quarantined,
        coverage=counts and counts.coverage,
        items_per_s=state.items_per_s,
        eta_s=state.eta_s,
        waits_for=state.waits_for,
        error=backfill.error,
        started_at=backfill.started_at,
        ended_at=backfill.ended_at,
        failures=[
            FailureBody(id=one.id, attempts=one.attempts, message=one.message, quarantined=one.quarantined)
            for one in failures
        ],
    )


def written_body(written: Written) -> WrittenBody:
    active = written.versions[0]
    return WrittenBody(
        written=written.items,
        version=active.id,
        versions=[one.id for one in written.versions],
        embedding_model=active.recipe.model,
        embedding_dim=active.recipe.dimensions,
        embedding_version=active.id,
        created_at=written.at,
    )


def item_json(found: ItemVectors, vector: bytes | None, *, with_vector: bool) -> dict[str, Any]:
    """Return the values of an `ItemBody`; `metadata` is put in as it is stored."""
    active = active_of(found)
    document = _stored_json(found.item) | {
        "embedding_model": active and active.recipe.model,
        "embedding_dim": active and active.recipe.dimensions,
        "embedding_version": active and active.id,
        "versions": [
            {
                "embedding_version": version.id,
                "embedding_model": version.recipe.model,
                "embedding_dim": version.recipe.dimensions,
                "state": version.shown_state,
                "created_at": time_json(at),
            }
            for version, at in found.versions
        ],
    }
    if with_vector:
        document["vector"] = None if vector is None else vector_values(vector)
    return document


def active_of(found: ItemVectors) -> Version | None:
    """Return the active version, where it has a vector of the item."""
    return next((one for one, _ in found.versions if one.state is VersionState.ACTIVE), None)


def items_json(items: Sequence[StoredItem], limit: int) -> dict[str, Any]:
    """Return the values of an `ItemsBody`."""
    return {
        "items": [_stored_json(one) for one in items],
        "count": len(items),
        "next": items[-1].id if len(items) == limit else None,
    }


def answer_json(answer: Answer) -> dict[str, Any]:
    """Return the values of an `AnswerBody`."""
    version = answer.version
    version_id = None if version is None else version.id
    return {
        "version": version_id,
        "active": version is not None and version.state is VersionState.ACTIVE,
        "state": version and version.shown_state,
        "model": version and version.recipe.model,
        "coverage": answer.coverage,
        "items": [
            {
                "id": one.item.id,
                "score": one.score,
                "metadata": orjson.Fragment(one.item.metadata),
                "embedding_version": version_id,
            }
            for one in answer.matches
        ],
    }


def _stored_json(item: StoredItem) -> dict[str, Any]:
    return {
        "id": item.id,
        "text": item.text,
        "metadata": orjson.Fragment(item.metadata),
        "created_at": time_json(item.created_at),
    }


def _state(version: Version) -> Any:
    return version.shown_state
