"""Decides where requests may go, over an immutable snapshot of the fleet."""

from __future__ import annotations

from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from manager.domain.denial import Denials, DenyRules
from manager.domain.instance import Phase
from manager.domain.models import model_key
from manager.domain.roles import RequestKind
from manager.domain.routing import Candidate, Decision, RequestFacts, Snapshot, State, decide
from manager.domain.scoring import NO_BENCHMARKS
from manager.domain.target import Protocol as ServerProtocol
from manager.errors import Reason
from manager.services.models.model_lists import volume_of
from manager.services.routing.affinity import Affinity, LeaningLoad
from manager.services.routing.ranking import Ranking
from manager.wire.opening import opening_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from manager.domain.roles import BodyChanges, RoutingSettings
    from manager.domain.routing import Attempt, Band, Load, Ranks
    from manager.domain.scoring import Benchmarks
    from manager.services.instances.first_look import FirstLook
    from manager.services.instances.fleet import Fleet
    from manager.services.instances.instance import Instance
    from manager.services.models.model_lists import ModelLists
    from manager.services.routing.breakers import Breakers
    from manager.services.routing.overload import Overload
    from manager.services.world import Revision
    from manager.wire.body import Fields

# Silence of a server is a matter of time, which advances no revision: a snapshot lives this long at most. A
# stale snapshot costs one failed attempt, because the lease decides.
_MAX_SNAPSHOT_AGE_S = 1.0
_MAX_DECISIONS = 4096
# Of requests with a key that is limited: each key has its own, so that those of others are kept apart.
_MAX_DECISIONS_BY_KEY = 1024
# Below every priority that an instance can be given.
_LAST = -1_000_000
_NO_MODELS: Mapping[str, str] = MappingProxyType({})
# Why an attempt is made on an instance that runs already.
RUNNING = ("loaded", "running")


def _never(_instance_id: str) -> None:
    """Lift no rules."""


class Opened(Protocol):
    """A request that may be part of a conversation: its fields, as `wire.body` reads them."""

    @property
    def fields(self) -> Fields: ...
    @property
    def is_small(self) -> bool:
        """Whether it may be read at once."""

    @property
    def most_input_tokens(self) -> int:
        """No tokenizer makes more of it."""

    @property
    def most_output_tokens(self) -> int | None:
        """The limit that the client sets; None without one."""


class SettingsSource(Protocol):
    """The current routing settings; `version` grows with each change."""

    @property
    def routing(self) -> RoutingSettings: ...
    @property
    def version(self) -> int: ...


class Router:
    """Owns the snapshot and the decisions made over it. A snapshot never gates a change; the lease does.

    Args:
        fleet: the instances.
        first_look: tells whether they were looked at since the daemon started.
        settings: the routing settings.
        lists: the models of each volume.
        revision: the revision of the fleet.
        in_flight: open leases by instance, read live.
        breakers: tells which instances are left alone.
        overload: tells which are used only where no other is available.
        now: seconds on a monotonic clock.
        lifted: of an instance, tells the order that lifts its deny rules; None where they hold.
        renewed: called after each new snapshot.
        benchmarks: the results of benchmarks, for scores.
    """

    def __init__(
        self,
        fleet: Fleet,
        settings: SettingsSource,
        lists: ModelLists,
        *,
        first_look: FirstLook,
        revision: Revision,
        in_flight: Mapping[str, int],
        breakers: Breakers,
        overload: Overload,
        now: Callable[[], float],
        lifted: Callable[[str], object] = _never,
        renewed: Callable[[], None] = lambda: None,
        benchmarks: Benchmarks = NO_BENCHMARKS,
    ) -> None:
        self._renewed = renewed
        self._fleet = fleet
        self._first_look = first_look
        self._settings = settings
        self._lists = lists
        self._revision = revision
        self._in_flight = in_flight
        self._breakers = breakers
        self._overload = overload
        self._now = now
        self._lifted = lifted
        self.affinity = Affinity()
        self.ranking = Ranking(overload, benchmarks)
        self._decisions: dict[RequestFacts, Decision] = {}
        self._decisions_by_key: dict[RequestFacts, Decision] = {}
        self._changes: dict[tuple[str, str | None], BodyChanges] = {}
        self._taken_of: tuple[int, int, int] = (-1, -1, -1)
        self._taken_at = float("-inf")
        self._snapshot = Snapshot(())

    @property
    def version(self) -> int:
        """Grows with each change of the settings, or of the names of the models on a volume."""
        return self._settings.version + self._lists.version

    @property
    def settings(self) -> RoutingSettings:
        """The settings in force."""
        return self._settings.routing

    @property
    def is_known(self) -> bool:
        """Whether the fleet was looked at once since the daemon started."""
        return self._first_look.is_known

    async def known(self, *, within_s: float) -> None:
        """Wait until `is_known`, at most for `within_s`."""
        await self._first_look.known(within_s=within_s)

    def decide(self, facts: RequestFacts) -> Decision:
        """Return where a request may go. The decision is kept until something that it depends on changes."""
        self.snapshot()
        if facts.permit is not None:
            return self._decide_by_key(facts)
        decision = self._decisions.get(facts)
        if decision is None:
            if len(self._decisions) >= _MAX_DECISIONS:
                self._decisions.clear()
                self._changes.clear()
            decision = self._decisions[facts] = decide(facts, self._settings.routing, self._snapshot)
        return decision

    def _decide_by_key(self, facts: RequestFacts) -> Decision:
        decision = self._decisions_by_key.get(facts)
        if decision is None:
            if len(self._decisions_by_key) >= _MAX_DECISIONS_BY_KEY:
                self._decisions_by_key.clear()
                self._changes.clear()
            decision = decide(facts, self._settings.routing, self._snapshot)
            self._decisions_by_key[facts] = decision
        return decision

    def attempts(self, facts: RequestFacts) -> Attempts:
        """Return the attempts for one request, in order."""
        return Attempts(self, facts)

    def load(self) -> Mapping[str, int]:
        """Return the requests in flight by instance, read live."""
        return self._in_flight

    def ranks(self, decision: Decision, turn: int | None = None) -> Ranks | None:
        """Return what compares the instances of a decision; None where no strategy does.

        Args:
            decision: of this router.
            turn: of the request; None looks at the next one without taking it.
        """
        if not decision.bands:
            return None
        turn = self.ranking.turn(decision.role) if turn is None else turn
        return partial(self._ranks, decision.request, turn)

    def _ranks(self, facts: RequestFacts, turn: int, band: Band, load: Load) -> Load:
        return self.ranking.ranks(facts, band, load, self._settings.routing, self._snapshot, turn)

    def changes_for(self, attempt: Attempt) -> BodyChanges:
        """Return the changes to the body of a request for this attempt."""
        key = attempt.model, attempt.role
        changes = self._changes.get(key)
        if changes is None:
            changes = self._changes[key] = self._settings.routing.changes_for(attempt.model, attempt.role)
        return changes

    def snapshot(self) -> Snapshot:
        """Return all instances as they are, or were less than a second ago."""
        now = self._now()
        revisions = self._revisions()
        if revisions != self._taken_of or now - self._taken_at > _MAX_SNAPSHOT_AGE_S:
            for instance in self._fleet.instances():
                self._lists.take(instance)
            self._taken_of = self._revisions()
            self._taken_at = now
            self._snapshot = Snapshot(tuple(self._candidate(one) for one in self._fleet.instances()))
            self._decisions.clear()
            self._decisions_by_key.clear()
            self._changes.clear()
            self._renewed()
        return self._snapshot

    def models_of(self, instance: Instance) -> Mapping[str, str] | None:
        """Return the names of the models on the instance's volume by key; None before the first reading."""
        return self._lists.of(volume_of(instance.spec))

    def denial(self, instance_id: str, model: str) -> str:
        """Return the rule that denies a model on an instance as things are now; empty where none does."""
        denials = self._denials(self._fleet.get(instance_id))
        return "" if denials is None else denials.rule(model_key(model))

    def _denials(self, instance: Instance) -> Denials | None:
        spec = instance.spec
        if not spec.deny_models and spec.max_parameters is None:
            return None
        if self._lifted(spec.id) is not None:
            return None
        rules = DenyRules(spec.deny_models, spec.max_parameters)
        return Denials(rules, self._lists.sizes(volume_of(spec)))

    def _revisions(self) -> tuple[int, int, int]:
        return self._revision.number, self._lists.version, self._settings.version

    def _candidate(self, instance: Instance) -> Candidate:
        drained = instance.drained
        ready = instance.usable_endpoint() is not None
        state, why_out, detail = State.STARTABLE, None, ""
        priority = instance.spec.priority
        if drained is not None:
            state, why_out, detail = State.OUT, Reason.INSTANCE_UNAVAILABLE, drained.detail
        elif ready and not instance.is_silent:
            state = State.READY
        elif ready:
            state, why_out = State.OUT, Reason.INSTANCE_UNHEALTHY
        elif (view := instance.view()).phase is Phase.UNAVAILABLE:  # dear: the others need none
            code = view.explanation.code if view.explanation else None
            state, why_out = State.OUT, code or Reason.INSTANCE_UNAVAILABLE
            if instance.spec.is_paid and view.explanation is not None:
                detail = view.explanation.message
        elif instance.ends:
            priority = _LAST  # it may be restarted, and can serve only after its stop
        if state is State.READY and (shut := self._breakers.why_shut(instance.id)):
            state, why_out, detail = State.OUT, Reason.BREAKER_OPEN, shut
        models = _NO_MODELS if instance.spec.is_paid else self.models_of(instance)
        if not ready:
            loaded: frozenset[str] = frozenset()
        elif instance.spec.protocol is ServerProtocol.OLLAMA:
            loaded = frozenset(model_key(model.name) for model in instance.models)
        else:
            loaded = frozenset(models or ())  # such servers serve what they hold
        return Candidate(
            id=instance.id,
            device=instance.spec.device_kind,
            state=state,
            priority=priority,
            models=models,
            loaded=loaded,
            why_out=why_out,
            detail=detail,
            overloads=self._overload.of(instance.id) if state is State.READY else None,
            serves=instance.spec.serves,
            denials=self._denials(instance),
            paid=instance.spec.is_paid,
            offers=instance.spec.offers,
            pulls=instance.spec.protocol is ServerProtocol.OLLAMA,
        )


class Attempts:
    """The attempts for one request, one after the other.

    An attempt that follows a failed one obeys the settings of that moment, and the lists of models: the first
    of several instances on a volume that was never listed has listed it for all of them.
    """

    __slots__ = (
        "_ahead",
        "_coming",
        "_decided_by",
        "_facts",
        "_keeps_role",
        "_made",
        "_may_pay",
        "_may_pull",
        "_may_start",
        "_only_pays",
        "_preferred",
        "_router",
        "_skipped",
        "_turn",
        "decision",
    )

    def __init__(self, router: Router, facts: RequestFacts) -> None:
        self._router = router
        self._facts = facts
        self._made: tuple[Attempt, ...] = ()
        self._ahead: Attempt | None = None
        self._may_start = True
        self._may_pull = True
        self._may_pay = True
        self._only_pays = False
        self._keeps_role = False
        self._preferred: str | None = None
        self._skipped: frozenset[int] = frozenset()
        self._turn: int | None = None
        self._decided_by = router.version
        self.decision = router.decide(facts)
        # Most requests need the first attempt only, and never ask for the others.
        self._coming: Iterator[Attempt] | None = None

    @property
    def made(self) -> tuple[Attempt, ...]:
        """Every attempt that was begun, in order."""
        return self._made

    @property
    def more(self) -> bool:
        """Whether another attempt could follow."""
        if self._ahead is None:
            self._ahead = self._following()
        return self._ahead is not None

    @property
    def first(self) -> Attempt | None:
        """The attempt that `next` returns first; None once the attempts have been looked at otherwise."""
        if self._made or self._coming is not None or self._keeps_role or not self._may_pull:
            return None
        if self._preferred is not None:
            leaning = self.decision.leaning(self._preferred, self._load())
            if leaning is not None:
                return leaning
        return self.decision.first(self._load(), self._ranks(self.decision))

    def next(self) -> Attempt | None:
        """Return the next attempt; None when there is no other."""
        attempt = self.first
        if attempt is None:
            if self._made and self._decided_by != self._router.version:
                self.renew()
            attempt, self._ahead = self._ahead or self._following(), None
        if attempt is not None:
            self._made = (*self._made, attempt)
        return attempt

    def choices(self) -> tuple[Attempt, ...]:
        """Return the next attempt and those that stand in for it where it has no free slot, in order."""
        if self._made and self._decided_by != self._router.version:
            self.renew()
        coming = self._rest()
        return tuple(one for one in coming if one.choice == coming[0].choice)

    def take(self, attempt: Attempt) -> None:
        """Make one of `choices`."""
        self._coming = iter([one for one in self._rest() if one != attempt])
        self._made = (*self._made, attempt)

    def take_first(self, attempt: Attempt) -> None:
        """Make the `first` one."""
        self._made = (attempt,)

    def skip(self) -> None:
        """Drop `choices` for good: none of them has a free slot, and the request waits for them no longer."""
        coming = self._rest()
        if coming:
            self._skipped |= {coming[0].choice}

    def renew(self) -> None:
        """Decide again over the fleet as it is now; attempts that were made are not repeated."""
        self._decided_by = self._router.version
        self._coming = self._unmade(self._router.decide(self._facts))
        self._ahead = None

    def lean(self, body: Opened) -> int:
        """Prefer the instance that has the conversation in memory, unless it is busier; to be called first.

        Returns:
            The conversation, for `Router.affinity`; 0 where the request is part of none.
        """
        opening = opening_of(body.fields) if self._facts.kind is RequestKind.GENERATE else None
        if opening is None:
            return 0
        conversation = hash((self._facts.model, opening)) or 1
        self._preferred = self._router.affinity.find(conversation)
        return conversation

    def start_no_other(self) -> None:
        """Keep only those attempts whose instances run already, whatever the settings become."""
        self._may_start = False
        self._coming = self._others()
        if self._ahead is not None and not self._is_allowed(self._ahead):
            self._ahead = None

    def pull_failed(self) -> None:
        """The model could not be pulled: start no other instance in order to pull it."""
        self._may_pull = False
        if self._ahead is not None and not self._is_allowed(self._ahead):
            self._ahead = None

    def pay_nothing(self) -> None:
        """Ask no paid server: what is local is busy, and has not failed."""
        self._may_pay = False
        if self._ahead is not None and self._ahead.because == "paid":
            self._ahead = None

    def only_pay(self) -> bool:
        """Ask no local server any more; return whether a paid one is left."""
        self._only_pays = True
        if self._ahead is not None and self._ahead.because != "paid":
            self._ahead = None
        return self.more

    def leave_role(self) -> None:
        """Drop the attempts under other roles than the one that was asked for: those have other models."""
        self._keeps_role = True
        if self._ahead is not None and self._ahead.role != self.decision.role:
            self._ahead = None

    @property
    def failed_on(self) -> frozenset[str]:
        """The instances of the attempts before the latest one."""
        return frozenset(attempt.instance for attempt in self._made[:-1])

    def _load(self) -> Load:
        load = self._router.load()
        return load if self._preferred is None else LeaningLoad(load, self._preferred)

    def _ranks(self, decision: Decision) -> Ranks | None:
        """Return what compares the instances of a decision. A request takes one turn for all attempts."""
        if not decision.bands:
            return None
        if self._turn is None:
            self._turn = self._router.ranking.take_turn(decision.role)
        return self._router.ranks(decision, self._turn)

    def _rest(self) -> list[Attempt]:
        """Return all attempts that could follow."""
        ahead = [] if self._ahead is None else [self._ahead]
        found = ahead + [one for one in self._others() if self._is_allowed(one)]
        self._ahead = None
        self._coming = iter(found)
        return found

    def _others(self) -> Iterator[Attempt]:
        """Return the attempts that follow those that were made."""
        if self._coming is None:
            self._coming = self._unmade(self.decision)
        return self._coming

    def _unmade(self, decision: Decision) -> Iterator[Attempt]:
        """Return the attempts of a decision in order, without those that were made."""
        load, made = self._load(), {_key(one) for one in self._made}
        in_order = decision.in_order(load, self._ranks(decision))
        if self._preferred is not None and decision.groups:
            leaning = decision.leaning(self._preferred, load)
            if leaning is not None:
                key = _key(leaning)
                in_order = chain((leaning,), (one for one in in_order if _key(one) != key))
        return (one for one in in_order if _key(one) not in made) if made else in_order

    def _following(self) -> Attempt | None:
        for attempt in self._others():
            if self._is_allowed(attempt):
                return attempt
        return None

    def _is_allowed(self, attempt: Attempt) -> bool:
        if attempt.choice in self._skipped or (self._only_pays and attempt.because != "paid"):
            return False
        if self._keeps_role and attempt.role != self.decision.role:
            return False
        if attempt.because == "paid":
            return self._may_pay
        if not self._may_start:
            return attempt.because in RUNNING
        if attempt.because == "pull" and not self._may_pull:
            candidate = self._router.snapshot().get(attempt.instance)
            return candidate is not None and candidate.state is State.READY
        return True


def _key(attempt: Attempt) -> tuple[str, str, bool]:
    """Return what two attempts have in common of which one is not to follow the other."""
    return attempt.instance, attempt.model, attempt.because == "pull"
