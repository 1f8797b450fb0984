"""Those who talk to a container's endpoint directly: their use counts, and nothing else does."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import aiohttp
import pytest
import pytest_asyncio

from tests.support.inside import Inside, only_mine, run_inside, until, write_configuration
from tests.support.talk import set_knobs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.support.engine import Engine

TTL_S = 2.0
USED_FOR_S = 6.0


async def stream_slowly(endpoint: str) -> None:
    await set_knobs(endpoint, tokens=int(USED_FOR_S * 5), tokens_per_s=5)
    await generate(endpoint, stream=True)


async def answer_in_one_piece(endpoint: str) -> None:
    await set_knobs(endpoint, tokens=10, tokens_per_s=10 / USED_FOR_S, burn_cpu=True)
    await generate(endpoint, stream=False)


async def keep_a_model_in_memory(endpoint: str) -> None:
    ends_at = time.monotonic() + USED_FOR_S
    while time.monotonic() < ends_at:
        await load(endpoint, keep_alive="10m")
        await asyncio.sleep(0.5)


async def upload(endpoint: str) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        ends_at = time.monotonic() + USED_FOR_S
        while time.monotonic() < ends_at:
            yield bytes(32_768)
            await asyncio.sleep(0.1)

    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{endpoint}/api/blobs/sha256:{'0' * 64}", data=pieces()) as answer,
    ):
        assert answer.status == 400  # the digest is wrong, which is only known at the end


async def load_once(endpoint: str) -> None:
    await load(endpoint, keep_alive=-1)


async def nothing(_endpoint: str) -> None: ...


USES: dict[str, Callable[[str], Awaitable[None]]] = {
    "stream": stream_slowly,
    "answer": answer_in_one_piece,
    "model": keep_a_model_in_memory,
    "upload": upload,
}
NO_USES: dict[str, Callable[[str], Awaitable[None]]] = {"loaded": load_once, "quiet": nothing}


async def generate(endpoint: str, *, stream: bool) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"{endpoint}/api/generate", json={"model": "tiny", "prompt": "why", "stream": stream}
        ) as answer,
    ):
        assert answer.status == 200
        text = await answer.text()
        assert '"done":true' in text


async def load(endpoint: str, *, keep_alive: str | int) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{endpoint}/api/generate", json={"model": "tiny", "keep_alive": keep_alive}) as answer,
    ):
        assert answer.status == 200


@dataclass(frozen=True, slots=True)
class Seen:
    """What became of an instance: times in seconds since the epoch."""

    use_ended_at: float
    answered: bool
    stopping_at: float
    ready_at: float


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def seen(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """All kinds of use at once, each of an instance of its own."""
    everything = {**USES, **NO_USES}
    manager_id = f"direct{time.time_ns() % 10**9}"
    file = write_configuration(
        tmp_path_factory.mktemp("direct"),
        manager_id,
        engine.url,
        instances={name: {"template": "sim", "ttl_s": TTL_S} for name in everything},
        templates={},
        lifecycle={},
    )
    with only_mine(engine, manager_id):
        async with run_inside(file) as inside:
            found = await asyncio.gather(*(_watch(inside, name, use) for name, use in everything.items()))
            return dict(zip(everything, found, strict=True))


async def _watch(inside: Inside, name: str, use: Callable[[str], Awaitable[None]]) -> Seen:
    instance = inside.get(name)
    await instance.start()
    endpoint = instance.usable_endpoint()
    assert endpoint is not None
    try:
        await use(endpoint)
        answered = True
    except aiohttp.ClientError:  # cut off
        answered = False
    ended_at = time.time()
    await until(lambda: inside.phase(name) == "stopped")
    return Seen(ended_at, answered, inside.moments(name, "stopping")[0], inside.moments(name, "ready")[0])


@pytest.mark.parametrize("kind", USES)
@pytest.mark.asyncio(loop_scope="module")
async def test_use_of_the_endpoint_keeps_an_instance_and_its_end_lets_it_go(
    seen: dict[str, Seen], kind: str
) -> None:
    assert seen[kind].answered
    assert seen[kind].use_ended_at - seen[kind].ready_at > 2 * TTL_S
    assert seen[kind].stopping_at > seen[kind].use_ended_at


@pytest.mark.parametrize("kind", NO_USES)
@pytest.mark.asyncio(loop_scope="module")
async def test_a_model_that_is_merely_in_memory_is_no_use(seen: dict[str, Seen], kind: str) -> None:
    assert seen[kind].stopping_at - seen[kind].ready_at >= TTL_S
    assert seen[kind].stopping_at < min(seen[use].stopping_at for use in USES)
