"""The display of an instance: one that cannot be known or used right now is `unavailable`, and says why."""

from __future__ import annotations

from manager.domain.instance import Explanation, Health, Phase
from manager.errors import Reason


def shown(
    phase: Phase,
    health: Health,
    *,
    engine_trouble: str | None,
    unusable: Explanation | None,
    explanations: tuple[Explanation | None, ...],
    card_lost: bool = False,
) -> tuple[Phase, Explanation | None]:
    """The phase and the reason to tell.

    Args:
        phase: what the instance was last known to be.
        health: what its own server last said.
        engine_trouble: why the engine cannot be asked, None when it can.
        unusable: why it could not be started whatever is tried, None when it could.
        explanations: what else there is to say, the most important first.
        card_lost: the container runs, and its card cannot be used.
    """
    if engine_trouble is not None:
        away = Explanation(Reason.ENGINE_UNAVAILABLE, engine_trouble)
        # What answers its probe is there, whatever the engine says; what is being moved is tracked on.
        answers = phase in (Phase.READY, Phase.DRAINING) and health is not Health.UNHEALTHY
        moving = phase in (Phase.STARTING, Phase.STOPPING)
        return (phase if answers or moving else Phase.UNAVAILABLE), away
    if unusable is not None and (phase in (Phase.STOPPED, Phase.FAILED) or card_lost):
        return Phase.UNAVAILABLE, unusable
    return phase, next((explanation for explanation in explanations if explanation is not None), None)
