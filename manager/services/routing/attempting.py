"""The life of one request: its decision, its attempts and leases, and what follows a failure. Knows no HTTP.

Failover, repeats, recovery of an instance that has just ended, patience with a load and the total deadline
are decided here and nowhere else:

- An attempt that fails before its request was sent is followed by the next one.
- A request that a server may have begun is neither repeated nor sent elsewhere when that server dies: the
  request may be the cause, and would take the next server down as well.
- A server that answered with an error, or that ran out of time and was abandoned, is followed by the next.
- Nothing follows once the client has got a byte.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import partial
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Final, TypeAlias

from manager.domain.auto import choose, is_auto
from manager.domain.breaker import is_counted
from manager.domain.budgets import Overdrawn
from manager.domain.history import MOST_ATTEMPTS, Ended, Failure
from manager.domain.lanes import BACKGROUND
from manager.domain.models import model_key
from manager.domain.record import LOCAL
from manager.domain.roles import BodyChanges, RequestKind
from manager.domain.routing import PassedOver, Refused
from manager.errors import ManagerError, Reason
from manager.services.accounts.payment import Payment, output_limit
from manager.services.accounts.quotas import Exceeded
from manager.services.instances.first_look import MAX_STARTUP_WAIT_S
from manager.services.lanes.slots import FULL, Refusal
from manager.services.routing.model_status import Work
from manager.services.routing.placement import reason_of
from manager.services.routing.rollout import RawAttempts, Rollout
from manager.services.routing.router import RUNNING, Attempts
from manager.services.steps import in_steps
from manager.wire.asked import text_asked
from manager.wire.steps import run

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from manager.domain.auto import Choice
    from manager.domain.judgement import Judgement
    from manager.domain.keys import Grant
    from manager.domain.learned import LearnedModel, Told
    from manager.domain.record import Outcome, RequestRecord
    from manager.domain.routing import Attempt, Decision, RequestFacts
    from manager.domain.target import Target
    from manager.services.accounts.ledger import Ledger
    from manager.services.accounts.quotas import Place as Quota
    from manager.services.accounts.quotas import Quotas
    from manager.services.instances.leases import Lease
    from manager.services.lanes.slots import Place, Slots
    from manager.services.routing.breakers import Breakers
    from manager.services.routing.cloud_events import CloudEvents
    from manager.services.routing.fallback_events import FallbackEvents
    from manager.services.routing.model_status import ModelStatus
    from manager.services.routing.overload import Overload
    from manager.services.routing.placement import ModelPuller, Placement
    from manager.services.routing.router import Opened, Router
    from manager.services.traffic import Traffic

# Where asynchronous runs are begun.
RUNS_PATH = "/api/v1/runs"
# Refusals whose code stands in the message: dialects have no place for it beside.
_CODES = frozenset({"forbidden", "local_only"})
# The body of a request to the raw server is sent as it came.
_NO_CHANGES: Final = BodyChanges()
# Why an attempt is made on a server that has nothing to load.
_HELD = ("loaded", "paid")
# How much longer a load that makes progress may take, each time that it is looked at.
_LOAD_GRACE_S = 10.0


class Wait:
    """The type of `WAIT`."""


# Await `Attempting.wait`: something has to happen first.
WAIT: Final = Wait()


@dataclass(frozen=True, slots=True)
class Trouble:
    """The reason why a request has no answer. No attempt is left.

    `refused` is set where no server is at fault (`Refused.what`). `answer` is the answer of a server that
    failed, as the caller of `answered` gave it: the client gets that one.
    """

    reason: Reason
    message: str
    retry_after_s: float | None = None
    refused: str | None = None
    attempt: Attempt | None = None
    endpoint: str | None = None
    answer: object = None


# A target: send the request there. `WAIT`: await `wait`. A trouble: report it.
Step: TypeAlias = "Target | Wait | Trouble"


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds: for the first byte of each attempt, and for all of a request together."""

    first_byte_timeout_s: float = 600.0
    total_timeout_s: float = 3600.0


def _forget(_ended: Ended) -> None:
    """Keep no history."""


@dataclass(frozen=True, slots=True)
class Routing:
    """The parts that all requests share. Built once by the composition root.

    `keep` takes each request that has ended into the history; it does not wait. Without a ledger no paid
    server is asked, without quotas nothing counts the requests of keys. `vector_of` returns the vector that
    an embedding model makes of a text, for the learned classifier; None where there is none in time.
    """

    router: Router
    placement: Placement
    status: ModelStatus
    fallbacks: FallbackEvents
    traffic: Traffic
    slots: Slots
    puller: ModelPuller
    deadlines: Deadlines
    breakers: Breakers
    overload: Overload
    keep: Callable[[Ended], None] = _forget
    ledger: Ledger | None = None
    rollout: Rollout = field(default_factory=Rollout)
    quotas: Quotas | None = None
    cloud: CloudEvents | None = None
    vector_of: Callable[[str, str], Awaitable[Sequence[float] | None]] | None = None

    def failed(self, attempt: Attempt, reason: Reason, message: str, *, sent: bool) -> None:
        """Count an attempt that has failed; `sent` is whether its server was asked."""
        self.traffic.failed(attempt.instance, reason)
        if sent:
            self.status.failed(attempt.model, reason, message)
        if reason is Reason.MODEL_MISSING:
            self.placement.reread_models(attempt.instance)

    def ended(self, record: RequestRecord) -> None:
        """Take in a request that has ended."""
        self.traffic.ended(record)
        if record.outcome == "ok" and record.model is not None:
            self.status.answered(record.model)
        self.fallbacks.ended(record)
        if record.provider is not LOCAL and self.cloud is not None:
            self.cloud.ended(record)


class FixedAttempts:
    """Attempts that no decision was made for, such as the writers of a volume."""

    decision = None

    def __init__(self, attempts: Sequence[Attempt]) -> None:
        self._coming = list(attempts)
        self.made: list[Attempt] = []

    @property
    def more(self) -> bool:
        return bool(self._coming)

    @property
    def failed_on(self) -> frozenset[str]:
        return frozenset(attempt.instance for attempt in self.made[:-1])

    def next(self) -> Attempt | None:
        if not self._coming:
            return None
        attempt = self._coming.pop(0)
        self.made.append(attempt)
        return attempt

    def start_no_other(self) -> None:
        self._coming = [one for one in self._coming if one.because in RUNNING]


class Attempting:
    """One request between its arrival and its outcome. Lives on the event loop.

    `enter` gives the first step. A target means: send the request there, say so with `sent`, then report
    `answered` or `failed`, each of which gives the next step. `delivered` ends all attempts: the client has
    got a byte. `close` gives everything back, exactly once, and ends the record.

    Attributes:
        message: the error that the client gets, for the history.

    Args:
        routing: what all requests share.
        record: the record of the request; ended by `close`.
        began_at: the monotonic time of the request's beginning.
    """

    # Most requests keep these values. Three are set before `enter`. `is_run`: an asynchronous run waits
    # behind the requests of its lane, as long as it takes. `is_background`: it takes a slot only where nobody
    # waits for one, in a lane of its own, and is refused otherwise. `grant`: the client's key and its limits.
    is_run = False
    is_background = False
    grant: Grant | None = None
    attempt: Attempt | None = None
    target: Target | None = None
    heard = ""
    message = ""
    start_ms: float | None = None
    _attempts: Attempts | FixedAttempts | RawAttempts | None = None
    _raw: RawAttempts | None = None  # the same, where the request passes to the raw server
    _failures: tuple[Failure, ...] = ()
    _lease: Lease | None = None
    _place: Place | None = None
    _permit = 0  # of the breaker; 0: none
    _payment: Payment | None = None
    _quota: Quota | None = None
    _facts: RequestFacts | None = None
    _body: Opened | None = None
    _conversation = 0
    _pending: Callable[[], Awaitable[Step | None]] | None = None
    _fallback_reason: Reason | None = None
    _trouble: Trouble | None = None
    _first_byte_at = 0.0
    _sent_at = 0.0
    _asked_s = 0.0  # how long servers were asked that brought no answer
    _queued_s = 0.0  # how long slots were waited for
    _full: tuple[PassedOver, ...] = ()  # the instances that had no free slot, the preferred one first
    _is_waiting = False
    _looks_closer = False
    _is_delivered = False
    _is_spent = False
    _has_repeated = False
    _has_recovered = False
    _is_closed = False
    _starts_nothing = False
    _is_fixed = False

    def __init__(self, routing: Routing, record: RequestRecord, began_at: float) -> None:
        self._routing = routing
        self.record = record
        self._began_at = self._timed_from = began_at

    # --- from the request to a target ---

    def enter(self, facts: RequestFacts, body: Opened | None = None) -> Step:
        """Decide, and begin the first attempt. Waits for nothing.

        A request with a body prefers the instance that has its conversation in memory.
        """
        self._facts = facts
        self._body = body
        if self.grant is not None and (trouble := self._admit(self.grant, facts)) is not None:
            return trouble
        if is_auto(facts.model, facts.kind, self._routing.router.settings) and self._routing.rollout.decides:
            if self._starts_nothing:
                return self._passed() or _NOTHING_TO_UNLOAD
            if body is None or not body.is_small:
                self._pending = self._choose_in_steps
                return WAIT
            return self._classified(run(text_asked(body.fields)))
        return self._enter()

    def note_choice(self, choice: Choice) -> None:
        """Note how the model of the request was chosen."""
        record, found = self.record, choice.classification
        record.task_type, record.tier = found.task_type, found.tier.value
        record.task_confidence, record.task_reasoning = found.confidence, found.reasoning

    def enter_raw(self, target: Target) -> Step:
        """Pass a request that names no model to the raw server."""
        return self._pass_to_raw(RawAttempts(""), target)

    def enter_running(self, facts: RequestFacts) -> Step:
        """As `enter`, for a request that concerns running instances only, such as an unload.

        Where no instance runs the trouble has the reason `instance_stopped`.
        """
        self._starts_nothing = True
        return self.enter(facts._replace(local_only=True))

    @property
    def others(self) -> tuple[Attempt, ...]:
        """The attempts that could follow, once each; none of them follows afterwards."""
        attempts, found = self._attempts, []
        while attempts is not None and (attempt := attempts.next()) is not None:
            found.append(attempt)
        return tuple(found)

    def enter_fixed(self, attempts: Sequence[Attempt], none: Trouble, *, starts: bool = True) -> Step:
        """Begin the first of attempts for which nothing has to be loaded, such as the writers of a volume.

        Args:
            attempts: in order. Their instances have the same models: a missing one is missing on all of them.
            none: the trouble where there is no attempt.
            starts: whether an instance may be started for the request.
        """
        self._is_fixed = True
        self._starts_nothing = not starts
        self._attempts = FixedAttempts(attempts)
        self._trouble = none
        step = self._next()
        if not isinstance(step, Trouble):
            self._trouble = None
        return step

    async def wait(self) -> Step | None:
        """Do what the last `WAIT` was for; None where the request goes on as before.

        A caller that is cancelled here calls `close` as always.
        """
        pending, self._pending = self._pending, None
        return None if pending is None else await pending()

    def sent(self) -> None:
        """The request has been sent to the target: the time for its first byte begins."""
        attempt = self.attempt
        assert attempt is not None  # noqa: S101  (a target belongs to an attempt)
        now = monotonic()
        record = self.record
        self._sent_at = now
        record.queue_ms = self._waited_ms(now)
        record.start_ms = self.start_ms
        self._first_byte_at = now + self._first_byte_timeout_s(attempt)
        if self.is_run:
            self._timed_from = now
        self._is_waiting = True
        self._looks_closer = False
        if self._payment is not None:
            self._payment.is_sent = True
            record.provider = attempt.instance
        # A request that manages models does not use them, and the models of the raw server are not ours.
        if record.kind is not None and self._raw is None:
            self._routing.status.sent(self)
        if self._conversation:
            self._routing.router.affinity.note(self._conversation, attempt.instance)

    def count_wait(self) -> None:
        """Have the record say how long the request has waited so far."""
        self.record.queue_ms = self._waited_ms(monotonic())

    def hold_slot(self) -> None:
        """Take a slot of the current instance, whether or not one is free: limits were set just now."""
        if self._place is None and self.attempt is not None and not (self._is_fixed or self._starts_nothing):
            self._place = self._routing.slots.hold(self.lane, self.attempt.instance, self._began_at)

    @property
    def payment(self) -> Payment | None:
        """The payment of the current attempt; None where it costs nothing."""
        return self._payment

    @property
    def lane(self) -> str | None:
        """The role whose lane the request is in, or `BACKGROUND`; None where it has none."""
        return BACKGROUND if self.is_background else self.record.role

    @property
    def holds(self) -> str:
        """The instance of the current attempt."""
        return self.work.instance

    @property
    def place(self) -> Place | None:
        """Its slot, or its place in the queue; None where it has neither."""
        return self._place

    def give_slot_back(self) -> None:
        """Give the slot, or the place in the queue, to the next request."""
        place, self._place = self._place, None
        if place is not None:
            place.give_back()

    @property
    def is_queued(self) -> bool:
        """Return whether the request waits for a slot."""
        return self._place is not None and self._place.instance is None

    @property
    def waits_for(self) -> str | None:
        """Return what the request waits for, in words; None before anything was attempted."""
        ahead = None if self._place is None else self._place.ahead
        if ahead is not None:
            return f"a slot, {ahead} ahead in the queue"
        if self.attempt is None or self._raw is not None:
            return None  # nothing comes before the answer of the raw server
        return f"{self.attempt.instance} ({self.heard})" if self.heard else self.attempt.instance

    def expect_on_cpu(self) -> None:
        """The request asks for the model to be computed by the processor."""
        if self.attempt is not None and self._raw is None:
            self._routing.placement.expect_on_cpu(self.attempt)

    def spend(self) -> None:
        """The body cannot be sent a second time: no other attempt follows."""
        self._is_spent = True

    @property
    def changes(self) -> BodyChanges:
        """The changes to the body of the request for the current attempt."""
        assert self.attempt is not None  # noqa: S101
        if self._raw is not None:
            return _NO_CHANGES
        return self._routing.router.changes_for(self.attempt)

    @property
    def is_raw(self) -> bool:
        """Return whether the request passes to the raw server as it came."""
        return self._raw is not None

    @property
    def most_tokens(self) -> int | None:
        """The bound of output tokens that the current attempt has to carry; None where nothing is paid."""
        return None if self._payment is None else self._payment.output_limit

    @property
    def work(self) -> Work:
        """The work of the server."""
        attempt = self.attempt
        assert attempt is not None  # noqa: S101
        return Work(attempt.instance, attempt.model, attempt.because not in _HELD)

    @property
    def cut(self) -> str | None:
        """The operator's reason to end the instance under the current attempt; None while it goes on."""
        return None if self._lease is None else self._lease.cut

    @property
    def is_waiting(self) -> bool:
        """Whether a server was asked and has not answered."""
        return self._is_waiting

    @property
    def has_repeated(self) -> bool:
        """Whether the current attempt is sent again, because its kept connection had been closed."""
        return self._has_repeated

    @property
    def is_delivered(self) -> bool:
        """Whether the client has got a byte of an answer."""
        return self._is_delivered

    @property
    def may_load(self) -> bool:
        """Whether the server may have to load the model first."""
        return self.attempt is not None and self.attempt.because not in _HELD

    # --- what became of an attempt ---

    def failed(
        self,
        reason: Reason,
        message: str,
        *,
        sent: bool,
        stale: bool = False,
        ours: bool = False,
        retry_after_s: float | None = None,
    ) -> Step:
        """The attempt brings no answer. Return the next step.

        Args:
            reason: why.
            message: for the client, should no other attempt follow.
            sent: the server may have begun with the request.
            stale: a kept connection had been closed, and the server cannot have begun.
            ours: the cause lies with the daemon, not with the instance.
            retry_after_s: when another request is worth a try.
        """
        attempt, target = self.attempt, self.target
        assert attempt is not None  # noqa: S101  (something was attempted)
        self._stop_waiting()
        if sent and self.cut is not None:
            reason, message = Reason.CANCELLED, self.cut
        if self._is_delivered:
            self._note(attempt, reason, message, sent=sent, ours=ours)
            return Trouble(reason, message, retry_after_s, attempt=attempt)
        is_final = ours or self._is_last(reason, sent=sent, stale=stale)
        if not sent and not is_final and target is not None:
            if stale and not self._has_repeated:
                self._has_repeated = True
                self.record.attempts += 1
                return target
            if self._starts_nothing:
                reason = Reason.INSTANCE_STOPPED
            elif not self._has_recovered and not self._may_follow():
                # The container may have ended a moment ago. It is started again, as a stopped one would be.
                self._has_recovered = True
                self._settle(reason)
                self._release_lease()
                self._pending = lambda: self._recover(attempt, reason, message)
                return WAIT
        if (
            attempt.because == "pull"
            and reason is Reason.MODEL_MISSING
            and isinstance(self._attempts, Attempts)
        ):
            self._attempts.pull_failed()
        self._note(attempt, reason, message, sent=sent, ours=ours)
        self._keep_trouble(
            Trouble(
                reason,
                message,
                retry_after_s,
                refused="unavailable" if ours else None,
                attempt=attempt,
                endpoint=self.record.endpoint,
            )
        )
        self._release()
        return self._give_up() if is_final else self._next()

    def _is_last(self, reason: Reason, *, sent: bool, stale: bool) -> bool:
        """Return whether nothing may follow an attempt that has failed; arguments as for `failed`."""
        target, attempts = self.target, self._attempts
        if self._is_spent:
            return True
        if target is not None and not target.repeatable and (sent or stale):
            return True  # a request is sent there once, whatever becomes of it
        if not sent or reason in _ABANDONED:
            return False
        # The request may have killed its server, and would kill the next one. It kills no paid service.
        return not isinstance(attempts, Attempts) or not attempts.only_pay()

    def unsayable(self, message: str) -> Step:
        """The API of the server has no word for a part of the request. Return the next step."""
        attempt = self.attempt
        assert attempt is not None  # noqa: S101  (something was attempted)
        self._add_failure(attempt, Reason.POLICY, message)
        trouble = Trouble(
            Reason.POLICY, message, refused="unsayable", attempt=attempt, endpoint=self.record.endpoint
        )
        self._keep_trouble(trouble)
        self._release()
        return self._next()

    def might_follow(self, judgement: Judgement) -> bool:
        """Whether something else than this answer with an error may be what the client gets.

        Another attempt may follow. A model that turns out to be missing does not outweigh an earlier trouble.
        """
        reason = judgement.reason
        if self._is_fixed and reason is Reason.MODEL_MISSING:
            return False
        if reason is None or self._is_delivered or self._is_spent:
            return False
        return self._may_follow() or (reason is Reason.MODEL_MISSING and self._trouble is not None)

    def answered(
        self,
        judgement: Judgement,
        message: str = "",
        answer: object = None,
        *,
        retry_after_s: float | None = None,
    ) -> Step | None:
        """The server has answered. Return None where the client gets that answer, else the next step.

        Args:
            judgement: what the answer says; without a reason it is the client's.
            message: the error in the answer.
            answer: kept for the client, should no later attempt answer.
            retry_after_s: of the answer.
        """
        attempt = self.attempt
        assert attempt is not None  # noqa: S101  (a server that answers was asked)
        self._stop_waiting()
        reason = judgement.reason
        if self._payment is not None and judgement.is_error:
            self._payment.is_refused = True
        if reason is None:
            return None
        if self._raw is not None:
            self._routing.traffic.failed(attempt.instance, reason)
            return None
        if self._is_fixed and reason is Reason.MODEL_MISSING:
            if attempt.model:
                self._routing.placement.reread_models(attempt.instance)
            return None
        self._routing.failed(attempt, reason, message, sent=self.record.kind is not None)
        self._settle(reason)
        if reason is Reason.OVERLOADED and self.record.kind is not None:
            self._routing.overload.saturated(attempt.instance, retry_after_s)
        if not judgement.may_start and self._attempts is not None:
            self._attempts.start_no_other()
        if not self.might_follow(judgement):
            return None
        self._add_failure(attempt, reason, message)
        endpoint = self.record.endpoint
        self._keep_trouble(Trouble(reason, message, attempt=attempt, endpoint=endpoint, answer=answer))
        self._release()
        return self._next() if self._may_follow() else self._give_up()

    def delivered(self) -> None:
        """The client has got a byte of the answer: no other attempt follows."""
        self._is_delivered = True

    @property
    def is_probe(self) -> bool:
        """Return whether the request may be the one that tries a half-open breaker."""
        return self._permit != 0 and self._routing.breakers.is_half_open(self.holds)

    def begun(self) -> None:
        """The server has sent the beginning of a good answer: a half-open breaker waits for no more."""
        if self._permit:
            self._permit = self._routing.breakers.begun(self.holds, self._permit)

    def broke_off(self, reason: Reason) -> None:
        """The answer that the client is given has stalled, or ends before its end: the server is at fault."""
        self._settle(reason)

    def look(self, now: float) -> Step | None:
        """Look at the deadlines; None while none has passed. Called a few times a second."""
        deadlines = self._routing.deadlines
        if now - self._timed_from >= deadlines.total_timeout_s:
            if self._is_waiting and self.attempt is not None:
                why = f"no end within {deadlines.total_timeout_s:g} s"
                self._note(self.attempt, Reason.ATTEMPT_TIMEOUT, why, sent=True, ours=False)
            self._stop_waiting()
            if not self._is_delivered:
                self.record.fallback, self.record.fallback_from = False, None  # nothing answered
            return Trouble(Reason.ATTEMPT_TIMEOUT, f"no end within {deadlines.total_timeout_s:g} s")
        if not self._is_waiting or self.attempt is None:
            return None
        if now >= self._first_byte_at and not self._looks_closer:
            self._looks_closer = True
            self._pending = self._be_patient
            return WAIT
        if (
            not self._is_delivered
            and self._may_follow()
            and self._routing.placement.is_silent(self.attempt.instance)
        ):
            why = f"{self.attempt.instance} has stopped answering"
            return self.failed(Reason.INSTANCE_UNHEALTHY, why, sent=True)
        return None

    @property
    def total_deadline(self) -> float:
        """The monotonic time by which the request must have ended."""
        return self._timed_from + self._routing.deadlines.total_timeout_s

    def hear(self, words: str) -> None:
        """Take progress of what the request waits for."""
        self.heard = words

    @property
    def began_at(self) -> float:
        """The monotonic time of the request's beginning."""
        return self._began_at

    @property
    def seen(self) -> Ended:
        """The request as the history takes it, by reference."""
        return Ended(self.record, self._attempts, self._failures, self.message, self._full)

    def cancelled(self) -> None:
        """The operator has cancelled the request; its caller ends it with `close`."""
        record = self.record
        record.fallback_reason = Reason.CANCELLED
        record.fallback, record.fallback_from = False, None

    def close(self, outcome: Outcome) -> None:
        """Give everything back and end the record. Counts once however often it is called."""
        if self._is_closed:
            return
        self._is_closed = True
        self._pending = None
        if self._quota is not None:
            self._quota.leave(self.record)
        if self._permit and outcome == "ok":
            self._succeeded()
        if self.is_queued:
            self.count_wait()  # it ends in the queue
        self._release()
        record = self.record
        record.outcome = outcome
        record.duration_ms = (monotonic() - self._began_at) * 1000
        if self._raw is None:
            self._routing.ended(record)
        else:
            self._routing.rollout.ended(self._raw, record)
            self._routing.traffic.ended(record)
        self._routing.keep(self.seen)

    # --- helpers, in call order ---

    async def _choose_in_steps(self) -> Step:
        """Choose a role for a large request, which is read in steps."""
        return self._classified("" if self._body is None else await in_steps(text_asked(self._body.fields)))

    def _classified(self, text: str) -> Step:
        """Choose a role, at once by words, or some time later by what was learned."""
        rules = self._routing.router.settings.auto
        if rules is None or rules.learned is None or self._routing.vector_of is None:
            return self._chosen(text)
        self._pending = partial(self._choose_by_vector, text, rules.learned)
        return WAIT

    async def _choose_by_vector(self, text: str, learned: LearnedModel) -> Step:
        """Choose a role by the vector of a text; by its words where there is none."""
        vector_of = self._routing.vector_of
        vector = None if vector_of is None else await vector_of(text, learned.embedding_model)
        return self._chosen(text, None if vector is None else learned.tell(vector))

    def _chosen(self, text: str, told: Told | None = None) -> Step:
        """Have the request answered by the role that what it asks for needs."""
        settings, facts, record = self._routing.router.settings, self._facts, self.record
        assert facts is not None  # noqa: S101  (given to `enter`)
        began_at = perf_counter()
        if settings.auto is None:  # it was switched off meanwhile
            return self._enter()
        choice = choose(facts.model, text, settings, settings.auto, told)
        record.requested_model = facts.model
        self.note_choice(choice)
        if choice.role is None:
            passed = self._passed()
            if passed is not None:
                return passed
            record.fallback_reason = Reason.MODEL_MISSING
            return Trouble(Reason.MODEL_MISSING, choice.message, refused="unknown")
        self._facts = facts._replace(model=choice.model)
        step = self._enter()
        record.routing_ms = round((perf_counter() - began_at) * 1000, 3)
        return step

    def _enter(self) -> Step:
        assert self._facts is not None  # noqa: S101  (given to `enter`)
        step = self._passed()
        return self._decide(waits=True) if step is None else step

    def _passed(self) -> Step | None:
        """Pass the request to the raw server, where there is one; None where it is managed."""
        facts = self._facts
        if self._routing.rollout.raw is None or facts is None:
            return None
        rollout, router, record = self._routing.rollout, self._routing.router, self.record
        decision = router.decide(facts) if rollout.wants_decision(facts) else None
        if decision is not None:
            record.role = decision.role
        ranks = None if decision is None else router.ranks(decision)
        found = rollout.attempts(
            facts, decision, router.load(), is_known=router.is_known, is_run=self.is_run, ranks=ranks
        )
        if found is None:
            return None
        if isinstance(found, Refused):
            record.fallback_reason = found.reason
            return Trouble(found.reason, found.message, refused=found.what)
        target = rollout.raw
        assert target is not None  # noqa: S101  (the stage has a raw server)
        return self._pass_to_raw(found, target)

    def _pass_to_raw(self, attempts: RawAttempts, target: Target) -> Step:
        record = self.record
        self._raw = self._attempts = attempts
        # Its end has nothing to do with instances: none is started again for it, or looked at.
        self._has_recovered, self._starts_nothing = True, False
        attempt = attempts.made[0]
        if record.requested_model is not None:
            attempt = attempt._replace(model=record.requested_model)  # the body is sent as it came
            attempts.made = (attempt,)
        self.attempt = attempt
        self.target = target
        record.attempts += 1
        record.effective_target = target.instance
        record.endpoint = target.endpoint
        record.model = attempt.model or None
        if attempts.decision is not None:
            refused = attempts.decision.refused
            record.policy = attempts.decision.policy
            record.requested_target = attempts.decision.requested_target
            record.shadow_target = None if attempts.would is None else attempts.would.instance
            record.shadow_refused = None if refused is None else refused.reason
            if attempts.would is None and refused is None:
                record.shadow_refused = Reason.POLICY  # the role takes runs only
        return target

    def _admit(self, grant: Grant, facts: RequestFacts) -> Trouble | None:
        """Keep the request within the limits of its key; return why it cannot begin, or None."""
        if grant.permit is not None or grant.is_local:
            local_only = facts.local_only or grant.is_local
            self._facts = facts._replace(permit=grant.permit, local_only=local_only)
        quotas = self._routing.quotas
        entry = None if quotas is None else quotas.enter(grant)
        if isinstance(entry, Exceeded):
            self.record.fallback_reason = Reason.POLICY
            message = f"{entry.message} (rate_limited)"
            return Trouble(Reason.POLICY, message, entry.retry_after_s, refused="rate_limited")
        self._quota = entry
        return None

    def _decide(self, *, waits: bool) -> Step:
        """Decide; `waits` is whether a fleet that was never looked at may be waited for."""
        assert self._facts is not None  # noqa: S101  (given to `enter`)
        router, record = self._routing.router, self.record
        attempts = router.attempts(self._facts)
        self._attempts = attempts
        decision = attempts.decision
        record.role = decision.role
        record.policy = decision.policy
        record.requested_target = decision.requested_target
        refused = decision.refused
        if waits and not router.is_known and _may_change(decision):
            self._pending = self._wait_for_first_look
            return WAIT
        if decision.is_async and not (self.is_run or self._starts_nothing):
            message = f"the role {decision.role!r} takes runs only (async_only): POST {RUNS_PATH}"
            return Trouble(Reason.POLICY, message, refused="async_only")
        if refused is None:
            if self._body is not None and decision.has_equals:
                self._conversation = attempts.lean(self._body)
            if self._starts_nothing:
                attempts.start_no_other()
                attempts.leave_role()
                if not attempts.more:
                    return _STOPPED
            return self._next()
        if self._starts_nothing and refused.what == "local_only":
            return _STOPPED  # a paid server has nothing to unload
        record.fallback_reason = refused.reason
        message = f"{refused.message} ({refused.what})" if refused.what in _CODES else refused.message
        return Trouble(refused.reason, message, self._retry_after_s(decision), refused=refused.what)

    def _retry_after_s(self, decision: Decision) -> float | None:
        """Return when a refused request is worth another try; None where nothing tells."""
        refused = decision.refused
        if refused is None or refused.reason is not Reason.BREAKER_OPEN:
            return None
        shut = [one.instance for one in decision.passed_over if one.reason is Reason.BREAKER_OPEN]
        return self._routing.breakers.retry_after_s(shut)

    async def _wait_for_first_look(self) -> Step:
        """Decide after the first look at the fleet: a daemon that has just started knows nothing."""
        left_s = max(0.0, self.total_deadline - monotonic())
        await self._routing.router.known(within_s=min(MAX_STARTUP_WAIT_S, left_s))
        return self._decide(waits=False)

    def _next(self) -> Step:
        """Begin the next attempt, wait for a slot, or give up."""
        attempts = self._attempts
        if self._routing.slots.is_on and isinstance(attempts, Attempts) and not self._starts_nothing:
            return self._next_slot(attempts)
        attempt = attempts.next() if attempts is not None else None
        return self._give_up() if attempt is None else self._begin(attempt)

    def _next_slot(self, attempts: Attempts) -> Step:
        """Begin the next attempt whose instance has a free slot, or wait for one."""
        if self.is_background:
            return self._next_free_slot(attempts)
        first = attempts.first
        if first is not None:
            slots, role = self._routing.slots, self.record.role
            place = slots.take(role, first.instance, self._choose, self._began_at)
            if place is not None:
                self._place = place
                attempts.take_first(first)
                return self._begin(first)
        while choices := attempts.choices():
            record = self.record
            entry = self._routing.slots.enter(
                record.role,
                record.project_id,
                tuple(one.instance for one in choices),
                self._choose,
                since=self._began_at,
                is_run=self.is_run,
            )
            if not isinstance(entry, Refusal):
                self._place = entry
                if entry.instance is not None:
                    return self._take_slot(attempts, entry.instance)
                self._pending = self._wait_for_slot
                return WAIT
            attempts.skip()
            attempts.pay_nothing()
            reason = Reason.QUEUE_FULL if entry.what == "queue_full" else Reason.POLICY
            self._pass_over(choices, reason, entry.message)
            message = f"{entry.message} ({entry.what})"
            self._keep_trouble(Trouble(reason, message, entry.retry_after_s, refused=entry.what))
        return self._give_up()

    def _next_free_slot(self, attempts: Attempts) -> Step:
        """Begin the next attempt whose instance has a free slot.

        A request that waits could have any slot that is free (`domain.lanes`), so nobody waits for that one.
        """
        while choices := attempts.choices():
            for one in choices:
                place = self._routing.slots.take(BACKGROUND, one.instance, self._choose, self._began_at)
                if place is not None:
                    self._place = place
                    return self._take_slot(attempts, one.instance)
            attempts.skip()
            attempts.pay_nothing()
            self._pass_over(choices, Reason.OVERLOADED, FULL)
            message = f"{FULL}, and work in the background waits for none (overloaded)"
            self._keep_trouble(Trouble(Reason.OVERLOADED, message, refused="overloaded"))
        return self._give_up()

    def _choose(self) -> tuple[str, ...]:
        """Return the instances that the request may use, over the fleet as it is now."""
        attempts = self._attempts
        assert isinstance(attempts, Attempts)  # noqa: S101  (it waits for a slot)
        attempts.renew()
        return tuple(one.instance for one in attempts.choices())

    def _take_slot(self, attempts: Attempts, instance: str) -> Step:
        choices = attempts.choices()
        attempt = next((one for one in choices if one.instance == instance), None)
        if attempt is None:  # the settings have changed since the slot was given
            self.give_slot_back()
            return self._decide(waits=False) if self._trouble is None else self._next()
        attempts.take(attempt)
        if attempt is not choices[0]:
            self._pass_over(choices[: choices.index(attempt)], Reason.OVERLOADED, FULL)
        if attempt is not choices[0] and attempt.fallback is not None:
            attempt = attempt._replace(fallback=Reason.OVERLOADED)  # what is preferred has no free slot
        return self._begin(attempt)

    async def _wait_for_slot(self) -> Step:
        place, attempts = self._place, self._attempts
        assert place is not None  # noqa: S101  (it waits there)
        assert isinstance(attempts, Attempts)  # noqa: S101
        wait_s = None if self.is_run else self._routing.slots.wait_s(self.record.role)
        began = monotonic()
        # All waits of a request together have that time.
        how = await place.settled(within_s=None if wait_s is None else max(0.0, wait_s - self._queued_s))
        self._queued_s += monotonic() - began
        instance = place.instance
        if how == "granted" and instance is not None:
            return self._take_slot(attempts, instance)
        self.give_slot_back()
        self.count_wait()
        if how == "changed":
            return self._next() if self._trouble is not None else self._decide(waits=False)
        if how == "refused":
            why = "no slot is free, and no more requests may wait for one"
        else:
            why = f"no slot became free within {wait_s:g} s"
        self._pass_over(attempts.choices(), Reason.OVERLOADED, why)
        attempts.skip()
        attempts.pay_nothing()
        message = f"{why} (overloaded)"
        self._keep_trouble(Trouble(Reason.OVERLOADED, message, refused="overloaded"))
        return self._next()

    def _pass_over(self, full: Sequence[Attempt], reason: Reason, why: str) -> None:
        known = {one.instance for one in self._full}
        self._full += tuple(
            PassedOver(one.instance, one.model, reason, why) for one in full if one.instance not in known
        )

    def _begin(self, attempt: Attempt) -> Step:
        """Begin an attempt."""
        if self._starts_nothing or self._is_fixed:
            attempt = attempt._replace(because="loaded", fallback=None)  # nothing has to be loaded for it
        record = self.record
        self.attempt = attempt
        self.target = None
        self.heard = ""
        self._has_repeated = False
        record.attempts += 1
        record.effective_target = attempt.instance
        record.endpoint = None
        record.model = attempt.model or record.model
        reason = self._fallback_reason
        if reason is None:
            reason = self._fallback_reason = attempt.fallback
        if reason is not None:
            record.fallback = True
            record.fallback_reason = reason
            if record.fallback_from is None:
                record.fallback_from = self._preferred(reason)
        lease = self._routing.placement.try_lease(attempt)
        if lease is not None:
            return self._leased(lease)
        if self._starts_nothing:
            self._keep_trouble(_STOPPED)
            return self._next()
        self._pending = self._prepare
        return WAIT

    def _preferred(self, reason: Reason) -> str | None:
        """Return what the request would rather have been answered by."""
        record = self.record
        if record.requested_target is not None:
            return record.requested_target
        if self._full and reason in (Reason.OVERLOADED, Reason.QUEUE_FULL):
            return self._full[0].instance
        if record.failed_attempts:
            return record.failed_attempts[0].target
        decision = getattr(self._attempts, "decision", None)
        if decision is None:
            return None
        passed = next((one.instance for one in decision.passed_over if one.reason is reason), None)
        return passed or str(decision.policy)

    def _leased(self, lease: Lease) -> Step:
        self._lease = lease
        target, record = lease.target, self.record
        # Only inference shows whether a server works: an unload, or a list, is answered by a hung one too.
        if record.kind is not None and not self._starts_nothing:
            if self._routing.slots.is_on:
                self.hold_slot()  # the first limit was set while the instance was being prepared
            self._permit = self._routing.breakers.admit(target.instance)
            if not self._permit:
                self._release()
                return self._shut_out(target.instance)
        if target.prices is not None:
            self._pending = lambda: self._pay(target)
            return WAIT
        self.target = target
        record.endpoint = target.endpoint
        return target

    async def _pay(self, target: Target) -> Step:
        """Reserve the most that the attempt can cost; begin the next one where there is no money for it."""
        attempt, body, ledger, record = self.attempt, self._body, self._routing.ledger, self.record
        assert attempt is not None  # noqa: S101  (it has got a lease)
        price = target.prices.get(attempt.model) if target.prices is not None else None
        if price is None or body is None or ledger is None:
            return self._unpaid(attempt, f"{attempt.instance} names no price for {attempt.model!r}")
        limit, size = output_limit(price, body), self.changes.size
        # The whole body is read for it, however large it is.
        inputs = size + await asyncio.to_thread(lambda: body.most_input_tokens)
        try:
            reserved = await ledger.reserve(
                record,
                record.key,
                instance=attempt.instance,
                model=attempt.model,
                amount=price.cost(inputs, limit),
            )
        except ManagerError as error:
            return self._unpaid(attempt, error.message, error.retry_after_s)
        if isinstance(reserved, Overdrawn):
            return self._unpaid(attempt, reserved.message)
        self._payment = Payment(ledger, reserved, price, most_input_tokens=inputs, output_limit=limit)
        self.target = target
        record.endpoint = target.endpoint
        return target

    def _unpaid(self, attempt: Attempt, message: str, retry_after_s: float | None = None) -> Step:
        """There is no money for the attempt."""
        message = f"{message} (budget_exhausted)"
        self._add_failure(attempt, Reason.BUDGET_EXHAUSTED, message)
        refused = "budget_exhausted" if retry_after_s is None else "unavailable"
        self._trouble = Trouble(Reason.BUDGET_EXHAUSTED, message, retry_after_s, refused, attempt)
        self._release()
        return self._next()

    def _shut_out(self, instance: str) -> Step:
        """The breaker has opened since the decision: begin the next attempt, or give up."""
        breakers, attempt = self._routing.breakers, self.attempt
        assert attempt is not None  # noqa: S101  (it has got a lease)
        message = f"{instance}: {breakers.why_shut(instance)}"
        self._add_failure(attempt, Reason.BREAKER_OPEN, message)
        retry_after_s = breakers.retry_after_s((instance,))
        trouble = Trouble(Reason.BREAKER_OPEN, message, retry_after_s, refused="unavailable", attempt=attempt)
        self._keep_trouble(trouble)
        return self._next()

    async def _prepare(self) -> Step:
        attempt, attempts = self.attempt, self._attempts
        assert attempt is not None  # noqa: S101  (it is what is prepared)
        assert attempts is not None  # noqa: S101
        try:
            prepared = await self._routing.placement.prepare(
                attempt,
                puller=self._routing.puller,
                patient=not attempts.more,
                failed_on=attempts.failed_on,
                tell=self.hear,
            )
        except ManagerError as error:
            return self.failed(reason_of(error), error.message, sent=False, retry_after_s=error.retry_after_s)
        if prepared.start_ms is not None:
            self.start_ms = (self.start_ms or 0.0) + prepared.start_ms
        return self._leased(prepared.lease)

    async def _recover(self, attempt: Attempt, reason: Reason, message: str) -> Step:
        """Look whether the instance is there; start it again where it is not."""
        self.target = None
        if await self._routing.placement.has_gone(attempt.instance):
            self.record.attempts += 1
            return await self._prepare()
        return self.failed(reason, message, sent=False)

    async def _be_patient(self) -> Step | None:
        """The time for the first byte is over: go on waiting while the server loads the model."""
        attempt = self.attempt
        assert attempt is not None  # noqa: S101  (it waits for an answer)
        limit_s = self._first_byte_timeout_s(attempt)
        # The time that a role gives to an attempt is a limit, whatever the server does.
        may_load = self.may_load and attempt.timeout_s is None
        loads = may_load and await self._routing.placement.still_loads(attempt.instance)
        if not self._is_waiting:
            return None
        if loads:
            self._first_byte_at = monotonic() + min(limit_s, _LOAD_GRACE_S)
            self._looks_closer = False
            return None
        why = f"{attempt.instance} did not answer within {limit_s:g} s"
        return self.failed(Reason.ATTEMPT_TIMEOUT, why, sent=True)

    def _first_byte_timeout_s(self, attempt: Attempt) -> float:
        own_s = attempt.timeout_s
        return self._routing.deadlines.first_byte_timeout_s if own_s is None else own_s

    def _may_follow(self) -> bool:
        target = self.target
        if self._is_spent or (target is not None and not target.repeatable):
            return False
        return self._attempts is not None and self._attempts.more

    def _note(self, attempt: Attempt, reason: Reason, message: str, *, sent: bool, ours: bool) -> None:
        self._settle(None if ours else reason, sent=sent)
        self._add_failure(attempt, reason, message)
        if self._payment is not None and not sent:
            self._payment.is_sent = False  # the server cannot have begun
        if self._raw is not None:
            self._routing.traffic.failed(attempt.instance, reason)
        elif not ours:
            self._routing.failed(attempt, reason, message, sent=sent and self.record.kind is not None)

    def _add_failure(self, attempt: Attempt, reason: Reason, message: str) -> None:
        self.record.attempt_failed(attempt.instance, reason)
        if len(self._failures) < MOST_ATTEMPTS:
            self._failures = (*self._failures, Failure(attempt, reason, message))

    def _keep_trouble(self, trouble: Trouble) -> None:
        """Keep the first trouble, unless it only says that a model is missing.

        An instance that could only have pulled the model does not have it either: its trouble counts less.
        """
        known, attempt = self._trouble, trouble.attempt
        counts_less = trouble.refused == "unsayable" or (attempt is not None and attempt.because == "pull")
        says_little = known is not None and (
            known.refused == "unsayable" or known.reason is Reason.MODEL_MISSING
        )
        if known is None or (says_little and not counts_less):
            self._trouble = trouble
        if self._fallback_reason is None:
            self._fallback_reason = trouble.reason

    def _give_up(self) -> Trouble:
        trouble = self._trouble
        assert trouble is not None  # noqa: S101  (a decision without attempts was refused)
        record = self.record
        record.fallback_reason = trouble.reason
        record.fallback = False
        record.fallback_from = None
        if trouble.attempt is not None:
            # The client is told of this attempt, whichever came after it.
            self.attempt = trouble.attempt
            record.effective_target = trouble.attempt.instance
            record.model = trouble.attempt.model
            record.endpoint = trouble.endpoint
        return trouble

    def _waited_ms(self, now: float) -> float:
        """Return how long the request has waited: without starts, and without servers that were asked."""
        waited_s = now - self._began_at - self._asked_s
        return max(0.0, waited_s * 1000 - (self.start_ms or 0.0))

    def _stop_waiting(self) -> None:
        if self._is_waiting:
            self._is_waiting = False
            self._asked_s += monotonic() - self._sent_at
            self._pending = None

    def _settle(self, reason: Reason | None, *, sent: bool = False) -> None:
        """Give back the permit of the breaker: the server failed for this reason, or None: nothing counts.

        `sent` is whether the server was asked, and has not begun to answer.
        """
        permit, self._permit, attempt = self._permit, 0, self.attempt
        if not permit or attempt is None:
            return
        breakers = self._routing.breakers
        is_fault = reason is not None and is_counted(reason, is_loaded=attempt.because in _HELD)
        if reason is not None and is_fault and self.cut is None:
            loads = (
                sent
                and reason is Reason.ATTEMPT_TIMEOUT
                and attempt.because != "loaded"
                and self.record.ttfb_ms is None
                and not self._routing.placement.is_silent(attempt.instance)
            )
            breakers.failed(attempt.instance, permit, reason, loads=loads)
        else:
            breakers.cancelled(attempt.instance, permit)

    def _succeeded(self) -> None:
        """The answer has come to its end."""
        permit, self._permit, attempt, record = self._permit, 0, self.attempt, self.record
        assert attempt is not None  # noqa: S101  (a permit belongs to an attempt)
        self._routing.breakers.succeeded(attempt.instance, permit)
        # A load takes as long as it takes, and an answer in one piece has no first token.
        if (
            record.stream
            and record.kind is RequestKind.GENERATE
            and record.ttfb_ms is not None
            and record.start_ms is None
            and attempt.because == "loaded"
        ):
            value_ms = record.ttfb_ms - record.queue_ms
            overload, key = self._routing.overload, model_key(attempt.model)
            overload.first_token(attempt.instance, key, value_ms)
            if record.output_tokens is not None:
                duration_s = monotonic() - self._sent_at - value_ms / 1000
                overload.generated(attempt.instance, key, record.output_tokens, duration_s)

    def _release(self) -> None:
        self._release_lease()
        if self._place is not None:
            self.give_slot_back()

    def _release_lease(self) -> None:
        self._is_waiting = False
        if self._permit:
            self._settle(None)
        payment, self._payment = self._payment, None
        if payment is not None:
            payment.close(self.record)
        lease, self._lease = self._lease, None
        if lease is not None:
            self._routing.status.ended(self)
            lease.release()


_NOTHING_TO_UNLOAD = Trouble(
    Reason.POLICY, "'auto' stands for no model that could be unloaded; name one", refused="impossible"
)
_STOPPED = Trouble(Reason.INSTANCE_STOPPED, "no instance that has the model runs")
# Refusals that the first look at the fleet may change.
_NOT_YET = ("unknown", "unavailable", "local_only")


def _may_change(decision: Decision) -> bool:
    """Return whether the first look at the fleet may find a local instance for the request."""
    refused = decision.refused
    return decision.groups[0].because == "paid" if refused is None else refused.what in _NOT_YET


# The attempt was ended by us or by the operator: its server has not died of the request.
_ABANDONED = (Reason.ATTEMPT_TIMEOUT, Reason.INSTANCE_UNHEALTHY, Reason.CANCELLED)


async def first_target(attempting: Attempting, step: Step) -> Target | Trouble:
    """Follow steps until there is a target or a trouble."""
    while isinstance(step, Wait):
        following = await attempting.wait()
        assert following is not None  # noqa: S101  (nothing was sent that could go on as before)
        step = following
    return step
