"""`/api/runtime/compute/gpus/history`: the cards over the last hour or day, as columns."""

from __future__ import annotations

import asyncio
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated

import orjson
from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from manager.api.errors import refusals
from manager.domain.gpu_history import Columns
from manager.errors import UnknownGpuError
from manager.services.gpus.history import CardHistory, GpuHistory, Span

if TYPE_CHECKING:
    from array import array

    from manager.api.backend import Backend

_LONGEST_UUID = 100
_COLUMNS = tuple(one.name for one in fields(Columns) if one.name not in ("begins_s", "step_s"))


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GpuHistoryCard(_Shape):
    """One card, by columns of the same length; null is unknown, and never stands for zero.

    `times` are Unix times in seconds, each the begin of a step. `instances` has the memory of each instance
    (of the 16 largest, `*` has the others), `processes` that of foreign processes by their name (of the 8
    largest, `other` has the others).
    """

    uuid: str
    name: str
    vram_total_bytes: int | None
    times: list[int]
    used_bytes: list[int | None]
    instances: dict[str, list[int | None]]
    processes: dict[str, list[int | None]]
    utilisation_percent: list[float | None]
    temperature_c: list[float | None]
    power_watts: list[float | None]


class GpuHistoryBody(_Shape):
    """Cards that were read within the span. Beyond 5 seconds a value is the mean of its step."""

    span_s: int
    step_s: int
    gpus: list[GpuHistoryCard]


class GpuHistoryQuery(BaseModel):
    """The last hour of all cards, unless it says otherwise; `gpu` is the UUID of one."""

    model_config = ConfigDict(extra="forbid")

    span: Span = Span.HOUR
    gpu: Annotated[str, Field(max_length=_LONGEST_UUID)] | None = None


def gpu_history_router(backend: Backend) -> APIRouter:
    router = APIRouter(prefix="/api/runtime/compute", tags=["compute"])
    documents = _Documents(backend.gpu_history)

    @router.get("/gpus/history", response_model=GpuHistoryBody, responses=refusals(404))
    async def show_gpu_history(query: Annotated[GpuHistoryQuery, Query()]) -> Response:
        """Memory by instance and foreign process, utilisation, temperature and power of the cards.

        Gaps stay gaps: where nothing was read there is null.
        """
        if query.gpu is not None and not backend.gpu_history.has(query.gpu):
            raise UnknownGpuError(f"there is no GPU {query.gpu!r}, and there was none within the last day")
        return Response(await documents.of(query.span, query.gpu), media_type="application/json")

    return router


class _Documents:
    """Builds documents in a thread, and keeps those of the last samples: pages ask for the same ones.

    They are bounded by the cards of the history, each of `GpuHistoryCard`'s columns.
    """

    def __init__(self, history: GpuHistory) -> None:
        self._history = history
        self._built: dict[tuple[Span, str | None], tuple[int, bytes]] = {}
        self._building = asyncio.Lock()

    async def of(self, span: Span, uuid: str | None) -> bytes:
        async with self._building:
            version = self._history.version(span)
            known = self._built.get((span, uuid))
            if known is not None and known[0] == version:
                return known[1]
            cards = self._history.cards(span, uuid)
            document = await asyncio.to_thread(_document, span, cards)
            self._built = {
                key: one for key, one in self._built.items() if one[0] == self._history.version(key[0])
            }
            self._built[span, uuid] = version, document
            return document


def _document(span: Span, cards: list[CardHistory]) -> bytes:
    # A card at a time: the interpreter can serve others in between.
    bodies = [orjson.Fragment(_card(card)) for card in cards]
    return orjson.dumps({"span_s": span.seconds, "step_s": span.step_s, "gpus": bodies})


def _card(card: CardHistory) -> bytes:
    columns = card.columns
    count = len(columns.used_bytes)
    times = range(columns.begins_s, columns.begins_s + count * columns.step_s, columns.step_s)
    return orjson.dumps(
        {
            "uuid": card.uuid,
            "name": card.name,
            "vram_total_bytes": card.total_bytes,
            "times": list(times),
            **{name: _plain(getattr(columns, name)) for name in _COLUMNS},
        }
    )


def _plain(column: array[float] | dict[str, array[float]]) -> object:
    """Return a column as JSON can say it; orjson makes null of NaN."""
    if isinstance(column, dict):
        return {name: one.tolist() for name, one in column.items()}
    return column.tolist()
