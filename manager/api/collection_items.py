"""`/api/v1/collections/{name}/items` and `/query`: items are written, read, removed and found."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import unquote_to_bytes

import orjson
from fastapi import APIRouter, Depends, Query, Request, Response

from manager.api.collection_bodies import MOST_QUERY_BYTES, read_items, read_query
from manager.api.collection_schemas import (
    AnswerBody,
    ItemBody,
    ItemQuery,
    ItemsBody,
    ItemsQuery,
    ItemsRequest,
    QueryRequest,
    RemovedBody,
    WrittenBody,
    active_of,
    answer_json,
    item_json,
    items_json,
    written_body,
)
from manager.api.compute import NoQuery  # noqa: TC001  (FastAPI reads annotations at run time)
from manager.api.errors import refusals
from manager.api.submitted import HeldBody, asking_of, invalid, refuse_other_types
from manager.errors import NotInstalledError
from manager.services.embeddings.shelf import HOW_TO_INSTALL

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeVar

    from fastapi.params import Depends as Needed
    from pydantic import BaseModel

    from manager.api.backend import Backend

    Read = TypeVar("Read")

PATH = "/api/v1/collections"
_ITEMS = f"{PATH}/{{name}}/items"
_QUERY = f"{PATH}/{{name}}/query"
_SMALL_BYTES = 16 * 1024
# What the gateway says of texts that it cannot have embedded (`wire.statuses`), and collections beside that.
EMBEDS = (400, 402, 404, 409, 429, 501, 502, 503, 504)


def most_body_bytes(backend: Backend, path: str) -> int | None:
    """Return how large a body may be; None where it is as for any path.

    Args:
        backend: the running daemon.
        path: in its normal form, decoded.
    """
    if not path.startswith(f"{PATH}/"):
        return None
    _, _, last = path[len(PATH) + 1 :].partition("/")
    if last == "items":
        return backend.passing.limits.most_body_bytes
    return min(MOST_QUERY_BYTES, backend.passing.limits.most_body_bytes) if last == "query" else None


def needs_extra(backend: Backend) -> Sequence[Needed]:
    """For a router: what comes before its routes. Without the extra `embeddings` they answer 501."""

    async def installed() -> None:
        if not backend.collections.shelf.is_installed:
            raise NotInstalledError(HOW_TO_INSTALL)

    return [Depends(installed)]


def collection_items_router(backend: Backend) -> APIRouter:
    router = APIRouter(prefix=PATH, tags=["collections"], dependencies=needs_extra(backend))
    parts = backend.collections

    @router.put(
        "/{name}/items",
        response_model=WrittenBody,
        responses=refusals(*EMBEDS),
        openapi_extra=_described(ItemsRequest),
    )
    async def put_items(name: str, request: Request, _query: Annotated[NoQuery, Query()]) -> Response:
        """Write items in place of those with the same ids: all of them or, where one is refused, none.

        Texts are embedded as any request is, with role, policy, lane and failover. An id is a segment of a
        path, percent-encoded: it has no control characters, and is not `.` or `..`.
        """
        parts.shelf.get(name)  # a body for a collection that is not there is not read
        held = HeldBody(backend.passing.bodies)
        try:
            items = await _read(request, held, read_items)
            written = await parts.writing.put(name, items, asking_of(backend, request, _ITEMS))
        finally:
            held.give_back()
        return json_answer(written_body(written))

    @router.get("/{name}/items", response_model=ItemsBody, responses=refusals(404, 501, 503))
    async def list_items(name: str, query: Annotated[ItemsQuery, Query()]) -> Response:
        """A page of the items in the order of their ids."""
        page = await parts.writing.page(name, query.after, query.limit)
        size = sum(len(one.text or "") + len(one.metadata) for one in page)
        return await _dumped(items_json(page, query.limit), size)

    @router.get("/{name}/items/{item_id}", response_model=ItemBody, responses=refusals(404, 501, 503))
    async def show_item(
        name: str, item_id: str, request: Request, query: Annotated[ItemQuery, Query()]
    ) -> Response:
        """One item, with the vector of the active version if that is asked for."""
        found = await parts.writing.item(name, _item_id(request, item_id))
        active, vector = active_of(found), None
        if query.vector and active is not None:
            vector = await parts.writing.vector(active, found.item.number)
        size = len(found.item.text or "") + len(found.item.metadata) + len(vector or b"")
        return await _dumped(item_json(found, vector, with_vector=query.vector), size)

    @router.delete("/{name}/items/{item_id}", response_model=RemovedBody, responses=refusals(404, 501, 503))
    async def remove_item(
        name: str, item_id: str, request: Request, _query: Annotated[NoQuery, Query()]
    ) -> Response:
        """Remove an item from all versions."""
        item_id = _item_id(request, item_id)
        await parts.writing.delete(name, item_id)
        return json_answer(RemovedBody(removed=item_id))

    @router.post(
        "/{name}/query",
        response_model=AnswerBody,
        responses=refusals(*EMBEDS),
        openapi_extra=_described(QueryRequest),
    )
    async def query_collection(name: str, request: Request, _query: Annotated[NoQuery, Query()]) -> Response:
        """The items whose vectors are nearest: of the active version, or of the one that is named."""
        parts.shelf.get(name)
        held = HeldBody(backend.passing.bodies)
        try:
            wanted = await _read(request, held, read_query)
        finally:
            held.give_back()
        answer = await parts.querying.query(name, wanted, asking_of(backend, request, _QUERY))
        return await _dumped(answer_json(answer), sum(len(one.item.metadata) for one in answer.matches))

    return router


def _described(model: type[BaseModel]) -> dict[str, Any]:
    """For the description of a route that reads its body itself."""
    # Types of the model are described inside of it: references would point to nothing.
    schema = model.model_json_schema()
    types = schema.pop("$defs", {})
    text = orjson.dumps(schema)
    for name, inner in types.items():
        text = text.replace(orjson.dumps({"$ref": f"#/$defs/{name}"}), orjson.dumps(inner))
    content = {"application/json": {"schema": orjson.loads(text)}}
    return {"requestBody": {"required": True, "content": content}}


async def _read(request: Request, held: HeldBody, read: Callable[[bytes], Read]) -> Read:
    refuse_other_types(request)
    raw = await held.read(request)
    return read(raw) if len(raw) <= _SMALL_BYTES else await asyncio.to_thread(read, raw)


def _item_id(request: Request, matched: str) -> str:
    """Return the id in the path of a request, which the route has matched with its slashes escaped.

    Raises:
        InvalidRequestError: it is not UTF-8.
    """
    raw: bytes = request.scope["raw_path"]
    try:
        return unquote_to_bytes(raw.rpartition(b"/")[2]).decode()
    except UnicodeDecodeError:
        raise invalid("path.item_id", f"{matched[:64]!r}; expected text in UTF-8, percent-encoded") from None


async def _dumped(document: dict[str, Any], size: int) -> Response:
    """Return an answer that has about `size` bytes."""
    text = orjson.dumps(document) if size <= _SMALL_BYTES else await asyncio.to_thread(orjson.dumps, document)
    return raw_answer(text)


def raw_answer(text: bytes | str, status: int = 200) -> Response:
    return Response(text, status_code=status, media_type="application/json")


def json_answer(body: BaseModel, status: int = 200) -> Response:
    return raw_answer(body.model_dump_json(), status)
