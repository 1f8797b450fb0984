"""Gives leases on instances: starts what is stopped, evicts what is unused, reads and pulls models."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from manager.domain.models import model_key
from manager.domain.wording import listed, model_not_found
from manager.errors import BackingOffError, LimitReachedError, ManagerError, Reason, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from manager.domain.routing import Attempt
    from manager.services.instances.capacity import Capacity
    from manager.services.instances.fleet import Fleet
    from manager.services.instances.instance import Instance
    from manager.services.instances.leases import Lease
    from manager.services.models.model_lists import ModelLists
    from manager.services.routing.router import Router, SettingsSource

# The pause between two looks at the effort of a server that does not answer.
_EFFORT_INTERVAL_S = 1.0
_BUSY_CPU_S = 0.1
# A first back-off is waited for; after several failures in a row the caller is told at once.
_MAX_BACKOFF_WAIT_S = 2.5
# A sleep may end a moment early.
_SLEEP_SLACK_S = 0.01


class ModelPuller(Protocol):
    async def pull(self, instance: str, model: str, tell: Callable[[str], None]) -> None:
        """Have the model on the instance's volume; `tell` takes the progress in words.

        Raises:
            UnavailableError: it cannot be had, with reason `model_missing`.
        """


@dataclass(frozen=True, slots=True)
class Prepared:
    """A lease, and how long the instance had to be started for it; None when it ran already."""

    lease: Lease
    start_ms: float | None


class ModelMissingError(UnavailableError):
    """The instance was asked, and does not have the model."""

    def __init__(self, instance: str, model: str, models: Mapping[str, str]) -> None:
        super().__init__(
            f"{model_not_found(model)}; models on {instance}: {listed(sorted(models.values()))}",
            reason=Reason.MODEL_MISSING,
            instance=instance,
        )


def _ignore(_words: str) -> None:
    """Take progress that no client reads."""


class Placement:
    """Gives leases.

    Args:
        fleet: the instances.
        capacity: makes places where `max_running` is reached.
        router: knows the models of each instance.
        lists: takes in what instances list.
        settings: the routing settings.
        now: seconds on a monotonic clock.
    """

    def __init__(
        self,
        fleet: Fleet,
        capacity: Capacity,
        router: Router,
        lists: ModelLists,
        settings: SettingsSource,
        *,
        now: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._capacity = capacity
        self._router = router
        self._lists = lists
        self._settings = settings
        self._now = now

    def try_lease(self, attempt: Attempt) -> Lease | None:
        """Return a lease that can be had without waiting; None when something has to be waited for."""
        if attempt.because in ("unread", "pull"):
            return None
        instance = self._fleet.get(attempt.instance)
        if attempt.because != "loaded" and not instance.has_room_for(attempt.model):
            return None
        return instance.try_lease()

    async def prepare(
        self,
        attempt: Attempt,
        *,
        puller: ModelPuller | None = None,
        patient: bool = False,
        failed_on: Collection[str] = (),
        tell: Callable[[str], None] = _ignore,
    ) -> Prepared:
        """Return a lease after whatever has to happen first: a start, a reading of the models, a pull.

        Args:
            attempt: what the lease is for.
            puller: pulls a missing model, where the settings permit it; None pulls nothing.
            patient: no other attempt follows: wait for the end of a short back-off, and pull a model that the
                instance turns out to lack.
            failed_on: instances that this request has failed on; none of them is evicted for it.
            tell: takes the progress of a pull, in words.

        Raises:
            ManagerError: no lease can be had.
        """
        instance = self._fleet.get(attempt.instance)
        runs = instance.usable_endpoint() is not None
        pulls = attempt.because == "pull"
        if pulls and not runs and puller is not None:
            # The volume's writer pulls. This instance is not started for a model that cannot be had.
            await puller.pull(instance.id, attempt.model, tell)
            pulls = False
        began = self._now()
        while True:
            try:
                lease = await self._lease(instance, failed_on)
                break
            except BackingOffError as error:
                wait_s = error.retry_after_s or 0.0
                if not patient or self._now() + wait_s > began + _MAX_BACKOFF_WAIT_S:
                    raise
                await asyncio.sleep(wait_s + _SLEEP_SLACK_S)
        start_ms = None if runs else (self._now() - began) * 1000
        try:
            if attempt.because == "unread":
                pulls = not await self._has(instance, attempt.model, may_pull=patient)
            if pulls and puller is not None:
                await puller.pull(instance.id, attempt.model, tell)
            if attempt.because != "loaded":
                await instance.make_room_for(attempt.model)
        except BaseException:
            lease.release()
            raise
        return Prepared(lease, start_ms)

    async def has_gone(self, instance_id: str) -> bool:
        """Look whether an instance that cannot be connected to is really there; waits for the answer."""
        return await self._fleet.get(instance_id).has_gone()

    def is_silent(self, instance_id: str) -> bool:
        """Whether an instance has stopped answering its probes."""
        return self._fleet.get(instance_id).is_silent

    def reread_models(self, instance_id: str) -> None:
        """Have the next probe of an instance read its models: the list has turned out wrong."""
        self._fleet.get(instance_id).read_models_soon()

    async def still_loads(self, instance_id: str) -> bool:
        """Whether an instance that has not answered for long works on something, such as a load."""
        instance = self._fleet.get(instance_id)
        before = await instance.effort()
        await asyncio.sleep(_EFFORT_INTERVAL_S)
        after = await instance.effort()
        if before is None or after is None:
            return False
        return after.cpu_s - before.cpu_s >= _BUSY_CPU_S or after.vram_bytes > before.vram_bytes

    async def _lease(self, instance: Instance, failed_on: Collection[str]) -> Lease:
        try:
            return await instance.lease()
        except LimitReachedError:
            async with self._capacity.place_for(instance.id, keep=failed_on):
                return await instance.lease()

    async def _has(self, instance: Instance, model: str, *, may_pull: bool) -> bool:
        """Read the models of an instance; whether it has this one.

        Raises:
            ModelMissingError: it has not, and must not pull it.
            UnavailableError: it does not list its models.
        """
        if instance.listed is None:
            await instance.probe(tags=True)
        self._lists.take(instance)
        models = self._router.models_of(instance)
        if models is None:
            raise UnavailableError(
                f"{instance.id} does not list its models",
                reason=Reason.INSTANCE_UNHEALTHY,
                instance=instance.id,
            )
        has = model_key(model) in models
        if not has and not (may_pull and self._settings.routing.auto_pull):
            raise ModelMissingError(instance.id, model, models)
        return has


def reason_of(error: ManagerError) -> Reason:
    """Return the entry of the one list of reasons that an error stands for."""
    if isinstance(error, UnavailableError):
        return error.reason
    if isinstance(error, LimitReachedError):
        return Reason.OVERLOADED
    return Reason(error.code) if error.code in set(Reason) else Reason.INSTANCE_UNAVAILABLE
