"""Conversations and the instances that have them in memory: a later request is answered sooner there."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_CONVERSATIONS = 4096
# Between one and two: an instance is preferred while it has at most one request more than the least busy.
_HEAD_START = 1.5


class Affinity:
    """Owns which instance a conversation was on last. The one that was not seen for longest is forgotten."""

    def __init__(self) -> None:
        self._places: OrderedDict[int, str] = OrderedDict()

    def find(self, conversation: int) -> str | None:
        """Return the instance that a conversation was on last; None where that is not known."""
        return self._places.get(conversation)

    def note(self, conversation: int, instance: str) -> None:
        """A request of a conversation goes to an instance."""
        self._places[conversation] = instance
        self._places.move_to_end(conversation)
        if len(self._places) > MOST_CONVERSATIONS:
            self._places.popitem(last=False)


class LeaningLoad:
    """Requests in flight by instance, as if the preferred one had fewer."""

    __slots__ = ("_load", "_preferred")

    def __init__(self, load: Mapping[str, int], preferred: str) -> None:
        self._load = load
        self._preferred = preferred

    def __getitem__(self, instance: str) -> float:
        count = self._load[instance]
        return count - _HEAD_START if instance == self._preferred else count
