"""Routes of the control API in a daemon that has just started."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import FastAPI

from manager.adapters.docker_answers import not_pulled
from manager.api.compute import compute_router
from manager.api.errors import add_error_handlers
from manager.domain.instance import Phase
from manager.errors import EngineUnreachableError
from manager.services.models.model_lists import ModelLists
from manager.services.overview import Overviews
from tests.support.breakers import quiet_breakers
from tests.support.fleet_rig import IMAGE, Rig, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PREFIX = "/api/runtime/compute"


class LateEngine:
    """Holds the first ping of a rig's engine back until `answers` is set; `trouble` makes it fail then."""

    def __init__(self, rig: Rig) -> None:
        self.answers = asyncio.Event()
        self.trouble: str | None = None
        self._ping = rig.engine.ping
        rig.engine.ping = self._late_ping  # type: ignore[method-assign]

    async def _late_ping(self, timeout_s: float) -> None:
        await self.answers.wait()
        if self.trouble is not None:
            raise EngineUnreachableError(self.trouble)
        await self._ping(timeout_s)


@asynccontextmanager
async def client_of(rig: Rig) -> AsyncIterator[httpx.AsyncClient]:
    lists: Any = ModelLists(None, None, {})  # type: ignore[arg-type]
    cards: Any = rig.cards
    settings: Any = SimpleNamespace(version=1, routing=SimpleNamespace(roles={}))
    backend: Any = SimpleNamespace(
        fleet=rig.fleet,
        capacity=rig.capacity,
        sweeps=rig.sweeps,
        link=rig.link,
        first_look=rig.first_look,
        engine=rig.engine,
        overviews=Overviews(
            rig.fleet,
            rig.capacity,
            [rig.link],
            [cards],
            lists=lists,
            settings=settings,
            breakers=quiet_breakers(),
        ),
        may_pull=lambda _image: True,
    )
    api, router = FastAPI(), compute_router(backend)
    api.include_router(router)
    add_error_handlers(api, list(router.routes))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=api), base_url="http://manager", timeout=10
    ) as client:
        yield client


CALLS = {
    "start": ("POST", "/instances/a/start", 200),
    "start without waiting": ("POST", "/instances/a/start?wait=false", 202),
    "stop": ("POST", "/instances/a/stop", 200),
    "stop without waiting": ("POST", "/instances/a/stop?wait=false", 202),
    "logs": ("GET", "/instances/a/logs", 200),
    "sweep": ("POST", "/reap", 200),
}


@pytest.mark.parametrize("call", CALLS)
async def test_a_call_waits_until_the_engine_was_asked_for_the_first_time(call: str) -> None:
    method, path, status = CALLS[call]
    rig = Rig("a")
    if call in ("stop", "stop without waiting", "logs"):
        rig.engine.put("m-ollama-a", "a")
    engine = LateEngine(rig)
    async with client_of(rig) as client, rig.running(settled=False):
        waiting = asyncio.ensure_future(client.request(method, PREFIX + path))
        done, _ = await asyncio.wait({waiting}, timeout=0.1)
        assert not done, waiting.result().text
        engine.answers.set()
        answer = await waiting
        assert answer.status_code == status, answer.text
        if call.startswith("stop"):
            assert answer.json()["changed"], "a container that the daemon has not seen yet counts"
            await until(lambda: rig.view("a").phase is Phase.STOPPED)


@pytest.mark.parametrize("call", [*CALLS, "pull"])
async def test_an_engine_that_is_away_is_still_reported(call: str) -> None:
    method, path, _ = CALLS.get(call, ("POST", "/pull", 0))
    rig = Rig("a")
    engine = LateEngine(rig)
    engine.trouble = "it is away"
    async with client_of(rig) as client, rig.running(settled=False):
        body: dict[str, str] | None = {} if call == "pull" else None
        waiting = asyncio.ensure_future(client.request(method, PREFIX + path, json=body))
        done, _ = await asyncio.wait({waiting}, timeout=0.1)
        assert not done, waiting.result().text
        engine.answers.set()
        answer = await waiting
        if call == "logs":  # there is no container, and none was kept
            assert (answer.status_code, answer.text) == (200, "")
        else:
            assert answer.status_code == 503, answer.text
            assert answer.json()["error"]["code"] == "engine_unavailable"


async def test_an_unknown_or_external_instance_is_refused_without_waiting() -> None:
    rig = Rig("a")
    rig.add_external()
    async with client_of(rig) as client, asyncio.timeout(5):
        for name, status in (("gone", 404), ("nas", 409)):
            for call in ("start", "stop"):
                answer = await client.post(f"{PREFIX}/instances/{name}/{call}")
                assert answer.status_code == status, answer.text


async def test_an_image_that_is_kept_is_named_once() -> None:
    rig = Rig("a")

    async def pull(image: str) -> AsyncIterator[None]:
        raise not_pulled(image, "no such host")
        yield

    rig.engine.pull = pull  # type: ignore[attr-defined]
    async with client_of(rig) as client, rig.running():
        answer = await client.post(f"{PREFIX}/pull", json={})
    kept, done = answer.text.splitlines()
    assert kept.count(IMAGE) == 1
    assert '"status":"kept: could not be pulled: no such host; ' in kept
    assert done == '{"status":"done"}'
