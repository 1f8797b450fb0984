"""`/api/runtime/compute/live` over real sockets: first everything, then what has changed."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from manager.api.live import LiveBody
from manager.services.requests_history import MOST_RECENT
from tests.support.inside import until
from tests.support.relaying import LAST, LINE, Caller, Conversation, Front, Scripted, relaying
from tests.support.storing import ask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

COMPUTE = "/api/runtime/compute"
SECTIONS = {"instances", "gpus", "lanes", "models", "missing", "fit", "pulls", "requests", "problems"}
TINY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
WHOLE = {**TINY, "stream": False}
CLOCKS = {"ttl_remaining_s", "last_used_at", "last_seen_at"}


class Subscriber:
    """One client of the live channel, with everything it has been sent."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self.frames: list[dict[str, Any]] = []
        self.now: dict[str, Any] = {}

    async def frame(self) -> dict[str, Any]:
        """Return the next frame; `now` has the latest value of each section."""
        while True:
            chunk = await self._caller.chunk()
            assert chunk, "the stream has ended"
            for event in chunk.decode().split("\n\n"):
                if event.startswith("data: "):
                    frame: dict[str, Any] = json.loads(event.removeprefix("data: "))
                    LiveBody.model_validate_json(event.removeprefix("data: "))
                    self.frames.append(frame)
                    self.now |= frame
                    return frame

    async def until(self, holds: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """Read until the latest values are such."""
        async with asyncio.timeout(20):
            while not holds(self.now):
                await self.frame()
        return self.now

    async def ended(self) -> None:
        await self._caller.ended()


def request(front: Front, headers: str = "") -> bytes:
    return f"GET {COMPUTE}/live HTTP/1.1\r\nHost: 127.0.0.1:{front.port}\r\n{headers}\r\n".encode()


def paused(front: Front) -> list[Any]:
    """Return the connections whose client does not read what is sent."""
    return [each for each in front.server.server_state.connections if each.flow.write_paused]


@asynccontextmanager
async def subscribed(front: Front, headers: str = "") -> AsyncIterator[Subscriber]:
    caller = await front.connect()
    try:
        await caller.raw(request(front, headers))
        status, answer = await caller.head()
        assert (status, answer["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert answer["cache-control"] == "no-cache"
        subscriber = Subscriber(caller)
        assert set(await subscriber.frame()) == {"revision", *SECTIONS}
        yield subscriber
    finally:
        caller.leave()


def one(values: list[dict[str, Any]], name: str, key: str = "id") -> dict[str, Any]:
    (found,) = [value for value in values if value[key] == name]
    return found


def without_clocks(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in CLOCKS}


async def test_the_first_frame_has_what_the_other_calls_answer(tmp_path: Path) -> None:
    async with Scripted(loaded=("tiny",)).serving() as server, relaying(tmp_path, {"a": server}) as front:
        await front.ask(WHOLE, headers={"X-Project-ID": "lab"})
        await front.ask({**WHOLE, "model": "unknown"})
        await until(lambda: len(front.records) == 2)
        async with subscribed(front) as subscriber:
            now = subscriber.now
            asked = {
                name: (await ask(front, "GET", f"{COMPUTE}/{name}")).json()
                for name in ("instances", "gpus", "lanes", "requests")
            }
        assert [*map(without_clocks, now["instances"])] == [
            *map(without_clocks, asked["instances"]["instances"])
        ]
        assert now["gpus"] == asked["gpus"]
        assert now["lanes"] == asked["lanes"]
        assert now["requests"] == asked["requests"]["requests"]
        assert [each["outcome"] for each in now["requests"]] == ["refused", "ok"]
        listed = (await ask(front, "GET", f"{COMPUTE}/models")).json()
        for name in ("models", "missing", "fit", "pulls"):
            assert now[name] == listed[name]
        (tiny,) = now["models"]
        assert (tiny["name"], tiny["instances"], tiny["loaded_on"]) == ("tiny:latest", ["a"], ["a"])
        assert (tiny["status"], tiny["offload"], tiny["family"]) == ("ready", 0.0, None)
        assert tiny["places"] == [
            {"volume": None, "instances": ["a"], "digest": "d", "size_bytes": 1, "may_change": True}
        ]
        assert tiny["lately"] == {"requests": 1, "input_tokens": 12, "output_tokens": 34}


async def test_a_request_is_followed_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def in_two(talk: Conversation) -> None:
        await talk.begin()
        await talk.chunk(LINE)
        await go_on.wait()
        await talk.chunk(LAST)
        await talk.end()

    async with (
        Scripted().serving() as server,
        relaying(tmp_path, {"a": server}) as front,
        subscribed(front) as subscriber,
    ):
        server.answer = in_two
        asking = asyncio.ensure_future(front.ask(TINY))
        now = await subscriber.until(lambda now: now["requests"] and now["instances"][0]["in_flight"])
        (request,) = now["requests"]
        assert (request["open"], request["outcome"], request["effective_target"]) == (True, None, "a")
        assert one(now["lanes"]["instances"], "a")["in_use"] == 1
        await subscriber.until(lambda now: now["models"][0]["status"] == "loading")
        await subscriber.until(lambda now: now["requests"][0]["ttfb_ms"] is not None)
        go_on.set()
        await asking
        now = await subscriber.until(lambda now: not now["instances"][0]["in_flight"])
        now = await subscriber.until(lambda now: now["requests"][0]["outcome"] == "ok")
        assert [each["request_id"] for each in now["requests"]] == [request["request_id"]]
        assert now["requests"][0]["output_tokens"] == 34


async def test_later_frames_have_only_what_has_changed_and_clocks_change_nothing(tmp_path: Path) -> None:
    async with (
        Scripted().serving() as server,
        relaying(tmp_path, {"a": server}) as front,
        subscribed(front) as subscriber,
    ):
        await subscriber.until(lambda now: now["models"])
        before = front.daemon.fleet.get("a").view().last_seen_at
        await until(lambda: front.daemon.fleet.get("a").view().last_seen_at != before)
        for name in ("bert", "llama"):
            server.models = (*server.models, name)
            frame = await subscriber.frame()
            assert set(frame) == {"revision", "models"}, "the models of a server that was seen many times"
            assert one(frame["models"], f"{name}:latest", "name")["instances"] == ["a"]
        revisions = [frame["revision"] for frame in subscriber.frames]
        assert revisions == sorted(set(revisions))


async def test_the_last_requests_are_there_after_a_restart(tmp_path: Path) -> None:
    async with Scripted().serving() as server:
        async with relaying(tmp_path, {"a": server}) as front:
            for _ in range(MOST_RECENT + 2):
                await front.ask(WHOLE)
            async with subscribed(front) as subscriber:
                before = subscriber.now["requests"]
            assert len(before) == MOST_RECENT
        async with relaying(tmp_path, {"a": server}) as front, subscribed(front) as subscriber:
            assert subscriber.now["requests"] == before
            await front.ask({**WHOLE, "model": "unknown"})
            now = await subscriber.until(lambda now: now["requests"][0]["outcome"] == "refused")
            assert now["requests"][1:] == before[:-1]


async def test_names_that_json_has_no_form_for_harm_no_subscriber(tmp_path: Path) -> None:
    async with (
        Scripted().serving() as server,
        relaying(tmp_path, {"a": server}) as front,
        subscribed(front) as subscriber,
    ):
        await front.ask(b'{"model":"half \\ud83d","messages":[]}')
        now = await subscriber.until(lambda now: now["requests"])
        assert "half" in json.dumps(now["requests"][0]["model"])
        await front.ask(WHOLE)
        await subscriber.until(lambda now: now["requests"][0]["outcome"] == "ok")


async def test_a_client_that_reads_nothing_holds_up_nobody_and_holds_little(tmp_path: Path) -> None:
    """It skips frames: what waits for it is one frame beyond what the socket takes."""
    names = tuple(f"{number:03}-{'long' * 500}" for number in range(500))
    async with (
        Scripted(names).serving() as server,
        relaying(tmp_path, {"a": server}) as front,
        subscribed(front) as subscriber,
    ):
        await subscriber.until(lambda now: len(now["models"]) == len(names))
        size, number = len(json.dumps(subscriber.now)), 0

        async def change() -> None:
            nonlocal number
            number += 1
            server.models = (*names, f"new-{number}")
            await subscriber.until(lambda now: now["models"][-1]["name"] == f"new-{number}:latest")

        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.setblocking(False)
            await asyncio.get_running_loop().sock_connect(slow, ("127.0.0.1", front.port))
            slow.sendall(request(front))
            while not paused(front):
                await change()  # the system takes some megabytes
            (stuck,) = paused(front)
            held = stuck.transport.get_write_buffer_size()
            assert held < 2 * size
            for _ in range(4):
                await change()
            assert stuck.transport.get_write_buffer_size() == held, "nothing was added"


async def test_one_subscriber_too_many_is_refused_and_places_come_back(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        callers = []
        for _ in range(256):
            caller = await front.connect()
            callers.append(caller)
            await caller.raw(request(front))
            assert (await caller.head())[0] == 200
        refused = await ask(front, "GET", f"{COMPUTE}/live")
        assert (refused.status, refused.json()["error"]["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        server.models = ("tiny", "bert")
        subscribers = [*map(Subscriber, callers)]
        await asyncio.gather(
            *(each.until(lambda now: len(now.get("models", ())) == 2) for each in subscribers)
        )
        for caller in callers:
            caller.leave()

        async def place() -> bool:
            caller = await front.connect()
            await caller.raw(request(front))
            status, _ = await caller.head()
            caller.leave()
            return status == 200

        async with asyncio.timeout(20):
            while not await place():
                pass


async def test_a_key_without_the_scope_gets_nothing(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}, key="secret") as front:
        assert (await ask(front, "GET", f"{COMPUTE}/live")).status == 401
        async with subscribed(front, "Authorization: Bearer secret\r\n"):
            pass


async def test_a_stop_ends_the_stream_and_waits_for_nobody(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        caller = await front.connect()
        await caller.raw(request(front))
        assert (await caller.head())[0] == 200
        front.server.should_exit = True
        async with asyncio.timeout(10):
            await caller.ended()
        caller.leave()
