"""Slots and lanes: which waiting request gets which free slot (U-8, A-10)."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from manager.domain import lanes
from manager.domain.lanes import LaneRules, Lanes, Waiter

if TYPE_CHECKING:
    from collections.abc import Iterable

_NOW = count(1)


def opened(slots: dict[str, int | None], **rules: LaneRules) -> Lanes:
    found = Lanes()
    assert found.configure(slots, rules) == []
    return found


def entering(
    here: Lanes, lane: str, *instances: str, project: str = "p", since: float = 0.0, **how: Any
) -> tuple[str, Waiter]:
    waiter = Waiter(lane, instances or ("a",), since)
    return here.enter(waiter, project, **how), waiter


def held(here: Lanes, lane: str, *instances: str, **how: Any) -> Waiter:
    entry, waiter = entering(here, lane, *instances, **how)
    assert entry == "granted"
    return waiter


def queued(here: Lanes, lane: str, *instances: str, **how: Any) -> Waiter:
    entry, waiter = entering(here, lane, *instances, **how)
    assert entry == "waits"
    assert waiter.instance is None
    return waiter


def turns(here: Lanes, first: Waiter, names: dict[Waiter, str], most: int = 1000) -> list[str]:
    """End one request after the other; return the names of those that follow, in order."""
    found, current = [], first
    for _ in range(most):
        following = here.leave(current)
        if not following:
            break
        (current,) = following
        found.append(names[current])
    return found


# --- slots ----------------------------------------------------------------------------------------


def test_a_request_gets_a_free_slot_of_the_first_instance_that_has_one() -> None:
    here = opened({"a": 1, "b": 1}, x=LaneRules())
    assert [held(here, "x", "a", "b").instance for _ in range(2)] == ["a", "b"]
    waiter = queued(here, "x", "a", "b")
    assert here.slots("a") == (1, 1, 0)
    assert here.lane("x") == (2, 1, 0.0)
    assert here.before(waiter) == 0


def test_an_instance_without_slots_has_room_for_all() -> None:
    here = opened({"a": None}, x=LaneRules())
    assert {held(here, "x").instance for _ in range(100)} == {"a"}
    assert here.slots("a") == (None, 100, 0)
    assert here.slots("unknown") == (None, 0, 0)


def test_whether_there_is_room_is_told_without_taking_a_slot() -> None:
    here = opened({"a": 2, "b": None}, x=LaneRules(concurrency=2), y=LaneRules(reserved=1, instances=("a",)))
    assert here.has_room("x", "a")
    first = held(here, "x", "a")
    assert not here.has_room("x", "a"), "the other slot is reserved"
    assert here.has_room("y", "a")
    assert here.has_room("x", "b")
    assert here.has_room("new", "unknown")
    held(here, "x", "b")
    assert not here.has_room("x", "b"), "the lane has as many as it may"
    here.leave(first)
    assert here.has_room("x", "a")
    assert here.slots("a") == (2, 0, 1)


def test_the_end_of_a_request_lets_the_next_one_in_and_leaving_the_queue_lets_none_in() -> None:
    here = opened({"a": 1}, x=LaneRules())
    first, second, third = held(here, "x"), queued(here, "x"), queued(here, "x")
    assert here.before(third) == 1
    assert here.leave(second) == []
    assert here.leave(first) == [third]
    assert here.leave(first) == []
    assert here.leave(third) == []
    assert here.slots("a") == (1, 0, 0)
    assert here.leave(Waiter("nowhere", ("a",), 0.0)) == []


def test_a_request_that_changes_instances_keeps_its_place_or_has_a_slot_at_once() -> None:
    here = opened({"a": 1, "b": 1}, x=LaneRules())
    first, second, third = held(here, "x"), queued(here, "x"), queued(here, "x")
    assert not here.change(second, ("a",))
    assert here.change(third, ("b", "a"))
    assert third.instance == "b"
    assert not here.change(second, ("b",))
    assert not here.change(second, ("a",))
    assert here.leave(third) == []
    assert here.leave(first) == [second]


def test_a_slot_that_is_in_use_anyway_is_counted() -> None:
    here = opened({"a": 1}, x=LaneRules())
    one, other = Waiter("x", ("a",), 0.0), Waiter("x", ("a",), 0.0)
    here.hold(one, "a")
    here.hold(other, "a")
    assert here.slots("a").in_use == 2
    waiting = queued(here, "x")
    assert here.leave(one) == []
    assert here.leave(other) == [waiting]


# --- reserved slots -------------------------------------------------------------------------------


def test_a_reserved_slot_is_for_its_lane_alone() -> None:
    here = opened({"a": 2}, safe=LaneRules(reserved=1, instances=("a",)), x=LaneRules())
    first = held(here, "x")
    waiting = queued(here, "x")
    assert here.slots("a") == (2, 1, 1)
    mine = held(here, "safe")
    assert here.slots("a") == (2, 2, 0)
    assert here.leave(mine) == []  # it stays reserved
    held(here, "safe")
    assert here.leave(first) == [waiting]


def test_a_lane_uses_what_it_has_reserved_before_what_all_share() -> None:
    here = opened({"a": 2}, safe=LaneRules(reserved=1, instances=("a",)), x=LaneRules())
    mine = held(here, "safe")
    other = held(here, "x")
    more = queued(here, "safe")
    assert here.leave(mine) == [more]
    assert here.leave(other) == []


def test_a_request_for_instances_that_are_all_reserved_is_refused_at_once() -> None:
    here = opened({"a": 1, "b": 1}, safe=LaneRules(reserved=1, instances=("a",)))
    assert entering(here, "x")[0] == "never"
    assert here.lane("x") == (0, 0, None)
    held(here, "safe")
    queued(here, "safe")
    assert entering(here, "x", "a", "b")[0] == "granted"


# --- the limits of a lane -------------------------------------------------------------------------


def test_a_lane_has_no_more_requests_in_flight_than_its_concurrency_on_all_instances() -> None:
    here = opened({"a": 1, "b": None}, x=LaneRules(concurrency=2))
    first, second = held(here, "x", "b"), held(here, "x", "b")
    on_a, on_b = queued(here, "x", "a"), queued(here, "x", "b")
    assert here.leave(first) == [on_b]  # the instance where a slot became free comes first
    assert here.leave(second) == [on_a]


def test_a_full_queue_refuses_at_once_and_a_run_is_not_bounded_by_it() -> None:
    here = opened({"a": 1}, x=LaneRules(queue_length=1))
    held(here, "x")
    queued(here, "x")
    assert entering(here, "x")[0] == "full"
    assert queued(here, "x", is_run=True).is_waiting
    assert here.lane("x").queued == 2


def test_waiting_runs_take_no_place_in_the_queue_of_others() -> None:
    here = opened({"a": 1}, x=LaneRules(queue_length=1))
    first = held(here, "x")
    run = queued(here, "x", is_run=True)
    second = queued(here, "x")
    assert entering(here, "x")[0] == "full"
    assert here.leave(run) == []
    assert entering(here, "x")[0] == "full"
    assert here.leave(first) == [second]
    queued(here, "x")


def test_a_run_lets_requests_of_its_lane_go_first_but_not_for_ever() -> None:
    here = opened({"a": 1}, x=LaneRules(queue_length=1000))
    first = held(here, "x")
    names = {queued(here, "x", is_run=True): "run"}
    names |= {queued(here, "x", project=f"p{i}"): str(i) for i in range(5)}
    assert turns(here, first, names) == ["0", "1", "2", "3", "4", "run"]
    last = held(here, "x")
    names = {queued(here, "x", is_run=True): "run"}
    names |= {queued(here, "x", project="busy"): "sync" for _ in range(300)}
    order = turns(here, last, names)
    assert order.index("run") == pytest.approx(lanes.RUN_PENALTY, abs=1)


# --- fairness -------------------------------------------------------------------------------------


def test_lanes_share_slots_by_weight() -> None:
    here = opened({"a": 1}, big=LaneRules(weight=3), small=LaneRules(weight=1))
    first = held(here, "other")
    names = {queued(here, lane): lane for _ in range(60) for lane in ("big", "small")}
    order = turns(here, first, names)
    assert order[:40].count("big") == pytest.approx(30, abs=1)


def test_a_lane_that_was_idle_has_no_credit() -> None:
    here = opened({"a": 1}, busy=LaneRules(), idle=LaneRules())
    current = held(here, "busy")
    for _ in range(50):
        here.leave(current)
        current = held(here, "busy")
    names = {queued(here, lane): lane for _ in range(10) for lane in ("busy", "idle")}
    assert turns(here, current, names)[:10].count("idle") == pytest.approx(5, abs=1)


def test_what_a_lane_does_on_another_instance_leaves_the_shares_as_they_are() -> None:
    here = opened({"a": None, "b": 1}, big=LaneRules(weight=3), small=LaneRules(), busy=LaneRules())
    first = held(here, "big", "b")
    names = {queued(here, lane, "b"): lane for _ in range(60) for lane in ("big", "small")}
    order, current = [], first
    for _ in range(40):
        for _ in range(5):
            here.leave(held(here, "busy", "a"))
        (current,) = here.leave(current)
        order.append(names[current])
    assert order.count("big") == pytest.approx(30, abs=1)


def test_reserved_slots_leave_the_shares_of_the_others_as_they_are() -> None:
    safe = LaneRules(reserved=1, instances=("a",))
    here = opened({"a": 2}, big=LaneRules(weight=3), small=LaneRules(), safe=safe)
    first = held(here, "big")
    names = {queued(here, lane): lane for _ in range(60) for lane in ("big", "small")}
    order, current = [], first
    for _ in range(40):
        for _ in range(5):
            assert here.leave(held(here, "safe")) == []
        (current,) = here.leave(current)
        order.append(names[current])
    assert order.count("big") == pytest.approx(30, abs=1)


def test_a_lane_pays_nothing_for_the_slots_that_it_has_reserved() -> None:
    here = opened({"a": 3}, safe=LaneRules(reserved=1, instances=("a",)), x=LaneRules())
    for _ in range(100):
        here.leave(held(here, "safe"))
    held(here, "safe")
    current, _ = held(here, "x"), held(here, "x")
    names = {queued(here, lane): lane for _ in range(10) for lane in ("safe", "x")}
    assert turns(here, current, names)[:10].count("safe") == pytest.approx(5, abs=1)


def test_a_request_that_waits_long_goes_before_a_lane_of_more_weight() -> None:
    here = opened({"a": 1}, big=LaneRules(weight=1000, queue_length=1000), small=LaneRules())
    first = held(here, "small")
    names = {queued(here, "small", since=0.0): "small"}
    names |= {queued(here, "big", since=11.0 + i): "big" for i in range(100)}
    assert turns(here, first, names)[:1] == ["small"]
    last = held(here, "small")
    names = {queued(here, "small", since=0.0): "small", queued(here, "small", since=0.0): "second"}
    names |= {queued(here, "big", since=0.1 * i): "big" for i in range(300)}
    # Ten seconds count as one request of weight 1: the lane with more weight goes first for so long.
    assert 85 <= turns(here, last, names).index("second") <= 105


def test_a_request_that_comes_late_is_level_with_those_of_lanes_that_wait_long() -> None:
    here = opened({"a": 1}, low=LaneRules(), high=LaneRules(weight=8))
    current = held(here, "low")
    names = {queued(here, "low", since=float(i)): "low" for i in range(20)}
    for _ in range(5):
        (current,) = here.leave(current)
    names |= {queued(here, "high", since=20.0): "high" for _ in range(2)}
    assert "high" in turns(here, current, names)[:2]


def test_ageing_leaves_the_shares_of_lanes_that_wait_as_they_are() -> None:
    """Queues are full: the lane of less weight waits longer, which must not add to its share."""
    here = opened({"a": 4}, big=LaneRules(weight=4), small=LaneRules())
    now, order, at_work = 0.0, [], [held(here, "big") for _ in range(4)]
    for _ in range(50):
        queued(here, "big", since=now)
        queued(here, "small", since=now)
    for _ in range(2000):
        now += 0.05
        for waiter in here.leave(at_work.pop(0)):
            order.append(waiter.lane)
            at_work.append(waiter)
            queued(here, waiter.lane, since=now)
    assert order[1000:].count("big") == pytest.approx(800, abs=20)


def test_a_lane_that_uses_free_slots_has_no_debt_later() -> None:
    here = opened({"a": 1}, x=LaneRules(), y=LaneRules())
    for i in range(100):
        here.leave(held(here, "x", since=float(i)))
    current = held(here, "y", since=2000.0)
    names = {queued(here, lane, since=2000.0): lane for _ in range(10) for lane in ("x", "y")}
    assert turns(here, current, names)[:10].count("x") == pytest.approx(5, abs=1)


def test_projects_of_a_lane_take_turns() -> None:
    here = opened({"a": 1}, x=LaneRules(queue_length=1000))
    first = held(here, "x")
    names = {queued(here, "x", project="many"): "many" for _ in range(50)}
    names |= {queued(here, "x", project="few"): "few" for _ in range(2)}
    assert turns(here, first, names)[:4] == ["many", "few", "many", "few"]


def test_a_project_that_comes_late_has_no_credit() -> None:
    here = opened({"a": 1}, x=LaneRules(queue_length=1000))
    current = held(here, "x")
    names = {queued(here, "x", project="early"): "early" for _ in range(40)}
    for _ in range(20):
        (current,) = here.leave(current)
    names |= {queued(here, "x", project="late"): "late" for _ in range(10)}
    assert turns(here, current, names)[:10].count("late") == pytest.approx(5, abs=1)


def test_a_lane_remembers_a_bounded_number_of_projects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "_MOST_PROJECTS", 4)
    here = opened({"a": 1}, x=LaneRules(queue_length=1000))
    current = held(here, "x")
    for i in range(20):
        queued(here, "x", project=str(i))
    (current,) = here.leave(current)
    for i in range(20):
        queued(here, "x", project="one")
        queued(here, "x", project=f"again{i}")
        (current,) = here.leave(current)
    lane = here._lanes["x"]
    assert len(lane.projects) <= 4


def test_projects_whose_turn_is_over_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "_MOST_PROJECTS", 4)
    here = opened({"a": 1}, x=LaneRules())
    current = held(here, "x")
    for project in "000123":
        queued(here, "x", project=project)
    for _ in range(5):
        (current,) = here.leave(current)
    queued(here, "x", project="new")
    assert set(here._lanes["x"].projects) == {"0", "new"}


def test_requests_that_leave_the_queue_leave_its_memory_too() -> None:
    here = opened({"a": 1}, x=LaneRules(queue_length=1000))
    held(here, "x")
    queued(here, "x")
    for _ in range(1000):
        here.leave(queued(here, "x"))
    lane = here._lanes["x"]
    assert len(lane.queues["a"]) < 100


# --- settings -------------------------------------------------------------------------------------


def test_more_slots_let_waiting_requests_in_and_fewer_end_none() -> None:
    here = opened({"a": 1}, x=LaneRules())
    held(here, "x")
    second, third = queued(here, "x"), queued(here, "x")
    assert here.configure({"a": 2}, {"x": LaneRules()}) == [second]
    assert here.configure({"a": 1}, {"x": LaneRules()}) == []
    assert here.slots("a") == (1, 2, 0)
    assert here.leave(second) == []
    assert here.configure({"a": None}, {"x": LaneRules()}) == [third]


def test_a_reservation_counts_for_slots_that_are_in_use() -> None:
    here = opened({"a": 2}, safe=LaneRules(), x=LaneRules())
    held(here, "safe")
    other = held(here, "x")
    waiting = queued(here, "x")
    safe = LaneRules(reserved=1, instances=("a",))
    assert here.configure({"a": 2}, {"safe": safe, "x": LaneRules()}) == []
    assert here.slots("a") == (2, 2, 0)
    assert here.leave(other) == [waiting]


def test_a_lane_and_an_instance_that_are_gone_keep_their_requests() -> None:
    here = opened({"a": 1}, x=LaneRules(concurrency=1))
    first, second = held(here, "x"), queued(here, "x")
    assert here.configure({}, {}) == [second]
    assert list(here.lanes()) == ["x"]
    assert here.slots("a") == (None, 2, 0)
    assert here.leave(first) == []
    assert here.leave(second) == []
    assert here.configure({}, {}) == []
    assert list(here.lanes()) == []
    assert here.lane("x") == (0, 0, None)


# --- what always holds ----------------------------------------------------------------------------

IDS = ("a", "b", "c")
LANES = ("x", "y", "safe")
SLOTS = st.dictionaries(st.sampled_from(IDS), st.none() | st.integers(2, 4))
RULES = st.fixed_dictionaries(
    {
        name: st.builds(
            LaneRules,
            weight=st.integers(1, 5),
            concurrency=st.none() | st.integers(1, 4),
            reserved=st.integers(0, 2) if name == "safe" else st.just(0),
            instances=st.just(("a", "b") if name == "safe" else ()),
            queue_length=st.integers(0, 6),
        )
        for name in LANES
    }
)
INSTANCES = st.lists(st.sampled_from(IDS), min_size=1, unique=True).map(tuple)


class SlotsAndLanes(RuleBasedStateMachine):
    """Any order of arrivals, ends, cancels and changes of settings and instances."""

    def __init__(self) -> None:
        super().__init__()
        self.here = Lanes()
        self.lane_rules: dict[str, LaneRules] = {}
        self.slots: dict[str, int | None] = {}
        self.in_flight: list[Waiter] = []
        self.waiting: list[Waiter] = []
        self.at_configuration: dict[str, int] = {}

    @initialize(slots=SLOTS, rules=RULES)
    def begin(self, slots: dict[str, int | None], rules: dict[str, LaneRules]) -> None:
        self.take_settings(slots, rules)

    @rule(slots=SLOTS, rules=RULES)
    def take_settings(self, slots: dict[str, int | None], rules: dict[str, LaneRules]) -> None:
        self.lane_rules, self.slots = rules, slots
        granted = self.here.configure(slots, rules)
        self.let_in(granted)
        self.at_configuration = {id_: self.used(id_) for id_ in IDS}

    @rule(
        lane=st.sampled_from((*LANES, lanes.NO_ROLE)),
        instances=INSTANCES,
        project=st.sampled_from("pq"),
        is_run=st.booleans(),
    )
    def arrive(self, lane: str, instances: tuple[str, ...], project: str, is_run: bool) -> None:
        waiter = Waiter(lane, instances, float(next(_NOW)))
        entry = self.here.enter(waiter, project, is_run=is_run)
        if entry == "granted":
            assert waiter.instance in instances
            self.in_flight.append(waiter)
        elif entry == "waits":
            self.waiting.append(waiter)
        elif entry == "full":
            length = self.lane_rules[lane].queue_length if lane in self.lane_rules else 100
            assert sum(one.lane == lane for one in self.waiting) >= length
            assert not is_run
        else:
            assert not any(self.could(lane, id_) for id_ in instances)

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.in_flight:
            waiter = self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1)))
            self.let_in(self.here.leave(waiter))
            assert waiter.instance is None

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.waiting:
            waiter = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
            assert self.here.leave(waiter) == []

    @rule(data=st.data(), instances=INSTANCES)
    def change(self, data: st.DataObject, instances: tuple[str, ...]) -> None:
        if self.waiting:
            waiter = data.draw(st.sampled_from(self.waiting))
            if self.here.change(waiter, instances):
                self.let_in([waiter])

    def let_in(self, granted: Iterable[Waiter]) -> None:
        for waiter in granted:
            self.waiting.remove(waiter)
            assert waiter.instance in waiter.instances
            self.in_flight.append(waiter)

    def used(self, id_: str, lane: str | None = None) -> int:
        return sum(one.instance == id_ and lane in (None, one.lane) for one in self.in_flight)

    def reserved(self, id_: str, lane: str) -> int:
        rules = self.lane_rules.get(lane)
        return rules.reserved if rules is not None and id_ in rules.instances else 0

    def could(self, lane: str, id_: str) -> bool:
        slots = self.slots.get(id_)
        others = sum(self.reserved(id_, name) for name in LANES)
        return slots is None or slots > others or self.reserved(id_, lane) > 0

    def has_room(self, lane: str, id_: str) -> bool:
        rules = self.lane_rules.get(lane)
        limit = None if rules is None else rules.concurrency
        if limit is not None and sum(one.lane == lane for one in self.in_flight) >= limit:
            return False
        slots = self.slots.get(id_)
        if slots is None:
            return True
        if self.used(id_) >= slots:
            return False
        if self.used(id_, lane) < self.reserved(id_, lane):
            return True
        kept = sum(max(0, self.reserved(id_, name) - self.used(id_, name)) for name in LANES)
        return slots - self.used(id_) > kept

    @invariant()
    def the_counts_are_right(self) -> None:
        for id_ in IDS:
            assert self.here.slots(id_).in_use == self.used(id_)
            kept = sum(max(0, self.reserved(id_, name) - self.used(id_, name)) for name in LANES)
            assert self.here.slots(id_).reserved_free == kept or self.slots.get(id_) is None
        for lane in LANES:
            load = self.here.lane(lane)
            assert load.in_flight == sum(one.lane == lane for one in self.in_flight)
            assert load.queued == sum(one.lane == lane for one in self.waiting)
        assert set(self.here.waiting()) == set(self.waiting)

    @invariant()
    def no_instance_is_over_its_slots(self) -> None:
        for id_, slots in self.slots.items():
            if slots is not None:
                assert self.used(id_) <= max(slots, self.at_configuration[id_])
                self.at_configuration[id_] = self.used(id_)

    @invariant()
    def no_request_waits_that_could_have_a_slot(self) -> None:
        for waiter in self.waiting:
            assert not any(self.has_room(waiter.lane, id_) for id_ in waiter.instances)

    def teardown(self) -> None:
        for waiter in self.waiting:
            assert self.here.leave(waiter) == []
        self.waiting.clear()
        for waiter in self.in_flight:
            self.here.leave(waiter)
        for id_ in IDS:
            assert self.here.slots(id_).in_use == 0


TestSlotsAndLanes = SlotsAndLanes.TestCase
TestSlotsAndLanes.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
