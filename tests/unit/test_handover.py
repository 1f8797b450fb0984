"""Two daemons of one user agree on a replacement; a stranger, or nonsense, changes nothing."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from manager import handover
from manager.adapters.owner import ManagerIdLock
from manager.errors import ManagerError
from manager.handover import Predecessor, Succession, Successor, replace_daemon
from tests.support.inside import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ENGINE = "unix:///nowhere.sock"


@contextmanager
def old_daemon(state_dir: Path) -> Iterator[tuple[ManagerIdLock, list[Successor]]]:
    lock = ManagerIdLock(state_dir.name, ENGINE)
    lock.acquire()
    asked: list[Successor] = []
    succession = Succession(lock.claim, state_dir, asked.append)
    try:
        yield lock, asked
    finally:
        succession.close()
        succession.close()
        lock.release()
        for successor in asked:
            successor.close()


def connected(state_dir: Path) -> socket.socket:
    channel = ManagerIdLock(state_dir.name, ENGINE).connect()
    assert channel is not None
    return channel


async def asking(state_dir: Path, within_s: float = 10.0) -> Predecessor:
    found = await asyncio.to_thread(replace_daemon, connected(state_dir), state_dir, within_s=within_s)
    assert found is not None
    assert found.line is not None
    assert found.line.recv(10) == b"a line"
    found.line.close()
    return found


def hand_over(successor: Successor, listener: socket.socket) -> None:
    here, there = socket.socketpair()
    with here, there:
        here.send(b"a line")
        successor.hand_over(listener, there)


async def test_listener_and_connections_are_handed_over(tmp_path: Path) -> None:
    with old_daemon(tmp_path) as (_, asked), socket.create_server(("127.0.0.1", 0)) as listener:
        question = asyncio.ensure_future(asking(tmp_path))
        await until(lambda: asked)
        (successor,) = asked
        hand_over(successor, listener)
        predecessor = await question
        assert predecessor.pid == os.getpid()
        port = listener.getsockname()[1]
        passed = predecessor.usable_listener("127.0.0.1", port)
        assert passed is not None
        ours, theirs = socket.socketpair()
        assert not successor.take(ours.fileno(), b"too early")
        came: list[tuple[socket.socket, bytes]] = []

        async def adopt(peer: socket.socket, held: bytes) -> None:
            came.append((peer, held))

        predecessor.serves(adopt, lambda _requests: None)
        await until(lambda: successor.is_serving)
        assert successor.take(ours.fileno(), b"")
        assert successor.take(ours.fileno(), b"GET / HTTP/1.1\r\n")
        await until(lambda: len(came) == 2)
        assert [held for _, held in came] == [b"", b"GET / HTTP/1.1\r\n"]
        came[0][0].send(b"hi")
        assert theirs.recv(10) == b"hi"
        successor.close()
        successor.close()
        assert not successor.take(ours.fileno(), b"")
        for peer in (ours, theirs, passed, *(peer for peer, _ in came)):
            peer.close()


async def test_a_listener_of_another_address_is_closed(tmp_path: Path) -> None:
    with old_daemon(tmp_path) as (_, asked), socket.create_server(("127.0.0.1", 0)) as listener:
        question = asyncio.ensure_future(asking(tmp_path))
        await until(lambda: asked)
        hand_over(asked[0], listener)
        predecessor = await question
        assert predecessor.usable_listener("127.0.0.1", listener.getsockname()[1] + 1) is None
        predecessor.serves(lambda _peer, _held: pytest.fail("nothing moves"), lambda _requests: None)
        asked[0].close()


async def test_a_full_channel_is_tried_again_and_an_ended_one_is_not(tmp_path: Path) -> None:
    with old_daemon(tmp_path) as (_, asked), socket.create_server(("127.0.0.1", 0)) as listener:
        question = asyncio.ensure_future(asking(tmp_path))
        await until(lambda: asked)
        (successor,) = asked
        hand_over(successor, listener)
        predecessor = await question
        successor.is_serving = True
        while successor.take(listener.fileno(), b""):
            pass
        assert not successor.has_ended
        predecessor._channel.close()
        await until(lambda: successor.has_ended)
        await successor.decided()
        assert not successor.take(listener.fileno(), b"")
        hand_over(successor, listener)  # to nobody
        passed = predecessor.usable_listener("127.0.0.1", listener.getsockname()[1])
        assert passed is not None
        passed.close()


async def test_more_than_a_message_moves_with_its_connection(tmp_path: Path) -> None:
    with old_daemon(tmp_path) as (_, asked), socket.create_server(("127.0.0.1", 0)) as listener:
        question = asyncio.ensure_future(asking(tmp_path))
        await until(lambda: asked)
        hand_over(asked[0], listener)
        predecessor = await question
        came: list[bytes] = []
        inheritable: list[bool] = []

        async def adopt(peer: socket.socket, held: bytes) -> None:
            came.append(held)
            inheritable.append(peer.get_inheritable())
            peer.close()

        predecessor.serves(adopt, lambda _requests: None)
        await asked[0].decided()
        assert asked[0].take(listener.fileno(), b"x" * 400_000)
        await until(lambda: came)
        assert came == [b"x" * 400_000]
        assert inheritable == [False]
        assert predecessor.usable_listener("127.0.0.1", 1) is None


async def test_a_new_daemon_that_does_not_serve_in_time_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "_SERVES_WITHIN_S", 0.05)
    with old_daemon(tmp_path) as (_, asked):
        channel = connected(tmp_path)
        with channel, handover._opened(tmp_path) as descriptors:
            socket.send_fds(channel, [b"replace"], descriptors)
            await until(lambda: asked)
            await asked[0].decided()
            assert asked[0].has_ended
            assert not asked[0].is_serving


async def test_a_process_that_connects_and_does_not_ask_is_hung_up_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "_ASKS_WITHIN_S", 0.05)
    with old_daemon(tmp_path) as (_, asked), connected(tmp_path) as channel:
        channel.settimeout(10)
        assert await asyncio.to_thread(channel.recv, 1) == b""
        assert not asked


async def test_a_refusal_has_its_reason(tmp_path: Path) -> None:
    with old_daemon(tmp_path) as (_, asked):
        question = asyncio.ensure_future(asking(tmp_path))
        await until(lambda: asked)
        asked[0].refuse("busy with something")
        with pytest.raises(ManagerError, match="busy with something"):
            await question


async def test_another_state_directory_is_refused_by_name(tmp_path: Path) -> None:
    with old_daemon(tmp_path) as (_, asked):
        for other in (tmp_path / "other", tmp_path / "missing"):
            if other.name == "other":
                other.mkdir()
            with pytest.raises(ManagerError, match=str(tmp_path)):
                await asyncio.to_thread(replace_daemon, connected(tmp_path), other, within_s=5)
        assert not asked


async def test_no_answer_in_time_leaves_the_other_daemon_alone(tmp_path: Path) -> None:
    with old_daemon(tmp_path) as (_, asked):
        with pytest.raises(ManagerError, match=r"within 0\.1 s"):
            await asking(tmp_path, within_s=0.1)
        await until(lambda: asked and asked[0].has_ended)


@pytest.mark.parametrize("nonsense", [b"{", b"replaces", b"x" * 100_000])
async def test_nonsense_is_hung_up_on(tmp_path: Path, nonsense: bytes) -> None:
    with old_daemon(tmp_path) as (_, asked), connected(tmp_path) as channel:
        channel.send(nonsense)
        assert await asyncio.to_thread(channel.recv, 1) == b""
        assert not asked


async def test_a_stranger_is_not_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "is_same_user", lambda _channel: False)
    with old_daemon(tmp_path) as (_, asked):
        assert await asyncio.to_thread(replace_daemon, connected(tmp_path), tmp_path, within_s=5) is None
        assert not asked


async def test_those_who_connect_and_say_nothing_are_bounded(tmp_path: Path) -> None:
    with old_daemon(tmp_path) as (_, asked):
        silent = [connected(tmp_path) for _ in range(16)]
        assert await asyncio.to_thread(replace_daemon, connected(tmp_path), tmp_path, within_s=5) is None
        for channel in silent:
            channel.close()
        question = asyncio.ensure_future(asking(tmp_path))
        await until(lambda: asked)
        asked[0].refuse("no")
        with pytest.raises(ManagerError, match="no"):
            await question


async def test_where_nobody_holds_the_id_nobody_is_asked(tmp_path: Path) -> None:
    assert ManagerIdLock(tmp_path.name, ENGINE).connect() is None
    Succession(None, tmp_path, lambda _successor: pytest.fail("nobody asked")).close()


def test_a_daemon_that_ends_without_an_answer_needs_no_replacement(tmp_path: Path) -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    there.close()
    assert replace_daemon(here, tmp_path, within_s=5) is None


def test_an_answer_without_a_listener_is_refused(tmp_path: Path) -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    there.send(b'{"released": 1}')
    with there, pytest.raises(ManagerError, match="no listener"):
        replace_daemon(here, tmp_path, within_s=5)


def test_a_daemon_of_a_version_without_the_stream_is_replaced_as_well(tmp_path: Path) -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with there, socket.create_server(("127.0.0.1", 0)) as listener:
        socket.send_fds(there, [b'{"released": 1}'], [listener.fileno()])
        predecessor = replace_daemon(here, tmp_path, within_s=5)
        assert predecessor is not None
        assert predecessor.line is None
        assert predecessor.usable_listener("127.0.0.1", 1) is None
    here.close()
