"""Gives leases on instances: starts what is stopped, evicts what is unused, reads and pulls models."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from manager.domain.models import model_key
from manager.domain.routing import PassedOver, denied_message
from manager.domain.wording import listed, model_not_found
from manager.errors import BackingOffError, LimitReachedError, ManagerError, Reason, UnavailableError
from manager.services.models.model_lists import volume_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from manager.domain.routing import Attempt
    from manager.services.instances.capacity import Capacity
    from manager.services.instances.fleet import Fleet
    from manager.services.instances.instance import Instance
    from manager.services.instances.leases import Lease
    from manager.services.models.model_lists import ModelLists
    from manager.services.models.volume_reader import VolumeReader
    from manager.services.routing.router import Router, SettingsSource

# The pause between two looks at the effort of a server that does not answer.
_EFFORT_INTERVAL_S = 1.0
_BUSY_CPU_S = 0.1
# A first back-off is waited for; after several failures in a row the caller is told at once.
_MAX_BACKOFF_WAIT_S = 2.5
# How long a request waits for a volume to be read without a start.
_READING_S = 5.0
# A sleep may end a moment early.
_SLEEP_SLACK_S = 0.01


class ModelPuller(Protocol):
    async def pull(self, instance: str, model: str, tell: Callable[[str], None]) -> None:
        """Have the model on the instance's volume; `tell` takes the progress in words.

        Raises:
            UnavailableError: it cannot be had, with reason `model_missing`.
        """

    def refuse_given_up(self, instance: str, model: str) -> None:
        """Raise the error of the last pull, where that failed a moment ago. Nothing needs to be started."""


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
        reader: lists volumes without starting anything; None: only servers list them.
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
        reader: VolumeReader | None = None,
    ) -> None:
        self._fleet = fleet
        self._capacity = capacity
        self._router = router
        self._lists = lists
        self._settings = settings
        self._now = now
        self._reader = reader
        # Requests that wait in `prepare`.
        self.preparing = 0
        self._is_frozen = False
        # By volume. Held while the first instance on it is started and its models are read.
        self._first_readings: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def try_lease(self, attempt: Attempt) -> Lease | None:
        """Return a lease that can be had without waiting; None when something has to be waited for."""
        if attempt.because in ("unread", "pull"):
            return None
        instance = self._fleet.get(attempt.instance)
        if attempt.because != "loaded" and (
            instance.usable_endpoint() is None or not instance.take_room_for(attempt.model)
        ):
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
        """Return a lease after what has to happen first: a start, a reading of the models, a pull.

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
        if self._is_frozen:
            raise UnavailableError(
                "the manager is being replaced; try again", reason=Reason.CANCELLED, retry_after_s=1.0
            )
        self.preparing += 1
        try:
            return await self._prepare(attempt, puller, patient=patient, failed_on=failed_on, tell=tell)
        finally:
            self.preparing -= 1

    def freeze(self) -> None:
        """Prepare nothing from now on: another daemon manages the instances. Those that run can be leased."""
        self._is_frozen = True

    async def _prepare(
        self,
        attempt: Attempt,
        puller: ModelPuller | None,
        *,
        patient: bool,
        failed_on: Collection[str],
        tell: Callable[[str], None],
    ) -> Prepared:
        if attempt.because == "pull" and puller is not None:
            puller.refuse_given_up(attempt.instance, attempt.model)
        instance = self._fleet.get(attempt.instance)
        pulls = attempt.because == "pull"
        if pulls and instance.usable_endpoint() is None and puller is not None:
            # The volume's writer pulls. This instance is not started for a model that cannot be had.
            await puller.pull(instance.id, attempt.model, tell)
            self.refuse_denied(attempt)
            pulls = False
        began = self._now()
        async with AsyncExitStack() as turn:
            if attempt.because == "unread":
                await turn.enter_async_context(self._first_readings[volume_of(instance.spec)])
                if await self._is_read(instance):
                    await turn.aclose()
                    self._refuse_missing(attempt, puller, may_pull=patient)
                    self.refuse_denied(attempt)
            runs = instance.usable_endpoint() is not None
            lease = await self._patient_lease(instance, failed_on, began, patient=patient)
            start_ms = None if runs else (self._now() - began) * 1000
            try:
                if attempt.because == "unread":
                    pulls = not await self._has(instance, attempt.model, may_pull=patient)
                    self.refuse_denied(attempt)
                await turn.aclose()
                if pulls and puller is not None:
                    await puller.pull(instance.id, attempt.model, tell)
                    self.refuse_denied(attempt)
                if attempt.because != "loaded":
                    await instance.make_room_for(attempt.model)
            except BaseException:
                lease.release()
                raise
        return Prepared(lease, start_ms)

    def refuse_denied(self, attempt: Attempt) -> None:
        """Refuse a model that its instance must not run; its size may have become known a moment ago.

        Raises:
            UnavailableError: it is denied.
        """
        rule = self._router.denial(attempt.instance, attempt.model)
        if rule:
            denied = PassedOver(attempt.instance, attempt.model, Reason.HOST_DENIED, rule)
            raise UnavailableError(
                denied_message([denied]), reason=Reason.HOST_DENIED, instance=attempt.instance
            )

    def expect_on_cpu(self, attempt: Attempt) -> None:
        """The request of an attempt asks for its model to be computed by the processor."""
        self._fleet.get(attempt.instance).expect_on_cpu(attempt.model)

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

    async def _is_read(self, instance: Instance) -> bool:
        """Whether the models of an instance that does not run are known, after a look at its volume."""
        if self._reader is not None and self._router.models_of(instance) is None:
            await self._reader.look(within_s=_READING_S, volume=volume_of(instance.spec))
        return self._router.models_of(instance) is not None

    def _refuse_missing(self, attempt: Attempt, puller: ModelPuller | None, *, may_pull: bool) -> None:
        """Refuse a model that is not on a volume which has been read meanwhile: nothing is started for it.

        Raises:
            UnavailableError: it is not there, and cannot be pulled.
        """
        instance = self._fleet.get(attempt.instance)
        models = self._router.models_of(instance) or {}
        if model_key(attempt.model) in models:
            return
        if not (may_pull and self._settings.routing.auto_pull):
            raise ModelMissingError(instance.id, attempt.model, models)
        if puller is not None:
            puller.refuse_given_up(instance.id, attempt.model)

    async def _patient_lease(
        self, instance: Instance, failed_on: Collection[str], began: float, *, patient: bool
    ) -> Lease:
        while True:
            try:
                return await self._lease(instance, failed_on)
            except BackingOffError as error:
                wait_s = error.retry_after_s or 0.0
                if not patient or self._now() + wait_s > began + _MAX_BACKOFF_WAIT_S:
                    raise
                await asyncio.sleep(wait_s + _SLEEP_SLACK_S)

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
