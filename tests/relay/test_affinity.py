"""A conversation goes back to the instance that has it in memory."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from tests.support.inside import until
from tests.support.relaying import LAST, Conversation, Scripted, relaying

if TYPE_CHECKING:
    from pathlib import Path


def turn(subject: str, number: int) -> dict[str, Any]:
    said = [{"role": "system", "content": "Be short."}, {"role": "user", "content": subject}]
    for _ in range(number):
        said += [{"role": "assistant", "content": "So."}, {"role": "user", "content": "And then?"}]
    return {"model": "tiny", "messages": said, "stream": False}


async def test_every_turn_goes_where_the_first_one_went_and_others_are_spread(tmp_path: Path) -> None:
    goes_on = asyncio.Event()

    async def waits(talk: Conversation) -> None:
        await goes_on.wait()
        await talk.whole(200, LAST.strip())

    async with AsyncExitStack() as stack:
        servers = {
            name: await stack.enter_async_context(Scripted(loaded=("tiny",)).serving()) for name in ("a", "b")
        }
        front = await stack.enter_async_context(relaying(tmp_path, servers))
        for server in servers.values():
            server.answer = waits
        first = [asyncio.ensure_future(front.ask(turn(subject, 0))) for subject in ("gold", "rum")]
        await until(lambda: all(server.seen for server in servers.values()))
        goes_on.set()
        where = [(await one).headers["x-instance"] for one in first]
        assert sorted(where) == ["a", "b"], "of two at once each instance gets one"
        for number in range(1, 4):
            for subject, instance in zip(("rum", "gold"), reversed(where), strict=True):
                reply = await front.ask(turn(subject, number))
                assert reply.headers["x-instance"] == instance

        goes_on.clear()
        there = servers[where[0]]
        there.seen.clear()
        pinned = {**turn("other", 0), "model": f"tiny@{where[0]}"}
        busy = [asyncio.ensure_future(front.ask(pinned)) for _ in range(2)]
        await until(lambda: len(there.seen) == 2)
        moved = asyncio.ensure_future(front.ask(turn("gold", 4)))
        await until(lambda: front.in_flight(where[1]) == 1)
        goes_on.set()
        assert (await moved).headers["x-instance"] == where[1], "its own is busier by two"
        await asyncio.gather(*busy)
        assert (await front.ask(turn("gold", 5))).headers["x-instance"] == where[1], "it is there now"


async def test_a_conversation_stays_where_it_is_within_the_instances_of_a_role(tmp_path: Path) -> None:
    goes_on = asyncio.Event()
    goes_on.set()

    async def answers(talk: Conversation) -> None:
        await goes_on.wait()
        await talk.whole(200, LAST.strip())

    async def is_broken(talk: Conversation) -> None:
        await talk.whole(500, b'{"error":"something went wrong"}')

    roles = {"roles": {"chat": {"model": "tiny", "instances": ["a", "b"]}}}
    async with AsyncExitStack() as stack:
        servers = {
            name: await stack.enter_async_context(Scripted(loaded=("tiny",)).serving()) for name in ("a", "b")
        }
        front = await stack.enter_async_context(relaying(tmp_path, servers, config=roles))

        async def asked(subject: str, number: int) -> dict[str, str]:
            return (await front.ask({**turn(subject, number), "model": "chat"})).headers

        servers["a"].answer = is_broken
        servers["b"].answer = answers
        assert (await asked("gold", 0))["x-instance"] == "b"
        servers["a"].answer = answers
        for number in range(1, 4):
            headers = await asked("gold", number)
            assert (headers["x-instance"], headers.get("x-fallback")) == ("b", None)
            assert (await asked(f"other {number}", 0))["x-instance"] == "a", "the order of the role holds"

        goes_on.clear()
        busy = [asyncio.ensure_future(front.ask({**turn("x", 0), "model": "tiny@b"})) for _ in range(2)]
        await until(lambda: front.in_flight("b") == 2)
        moved = asyncio.ensure_future(asked("gold", 4))
        await until(lambda: front.in_flight("a") == 1)
        goes_on.set()
        assert (await moved)["x-instance"] == "a", "its own is busier by two"
        await asyncio.gather(*busy)

        servers["b"].loaded = ()
        servers["a"].answer = is_broken
        assert (await asked("rum", 0))["x-instance"] == "b"
        servers["a"].answer = answers
        await until(lambda: not front.daemon.fleet.get("b").models)
        assert (await asked("rum", 1))["x-instance"] == "a", "what it had in memory is gone"
