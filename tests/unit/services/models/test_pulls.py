"""Downloads of models: what a line costs, who gets which, and when the old model is unloaded."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.target import Target
from manager.errors import UnknownPullError
from manager.services.instances.leases import Lease
from manager.services.models.pull import Pull, PullFailedError, Waiter
from manager.services.models.pulls import _MOST_REFUSAL_BYTES, Pulls
from manager.wire.management import read_named

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

BODY = read_named(b'{"model":"big"}')
SUCCESS = b'{"status":"success"}\n'


def layer(number: int, completed: int = 0, total: int = 10) -> bytes:
    status, digest = f"pulling {number:012}", f"sha256:{number:064}"
    return (
        json.dumps({"status": status, "digest": digest, "total": total, "completed": completed}).encode()
        + b"\n"
    )


class Rig:
    """A server that answers a pull with `pieces`, and a volume that notes what is done to it."""

    def __init__(self, pieces: list[bytes], status: int = 200) -> None:
        self.pieces = pieces
        self.status = status
        self.pieces_read = 0
        self.asked = 0
        self.begun = asyncio.Event()
        self.held: asyncio.Event | None = None
        self.does: str | None = None
        self.defect: Exception | None = None
        self.done: list[str] = []
        self.pulls = Pulls(self, self, now=lambda: 0.0)  # type: ignore[arg-type]

    # --- volumes ---

    def doing(self, _volume: str) -> str | None:
        return self.does

    @asynccontextmanager
    async def alone(self, _volume: str, _what: str) -> AsyncIterator[None]:
        yield

    async def writer(self, _volume: str) -> Any:
        return SimpleNamespace(lease=Lease(Target("a", "http://a"), lambda: None), start_ms=None)

    async def changed(self, instance: str) -> None:
        self.done.append(f"read {instance}")

    async def unload_elsewhere(self, volume: str, model: str, *, except_on: str) -> None:
        self.done.append(f"unload {model} on {volume} but {except_on}")

    # --- the server ---

    @asynccontextmanager
    async def ask(self, _question: object) -> AsyncIterator[Any]:
        self.asked += 1
        self.begun.set()
        if self.defect is not None:
            raise self.defect
        if self.held is not None:
            await self.held.wait()
        pieces = iter([*self.pieces, b""])

        async def piece() -> bytes:
            self.pieces_read += 1
            return next(pieces)

        yield SimpleNamespace(status=self.status, piece=piece)

    # --- clients ---

    async def lines(self, *, pause: Callable[[], Any] | None = None) -> list[bytes]:
        found = []
        with self.pulls.join("v", BODY) as waiter:
            async for line in waiter:
                found.append(line)
                if pause is not None:
                    await pause()
        return found

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.ensure_future(self.pulls.run())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def pieces_of(body: bytes, size: int) -> list[bytes]:
    return [body[start : start + size] for start in range(0, len(body), size)]


# --- what a line costs ----------------------------------------------------------------------------

MANY = 20_000


@pytest.mark.parametrize("waiters", [1, 20])
@pytest.mark.parametrize("piece", [1000, 256 * 1024])
async def test_a_pull_of_twenty_thousand_parts_takes_linear_time_and_gives_others_their_turn(
    waiters: int, piece: int
) -> None:
    rig = Rig(pieces_of(b"".join(map(layer, range(MANY))) + SUCCESS, piece))
    turns, longest, ended = 0, 0.0, False

    async def others() -> None:
        nonlocal turns, longest
        last = time.perf_counter()
        while not ended:
            await asyncio.sleep(0)
            now = time.perf_counter()
            turns, longest, last = turns + 1, max(longest, now - last), now

    async with rig.running():
        other = asyncio.ensure_future(others())
        began = time.perf_counter()
        found = await asyncio.gather(*(rig.lines() for _ in range(waiters)))
        took = time.perf_counter() - began
        ended = True
        await other
    assert {lines[-1] for lines in found} == {SUCCESS}
    assert turns > MANY / 100
    assert longest < 0.5
    assert took < 10, "quadratic work took minutes"


async def test_a_client_that_keeps_up_gets_every_line() -> None:
    rig = Rig([layer(number) for number in range(1000)] + [SUCCESS])
    async with rig.running():
        assert await rig.lines() == [*map(layer, range(1000)), SUCCESS]


async def test_a_client_that_is_slow_gets_the_newest_line_about_each_part_and_the_last_of_all() -> None:
    pull = Pull("v", BODY)
    with Waiter(pull, lambda _: None) as slow:
        for number in range(10_000):
            pull.tell(layer(number % 3, number), (f"{number % 3}", None))
        pull.tell(SUCCESS, ("success", None))
        pull.end(None)
        assert [line async for line in slow] == [layer(1, 9997), layer(2, 9998), layer(0, 9999), SUCCESS]


async def test_what_is_kept_of_a_pull_is_bounded_for_all_clients_together() -> None:
    pull = Pull("v", BODY)
    with Waiter(pull, lambda _: None) as slow:
        for number in range(10_000):
            pull.tell(layer(number), (f"{number}", None))
        pull.tell(SUCCESS, ("success", None))
        assert len(pull.summary()) == len(pull.lines_since(0)) == 256
        pull.end(None)
        lines = [line async for line in slow]
    assert lines == [*map(layer, range(10_000 - 255, 10_000)), SUCCESS]
    assert [line async for line in Waiter(pull, lambda _: None)] == lines, "one that comes later"


async def test_a_client_that_comes_later_gets_the_last_line_about_each_part_once() -> None:
    pull = Pull("v", BODY)
    for number in range(5):
        pull.tell(layer(0, number), ("0", None))
    late = Waiter(pull, lambda _: None)
    pull.tell(layer(1), ("1", None))
    pull.end(None)
    assert [line async for line in late] == [layer(0, 4), layer(1)]


async def test_a_pull_without_lines_or_without_success_fails() -> None:
    for pieces, message in (
        ([b"x" * 100_000], "no lines"),
        ([layer(0)], "before its end"),
        ([b'{"error":"no such host"}'], "no such host"),
        ([layer(0)[:-5]], "before its end"),
    ):
        rig = Rig(pieces)
        async with rig.running():
            with pytest.raises(PullFailedError, match=message):
                await rig.lines()


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([b'{"error":', b'"no such model"}'], "no such model"),
        ([b"<html>"], "a answered with status 500"),
        ([], "a answered with status 500"),
    ],
)
async def test_a_pull_that_the_server_refuses_fails_with_its_message_and_status(
    pieces: list[bytes], message: str
) -> None:
    rig = Rig(pieces, status=500)
    async with rig.running():
        with pytest.raises(PullFailedError) as caught:
            await rig.lines()
    assert (caught.value.message, caught.value.status) == (message, 500)
    assert rig.done == []


async def test_a_refusal_of_a_pull_is_read_up_to_a_bound() -> None:
    rig = Rig([bytes(_MOST_REFUSAL_BYTES // 2)] * 10, status=500)
    async with rig.running():
        with pytest.raises(PullFailedError, match="status 500"):
            await rig.lines()
    assert rig.pieces_read == 2


# --- what is done to the volume -------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 7, 1000])
async def test_the_list_is_read_before_a_client_has_the_line_success(piece: int) -> None:
    rig = Rig(pieces_of(b'{"status":"pulling manifest"}\n' + SUCCESS, piece))
    async with rig.running():
        with rig.pulls.join("v", BODY) as waiter:
            async for line in waiter:
                assert line != SUCCESS or rig.done == ["read a"]
    assert rig.done == ["read a"]


async def test_a_model_that_is_replaced_is_unloaded_elsewhere_once_all_of_the_new_one_is_here() -> None:
    lines = [
        layer(1),
        layer(1, 10),
        b'{"status":"verifying sha256 digest"}\n',
        b'{"status":"writing manifest"}\n',
    ]
    rig = Rig([*lines, SUCCESS])
    async with rig.running():
        await rig.lines()
    assert rig.done == ["unload big on v but a", "read a"]


async def test_a_model_that_is_here_already_stays_loaded() -> None:
    lines = [layer(1, 10), layer(2, 10), b'{"status":"verifying sha256 digest"}\n']
    rig = Rig([*lines, b'{"status":"writing manifest"}\n', SUCCESS])
    async with rig.running():
        await rig.lines()
    assert rig.done == ["read a"]


# --- clients that leave -----------------------------------------------------------------------------


async def test_a_pull_that_the_last_client_leaves_ends_and_the_next_client_gets_a_new_one() -> None:
    rig = Rig([layer(1), SUCCESS])
    rig.held = asyncio.Event()
    async with rig.running():
        first, second = rig.pulls.join("v", BODY), rig.pulls.join("v", BODY)
        with second:
            with first:
                await rig.begun.wait()
                assert first.prepared is not None
            assert rig.pulls.join("v", BODY)._pull is second._pull, "one client is left"
        assert rig.pulls._pulls == {}
        rig.held.set()
        assert (await rig.lines())[-1] == SUCCESS
    assert rig.asked == 2


async def test_a_pull_that_is_left_before_it_begins_is_never_asked_for() -> None:
    rig = Rig([SUCCESS])
    with rig.pulls.join("v", BODY):
        pass
    async with rig.running():
        assert await rig.lines() == [SUCCESS]
    assert rig.asked == 1


async def test_a_client_is_told_what_its_pull_waits_for() -> None:
    rig = Rig([SUCCESS])
    rig.does = "the deletion of small"
    async with rig.running():
        first, last = await rig.lines()
    assert (json.loads(first)["status"], last) == ("waiting for the deletion of small", SUCCESS)


async def test_a_defect_of_ours_ends_one_pull_and_no_other() -> None:
    rig = Rig([SUCCESS])
    rig.defect = RuntimeError("a defect")
    async with rig.running():
        with pytest.raises(PullFailedError, match="the manager failed; its log says more"):
            await rig.lines()
        rig.defect = None
        assert await rig.lines() == [SUCCESS]


# --- pulls that a request asks for ----------------------------------------------------------------


def refusing(*messages: str) -> Rig:
    rig = Rig([json.dumps({"error": message}).encode() + b"\n" for message in messages])
    rig.of = lambda instance: {"a": "v", "b": "v", "c": "w"}[instance]  # type: ignore[attr-defined]
    return rig


@pytest.mark.parametrize(
    ("message", "everywhere"),
    [("pull model manifest: file does not exist", True), ("dial tcp: lookup x: no such host", False)],
)
async def test_a_model_that_could_not_be_pulled_is_refused_at_once_for_a_while(
    message: str, *, everywhere: bool
) -> None:
    rig = refusing(message)
    now = 0.0
    rig.pulls = Pulls(rig, rig, now=lambda: now)  # type: ignore[arg-type]
    async with rig.running():
        with pytest.raises(PullFailedError, match=message):
            await rig.pulls.pull("a", "big", lambda _: None)
        assert rig.pulls._pulls == {}, "one that is over is joined by nobody"
        for instance in ("a", "b"):
            with pytest.raises(PullFailedError, match=message):
                rig.pulls.refuse_given_up(instance, "Big:latest")
        rig.pulls.refuse_given_up("a", "other")
        if everywhere:
            with pytest.raises(PullFailedError, match=message):
                rig.pulls.refuse_given_up("c", "big")
        else:
            rig.pulls.refuse_given_up("c", "big")
        now = 10.0
        rig.pulls.refuse_given_up("a", "big")


async def test_models_that_could_not_be_pulled_are_remembered_up_to_a_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("manager.services.models.pulls._MOST_GIVEN_UP", 2)
    rig = refusing("pull model manifest: file does not exist")
    async with rig.running():
        for number, remembered in enumerate((1, 2, 1)):
            with pytest.raises(PullFailedError):
                await rig.pulls.pull("a", f"m{number}", lambda _: None)
            assert len(rig.pulls._given_up) == remembered


# --- pulls that go on without clients ---------------------------------------------------------------


async def test_a_pull_that_was_begun_goes_on_without_clients_and_its_end_is_listed_for_a_while() -> None:
    rig, now = Rig([layer(1, 4), layer(1, 10) + SUCCESS]), 0.0
    rig.pulls = Pulls(rig, rig, now=lambda: now)  # type: ignore[arg-type]
    rig.held = asyncio.Event()
    async with rig.running():
        begun = rig.pulls.begin("v", BODY)
        assert (begun.state, begun.model, begun.is_kept, begun.instance) == ("waiting", "big", True, None)
        await rig.begun.wait()
        (view,) = rig.pulls.views()
        assert (view.state, view.instance, view.clients) == ("pulling", "a", 0)
        with rig.pulls.join("v", BODY):  # a client that comes and leaves ends nothing
            assert rig.pulls.views()[0].clients == 1
        assert rig.pulls.begin("v", BODY).id == begun.id
        rig.held.set()
        await until_ended(rig)
        (view,) = rig.pulls.views()
        assert (view.state, view.completed_bytes, view.total_bytes) == ("done", 10, 10)
        assert (view.bytes_per_s, view.left_s, view.error) == (None, None, None)
        now = 60.0
        assert rig.pulls.views() == ()


async def test_a_pull_is_cancelled_whoever_waits_for_it() -> None:
    rig = Rig([layer(1) + SUCCESS])
    rig.held = asyncio.Event()
    async with rig.running():
        rig.pulls.begin("v", BODY)
        client = asyncio.ensure_future(rig.lines())
        await rig.begun.wait()
        (view,) = rig.pulls.views()
        assert rig.pulls.cancel(view.id).state == "cancelled"
        with pytest.raises(PullFailedError, match="cancelled by an operator"):
            await client
        await asyncio.sleep(0)
        (ended,) = rig.pulls.views()
        assert (ended.state, ended.error) == ("cancelled", None)
        assert not rig.pulls.busy
        rig.pulls.cancel(view.id)  # it is looked at no more
        assert rig.pulls.views() == ()
        with pytest.raises(UnknownPullError):
            rig.pulls.cancel(view.id)


async def test_a_pull_is_cancelled_before_it_is_begun() -> None:
    rig = Rig([SUCCESS])
    view = rig.pulls.begin("v", BODY)
    rig.pulls.cancel(view.id)
    async with rig.running():
        rig.pulls.begin("v", BODY)
        await until_ended(rig)
    assert rig.asked == 1
    assert [one.state for one in rig.pulls.views()] == ["done"]  # the earlier one of the same is forgotten


async def test_a_pull_that_fails_is_listed_with_its_error_up_to_a_bound() -> None:
    rig = refusing("no such host")
    async with rig.running():
        for number in range(10):
            rig.pulls.begin("v", read_named(b'{"model":"big%d"}' % number))
        await until_ended(rig)
    views = rig.pulls.views()
    assert len(views) == 8
    assert {one.state for one in views} == {"failed"}
    assert {one.error for one in views} == {"no such host"}


async def until_ended(rig: Rig) -> None:
    async with asyncio.timeout(5):
        while rig.pulls.busy:  # noqa: ASYNC110  (there is no event for that)
            await asyncio.sleep(0)
        await asyncio.sleep(0)
