"""A lease comes after whatever has to happen first, and none is left behind where that fails."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from manager.errors import (
    BackingOffError,
    ConfigurationError,
    LimitReachedError,
    LockedError,
    ManagerError,
    Reason,
    StartFailedError,
    UnavailableError,
    UnknownInstanceError,
)
from manager.services.instances.instance import Effort
from manager.services.routing import placement as module
from manager.services.routing.placement import ModelMissingError, Placement, Prepared, reason_of
from tests.support.attempts import attempt
from tests.support.instances import Ground

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from manager.domain.routing import Because
    from manager.services.instances.leases import Lease


class Puller:
    """Pulls, or does not, as the test says."""

    def __init__(self, error: Exception | None = None) -> None:
        self.pulled: list[tuple[str, str]] = []
        self._error = error
        self.given_up: Exception | None = None

    def refuse_given_up(self, _instance: str, _model: str) -> None:
        if self.given_up is not None:
            raise self.given_up

    async def pull(self, instance: str, model: str, tell: Callable[[str], None]) -> None:
        tell("pulling 5 %")
        if self._error is not None:
            raise self._error
        self.pulled.append((instance, model))


@pytest.fixture
def ground(monkeypatch: pytest.MonkeyPatch) -> Ground:
    made = Ground("a", "b")

    async def passes(seconds: float) -> None:
        made.fleet.clock.advance(seconds)

    monkeypatch.setattr(module, "asyncio", SimpleNamespace(sleep=passes, Lock=asyncio.Lock))
    return made


# --- without waiting ---


def test_an_instance_that_runs_gives_a_lease_at_once(ground: Ground) -> None:
    for because in ("loaded", "running"):
        lease = ground.placement.try_lease(attempt("a", because))
        assert lease is not None
        assert lease.instance == "a"
    assert ground["a"].in_flight == 2


def test_what_has_to_be_waited_for_gives_none(ground: Ground) -> None:
    ground["a"].endpoint = None
    assert ground.placement.try_lease(attempt("a", "startable")) is None
    for because in ("unread", "pull"):
        assert ground.placement.try_lease(attempt("b", because)) is None
    assert ground.fleet.in_flight == {"a": 0, "b": 0}


def test_room_is_asked_for_only_where_a_model_is_to_be_loaded(ground: Ground) -> None:
    ground["a"].has_room = False
    assert ground.placement.try_lease(attempt("a", "running")) is None
    assert ground.placement.try_lease(attempt("a", "loaded")) is not None


def test_an_instance_that_is_gone_from_the_fleet_is_an_error(ground: Ground) -> None:
    with pytest.raises(UnknownInstanceError):
        ground.placement.try_lease(attempt("z"))


# --- starts ---


async def test_a_start_is_timed_and_what_runs_already_was_not_started(ground: Ground) -> None:
    ground["a"].endpoint = None
    prepared = await ground.placement.prepare(attempt("a", "startable"))
    assert prepared.lease.instance == "a"
    assert prepared.start_ms == pytest.approx(3000.0)
    prepared = await ground.placement.prepare(attempt("b", "running"))
    assert prepared.start_ms is None
    assert ground.fleet.in_flight == {"a": 1, "b": 1}


async def test_room_is_made_for_a_model_that_is_not_loaded(ground: Ground) -> None:
    await ground.placement.prepare(attempt("a", "running"))
    await ground.placement.prepare(attempt("a", "loaded"))
    assert ground["a"].made_room == ["tiny"]


@pytest.mark.parametrize("error", [UnavailableError("full", reason=Reason.VRAM_INSUFFICIENT), KeyError()])
async def test_no_lease_is_left_where_there_is_no_room(ground: Ground, error: Exception) -> None:
    ground["a"].no_room = error
    with pytest.raises(type(error)):
        await ground.placement.prepare(attempt("a", "running"))
    assert ground["a"].in_flight == 0


async def test_no_lease_is_left_where_the_request_is_cancelled_meanwhile(ground: Ground) -> None:
    pulling = asyncio.Event()

    class Slow:
        def refuse_given_up(self, *_: object) -> None: ...

        async def pull(self, *_: object) -> None:
            pulling.set()
            await asyncio.Event().wait()

    task = asyncio.ensure_future(ground.placement.prepare(attempt("a", "pull"), puller=Slow()))
    await pulling.wait()
    assert ground["a"].in_flight == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ground["a"].in_flight == 0


async def test_a_place_is_made_where_too_many_run_and_not_of_what_the_request_has_failed_on(
    ground: Ground,
) -> None:
    ground["a"].endpoint = None
    ground["a"].starts = [LimitReachedError("max_running is 1")]
    prepared = await ground.placement.prepare(attempt("a", "startable"), failed_on={"b"})
    assert prepared.lease.instance == "a"
    assert ground.fleet.places == [("a", frozenset({"b"}))]


async def test_a_failed_start_is_reported_and_not_repeated(ground: Ground) -> None:
    ground["a"].endpoint = None
    ground["a"].starts = [StartFailedError("exit 1", reason=Reason.START_FAILED)] * 2
    with pytest.raises(StartFailedError):
        await ground.placement.prepare(attempt("a", "startable"), patient=True)
    assert len(ground["a"].starts) == 1


def backing_off(retry_after_s: float | None) -> BackingOffError:
    return BackingOffError("too soon", reason=Reason.START_FAILED, retry_after_s=retry_after_s)


async def test_the_last_attempt_waits_for_the_end_of_a_short_back_off(ground: Ground) -> None:
    ground["a"].endpoint = None
    ground["a"].starts = [backing_off(2.0), backing_off(None)]
    before = ground.fleet.clock()
    prepared = await ground.placement.prepare(attempt("a", "startable"), patient=True)
    assert prepared.start_ms == pytest.approx((2.0 + 0.01 + 0.01 + 3.0) * 1000)
    assert ground.fleet.clock() - before == pytest.approx(5.02)


async def test_a_back_off_of_exactly_the_longest_wait_is_waited_for(ground: Ground) -> None:
    ground["a"].endpoint = None
    ground["a"].starts = [backing_off(2.5)]
    assert (await ground.placement.prepare(attempt("a", "startable"), patient=True)).lease.instance == "a"


@pytest.mark.parametrize(("patient", "waits_s"), [(False, 1.0), (True, 2.6)])
async def test_nobody_waits_for_a_long_back_off_or_where_another_attempt_follows(
    ground: Ground, waits_s: float, *, patient: bool
) -> None:
    ground["a"].endpoint = None
    ground["a"].starts = [backing_off(waits_s)]
    with pytest.raises(BackingOffError):
        await ground.placement.prepare(attempt("a", "startable"), patient=patient)


async def test_back_offs_that_follow_each_other_are_waited_for_no_longer_than_one(ground: Ground) -> None:
    ground["a"].endpoint = None
    ground["a"].starts = [backing_off(2.0), backing_off(2.0)]
    with pytest.raises(BackingOffError):
        await ground.placement.prepare(attempt("a", "startable"), patient=True)
    assert ground["a"].starts == []


# --- models that may not be there ---


async def test_models_that_nobody_has_read_are_read_before_the_server_is_asked(ground: Ground) -> None:
    one = ground.fleet.add("new")
    prepared = await ground.placement.prepare(attempt("new", "unread"))
    assert (prepared.lease.instance, one.probes, one.made_room) == ("new", 1, ["tiny"])
    await ground.placement.prepare(attempt("new", "unread"))
    assert one.probes == 1, "they have been read by now"


async def test_a_model_that_is_not_there_is_named_with_those_that_are(ground: Ground) -> None:
    ground.fleet.add("new").on_volume = ("qwen3:8b", "llama3:latest")
    with pytest.raises(ModelMissingError, match=r"tiny.*llama3:latest, qwen3:8b") as caught:
        await ground.placement.prepare(attempt("new", "unread"))
    assert (caught.value.reason, caught.value.instance) == (Reason.MODEL_MISSING, "new")
    assert ground["new"].in_flight == 0
    ground.fleet.add("empty").on_volume = ()
    with pytest.raises(ModelMissingError, match="none"):
        await ground.placement.prepare(attempt("empty", "unread"))


async def test_a_server_that_does_not_list_its_models_is_not_asked(ground: Ground) -> None:
    ground.fleet.add("new").on_volume = None
    with pytest.raises(UnavailableError) as caught:
        await ground.placement.prepare(attempt("new", "unread"))
    assert caught.value.reason is Reason.INSTANCE_UNHEALTHY
    assert ground["new"].in_flight == 0


@pytest.mark.parametrize(
    ("patient", "permitted", "pulls"), [(True, True, True), (False, True, False), (True, False, False)]
)
async def test_a_model_that_turns_out_to_be_missing_is_pulled_by_the_last_attempt_where_that_is_permitted(
    ground: Ground, *, patient: bool, permitted: bool, pulls: bool
) -> None:
    ground.fleet.add("new").on_volume = ()
    ground.settings.change(auto_pull=permitted)
    puller, heard = Puller(), list[str]()
    preparing = ground.placement.prepare(
        attempt("new", "unread"), puller=puller, patient=patient, tell=heard.append
    )
    if pulls:
        assert (await preparing).lease.instance == "new"
        assert (puller.pulled, heard) == ([("new", "tiny")], ["pulling 5 %"])
    else:
        with pytest.raises(ModelMissingError):
            await preparing
        assert puller.pulled == []
    assert ground["new"].in_flight == pulls


async def test_a_pull_is_made_in_front_of_the_attempt_that_is_one(ground: Ground) -> None:
    puller = Puller()
    await ground.placement.prepare(attempt("a", "pull"), puller=puller)
    assert puller.pulled == [("a", "tiny")]
    assert ground["a"].made_room == ["tiny"]


async def test_no_lease_is_left_where_a_pull_failed(ground: Ground) -> None:
    error = UnavailableError("no such model", reason=Reason.MODEL_MISSING)
    with pytest.raises(UnavailableError):
        await ground.placement.prepare(attempt("a", "pull"), puller=Puller(error))
    assert ground["a"].in_flight == 0


async def test_a_request_without_a_puller_pulls_nothing(ground: Ground) -> None:
    prepared = await ground.placement.prepare(attempt("a", "pull"))
    assert prepared.lease.instance == "a"


# --- volumes that were never listed ---


class Reader:
    """Reads a volume without a start, where the test has put something on it."""

    def __init__(self, ground: Ground, *names: str) -> None:
        self._ground = ground
        self._names = names
        self.looks: list[str | None] = []

    async def look(self, *, within_s: float, volume: str | None = None) -> None:
        assert within_s == 5.0
        self.looks.append(volume)
        if self._names and volume is not None:
            entries = tuple({"name": name} for name in self._names)
            self._ground.lists.read(volume, entries, self._ground.fleet.clock.advance(0.001))


def reading(ground: Ground, *names: str) -> tuple[Placement, Reader]:
    reader = Reader(ground, *names)
    placement = Placement(
        cast("Any", ground.fleet),
        cast("Any", ground.fleet),
        ground.router,
        ground.lists,
        ground.settings,
        now=ground.fleet.clock,
        reader=cast("Any", reader),
    )
    return placement, reader


def stopped(ground: Ground, *names: str) -> None:
    for name in names:
        one = ground.fleet.add(name)
        one.endpoint, one.on_volume = None, ()


def slowly(starts: Callable[[], Awaitable[Lease]]) -> Callable[[], Awaitable[Lease]]:
    """A start during which others have their turn."""

    async def lease() -> Lease:
        await asyncio.sleep(0)
        return await starts()

    return lease


async def test_a_model_that_is_not_on_a_volume_starts_nothing_where_that_can_be_read(ground: Ground) -> None:
    stopped(ground, "new")
    placement, reader = reading(ground, "other")
    with pytest.raises(ModelMissingError, match="other"):
        await placement.prepare(attempt("new", "unread"))
    assert ground["new"].endpoint is None
    assert reader.looks == ["instance:new"]


async def test_a_model_that_was_found_on_the_volume_is_answered_by_a_start(ground: Ground) -> None:
    stopped(ground, "new")
    ground["new"].on_volume = ("tiny",)
    placement, reader = reading(ground, "tiny")
    prepared = await placement.prepare(attempt("new", "unread"))
    assert (prepared.lease.instance, prepared.start_ms is not None) == ("new", True)
    assert reader.looks == ["instance:new"]


async def test_a_volume_that_cannot_be_read_is_listed_by_a_server(ground: Ground) -> None:
    stopped(ground, "new")
    ground["new"].on_volume = ("tiny",)
    placement, _ = reading(ground)
    assert (await placement.prepare(attempt("new", "unread"))).lease.instance == "new"


async def test_of_many_on_an_unread_volume_one_is_started_at_a_time_and_the_others_find_the_list(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "volume_of", lambda _spec: "shared")
    monkeypatch.setattr("manager.services.routing.router.volume_of", lambda _spec: "shared")
    monkeypatch.setattr("manager.services.models.model_lists.volume_of", lambda _spec: "shared")
    stopped(ground, "new", "newer", "newest")
    for name in ("new", "newer", "newest"):
        monkeypatch.setattr(ground[name], "lease", slowly(ground[name].lease))
    found = await asyncio.gather(
        *(ground.placement.prepare(attempt(name, "unread")) for name in ("new", "newer", "newest")),
        return_exceptions=True,
    )
    assert [type(one) for one in found] == [ModelMissingError] * 3
    assert [ground[name].endpoint is not None for name in ("new", "newer", "newest")] == [True, False, False]


async def test_a_start_that_fails_leaves_the_volume_to_the_next(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "volume_of", lambda _spec: "shared")
    stopped(ground, "new", "newer")
    ground["new"].starts = [StartFailedError("exit 1", reason=Reason.START_FAILED)]
    ground["newer"].on_volume = ("tiny",)
    first, second = await asyncio.gather(
        ground.placement.prepare(attempt("new", "unread")),
        ground.placement.prepare(attempt("newer", "unread")),
        return_exceptions=True,
    )
    assert isinstance(first, StartFailedError)
    assert isinstance(second, Prepared)


async def test_a_long_pull_keeps_nobody_from_the_volume(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "volume_of", lambda _spec: "shared")
    stopped(ground, "new", "newer")
    ground["newer"].on_volume = ("tiny",)
    ground.settings.change(auto_pull=True)
    pulling, goes_on = asyncio.Event(), asyncio.Event()

    class Slow(Puller):
        async def pull(self, *_: object) -> None:
            pulling.set()
            await goes_on.wait()

    first = asyncio.ensure_future(
        ground.placement.prepare(attempt("new", "unread"), puller=Slow(), patient=True)
    )
    await pulling.wait()
    assert (await ground.placement.prepare(attempt("newer", "unread"))).lease.instance == "newer"
    goes_on.set()
    assert (await first).lease.instance == "new"


@pytest.mark.parametrize("because", ["pull", "unread"])
async def test_a_pull_that_failed_a_moment_ago_starts_nobody(ground: Ground, because: Because) -> None:
    stopped(ground, "new")
    ground.settings.change(auto_pull=True)
    placement, _ = reading(ground, "other")
    puller = Puller()
    puller.given_up = UnavailableError("no such model", reason=Reason.MODEL_MISSING)
    with pytest.raises(UnavailableError, match="no such model"):
        await placement.prepare(attempt("new", because), puller=puller, patient=True)
    assert ground["new"].endpoint is None
    assert ground.fleet.places == []


async def test_a_model_that_is_missing_on_a_read_volume_is_pulled_by_the_last_attempt(ground: Ground) -> None:
    stopped(ground, "new")
    ground.settings.change(auto_pull=True)
    placement, _ = reading(ground, "other")
    puller = Puller()
    assert (await placement.prepare(attempt("new", "unread"), puller=puller, patient=True)).start_ms
    assert puller.pulled == [("new", "tiny")]
    await placement.prepare(attempt("new", "unread"), patient=True)
    assert ground["new"].in_flight == 2


# --- how an instance is ---


async def test_whether_an_instance_is_gone_or_silent_is_its_own_to_say(ground: Ground) -> None:
    ground["a"].gone = ground["b"].is_silent = True
    assert [await ground.placement.has_gone(name) for name in ("a", "b")] == [True, False]
    assert [ground.placement.is_silent(name) for name in ("a", "b")] == [False, True]
    ground.placement.reread_models("b")
    assert (ground["a"].rereads, ground["b"].rereads) == (0, 1)


@pytest.mark.parametrize(
    ("before", "after", "loads"),
    [
        (Effort(0.0, 5), Effort(0.1, 5), True),
        (Effort(0.0, 5), Effort(0.09, 5), False),
        (Effort(10.0, 5), Effort(10.0, 6), True),
        (Effort(10.0, 5), Effort(10.0, 4), False),
        (None, Effort(10.0, 5), False),
        (Effort(10.0, 5), None, False),
    ],
)
async def test_an_instance_that_computes_or_fills_its_memory_loads(
    ground: Ground, before: Effort | None, after: Effort | None, *, loads: bool
) -> None:
    ground["a"].efforts = [before, after]
    began = ground.fleet.clock()
    assert await ground.placement.still_loads("a") is loads
    assert ground.fleet.clock() == began + 1.0


# --- reasons ---


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UnavailableError("", reason=Reason.IMAGE_MISSING), Reason.IMAGE_MISSING),
        (BackingOffError("", reason=Reason.CONTAINER_EXITED), Reason.CONTAINER_EXITED),
        (LimitReachedError(""), Reason.OVERLOADED),
        (LockedError(""), Reason.INSTANCE_UNAVAILABLE),
        (ConfigurationError(""), Reason.INSTANCE_UNAVAILABLE),
        (ManagerError(""), Reason.INSTANCE_UNAVAILABLE),
    ],
)
def test_every_error_has_an_entry_in_the_list_of_reasons(error: ManagerError, reason: Reason) -> None:
    assert reason_of(error) is reason


@pytest.mark.parametrize("code", [*Reason])
def test_an_error_whose_code_is_a_reason_is_that_reason(code: Reason) -> None:
    error = ManagerError("")
    error.code = code.value
    assert reason_of(error) is code


# --- pulls for instances that do not run ---


class Refusing:
    """A puller that cannot have the model; notes whether the instance ran meanwhile."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self.ran: list[bool] = []

    async def pull(self, instance: str, _model: str, _tell: object) -> None:
        self.ran.append(self._ground[instance].endpoint is not None)
        raise UnavailableError("no such model", reason=Reason.MODEL_MISSING)

    def refuse_given_up(self, instance: str, model: str) -> None: ...


async def test_no_instance_is_started_and_none_stopped_for_a_model_that_cannot_be_pulled(
    ground: Ground,
) -> None:
    ground["a"].endpoint = None
    ground["a"].starts = [LimitReachedError("max_running is 1")]
    puller = Refusing(ground)
    with pytest.raises(UnavailableError, match="no such model"):
        await ground.placement.prepare(attempt("a", "pull"), puller=puller)
    assert ground.fleet.places == []
    assert ground["a"].endpoint is None
    assert puller.ran == [False]


async def test_a_pull_for_a_stopped_instance_comes_before_its_start_and_once(ground: Ground) -> None:
    ground["a"].endpoint = None
    pulled: list[str | None] = []

    class Pulling:
        async def pull(self, instance: str, *_: object) -> None:
            pulled.append(ground[instance].endpoint)

        def refuse_given_up(self, instance: str, model: str) -> None: ...

    prepared = await ground.placement.prepare(attempt("a", "pull"), puller=Pulling())
    assert pulled == [None]
    assert prepared.start_ms == pytest.approx(3000.0)
