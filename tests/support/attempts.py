"""The parts of a `Routing` whose decisions, leases and clock belong to the test. The rest is real."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from manager.domain.breaker import BreakerLimits
from manager.domain.roles import BodyChanges, Policy, RequestKind, RoutingSettings
from manager.domain.routing import (
    Attempt,
    Candidate,
    Decision,
    Group,
    Refused,
    RequestFacts,
    Snapshot,
    State,
)
from manager.domain.target import Target
from manager.errors import Reason, UnavailableError
from manager.services.instances.leases import LeaseBook
from manager.services.lanes.slots import Slots
from manager.services.routing.attempting import Attempting, Deadlines, Routing
from manager.services.routing.breakers import Breakers
from manager.services.routing.fallback_events import FallbackEvents
from manager.services.routing.model_status import ModelStatus
from manager.services.routing.overload import Overload
from manager.services.routing.placement import Prepared
from manager.services.routing.router import Attempts
from manager.services.traffic import Traffic
from manager.services.world import Revision
from tests.support.records import a_record

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import pytest

    from manager.domain.record import RequestRecord
    from manager.domain.routing import Because, PassedOver
    from manager.services.instances.leases import Lease
    from manager.services.routing.attempting import Step

FACTS = RequestFacts("tiny", RequestKind.GENERATE)
NEVER_OPENS = BreakerLimits(failures=1_000_000)
NOBODY = Refused("unavailable", Reason.INSTANCE_UNAVAILABLE, "a has it and cannot be used now")


class Clock:
    """Monotonic seconds that pass when the test says so."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> float:
        self.now += seconds
        return self.now


class Journal:
    """Keeps the events, as (kind, instance, reason)."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str | None, Reason | None]] = []
        self.details: list[str] = []

    def record(
        self, kind: str, *, instance: str | None = None, reason: Reason | None = None, detail: str = ""
    ) -> None:
        self.events.append((kind, instance, reason))
        self.details.append(detail)

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _, _ in self.events]


class Fleet:
    """Says which models are in the memory of which instance."""

    def __init__(self) -> None:
        self.loaded: dict[str, tuple[str, ...]] = {}

    def get(self, instance: str) -> Any:
        return SimpleNamespace(
            models=tuple(SimpleNamespace(name=name) for name in self.loaded.get(instance, ()))
        )


class Router:
    """Decides what the test has written down last."""

    def __init__(self) -> None:
        self.decision = decision(attempt("a"))
        self.settings = RoutingSettings({})
        self.version = 1
        self.is_known = True
        self.waits: list[float] = []
        self.learns: Callable[[], None] = lambda: None
        self.changes: dict[tuple[str, str | None], BodyChanges] = {}
        self.load_by_instance: dict[str, int] = {}
        self.running: set[str] = set()
        self.settings = RoutingSettings({})

    def snapshot(self) -> Snapshot:
        return Snapshot(tuple(Candidate(name, None, State.READY) for name in sorted(self.running)))

    def attempts(self, facts: RequestFacts) -> Attempts:
        return Attempts(cast("Any", self), facts)

    def decide(self, _facts: RequestFacts) -> Decision:
        return self.decision

    def load(self) -> Mapping[str, int]:
        return self.load_by_instance

    def ranks(self, _decision: Decision) -> None:
        """No strategy orders anything."""

    def changes_for(self, one: Attempt) -> BodyChanges:
        return self.changes.get((one.model, one.role), BodyChanges())

    async def known(self, *, within_s: float) -> None:
        self.waits.append(within_s)
        self.learns()


class Placement:
    """Gives out leases on the instances that run; the others have to be prepared.

    `prepares` maps an instance to what becomes of that: an error, a future to wait for, or the milliseconds
    of its start. `gone` are instances that turn out to have ended.
    """

    def __init__(self, router: Router) -> None:
        self._router = router
        self.books: dict[str, LeaseBook] = {}
        self.released: list[str] = []
        self.granted: list[str] = []
        self.prepares: dict[str, Any] = {}
        self.prepared: list[dict[str, Any]] = []
        self.gone: set[str] = set()
        self.looked_for: list[str] = []
        self.silent: set[str] = set()
        self.reread: list[str] = []
        self.loading: dict[str, Any] = {}
        self.targets: dict[str, Target] = {}
        self.progress: tuple[str, ...] = ()
        self.on_cpu: list[tuple[str, str]] = []

    @property
    def held(self) -> dict[str, int]:
        """Open leases by instance, without those that have none."""
        return {name: count for name, count in self._router.load_by_instance.items() if count}

    def try_lease(self, one: Attempt) -> Lease | None:
        if one.because in ("unread", "pull", "startable") or one.instance in self.prepares:
            return None
        return self._grant(one.instance)

    async def prepare(self, one: Attempt, **said: Any) -> Prepared:
        self.prepared.append({"instance": one.instance, **said})
        for words in self.progress:
            said["tell"](words)
        outcome = self.prepares.get(one.instance)
        if isinstance(outcome, asyncio.Future):
            outcome = await outcome
        if isinstance(outcome, Exception):
            raise outcome
        return Prepared(self._grant(one.instance), outcome)

    def expect_on_cpu(self, one: Attempt) -> None:
        self.on_cpu.append((one.instance, one.model))

    async def has_gone(self, instance: str) -> bool:
        self.looked_for.append(instance)
        return instance in self.gone

    def is_silent(self, instance: str) -> bool:
        return instance in self.silent

    def reread_models(self, instance: str) -> None:
        self.reread.append(instance)

    async def still_loads(self, instance: str) -> bool:
        looks = self.loading.get(instance, False)
        if isinstance(looks, asyncio.Future):
            return cast("bool", await looks)
        return cast("bool", looks)

    def _grant(self, instance: str) -> Lease:
        book = self.books.get(instance)
        if book is None:
            counts = self._router.load_by_instance
            book = self.books[instance] = LeaseBook(instance, lambda: self.released.append(instance), counts)
        self.granted.append(instance)
        return book.grant(self.targets.get(instance) or target(instance))


class Stage:
    """One `Routing`, and what has come of its requests."""

    def __init__(
        self,
        *attempts: Attempt,
        deadlines: Deadlines | None = None,
        breaker: BreakerLimits = NEVER_OPENS,
    ) -> None:
        self.clock = Clock()
        self.router = Router()
        self.placement = Placement(self.router)
        self.fleet = Fleet()
        self.journal = Journal()
        self.ended: list[RequestRecord] = []
        self.traffic = Traffic(self.ended.append)
        self.status = ModelStatus(cast("Any", self.fleet))
        self.timers: list[Callable[[], None]] = []
        self.breakers = Breakers(
            cast("Any", self.journal),
            Revision(),
            limits=breaker,
            now=self.clock,
            utcnow=lambda: datetime(2026, 11, 28, tzinfo=UTC),
            call_later=self._call_later,
        )
        self.settings: Any = SimpleNamespace(routing=RoutingSettings({}), version=1)
        self.slots_of: dict[str, int | None] = {}
        self.slots = Slots(self.settings, lambda: dict(self.slots_of), self.status.workers, now=self.clock)
        if attempts:
            self.router.decision = decision(*attempts)
        self.overload = Overload(Revision(), now=self.clock)
        self.routing = Routing(
            router=cast("Any", self.router),
            placement=cast("Any", self.placement),
            status=self.status,
            fallbacks=FallbackEvents(cast("Any", self.journal)),
            traffic=self.traffic,
            slots=self.slots,
            puller=cast("Any", SimpleNamespace()),
            deadlines=deadlines or Deadlines(first_byte_timeout_s=60.0, total_timeout_s=600.0),
            breakers=self.breakers,
            overload=self.overload,
        )

    def _call_later(self, _delay_s: float, call: Callable[[], None]) -> Any:
        self.timers.append(call)
        return SimpleNamespace(cancel=lambda: None)

    def use_clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in ("manager.services.routing.attempting", "manager.relay.exchange"):
            monkeypatch.setattr(f"{module}.monotonic", self.clock)

    def request(self, **values: Any) -> Attempting:
        """Return a request that has just come."""
        blank = {
            "attempts": 0,
            "effective_target": None,
            "endpoint": None,
            "policy": None,
            "role": None,
            "model": "tiny",
            "status": 0,
            "ttfb_ms": None,
        }
        return Attempting(self.routing, a_record(**{**blank, **values}), self.clock())

    def sent(self, **values: Any) -> Attempting:
        """Return a request that was sent to its first target."""
        one = self.request(**values)
        step = one.enter(FACTS)
        assert isinstance(step, Target), step
        one.sent()
        return one

    def blamed(self) -> dict[tuple[str, str], int]:
        return dict(self.traffic.target_errors)


def attempt(
    instance: str,
    because: Because = "loaded",
    *,
    model: str = "tiny",
    role: str | None = None,
    fallback: Reason | None = None,
) -> Attempt:
    return Attempt(instance, model, role, because, fallback)


def decision(
    *attempts: Attempt,
    refused: Refused | None = None,
    role: str | None = None,
    policy: Policy = Policy.AUTO,
    requested_target: str | None = None,
    passed_over: tuple[PassedOver, ...] = (),
) -> Decision:
    """Return a decision for exactly these attempts, in this order."""
    groups = tuple(Group((one.instance,), *one[1:]) for one in attempts)
    return Decision(FACTS, role, policy, requested_target, groups, passed_over, refused)


def target(instance: str, *, repeatable: bool = True) -> Target:
    return Target(instance, f"http://{instance}:11434", repeatable=repeatable)


def unavailable(reason: Reason = Reason.START_FAILED, instance: str = "a", **more: Any) -> UnavailableError:
    return UnavailableError(f"{instance} cannot be started", reason=reason, instance=instance, **more)


def shown(step: Step | None) -> str | None:
    """Return what a step is, in one word."""
    if step is None:
        return None
    return step.instance if isinstance(step, Target) else type(step).__name__.lower()
