"""A container engine and servers in memory, and a supervisor on them.

The engine behaves as tests/integration and tests/unit/adapters/test_docker_engine.py show of a real one.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

from manager.domain.container import LABEL_INSTANCE, LABEL_MANAGER
from manager.domain.gpu import Gpu, GpuProcess
from manager.domain.instance import ContainerFacts, DeviceKind, Driver, InstanceSpec, Limits, Model
from manager.domain.registry import InstanceRow, PinAndTtl
from manager.domain.template import Template
from manager.errors import (
    ContainerGoneError,
    EngineError,
    EngineUnreachableError,
    NetworkMissingError,
    Reason,
    RegistryUnwritableError,
    UnavailableError,
)
from manager.services.gpus import Gpus
from manager.services.instances.supervisor import Supervisor
from manager.services.ports import (
    Archive,
    ContainerCounters,
    EngineEvent,
    EngineInfo,
    ProbeAnswer,
    ShowAnswer,
)
from manager.services.world import World
from tests.support.attempts import Journal
from tests.support.virtual import until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from manager.domain.container import ContainerRequest
    from manager.domain.instance import ContainerStatus
    from manager.domain.ownership import Owner
    from manager.errors import GpuQueryError

GIB = 2**30
CARD = "GPU-a"
MANAGER = "test"
IMAGE = "ollama/ollama:test"
NETWORK = "ollama-manager"
LIMITS = Limits(
    ttl_s=100,
    start_timeout_s=60,
    stop_timeout_s=10,
    drain_timeout_s=30,
    probe_interval_s=2,
    resync_interval_s=15,
    vram_wait_s=5,
)
BEGIN = datetime(2026, 8, 1, 12, 0, tzinfo=UTC)


@dataclass
class Box:
    """One container of the fake engine, and the server in it."""

    id: str
    name: str
    image: str
    labels: dict[str, str]
    network: str
    status: ContainerStatus = "created"
    networks: tuple[str, ...] = ()
    address: str | None = None
    exit_code: int | None = None
    out_of_memory: bool = False
    started_at: datetime | None = None
    log: list[tuple[datetime, str]] = field(default_factory=list)
    answers: bool = True
    ready_in_s: float = 0.05
    answers_from: float = 0.0
    deaf: bool = False
    immortal: bool = False
    is_cut_off: bool = False
    models: tuple[Model, ...] = ()
    network_bytes: int = 0
    cpu_s: float = 0.0


class FakeEngine:
    """Implements `services.ports.Engine` and `services.ports.Upstream`.

    Attributes:
        listener: gets the events, as long as `tells` is set.
        down: every call fails, as when the engine is away.
        refuses: calls that are refused, by name, with the error; each once.
        delays: seconds that a call takes, by name.
        cuts_off: a container that was started without its network never gets an address.
    """

    url = "unix:///fake.sock"

    def __init__(self) -> None:
        self.boxes: dict[str, Box] = {}
        self.networks: set[str] = {NETWORK}
        self.images: set[str] = {IMAGE}
        self.listener: Callable[[EngineEvent], None] = lambda _event: None
        self.tells = True
        self.down = False
        self.refuses: dict[str, list[EngineError]] = {}
        self.delays: dict[str, float] = {}
        self.calls: list[str] = []
        self.template: dict[str, Any] = {}
        self.crash_at_start: int | None = None
        self.cuts_off = False
        self._number = 0

    # --- what a test does by hand ---

    @property
    def box(self) -> Box:
        (only,) = self.boxes.values()
        return only

    def now(self) -> datetime:
        return BEGIN + timedelta(seconds=asyncio.get_running_loop().time() - 1000.0)

    def put(self, name: str, labels: dict[str, str], *, running: bool = True) -> Box:
        """A container that somebody has made."""
        box = self._new(name, IMAGE, labels, NETWORK)
        if running:
            self.run(box)
        return box

    def run(self, box: Box) -> None:
        box.status = "running"
        box.started_at = self.now()
        box.exit_code = None
        box.answers_from = asyncio.get_running_loop().time() + box.ready_in_s
        self._join(box, box.network)
        self._tell("start", box)

    def end(self, box: Box, code: int = 0, *, out_of_memory: bool = False) -> None:
        if box.status not in ("running", "paused"):
            return
        box.status, box.exit_code, box.out_of_memory = "exited", code, out_of_memory
        box.address = None
        self._tell("die", box, code)

    def delete(self, box: Box) -> None:
        self.end(box, 137)
        del self.boxes[box.id]
        self._tell("destroy", box)

    def disconnect(self, box: Box) -> None:
        box.networks, box.address = (), None  # no event of the container tells it

    def pause(self, box: Box, *, paused: bool = True) -> None:
        box.status = "paused" if paused else "running"
        self._tell("pause" if paused else "unpause", box)

    def kill_child(self, box: Box) -> None:
        """A process of the container was killed for its memory; Docker 20.10 only sends an event."""
        self._tell("oom", box)

    # --- services.ports.Engine ---

    async def ping(self, timeout_s: float) -> None:
        await self._called("ping")

    async def info(self) -> EngineInfo:
        await self._called("info")
        return EngineInfo("fake", desktop=False, rootless=False, runtimes=("runc",))

    async def list_containers(
        self, manager_id: str, *, label: str = LABEL_MANAGER
    ) -> tuple[ContainerFacts, ...]:
        await self._called("list")
        boxes = [box for box in self.boxes.values() if box.labels.get(label) == manager_id]
        return tuple(self._facts(box) for box in boxes)

    async def inspect(self, container: str) -> ContainerFacts | None:
        await self._called("inspect")
        box = self._find(container)
        return self._facts(box) if box else None

    async def create(self, request: ContainerRequest) -> str:
        await self._called("create")
        if request.image not in self.images:
            raise EngineError(f"No such image: {request.image}", reason=Reason.IMAGE_MISSING)
        if self._find(request.name) is not None:
            raise EngineError("Conflict. The name is already in use", reason=Reason.NAME_CONFLICT)
        box = self._new(request.name, request.image, dict(request.labels), request.network)
        for key, value in self.template.items():
            setattr(box, key, value)
        return box.id

    async def start(self, container_id: str) -> None:
        await self._called("start")
        box = self._known(container_id)
        if box.network not in self.networks:
            box.is_cut_off = self.cuts_off
            raise NetworkMissingError(f"network {box.network} not found")
        self.run(box)
        if self.crash_at_start is not None:
            box.log.append((self.now(), "panic: it does not work"))
            self.end(box, self.crash_at_start)

    async def signal(self, container_id: str, name: str) -> None:
        await self._called(name)
        box = self._find(container_id)
        if box is None or box.immortal or (box.deaf and name == "SIGTERM"):
            return
        self.end(box, 137 if name == "SIGKILL" else 0)

    async def remove(self, container_id: str) -> None:
        await self._called("remove")
        box = self._find(container_id)
        if box is not None:
            self.delete(box)

    async def logs(self, container_id: str, tail: int) -> tuple[str, ...]:
        await self._called("logs")
        return tuple(line for _, line in self._known(container_id).log)[-tail:]

    async def logs_between(self, container_id: str, since: datetime, until: datetime) -> tuple[str, ...]:
        await self._called("logs_between")
        return tuple(line for at, line in self._known(container_id).log if since <= at <= until)

    async def follow_logs(self, container_id: str, tail: int) -> AsyncGenerator[str, None]:
        yield ""
        for line in await self.logs(container_id, tail):
            yield f"{line}\n"

    async def counters(self, container_id: str) -> ContainerCounters:
        await self._called("counters")
        box = self._known(container_id)
        return ContainerCounters(box.network_bytes, box.cpu_s)

    async def ensure_network(self, name: str) -> None:
        await self._called("ensure_network")
        self.networks.add(name)

    async def connect(self, container_id: str, network: str) -> None:
        await self._called("connect")
        if network not in self.networks:
            raise NetworkMissingError(f"network {network} not found")
        self._join(self._known(container_id), network)

    async def has_volume(self, name: str) -> bool:
        return True

    async def read_archive(self, container_id: str, path: str, most_bytes: int) -> Archive | None:
        return None

    async def has_image(self, image: str) -> bool:
        await self._called("has_image")
        return image in self.images

    async def events(self, manager_id: str, opened: Callable[[], None]) -> AsyncIterator[EngineEvent]:
        raise NotImplementedError
        yield

    def pull(self, image: str) -> Any:
        raise NotImplementedError

    # --- services.ports.Upstream ---

    async def answers(self, url: str, timeout_s: float) -> bool:
        box = self._behind(url)
        if box is None:
            await asyncio.sleep(timeout_s)
            return False
        return self._serves(box)

    async def probe(
        self, endpoint: str, *, timeout_s: float, tags: bool, headers: object = ()
    ) -> ProbeAnswer:
        box = self._behind(endpoint)
        if box is None or not self._serves(box):
            await asyncio.sleep(timeout_s)
            raise UnavailableError(f"{endpoint} does not answer", reason=Reason.INSTANCE_UNHEALTHY)
        box.network_bytes += 2000
        return ProbeAnswer("0.1", box.models, ({"name": "tiny"},) if tags else None, 2000)

    async def show(self, endpoint: str, model: str, *, timeout_s: float, headers: object = ()) -> ShowAnswer:
        del endpoint, model, timeout_s
        return ShowAnswer(None, 0)

    # --- helpers ---

    async def _called(self, name: str) -> None:
        self.calls.append(name)
        await asyncio.sleep(self.delays.get(name, 0.001))
        if self.down:
            raise EngineUnreachableError(f"the container engine at {self.url} cannot be reached")
        if self.refuses.get(name):
            raise self.refuses[name].pop(0)

    def _new(self, name: str, image: str, labels: dict[str, str], network: str) -> Box:
        self._number += 1
        box = Box(f"{self._number:064x}", name, image, labels, network)
        self.boxes[box.id] = box
        return box

    def _find(self, name: str) -> Box | None:
        return next((box for box in self.boxes.values() if name in (box.id, box.name)), None)

    def _known(self, container_id: str) -> Box:
        box = self._find(container_id)
        if box is None:
            raise ContainerGoneError(f"No such container: {container_id}")
        return box

    def _join(self, box: Box, network: str) -> None:
        self._number += 1
        box.networks, box.address = (network,), f"172.18.{self._number // 250}.{self._number % 250}"
        if box.is_cut_off:
            box.address = None

    def _behind(self, url: str) -> Box | None:
        host = url.removeprefix("http://").partition("/")[0].partition(":")[0]
        return next((box for box in self.boxes.values() if host in (box.address, box.name)), None)

    def _serves(self, box: Box) -> bool:
        loop = asyncio.get_running_loop()
        return box.status == "running" and box.answers and loop.time() >= box.answers_from

    def _facts(self, box: Box) -> ContainerFacts:
        return ContainerFacts(
            id=box.id,
            name=box.name,
            image=box.image,
            status=box.status,
            labels=dict(box.labels),
            address=box.address,
            exit_code=box.exit_code,
            out_of_memory=box.out_of_memory,
            started_at=box.started_at,
            networks=box.networks,
        )

    def _tell(self, action: str, box: Box, exit_code: int | None = None) -> None:
        if self.tells:
            event = EngineEvent(action, box.id, box.labels.get(LABEL_INSTANCE, ""), exit_code)
            asyncio.get_running_loop().call_soon(lambda: self.listener(event))


class Machine:
    """The cards and the processes on them, as a test sets them."""

    def __init__(self) -> None:
        self.is_there = True
        self.others: tuple[str, ...] = ()  # more cards, each in the next slot, all of them empty
        self.free = 20 * GIB
        self.refusal: GpuQueryError | None = None
        self.processes: tuple[GpuProcess, ...] = ()
        self.containers: dict[int, str] = {}

    async def read(self) -> tuple[Gpu, ...]:
        if self.refusal is not None:
            raise self.refusal
        if not self.is_there:
            return ()
        used = 24 * GIB - self.free
        first = Gpu(CARD, 0, "00000000:01:00.0", "Card", 24 * GIB, used, self.free, self.processes)
        others = [
            Gpu(uuid, index, f"00000000:{index + 1:02x}:00.0", "Card", 24 * GIB, 0, 24 * GIB)
            for index, uuid in enumerate(self.others, start=1)
        ]
        return (first, *others)

    def container_of(self, pid: int) -> str | None:
        return self.containers.get(pid)

    def name_of(self, pid: int) -> str | None:
        return None


class Registry:
    """The part of the registry that instances and cards use."""

    def __init__(self) -> None:
        self.rows: dict[str, InstanceRow] = {}
        self.saves = 0
        self.disk_full = False

    async def save_instance(self, row: InstanceRow) -> None:
        await asyncio.sleep(0)
        if self.disk_full:
            raise RegistryUnwritableError("the disk is full")
        self.saves += 1
        self.rows[row.id] = row

    async def save_pin_and_ttl(self, instance: str, values: PinAndTtl) -> None:
        await self.save_instance(replace(self.rows.get(instance, InstanceRow(instance)), **values))

    async def bindings(self) -> dict[str, str]:
        return {}

    async def add_bindings(self, bindings: dict[str, str]) -> None:
        pass

    async def learned_sizes(self) -> tuple[Any, ...]:
        return ()

    async def save_learned_size(self, size: Any) -> None:
        pass


class Locks:
    def __init__(self) -> None:
        self.refusal: Exception | None = None

    @asynccontextmanager
    async def hold(self, _instance_id: str) -> AsyncIterator[None]:
        if self.refusal is not None:
            raise self.refusal
        yield


class Ground:
    """A world in memory, and the supervisors on it."""

    def __init__(
        self,
        *,
        gpu: bool = False,
        owner: Owner | None = None,
        sweeps: bool = False,
        device: tuple[str, ...] = (CARD,),
    ) -> None:
        self.engine = FakeEngine()
        self.machine = Machine()
        self.registry = Registry()
        self.locks = Locks()
        self.journal = Journal()
        self.steps: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.refusal: Exception | None = None
        loop = asyncio.get_running_loop()
        self.device: tuple[str, ...] = device
        self.gpus = Gpus(
            self.machine,
            self.machine,
            cast("Any", self.registry),
            selectors={"gpu0": self.device} if gpu else {},
            taken_ids=["gpu0"],
            auto=False,
            now=loop.time,
            utcnow=self.engine.now,
        )
        self.servers_changed: list[str] = []
        self.world = World(
            manager_id=MANAGER,
            engine=self.engine,
            registry=cast("Any", self.registry),
            locks=self.locks,
            upstream=cast("Any", self.engine),
            gpus=self.gpus,
            journal=cast("Any", self.journal),
            now=loop.time,
            utcnow=self.engine.now,
            on_step=self._on_step,
            resume_idle_clock=sweeps,
            owner=owner,
            server_changed=self.servers_changed.append,
        )
        self.id = "gpu0" if gpu else "cpu"
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def labels(self) -> dict[str, str]:
        return {LABEL_MANAGER: MANAGER, LABEL_INSTANCE: self.id}

    @property
    def name(self) -> str:
        return f"{MANAGER}-ollama-{self.id}"

    async def _on_step(self, _instance: str, step: str) -> None:
        self.steps.append(step)
        if step in self.gates:
            await self.gates[step].wait()

    def may_run(self, _instance: str) -> None:
        if self.refusal is not None:
            raise self.refusal

    def supervisor(
        self, *, row: InstanceRow | None = None, limits: Limits = LIMITS, **spec: Any
    ) -> Supervisor:
        """A supervisor that nobody has told of the engine yet."""
        device = DeviceKind.GPU if self.id == "gpu0" else DeviceKind.CPU
        template = Template(image=IMAGE, device=device, network=NETWORK)
        made = InstanceSpec(
            self.id, Driver.DOCKER, device, limits, template=template, template_name="t", **spec
        )
        one = Supervisor(self.world, made, row or InstanceRow(self.id), may_run=self.may_run)
        self.engine.listener = one.hint
        return one

    async def listed(self, one: Supervisor) -> Supervisor:
        """The engine was found and listed, and the supervisor runs."""
        await self.gpus.load()
        found = await self.engine.list_containers(MANAGER)
        one.first_listing(next((facts for facts in found if facts.name == self.name), None))
        one.engine_changed(up=True)
        self._tasks.append(asyncio.create_task(one.run()))
        await asyncio.sleep(0.1)
        return one

    async def ready(self, **spec: Any) -> Supervisor:
        one = await self.listed(self.supervisor(**spec))
        await one.start()
        await until(lambda: one.is_probed)
        return one

    async def relist(self, one: Supervisor) -> None:
        """The listing that comes once in every resync interval."""
        found = await self.engine.list_containers(MANAGER)
        one.compare(next((facts for facts in found if facts.name == self.name), None))

    async def close(self) -> None:
        for task in self._tasks:
            assert not task.done(), task.exception()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


@asynccontextmanager
async def on_ground(
    *,
    gpu: bool = False,
    owner: Owner | None = None,
    sweeps: bool = False,
    device: tuple[str, ...] = (CARD,),
) -> AsyncIterator[Ground]:
    ground = Ground(gpu=gpu, owner=owner, sweeps=sweeps, device=device)
    try:
        yield ground
    finally:
        await ground.close()
