"""The condition of one running instance: applies events to it and carries out their effects."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from manager.domain.condition import (
    Condition,
    DropClaim,
    Effect,
    Event,
    FailStarters,
    ForgetServer,
    Record,
    step,
)
from manager.domain.container import LABEL_DEVICE, cards_of_device
from manager.domain.instance import ALIVE
from manager.errors import StartFailedError
from manager.services.waiters import Waiters

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager.domain.instance import ContainerFacts
    from manager.services.world import World


class LiveCondition:
    """Owns the condition of one instance. It only changes in `apply`; it does no I/O.

    Args:
        world: the collaborators of all instances.
        id: the instance's.
        first: the condition before the first listing of the engine.
        on_server_gone: carries out `ForgetServer`.

    Attributes:
        state: the condition as it is.
        starters: the callers that wait for a start.
    """

    def __init__(
        self,
        world: World,
        id: str,  # noqa: A002  (the name it has everywhere)
        first: Condition,
        on_server_gone: Callable[[], None],
    ) -> None:
        self._world = world
        self._id = id
        self._on_server_gone = on_server_gone
        self.state = first
        self.starters = Waiters()

    def apply(self, event: Event) -> None:
        """Take in an event.

        Raises:
            IllegalTransitionError: it cannot happen now; that is a defect.
        """
        before = self.state
        self.state, effects = step(before, event, self._world.now())
        if _routed(before) != _routed(self.state):
            self._world.revision.advance()
        self._note_container(before.container, self.state.container)
        for effect in effects:
            self._carry_out(effect)

    def _note_container(self, before: ContainerFacts | None, after: ContainerFacts | None) -> None:
        gpus = self._world.gpus
        if before is not None and (after is None or after.id != before.id):
            gpus.forget_container(before.id)
        if after is not None and (before is None or (after.id, after.pid) != (before.id, before.pid)):
            gpus.note_container(after.id, self._id, after.pid)
        if after is not before:
            runs = after is not None and after.status in ALIVE
            device = after.labels.get(LABEL_DEVICE, "") if after is not None and runs else ""
            gpus.note_given(self._id, cards_of_device(device))

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Record(kind, reason, detail):
                self._world.journal.record(kind, instance=self._id, reason=reason, detail=detail)
            case FailStarters(reason, message):
                self.starters.settle(StartFailedError(message, reason=reason, instance=self._id))
            case DropClaim():
                self._world.gpus.drop_claim(self._id)
            case ForgetServer():
                self._on_server_gone()
            case _:
                assert_never(effect)


def _routed(condition: Condition) -> tuple[object, ...]:
    """The view of a condition for routing."""
    return (
        condition.phase,
        condition.intent,
        condition.endpoint,
        condition.failure,
        condition.card_lost,
        condition.paused,
        condition.drained,
    )
