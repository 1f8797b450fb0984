"""The set of instances, what is known of them after a start, and cards that are found."""

from __future__ import annotations

import asyncio

import pytest

from manager.domain.instance import Phase
from manager.errors import (
    ConfigurationError,
    ConflictError,
    EngineError,
    EngineUnreachableError,
    Reason,
    UnknownInstanceError,
)
from tests.support.fleet_rig import Rig, until


async def test_instances_are_found_by_id_in_the_configured_order() -> None:
    rig = Rig("b", "a")
    rig.add("gpu0", image="ollama/ollama:2", gpu=True)
    rig.add_external()
    assert [one.id for one in rig.fleet.instances()] == ["b", "a", "gpu0", "nas"]
    assert [one.view().spec.id for one in rig.fleet.instances()] == ["b", "a", "gpu0", "nas"]
    assert [one.id for one in rig.fleet.supervisors()] == ["b", "a", "gpu0"]
    assert rig.fleet.images() == ("ollama/ollama:1", "ollama/ollama:2")
    assert ("a" in rig.fleet, "z" in rig.fleet) == (True, False)
    assert rig.fleet.get("a") is rig.fleet.managed("a")
    with pytest.raises(UnknownInstanceError, match="no instance 'z'; there is: b, a, gpu0, nas"):
        rig.fleet.get("z")
    with pytest.raises(ConflictError, match="nas is external"):
        rig.fleet.managed("nas")


async def test_the_fleets_revision_grows_with_each_new_instance() -> None:
    rig = Rig("a")
    before = rig.world.revision.number
    rig.add("b")
    assert rig.world.revision.number > before


async def test_the_last_use_is_stored_again_and_again() -> None:
    rig = Rig("a")
    async with rig.running():
        await rig.capacity.start("a")
        for _ in range(3):
            rig.registry.rows.clear()
            rig["a"].used()
            await until(lambda: "a" in rig.registry.rows)


async def test_all_are_stopped_and_a_stop_that_fails_is_left_to_the_next_daemon() -> None:
    rig = Rig("a", "b")
    async with rig.running():
        await rig.capacity.start("a")
        await rig.capacity.start("b")
        rig.engine.failing["signal b"] = EngineError("it will not", reason=Reason.START_FAILED)
        await rig.capacity.stop_all()
        assert rig.view("a").phase is Phase.STOPPED
        assert ("stop_failed", "b", Reason.START_FAILED) in rig.journal.events


async def test_a_defect_in_a_stop_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig("a")

    async def broken() -> bool:
        raise ZeroDivisionError

    monkeypatch.setattr(rig["a"], "stop", broken)
    with pytest.raises(ZeroDivisionError):
        await rig.capacity.stop_all()


async def test_an_error_in_the_loop_of_an_instance_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig("a", "b")

    async def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(rig["b"], "run", broken)
    with pytest.raises(ExceptionGroup) as caught:
        await rig.fleet.run()
    assert caught.group_contains(ZeroDivisionError)


# --- after the start ---


async def test_the_fleet_is_known_once_engine_and_external_servers_were_asked() -> None:
    rig = Rig("a")
    rig.add_external()
    rig.engine.silent.add("nas")
    assert not rig.first_look.is_known
    await rig.first_look.known(within_s=0)
    assert not rig.first_look.is_known
    rig.engine.down = "it is away"
    async with rig.running(settled=False):
        await rig.first_look.known(within_s=10)
        assert rig.first_look.is_known, "a failure is an answer too"
        assert rig.link.asked.is_set()


async def test_without_containers_the_engine_is_not_waited_for() -> None:
    rig = Rig()
    instance = rig.add_external()
    await instance.probe()
    assert rig.first_look.is_known


async def test_the_fleet_is_settled_once_found_containers_are_adopted() -> None:
    rig = Rig("a")
    rig.engine.put("m-ollama-a", "a")
    async with rig.running():
        assert rig.view("a").phase is Phase.READY
        assert "adopted" in rig.journal.kinds


async def test_an_engine_that_does_not_answer_in_time_is_an_error() -> None:
    rig = Rig("a")
    rig.engine.down = "it is away"
    async with rig.running(settled=False):
        await rig.link.asked.wait()
        with pytest.raises(EngineUnreachableError, match="it is away"):
            await rig.first_look.settled(within_s=0)


async def test_a_daemon_that_is_not_ready_says_why() -> None:
    rig = Rig("a")
    rig.cards.snapshot.attempted = False
    rig.journal.trouble = "the disk is full"
    assert rig.first_look.why_not_ready() == (
        "engine: the container engine at unix:///engine.sock has not answered yet",
        "gpus: NVML has not been asked yet",
        "registry: the disk is full",
    )
    rig.cards.snapshot.attempted, rig.journal.trouble = True, None
    async with rig.running():
        assert rig.first_look.why_not_ready() == ()


async def test_without_a_container_the_engine_is_not_needed() -> None:
    rig = Rig()
    nas = rig.add_external()
    rig.engine.down = "it is away"
    async with rig.running():
        await rig.link.asked.wait()
        assert not rig.link.up
        assert rig.first_look.why_not_ready() == ()
        assert await rig.sweeps.reap() == ()
        assert nas.id in rig.fleet
        rig.cards.found = ("gpu0",)
        await until(lambda: "gpu0" in rig.fleet)
        assert rig.first_look.why_not_ready() == ("engine: it is away",)
        with pytest.raises(EngineUnreachableError):
            await rig.sweeps.reap()


# --- cards ---


async def test_a_card_that_is_found_gets_an_instance_that_runs() -> None:
    rig = Rig("a")
    async with rig.running():
        rig.cards.found = ("gpu0",)
        await until(lambda: "gpu0" in rig.fleet)
        assert rig.journal.details_of("found") == ["GPU-1"]
        assert await rig.capacity.start("gpu0") is True


async def test_a_card_that_is_found_before_the_engine_waits_for_it() -> None:
    rig = Rig("a")
    rig.cards.found = ("gpu0",)
    rig.engine.put("m-ollama-gpu0", "gpu0")
    await rig.found.look()
    assert rig.view("gpu0").phase is Phase.UNAVAILABLE
    async with rig.running():
        await until(lambda: rig.view("gpu0").phase is Phase.READY)


async def test_a_card_without_a_template_is_told_once_and_ends_nothing() -> None:
    rig = Rig("a")
    rig.no_template = ConfigurationError("there is no template ollama-gpu")
    rig.cards.found = ("gpu0",)
    async with rig.running():
        readings = rig.cards.readings
        await until(lambda: rig.cards.readings > readings + 2)
        assert rig.journal.details_of("found_unusable") == ["there is no template ollama-gpu"]
        assert "gpu0" not in rig.fleet


async def test_a_found_instance_that_has_no_container_learns_nothing_of_the_engine() -> None:
    rig = Rig("a")
    rig.cards.found = ("nas",)
    external = Rig().add_external()
    rig.found._make = lambda _id: external
    await rig.found.look()
    assert rig.fleet.get("nas") is external
    await asyncio.sleep(0)


async def test_the_fleet_is_not_known_before_each_external_server_was_asked() -> None:
    rig = Rig("a")
    rig.add_external()
    rig.link.asked.set()
    assert not rig.first_look.is_known
