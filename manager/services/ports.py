"""Ports: the services' interfaces to the outside. Adapters implement them; `app.py` alone wires both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from manager.domain.container import LABEL_MANAGER

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager
    from datetime import datetime

    from manager.domain.benchmark_results import Benchmark
    from manager.domain.benchmarks import Sample
    from manager.domain.budgets import Balance, Budget, Closing, Overdrawn, Reservation
    from manager.domain.container import ContainerRequest
    from manager.domain.gpu import Gpu
    from manager.domain.gpu_history import CardMinute
    from manager.domain.history import Ended, Filters
    from manager.domain.instance import ContainerFacts, Model
    from manager.domain.keys import Grant, Key
    from manager.domain.registry import Event, InstanceRow, LearnedSize, OrderKind
    from manager.domain.runs import Run, RunStatus
    from manager.domain.usage import Dimension, Span, Sums
    from manager.wire.details import Details
    from manager.wire.head import Header

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Facts about the engine that decide something.

    `gives_cards` is False where a request for a card is ignored.
    """

    version: str
    desktop: bool
    rootless: bool
    runtimes: tuple[str, ...]
    podman: bool = False
    gives_cards: bool = True


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """A hint that something happened to a container with our label; never the truth by itself."""

    action: str
    container_id: str
    instance: str
    exit_code: int | None


@dataclass(frozen=True, slots=True)
class PullProgress:
    """One line of a pull. Byte counts are of one layer, None where the engine gives none."""

    status: str
    layer: str | None = None
    current_bytes: int | None = None
    total_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ContainerCounters:
    """The use of a container since it started: traffic in both directions and processor time."""

    network_bytes: int
    cpu_s: float


class Archive(NamedTuple):
    """A tar archive of a path in a container; `stat` is what the engine says of the path, base64 of JSON."""

    tar: bytes
    stat: str


class Engine(Protocol):
    """A container engine. Every call has a deadline and raises only `EngineError` and its kin.

    A call that timed out may still have happened: look again before drawing a conclusion.
    """

    @property
    def url(self) -> str: ...
    async def ping(self, timeout_s: float) -> None: ...
    async def info(self) -> EngineInfo: ...
    async def list_containers(
        self, manager_id: str, *, label: str = LABEL_MANAGER
    ) -> tuple[ContainerFacts, ...]:
        """The containers that have the manager's id as the value of that label."""
        ...

    async def inspect(self, container: str) -> ContainerFacts | None:
        """The container of that id or name, None when there is none."""
        ...

    async def create(self, request: ContainerRequest) -> str:
        """Create, never pull. Returns the container's id."""
        ...

    async def start(self, container_id: str) -> None: ...
    async def signal(self, container_id: str, name: str) -> None:
        """Send a signal; a container that has ended already is no error."""
        ...

    async def remove(self, container_id: str) -> None:
        """Remove, by force; a container that is gone already is no error."""
        ...

    async def logs(self, container_id: str, tail: int) -> tuple[str, ...]: ...
    async def logs_between(self, container_id: str, since: datetime, until: datetime) -> tuple[str, ...]:
        """All lines of that time."""
        ...

    def follow_logs(self, container_id: str, tail: int) -> AsyncGenerator[str, None]:
        """Text of a container: its last lines, then what it writes until it ends. Empty text comes first."""
        ...

    async def counters(self, container_id: str) -> ContainerCounters: ...
    async def ensure_network(self, name: str) -> None: ...
    async def connect(self, container_id: str, network: str) -> None:
        """Connect a container to a network; one that is connected already is no error.

        Raises:
            NetworkMissingError: there is no such network.
        """
        ...

    async def has_image(self, image: str) -> bool: ...
    async def has_volume(self, name: str) -> bool:
        """Whether there is a named volume; creating a container would make it."""
        ...

    async def read_archive(self, container_id: str, path: str, most_bytes: int) -> Archive | None:
        """Read a file or folder of a container, running or not; None when there is no such path.

        Raises:
            ArchiveTooLargeError: the archive has more than `most_bytes`.
        """
        ...

    def events(self, manager_id: str, opened: Callable[[], None]) -> AsyncIterator[EngineEvent]:
        """Events from when `opened` is called until the connection ends (the iterator ends) or fails."""
        ...

    def pull(self, image: str) -> AsyncIterator[PullProgress]: ...


@dataclass(frozen=True, slots=True)
class ProbeAnswer:
    """The answer of a server to one probe, and about how many bytes that moved on the wire, both ways.

    All but the last are None when they were not asked for or the server would not say. What it lists
    is kept as it came: whoever asks the manager gets to see every key of it.
    """

    version: str | None
    loaded: tuple[Model, ...] | None
    available: tuple[Mapping[str, Any], ...] | None
    wire_bytes: int


@dataclass(frozen=True, slots=True)
class ShowAnswer:
    """The answer of a server about one model, and about how many bytes that moved on the wire, both ways.

    `details` is None where it would not say.
    """

    details: Details | None
    wire_bytes: int


class Upstream(Protocol):
    """The HTTP side of instances, for probes only."""

    async def answers(self, url: str, timeout_s: float) -> bool:
        """Whether `url` is answered with 2xx in time. Never raises."""
        ...

    async def probe(
        self, endpoint: str, *, timeout_s: float, tags: bool, headers: Sequence[Header] = ()
    ) -> ProbeAnswer:
        """Ask `/api/ps`; with `tags`, or where that is not answered as Ollama does, what else tells a server.

        Args:
            endpoint: the server's URL.
            timeout_s: the deadline of everything together.
            tags: ask `/api/version` and `/api/tags` too.
            headers: such as the credentials for the server.

        Raises:
            UnavailableError: no useful answer in time; the reason says which.
            OutOfDescriptorsError: the process lacks descriptors; no instance is at fault.
        """
        ...

    async def probe_openai(
        self,
        endpoint: str,
        *,
        timeout_s: float,
        models: bool,
        names: Sequence[str] | None,
        headers: Sequence[Header],
    ) -> ProbeAnswer:
        """Ask a server that speaks OpenAI's API `/health`; where it has none, or with `models`, `/v1/models`.

        Args:
            endpoint: the server's base URL, which ends before `/models`.
            timeout_s: the deadline of everything together.
            models: read the list of models too.
            names: its models where it cannot list them; None: it is asked.
            headers: the credentials for the server.

        Raises:
            UnavailableError, OutOfDescriptorsError: as `probe`.
        """
        ...

    async def show(
        self, endpoint: str, model: str, *, timeout_s: float, headers: Sequence[Header] = ()
    ) -> ShowAnswer:
        """Ask `/api/show` about a model.

        Raises:
            UnavailableError: no answer in time; the reason says which.
            OutOfDescriptorsError: the process lacks descriptors; no instance is at fault.
        """
        ...


@dataclass(frozen=True, slots=True)
class Question:
    """A request for the server of one instance. Errors name the instance: its address is not for clients.

    `target` is path and query as they came; `headers` has neither Host nor anything that frames the message.
    A body in pieces is sent as they come, with its length where that is known.
    """

    instance: str
    endpoint: str
    method: str
    target: str
    headers: Sequence[Header] = ()
    body: bytes | AsyncIterator[bytes] = b""
    length: int | None = None


class ServerAnswer(Protocol):
    """The answer of a server whose head has come; `length` is that of its body, None where it says none."""

    @property
    def status(self) -> int: ...
    @property
    def headers(self) -> Sequence[Header]: ...
    @property
    def length(self) -> int | None: ...
    async def piece(self) -> bytes:
        """The next piece of the body, empty at its end; whoever takes no more holds the server up.

        Raises:
            UnavailableError: it broke off, or stood still for too long.
        """
        ...


class ModelServer(Protocol):
    """The HTTP side of instances for requests that pass through whole, of any size and length of time."""

    def ask(self, question: Question) -> AbstractAsyncContextManager[ServerAnswer]:
        """Send a request, once; on leaving, the connection ends, and with it the server's work for it.

        Raises:
            AskFailedError: no answer; the reason says why.
            OutOfDescriptorsError: the process lacks descriptors; no instance is at fault.
            InvalidRequestError: the request cannot be framed, or its body has another length than declared.
        """
        ...


class GpuReader(Protocol):
    async def read(self) -> tuple[Gpu, ...]:
        """All cards as they are now.

        Raises:
            GpuQueryError: no driver, no library, an error or no answer in time.
        """
        ...


class Registry(Protocol):
    """The state that survives a restart. A call that returns has been committed to disk.

    Raises:
        RegistryUnwritableError: the write did not happen, nothing changed.
    """

    async def instances(self) -> dict[str, InstanceRow]: ...
    async def save_instance(self, row: InstanceRow, known: InstanceRow | None = None) -> None:
        """Store a row. With `known` what is the same in that one is left as another gateway has stored it."""
        ...

    async def bindings(self) -> dict[str, str]:
        """Instance id -> UUID of its card, of all times."""
        ...

    async def add_bindings(self, bindings: dict[str, str]) -> None: ...
    async def append_events(self, events: Sequence[Event]) -> None:
        """Store events; the oldest beyond the newest 10 000 are dropped."""
        ...

    async def events_after(self, event_id: int, limit: int) -> tuple[Event, ...]: ...
    async def last_event_id(self) -> int: ...
    async def learned_sizes(self) -> tuple[LearnedSize, ...]: ...
    async def save_learned_size(self, size: LearnedSize) -> None: ...
    async def overrides(self) -> dict[str, Any]:
        """Values of settings that were changed at run time, by key; a value is what JSON can say."""
        ...

    async def save_overrides(
        self, overrides: Mapping[str, Any], was: Mapping[str, Any] | None = None
    ) -> None:
        """Store these and no others.

        Raises:
            ConflictError: others are stored than `was`; nothing was changed.
        """
        ...

    async def model_lists(self) -> dict[str, tuple[Mapping[str, Any], ...]]:
        """Volume -> what a server last said of each model on it, as JSON values."""
        ...

    async def save_model_list(self, volume: str, entries: Sequence[Mapping[str, Any]]) -> None: ...
    async def save_run(self, run: Run) -> None:
        """Store a run, in place of an earlier state of it."""
        ...

    async def run(self, run_id: str) -> Run | None: ...
    async def runs(
        self, status: RunStatus | None, limit: int | None, grant: Grant | None = None
    ) -> tuple[Run, ...]:
        """The newest runs first, or those of a key; None is no limit."""
        ...

    async def due_runs(self, now: datetime, limit: int) -> tuple[Run, ...]:
        """Runs whose result has been kept for long enough."""
        ...

    async def next_run_expiry(self) -> datetime | None: ...
    async def forget_runs(self, ended_before: datetime, kept: int) -> tuple[Run, ...]:
        """Remove runs that ended before a time or are older than the newest `kept`; return some at a time."""
        ...

    async def orders(self, kind: OrderKind, read: Callable[[Mapping[str, Any]], T]) -> dict[str, T]:
        """Instance id -> what an operator has ordered for it.

        Args:
            kind: of the orders.
            read: makes an order of the stored JSON values; a LookupError, TypeError or ValueError of it means
                that the registry is corrupt.
        """
        ...

    async def save_order(self, instance: str, kind: OrderKind, value: Mapping[str, Any] | None) -> None:
        """Store an order in place of an earlier one; None forgets it."""
        ...

    async def keys(self) -> tuple[Key, ...]: ...
    async def save_key(self, key: Key) -> None:
        """Store a key, in place of an earlier state of it."""
        ...

    async def replace_key(self, before: Key | None, key: Key) -> None:
        """Store a key in place of `before`; None: there was none.

        Raises:
            ConflictError: the stored key is another one by now; nothing was stored.
        """
        ...

    async def forget_key(self, name: str) -> None: ...
    async def save_last_used(self, used: Mapping[str, datetime]) -> None:
        """Store when keys were used last, by name; one that is gone stays so."""
        ...

    async def gpu_minutes(self, since_s: int) -> dict[int, tuple[CardMinute, ...]]:
        """Return the readings of the cards since a time: by the Unix time of each minute, in order."""
        ...

    async def save_gpu_minutes(self, minutes: Mapping[int, Sequence[CardMinute]], before_s: int) -> None:
        """Store minutes in place of earlier ones, and forget those that began before a time."""
        ...

    async def check(self) -> None:
        """Look whether what is written can still be found after a restart."""
        ...

    def requests(self) -> RequestStore:
        """Return the history of requests."""
        ...

    async def close(self) -> None: ...


class KeyUse(NamedTuple):
    """The use of a key: its requests of the last minute, and its tokens of a day (`YYYY-MM-DD`)."""

    minute: int
    day: str
    tokens: int


class Shared(Protocol):
    """What gateways that share a database tell each other. A call ends within 10 s.

    Raises:
        RegistryUnwritableError: the database is away.
    """

    async def hold(self) -> bool:
        """Have a session that says that this gateway lives; return False where another one has its name."""
        ...

    async def exchange(
        self, uses: Mapping[str, KeyUse]
    ) -> tuple[Mapping[str, int], Mapping[tuple[str, str], tuple[int, KeyUse]]]:
        """Store the use of keys at this gateway, and return what the others have stored.

        Args:
            uses: by the name of the key; those that are left out stay as they are.

        Returns:
            A number for each kind of shared rows, which differs after a change; and for each other gateway
            and key its use, with a number that grows each time when it is stored.
        """
        ...

    async def close(self) -> None: ...


class BenchmarkStore(Protocol):
    """The benchmarks in the registry. A call that was cancelled happened completely or not at all.

    Raises:
        RegistryUnwritableError: the write did not happen, nothing changed.
    """

    async def benchmarks(self) -> tuple[Benchmark, ...]:
        """All of them, the newest first."""
        ...

    async def benchmark(self, benchmark_id: str) -> tuple[Benchmark, tuple[Sample, ...]] | None:
        """One of them with its requests."""
        ...

    async def last_benchmark(self) -> int:
        """The highest number, 0 where there is none."""
        ...

    async def save_benchmark(self, benchmark: Benchmark, samples: Sequence[Sample], kept: int) -> None:
        """Store one in place of an earlier state; forget the oldest ended ones beyond `kept`."""
        ...

    async def forget_benchmark(self, benchmark_id: str) -> None: ...


class StoredPage(NamedTuple):
    """A part of the history, newest first.

    `items` are request ids and JSON objects with the fields of each record. `cursor` is the place of the last
    one that was looked at. `older` is the place before which the next page ends; None where there is none.
    """

    items: list[tuple[str, dict[str, Any]]]
    cursor: int
    older: int | None = None


class RequestStore(Protocol):
    """The requests that have ended. A call that returns has happened completely or not at all.

    Raises:
        RegistryUnwritableError: it could not be read or written.
    """

    async def add(self, batch: Sequence[Ended], *, keeps: bool = True) -> None:
        """Store requests, and add up what they have used; one that is stored already stays as it is.

        Args:
            batch: the requests.
            keeps: whether the requests themselves are kept.
        """
        ...

    async def encoded(self, batch: Sequence[Ended]) -> bytes:
        """Return requests in the form that `add_encoded` takes."""
        ...

    async def add_encoded(self, rows: bytes, *, keeps: bool = True) -> None:
        """Store requests of another process, as `add` does."""
        ...

    async def usage(
        self, wanted: Span, by: Sequence[Dimension], *, now_s: int
    ) -> tuple[dict[tuple[str, ...], Sums], Span]:
        """Return what the requests that ended in a time have used, by group.

        Returns:
            The sums by the values of `by`, in its order; and the time that they are of, which is widened to
            whole hours, or to whole days where the hours are forgotten.
        """
        ...

    async def model_use(
        self, *, since_s: int
    ) -> tuple[list[tuple[str, int]], list[tuple[int, str, int, int, int]]]:
        """Return the use of models by requests that went to an instance.

        Returns:
            The beginning of the last hour, or day, in which each model was used; and of each hour from
            `since_s` on its beginning, a model, requests, input and output tokens.
        """
        ...

    async def forget_usage(self, *, now_s: int, days: int) -> None:
        """Forget what was used longer ago."""
        ...

    async def last(
        self, filters: Filters, limit: int, *, after: int | None = None, before: int | None = None
    ) -> StoredPage:
        """Return the requests that ended last, before a place if one is given; or the first ones behind one.

        Args:
            filters: what is wanted.
            limit: at most so many.
            after: the `cursor` of an earlier page.
            before: the `older` of an earlier page.
        """
        ...

    async def get(self, request_id: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return record and decision of a request; None where it is not stored."""
        ...

    async def prune(self, before: datetime, *, most_rows: int, at_most: int) -> bool:
        """Forget requests that ended before a time, and the oldest beyond `most_rows`.

        Returns:
            Whether more than `at_most` of them had to go, so that some are left.
        """
        ...

    async def close(self) -> None: ...


class LedgerStore(Protocol):
    """The ledger of paid requests. A call that returns has happened completely and is on the disk.

    Raises:
        RegistryUnwritableError: it could not be read or written.
    """

    async def reserve(
        self, reservation: Reservation, budgets: Mapping[Budget, str]
    ) -> Overdrawn | dict[Budget, Balance]:
        """Reserve money, unless a budget has too little left. Check and reservation are one transaction.

        Args:
            reservation: what is reserved, for whom.
            budgets: each budget it is taken from, with the first day of its period.

        Returns:
            The balances with the reservation; or the limit that it would exceed, and nothing is reserved.
        """
        ...

    async def close_reservation(self, closing: Closing, at_us: int) -> bool:
        """Close a reservation; False where that was done before, or where there is none."""
        ...

    async def recover(self, make: Callable[[str, int], Closing], *, before_us: int, at_us: int) -> int:
        """Close all open reservations that are older than a time; return how many.

        Where several gateways share the ledger these are its own ones, and, whatever their age, those of
        gateways that have ended.

        Args:
            make: returns the closing of a reservation, by its id and amount.
            before_us: Unix time in microseconds.
            at_us: the time of the closing.
        """
        ...

    async def balances(self, budgets: Mapping[Budget, str]) -> dict[Budget, Balance]:
        """Return the money of budgets since the first day of their periods."""
        ...

    async def close(self) -> None: ...


class FileWriter(Protocol):
    """A file that is being written. It gets its name with `commit`."""

    async def write(self, data: bytes) -> None: ...
    async def commit(self) -> None:
        """Put the file in its place, on disk."""
        ...


class RunFiles(Protocol):
    """The files of runs, in one directory that only the daemon's user can read.

    Raises:
        RunFilesError: a file could not be read or written.
    """

    async def names(self) -> frozenset[str]:
        """All files that there are, those that were never committed too."""
        ...

    async def save(self, name: str, data: bytes) -> None:
        """Write a file: afterwards it is on disk, whole."""
        ...

    async def read(self, name: str, most_bytes: int) -> bytes:
        """A whole file, of that size at most."""
        ...

    def writing(self, name: str) -> AbstractAsyncContextManager[FileWriter]:
        """Write a file in pieces; it is dropped on leaving unless it was committed."""
        ...

    def pieces(self, name: str) -> AsyncIterator[bytes]:
        """The file in pieces."""
        ...

    async def remove(self, *names: str) -> None:
        """Remove files; one that is missing is no error."""
        ...


class InstanceLocks(Protocol):
    def hold(self, instance_id: str) -> AbstractAsyncContextManager[None]:
        """Hold an instance against other tasks and, through a lock file, other processes.

        Raises:
            LockedError: another process held it for longer than the bounded wait.
        """
        ...


class Shares(Protocol):
    """Shares of instances that several gateways use; see `services.instances.sharing`."""

    async def take(self, instance_id: str) -> None:
        """Take a share.

        Raises:
            LockedError: another gateway ends the instance.
            ManagerError: that cannot be told now.
        """
        ...

    async def alone(self, instance_id: str) -> bool:
        """Give the own share up; return whether no other gateway has one. None can take one until `over`.

        Raises:
            ManagerError: that cannot be told now; the share is kept.
        """
        ...

    def over(self, instance_id: str) -> None:
        """Give everything of an instance back. Waits for nothing."""
        ...


class ContainerPids(Protocol):
    def container_of(self, pid: int) -> str | None:
        """The full id of the container a host process runs in, None when it runs in none."""
        ...

    def name_of(self, pid: int) -> str | None:
        """The name of a host process, None when it is gone."""
        ...


class Scheduler(Protocol):
    def every(self, name: str, interval_s: float, tick: Callable[[], None]) -> None: ...
    def cron(self, name: str, line: str, timezone: str | None, tick: Callable[[], None]) -> None: ...
    def remove(self, name: str) -> None: ...
    def upcoming(self, name: str, count: int) -> tuple[datetime, ...]: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
