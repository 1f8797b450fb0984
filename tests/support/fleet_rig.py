"""Real supervisors, capacity, sweeps and engine link over an engine in memory."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from manager.domain.container import LABEL_INSTANCE, LABEL_MANAGER, container_name
from manager.domain.gpu import Gpu, Holder, NamedCard
from manager.domain.instance import ALIVE, ContainerFacts, DeviceKind, Driver, InstanceSpec, Limits, Model
from manager.domain.registry import InstanceRow
from manager.domain.template import Template
from manager.errors import ContainerGoneError, EngineError, EngineUnreachableError, Reason, UnavailableError
from manager.services.instances.capacity import Capacity
from manager.services.instances.engine_link import EngineLink
from manager.services.instances.external import ExternalInstance
from manager.services.instances.first_look import FirstLook
from manager.services.instances.fleet import Fleet
from manager.services.instances.found_cards import FoundCards
from manager.services.instances.service import Service
from manager.services.instances.supervisor import Supervisor
from manager.services.instances.sweeps import Sweeps
from manager.services.instances.upgrades import Upgrades
from manager.services.ports import ContainerCounters, EngineEvent, EngineInfo, ProbeAnswer
from manager.services.world import World
from tests.support.attempts import Journal as Events

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping

    from manager.domain.container import ContainerRequest
    from manager.domain.instance import ContainerStatus
    from manager.errors import RegistryUnwritableError
    from manager.services.instances.instance import Instance, View
    from manager.services.instances.sweeps import Schedule

MANAGER = "m"
IMAGE = "ollama/ollama:1"
INTERVAL_S = 0.02
LIMITS = Limits(900, 5, 5, 5, 2, 15, 1)
CARD = Gpu("GPU-1", 0, "00000000:01:00.0", "Card", 2**34, 2**30, 2**34 - 2**30)


class Engine:
    """Implements `services.ports.Engine` and, for the servers in its containers, `services.ports.Upstream`.

    Attributes:
        images: those that it has.
        crashing: images whose containers end at once.
        down: why every call fails, None while the engine answers.
        failing: calls that fail, by name, with the error.
        deaf: no event is sent.
        stops: awaited by each SIGTERM.
    """

    def __init__(self) -> None:
        self.url = "unix:///engine.sock"
        self.containers: dict[str, ContainerFacts] = {}
        self.images = {IMAGE, "ollama/ollama:2"}
        self.crashing: set[str] = set()
        self.silent: set[str] = set()
        self.down: str | None = None
        self.failing: dict[str, EngineError] = {}
        self.deaf = False
        self.stops = asyncio.Event()
        self.stops.set()
        self.calls: list[str] = []
        self.info_is = EngineInfo("28.5", desktop=False, rootless=False, runtimes=())
        self.models: tuple[Model, ...] = ()
        self._events: asyncio.Queue[EngineEvent] = asyncio.Queue()
        self._number = 0

    def put(self, name: str, instance: str | None, status: ContainerStatus = "running") -> ContainerFacts:
        """A container that was made behind the daemon's back."""
        labels = {LABEL_MANAGER: MANAGER} | ({} if instance is None else {LABEL_INSTANCE: instance})
        return self._add(name, IMAGE, labels, status)

    def rename(self, name: str, new_name: str) -> None:
        facts = self.containers[name]
        self._change(facts, name=new_name)
        self.tell("rename", self.containers[facts.id])

    def tell(self, action: str, facts: ContainerFacts) -> None:
        if not self.deaf:
            self._events.put_nowait(
                EngineEvent(action, facts.id, facts.labels.get(LABEL_INSTANCE, ""), facts.exit_code)
            )

    def find(self, container: str) -> ContainerFacts | None:
        named = (facts for facts in self.containers.values() if facts.name == container)
        return self.containers.get(container) or next(named, None)

    async def ping(self, timeout_s: float) -> None:
        self._called("ping")

    async def info(self) -> EngineInfo:
        self._called("info")
        return self.info_is

    async def list_containers(self, manager_id: str) -> tuple[ContainerFacts, ...]:
        self._called("list")
        return tuple({facts.id: facts for facts in self.containers.values()}.values())

    async def inspect(self, container: str) -> ContainerFacts | None:
        self._called("inspect")
        return self.find(container)

    async def create(self, request: ContainerRequest) -> str:
        self._called(f"create {request.labels[LABEL_INSTANCE]}")
        if request.image not in self.images:
            raise EngineError("no such image", reason=Reason.IMAGE_MISSING)
        if self.find(request.name) is not None:
            raise EngineError("the name is in use", reason=Reason.NAME_CONFLICT)
        return self._add(request.name, request.image, request.labels, "created").id

    async def start(self, container_id: str) -> None:
        self._called("start")
        facts = self._change(self._known(container_id), status="running", started_at=datetime.now(UTC))
        self.tell("start", facts)
        if facts.image in self.crashing:
            self.end(facts.id, 1)

    def end(self, container: str, exit_code: int = 0) -> None:
        self.tell("die", self._change(self._known(container), status="exited", exit_code=exit_code))

    async def signal(self, container_id: str, name: str) -> None:
        self._called(f"signal {self._known(container_id).labels[LABEL_INSTANCE]}")
        await self.stops.wait()
        self.end(container_id)

    async def remove(self, container_id: str) -> None:
        self._called("remove")
        facts = self._known(container_id)
        self.containers = {key: one for key, one in self.containers.items() if one.id != facts.id}
        self.tell("destroy", facts)

    async def logs_between(self, _container: str, _since: object, _until: object) -> tuple[str, ...]:
        return ()

    async def connect(self, _container: str, _network: str) -> None: ...

    async def logs(self, container_id: str, tail: int) -> tuple[str, ...]:
        self._called("logs")
        return ("its last words",)

    async def follow_logs(self, container_id: str, tail: int) -> AsyncGenerator[str, None]:
        yield "its last words\n"

    async def counters(self, container_id: str) -> ContainerCounters:
        self._called("counters")
        return ContainerCounters(0, 0.0)

    async def ensure_network(self, name: str) -> None:
        self._called("ensure_network")

    async def has_image(self, image: str) -> bool:
        self._called("has_image")
        return image in self.images

    async def events(self, manager_id: str, opened: Callable[[], None]) -> AsyncIterator[EngineEvent]:
        self._called("events")
        opened()
        while True:
            yield await self._events.get()

    async def answers(self, url: str, timeout_s: float) -> bool:
        return self._behind(url) is not None

    async def probe(
        self, endpoint: str, *, timeout_s: float, tags: bool, headers: object = ()
    ) -> ProbeAnswer:
        await asyncio.sleep(0)
        if self._behind(endpoint) is None:
            raise UnavailableError(f"{endpoint} does not answer", reason=Reason.UPSTREAM_UNREACHABLE)
        return ProbeAnswer("0.1", self.models, ({"name": "tiny"},) if tags else None, 1000)

    def _behind(self, url: str) -> object:
        host = url.removeprefix("http://").partition("/")[0].partition(":")[0]
        if host == "nas":
            return None if host in self.silent else host
        return next(
            (one for one in self.containers.values() if one.address == host and one.status == "running"), None
        )

    def _called(self, call: str) -> None:
        self.calls.append(call)
        if self.down is not None:
            raise EngineUnreachableError(self.down)
        if call in self.failing:
            raise self.failing[call]

    def _known(self, container: str) -> ContainerFacts:
        facts = self.find(container)
        if facts is None:
            raise ContainerGoneError(container)
        return facts

    def _add(
        self, name: str, image: str, labels: Mapping[str, str], status: ContainerStatus
    ) -> ContainerFacts:
        self._number += 1
        started = datetime.now(UTC) if status in ALIVE else None
        facts = ContainerFacts(
            f"{self._number:064x}",
            name,
            image,
            status,
            dict(labels),
            f"10.0.0.{self._number}",
            started_at=started,
        )
        self.containers[facts.id] = facts
        return facts

    def _change(self, facts: ContainerFacts, **changes: Any) -> ContainerFacts:
        values = {name: getattr(facts, name) for name in ContainerFacts.__slots__}
        self.containers[facts.id] = ContainerFacts(**(values | changes))
        return self.containers[facts.id]


class Journal(Events):
    trouble: str | None = None

    def details_of(self, kind: str) -> list[str]:
        return [detail for (one, *_), detail in zip(self.events, self.details, strict=True) if one == kind]


class Cards:
    """The part of `services.gpus.Gpus` that instances use; each card that is found gets an instance."""

    def __init__(self) -> None:
        self.snapshot = SimpleNamespace(gpus=(CARD,), error=None, attempted=True)
        self.found: tuple[str, ...] = ()
        self.missing: dict[str, str] = {}
        self.readings = 0
        self.holders_version = 0

    async def refresh(self) -> None:
        self.readings += 1

    def instance_ids(self) -> tuple[str, ...]:
        return self.found

    def reserved(self) -> dict[str, int | None]:
        return {}

    def why_missing(self, instance: str) -> str | None:
        return self.missing.get(instance)

    def cards_of(self, _instance: str) -> tuple[NamedCard, ...]:
        return (NamedCard(CARD.uuid, CARD.uuid),)

    def uuids_of(self, _instance: str) -> tuple[str, ...]:
        return (CARD.uuid,)

    wanted_uuids = wanted_usable = uuids_of

    def gpu(self, _uuid: str) -> Gpu:
        return CARD

    @property
    def trouble(self) -> Any:
        error = self.snapshot.error
        return (
            None
            if error is None
            else SimpleNamespace(code=str(error.details.get("nvml", error.code)), message=error.message)
        )

    def holders(self, card: Gpu) -> tuple[Holder, ...]:
        return tuple(Holder(one.pid, None, f"of {one.pid}", one.used_bytes) for one in card.processes)

    def shortage(self, _instance: str) -> None: ...
    def end_loads(self, _instance: str) -> None: ...
    def holds_memory(self, _instance: str) -> None: ...
    def take_room(self, *_: object) -> bool:
        return True

    async def admit_load(self, *_: object, **__: object) -> None: ...

    def need_of(self, _instance: str, _limit: int | None) -> int:
        return 0

    def holdings(self, _instance: str) -> dict[str, Any]:
        return {}

    def held_bytes(self, _instance: str) -> int:
        return 0

    async def admit(self, *_: object, **__: object) -> None: ...
    async def learn(self, *_: object) -> None: ...
    async def given_back(self, *_: object, **__: object) -> tuple[str, ...]:
        return ()

    def claim(self, *_: object) -> None: ...
    def drop_claim(self, _instance: str) -> None: ...
    def note_given(self, *_: object) -> None: ...
    def note_container(self, *_: object) -> None:
        self.holders_version += 1

    def forget_container(self, _container: str) -> None: ...


class Registry:
    def __init__(self) -> None:
        self.rows: dict[str, InstanceRow] = {}
        self.orders: dict[tuple[str, str], Any] = {}
        self.refuses: RegistryUnwritableError | None = None

    async def save_order(self, instance: str, kind: str, value: Any) -> None:
        await asyncio.sleep(0)
        if self.refuses is not None:
            raise self.refuses
        if value is None:
            self.orders.pop((instance, kind), None)
        else:
            self.orders[instance, kind] = value

    async def save_instance(self, row: InstanceRow, known: InstanceRow | None = None) -> None:
        self.rows[row.id] = row


class Locks:
    @asynccontextmanager
    async def hold(self, _instance: str) -> AsyncIterator[None]:
        yield


class Rig:
    """A fleet with everything around it; `running` runs it."""

    def __init__(
        self,
        *names: str,
        max_running: int | None = None,
        own_names: tuple[str, ...] = (),
        schedules: tuple[Schedule, ...] = (),
        resume_idle_clock: bool = False,
    ) -> None:
        self.engine = Engine()
        self.journal = Journal()
        self.cards = Cards()
        self.registry = Registry()
        self.others_work = False
        self.ahead_s = 0.0  # of both clocks
        self.world = World(
            manager_id=MANAGER,
            engine=cast("Any", self.engine),
            registry=cast("Any", self.registry),
            locks=cast("Any", Locks()),
            upstream=cast("Any", self.engine),
            gpus=cast("Any", self.cards),
            journal=cast("Any", self.journal),
            now=lambda: time.monotonic() + self.ahead_s,
            utcnow=lambda: datetime.now(UTC) + timedelta(seconds=self.ahead_s),
            resume_idle_clock=resume_idle_clock,
            others_work=lambda: self.others_work,
        )
        self.fleet = Fleet(self.world, save_interval_s=INTERVAL_S)
        self.capacity = Capacity(self.world, self.fleet, max_running=max_running, recheck_s=INTERVAL_S)
        self.link = EngineLink(
            self.world,
            self.fleet,
            self.capacity,
            own_names=own_names,
            probe_interval_s=INTERVAL_S,
            resync_interval_s=60.0,
        )
        self.sweeps = Sweeps(
            self.world, self.fleet, self.capacity, [self.link], schedules=schedules, interval_s=2.0
        )
        self.found = FoundCards(
            self.world, self.fleet, self.link, make=self.make_found, interval_s=INTERVAL_S
        )
        self.service = Service(self.world, self.fleet, self.capacity, [self.link.asked])
        self.upgrades = Upgrades(
            self.world, self.fleet, self.capacity, may_use=lambda image: image.startswith("ollama/")
        )
        self.first_look = FirstLook(self.world, self.fleet, [self.link])
        self.no_template: Exception | None = None
        for name in names:
            self.add(name)

    def add(self, name: str, *, image: str = IMAGE, gpu: bool = False, **spec: Any) -> Supervisor:
        supervisor = self.make(name, image=image, gpu=gpu, **spec)
        self.fleet.add(supervisor)
        return supervisor

    def add_external(self, name: str = "nas", **orders: Any) -> ExternalInstance:
        limits = Limits(900, 5, 5, 5, INTERVAL_S, 15, 1)
        spec = InstanceSpec(name, Driver.EXTERNAL, None, limits, url="http://nas:1")
        instance = ExternalInstance(self.world, spec, **orders)
        self.fleet.add(instance)
        return instance

    def make(
        self, name: str, *, image: str = IMAGE, gpu: bool = False, reach: Any = "auto", **spec: Any
    ) -> Supervisor:
        orders = {key: spec.pop(key) for key in ("drained", "override") if key in spec}
        row = spec.pop("row", InstanceRow(id=name))
        device = DeviceKind.GPU if gpu else DeviceKind.CPU
        template = Template(image=image, device=device, reach=reach)
        driver = spec.pop("driver", Driver.DOCKER)
        full = InstanceSpec(name, driver, device, spec.pop("limits", LIMITS), template=template, **spec)
        return Supervisor(
            self.world,
            full,
            row,
            may_run=self.capacity.may_run,
            drained=orders.get("drained"),
            image=orders.get("override"),
        )

    def make_found(self, name: str) -> Instance:
        if self.no_template is not None:
            raise self.no_template
        return self.make(name, gpu=True)

    def __getitem__(self, name: str) -> Supervisor:
        return self.fleet.managed(name)

    def view(self, name: str) -> View:
        return self.fleet.get(name).view()

    def running_ids(self) -> set[str]:
        return {one.id for one in self.fleet.supervisors() if one.occupies}

    def container(self, name: str) -> ContainerFacts:
        facts = self.engine.find(container_name(MANAGER, name))
        assert facts is not None
        return facts

    @asynccontextmanager
    async def running(self, *, settled: bool = True) -> AsyncIterator[Rig]:
        loops = (
            self.fleet.run,
            self.capacity.run,
            self.link.run,
            self.sweeps.run,
            self.found.run,
            self.service.run,
        )
        tasks = [asyncio.ensure_future(loop()) for loop in loops]
        try:
            if settled:
                await self.first_look.settled(within_s=10)
            yield self
            for task in tasks:
                assert not task.done(), task.exception()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def until(holds: Callable[[], object]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
