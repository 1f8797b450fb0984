"""Leases: the proof that an instance is in use. Granted and released on the event loop, hence atomically."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager.domain.target import Target


class Run:
    """One run of an instance's server. `cut` is why it was ended under its leases, None while it was not."""

    __slots__ = ("cut",)

    def __init__(self) -> None:
        self.cut: str | None = None


class Lease:
    """The right to use an instance until `release`, which counts once however often it is called.

    Also a context manager: leaving it releases.
    """

    __slots__ = ("_give_back", "_run", "target")

    def __init__(self, target: Target, give_back: Callable[[], None], run: Run | None = None) -> None:
        self.target = target
        self._run = run
        self._give_back: Callable[[], None] | None = give_back

    @property
    def instance(self) -> str:
        return self.target.instance

    @property
    def endpoint(self) -> str:
        return self.target.endpoint

    @property
    def cut(self) -> str | None:
        """The reason why the instance was ended under this lease; None while it was not."""
        return None if self._run is None else self._run.cut

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
        instance: its id.
        on_release: called after each release.
        counts: open leases by instance; the count of this one is kept there, for readers that compare many.
    """

    def __init__(self, instance: str, on_release: Callable[[], None], counts: dict[str, int]) -> None:
        self._instance = instance
        self._on_release = on_release
        self._counts = counts
        self._run = Run()
        counts[instance] = 0

    @property
    def in_flight(self) -> int:
        return self._counts[self._instance]

    def grant(self, target: Target) -> Lease:
        self._counts[self._instance] += 1
        return Lease(target, self._take_back, self._run)

    def cut(self, why: str) -> None:
        """Mark all open leases: what they lead to is being ended."""
        self._run.cut = why
        self._run = Run()

    def _take_back(self) -> None:
        self._counts[self._instance] -= 1
        self._on_release()
