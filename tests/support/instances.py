"""Instances, their fleet and its router as routing sees them: real but for the containers and the servers."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from manager.domain.breaker import BreakerLimits
from manager.domain.instance import DeviceKind, Driver, InstanceSpec, Limits, Phase
from manager.domain.roles import RequestKind, RoutingSettings
from manager.domain.target import Target
from manager.errors import UnknownInstanceError
from manager.services.instances.leases import LeaseBook
from manager.services.models.model_lists import ModelLists
from manager.services.routing.breakers import Breakers
from manager.services.routing.overload import Overload
from manager.services.routing.placement import Placement
from manager.services.routing.router import Router
from manager.services.world import Revision
from tests.support.attempts import Clock, Journal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping

    from manager.domain.drained import Drained
    from manager.domain.instance import Explanation
    from manager.services.instances.instance import Effort
    from manager.services.instances.leases import Lease

LIMITS = Limits(900, 300, 30, 60, 2, 15, 20)


class FakeInstance:
    """One instance; its attributes say how it is. `starts` are errors that the next starts end with."""

    def __init__(self, fleet: FakeFleet, name: str, **spec: Any) -> None:
        device = spec.pop("device", DeviceKind.CPU)
        self.id = name
        self.spec = InstanceSpec(name, Driver.EXTERNAL, device, LIMITS, url=f"http://{name}", **spec)
        self.endpoint: str | None = f"http://{name}"
        self.phase = Phase.READY
        self.explanation: Explanation | None = None
        self.is_silent = False
        self.drained: Drained | None = None
        self.ends = False
        self.loaded: tuple[str, ...] = ()
        self.on_volume: tuple[str, ...] | None = ("tiny",)
        self.listed: tuple[Mapping[str, Any], ...] | None = None
        self.listed_at = float("-inf")
        self.headers: tuple[tuple[bytes, bytes], ...] = ()
        self.has_room = True
        self.no_room: Exception | None = None
        self.made_room: list[str] = []
        self.on_cpu: list[str] = []
        self.starts: list[Exception] = []
        self.probes = 0
        self.gone = False
        self.efforts: list[Effort | None] = []
        self.rereads = 0
        self._fleet = fleet
        self._book = LeaseBook(name, lambda: None, fleet.in_flight)

    @property
    def in_flight(self) -> int:
        return self._book.in_flight

    @property
    def models(self) -> tuple[Any, ...]:
        return tuple(SimpleNamespace(name=name) for name in self.loaded)

    def view(self) -> Any:
        return SimpleNamespace(phase=self.phase, explanation=self.explanation, models=self.models)

    def usable_endpoint(self) -> str | None:
        return self.endpoint

    def take_room_for(self, _model: str) -> bool:
        return self.has_room

    async def make_room_for(self, model: str) -> None:
        if self.no_room is not None:
            raise self.no_room
        self.made_room.append(model)

    def expect_on_cpu(self, model: str) -> None:
        self.on_cpu.append(model)

    def try_lease(self) -> Lease | None:
        return None if self.endpoint is None else self._book.grant(Target(self.id, self.endpoint))

    async def lease(self) -> Lease:
        if self.endpoint is None:
            if self.starts:
                raise self.starts.pop(0)
            self._fleet.clock.advance(3.0)
            self.endpoint = f"http://{self.id}"
        found = self.try_lease()
        assert found is not None
        return found

    async def probe(self, *, tags: bool = False) -> None:
        self.probes += 1
        if tags and self.on_volume is not None:
            self.reads(*self.on_volume)

    def reads(self, *names: str) -> None:
        self.listed = tuple({"name": name} for name in names)
        self.listed_at = self._fleet.clock.advance(0.001)

    async def has_gone(self) -> bool:
        return self.gone

    def read_models_soon(self) -> None:
        self.rereads += 1

    async def effort(self) -> Effort | None:
        return self.efforts.pop(0)


@dataclass
class FakeFleet:
    clock: Clock = field(default_factory=Clock)
    in_flight: dict[str, int] = field(default_factory=dict)
    is_known: bool = True
    waited_s: list[float] = field(default_factory=list)
    places: list[tuple[str, frozenset[str]]] = field(default_factory=list)
    members: dict[str, FakeInstance] = field(default_factory=dict)

    def add(self, name: str, **spec: Any) -> FakeInstance:
        self.members[name] = FakeInstance(self, name, **spec)
        return self.members[name]

    def get(self, name: str) -> FakeInstance:
        if name not in self.members:
            raise UnknownInstanceError(f"there is no instance {name!r}")
        return self.members[name]

    def instances(self) -> tuple[FakeInstance, ...]:
        return tuple(self.members.values())

    async def known(self, *, within_s: float) -> None:
        self.waited_s.append(within_s)

    @asynccontextmanager
    async def place_for(self, instance: str, *, keep: Collection[str] = ()) -> AsyncIterator[None]:
        self.places.append((instance, frozenset(keep)))
        yield


@dataclass
class FakeSettings:
    routing: RoutingSettings = field(default_factory=lambda: RoutingSettings(roles={}))
    version: int = 1

    def change(self, **values: Any) -> None:
        self.routing = RoutingSettings(**{"roles": self.routing.roles, **values})
        self.version += 1


class Ground:
    """A fleet with its lists, router and placement."""

    def __init__(self, *names: str) -> None:
        self.fleet = FakeFleet()
        self.settings = FakeSettings()
        self.revision = Revision()
        self.lists = ModelLists(cast("Any", None), cast("Any", Journal()), {})
        self.breakers = Breakers(
            cast("Any", Journal()),
            self.revision,
            limits=BreakerLimits(),
            now=self.fleet.clock,
            utcnow=lambda: datetime(2026, 11, 28, tzinfo=UTC),
            call_later=lambda _delay_s, _call: SimpleNamespace(cancel=lambda: None),
        )
        self.overload = Overload(self.revision, now=self.fleet.clock)
        self.router = Router(
            cast("Any", self.fleet),
            self.settings,
            self.lists,
            first_look=cast("Any", self.fleet),
            revision=self.revision,
            in_flight=self.fleet.in_flight,
            breakers=self.breakers,
            overload=self.overload,
            now=self.fleet.clock,
        )
        self.placement = Placement(
            cast("Any", self.fleet),
            cast("Any", self.fleet),
            self.router,
            self.lists,
            self.settings,
            now=self.fleet.clock,
        )
        for name in names:
            self.fleet.add(name).reads("tiny")

    def __getitem__(self, name: str) -> FakeInstance:
        return self.fleet.get(name)


KIND = RequestKind.GENERATE
