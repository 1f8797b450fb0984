"""The answer with the history of the cards: by columns, built once for each sample, of a bounded size."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import FastAPI

import manager.api.gpu_history as route
from manager.api.errors import add_error_handlers
from manager.api.gpu_history import GpuHistoryBody, gpu_history_router
from manager.services.gpus import GpuHistory
from manager.services.gpus.history import STEP_S, Span
from tests.support.gpu_machine import GIB, A, Machine, card, filled

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from manager.services.gpus import Gpus

URL = "/api/runtime/compute/gpus/history"


class Stage:
    """Cards, their history, and a client that asks for it."""

    def __init__(self, machine: Machine, gpus: Gpus, client: httpx.AsyncClient, history: GpuHistory) -> None:
        self.machine = machine
        self.gpus = gpus
        self.client = client
        self.history = history

    async def take(self, *cards: Any, steps: int = 1) -> None:
        for _ in range(steps):
            await self.machine.show(self.gpus, *cards)
            self.history.take()
            self.machine.advance(STEP_S)


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    machine = Machine()
    machine.names = {8: "python3\x1b[31m<script>"}
    gpus = await machine.gpus(gpu0=A)
    nothing: Any = None
    history = GpuHistory(gpus, nothing, now=machine.now, utcnow=lambda: machine.time)
    backend: Any = SimpleNamespace(gpu_history=history)
    api, router = FastAPI(), gpu_history_router(backend)
    api.include_router(router)
    add_error_handlers(api, list(router.routes))
    transport = httpx.ASGITransport(app=api)
    async with httpx.AsyncClient(transport=transport, base_url="http://manager") as client:
        yield Stage(machine, gpus, client, history)


async def test_the_answer_is_by_columns_with_null_where_nothing_was_read(stage: Stage) -> None:
    await stage.take(filled((8, GIB)))
    stage.machine.advance(STEP_S)
    await stage.take(filled())
    body = (await stage.client.get(URL)).json()
    GpuHistoryBody.model_validate(body)
    begin = int(stage.machine.now()) - 3 * STEP_S
    assert body == {
        "span_s": 3600,
        "step_s": 5,
        "gpus": [
            {
                "uuid": A,
                "name": "Card",
                "vram_total_bytes": 24 * GIB,
                "times": [begin, begin + 5, begin + 10],
                "used_bytes": [GIB, None, 0],
                "instances": {},
                "processes": {"python3\x1b[31m<script>": [GIB, None, 0]},
                "utilisation_percent": [None] * 3,
                "temperature_c": [None] * 3,
                "power_watts": [None] * 3,
            }
        ],
    }


async def test_a_document_is_built_once_for_each_sample(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    build = route._document

    def counted(span: Any, cards: Any) -> bytes:
        built.append(span)
        return build(span, cards)

    monkeypatch.setattr(route, "_document", counted)
    await stage.take(card(A))
    answers = await asyncio.gather(*(stage.client.get(URL) for _ in range(20)))
    assert len({answer.content for answer in answers}) == 1
    assert built == ["1h"]
    await stage.client.get(f"{URL}?span=24h")
    await stage.client.get(f"{URL}?gpu={A}")
    assert built == ["1h", "24h", "1h"]
    await stage.take(card(A))
    assert len((await stage.client.get(URL)).json()["gpus"][0]["times"]) == 2
    await stage.client.get(f"{URL}?span=24h")
    assert built == ["1h", "24h", "1h", "1h"], "the day has no new sample"


async def test_another_card_and_another_span_are_refused(stage: Stage) -> None:
    await stage.take(card(A))
    assert (await stage.client.get(f"{URL}?gpu=GPU-x")).json()["error"]["code"] == "unknown_gpu"
    for query in ("span=2h", "gpus=x", f"gpu={'x' * 101}"):
        assert (await stage.client.get(f"{URL}?{query}")).status_code == 422


async def test_sixteen_full_cards_hold_the_loop_up_for_a_moment_only(stage: Stage) -> None:
    for n in range(24):
        stage.machine.names[100 + n] = f"program{n}"
    holders = [(100 + n, GIB + n) for n in range(24)]
    cards = [filled(*holders, uuid=f"GPU-{n:02}") for n in range(16)]
    await stage.take(*cards, steps=721)
    begun = time.perf_counter()
    found = stage.history.cards(Span.HOUR)
    copied_s = time.perf_counter() - begun
    assert len(found) == 16
    assert copied_s < 0.01
    answer = await stage.client.get(URL)
    assert len(answer.json()["gpus"][15]["processes"]) == 9
    assert len(answer.content) < 16 * 720 * (5 + 9) * 14
