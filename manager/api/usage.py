"""`/api/v1/usage`: what requests have used, by project, key, role, model, instance and day."""

from __future__ import annotations

import asyncio
import csv
import io
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, get_args

import orjson
from fastapi import APIRouter, Query
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.responses import Response

from manager.api.errors import refusals, text
from manager.api.moments import MomentText, moment
from manager.domain.money import in_usd, micro_usd, usd_text
from manager.domain.usage import DIMENSIONS, Dimension, Span, Sums
from manager.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from manager.api.backend import Backend

_DEFAULT_SPAN = timedelta(days=30)
_MOST_ROWS = 10_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ALLOWED = ", ".join(DIMENSIONS)
# A program that opens CSV as a sheet takes a cell that begins with one of these for a formula
# (https://owasp.org/www-community/attacks/CSV_Injection).
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class UsageNumbers(_Shape):
    """The sums of some requests. `share` is their part of all requests, 0 to 1.

    The times are of requests that were answered, null where none was; percentiles are off by 9 % at most.
    """

    requests: int
    share: float
    ok: int
    fallbacks: int
    input_tokens: int
    output_tokens: int
    cost_usd: float
    mean_ms: float | None
    p50_ms: float | None
    p95_ms: float | None


class UsageRow(UsageNumbers):
    """One group; it has the keys of `by` alone. An empty text stands for none."""

    project: str | None = None
    key: str | None = None
    role: str | None = None
    model: str | None = None
    instance: str | None = None
    day: str | None = None
    hour: str | None = None


class UsageBody(_Shape):
    """`from` and `to` are the time that the sums are of: it is widened to whole hours.

    Hours are kept for 100 days: by `hour`, an earlier time is left out.

    `more` rows, those with the fewest requests, were left out.
    """

    begins: Annotated[str, Field(alias="from")]
    ends: Annotated[str, Field(alias="to")]
    by: list[Dimension]
    rows: list[UsageRow]
    more: int
    total: UsageNumbers


def _dimensions(text: str) -> str:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in get_args(Dimension):
            raise ValueError(f"{name!r} is unknown; expected some of {_ALLOWED}, with commas between them")
    if len(set(names)) < len(names):
        raise ValueError(f"{text!r} names one of them twice")
    return ",".join(names)


class UsageQuery(BaseModel):
    """The last 30 days where no time is given; `from` and `to` are times, or spans before now."""

    model_config = ConfigDict(extra="forbid")

    begins: Annotated[MomentText | None, Field(alias="from")] = None
    ends: Annotated[MomentText | None, Field(alias="to")] = None
    by: Annotated[str, Field(max_length=100), AfterValidator(_dimensions)] = "project"
    format: Literal["json", "csv"] = "json"


def usage_router(backend: Backend) -> APIRouter:
    router = APIRouter(prefix="/api/v1/usage", tags=["accounts"])

    @router.get("", response_model=UsageBody, responses={200: text("text/csv"), **refusals(503)})
    async def show_usage(query: Annotated[UsageQuery, Query()]) -> Response:
        """The usage of the requests that ended in a time, the groups with the most requests first."""
        now = datetime.now(UTC)
        begins, ends = time_of(query, now, _DEFAULT_SPAN)
        by: list[Any] = query.by.split(",")
        sums, span = await read_usage(backend, begins, ends, by, now=now)
        # There may be many groups, and each has its percentiles.
        document = await asyncio.to_thread(_document, sums, span, by)
        if query.format == "csv":
            disposition = {"Content-Disposition": 'attachment; filename="usage.csv"'}
            table = await asyncio.to_thread(_csv, document)
            return Response(table, media_type="text/csv; charset=utf-8", headers=disposition)
        return Response(await asyncio.to_thread(orjson.dumps, document), media_type="application/json")

    return router


class HasTime(Protocol):
    """A query with a time. Both are times, or spans before now."""

    @property
    def begins(self) -> str | None: ...
    @property
    def ends(self) -> str | None: ...


def time_of(query: HasTime, now: datetime, usual: timedelta) -> tuple[datetime, datetime]:
    """Return the time that a query is about: the last `usual` one where it does not say.

    Raises:
        InvalidRequestError: it ends before it begins.
    """
    ends = now if query.ends is None else moment(query.ends)
    if query.begins is None:
        # Nothing is older than the epoch.
        return max(ends, _EPOCH + usual) - usual, max(ends, _EPOCH)
    begins = moment(query.begins)
    if begins >= ends:
        raise _inverted(begins, ends)
    return begins, ends


async def read_usage(
    backend: Backend, begins: datetime, ends: datetime, by: Sequence[Dimension], *, now: datetime
) -> tuple[Mapping[tuple[str, ...], Sums], Span]:
    """Return the sums of a time by group, the requests that have just ended too, and the time as widened.

    Raises:
        RegistryUnwritableError: they cannot be read.
    """
    await backend.history.flush()
    wanted = Span(_second(begins), _second(ends))
    return await backend.history.store.usage(wanted, by, now_s=int(now.timestamp()))


def _inverted(begins: datetime, ends: datetime) -> InvalidRequestError:
    given, latest = (at.isoformat(timespec="seconds") for at in (begins, ends))
    message = f"{given}; expected a time before `to`, {latest}"
    return InvalidRequestError(
        f"query.from: {message}", details={"fields": [{"field": "query.from", "message": message}]}
    )


def _second(at: datetime) -> int:
    return max(0, int(at.timestamp()))


def _document(sums: Mapping[tuple[str, ...], Sums], span: Span, by: Sequence[Dimension]) -> dict[str, Any]:
    total = Sums()
    for one in sums.values():
        total.add(one)
    ordered = sorted(sums.items(), key=lambda item: (-item[1].requests, item[0]))
    return {
        "from": _time(span.begins),
        "to": _time(span.ends),
        "by": list(by),
        "rows": [
            {**dict(zip(by, names, strict=True)), **numbers(one, total)}
            for names, one in ordered[:_MOST_ROWS]
        ],
        "more": max(0, len(ordered) - _MOST_ROWS),
        "total": numbers(total, total),
    }


def numbers(sums: Sums, total: Sums) -> dict[str, Any]:
    """Return the values of a `UsageNumbers`."""
    return {
        "requests": sums.requests,
        "share": round(sums.requests / total.requests, 6) if total.requests else 0.0,
        "ok": sums.ok,
        "fallbacks": sums.fallbacks,
        "input_tokens": sums.input_tokens,
        "output_tokens": sums.output_tokens,
        "cost_usd": in_usd(sums.cost_micro_usd),
        "mean_ms": _rounded(sums.mean_ms),
        "p50_ms": _rounded(sums.percentile_ms(0.5)),
        "p95_ms": _rounded(sums.percentile_ms(0.95)),
    }


def _rounded(value_ms: float | None) -> float | None:
    return None if value_ms is None else round(value_ms, 1)


def _time(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _csv(document: Mapping[str, Any]) -> str:
    columns = [*document["by"], *UsageNumbers.model_fields]
    sheet = io.StringIO()
    writer = csv.writer(sheet)
    writer.writerow(columns)
    for row in document["rows"]:
        writer.writerow([_cell(column, row[column]) for column in columns])
    return sheet.getvalue()


def _cell(column: str, value: Any) -> object:
    if column == "cost_usd":
        return usd_text(micro_usd(value))
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
