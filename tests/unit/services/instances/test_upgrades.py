"""Restarts, upgrades and roll-backs: what is replaced, what waits, and what a refusal leaves as it was."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from manager.domain.drained import Drained
from manager.domain.image_override import ImageOverride
from manager.domain.instance import Phase, Target
from manager.domain.registry import OrderKind
from manager.errors import (
    CancelledByStopError,
    ConflictError,
    DrainedError,
    EngineError,
    EngineUnreachableError,
    InvalidRequestError,
    ManagerError,
    Reason,
    RegistryUnwritableError,
    StartFailedError,
    UnavailableError,
)
from tests.support.fleet_rig import IMAGE, Rig, until

OTHER = "ollama/ollama:2"
ABSENT = "ollama/ollama:9"


# --- restart ---


async def test_a_restart_waits_for_open_leases_and_requests_wait_for_the_new_container() -> None:
    rig = Rig("cpu")
    async with rig.running():
        await rig["cpu"].start()
        before, open_lease = rig.container("cpu").id, rig["cpu"].try_lease()
        assert open_lease is not None
        restarting = asyncio.create_task(rig.upgrades.restart("cpu", wait=True))
        await until(lambda: rig.view("cpu").phase is Phase.DRAINING)
        waiting = [asyncio.create_task(rig["cpu"].lease()) for _ in range(5)]
        await asyncio.sleep(0.01)
        assert not any(each.done() for each in (restarting, *waiting))
        open_lease.release()
        await restarting
        for each in waiting:
            (await each).release()
        assert (rig.container("cpu").id != before, open_lease.cut) == (True, None)
        assert rig["cpu"].starts_done == 2
        assert rig.journal.details_of("restarting") == ["to be restarted"]


async def test_a_restart_that_is_not_waited_for_goes_on_by_itself() -> None:
    rig = Rig("cpu")
    async with rig.running():
        await rig["cpu"].start()
        before = rig.container("cpu").id
        await rig.upgrades.restart("cpu", wait=False)
        assert rig["cpu"].ends
        await until(lambda: not rig["cpu"].busy)
        assert (rig.view("cpu").phase, rig.container("cpu").id != before) == (Phase.READY, True)


@pytest.mark.parametrize("wait", [True, False])
async def test_a_restart_of_what_does_not_run_is_a_start_with_a_place(*, wait: bool) -> None:
    rig = Rig("one", "two", max_running=1)
    async with rig.running():
        await rig["one"].start()
        rig.ahead_s = 5.0
        await rig.upgrades.restart("two", wait=wait)
        await until(lambda: rig.view("two").phase is Phase.READY)
        assert rig.view("one").phase is Phase.STOPPED


async def test_a_restart_during_a_start_begins_it_anew() -> None:
    rig = Rig("cpu")
    async with rig.running():
        for _ in range(8):
            await rig.world.starting.acquire()
        first = asyncio.create_task(rig["cpu"].start())
        await until(lambda: rig.view("cpu").phase is Phase.STARTING)
        again = asyncio.create_task(rig.upgrades.restart("cpu", wait=True))
        await until(lambda: "stopping" in [kind for kind, *_ in rig.journal.events])
        for _ in range(8):
            rig.world.starting.release()
        await asyncio.gather(first, again)
        assert rig.view("cpu").phase is Phase.READY


async def test_a_stop_during_a_restart_cancels_it() -> None:
    rig = Rig("cpu")
    async with rig.running():
        await rig["cpu"].start()
        open_lease = rig["cpu"].try_lease()
        assert open_lease is not None
        restarting = asyncio.create_task(rig.upgrades.restart("cpu", wait=True))
        await until(lambda: rig.view("cpu").phase is Phase.DRAINING)
        stopping = asyncio.create_task(rig["cpu"].stop())
        with pytest.raises(CancelledByStopError):
            await restarting
        open_lease.release()
        await stopping
        assert (rig.view("cpu").phase, rig.view("cpu").target) == (Phase.STOPPED, Target.STOPPED)


@pytest.mark.parametrize(
    ("trouble", "error"),
    [("away", EngineUnreachableError), ("image", UnavailableError), ("card", UnavailableError)],
)
async def test_what_could_not_start_again_is_not_stopped(trouble: str, error: type[ManagerError]) -> None:
    rig = Rig()
    gpu = rig.add("gpu0", gpu=True)
    async with rig.running():
        await gpu.start()
        if trouble == "away":
            rig.engine.down = "away"
            await until(lambda: not rig.link.up)
        elif trouble == "image":
            rig.engine.images.clear()
        else:
            rig.cards.missing["gpu0"] = "the card is gone"
        with pytest.raises(error):
            await rig.upgrades.restart("gpu0", wait=True)
        assert not gpu.ends
        assert rig.journal.details_of("restarting") == []


async def test_an_external_server_is_not_restarted_or_upgraded() -> None:
    rig = Rig()
    rig.add_external()
    for refused in (
        rig.upgrades.restart("nas", wait=True),
        rig.upgrades.upgrade("nas", OTHER, wait=True),
        rig.upgrades.rollback("nas", wait=True),
    ):
        with pytest.raises(ConflictError, match="nas is external"):
            await refused


# --- another image ---


async def test_an_upgrade_restarts_what_runs_with_the_image_and_a_rollback_goes_back() -> None:
    rig = Rig("cpu")
    async with rig.running():
        await rig["cpu"].start()
        assert await rig.upgrades.upgrade("cpu", OTHER, wait=True) is True
        assert rig.container("cpu").image == OTHER
        chosen = rig.view("cpu").image
        assert chosen is not None
        assert (chosen.image, chosen.previous) == (OTHER, IMAGE)
        assert rig.registry.orders["cpu", OrderKind.IMAGE]["images"] == [OTHER]
        assert await rig.upgrades.upgrade("cpu", OTHER, wait=True) is False
        await rig.upgrades.rollback("cpu", wait=True)
        assert (rig.container("cpu").image, rig.view("cpu").image) == (IMAGE, None)
        assert ("cpu", OrderKind.IMAGE) not in rig.registry.orders
        with pytest.raises(ConflictError, match=f"cpu uses the image of its template, {IMAGE}"):
            await rig.upgrades.rollback("cpu", wait=True)
        assert rig.journal.details_of("image_changed") == [f"{IMAGE} -> {OTHER}", f"{OTHER} -> {IMAGE}"]
        assert rig.view("cpu").explanation is None


async def test_an_override_of_an_earlier_daemon_is_in_force_and_no_reason_to_recreate() -> None:
    rig = Rig()
    override = ImageOverride((OTHER,), datetime.now(UTC))
    first = Rig()
    cpu = rig.add("cpu", override=override)
    assert cpu.replacing.image == OTHER
    assert rig.fleet.images() == (OTHER,)
    async with rig.running():
        await cpu.start()
        assert rig.container("cpu").image == OTHER
        assert (cpu.view().explanation, cpu._stale.why) == (None, None)
        cpu.reconfigure(first.make("cpu").spec)  # as a reload of the configuration does
        assert cpu.replacing.image == OTHER
        assert cpu.spec.template is not None
        assert cpu.spec.template.image == OTHER


async def test_a_stopped_instance_only_has_another_image_for_its_next_start() -> None:
    rig = Rig("cpu")
    async with rig.running():
        assert await rig.upgrades.upgrade("cpu", OTHER, wait=True) is True
        assert rig.engine.containers == {}
        await rig["cpu"].start()
        assert rig.container("cpu").image == OTHER


async def test_an_image_whose_container_ends_is_told_with_the_way_back_which_starts_again() -> None:
    rig = Rig("cpu")
    rig.engine.crashing.add(OTHER)
    async with rig.running():
        await rig["cpu"].start()
        way_back = f"`ollama-manager rollback cpu` goes back from {OTHER} to {IMAGE}"
        with pytest.raises(StartFailedError, match=way_back):
            await rig.upgrades.upgrade("cpu", OTHER, wait=True)
        why = rig.view("cpu").explanation
        assert why is not None
        assert why.message.endswith(way_back)
        await rig.upgrades.rollback("cpu", wait=True)
        assert (rig.view("cpu").phase, rig.container("cpu").image) == (Phase.READY, IMAGE)


async def test_a_failure_that_no_image_causes_names_no_way_back() -> None:
    rig = Rig()
    cpu = rig.add("cpu", override=ImageOverride((OTHER,), datetime.now(UTC)))
    rig.engine.failing["start"] = EngineError("the port is taken", reason=Reason.PORT_TAKEN)
    async with rig.running():
        with pytest.raises(EngineError, match=r"^the port is taken$"):
            await cpu.start()


@pytest.mark.parametrize(
    ("image", "error", "said"),
    [
        ("other/image:1", InvalidRequestError, "'other/image:1' is not in allow.images"),
        (ABSENT, UnavailableError, f"`ollama-manager pull {ABSENT}`"),
    ],
)
async def test_a_refused_image_changes_nothing(image: str, error: type[ManagerError], said: str) -> None:
    rig = Rig("cpu")
    async with rig.running():
        await rig["cpu"].start()
        before = rig.container("cpu").id
        with pytest.raises(error, match=said):
            await rig.upgrades.upgrade("cpu", image, wait=True)
        assert (rig.container("cpu").id, rig["cpu"].replacing.image, rig.registry.orders) == (
            before,
            IMAGE,
            {},
        )


async def test_an_upgrade_that_cannot_be_stored_changes_nothing() -> None:
    rig = Rig("cpu")
    rig.registry.refuses = RegistryUnwritableError("full")
    async with rig.running():
        await rig["cpu"].start()
        with pytest.raises(RegistryUnwritableError):
            await rig.upgrades.upgrade("cpu", OTHER, wait=True)
        assert (rig["cpu"].replacing.image, rig["cpu"].ends) == (IMAGE, False)


async def test_out_of_service_an_upgrade_waits_for_the_next_start_and_is_refused_while_a_container_runs() -> (
    None
):
    rig = Rig()
    cpu = rig.add("cpu", drained=Drained(datetime.now(UTC)))
    async with rig.running():
        assert await rig.upgrades.upgrade("cpu", OTHER, wait=True) is True
        assert rig.engine.containers == {}
        await rig.service.resume("cpu")
        await cpu.start()
        assert rig.container("cpu").image == OTHER
        await rig.service.drain("cpu", reason=None, until=None, stops=False)
        with pytest.raises(ConflictError, match="cpu is out of service and its container runs"):
            await rig.upgrades.rollback("cpu", wait=True)
        with pytest.raises(DrainedError):
            await cpu.replacing.ended()


async def test_a_missing_card_keeps_an_upgrade_from_being_made() -> None:
    rig = Rig()
    rig.add("gpu0", gpu=True)
    async with rig.running():
        rig.cards.missing["gpu0"] = "the card is gone"
        with pytest.raises(UnavailableError, match="the card is gone"):
            await rig.upgrades.upgrade("gpu0", OTHER, wait=True)
        assert rig.registry.orders == {}
