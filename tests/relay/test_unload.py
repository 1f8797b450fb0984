"""An unload starts nothing, and reaches every instance that holds the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support.inside import until
from tests.support.relaying import Conversation, Scripted, relaying

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.relaying import Front

UNLOAD = {"model": "tiny", "keep_alive": 0}


async def unloads(talk: Conversation) -> None:
    await talk.whole(200, b'{"model":"tiny","response":"","done":true,"done_reason":"unload"}')


async def test_a_model_that_two_instances_hold_is_unloaded_from_both(tmp_path: Path) -> None:
    """R9: with one request to one address, nothing of the model stays in memory."""
    async with (
        Scripted(loaded=("tiny",)).serving() as one,
        Scripted(loaded=("tiny",)).serving() as other,
        relaying(tmp_path, {"a": one, "b": other}) as front,
    ):
        one.answer = other.answer = unloads
        await until(lambda: all(instance.models for instance in front.daemon.fleet.instances()))
        reply = await front.ask(UNLOAD, "/api/generate")
        assert (reply.status, reply.json()["done_reason"]) == (200, "unload")
        assert [seen.json()["keep_alive"] for seen in (*one.seen, *other.seen)] == [0, 0]
        assert (len(one.seen), len(other.seen)) == (1, 1)
        await until(lambda: front.at_rest)


async def test_an_unload_of_a_model_that_no_instance_has_is_not_found(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        reply = await front.ask({**UNLOAD, "model": "nope"}, "/api/generate")
        assert reply.status == 404
        assert server.seen == []


async def test_no_instance_is_said_to_hold_a_model_that_was_unloaded(tmp_path: Path) -> None:
    """`ollama stop NAME` followed by `ollama ps`: within the second in which lists are shared, too."""
    one, other = Scripted(loaded=("tiny",)), Scripted(loaded=("tiny",))

    async def one_unloads(talk: Conversation) -> None:
        one.loaded = ()
        await unloads(talk)

    async def other_unloads(talk: Conversation) -> None:
        other.loaded = ()
        await unloads(talk)

    one.answer, other.answer = one_unloads, other_unloads
    async with (
        one.serving(),
        other.serving(),
        relaying(tmp_path, {"a": one, "b": other}, config={"lifecycle": {"probe_interval_s": 60}}) as front,
    ):
        await until(lambda: all(instance.models for instance in front.daemon.fleet.instances()))
        assert await loaded(front) == ["tiny:latest"] * 2
        assert (await front.ask(UNLOAD, "/api/generate")).status == 200
        assert await loaded(front) == []


async def loaded(front: Front) -> list[str]:
    """The models that /api/ps lists."""
    caller = await front.connect()
    try:
        await caller.raw(b"GET /api/ps HTTP/1.1\r\nHost: localhost\r\n\r\n")
        return [model["name"] for model in (await caller.reply()).json()["models"]]
    finally:
        caller.leave()
