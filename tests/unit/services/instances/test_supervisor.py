"""One instance from the first listing to its removal, on an engine in memory."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from manager.domain.container import LABEL_HASH
from manager.domain.drained import Drained
from manager.domain.idle import UsageSample
from manager.domain.instance import Health, Phase, Target
from manager.domain.ownership import LABEL_OWNER, Owner
from manager.domain.registry import InstanceRow, Operation
from manager.errors import (
    BackingOffError,
    CancelledByStopError,
    EngineError,
    EngineUnreachableError,
    LimitReachedError,
    LockedError,
    NameConflictError,
    Reason,
    RegistryUnwritableError,
    StartFailedError,
    UnavailableError,
)
from tests.support.fake_engine import BEGIN, IMAGE, LIMITS, NETWORK, on_ground
from tests.support.virtual import in_virtual_time, until


def phase(one: object) -> str:
    return str(one.view().phase.value)  # type: ignore[attr-defined]


# --- starting ---


@in_virtual_time
async def test_many_first_leases_make_one_container() -> None:
    async with on_ground() as ground:
        one = await ground.listed(ground.supervisor())
        leases = await asyncio.gather(*(one.lease() for _ in range(16)))
        assert one.in_flight == 16
        assert (ground.engine.calls.count("create"), ground.engine.calls.count("start")) == (1, 1)
        assert {lease.endpoint for lease in leases} == {one.usable_endpoint()}
        for lease in leases:
            lease.release()
        view = one.view()
        assert (view.phase, view.starts, view.in_flight, one.starts_done) == (Phase.READY, 1, 0, 1)
        assert ground.steps == ["stored", "created", "started", "ready"]
        assert ground.registry.rows["cpu"].target is Target.RUNNING


@in_virtual_time
async def test_a_start_of_what_is_ready_changes_nothing() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        assert not await one.start()
        assert one.try_lease() is not None
        assert ground.engine.calls.count("create") == 1


@in_virtual_time
async def test_a_network_that_is_missing_is_created() -> None:
    async with on_ground() as ground:
        ground.engine.networks.clear()
        one = await ground.ready()
        assert NETWORK in ground.engine.networks
        assert phase(one) == "ready"
        assert ground.engine.calls.count("create") == 1


@in_virtual_time
async def test_a_container_that_gets_no_address_of_a_network_made_late_is_made_anew() -> None:
    async with on_ground() as ground:
        ground.engine.networks.clear()
        ground.engine.cuts_off = True
        one = await ground.ready()
        assert one.usable_endpoint() == f"http://{ground.engine.box.address}:11434"
        assert (ground.engine.calls.count("create"), one.view().starts) == (2, 1)


@in_virtual_time
async def test_a_container_that_never_gets_an_address_is_made_anew_once_and_fails_the_start() -> None:
    async with on_ground() as ground:
        ground.engine.template = {"is_cut_off": True}
        one = await ground.listed(ground.supervisor())
        with pytest.raises(StartFailedError, match="has no address on its network"):
            await one.start()
        assert ground.engine.calls.count("create") == 2
        assert ground.engine.boxes == {}


@in_virtual_time
async def test_a_stop_during_the_start_of_a_container_that_is_made_anew_leaves_nothing() -> None:
    async with on_ground() as ground:
        ground.engine.networks.clear()
        ground.engine.cuts_off = True
        ground.engine.delays["remove"] = 1.0
        one = await ground.listed(ground.supervisor())
        starting = asyncio.ensure_future(one.start())
        await until(lambda: "remove" in ground.engine.calls)
        await one.stop()
        with pytest.raises(CancelledByStopError):
            await starting
        assert (ground.engine.boxes, phase(one)) == ({}, "stopped")


@in_virtual_time
async def test_a_crash_at_the_start_is_told_with_the_last_lines_and_leaves_nothing() -> None:
    async with on_ground() as ground:
        ground.engine.crash_at_start = 2
        one = await ground.listed(ground.supervisor())
        with pytest.raises(StartFailedError, match="exit code 2") as caught:
            await one.start()
        assert caught.value.log_tail == ("panic: it does not work",)
        assert ground.engine.boxes == {}
        assert (phase(one), one.starts_failed) == ("failed", 1)
        assert await one.logs(10) == ("panic: it does not work",)
        with pytest.raises(BackingOffError):
            await one.lease()
        ground.engine.crash_at_start = None
        assert await one.start()  # an explicit start does not wait


@in_virtual_time
async def test_a_server_that_does_not_answer_in_time_is_removed() -> None:
    async with on_ground() as ground:
        ground.engine.template = {"answers": False}
        one = await ground.listed(ground.supervisor())
        with pytest.raises(StartFailedError) as caught:
            await one.start()
        assert caught.value.reason is Reason.START_TIMEOUT
        assert ground.engine.boxes == {}


@pytest.mark.parametrize("tells", [True, False])
@in_virtual_time
async def test_a_container_that_ends_while_it_is_waited_for_fails_the_start_at_once(*, tells: bool) -> None:
    async with on_ground() as ground:
        ground.engine.template = {"answers": False}
        ground.engine.tells = tells
        one = await ground.listed(ground.supervisor())
        starting = asyncio.ensure_future(one.start())
        await until(lambda: "started" in ground.steps)
        began = ground.world.now()
        ground.engine.end(ground.engine.box, 7)
        with pytest.raises(StartFailedError, match="exit code 7"):
            await starting
        assert ground.world.now() - began < (0.5 if tells else 3)


@in_virtual_time
async def test_a_container_that_is_removed_while_it_is_waited_for_fails_the_start() -> None:
    async with on_ground() as ground:
        ground.engine.template = {"answers": False}
        one = await ground.listed(ground.supervisor())
        starting = asyncio.ensure_future(one.start())
        await until(lambda: "started" in ground.steps)
        ground.engine.delete(ground.engine.box)
        with pytest.raises(StartFailedError, match="was removed"):
            await starting


@in_virtual_time
async def test_a_pause_does_not_use_up_the_time_for_a_start() -> None:
    async with on_ground() as ground:
        ground.engine.template = {"ready_in_s": 10}
        one = await ground.listed(ground.supervisor())
        starting = asyncio.ensure_future(one.start())
        await until(lambda: "started" in ground.steps)
        ground.engine.pause(ground.engine.box)
        await asyncio.sleep(200)
        ground.engine.pause(ground.engine.box, paused=False)
        assert await starting


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("inspect_s", [0.001, 3.0])
@pytest.mark.parametrize("paused_s", [0.5, 100.1, 100.4, 100.7, 101.0])
@in_virtual_time
async def test_a_container_that_goes_on_after_a_pause_has_the_whole_time_for_its_start(
    paused_s: float, inspect_s: float, *, tells: bool
) -> None:
    async with on_ground() as ground:
        ground.engine.template = {"answers": False}
        one = await ground.listed(ground.supervisor())
        starting = asyncio.ensure_future(one.start())
        gate = ground.gates["started"] = asyncio.Event()
        await until(lambda: "started" in ground.steps)
        ground.engine.tells = tells
        ground.engine.pause(ground.engine.box)
        gate.set()
        ground.engine.delays["inspect"] = inspect_s
        await asyncio.sleep(paused_s)
        ground.engine.pause(ground.engine.box, paused=False)
        await asyncio.sleep(LIMITS.start_timeout_s - 0.3)
        ground.engine.box.answers = True
        assert await starting


@in_virtual_time
async def test_a_pause_that_nothing_told_of_is_found_before_a_start_is_given_up() -> None:
    async with on_ground() as ground:
        ground.engine.template = {"answers": False}
        one = await ground.listed(ground.supervisor(limits=replace(LIMITS, start_timeout_s=1.5)))
        starting = asyncio.ensure_future(one.start())
        await until(lambda: "started" in ground.steps)
        await asyncio.sleep(1.3)
        ground.engine.tells = False
        ground.engine.pause(ground.engine.box)
        await asyncio.sleep(20)
        assert phase(one) == "starting"
        ground.engine.pause(ground.engine.box, paused=False)
        ground.engine.box.answers = True
        assert await starting


@in_virtual_time
async def test_a_missing_image_is_never_pulled() -> None:
    async with on_ground() as ground:
        ground.engine.images.clear()
        one = await ground.listed(ground.supervisor())
        with pytest.raises(EngineError) as caught:
            await one.start()
        assert caught.value.reason is Reason.IMAGE_MISSING
        assert one.view().explanation is not None


@in_virtual_time
async def test_a_full_disk_keeps_a_start_from_the_engine() -> None:
    async with on_ground() as ground:
        one = await ground.listed(ground.supervisor())
        ground.registry.disk_full = True
        with pytest.raises(RegistryUnwritableError):
            await one.start()
        assert "create" not in ground.engine.calls
        with pytest.raises(RegistryUnwritableError):
            await one.configure({"ttl_s": 1})
        assert one.ttl_s == LIMITS.ttl_s
        ground.registry.disk_full = False
        await one.start()
        ground.registry.disk_full = True
        await one.stop()  # what can go on without being stored does
        assert "state_not_stored" in ground.journal.kinds


@in_virtual_time
async def test_where_no_more_may_run_a_start_is_refused() -> None:
    async with on_ground() as ground:
        one = await ground.listed(ground.supervisor(prewarm=True))
        ground.refusal = LimitReachedError("lifecycle.max_running is 1")
        with pytest.raises(LimitReachedError):
            one.begin_start()
        ground.refusal = None
        one.prewarm()
        await until(lambda: phase(one) == "ready")
        one.prewarm()
        assert phase(one) == "ready"


@in_virtual_time
async def test_before_the_first_listing_nothing_can_be_started() -> None:
    async with on_ground() as ground:
        one = ground.supervisor()
        with pytest.raises(EngineUnreachableError):
            one.begin_start()
        assert one.view().phase is Phase.UNAVAILABLE


# --- adoption ---


@in_virtual_time
async def test_a_running_container_of_ours_is_adopted_and_an_older_template_is_told() -> None:
    async with on_ground() as ground:
        ground.engine.put(ground.name, ground.labels | {LABEL_HASH: "older"})
        one = await ground.listed(ground.supervisor())
        await until(lambda: phase(one) == "ready")
        view = one.view()
        assert (view.starts, view.target) == (0, Target.RUNNING)
        assert view.explanation is not None
        assert view.explanation.code is Reason.TEMPLATE_OUTDATED
        assert "adopted" in ground.journal.kinds


@in_virtual_time
async def test_a_paused_container_is_adopted_as_it_is() -> None:
    async with on_ground() as ground:
        ground.engine.pause(ground.engine.put(ground.name, ground.labels))
        one = await ground.listed(ground.supervisor())
        await until(lambda: phase(one) == "ready")


@in_virtual_time
async def test_a_running_container_that_never_answers_is_not_removed() -> None:
    async with on_ground() as ground:
        ground.engine.put(ground.name, ground.labels).answers = False
        one = await ground.listed(ground.supervisor())
        await until(lambda: phase(one) == "failed")
        assert len(ground.engine.boxes) == 1
        ground.engine.box.answers = True
        await until(lambda: phase(one) == "ready")  # it is looked at again by itself


@in_virtual_time
async def test_a_container_with_our_name_that_is_not_ours_is_never_touched() -> None:
    async with on_ground() as ground:
        box = ground.engine.put(ground.name, {})
        one = await ground.listed(ground.supervisor())
        with pytest.raises(NameConflictError, match="rename or remove it"):
            await one.start()
        assert ground.engine.boxes == {box.id: box}
        assert box.status == "running"


@pytest.mark.parametrize("runs", [True, False])
@in_virtual_time
async def test_a_container_that_appeared_meanwhile_is_adopted_if_it_runs_and_replaced_if_not(
    *, runs: bool
) -> None:
    async with on_ground() as ground:
        ground.engine.tells = False
        one = await ground.listed(ground.supervisor())
        box = ground.engine.put(ground.name, ground.labels, running=runs)
        assert await one.start()
        assert (box.id in ground.engine.boxes) is runs
        assert one.view().starts == (0 if runs else 1)


@in_virtual_time
async def test_a_container_that_ended_under_an_adoption_fails_it() -> None:
    async with on_ground() as ground:
        box = ground.engine.put(ground.name, ground.labels)
        box.answers = False
        one = await ground.listed(ground.supervisor())
        ground.engine.end(box, 5)
        await until(lambda: phase(one) == "failed")
        assert "container_ended" in ground.journal.kinds or "start_failed" in ground.journal.kinds


@in_virtual_time
async def test_an_unfinished_stop_is_finished() -> None:
    async with on_ground() as ground:
        ground.engine.put(ground.name, ground.labels)
        row = InstanceRow("cpu", target=Target.STOPPED, operation=Operation.STOP)
        one = await ground.listed(ground.supervisor(row=row))
        await until(lambda: phase(one) == "stopped")
        assert ground.engine.boxes == {}


@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize("operation", [Operation.START, Operation.STOP, None])
@pytest.mark.parametrize("by", ["save_use", "configure", "reconfigure"])
@in_virtual_time
async def test_before_the_first_listing_the_row_of_the_daemon_before_is_kept(
    by: str, operation: Operation | None, *, runs: bool
) -> None:
    async with on_ground() as ground:
        target = Target.STOPPED if operation is Operation.STOP else Target.RUNNING
        usage = UsageSample(at=1.0, network_bytes=2, own_bytes=1, cpu_s=0.5, expirations=())
        row = InstanceRow(
            "cpu", target=target, operation=operation, last_used_at=BEGIN, usage=usage, starts=3
        )
        if runs:
            ground.engine.put(ground.name, ground.labels)
        waiting = ground.supervisor(row=row)  # its engine has not answered yet
        if by == "configure":
            await waiting.configure({"ttl_s": 77.0})
            row = replace(row, ttl_s=77.0)
        elif by == "reconfigure":
            waiting.reconfigure(waiting.spec)
        await waiting.save_use()
        assert ground.registry.rows["cpu"] == row

        one = await ground.listed(ground.supervisor(row=ground.registry.rows["cpu"]))
        ends_ready = operation is Operation.START or (operation is None and runs)
        expected = "ready" if ends_ready else "failed" if operation is None else "stopped"
        await until(lambda: phase(one) == expected)
        assert bool(ground.engine.boxes) is ends_ready


# --- without an operation: events only cause inspections ---


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("how", ["end", "delete"])
@in_virtual_time
async def test_an_end_is_found_by_inspection(how: str, *, tells: bool) -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        ground.engine.tells = tells
        if how == "end":
            ground.engine.end(ground.engine.box, 3)
        else:
            ground.engine.delete(ground.engine.box)
        if not tells:
            await ground.relist(one)
        await until(lambda: phase(one) == "failed", within_s=1)
        view = one.view()
        assert (view.target, view.endpoint) == (Target.STOPPED, None)
        assert view.explanation is not None
        assert ("exit code 3" if how == "end" else "was removed") in view.explanation.message
        await until(lambda: not ground.engine.boxes, within_s=LIMITS.resync_interval_s + 1)


@in_virtual_time
async def test_an_event_that_is_not_true_changes_nothing() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        before = ground.engine.calls.count("inspect")
        box = ground.engine.box
        for action in ("die", "destroy", "pause"):
            ground.engine._tell(action, box, 1)
        await until(lambda: ground.engine.calls.count("inspect") > before)
        await asyncio.sleep(1)
        assert one.usable_endpoint() is not None
        assert not one.is_silent
        assert "container_ended" not in ground.journal.kinds


@in_virtual_time
async def test_events_and_listings_of_others_cause_no_change() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        stranger = ground.engine.put("x", ground.labels)
        ground.engine._tell("exec_start", ground.engine.box if len(ground.engine.boxes) == 1 else stranger)
        ground.engine.end(stranger, 1)
        await ground.relist(one)
        await asyncio.sleep(1)
        assert phase(one) == "ready"


@in_virtual_time
async def test_a_pause_is_silent_and_says_how_it_ends() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        ground.engine.pause(ground.engine.box)
        await until(lambda: one.view().health is Health.UNHEALTHY, within_s=1)
        assert one.is_silent
        view = one.view()
        assert view.explanation is not None
        assert "docker unpause" in view.explanation.message
        await asyncio.sleep(10)
        ground.engine.pause(ground.engine.box, paused=False)
        await until(lambda: one.view().health is Health.HEALTHY, within_s=LIMITS.probe_interval_s + 1)
        assert not one.is_silent


@in_virtual_time
async def test_a_container_restarted_by_hand_is_adopted() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        box = ground.engine.box
        before = one.usable_endpoint()
        ground.engine.end(box, 0)
        ground.engine.run(box)
        await until(lambda: one.usable_endpoint() not in (None, before), within_s=5)
        assert one.view().target is Target.RUNNING


@pytest.mark.parametrize("how", ["stop", "end", "restart by hand"])
@in_virtual_time
async def test_that_its_server_has_gone_or_is_another_one_is_told(how: str) -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        changed = ground.servers_changed
        assert set(changed) == {one.id}
        changed.clear()
        if how == "stop":
            await one.stop()
        else:
            box = ground.engine.box
            ground.engine.end(box, 3)
            if how == "restart by hand":
                ground.engine.run(box)
            await until(lambda: changed, within_s=5)
        assert set(changed) == {one.id}
        if how != "restart by hand":
            changed.clear()
            await one.start()
            assert set(changed) == {one.id}, "a start makes a new server"


@in_virtual_time
async def test_a_killed_child_is_told_although_only_an_event_says_so() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        ground.engine.kill_child(ground.engine.box)
        await until(lambda: "out_of_memory" in ground.journal.kinds, within_s=2)
        assert phase(one) == "ready"


@in_virtual_time
async def test_a_pinned_instance_is_started_again_within_the_limits() -> None:
    async with on_ground() as ground:
        one = await ground.ready(pinned=True)
        ground.refusal = LimitReachedError("lifecycle.max_running is 1")
        ground.engine.end(ground.engine.box, 1)
        await until(lambda: "restart_refused" in ground.journal.kinds)
        await asyncio.sleep(5)
        assert (phase(one), ground.engine.calls.count("create")) == ("failed", 1)
        ground.refusal = None
        await until(lambda: phase(one) == "ready")
        assert one.view().starts == 2


@in_virtual_time
async def test_a_look_that_fails_is_repeated_or_recorded() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        ground.engine.refuses["inspect"] = [
            EngineUnreachableError("slow"),
            EngineError("odd", reason=Reason.START_FAILED),
        ]
        ground.engine.end(ground.engine.box, 1)
        await until(lambda: "look_failed" in ground.journal.kinds)
        await ground.relist(one)
        await until(lambda: phase(one) == "failed")


@in_virtual_time
async def test_a_burial_is_tried_again_and_spares_what_runs_again() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        ground.engine.tells = False
        box = ground.engine.box
        ground.engine.end(box, 1)
        await ground.relist(one)
        await until(lambda: phase(one) == "failed")
        ground.locks.refusal = LockedError("held")
        await until(lambda: "removal_failed" in ground.journal.kinds)
        ground.locks.refusal = None
        ground.engine.run(box)  # nothing tells
        await until(lambda: phase(one) == "ready")
        assert box.id in ground.engine.boxes


# --- a network that is lost ---


@pytest.mark.parametrize("leases", [0, 1])
@in_virtual_time
async def test_a_container_that_lost_its_network_is_connected_again(leases: int) -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        await asyncio.sleep(5)  # inspections after its start are over
        held = [await one.lease() for _ in range(leases)]
        before = ground.engine.box.id
        ground.engine.disconnect(ground.engine.box)
        # No event of the container says so, and no listing was due yet: a missed probe causes the inspection.
        await until(lambda: "reconnected" in ground.journal.kinds, within_s=3 * LIMITS.probe_interval_s)
        await until(lambda: one.usable_endpoint() is not None)
        assert ground.engine.box.id == before
        lease = await one.lease()
        assert await ground.engine.answers(f"{lease.endpoint}/api/version", 1)
        for given in (*held, lease):
            given.release()


@in_virtual_time
async def test_a_container_whose_network_was_removed_is_connected_to_a_new_one() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        ground.engine.networks.clear()
        ground.engine.disconnect(ground.engine.box)
        await until(lambda: "reconnected" in ground.journal.kinds)
        await until(lambda: one.usable_endpoint() is not None)
        assert NETWORK in ground.engine.networks


@in_virtual_time
async def test_a_container_found_without_a_network_is_connected_at_its_adoption() -> None:
    async with on_ground() as ground:
        ground.engine.disconnect(ground.engine.put(ground.name, ground.labels))
        one = await ground.listed(ground.supervisor())
        await until(lambda: phase(one) == "ready")


@in_virtual_time
async def test_a_network_that_refuses_is_tried_again() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        ground.engine.refuses["connect"] = [EngineError("no pool left", reason=Reason.START_FAILED)]
        ground.engine.disconnect(ground.engine.box)
        await until(lambda: "start_failed" in ground.journal.kinds)
        assert len(ground.engine.boxes) == 1
        await until(lambda: one.usable_endpoint() is not None)


# --- stopping ---


@in_virtual_time
async def test_a_stop_drains_ends_and_removes() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        lease = await one.lease()
        stopping = asyncio.ensure_future(one.stop())
        await until(lambda: phase(one) == "draining")
        assert one.usable_endpoint() is None
        assert one.try_lease() is None
        assert ground.engine.box.status == "running"
        lease.release()
        assert await stopping
        assert (phase(one), ground.engine.boxes, lease.cut) == ("stopped", {}, None)
        assert not await one.stop()
        assert ground.steps[-4:] == ["drained", "signalled", "ended", "removed"]


@pytest.mark.parametrize("how", ["stop", "drain", "keep running"])
@in_virtual_time
async def test_a_load_ends_with_the_service_of_its_instance(how: str) -> None:
    async with on_ground() as ground:
        one = await ground.ready()

        async def load() -> None:
            with await one.lease():
                async with one.until_out():
                    await asyncio.Event().wait()

        loading = asyncio.create_task(load())
        await until(lambda: one.in_flight == 1)
        began = ground.world.now()
        if how == "stop":
            assert await one.stop()
        else:
            one.take_out(Drained(ground.world.utcnow(), None, None, stops=how == "drain", ran=True))
            await one.out()
        assert ground.world.now() - began < LIMITS.drain_timeout_s
        with pytest.raises(UnavailableError, match="the load was cancelled") as caught:
            await loading
        assert caught.value.reason is Reason.CANCELLED
        with pytest.raises(UnavailableError):
            async with one.until_out():
                await asyncio.Event().wait()


async def test_a_time_out_of_the_work_itself_is_no_end_of_service() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        with pytest.raises(TimeoutError):
            async with one.until_out():
                raise TimeoutError


@pytest.mark.parametrize("force", [True, False])
@in_virtual_time
async def test_leases_that_outlast_the_drain_are_cut_and_say_so(*, force: bool) -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        lease = await one.lease()
        assert lease.cut is None
        began = ground.world.now()
        assert await one.stop(force=force)
        assert (ground.world.now() - began < LIMITS.drain_timeout_s) is force
        assert lease.cut == "cpu was stopped"
        fresh = await one.lease()
        assert fresh.cut is None
        lease.release()
        assert one.in_flight == 1


@in_virtual_time
async def test_a_force_ends_a_drain_that_goes_on() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        await one.lease()
        first = asyncio.ensure_future(one.stop())
        await until(lambda: phase(one) == "draining")
        began = ground.world.now()
        await one.stop(force=True)
        assert await first
        assert ground.world.now() - began < 5


@pytest.mark.parametrize("tells", [True, False])
@in_virtual_time
async def test_a_container_that_dies_in_its_drain_is_not_waited_for(*, tells: bool) -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        lease = await one.lease()
        stopping = asyncio.ensure_future(one.stop())
        await until(lambda: phase(one) == "draining")
        ground.engine.tells = tells
        began = ground.world.now()
        ground.engine.end(ground.engine.box, 1)
        await stopping
        assert ground.world.now() - began < (1 if tells else LIMITS.resync_interval_s + 1)
        lease.release()


@in_virtual_time
async def test_a_deaf_container_is_killed_and_an_immortal_one_is_tried_again() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        ground.engine.box.deaf = True
        await one.stop()
        assert ground.engine.calls.count("SIGKILL") == 1
        await one.start()
        ground.engine.box.immortal = True
        with pytest.raises(EngineError, match="did not end within"):
            await one.stop()
        view = one.view()
        assert view.explanation is not None
        assert "could not be stopped yet" in view.explanation.message
        ground.engine.box.immortal = False
        await until(lambda: phase(one) == "stopped")  # it stayed requested
        assert one.view().explanation is None


@pytest.mark.parametrize("step", ["stored", "created", "started"])
@in_virtual_time
async def test_a_stop_cancels_a_start_at_any_step(step: str) -> None:
    async with on_ground() as ground:
        one = await ground.listed(ground.supervisor())
        gate = ground.gates[step] = asyncio.Event()
        leasing = asyncio.ensure_future(one.lease())
        await until(lambda: step in ground.steps)
        del ground.gates[step]
        assert await one.stop()
        with pytest.raises(CancelledByStopError):
            await leasing
        assert (phase(one), ground.engine.boxes) == ("stopped", {})
        assert "SIGTERM" not in ground.engine.calls, "it was never ready"
        gate.set()
        (await one.lease()).release()


@in_virtual_time
async def test_a_start_that_had_not_begun_is_taken_back() -> None:
    async with on_ground() as ground:
        one = await ground.listed(ground.supervisor())
        assert one.begin_start()
        assert one.begin_stop()
        await asyncio.sleep(1)
        assert (phase(one), ground.engine.boxes) == ("stopped", {})


@in_virtual_time
async def test_a_lease_during_a_stop_waits_and_starts_again_if_there_is_a_place() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        gate = ground.gates["signalled"] = asyncio.Event()
        stopping = asyncio.ensure_future(one.stop())
        await until(lambda: phase(one) == "stopping")
        leasing = asyncio.ensure_future(one.lease())
        await asyncio.sleep(1)
        gate.set()
        lease = await leasing
        await stopping
        lease.release()
        assert one.view().starts == 2
        gate.clear()
        stopping = asyncio.ensure_future(one.stop())
        await until(lambda: phase(one) == "stopping")
        leasing = asyncio.ensure_future(one.lease())
        await asyncio.sleep(1)
        ground.refusal = LimitReachedError("lifecycle.max_running is 1")
        gate.set()
        with pytest.raises(LimitReachedError):
            await leasing
        await stopping
        assert one.view().target is Target.STOPPED


# --- idle ---


@in_virtual_time
async def test_an_unused_instance_is_stopped_and_a_used_one_is_not() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        assert not await one.stop_if_idle()
        await asyncio.sleep(LIMITS.ttl_s + 1)
        box = ground.engine.box
        box.network_bytes += 50_000  # somebody talks to it directly
        assert one.idle
        assert not await one.stop_if_idle()
        await asyncio.sleep(LIMITS.ttl_s + 1)
        assert await one.stop_if_idle()
        await one.stopped()
        assert phase(one) == "stopped"


@in_virtual_time
async def test_a_ttl_that_is_shortened_does_not_stop_an_instance_under_a_direct_user() -> None:
    async with on_ground() as ground:
        one = await ground.ready(limits=replace(LIMITS, ttl_s=600))
        lease = await one.lease()
        await asyncio.sleep(40)
        box = ground.engine.box
        talks = asyncio.ensure_future(_talk(box))
        await asyncio.sleep(20)
        lease.release()
        await asyncio.sleep(0.5)  # the window up to the next sample has held a lease
        await one.configure({"ttl_s": 0.3})
        assert one.idle
        assert not await one.stop_if_idle()
        talks.cancel()
        assert one.view().ttl_remaining_s is not None
        await asyncio.sleep(30)
        assert await one.stop_if_idle()


async def _talk(box: object, *, every_s: float = 0.1, cpu_s: float = 0.05) -> None:
    while True:
        box.network_bytes += 500  # type: ignore[attr-defined]
        box.cpu_s += cpu_s  # type: ignore[attr-defined]
        await asyncio.sleep(every_s)


@in_virtual_time
async def test_an_instance_makes_way_unless_it_is_used_or_pinned() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        lease = await one.lease()
        assert not await one.make_way("to make way")
        lease.release()
        talks = asyncio.ensure_future(_talk(ground.engine.box))
        await asyncio.sleep(1)
        assert not await one.make_way("to make way")
        talks.cancel()
        await one.configure({"pinned": True})
        assert not await one.make_way("to make way")
        await one.configure({"pinned": False})
        assert await one.make_way("to make way")
        assert phase(one) == "stopped"


@in_virtual_time
async def test_a_direct_user_with_pauses_is_not_evicted() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        talks = asyncio.ensure_future(_talk(ground.engine.box, every_s=0.9, cpu_s=0.2))
        await asyncio.sleep(1)
        assert not await one.make_way("to make way")
        talks.cancel()


@in_virtual_time
async def test_a_use_that_ends_during_the_looks_does_not_block_an_eviction() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        talks = asyncio.ensure_future(_talk(ground.engine.box))
        await asyncio.sleep(1)
        makes_way = asyncio.ensure_future(one.make_way("to make way"))
        await asyncio.sleep(0.95)  # the second look finds use as well
        talks.cancel()
        assert await makes_way
        assert phase(one) == "stopped"


# --- recreation ---


@in_virtual_time
async def test_a_recreation_that_came_due_under_a_lease_happens_after_its_release() -> None:
    async with on_ground() as ground:
        ground.engine.put(ground.name, ground.labels | {LABEL_HASH: "older"})
        one = await ground.listed(ground.supervisor())
        await until(lambda: phase(one) == "ready")
        lease = await one.lease()
        await asyncio.sleep(10 * LIMITS.resync_interval_s)
        assert "recreating" not in ground.journal.kinds
        lease.release()
        await until(lambda: one.view().starts == 1, within_s=3 * LIMITS.resync_interval_s)
        view = one.view()
        assert (view.phase, view.explanation) == (Phase.READY, None)
        assert ground.registry.rows["cpu"].recreated_at is not None


@in_virtual_time
async def test_a_recreation_waits_for_its_image() -> None:
    async with on_ground() as ground:
        ground.engine.put(ground.name, ground.labels | {LABEL_HASH: "older"})
        ground.engine.images.clear()
        one = await ground.listed(ground.supervisor())
        await until(lambda: "has_image" in ground.engine.calls)
        await asyncio.sleep(1)
        view = one.view()
        assert view.explanation is not None
        assert IMAGE in view.explanation.message
        ground.engine.images.add(IMAGE)
        ground.engine.refuses["has_image"] = [EngineError("odd", reason=Reason.START_FAILED)]
        await until(lambda: one.view().starts == 1)


@in_virtual_time
async def test_a_recreation_is_put_off_by_a_direct_user() -> None:
    async with on_ground() as ground:
        ground.engine.put(ground.name, ground.labels | {LABEL_HASH: "older"})
        one = await ground.listed(ground.supervisor())
        await until(lambda: phase(one) == "ready")
        talks = asyncio.ensure_future(_talk(ground.engine.box))
        await asyncio.sleep(5 * LIMITS.resync_interval_s)
        assert "recreating" not in ground.journal.kinds
        talks.cancel()
        await until(lambda: one.view().starts == 1)


# --- the engine goes away ---


@in_virtual_time
async def test_a_slow_ping_fails_no_start_that_goes_on() -> None:
    async with on_ground() as ground:
        ground.engine.template = {"ready_in_s": 8}
        one = await ground.listed(ground.supervisor())
        starting = asyncio.ensure_future(one.start())
        await until(lambda: "started" in ground.steps)
        one.engine_changed(up=False)
        await asyncio.sleep(2)
        one.engine_changed(up=True)
        assert await starting


@in_virtual_time
async def test_an_engine_that_stays_away_fails_those_who_wait() -> None:
    async with on_ground() as ground:
        ground.engine.template = {"ready_in_s": 50}
        one = await ground.listed(ground.supervisor())
        starting = asyncio.ensure_future(one.start())
        await until(lambda: "started" in ground.steps)
        began = ground.world.now()
        one.engine_changed(up=False)
        with pytest.raises(EngineUnreachableError):
            await starting
        assert ground.world.now() - began < 10
        with pytest.raises(EngineUnreachableError):
            one.begin_stop()
        with pytest.raises(EngineUnreachableError):
            await one.logs(5)
        assert one.view().explanation is not None
        one.engine_changed(up=True)
        await until(lambda: phase(one) == "ready")


@in_virtual_time
async def test_a_start_goes_on_while_the_engine_cannot_be_inspected() -> None:
    async with on_ground() as ground:
        ground.engine.template = {"ready_in_s": 5}
        one = await ground.listed(ground.supervisor())
        starting = asyncio.ensure_future(one.start())
        await until(lambda: "started" in ground.steps)
        ground.engine.down = True
        assert await starting


@in_virtual_time
async def test_what_a_failed_start_left_on_an_engine_that_went_away_is_found_later() -> None:
    async with on_ground() as ground:
        one = await ground.listed(ground.supervisor())
        gate = ground.gates["created"] = asyncio.Event()
        starting = asyncio.ensure_future(one.start())
        await until(lambda: "created" in ground.steps)
        ground.engine.down = True
        gate.set()
        with pytest.raises(EngineUnreachableError):
            await starting
        assert len(ground.engine.boxes) == 1
        ground.engine.down = False
        one.engine_changed(up=True)
        await until(lambda: not ground.engine.boxes)


# --- a closer look ---


@in_virtual_time
async def test_a_refused_connection_is_looked_into_within_a_second() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        ground.engine.tells = False
        began = ground.world.now()
        assert not await one.has_gone()  # it is there, whatever it refuses
        assert ground.world.now() - began <= 1.1
        ground.engine.end(ground.engine.box, 1)
        began = ground.world.now()
        assert await one.has_gone()
        assert ground.world.now() - began < 0.2
        assert await one.has_gone()


@in_virtual_time
async def test_an_engine_that_is_slow_to_notice_or_to_answer_does_not_hold_a_request_up() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        ground.engine.tells = False
        asyncio.get_running_loop().call_later(0.4, ground.engine.end, ground.engine.box, 1)
        assert await one.has_gone()
        await one.start()
        ground.engine.delays["inspect"] = 5
        began = ground.world.now()
        assert not await one.has_gone()
        assert ground.world.now() - began <= 1.1


# --- the rest ---


@in_virtual_time
async def test_logs_come_from_the_engine_or_from_what_was_kept() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        ground.engine.box.log += [(ground.engine.now(), line) for line in ("one", "two")]
        assert await one.logs(1) == ("two",)
        ground.engine.refuses["logs"] = [EngineError("gone", reason=Reason.CONTAINER_EXITED)]
        with pytest.raises(EngineError):
            await one.logs(1)
        await one.stop()
        assert await one.logs(5) == ("one", "two")
        await one.start()
        ground.engine.refuses["logs"] = [EngineError("gone", reason=Reason.CONTAINER_EXITED)]
        assert await one.logs(5) == ("one", "two")


@in_virtual_time
async def test_a_sweep_resumes_the_idle_time_and_starts_nothing() -> None:
    async with on_ground(sweeps=True) as ground:
        box = ground.engine.put(ground.name, ground.labels)
        box.started_at = ground.engine.now() - timedelta(seconds=LIMITS.ttl_s + 50)
        used_at = ground.engine.now() - timedelta(seconds=LIMITS.ttl_s + 1)
        row = InstanceRow("cpu", target=Target.RUNNING, last_used_at=used_at)
        one = await ground.listed(ground.supervisor(row=row))
        await until(lambda: phase(one) == "ready")
        assert not one.idle  # no counters were stored: what was done unseen counts as use
        ground.engine.delete(box)
        await until(lambda: phase(one) == "failed")
    async with on_ground(sweeps=True) as ground:
        row = InstanceRow("cpu", target=Target.RUNNING, pinned=True)
        one = await ground.listed(ground.supervisor(row=row))
        one.prewarm()
        await asyncio.sleep(5)
        await one.save_use()
        assert (phase(one), ground.registry.rows) == ("stopped", {})


@in_virtual_time
async def test_a_dry_run_finishes_no_stop_that_was_begun() -> None:
    async with on_ground(sweeps=True) as ground:
        ground.world = replace(ground.world, dry_run=True)
        box = ground.engine.put(ground.name, ground.labels)
        row = InstanceRow("cpu", target=Target.STOPPED, operation=Operation.STOP)
        one = await ground.listed(ground.supervisor(row=row))
        await until(lambda: phase(one) == "ready")
        assert list(ground.engine.boxes.values()) == [box]


@in_virtual_time
async def test_effort_is_what_the_counters_say() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        ground.engine.box.cpu_s = 7
        effort = await one.effort()
        assert effort is not None
        assert (effort.cpu_s, effort.vram_bytes) == (7, 0)
        ground.engine.down = True
        assert await one.effort() is None
        ground.engine.down = False
        await one.stop()
        assert await one.effort() is None


@in_virtual_time
async def test_an_engine_elsewhere_says_what_it_needs() -> None:
    async with on_ground() as ground:
        one = ground.supervisor()
        one.reach = None
        await ground.listed(one)
        with pytest.raises(UnavailableError, match="reach: network"):
            await one.start()
        assert one.reach is None
        assert one.why_unusable is not None
        assert phase(one) == "unavailable"


# --- containers of another state directory ---


@pytest.mark.parametrize("runs", [True, False])
@in_virtual_time
async def test_a_container_of_another_owner_is_never_adopted_stopped_or_removed(*, runs: bool) -> None:
    async with on_ground(owner=Owner("me")) as ground:
        box = ground.engine.put(ground.name, ground.labels | {LABEL_OWNER: "other"}, running=runs)
        one = await ground.listed(ground.supervisor())
        assert phase(one) == "stopped"
        with pytest.raises(NameConflictError) as caught:
            await one.start()
        assert "another daemon" in caught.value.message
        assert "rm" not in caught.value.message
        await one.stop()
        await ground.relist(one)
        await asyncio.sleep(3 * LIMITS.resync_interval_s)
        assert ground.engine.boxes == {box.id: box}
        assert box.status == ("running" if runs else "created")


@pytest.mark.parametrize("owner", [None, "me", "lost"])
@in_virtual_time
async def test_a_container_of_ours_or_of_what_was_taken_over_is_adopted(owner: str | None) -> None:
    async with on_ground(owner=Owner("me", frozenset({"lost"}))) as ground:
        ground.engine.put(ground.name, ground.labels | ({LABEL_OWNER: owner} if owner else {}))
        one = await ground.listed(ground.supervisor())
        await until(lambda: phase(one) == "ready")


@in_virtual_time
async def test_a_new_container_is_labelled_with_its_owner() -> None:
    async with on_ground(owner=Owner("me")) as ground:
        await ground.ready()
        assert ground.engine.box.labels[LABEL_OWNER] == "me"
