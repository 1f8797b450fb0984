"""The condition of one instance with a container: events in, the next condition and effects out.

`step` is the only way from one condition to the next. It moves the phase along the table in
`domain.lifecycle`, which raises where an event is illegal. Times are seconds on one monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias, assert_never

from manager.domain import backoff
from manager.domain.instance import ALIVE, Explanation, Phase, Target
from manager.domain.lifecycle import Fact, advance
from manager.domain.registry import Operation
from manager.errors import Reason

if TYPE_CHECKING:
    from manager.domain.drained import Drained
    from manager.domain.instance import ContainerFacts


@dataclass(frozen=True, slots=True)
class Retry:
    """When something that failed may be tried again, and how often in a row it has failed."""

    failures: int = 0
    at: float = 0.0

    def failed(self, now: float) -> Retry:
        failures = self.failures + 1
        return Retry(failures, now + backoff.delay_s(failures))

    def ran(self, ran_s: float) -> Retry:
        """A run of that length has ended, whatever ended it."""
        return replace(self, failures=backoff.failures_left(self.failures, ran_s))

    def due(self) -> Retry:
        return replace(self, at=0.0)


@dataclass(frozen=True, slots=True)
class Condition:
    """Phase, target, container and retries of one instance.

    Attributes:
        name: the container's name.
        carcass_kept_s: how long an ended container is kept.
        intent: the operation that was requested and has not ended.
        failure: why the last start or run failed; kept until the next start.
        stop_trouble: why a requested stop has not succeeded yet.
        card_lost: why the card of the running container cannot be used.
        paused: the container is paused, as of the last inspection.
        look_at: when the container is inspected next.
        bury_at: when an ended container may be removed.
        drained: the operator's order to keep it out of service. While there is one nothing starts it.
        is_patient: the requested stop waits for open leases however long they take, and may be taken back
            until then.
        is_let_go: the server runs for other gateways; a request here takes it over anew.
    """

    name: str
    carcass_kept_s: float
    target: Target
    pinned: bool
    phase: Phase = Phase.UNAVAILABLE
    intent: Operation | None = None
    failure: Explanation | None = None
    stop_trouble: Explanation | None = None
    card_lost: Explanation | None = None
    container: ContainerFacts | None = None
    paused: bool = False
    endpoint: str | None = None
    ready_since: float | None = None
    start_retry: Retry = Retry()
    stop_retry: Retry = Retry()
    look_at: float | None = None
    bury_at: float | None = None
    drained: Drained | None = None
    is_patient: bool = False
    is_let_go: bool = False

    @property
    def is_listed(self) -> bool:
        """Whether the engine was listed; until then phase and intent are those of no container."""
        return self.phase is not Phase.UNAVAILABLE or self.intent is not None

    @property
    def is_alive(self) -> bool:
        """Whether there is a container whose process has not ended, as of the last inspection."""
        return self.container is not None and self.container.status in ALIVE

    @property
    def is_ready(self) -> bool:
        """Return whether the server is ready and in service, and no operation was requested."""
        return self.is_in_service and self.intent is None

    @property
    def is_in_service(self) -> bool:
        """Return whether the server is ready and no order keeps it out of service."""
        return self.phase is Phase.READY and self.drained is None

    @property
    def ends(self) -> bool:
        """Return whether a stop goes on, or was requested."""
        return self.intent is Operation.STOP

    @property
    def usable_endpoint(self) -> str | None:
        """The address for leases; None while none may be given."""
        is_usable = self.is_ready and self.card_lost is None and not self.is_let_go
        return self.endpoint if is_usable else None

    @property
    def occupies(self) -> bool:
        """Whether it counts against the number of instances that may run."""
        return self.intent is Operation.START or self.phase in _OCCUPYING


_OCCUPYING = (Phase.STARTING, Phase.READY, Phase.DRAINING, Phase.STOPPING)
# The phases in which a stop has something to end.
_WITH_SERVER = (Phase.STARTING, Phase.READY)


# --- events ---


@dataclass(frozen=True, slots=True)
class Listed:
    """The engine was listed for the first time.

    Args:
        container: None where there is none.
        unfinished: the operation that an earlier daemon had not ended.
    """

    container: ContainerFacts | None
    unfinished: Operation | None


@dataclass(frozen=True, slots=True)
class NothingToSweep:
    """A one-shot sweep has found no running container: it starts nothing and finishes no start."""


@dataclass(frozen=True, slots=True)
class Inspected:
    """The engine has described the container; ignored where an operation was requested meanwhile.

    Args:
        container: None where there is none.
        out_of_memory: the engine has sent an event of that kind. Docker 20.10 says so nowhere else while the
            container runs on.
    """

    container: ContainerFacts | None
    out_of_memory: bool = False


@dataclass(frozen=True, slots=True)
class LetGo:
    """The server is idle here: no lease is given. It runs on as long as other gateways use it.

    Args:
        takes_back: it is used here after all, or nobody can tell.
    """

    takes_back: bool = False


@dataclass(frozen=True, slots=True)
class WantedAgain:
    """A server that runs for other gateways is to be used here again."""


@dataclass(frozen=True, slots=True)
class LogRead:
    """The last lines of an ended container were read."""

    container: ContainerFacts
    tail: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LookRequested:
    """There is a reason to inspect the container, at the latest in so many seconds."""

    in_s: float = 0.0


@dataclass(frozen=True, slots=True)
class LookBegun:
    """The container is being inspected."""


@dataclass(frozen=True, slots=True)
class StartRequested:
    """A start was requested. An explicit one ignores the back-off of earlier failures."""

    explicit: bool


@dataclass(frozen=True, slots=True)
class StopRequested:
    """A stop was requested."""


@dataclass(frozen=True, slots=True)
class RestartDue:
    """A failed instance that should run is started again."""


@dataclass(frozen=True, slots=True)
class RestartRefused:
    """A failed instance that should run cannot be started again now."""


@dataclass(frozen=True, slots=True)
class ReplacementDue:
    """The container is to be replaced: stopped, then started again."""


@dataclass(frozen=True, slots=True)
class RestartRequested:
    """The operator wants a new container; open leases are waited for. Without a container it is a start."""


@dataclass(frozen=True, slots=True)
class TakenOutOfService:
    """The operator takes the instance out of service, or changes such an order."""

    drained: Drained


@dataclass(frozen=True, slots=True)
class PutBackInService:
    """The order to keep the instance out of service ends."""


@dataclass(frozen=True, slots=True)
class StartBegun:
    """The requested start was begun."""


@dataclass(frozen=True, slots=True)
class ContainerChanged:
    """An operation has seen or changed the container."""

    container: ContainerFacts | None


@dataclass(frozen=True, slots=True)
class BecameReady:
    """The server answers at its endpoint."""

    endpoint: str


@dataclass(frozen=True, slots=True)
class StartFailed:
    """The start ended without a ready server."""

    why: Explanation


@dataclass(frozen=True, slots=True)
class DrainBegun:
    """Open leases are waited for; no new ones are given."""


@dataclass(frozen=True, slots=True)
class DiedInDrain:
    """The container ended while leases were waited for."""


@dataclass(frozen=True, slots=True)
class StopBegun:
    """The container is being ended."""


@dataclass(frozen=True, slots=True)
class RunEnded:
    """The container was removed; what it held may not be given back yet."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """The stop has ended. `may_start`: a start that was requested meanwhile may follow."""

    may_start: bool


@dataclass(frozen=True, slots=True)
class StopFailed:
    """The stop has failed; it stays requested."""

    why: Explanation


@dataclass(frozen=True, slots=True)
class BurialBegun:
    """The ended container is being removed."""


@dataclass(frozen=True, slots=True)
class BurialFailed:
    """The ended container could not be removed."""


@dataclass(frozen=True, slots=True)
class CardLost:
    """The card of the container cannot be used."""

    message: str


@dataclass(frozen=True, slots=True)
class CardReturned:
    """The card can be used again, if only by a new container."""


@dataclass(frozen=True, slots=True)
class PinChanged:
    """The pin was set or taken back."""

    pinned: bool


Event: TypeAlias = (
    Listed
    | NothingToSweep
    | Inspected
    | LogRead
    | LetGo
    | WantedAgain
    | LookRequested
    | LookBegun
    | StartRequested
    | StopRequested
    | RestartDue
    | RestartRefused
    | ReplacementDue
    | RestartRequested
    | TakenOutOfService
    | PutBackInService
    | StartBegun
    | ContainerChanged
    | BecameReady
    | StartFailed
    | DrainBegun
    | DiedInDrain
    | StopBegun
    | RunEnded
    | Stopped
    | StopFailed
    | BurialBegun
    | BurialFailed
    | CardLost
    | CardReturned
    | PinChanged
)


# --- effects ---


@dataclass(frozen=True, slots=True)
class Record:
    """Record an event in the journal."""

    kind: str
    reason: Reason | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class FailStarters:
    """Fail the callers that wait for a start."""

    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class DropClaim:
    """Drop the claim on GPU memory."""


@dataclass(frozen=True, slots=True)
class ForgetServer:
    """Forget health, models and use: the server is gone, or is another one."""


Effect: TypeAlias = Record | FailStarters | DropClaim | ForgetServer
Step: TypeAlias = tuple[Condition, tuple[Effect, ...]]


def step(c: Condition, event: Event, now: float) -> Step:  # noqa: PLR0911  (one return an event)
    """The condition after an event, and the effects to carry out, in order.

    Raises:
        IllegalTransitionError: the event cannot happen in this phase.
    """
    match event:
        case Listed() | Inspected() | LogRead() | ContainerChanged() | LookRequested() | LookBegun():
            return _seen(c, event, now)
        case StartRequested() | StopRequested() | RestartDue() | RestartRefused() | ReplacementDue():
            return _requested(c, event, now), ()
        case TakenOutOfService() | PutBackInService() | RestartRequested():
            return _ordered(c, event, now), ()
        case StartBegun() | BecameReady() | StartFailed():
            return _started(c, event, now)
        case DrainBegun() | DiedInDrain() | StopBegun() | RunEnded() | Stopped() | StopFailed():
            return _stopped(c, event, now)
        case NothingToSweep():
            return _move(c, Fact.FOUND_ABSENT), ()
        case BurialBegun() | BurialFailed():
            return replace(c, bury_at=None if event == BurialBegun() else now + c.carcass_kept_s), ()
        case CardLost() | CardReturned() | LetGo() | WantedAgain():
            return _changed(c, event)
        case PinChanged(pinned):
            # Only a pinned instance is started again by itself.
            ends = not pinned and c.phase is Phase.FAILED and c.intent is None
            return replace(c, pinned=pinned, target=Target.STOPPED if ends else c.target), ()
        case _:
            assert_never(event)


_FROM_OUTSIDE = {
    137: "by SIGKILL (exit code 137), as `docker kill`, `docker rm -f` and the system do",
    143: "by SIGTERM (exit code 143), as `docker stop` does",
}
_FROM_OUTSIDE_OF_SERVICE = {
    137: "by SIGKILL (exit code 137), as `docker kill` on its node and the system do",
    143: "by SIGTERM (exit code 143), as `docker service update` and `docker node update` do",
}


def explain_end(name: str, facts: ContainerFacts | None) -> Explanation:
    """The reason why a container does not run any more, in one sentence."""
    if facts is None:
        return Explanation(Reason.CONTAINER_EXITED, f"{name} was removed")
    if facts.out_of_memory:
        message = f"{name} was ended because it used more memory than its limit allows"
        return Explanation(Reason.OUT_OF_MEMORY, message)
    if facts.reason is not None:
        return Explanation(facts.reason, f"{name} does not run: {facts.error}")
    trouble = f" ({facts.error})" if facts.error else ""
    if facts.exit_code is None and facts.error:
        return Explanation(Reason.CONTAINER_EXITED, f"{name} does not run: {facts.error}")
    # 128 + the signal. Nothing inside the container sends these to its first process.
    from_outside = _FROM_OUTSIDE if facts.node is None else _FROM_OUTSIDE_OF_SERVICE
    if facts.exit_code in from_outside:
        how = f"{name} was ended from outside, {from_outside[facts.exit_code]}{trouble}"
        return Explanation(Reason.CONTAINER_EXITED, how)
    message = f"{name} ended by itself with exit code {facts.exit_code}{trouble}"
    return Explanation(Reason.CONTAINER_EXITED, message)


def _move(c: Condition, fact: Fact) -> Condition:
    return replace(c, phase=advance(c.phase, fact))


# --- the container was seen ---


def _seen(  # noqa: PLR0911  (one return an event)
    c: Condition,
    event: Listed | Inspected | LogRead | ContainerChanged | LookRequested | LookBegun,
    now: float,
) -> Step:
    match event:
        case LookBegun():
            return replace(c, look_at=None), ()
        case LookRequested(in_s):
            at = now + in_s
            return replace(c, look_at=at if c.look_at is None else min(at, c.look_at)), ()
        case ContainerChanged(container):
            return _with_container(c, container), ()
        case LogRead(container, tail):
            if c.phase is not Phase.FAILED or c.failure is None or container.status == "parked":
                return c, ()  # a service without replicas does not say how its last run has ended
            return replace(c, failure=replace(explain_end(c.name, container), log_tail=tail)), ()
        case Listed(container, unfinished):
            return _listed(_with_container(c, container), unfinished, now)
        case Inspected(container, out_of_memory):
            if c.intent is not None:
                return c, ()
            if c.phase is Phase.READY and _was_stopped_elsewhere(c, container):
                return _parked(_with_container(c, container), now)
            return _inspected(_with_container(c, container), c.container, now, out_of_memory=out_of_memory)
        case _:
            assert_never(event)


def _with_container(c: Condition, container: ContainerFacts | None) -> Condition:
    if container is not None and container.status == "parked":
        container = None  # its service waits for the next start
    return replace(c, container=container, paused=container is not None and container.status == "paused")


def _listed(c: Condition, unfinished: Operation | None, now: float) -> Step:
    if unfinished is Operation.STOP and c.container is not None:
        return replace(c, intent=Operation.STOP), ()
    if c.is_alive and _must_end(c):
        return _ending(c), ()
    if c.is_alive:
        return _adopted(c)
    if unfinished is not None or c.target is Target.STOPPED:
        intent = Operation.START if c.target is Target.RUNNING else None
        return _with_carcass(replace(_move(c, Fact.FOUND_ABSENT), intent=intent), now), ()
    c, effects = _ended(_move(c, Fact.FOUND_DEAD), now)
    return replace(c, look_at=now), effects  # a listing does not say why it ended


def _inspected(c: Condition, known: ContainerFacts | None, now: float, *, out_of_memory: bool) -> Step:
    facts = c.container
    if facts is None or facts.status not in ALIVE:
        if c.phase is Phase.READY:
            return _ended(_move(c, Fact.DIED), now)
        return _with_carcass(c, now), ()
    if c.phase is not Phase.READY or known is None or _is_another_run(known, facts) or facts.is_detached:
        # An operator may have started it by hand although the instance is out of service.
        return (_ending(_move(c, Fact.FOUND_RUNNING)), ()) if _must_end(c) else _adopted(c)
    if (facts.out_of_memory or out_of_memory) and c.failure is None:
        # Any process of the container may have been killed; the server may run on.
        message = f"a process in {c.name} was killed: more memory than its limit allows"
        why = Explanation(Reason.OUT_OF_MEMORY, message)
        return replace(c, failure=why), (Record("out_of_memory", why.code, message),)
    return c, ()


def _is_another_run(known: ContainerFacts, facts: ContainerFacts) -> bool:
    """Whether the container was replaced or restarted: its server is a new one, perhaps elsewhere."""
    return (known.id, known.started_at, known.address) != (facts.id, facts.started_at, facts.address)


def _adopted(c: Condition) -> Step:
    """Take over a container that runs: it may be in the middle of somebody's work."""
    effects: tuple[Effect, ...] = (ForgetServer(),) if c.phase is Phase.READY else ()
    c = replace(
        _move(c, Fact.FOUND_RUNNING),
        target=Target.RUNNING,
        intent=Operation.START,
        start_retry=c.start_retry.due(),
        bury_at=None,
        card_lost=None,  # of the run before; the first probe finds out about this one
        is_let_go=False,
    )
    return c, effects


def _ended(c: Condition, now: float) -> Step:
    """The container ended, and no operation ended it."""
    why = explain_end(c.name, c.container)
    c = _run_ended(c, now)
    c = replace(
        c,
        failure=why,
        start_retry=c.start_retry.failed(now),
        target=c.target if _restarts(c) else Target.STOPPED,
    )
    return _with_carcass(c, now), (
        ForgetServer(),
        DropClaim(),
        Record("container_ended", why.code, why.message),
        FailStarters(why.code, why.message),
    )


def _was_stopped_elsewhere(c: Condition, container: ContainerFacts | None) -> bool:
    if container is None:
        return c.is_let_go
    return container.status == "parked" or (c.is_let_go and container.status not in ALIVE)


def _parked(c: Condition, now: float) -> Step:
    """The server was stopped in order, by another gateway or an operator.

    That is no failure, and an order also for a pinned instance.
    """
    message = f"{c.name} was stopped from outside"
    c = replace(_run_ended(_move(c, Fact.PARKED), now), target=Target.STOPPED, bury_at=None)
    effects = (
        ForgetServer(),
        DropClaim(),
        Record("stopped", None, message),
        FailStarters(Reason.INSTANCE_STOPPED, message),
    )
    return c, effects


def _run_ended(c: Condition, now: float) -> Condition:
    retry = c.start_retry if c.ready_since is None else c.start_retry.ran(now - c.ready_since)
    return replace(c, start_retry=retry, ready_since=None, endpoint=None, card_lost=None, is_let_go=False)


def _with_carcass(c: Condition, now: float) -> Condition:
    """Keep an ended container for a while: an operator may look at it, or start it by hand."""
    if c.container is None:
        return replace(c, bury_at=None)
    return replace(c, bury_at=now + c.carcass_kept_s if c.bury_at is None else c.bury_at)


def _restarts(c: Condition) -> bool:
    """Return whether it is started again by itself after a failure."""
    return c.pinned and c.drained is None


# --- out of service ---


def _must_end(c: Condition) -> bool:
    """Return whether a container that runs is to be stopped because the instance is out of service."""
    return c.drained is not None and c.drained.stops


def _ending(c: Condition) -> Condition:
    """Stop the container once its open leases have ended."""
    return replace(
        c, target=Target.STOPPED, intent=Operation.STOP, stop_retry=Retry(), is_patient=True, bury_at=None
    )


def _ordered(
    c: Condition, event: TakenOutOfService | PutBackInService | RestartRequested, now: float
) -> Condition:
    match event:
        case TakenOutOfService(drained):
            return _taken_out(c, drained, now)
        case PutBackInService():
            c = replace(c, drained=None)
            return _kept(c, now) if _may_be_kept(c) else c
        case RestartRequested():
            if not c.ends and (c.phase in _WITH_SERVER or c.is_alive):
                return replace(_ending(c), target=Target.RUNNING)
            return _requested(c, StartRequested(explicit=True), now)
        case _:
            assert_never(event)


def _taken_out(c: Condition, drained: Drained, now: float) -> Condition:
    c = replace(c, drained=drained)
    if not c.is_listed:
        return replace(c, target=Target.STOPPED)  # the first listing shows whether there is a container
    if not drained.stops and _may_be_kept(c):
        return _kept(c, now)
    if c.ends:
        return replace(c, target=Target.STOPPED)
    if c.phase in _WITH_SERVER or c.is_alive:
        return _ending(c) if drained.stops else c
    return replace(c, target=Target.STOPPED, intent=None)  # a start that has not begun


def _may_be_kept(c: Condition) -> bool:
    """Return whether a requested stop still waits for open leases and may be taken back."""
    return c.ends and c.is_patient and c.phase in (Phase.READY, Phase.DRAINING)


def _kept(c: Condition, now: float) -> Condition:
    """Take the stop back: the container runs on."""
    if c.phase is Phase.DRAINING:
        c = _move(c, Fact.DRAIN_ENDED)
    # No inspection counted while the stop was requested.
    return replace(c, target=Target.RUNNING, intent=None, is_patient=False, look_at=now)


# --- operations ---


def _requested(  # noqa: PLR0911  (one return an event)
    c: Condition,
    event: StartRequested | StopRequested | RestartDue | RestartRefused | ReplacementDue,
    now: float,
) -> Condition:
    match event:
        case StartRequested() | RestartDue() if c.drained is not None:
            return c
        case StartRequested(explicit):
            if explicit:
                c = replace(c, start_retry=c.start_retry.due(), stop_retry=c.stop_retry.due())
            return replace(c, target=Target.RUNNING, intent=c.intent or Operation.START)
        case StopRequested():
            c = replace(c, target=Target.STOPPED, is_patient=False)
            if c.phase is Phase.STOPPED:
                return replace(c, intent=None)  # the start had not begun: nothing has to be stopped
            retry = c.stop_retry.due() if c.intent is Operation.STOP else Retry()
            return replace(c, intent=Operation.STOP, stop_retry=retry)
        case RestartDue():
            return replace(c, intent=Operation.START)
        case RestartRefused():
            return replace(c, start_retry=c.start_retry.failed(now))
        case ReplacementDue():
            return replace(c, intent=Operation.STOP, stop_retry=Retry())
        case _:
            assert_never(event)


def _started(c: Condition, event: StartBegun | BecameReady | StartFailed, now: float) -> Step:
    # A stop may have been requested at the last moment: its intent stays.
    intent = None if c.intent is Operation.START else c.intent
    match event:
        case StartBegun():
            if c.phase is not Phase.STARTING:
                c = _move(c, Fact.START_BEGUN)
            return replace(c, failure=None, bury_at=None), ()
        case BecameReady(endpoint):
            c = _move(c, Fact.BECAME_READY)
            retry = c.start_retry.due()
            return replace(c, intent=intent, endpoint=endpoint, ready_since=now, start_retry=retry), ()
        case StartFailed(why):
            retry = c.start_retry.failed(now)
            gives_up = c.intent is Operation.START and not _restarts(c)
            c = replace(
                _move(c, Fact.START_FAILED),
                intent=intent,
                target=Target.STOPPED if gives_up else c.target,
                failure=why,
                endpoint=None,
                start_retry=retry,
                # It could not be taken over: inspect it again later.
                look_at=c.look_at if c.container is None else now + backoff.delay_s(retry.failures),
            )
            return c, (DropClaim(), Record("start_failed", why.code, why.message))
        case _:
            assert_never(event)


def _stopped(
    c: Condition,
    event: DrainBegun | DiedInDrain | StopBegun | RunEnded | Stopped | StopFailed,
    now: float,
) -> Step:
    match event:
        case DrainBegun():
            return _move(c, Fact.DRAIN_BEGUN), ()
        case DiedInDrain():
            return _move(c, Fact.DIED_IN_DRAIN), ()
        case StopBegun():
            return (c if c.phase is Phase.STOPPING else _move(c, Fact.STOP_BEGUN)), ()
        case RunEnded():
            return _run_ended(c, now), ()
        case Stopped(may_start):
            starts = c.target is Target.RUNNING and may_start and c.drained is None
            c = replace(
                _move(_run_ended(c, now), Fact.REMOVED),
                target=Target.RUNNING if starts else Target.STOPPED,
                intent=Operation.START if starts else None,
                stop_trouble=None,
                bury_at=None,
                is_patient=False,
            )
            return c, (ForgetServer(), DropClaim())
        case StopFailed(why):
            c = replace(c, stop_retry=c.stop_retry.failed(now), stop_trouble=why)
            return c, (Record("stop_failed", why.code, why.message),)
        case _:
            assert_never(event)


def _changed(c: Condition, event: CardLost | CardReturned | LetGo | WantedAgain) -> Step:
    match event:
        case LetGo(takes_back):
            return replace(c, is_let_go=not takes_back), ()
        case WantedAgain():
            return _adopted(c)
        case CardLost(message):
            why = Explanation(Reason.GPU_MISSING, message)
            if c.phase is not Phase.READY or c.card_lost == why:
                return c, ()
            effects = () if c.card_lost is not None else (Record("card_lost", why.code, message),)
            return replace(c, card_lost=why), effects
        case CardReturned():
            if c.card_lost is None:
                return c, ()
            return replace(c, card_lost=None), (Record("card_returned", None, c.card_lost.message),)
        case _:
            assert_never(event)
