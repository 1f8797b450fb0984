"""State that the parts of one supervisor share: starting, stopping and looking work on the same container."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from manager.domain.container import (
    LABEL_DEVICE,
    Reach,
    ServicePlace,
    container_request,
    device_text,
    is_ours,
)
from manager.domain.instance import DeviceKind
from manager.errors import EngineUnreachableError, Reason
from manager.services.instances.container_run import Signals
from manager.services.instances.instance import drained_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager.domain.container import ContainerRequest
    from manager.domain.drained import Drained
    from manager.domain.instance import ContainerFacts, InstanceSpec
    from manager.domain.template import Template
    from manager.errors import DrainedError, ManagerError
    from manager.services.instances.condition import LiveCondition
    from manager.services.instances.container_run import ContainerRun
    from manager.services.instances.storing import Store
    from manager.services.world import World


@dataclass(slots=True)
class Workings:
    """The container of one instance and everything that acts on it.

    Attributes:
        name: the container's name.
        in_flight: returns the number of open leases.
        signals: the engine's events about the current run.
        reach: how the container is reached; None where that cannot be told.
        engine_up: the engine answers.
        remedy: the end of the message of a failed start, where an operator's choice may be the cause.
    """

    world: World
    spec: InstanceSpec
    template: Template
    name: str
    condition: LiveCondition
    run: ContainerRun
    store: Store
    in_flight: Callable[[], int]
    signals: Signals = field(default_factory=Signals)
    reach: Reach | None = Reach.ADDRESS
    engine_up: bool = False
    remedy: str = ""

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def is_gpu(self) -> bool:
        return self.spec.device_kind is DeviceKind.GPU

    def request(self) -> ContainerRequest:
        """The container as it is created now."""
        return container_request(
            self.template,
            manager_id=self.world.manager_id,
            instance_id=self.id,
            gpu=self._gpu() if self.is_gpu else None,
            loopback_port=self.store.row.loopback_port if self.reach is Reach.LOOPBACK else None,
            owner=self.world.owner,
            service=self._service(),
        )

    def _service(self) -> ServicePlace | None:
        network = self.world.services_network
        if network is None:
            return None
        port = self.store.row.loopback_port if self.reach is Reach.HOST else None
        return ServicePlace(network, port, self.spec.placement)

    def _gpu(self) -> str | None:
        """The UUIDs of its cards; while they are not known, of the cards its container was made for."""
        container = self.condition.state.container
        made_for = container.labels.get(LABEL_DEVICE) if container else None
        return device_text(self.world.gpus.wanted_uuids(self.id)) or made_for

    def mine(self, facts: ContainerFacts | None) -> ContainerFacts | None:
        """`facts`, unless the container only has the name."""
        world = self.world
        ours = facts is not None and is_ours(
            facts, manager_id=world.manager_id, instance_id=self.id, owner=world.owner
        )
        return facts if ours else None

    def out_of_service(self, drained: Drained) -> DrainedError:
        return drained_error(self.id, drained, self.world.utcnow())

    def engine_away(self) -> EngineUnreachableError:
        error = EngineUnreachableError(f"the container engine at {self.world.engine.url} is not available")
        error.instance = self.id
        return error


def reason_of(error: ManagerError) -> Reason:
    """The entry of the one list of reasons that an error of an operation stands for."""
    return Reason(error.code) if error.code in set(Reason) else Reason.START_FAILED
