"""State that every instance shares: the outside, the clock, and what the fleet decides for all."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from manager.errors import Reason, UnavailableError
from manager.services.instances.sharing import NoSharing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from datetime import datetime

    from manager.domain.instance import KeySource
    from manager.domain.ownership import Owner
    from manager.services.gpus import Gpus
    from manager.services.journal import Journal
    from manager.services.ports import Engine, InstanceLocks, Registry, Shares, Upstream

# More containers than this are not created and started at once: an engine works them off hardly any sooner
# (64 took 0.46 s each on two cores, 8 took 0.35 s), and those that queue in it meet their deadline there.
STARTS_AT_ONCE = 8


async def no_key(source: KeySource) -> str:
    """Read no key, where no instance wants one."""
    raise UnavailableError(f"no key: {source} is not read here", reason=Reason.INSTANCE_UNAVAILABLE)


def no_others() -> bool:
    """No daemon was replaced by this one."""
    return False


async def no_step(_instance: str, _step: str) -> None:
    """Called after each recorded step of an operation; only tests put something else here."""


def no_trouble(_placement: tuple[str, ...]) -> str | None:
    """Every placement can be met, as far as is known."""
    return None


def no_change(_instance: str) -> None:
    """Called when the server of an instance has gone or is another one, where nobody minds."""


@dataclass(slots=True)
class Revision:
    """Grows with every change of the fleet that routing reads. A snapshot of an older one is out of date."""

    number: int = 0

    def advance(self) -> None:
        self.number += 1


@dataclass(frozen=True, slots=True)
class World:
    """Collaborators of all instances.

    `now` is monotonic seconds, `utcnow` the wall clock. `on_step` is awaited after each step of an operation
    that has been recorded, which is where a test lets the daemon die. `resume_idle_clock` lets adopted
    containers keep the idle time they had; a daemon that serves gives them a fresh TTL instead. A `dry_run`
    finishes no stop that an earlier process began. `in_flight` has the number of open leases by instance.
    `revision` is that of the fleet. `starting` is held while a container is created and started, and by
    nothing else. `owner` is that of the state directory; None where owners are not distinguished.
    `others_work` returns whether a daemon that this one has replaced still ends requests: those are in no
    `in_flight`.
    `server_changed` is called with the id of an instance whose server has gone, or is another one.
    `read_key` returns the key for a server, and raises `UnavailableError` where there is none.
    `why_no_node` returns why no node can take a service with such constraints, None where one can.
    `shares` are those of instances that other gateways use as well.
    `services_network` is the network of services where the engine is Docker Swarm; None for containers.
    """

    manager_id: str
    engine: Engine
    registry: Registry
    locks: InstanceLocks
    upstream: Upstream
    gpus: Gpus
    journal: Journal
    now: Callable[[], float]
    utcnow: Callable[[], datetime]
    on_step: Callable[[str, str], Awaitable[None]] = no_step
    resume_idle_clock: bool = False
    dry_run: bool = False
    owner: Owner | None = None
    others_work: Callable[[], bool] = no_others
    server_changed: Callable[[str], None] = no_change
    read_key: Callable[[KeySource], Awaitable[str]] = no_key
    services_network: str | None = None
    why_no_node: Callable[[tuple[str, ...]], str | None] = no_trouble
    shares: Shares = field(default_factory=NoSharing)
    in_flight: dict[str, int] = field(default_factory=dict)
    revision: Revision = field(default_factory=Revision)
    starting: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(STARTS_AT_ONCE))
