"""Any order of arrivals, answers, failures, cancels and changes: no slot and no wake-up is lost (U-8)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manager.domain.judgement import Judgement
from manager.domain.roles import RequestKind, Role, RoutingSettings
from manager.domain.routing import Refused, RequestFacts
from manager.domain.target import Target
from manager.errors import Reason
from manager.services.routing.attempting import Trouble
from tests.support.attempts import Stage, attempt, decision
from tests.support.virtual import VirtualLoop

if TYPE_CHECKING:
    from manager.domain.routing import Decision
    from manager.services.routing.attempting import Attempting, Step

IDS = ("a", "b", "c")
WAIT_S = 2.0
LANES = ("safe", "busy", None)
HAPPENS = ("answered", "answered", "refused", "stale", "late", "busy", "dies")

NUMBERS = st.integers(0, 30)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("arrives"), st.sampled_from(LANES)),
        st.tuples(st.just("arrives"), st.sampled_from(LANES)),
        st.tuples(st.sampled_from(HAPPENS), NUMBERS),
        st.tuples(st.just("leaves"), NUMBERS),
        st.tuples(st.just("slots"), st.sampled_from(IDS), st.none() | st.integers(1, 3)),
        st.tuples(st.just("concurrency"), st.none() | st.integers(1, 3)),
        st.tuples(st.just("goes"), st.sampled_from(IDS)),
        st.tuples(st.just("comes"), st.sampled_from(IDS)),
        st.tuples(st.just("starts"), st.booleans()),
        st.tuples(st.just("ticks"), st.integers(0, 3)),
        st.tuples(st.just("time passes"), st.sampled_from((0.3, 2.5))),
    ),
    max_size=60,
)


class Request:
    """One request and the task that follows its steps."""

    def __init__(self, play: Play, lane: str | None) -> None:
        self.one: Attempting = play.stage.request()
        self.lane = lane
        self.happens: asyncio.Future[str] | None = None
        self.task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        one = self.one
        try:
            step: Step | None = one.enter(RequestFacts(self.lane or "tiny", RequestKind.GENERATE))
            while not isinstance(step, Trouble):
                if not isinstance(step, Target):
                    step = await one.wait()
                    continue
                one.sent()
                self.happens = asyncio.get_running_loop().create_future()
                step = self._follow(await self.happens)
                self.happens = None
                if step is None:
                    one.close("ok")
                    return
            one.close("refused")
        finally:
            one.close("client_gone")

    def _follow(self, event: str) -> Step | None:
        one = self.one
        match event:
            case "refused":
                return one.failed(Reason.UPSTREAM_UNREACHABLE, "", sent=False)
            case "stale":
                return one.failed(Reason.UPSTREAM_UNREACHABLE, "", sent=False, stale=True)
            case "late":
                return one.failed(Reason.ATTEMPT_TIMEOUT, "", sent=True)
            case "busy":
                return one.answered(Judgement(Reason.OVERLOADED), "busy", "answer")
            case "dies":
                return one.failed(Reason.UPSTREAM_ERROR, "", sent=True)
            case _:
                return None


class Play:
    """A routing over three instances, and the requests in it. `c` has to be started for each request."""

    def __init__(self) -> None:
        self.stage = stage = Stage()
        self.there = set(IDS)
        self.concurrency: int | None = None
        self.requests: list[Request] = []
        self.most: dict[str, int] = {}
        stage.slots_of = {"a": 2, "b": 1, "c": 1}
        cast("Any", stage.router).decide = self._decide
        stage.placement.gone.add("b")
        self._await_start()
        self.configure()

    def _await_start(self) -> None:
        self.stage.placement.prepares["c"] = asyncio.get_running_loop().create_future()

    def configure(self) -> None:
        stage = self.stage
        roles = (
            Role("safe", RequestKind.GENERATE, "tiny", instances=("a", "c"), reserved=1, queue_wait_s=WAIT_S),
            Role("busy", RequestKind.GENERATE, "tiny", concurrency=self.concurrency, queue_length=3),
        )
        stage.settings.routing = RoutingSettings({role.name: role for role in roles})
        stage.settings.version += 1
        stage.router.version += 1
        stage.slots.refresh()
        self.most = {state.id: state.in_use for state in stage.slots.instances()}

    def _decide(self, facts: RequestFacts) -> Decision:
        ways = [attempt("a"), attempt("b"), attempt("c", "startable")._replace(choice=1)]
        if facts.model == "safe":
            ways = [ways[0], ways[2]]
        ways = [one for one in ways if one.instance in self.there]
        role = None if facts.model == "tiny" else facts.model
        if not ways:
            return decision(refused=Refused("unavailable", Reason.INSTANCE_UNAVAILABLE, "none"), role=role)
        return decision(*ways, role=role)

    async def do(self, what: str, *values: Any) -> None:  # noqa: C901, PLR0912  (a case for each operation)
        match what:
            case "arrives":
                self.requests.append(Request(self, values[0]))
            case "leaves":
                if self.requests:
                    self.requests[values[0] % len(self.requests)].task.cancel()
            case "slots":
                self.stage.slots_of[values[0]] = values[1]
                self.configure()
            case "concurrency":
                self.concurrency = values[0]
                self.configure()
            case "goes" | "comes":
                (self.there.discard if what == "goes" else self.there.add)(values[0])
                self.stage.router.version += 1
                list(self.stage.slots.choose_again())
            case "starts":
                starting = self.stage.placement.prepares["c"]
                self._await_start()
                if not starting.done():  # a request that left has cancelled it
                    starting.set_result(5.0 if values[0] else None)
            case "ticks":
                for _ in range(values[0]):
                    await asyncio.sleep(0)
            case "time passes":
                await asyncio.sleep(values[0])
            case _:
                futures = [one.happens for one in self.requests]
                asked = [one for one in futures if one is not None and not one.done()]
                if asked:
                    asked[values[0] % len(asked)].set_result(what)

    async def settle(self) -> None:
        """Let every task go on as far as it can."""
        for _ in range(20):
            await asyncio.sleep(0)
        for request in [one for one in self.requests if one.task.done()]:
            if not request.task.cancelled():
                request.task.result()
            self.requests.remove(request)

    def check_counts(self) -> None:
        places = [one.one._place for one in self.requests if one.one._place is not None]
        for state in self.stage.slots.instances():
            used = sum(place.instance == state.id for place in places)
            if self.stage.slots.is_on:
                assert state.in_use == used
            if state.slots is not None:
                assert used <= max(state.slots, self.most[state.id])

    def check_waits(self) -> None:
        """No request waits while a slot that it could use is free, and none that has one waits."""
        lanes = self.stage.slots._lanes
        for place in self.stage.slots._waiting.values():
            waiter = place.waiter
            assert waiter.is_waiting
            assert place._waiting is not None
            if lanes._lanes[waiter.lane].has_room:
                assert not any(lanes._instances[id_].has_room_for(waiter.lane) for id_ in waiter.instances)
        for request in self.requests:
            one = request.one
            if one._place is not None and one._place.instance is not None and one._lease is None:
                assert one.attempt is not None
                assert one.attempt.instance == one._place.instance == "c"  # it is being started

    async def end(self) -> None:
        """Answer half of the requests, and have the others leave."""
        for number, request in enumerate([*self.requests]):
            if number % 2 and request.happens is not None and not request.happens.done():
                request.happens.set_result("answered")
            else:
                request.task.cancel()
        await self.settle()
        assert self.requests == []
        assert self.stage.slots._waiting == {}
        assert [one.in_use for one in self.stage.slots.instances()] == [0, 0, 0]
        assert [(one.in_flight, one.queued) for one in self.stage.slots.lanes()] == [(0, 0), (0, 0)]
        assert self.stage.placement.held == {}


async def played(operations: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play()
    monkeypatch.setattr("manager.services.routing.attempting.monotonic", asyncio.get_running_loop().time)
    for operation in operations:
        await play.do(*operation)
        if operation[0] != "arrives":
            play.check_counts()
        if operation[0] not in ("arrives", "ticks"):
            continue
        await asyncio.sleep(0)
    await play.settle()
    play.check_counts()
    play.check_waits()
    await play.end()


@given(OPERATIONS)
@settings(max_examples=300)
def test_no_slot_and_no_wake_up_is_lost(operations: list[tuple[Any, ...]]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch, asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(played(operations, monkeypatch))
