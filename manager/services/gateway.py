"""What the data path asks for each request: where it may go, a lease, and what to remember of its end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from manager.domain.instance import Phase
from manager.domain.models import model_key
from manager.domain.routing import Candidate, Decision, RequestFacts, Snapshot, State, decide
from manager.domain.wording import listed, model_not_found
from manager.errors import BackingOffError, LimitReachedError, ManagerError, Reason, UnavailableError
from manager.services.model_lists import volume_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from manager.domain.roles import BodyChanges, RoutingSettings
    from manager.domain.routing import Attempt
    from manager.services.fleet import Fleet
    from manager.services.instance import Instance
    from manager.services.journal import Journal
    from manager.services.leases import Lease
    from manager.services.model_lists import ModelLists
    from manager.services.traffic import RequestRecord, Traffic
    from manager.services.world import Changes

# Whatever the counters of changes miss is seen after this long; a request that is sent to a place that has
# gone meanwhile finds out when it asks for the lease.
_OLDEST_SNAPSHOT_S = 1.0
_MOST_REMEMBERED = 4096
# What a server does wrong with one model; all else is the instance's trouble.
_OF_MODELS = (Reason.UPSTREAM_ERROR, Reason.ATTEMPT_TIMEOUT)
# Between two looks at whether a server that says nothing does anything.
_STILL_LOADING_S = 1.0
_BUSY_CPU_S = 0.1
# A first back-off is waited for; after several failures in a row callers are told at once.
_PATIENCE_S = 2.5
_MOMENT_S = 0.01


class SettingsSource(Protocol):
    """Where the current routing settings are; `version` grows with each change."""

    @property
    def routing(self) -> RoutingSettings: ...
    @property
    def version(self) -> int: ...


class ModelPuller(Protocol):
    async def pull(self, instance: str, model: str, tell: Callable[[str], None]) -> None:
        """Have the model on the instance's volume; what goes on is told in words.

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

    def __init__(self, instance: str, model: str, there_is: Mapping[str, str]) -> None:
        super().__init__(
            f"{model_not_found(model)}; models on {instance}: {listed(sorted(there_is.values()))}",
            reason=Reason.MODEL_MISSING,
            instance=instance,
        )


def _nobody(_words: str) -> None:
    """Takes what nobody wants to hear."""


class Attempts:
    """The attempts for one request, one after the other.

    Those that follow a failed one obey the settings as they are by then.
    """

    __slots__ = ("_ahead", "_coming", "_decided_by", "_facts", "_gateway", "_made", "decision")

    def __init__(self, gateway: Gateway, facts: RequestFacts) -> None:
        self._gateway = gateway
        self._facts = facts
        self._made: tuple[Attempt, ...] = ()
        self._ahead: Attempt | None = None
        self._decided_by = gateway.settings_version
        self.decision = gateway.decide(facts)
        self._coming = self.decision.in_order(gateway.load())

    @property
    def more(self) -> bool:
        """Whether another one could follow."""
        if self._ahead is None:
            self._ahead = next(self._coming, None)
        return self._ahead is not None

    def next(self) -> Attempt | None:
        """The next one; None when there is no other."""
        if self._made and self._decided_by != self._gateway.settings_version:
            self._decide_again()
        attempt, self._ahead = self._ahead or next(self._coming, None), None
        if attempt is not None:
            self._made = (*self._made, attempt)
        return attempt

    @property
    def failed_on(self) -> frozenset[str]:
        """The instances of those before the latest one."""
        return frozenset(attempt.instance for attempt in self._made[:-1])

    def _decide_again(self) -> None:
        made = {(one.instance, one.model, one.because == "pull") for one in self._made}
        self._decided_by = self._gateway.settings_version
        attempts = self._gateway.decide(self._facts).in_order(self._gateway.load())
        self._coming = (
            one for one in attempts if (one.instance, one.model, one.because == "pull") not in made
        )
        self._ahead = None


class Gateway:
    """Decides over snapshots; a snapshot never gates a change, the lease does."""

    def __init__(
        self,
        fleet: Fleet,
        settings: SettingsSource,
        lists: ModelLists,
        traffic: Traffic,
        journal: Journal,
        *,
        in_flight: Mapping[str, int],
        changes: Changes,
        now: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._settings = settings
        self._lists = lists
        self._traffic = traffic
        self._journal = journal
        self._changed = changes
        self._now = now
        self._in_flight = in_flight
        self._decisions: dict[RequestFacts, Decision] = {}
        self._changes: dict[tuple[str, str | None], BodyChanges] = {}
        self._seen: tuple[int, int, int, int] = (-1, -1, -1, -1)
        self._snapshot = Snapshot(())
        self._taken_at = float("-inf")
        self._told: dict[tuple[str, str | None], tuple[str, Reason | None]] = {}
        self._broken: set[str] = set()
        self.puller: ModelPuller | None = None
        self.under_way: Callable[[], Iterable[tuple[str, bool]]] = tuple

    @property
    def settings_version(self) -> int:
        """Grows with each change of the settings."""
        return self._settings.version

    def changes_for(self, attempt: Attempt) -> BodyChanges:
        """What is changed in the body of a request for this attempt."""
        key = attempt.model, attempt.role
        changes = self._changes.get(key)
        if changes is None:
            changes = self._changes[key] = self._settings.routing.changes_for(attempt.model, attempt.role)
        return changes

    # --- decisions ---

    def decide(self, facts: RequestFacts) -> Decision:
        """Where a request may go. Remembered until something changes that it depends on."""
        self.snapshot()
        decision = self._decisions.get(facts)
        if decision is None:
            if len(self._decisions) >= _MOST_REMEMBERED:
                self._decisions.clear()
                self._changes.clear()
            decision = self._decisions[facts] = decide(facts, self._settings.routing, self._snapshot)
        return decision

    def load(self) -> Mapping[str, int]:
        """Requests in flight by instance, as they are whenever it is looked at."""
        return self._in_flight

    def snapshot(self) -> Snapshot:
        """All instances as they are, or were less than a second ago."""
        now = self._now()
        seen = self._counts()
        if seen != self._seen or now - self._taken_at > _OLDEST_SNAPSHOT_S:
            for instance in self._fleet.instances():
                self._lists.take(instance)
            self._seen = self._counts()
            self._taken_at = now
            self._snapshot = Snapshot(
                tuple(self._candidate(instance) for instance in self._fleet.instances())
            )
            self._decisions.clear()
            self._changes.clear()
        return self._snapshot

    def models_of(self, instance: Instance) -> Mapping[str, str] | None:
        """The name of each model on the instance's volume by its key, None when nobody has read it yet."""
        return self._lists.of(volume_of(instance.spec))

    # --- leases ---

    def try_lease(self, attempt: Attempt) -> Lease | None:
        """A lease for an attempt that can be made right now; None when something has to be waited for."""
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
        patient: bool = False,
        failed_on: Collection[str] = (),
        tell: Callable[[str], None] = _nobody,
    ) -> Prepared:
        """A lease for an attempt, whatever has to happen first: a start, a first look at the models, a pull.

        Args:
            attempt: what it is for.
            patient: there is no other way to answer: wait for the end of a short back-off, and have an
                instance that turns out not to have the model pull it, where that is permitted.
            failed_on: instances that this request has been to; none of them is stopped to make way for it.
            tell: takes the progress of a pull, in words.

        Raises:
            ManagerError: it cannot be had.
        """
        instance = self._fleet.get(attempt.instance)
        began = self._now()
        runs = instance.usable_endpoint() is not None
        while True:
            try:
                lease = await self._lease(instance, failed_on)
                break
            except BackingOffError as error:
                wait_s = error.retry_after_s or 0.0
                if not patient or self._now() + wait_s > began + _PATIENCE_S:
                    raise
                # A sleep may end a moment too soon.
                await asyncio.sleep(wait_s + _MOMENT_S)
        start_ms = None if runs else (self._now() - began) * 1000
        try:
            pulls = attempt.because == "pull"
            if attempt.because == "unread":
                pulls = not await self._has(instance, attempt.model, may_pull=patient)
            if pulls and self.puller is not None:
                await self.puller.pull(instance.id, attempt.model, tell)
            if attempt.because != "loaded":
                await instance.make_room_for(attempt.model)
        except BaseException:
            lease.release()
            raise
        return Prepared(lease, start_ms)

    async def _lease(self, instance: Instance, failed_on: Collection[str]) -> Lease:
        try:
            return await instance.lease()
        except LimitReachedError:
            async with self._fleet.place_for(instance.id, keep=failed_on):
                return await instance.lease()

    async def has_gone(self, instance_id: str) -> bool:
        """Look whether an instance that cannot be connected to is really there; waits for the answer."""
        return await self._fleet.get(instance_id).has_gone()

    def is_silent(self, instance_id: str) -> bool:
        """Whether an instance has stopped answering its probes."""
        return self._fleet.get(instance_id).is_silent

    async def still_loads(self, instance_id: str) -> bool:
        """Whether an instance that has not answered for long is busy with something, as with a load."""
        instance = self._fleet.get(instance_id)
        before = await instance.effort()
        await asyncio.sleep(_STILL_LOADING_S)
        after = await instance.effort()
        if before is None or after is None:
            return False
        return after.cpu_s - before.cpu_s >= _BUSY_CPU_S or after.vram_bytes > before.vram_bytes

    # --- what became of it ---

    def failed(self, instance_id: str, reason: Reason, model: str | None = None) -> None:
        """An attempt has failed, for `model` if its server was asked for one."""
        self._traffic.failed(instance_id, reason)
        if model is not None and reason in _OF_MODELS and len(self._broken) < _MOST_REMEMBERED:
            self._broken.add(model_key(model))
        if reason is Reason.MODEL_MISSING:
            self._fleet.get(instance_id).read_models_soon()

    def ended(self, record: RequestRecord) -> None:
        """A request has ended: count it, write it down, and tell when where it went has changed."""
        self._traffic.ended(record)
        if self._broken and record.outcome == "ok" and record.model is not None:
            self._broken.discard(model_key(record.model))
        if not record.fallback and not self._told:
            return
        if record.effective_target is None or record.outcome != "ok":
            return
        asked_for = (record.role or record.model or "", record.requested_target)
        # A single entry a role or model, whoever asks: it is told when that changes, not for every request.
        reason = record.fallback_reason if record.fallback else None
        told = self._told.get(asked_for)
        if (told is None and reason is None) or told == (record.effective_target, reason):
            return
        if reason is None:
            del self._told[asked_for]
            self._journal.record(
                "fallback_ended", instance=record.effective_target, detail=f"{asked_for[0]} is back"
            )
            return
        if len(self._told) >= _MOST_REMEMBERED:
            self._told.clear()
        self._told[asked_for] = (record.effective_target, reason)
        wanted = record.requested_target or record.policy or "auto"
        self._journal.record(
            "fallback",
            instance=record.effective_target,
            reason=reason,
            detail=f"{asked_for[0]} (wanted: {wanted}) is answered by {record.effective_target}",
        )

    # --- what is known of models ---

    def models_at_work(self) -> Mapping[str, Literal["in_use", "loading"]]:
        """What requests that are under way do with models, by their keys."""
        doing: dict[str, Literal["in_use", "loading"]] = {}
        for model, loading in self.under_way():
            key = model_key(model)
            if not loading or key not in doing:
                doing[key] = "loading" if loading else "in_use"
        return doing

    def idle_status(self, key: str) -> Literal["not_loaded", "error"]:
        """What there is to say of a model that is in no memory."""
        return "error" if key in self._broken else "not_loaded"

    def first_token_ms(self, instance_id: str, key: str) -> float | None:
        """The mean time to the first token of a model on an instance; None where it never answered there."""
        return self._traffic.first_token_ms(instance_id, key)

    # --- helpers ---

    def _counts(self) -> tuple[int, int, int, int]:
        # Nearly all that happens to an instance is recorded as an event: their number tells that it did.
        return self._journal.last_id, self._changed.count, self._lists.version, self._settings.version

    async def _has(self, instance: Instance, model: str, *, may_pull: bool) -> bool:
        """Read the models of an instance; whether it has this one.

        Raises:
            ModelMissingError: it has not, and must not pull it.
            UnavailableError: it does not say.
        """
        if instance.listed is None:
            await instance.probe(tags=True)
        self._lists.take(instance)
        models = self.models_of(instance)
        if models is None:
            raise UnavailableError(
                f"{instance.id} does not say which models it has",
                reason=Reason.INSTANCE_UNHEALTHY,
                instance=instance.id,
            )
        has = model_key(model) in models
        if not has and not (may_pull and self._settings.routing.auto_pull):
            raise ModelMissingError(instance.id, model, models)
        return has

    def _candidate(self, instance: Instance) -> Candidate:
        view = instance.view()
        ready = instance.usable_endpoint() is not None
        state, why_out = State.STARTABLE, None
        if ready and not instance.is_silent:
            state = State.READY
        elif ready:
            state, why_out = State.OUT, Reason.INSTANCE_UNHEALTHY
        elif view.phase is Phase.UNAVAILABLE:
            code = view.explanation.code if view.explanation else None
            state, why_out = State.OUT, code or Reason.INSTANCE_UNAVAILABLE
        return Candidate(
            id=instance.id,
            device=instance.spec.device_kind,
            state=state,
            priority=instance.spec.priority,
            models=self.models_of(instance),
            loaded=frozenset(model_key(model.name) for model in view.models) if ready else frozenset(),
            why_out=why_out,
            serves=instance.spec.serves,
        )


def reason_of(error: ManagerError) -> Reason:
    """The entry of the one list of reasons that an error stands for."""
    if isinstance(error, UnavailableError):
        return error.reason
    if isinstance(error, LimitReachedError):
        return Reason.OVERLOADED
    return Reason(error.code) if error.code in set(Reason) else Reason.INSTANCE_UNAVAILABLE
