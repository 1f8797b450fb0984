"""The requests that are under way, wherever they are served."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from manager.services.routing.attempting import Attempting


class OpenRequest(Protocol):
    """One request between its arrival and its outcome."""

    @property
    def attempting(self) -> Attempting | None:
        """Its life; None where it has not begun."""

    def cancel(self, why: str) -> None:
        """End it with the outcome `cut`, and tell its client as far as that is possible."""


class OpenRequests:
    """Finds requests in the sets that their servers keep anyway: a request costs nothing here."""

    def __init__(self) -> None:
        self._sources: list[Callable[[], Iterable[OpenRequest]]] = []

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
