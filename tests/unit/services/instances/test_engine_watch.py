"""What the watch concludes from the engine's answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from manager.errors import EngineUnreachableError, Reason
from manager.services.instances.engine_watch import EngineWatch

LACK = EngineUnreachableError("the manager has no file descriptor left", reason=Reason.OVERLOADED)
AWAY = EngineUnreachableError("cannot be reached")


class Engine:
    """An engine that is asked by `answer`: None is an answer, an error is raised."""

    url = "unix:///engine.sock"
    answer: Exception | None = None

    async def ping(self, timeout_s: float) -> None:
        if self.answer is not None:
            raise self.answer


def watching(engine: Engine, events: list[tuple[str, Any]]) -> EngineWatch:
    def record(kind: str, *, reason: Reason | None = None, **_: object) -> None:
        events.append((kind, reason))

    world: Any = SimpleNamespace(engine=engine, journal=SimpleNamespace(record=record), manager_id="m")
    listener: Any = SimpleNamespace(engine_changed=lambda *, up: events.append(("changed", up)))
    watch = EngineWatch(world, listener, probe_interval_s=1, resync_interval_s=1, own_names=())
    watch.found = True
    return watch


async def test_a_lack_of_descriptors_does_not_take_an_engine_for_gone() -> None:
    engine, events = Engine(), list[tuple[str, Any]]()
    watch = watching(engine, events)
    await watch._ping()
    assert watch.up
    events.clear()
    engine.answer = LACK
    await watch._ping()
    assert (watch.up, events) == (True, [])
    engine.answer = AWAY
    await watch._ping()
    assert (watch.up, events) == (False, [("engine_down", Reason.ENGINE_UNAVAILABLE), ("changed", False)])


async def test_before_the_first_answer_a_lack_of_descriptors_is_the_reason_that_is_told() -> None:
    engine, events = Engine(), list[tuple[str, Any]]()
    engine.answer = LACK
    watch = watching(engine, events)
    await watch._ping()
    assert (watch.up, watch.trouble) == (False, LACK.message)
    assert events == [("engine_down", Reason.OVERLOADED)]
