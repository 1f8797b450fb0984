"""Leases: the proof that an instance is in use. Given out and taken back on the event loop, so atomically."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable


class Lease:
    """The right to use an instance until `release`, which counts once however often it is called.

    Also a context manager: leaving it releases.
    """

    __slots__ = ("_give_back", "endpoint", "instance")

    def __init__(self, instance: str, endpoint: str, give_back: Callable[[], None]) -> None:
        self.instance = instance
        self.endpoint = endpoint
        self._give_back: Callable[[], None] | None = give_back

    def release(self) -> None:
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class LeaseBook:
    """Counts the open leases of one instance.

    Args:
        instance: whose they are.
        on_release: told of each that was given back.
        counts: where the count is kept, by instance: whoever compares many of them reads them there.
    """

    def __init__(self, instance: str, on_release: Callable[[], None], counts: dict[str, int]) -> None:
        self._instance = instance
        self._on_release = on_release
        self._counts = counts
        counts[instance] = 0

    @property
    def in_flight(self) -> int:
        return self._counts[self._instance]

    def grant(self, endpoint: str) -> Lease:
        self._counts[self._instance] += 1
        return Lease(self._instance, endpoint, self._take_back)

    def _take_back(self) -> None:
        self._counts[self._instance] -= 1
        self._on_release()
