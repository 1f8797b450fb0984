"""A server that somebody else runs."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from manager.domain.instance import DeviceKind, Driver, Explanation, Health, InstanceSpec, Phase
from manager.errors import ConflictError, OutOfDescriptorsError, Reason, UnavailableError
from manager.services.instances.external import ExternalInstance
from tests.support.fake_engine import LIMITS, Box, Ground, on_ground
from tests.support.virtual import in_virtual_time, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@asynccontextmanager
async def external() -> AsyncIterator[tuple[Ground, ExternalInstance, Box]]:
    async with on_ground() as ground:
        box = ground.engine.put("nas", {})
        spec = InstanceSpec("nas", Driver.EXTERNAL, DeviceKind.CPU, LIMITS, url="http://nas:11434/")
        one = ExternalInstance(ground.world, spec)
        running = asyncio.ensure_future(one.run())
        await until(lambda: one.usable_endpoint() is not None)
        try:
            yield ground, one, box
        finally:
            running.cancel()
            await asyncio.wait({running})


@in_virtual_time
async def test_a_server_that_answers_is_ready_and_takes_leases() -> None:
    async with external() as (ground, one, _):
        view = one.view()
        assert (view.phase, view.health, view.endpoint) == (Phase.READY, Health.HEALTHY, "http://nas:11434")
        with await one.lease() as lease:
            assert lease.endpoint == "http://nas:11434"
            assert one.view().last_used_at == ground.engine.now()
        assert lease.cut is None
        assert one.take_room_for("any")
        await one.make_room_for("any")
        assert await one.effort() is None
        assert not await one.has_gone()


@in_virtual_time
async def test_one_missed_probe_is_a_busy_server_and_several_are_a_gone_one() -> None:
    async with external() as (ground, one, box):
        box.answers = False
        await one.probe()
        assert one.view().health is Health.UNHEALTHY
        assert one.try_lease() is not None
        box.answers = True
        await one.probe()
        assert one.view().phase is Phase.READY
        revision = ground.world.revision.number
        box.answers = False
        await until(lambda: one.view().phase is Phase.UNAVAILABLE, within_s=20)
        assert ground.world.revision.number > revision
        assert (one.usable_endpoint(), one.models) == (None, ())
        box.answers = True
        await until(lambda: one.usable_endpoint() is not None)


@in_virtual_time
async def test_the_third_missed_probe_in_a_row_is_the_end() -> None:
    async with external() as (_, one, _box):
        missed = (Health.UNHEALTHY, Explanation(Reason.INSTANCE_UNHEALTHY, "no answer"))
        for health, issue in (missed, missed, (Health.HEALTHY, None), missed, missed):
            one._set_health(health, issue)
            assert one.view().phase is Phase.READY
        one._set_health(*missed)
        assert one.view().phase is Phase.UNAVAILABLE


@in_virtual_time
async def test_it_is_never_started_or_stopped_from_here() -> None:
    async with external() as (_, one, box):
        with pytest.raises(ConflictError):
            await one.start()
        with pytest.raises(ConflictError):
            await one.stop()
        box.answers = False
        await until(lambda: one.usable_endpoint() is None)
        with pytest.raises(UnavailableError, match="does not answer"):
            await one.lease()


@in_virtual_time
async def test_a_lack_of_our_own_says_nothing_about_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    async with external() as (ground, one, _):

        async def lack(*_: object, **__: object) -> None:
            raise OutOfDescriptorsError

        monkeypatch.setattr(ground.engine, "probe", lack)
        await one.probe()
        assert one.view().health is Health.HEALTHY


@in_virtual_time
async def test_a_list_that_turned_out_wrong_is_read_again() -> None:
    async with external() as (_, one, _box):
        assert one.available_models == ("tiny",)
        before = one.listed_at
        await asyncio.sleep(1)
        await one.probe()
        assert one.listed_at == before
        one.read_models_soon()
        await one.probe()
        assert one.listed_at > before
        await asyncio.sleep(1)
        await one.probe(tags=True)
        assert one.listed_at > before + 1
