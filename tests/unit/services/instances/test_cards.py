"""A GPU instance whose card is lost, or whose container computes on the CPU."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from manager.domain.container import LABEL_DEVICE
from manager.domain.gpu import GpuProcess
from manager.domain.instance import Model, Phase
from manager.errors import EngineError, Reason, UnavailableError
from tests.support.fake_engine import CARD, GIB, LIMITS, Ground, on_ground
from tests.support.virtual import in_virtual_time, until

if TYPE_CHECKING:
    from manager.services.instances.supervisor import Supervisor

ON_CARD = Model("tiny", "d", 2 * GIB, 2 * GIB, None)
ON_CPU = Model("tiny", "d", 2 * GIB, 0, None)
CUDA_LINE = 'level=INFO msg="inference compute" id=GPU-a library=CUDA'
CPU_LINE = 'level=INFO msg="inference compute" id=cpu library=cpu'


def code(one: Supervisor) -> Reason | None:
    explanation = one.view().explanation
    return explanation.code if explanation else None


async def read_cards(ground: Ground, one: Supervisor, times: int = 1) -> None:
    """As the fleet does in every probe interval."""
    for _ in range(times):
        await ground.gpus.refresh()
        await one.probe()


def log(ground: Ground, line: str) -> None:
    ground.engine.box.log.append((ground.engine.now(), line))


def hold_memory(ground: Ground) -> None:
    ground.machine.processes = (GpuProcess(4711, 2 * GIB),)
    ground.machine.containers = {4711: ground.engine.box.id}


# --- a lost card ---


@in_virtual_time
async def test_a_lost_card_takes_the_instance_out_and_a_returned_one_gets_a_new_container() -> None:
    async with on_ground(gpu=True) as ground:
        one = await ground.ready()
        lease = await one.lease()
        before = ground.engine.box.id
        revision = ground.world.revision.number
        ground.machine.is_there = False
        await read_cards(ground, one, times=3)
        assert ground.world.revision.number > revision
        assert one.usable_endpoint() is None
        assert one.try_lease() is None
        view = one.view()
        assert (view.phase, code(one)) == (Phase.UNAVAILABLE, Reason.GPU_MISSING)
        assert ground.journal.kinds.count("card_lost") == 1
        with pytest.raises(UnavailableError, match="not in this machine"):
            await one.lease()
        assert ground.engine.box.id == before  # who uses it directly goes on

        ground.machine.is_there = True
        await read_cards(ground, one)
        assert "card_returned" in ground.journal.kinds
        assert code(one) is Reason.GPU_MISSING
        await asyncio.sleep(5 * LIMITS.resync_interval_s)
        assert ground.engine.box.id == before  # a lease is open
        lease.release()
        await until(lambda: one.view().starts == 2, within_s=3 * LIMITS.resync_interval_s)
        assert code(one) is None
        assert ground.engine.box.id != before


@in_virtual_time
async def test_a_start_between_the_return_of_a_card_and_the_next_probe_is_refused() -> None:
    async with on_ground(gpu=True) as ground:
        one = await ground.ready()
        ground.machine.is_there = False
        await read_cards(ground, one)
        ground.machine.is_there = True
        await ground.gpus.refresh()
        with pytest.raises(UnavailableError, match="not in this machine"):
            one.begin_start()
        await one.probe()
        assert not one.begin_start(), "it runs"


@in_virtual_time
async def test_an_instance_without_its_card_is_still_stopped_when_idle() -> None:
    async with on_ground(gpu=True) as ground:
        one = await ground.ready()
        ground.machine.is_there = False
        await read_cards(ground, one)
        await asyncio.sleep(LIMITS.ttl_s + 1)
        assert await one.stop_if_idle()
        await one.stopped()
        assert one.view().phase is Phase.UNAVAILABLE  # it could not be started


@in_virtual_time
async def test_nothing_starts_without_its_card() -> None:
    async with on_ground(gpu=True) as ground:
        ground.machine.is_there = False
        one = await ground.listed(ground.supervisor())
        with pytest.raises(UnavailableError) as caught:
            await one.start()
        assert caught.value.reason is Reason.GPU_MISSING
        assert ground.engine.boxes == {}


# --- a container that computes on the CPU ---


@in_virtual_time
async def test_a_log_that_names_the_cpu_is_read_until_it_says_something() -> None:
    async with on_ground(gpu=True) as ground:
        one = await ground.ready()
        await read_cards(ground, one)
        assert ground.engine.calls.count("logs_between") >= 1
        assert code(one) is None
        log(ground, CPU_LINE)
        await read_cards(ground, one)
        assert code(one) is Reason.GPU_FALLBACK
        assert ground.journal.kinds.count("gpu_fallback") == 1
        before = ground.engine.calls.count("logs_between")
        await read_cards(ground, one, times=3)
        assert ground.engine.calls.count("logs_between") == before
        await until(lambda: one.view().starts == 2)


@in_virtual_time
async def test_a_fallback_is_seen_after_an_adoption_behind_any_number_of_later_lines() -> None:
    async with on_ground(gpu=True) as ground:
        box = ground.engine.put(ground.name, ground.labels)
        log(ground, CPU_LINE)
        box.started_at = ground.engine.now() - timedelta(hours=5)
        box.log = [(box.started_at + timedelta(seconds=3), CPU_LINE)]
        box.log += [(ground.engine.now(), f"line {number}") for number in range(5000)]
        one = await ground.listed(ground.supervisor())
        await until(lambda: "gpu_fallback" in ground.journal.kinds)
        assert one.models == ()


@pytest.mark.parametrize("line", [CUDA_LINE, "nothing about devices"])
@in_virtual_time
async def test_the_log_of_an_adopted_container_is_read_once(line: str) -> None:
    async with on_ground(gpu=True) as ground:
        one = ground.supervisor()
        box = ground.engine.put(ground.name, one._w.request().labels)
        box.started_at = ground.engine.now() - timedelta(hours=5)
        box.log = [(box.started_at + timedelta(seconds=3), line)]
        ground.engine.refuses["logs_between"] = [EngineError("odd", reason=Reason.START_FAILED)]
        await ground.listed(one)
        await asyncio.sleep(20 * LIMITS.probe_interval_s)
        assert ground.engine.calls.count("logs_between") == 2  # and the one that was refused
        assert code(one) is None


@in_virtual_time
async def test_a_model_without_a_byte_on_the_card_is_a_sign() -> None:
    async with on_ground(gpu=True) as ground:
        one = await ground.ready()
        log(ground, CUDA_LINE)
        ground.engine.box.models = (ON_CARD,)
        await read_cards(ground, one, times=5)
        assert code(one) is None
        ground.engine.box.models = (ON_CPU,)
        await read_cards(ground, one)
        assert code(one) is Reason.GPU_FALLBACK


@in_virtual_time
async def test_a_fallback_that_comes_back_is_not_mended_again_so_soon() -> None:
    async with on_ground(gpu=True) as ground:
        one = await ground.ready()
        log(ground, CPU_LINE)
        await until(lambda: one.view().starts == 2)
        log(ground, CPU_LINE)
        await until(lambda: ground.journal.kinds.count("gpu_fallback") == 2)
        began = ground.world.now()
        await until(lambda: one.view().starts == 3)
        assert ground.world.now() - began > 500


@in_virtual_time
async def test_a_container_that_nobody_can_date_is_not_judged_by_its_log() -> None:
    async with on_ground(gpu=True) as ground:
        one = ground.supervisor()
        ground.engine.put(ground.name, one._w.request().labels).started_at = None
        await ground.listed(one)
        await until(lambda: one.view().phase is Phase.READY)
        await asyncio.sleep(20)
        assert "logs_between" not in ground.engine.calls


@in_virtual_time
async def test_memory_is_claimed_made_room_for_and_given_back() -> None:
    async with on_ground(gpu=True) as ground:
        one = await ground.ready()
        assert one.take_room_for("tiny")
        await one.make_room_for("tiny")
        hold_memory(ground)
        await ground.gpus.refresh()
        assert await one.stop()
        assert "vram_not_given_back" in ground.journal.kinds


# --- several cards ---


def made_for(ground: Ground) -> str:
    return ground.engine.box.labels[LABEL_DEVICE]


@in_virtual_time
async def test_an_instance_over_several_cards_is_out_while_one_of_them_is_lost() -> None:
    async with on_ground(gpu=True, device=(CARD, "02:00.0")) as ground:
        ground.machine.others = ("GPU-two",)
        one = await ground.ready()
        assert made_for(ground) == f"{CARD},GPU-two"
        before = ground.engine.box.id
        ground.machine.others = ()
        await read_cards(ground, one)
        assert one.try_lease() is None
        explanation = one.view().explanation
        assert explanation is not None
        assert (explanation.code, "GPU-two" in explanation.message) == (Reason.GPU_MISSING, True)
        ground.machine.others = ("GPU-two",)
        await read_cards(ground, one)
        await until(lambda: one.view().starts == 2, within_s=3 * LIMITS.resync_interval_s)
        assert ground.engine.box.id != before
        assert made_for(ground) == f"{CARD},GPU-two"


@in_virtual_time
async def test_a_card_that_joins_all_cards_is_in_the_next_container_and_not_in_this_one() -> None:
    async with on_ground(gpu=True, device=("all",)) as ground:
        one = await ground.ready()
        assert made_for(ground) == CARD
        lease = await one.lease()
        ground.machine.others = ("GPU-two",)
        await read_cards(ground, one, times=2)
        assert code(one) is Reason.TEMPLATE_OUTDATED
        assert [card.uuid for card in one.view().cards] == [CARD]
        await asyncio.sleep(5 * LIMITS.resync_interval_s)
        assert made_for(ground) == CARD  # a lease is open
        ground.machine.others = ()
        await read_cards(ground, one)
        assert (one.view().phase, code(one)) == (Phase.READY, None)  # it does not use that card
        ground.machine.others = ("GPU-two",)
        await read_cards(ground, one)
        lease.release()
        await until(lambda: one.view().starts == 2, within_s=3 * LIMITS.resync_interval_s)
        await until(lambda: one.view().phase is Phase.READY)
        assert made_for(ground) == f"{CARD},GPU-two"
        assert code(one) is None


@in_virtual_time
async def test_a_container_of_all_cards_that_lost_one_for_good_is_replaced_by_the_next_daemon() -> None:
    async with on_ground(gpu=True, device=("all",)) as ground:
        one = ground.supervisor()
        labels = ground.labels | {LABEL_DEVICE: f"{CARD},GPU-gone"}
        ground.engine.put(ground.name, labels)
        await ground.listed(one)
        await read_cards(ground, one)
        await until(lambda: one.view().starts == 1, within_s=3 * LIMITS.resync_interval_s)
        await until(lambda: one.view().phase is Phase.READY)
        assert made_for(ground) == CARD


@in_virtual_time
async def test_a_container_is_not_replaced_while_the_cards_of_a_new_one_are_not_known() -> None:
    device = (CARD, "02:00.0")
    async with on_ground(gpu=True, device=device) as ground:
        ground.machine.others = ("GPU-two",)
        await ground.gpus.load()
        labels = ground.supervisor()._w.request().labels
    async with on_ground(gpu=True, device=device) as ground:
        one = ground.supervisor()
        ground.engine.put(ground.name, labels)
        await ground.listed(one)
        await read_cards(ground, one)
        assert code(one) is Reason.GPU_MISSING
        assert one._stale.why is None
        ground.machine.others = ("GPU-two",)
        await read_cards(ground, one)
        assert made_for(ground) == f"{CARD},GPU-two"
