"""The requests that are under way, wherever they are served."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from manager.domain.explanation import request_sentence
from manager.domain.history import Filters, decision_values, record_values
from manager.domain.record import with_defaults

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from manager.services.routing.attempting import Attempting

# A list has so many of them at most.
MOST_LISTED = 1000
_CANCELLED = "the operator has cancelled the request"


class OpenRequest(Protocol):
    """One request between its arrival and its outcome."""

    @property
    def attempting(self) -> Attempting | None:
        """Its life; None where it has not begun."""

    def cancel(self, why: str) -> None:
        """End it with the outcome `cut`, and tell its client as far as that is possible."""


class RequestsElsewhere(Protocol):
    """Open requests of another daemon. Each call has a time-out, after which there are none."""

    async def listed(self, filters: Filters) -> list[dict[str, Any]]:
        """As `OpenRequests.listed_here`."""

    async def shown(self, request_id: str) -> dict[str, Any] | None:
        """As `OpenRequests.shown_here`."""

    async def cancel(self, request_id: str) -> bool:
        """As `OpenRequests.cancel_here`."""


class OpenRequests:
    """Finds requests in the sets that their servers keep anyway: a request costs nothing here.

    Attributes:
        elsewhere: those of the daemon that this one has replaced; None where there is none.
    """

    def __init__(self) -> None:
        self._sources: list[Callable[[], Iterable[OpenRequest]]] = []
        self.elsewhere: RequestsElsewhere | None = None

    def add(self, source: Callable[[], Iterable[OpenRequest]]) -> None:
        """Look at these too."""
        self._sources.append(source)

    def __iter__(self) -> Iterator[tuple[OpenRequest, Attempting]]:
        """Yield each request that has begun, with its life."""
        for source in self._sources:
            for one in tuple(source()):
                attempting = one.attempting
                if attempting is not None:
                    yield one, attempting

    def find(self, request_id: str) -> tuple[OpenRequest, Attempting] | None:
        """Return the request of that id; None where none is open."""
        found = (pair for pair in self if pair[1].record.request_id == request_id)
        return next(found, None)

    def listed_here(self, filters: Filters) -> Iterator[dict[str, Any]]:
        """Yield the records of those that are wanted, newest first, at most `MOST_LISTED`."""
        wanted = [one for _, one in self if filters.match(one.record)]
        wanted.sort(key=lambda one: one.began_at, reverse=True)
        return map(open_json, wanted[:MOST_LISTED])

    def shown_here(self, request_id: str) -> dict[str, Any] | None:
        """Return the record of that id with its decision and a summary; None where none is open."""
        found = self.find(request_id)
        if found is None:
            return None
        attempting = found[1]
        record, decision = open_json(attempting), decision_values(attempting.seen, is_open=True)
        waits_for = None if attempting.is_delivered else attempting.waits_for
        summary = request_sentence(record, decision, is_open=True, waits_for=waits_for)
        return {**record, "decision": decision, "summary": summary}

    def cancel_here(self, request_id: str) -> bool:
        """Cancel the request of that id; False where none is open."""
        found = self.find(request_id)
        if found is not None:
            found[0].cancel(_CANCELLED)
        return found is not None

    async def listed(self, filters: Filters) -> list[dict[str, Any]]:
        """As `listed_here`, then those of the daemon that was replaced: they began before."""
        found = [*self.listed_here(filters)]
        return found if self.elsewhere is None else [*found, *await self.elsewhere.listed(filters)]

    async def shown(self, request_id: str) -> dict[str, Any] | None:
        """As `shown_here`, also for those of the daemon that was replaced."""
        found = self.shown_here(request_id)
        return found if found or self.elsewhere is None else await self.elsewhere.shown(request_id)

    async def cancel(self, request_id: str) -> bool:
        """As `cancel_here`, also for those of the daemon that was replaced."""
        found = self.cancel_here(request_id)
        return found if found or self.elsewhere is None else await self.elsewhere.cancel(request_id)

    async def cut(self, key: str, why: str) -> int:
        """Cancel the requests of a key, also those of the daemon that was replaced; return how many."""
        found = [one for one, attempting in self if attempting.record.key == key]
        for one in found:
            one.cancel(why)
        count = len(found)
        if self.elsewhere is not None:
            for record in await self.elsewhere.listed(Filters(key=key)):
                count += await self.elsewhere.cancel(record["request_id"])
        return count


def open_json(attempting: Attempting) -> dict[str, Any]:
    """Return the record of an open request, without an outcome."""
    values = with_defaults(record_values(attempting.record))
    duration_ms = (monotonic() - attempting.began_at) * 1000
    return {"open": True, **values, "outcome": None, "duration_ms": round(duration_ms, 3)}
