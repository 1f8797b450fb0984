"""The actual side of one instance, and how what the engine tells changes it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from manager.domain import backoff
from manager.domain.instance import ALIVE, Explanation, Phase, Target
from manager.domain.lifecycle import Fact, advance
from manager.domain.registry import Operation
from manager.errors import Reason, StartFailedError
from manager.services.instances.container_run import Watch, explain_end
from manager.services.waiters import Waiters

if TYPE_CHECKING:
    from manager.domain.instance import ContainerFacts
    from manager.services.ports import EngineEvent
    from manager.services.world import World


_OOM_OVER_S = 0.5
# The fields that routing reads.
_ROUTED = frozenset({"phase", "intent", "endpoint", "failure"})


@dataclass(slots=True)
class Retry:
    """When something that failed may be tried again. `at` is monotonic seconds."""

    failures: int = 0
    at: float = 0.0

    def failed(self, now: float) -> None:
        self.failures += 1
        self.at = now + backoff.delay_s(self.failures)

    def ran(self, ran_s: float) -> None:
        """A run has ended, however it did."""
        self.failures = backoff.failures_left(self.failures, ran_s)


@dataclass(slots=True)
class Condition:
    """Phase, target and container of one instance. The supervisor owns it; it does no I/O of its own.

    `intent` is the operation that was asked for and has not ended. `failure` is kept until the next start.
    `look_at` is when the engine should be asked, `bury_at` when an ended container may be removed, both
    monotonic like `ready_since`.
    """

    world: World
    id: str
    name: str
    target: Target
    pinned: bool
    intent: Operation | None = None
    phase: Phase = Phase.UNAVAILABLE
    failure: Explanation | None = None
    container: ContainerFacts | None = None
    endpoint: str | None = None
    ready_since: float | None = None
    start_retry: Retry = field(default_factory=Retry)
    look_at: float | None = None
    bury_at: float | None = None
    carcass_kept_s: float = 0.0
    watch: Watch = field(default_factory=Watch)
    starters: Waiters = field(default_factory=Waiters)

    def __setattr__(self, name: str, value: object) -> None:
        """Advance the fleet's revision with every assignment to a field that routing reads."""
        object.__setattr__(self, name, value)
        if name in _ROUTED:
            self.world.revision.advance()

    @property
    def alive(self) -> bool:
        """Whether there is a container whose process has not ended, as far as is known."""
        return self.container is not None and self.container.status in ALIVE

    def move(self, fact: Fact) -> None:
        self.phase = advance(self.phase, fact)

    def set_container(self, facts: ContainerFacts | None) -> None:
        if self.container is not None and (facts is None or facts.id != self.container.id):
            self.world.gpus.forget_container(self.container.id)
        self.container = facts
        if facts is not None:
            self.world.gpus.note_container(facts.id, self.id, facts.pid)

    def first_listing(self, facts: ContainerFacts | None, unfinished: Operation | None) -> None:
        """Take in what the engine listed when the daemon began.

        Args:
            facts: the container, None when there is none.
            unfinished: what an earlier daemon was doing when it ended.
        """
        self.set_container(facts)
        if unfinished is Operation.STOP and facts is not None:
            self.intent = Operation.STOP
        elif facts is not None and facts.status in ALIVE:
            self._adopt(facts)
        elif unfinished is not None or self.target is Target.STOPPED:
            self.move(Fact.FOUND_ABSENT)
            self.intent = Operation.START if self.target is Target.RUNNING else None
            self._mark_carcass()
        else:
            self.move(Fact.FOUND_DEAD)
            self._ended_without_us(facts)

    def take_in(self, facts: ContainerFacts | None) -> None:
        """Take in what the engine says of the container now; only while no operation goes on."""
        known = self.container
        self.set_container(facts)
        self.watch.paused = facts is not None and facts.status == "paused"
        self.world.revision.advance()
        if facts is None or facts.status not in ALIVE:
            if self.phase is Phase.READY:
                self.died()
            self._mark_carcass()
        elif self.phase is not Phase.READY or known is None or _is_another_run(known, facts):
            self._adopt(facts)
        elif (facts.out_of_memory or self.watch.out_of_memory) and self.failure is None:
            # Any process of the container may be the one that was killed; the server may run on. The engine
            # then says so in the container's state (moby 28), or by the event alone (seen with 20.10).
            message = f"a process in {self.name} was killed: more memory than its limit allows"
            self.failure = Explanation(Reason.OUT_OF_MEMORY, message)
            self.world.journal.record(
                "out_of_memory", instance=self.id, reason=Reason.OUT_OF_MEMORY, detail=message
            )

    def hint(self, event: EngineEvent, *, operating: bool) -> bool:
        """Take in an event; True when it is a reason to look.

        Args:
            event: what the engine says.
            operating: an operation goes on, which watches for itself.
        """
        known = self.container
        if known is not None and event.container_id == known.id:
            if event.action in ("pause", "unpause"):
                self.watch.paused = event.action == "pause"
                self.world.revision.advance()  # a paused container is silent
            elif event.action == "die":
                self.watch.ended.set()
                self.container = replace(known, status="exited", exit_code=event.exit_code)
                if not operating and self.phase in (Phase.READY, Phase.STARTING):
                    self.died()
            elif event.action == "oom":
                self.watch.out_of_memory = True
        due = event.action in ("start", "die", "oom", "pause", "unpause", "destroy")
        if due:
            # An out-of-memory is told before it is known whether the server itself was meant.
            self.look(_OOM_OVER_S if event.action == "oom" else 0.0)
        return due

    def differs(self, facts: ContainerFacts | None) -> bool:
        """Whether a listing says something else than what is known."""
        if facts is None or self.container is None:
            return facts is not self.container
        known = self.container
        return (facts.id, facts.status, facts.address) != (known.id, known.status, known.address)

    def look(self, in_s: float = 0.0) -> None:
        """Have the engine asked, now or in a while."""
        self.look_at = self.world.now() + in_s

    def died(self) -> None:
        self.move(Fact.DIED)
        self._ended_without_us(self.container)

    def run_ended(self) -> None:
        """The server is not there any more, or another one is."""
        if self.ready_since is not None:
            self.start_retry.ran(self.world.now() - self.ready_since)
        self.ready_since = None
        self.endpoint = None

    def explain_death(self, facts: ContainerFacts, tail: tuple[str, ...]) -> None:
        """Say more of a death, once the engine was asked for it."""
        if self.phase is Phase.FAILED and self.failure is not None:
            self.failure = Explanation(*explain_end(self.name, facts), tail)

    def _adopt(self, facts: ContainerFacts) -> None:
        """Take over a container that runs: it may be in the middle of somebody's work."""
        self.set_container(facts)
        self.target = Target.RUNNING
        self.intent = Operation.START
        self.start_retry.at = 0.0
        self.bury_at = None
        self.move(Fact.FOUND_RUNNING)

    def _ended_without_us(self, facts: ContainerFacts | None) -> None:
        now = self.world.now()
        reason, message = explain_end(self.name, facts)
        self.failure = Explanation(reason, message)
        self.run_ended()
        self.start_retry.failed(now)
        self.world.gpus.drop_claim(self.id)
        # A stop that was asked for goes on: it finds nothing left to end and cleans up.
        if self.intent is not Operation.STOP:
            self.intent = None
            if not self.pinned:
                self.target = Target.STOPPED
        self.look()
        self._mark_carcass()
        self.world.journal.record("container_ended", instance=self.id, reason=reason, detail=message)
        self.starters.settle(StartFailedError(message, reason=reason, instance=self.id))

    def _mark_carcass(self) -> None:
        """An ended container stays a while, for those who want to look at it or start it by hand."""
        if self.container is None:
            self.bury_at = None
        elif self.bury_at is None:
            self.bury_at = self.world.now() + self.carcass_kept_s


def _is_another_run(known: ContainerFacts, facts: ContainerFacts) -> bool:
    """Whether the container was replaced or restarted: its server is a new one, perhaps elsewhere."""
    return (known.id, known.started_at, known.address) != (facts.id, facts.started_at, facts.address)
