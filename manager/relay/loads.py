"""Requests that wait for the same model to be loaded share that load, clients that left included."""

from __future__ import annotations

from collections import defaultdict
from typing import Protocol


class Waiting(Protocol):
    """A request that waits for a load. `is_left` is whether its client has gone."""

    is_left: bool

    def give_up(self) -> None:
        """End the request: its client has left, and so have all that waited for the same load."""


class LoadWaits:
    """Owns which requests wait for which load, by instance and model.

    To cancel a request can cancel the load that others wait for. A request whose client has left goes on
    while another client waits for the same load.
    """

    def __init__(self) -> None:
        self._waiting: defaultdict[tuple[str, str], set[Waiting]] = defaultdict(set)

    def add(self, request: Waiting, load: tuple[str, str]) -> None:
        self._waiting[load].add(request)

    def remove(self, request: Waiting, load: tuple[str, str]) -> None:
        """The request waits no longer. End the others where all their clients have left."""
        waiting = self._waiting.get(load)
        if waiting is None:
            return
        waiting.discard(request)
        if all(other.is_left for other in waiting):
            self._waiting.pop(load, None)
            for other in waiting:
                other.give_up()

    def others_wait(self, request: Waiting, load: tuple[str, str]) -> bool:
        """Whether another client that is still there waits for the same load."""
        return any(other is not request and not other.is_left for other in self._waiting.get(load, ()))
