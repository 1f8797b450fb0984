"""Whether the engine is up, what it lists, and containers that belong to no instance."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from manager.domain.container import Reach
from manager.domain.instance import ContainerFacts, Driver, Phase
from manager.errors import EngineError, EngineUnreachableError, NoDescriptorForEngineError, Reason
from manager.services.instances.engine_link import EngineLink, Swarm
from manager.services.ports import EngineEvent, EngineInfo
from tests.support.fleet_rig import Rig, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LINUX = EngineInfo("28.5", desktop=False, rootless=False, runtimes=())


async def test_an_engine_that_comes_and_goes_is_told_once_each_time() -> None:
    rig = Rig("a")
    rig.engine.down = "connection refused"
    assert "has not answered yet" in rig.link.trouble
    async with rig.running(settled=False):
        await rig.link.asked.wait()
        assert rig.link.trouble == "connection refused"
        assert rig.view("a").phase is Phase.UNAVAILABLE
        with pytest.raises(EngineUnreachableError, match="connection refused"):
            rig.link.refuse_if_down()
        rig.engine.down = None
        await rig.link.came_up.wait()
        rig.link.refuse_if_down()
        await until(lambda: rig.view("a").phase is Phase.STOPPED)
        rig.engine.down = "it hangs"
        await until(lambda: not rig.link.up)
        assert not rig.link.came_up.is_set()
        assert rig.view("a").phase is Phase.UNAVAILABLE
        pings = rig.engine.calls.count("ping")
        await until(lambda: rig.engine.calls.count("ping") > pings + 2)
        rig.engine.down = None
        await rig.link.came_up.wait()
        assert rig.journal.details_of("engine_down") == ["connection refused", "it hangs"]
        assert rig.journal.kinds.count("engine_up") == 2


async def test_an_engine_is_up_only_once_it_has_said_what_it_runs() -> None:
    rig = Rig("a")
    rig.engine.failing["list"] = EngineError("no list", reason=Reason.START_FAILED)
    async with rig.running(settled=False):
        await rig.link.asked.wait()
        assert (rig.link.up, rig.link.trouble) == (False, "no list")
        del rig.engine.failing["list"]
        await rig.link.came_up.wait()


async def test_what_an_event_tells_is_looked_at_and_what_none_tells_is_found_by_a_listing() -> None:
    rig = Rig("a")
    async with rig.running():
        await rig.capacity.start("a")
        rig.engine.end(rig.container("a").id, 3)
        await until(lambda: rig.view("a").phase is Phase.FAILED)
        await rig.capacity.start("a")
        rig.engine.deaf = True
        rig.engine.end(rig.container("a").id, 3)
        rig.link._resync.set()
        await until(lambda: rig.view("a").phase is Phase.FAILED)


async def test_events_that_are_refused_are_told_once_and_listings_go_on() -> None:
    rig = Rig("a")
    rig.engine.failing["events"] = EngineError("forbidden", reason=Reason.START_FAILED)
    async with rig.running():
        await until(lambda: "events_refused" in rig.journal.kinds)
        rig.engine.failing["list"] = EngineError("no", reason=Reason.START_FAILED)
        rig.link._resync.set()
        lists = rig.engine.calls.count("list")
        await until(lambda: rig.engine.calls.count("list") > lists + 2)
        del rig.engine.failing["list"]
        rig.engine.put("m-ollama-a", "a")
        await until(lambda: rig.view("a").phase is Phase.READY)
        assert rig.journal.details_of("events_refused") == ["forbidden"]


async def test_a_broken_stream_of_events_is_opened_again() -> None:
    rig = Rig("a")
    rig.engine.failing["events"] = EngineUnreachableError("it broke off")
    async with rig.running():
        await until(lambda: rig.engine.calls.count("events") > 2)
        del rig.engine.failing["events"]
        await rig.capacity.start("a")
        rig.engine.end(rig.container("a").id, 3)
        await until(lambda: rig.view("a").phase is Phase.FAILED)
        assert "events_refused" not in rig.journal.kinds


async def test_a_defect_in_the_stream_of_events_ends_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig("a")

    def broken(_event: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(rig.link, "_hint", broken)
    task = asyncio.ensure_future(rig.link.run())
    await rig.link.came_up.wait()
    rig.engine.tell("start", rig.engine.put("m-ollama-a", "a"))
    with pytest.raises(ExceptionGroup) as caught:
        await task
    assert caught.group_contains(ZeroDivisionError)


# --- how containers are reached ---


@pytest.mark.parametrize(
    ("url", "info", "own_name", "wanted", "reach"),
    [
        ("unix:///x", LINUX, "", "auto", Reach.ADDRESS),
        ("unix:///x", replace(LINUX, desktop=True), "", "auto", Reach.LOOPBACK),
        ("unix:///x", replace(LINUX, rootless=True), "", "auto", Reach.LOOPBACK),
        ("unix:///x", LINUX, "", "loopback", Reach.LOOPBACK),
        ("tcp://127.0.0.1:2375", LINUX, "", "auto", Reach.LOOPBACK),
        ("tcp://far:2375", LINUX, "", "auto", None),
        ("tcp://far:2375", LINUX, "", "network", Reach.ADDRESS),
        ("tcp://far:2375", LINUX, "itself", "auto", Reach.NAME),
        ("unix:///x", LINUX, "host", "auto", Reach.ADDRESS),
    ],
)
async def test_containers_are_reached_by_what_engine_and_daemon_are(
    url: str, info: EngineInfo, own_name: str, wanted: str, reach: Reach | None
) -> None:
    own_names: tuple[str, ...] = ("nobody",)
    rig = Rig(own_names=own_names)
    facts = rig.engine.put("host", "daemon")
    rig.link._own_names = ("nobody", facts.id if own_name == "itself" else own_name)
    rig.add("a", reach=wanted)
    rig.engine.url, rig.engine.info_is = url, info
    async with rig.running(settled=False):
        await rig.link.came_up.wait()
        assert rig["a"].reach is reach


# --- Docker Swarm ---


def to_swarm(rig: Rig, *, reach: str = "auto", finds: bool = False) -> EngineLink:
    """A second link over the same engine, for the services of its swarm."""

    async def itself(name: str) -> ContainerFacts | None:
        asked.append(name)
        own = ContainerFacts("itself0123", "daemon", "image", "running", networks=("swarm-net", "bridge"))
        return own if name == "itself" else None

    asked: list[str] = []
    return EngineLink(
        rig.world,
        rig.fleet,
        rig.capacity,
        own_names=("nobody", "itself"),
        probe_interval_s=0.02,
        resync_interval_s=60.0,
        swarm=Swarm(reach, "swarm-net", finds=finds, itself=itself),
    )


@asynccontextmanager
async def up(link: EngineLink) -> AsyncIterator[EngineLink]:
    task = asyncio.ensure_future(link.run())
    try:
        await link.came_up.wait()
        yield link
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_a_link_is_needed_where_it_has_instances_or_may_find_some() -> None:
    rig = Rig("a")
    assert (rig.link.is_needed, rig.link.name) == (True, "engine")
    assert (to_swarm(rig).is_needed, to_swarm(rig).name) == (False, "swarm")
    assert to_swarm(rig, finds=True).is_needed
    rig.add("s", driver=Driver.SWARM)
    assert to_swarm(rig).is_needed
    assert not Rig().link.is_needed


async def test_each_link_tells_the_instances_of_its_driver_alone() -> None:
    rig = Rig("a")
    rig.add("s", driver=Driver.SWARM)
    async with up(to_swarm(rig)):
        assert (rig["s"].reach, rig["a"].reach) == (Reach.NAME, Reach.ADDRESS)
        await until(lambda: rig.view("s").phase is Phase.STOPPED)
        assert rig.view("a").phase is Phase.UNAVAILABLE
        assert rig.journal.details_of("engine_up") == ["Docker Swarm at unix:///engine.sock"]


@pytest.mark.parametrize(
    ("reach", "way"), [("auto", Reach.NAME), ("network", Reach.NAME), ("host", Reach.HOST)]
)
async def test_services_are_reached_by_the_setting_and_the_networks_of_the_daemon(
    reach: str, way: Reach
) -> None:
    rig = Rig()
    rig.add("s", driver=Driver.SWARM)
    async with up(to_swarm(rig, reach=reach)):
        assert rig["s"].reach is way


async def test_a_daemon_on_no_network_of_the_services_reaches_them_on_their_hosts() -> None:
    rig = Rig()
    rig.add("s", driver=Driver.SWARM)
    link = to_swarm(rig)
    link._own_names = ("nobody",)
    async with up(link):
        assert rig["s"].reach is Reach.HOST


async def test_an_orphan_of_a_swarm_is_removed_as_a_service() -> None:
    rig = Rig("a")
    rig.engine.put("m-ollama-s", "s", "parked")
    async with up(to_swarm(rig)):
        (told,) = rig.journal.details_of("unknown_container")
        assert told == (
            "m-ollama-s: it is labelled as instance 's', which is not configured; "
            "`docker service rm m-ollama-s` removes it"
        )


async def test_an_event_about_an_instance_of_another_driver_is_no_hint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig("a")
    async with up(to_swarm(rig)) as link:
        hints: list[EngineEvent] = []
        monkeypatch.setattr(rig["a"], "hint", hints.append)
        link._hint(EngineEvent("die", "1", "a", None))
        rig.link._hint(EngineEvent("die", "2", "a", None))
        assert [hint.container_id for hint in hints] == ["2"]


async def test_a_service_without_replicas_is_as_good_as_none_in_a_listing() -> None:
    rig = Rig("a")
    async with rig.running():
        facts = rig.engine.put("m-ollama-a", "a", "parked")
        inspections = rig.engine.calls.count("inspect")
        rig["a"].compare(facts)
        rig["a"].compare(None)
        await until(lambda: rig.view("a").phase is Phase.STOPPED)
        assert rig.engine.calls.count("inspect") == inspections


# --- orphans ---


async def test_orphans_are_known_from_the_first_listing_and_told_once() -> None:
    rig = Rig("a")
    rig.engine.put("m-ollama-old", "old")
    rig.engine.put("m-ollama-a", "a")
    async with rig.running():
        assert [one.name for one in rig.link.orphans] == ["m-ollama-old"]
        lists = rig.engine.calls.count("list")
        rig.link._resync.set()
        await until(lambda: rig.engine.calls.count("list") > lists)
        (told,) = rig.journal.details_of("unknown_container")
        assert told == (
            "m-ollama-old: it is labelled as instance 'old', which is not configured; "
            "`docker rm -f m-ollama-old` removes it"
        )


@pytest.mark.parametrize("deaf", [False, True])
async def test_a_container_that_is_renamed_is_an_orphan_until_it_has_its_name_again(*, deaf: bool) -> None:
    rig = Rig("a")
    async with rig.running():
        await rig.capacity.start("a")
        rig.engine.deaf = deaf
        rig.engine.rename(rig.container("a").id, "elsewhere")
        if deaf:
            rig.link._resync.set()
        await until(lambda: rig.link.orphans)
        (orphan,) = rig.link.orphans
        assert (orphan.name, orphan.instance, orphan.is_running) == ("elsewhere", "a", True)
        await until(lambda: rig.view("a").phase is not Phase.READY)
        rig.engine.rename(orphan.id, "m-ollama-a")
        rig.link._resync.set()
        await until(lambda: not rig.link.orphans)
        await until(lambda: rig.view("a").phase is Phase.READY)


async def test_an_event_of_a_container_without_an_instance_causes_a_listing() -> None:
    rig = Rig("a")
    rig.add_external()
    async with rig.running():
        await until(lambda: "events" in rig.engine.calls and not rig.link._resync.is_set())
        facts = rig.engine.put("m-ollama-nas", "nas")
        rig.engine.tell("start", facts)  # an external instance of that name has no container
        rig.engine.tell("start", rig.engine.put("b", "b"))
        await until(lambda: [one.name for one in rig.link.orphans] == ["b", "m-ollama-nas"])


async def test_a_lack_of_descriptors_of_our_own_says_nothing_about_the_engine() -> None:
    rig = Rig("a")
    lack = NoDescriptorForEngineError()
    rig.engine.failing["ping"] = lack
    async with rig.running(settled=False):
        await until(lambda: rig.link.trouble == lack.message)
        assert not rig.link.asked.is_set()
        del rig.engine.failing["ping"]
        await rig.link.came_up.wait()
        trouble, pings = rig.link.trouble, rig.engine.calls.count("ping")
        rig.engine.failing["ping"] = lack
        await until(lambda: rig.engine.calls.count("ping") > pings + 2)
        assert (rig.link.up, rig.link.trouble) == (True, trouble)
        assert "engine_down" not in rig.journal.kinds


async def test_an_instance_that_joins_late_learns_what_the_engine_says_and_is_prewarmed() -> None:
    rig = Rig("a")
    async with rig.running():
        for name, prewarm in (("idle", False), ("warm", True)):
            rig.link.join(rig.add(name, prewarm=prewarm))
        await until(lambda: rig.view("warm").phase is Phase.READY)
        assert rig.view("idle").phase is Phase.STOPPED


async def test_an_engine_that_answers_is_left_alone_for_half_an_interval() -> None:
    rig = Rig("a")
    rig.link._probe_interval_s = 3600.0
    async with rig.running():
        await rig.capacity.start("a")
        assert rig.engine.calls.count("ping") == 1
