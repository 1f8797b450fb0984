"""A daemon that dies, ends or is replaced while it has async runs is followed by one that takes them up."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
import requests

from tests.support.daemon import Daemon, wait_for
from tests.support.relaying import LAST, LINE, Conversation, Scripted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.nursery import Process

RUNS = "/api/v1/runs"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
KILLED = -9


class Server:
    """A model server in a thread. `answers` lets its answers come to their end; `asked` counts requests."""

    def __init__(self, loop: asyncio.AbstractEventLoop, scripted: Scripted) -> None:
        self._loop = loop
        self._goes_on = asyncio.Event()
        self._goes_on.set()
        self.begun = threading.Semaphore(0)
        self.scripted = scripted
        scripted.answer = self._answer

    @property
    def asked(self) -> int:
        return len(self.scripted.seen)

    def hold(self) -> None:
        """Let answers stop after their first line."""
        self._goes_on.clear()

    def answers(self) -> None:
        self._loop.call_soon_threadsafe(self._goes_on.set)

    async def _answer(self, talk: Conversation) -> None:
        await talk.begin()
        await talk.chunk(LINE)
        self.begun.release()
        await self._goes_on.wait()
        with suppress(ConnectionError):
            await talk.chunk(LAST)
            await talk.end()


@pytest.fixture
def server() -> Iterator[Server]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def begin() -> tuple[Any, Server]:
        serving = Scripted().serving()
        return serving, Server(loop, await serving.__aenter__())

    serving, found = asyncio.run_coroutine_threadsafe(begin(), loop).result(20)
    yield found
    found.answers()

    async def end() -> None:
        await serving.__aexit__(None, None, None)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.wait(others) if others else None

    asyncio.run_coroutine_threadsafe(end(), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


class Runs:
    """A daemon with one external server, and its runs as a client sees them."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon

    def start(self, die_at: str | None = None) -> None:
        self.daemon.start(die_at=die_at and f"run:{die_at}", until_ready=False)
        self.daemon.wait_until_alive()

    def submit(self, *, idempotent: bool = False) -> str:
        wanted = {"path": "/api/chat", "body": BODY, "idempotent": idempotent}
        answer = self.daemon.call("POST", RUNS, json=wanted)
        assert answer.status_code == 202, answer.text
        run_id: str = answer.json()["id"]
        return run_id

    def submit_until_dead(self, *, idempotent: bool = False) -> None:
        """Submit what the daemon dies of, before or after it has answered."""
        with suppress(requests.ConnectionError):
            self.submit(idempotent=idempotent)
        assert self.daemon.wait_until_dead() == KILLED, self.daemon.log()

    def all(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.daemon.get(RUNS)["runs"]
        return found

    def only(self) -> dict[str, Any]:
        (run,) = self.all()
        return run

    def ended(self) -> dict[str, Any]:
        """The only run, once it has ended."""
        return wait_for(self.only, lambda run: run["status"] not in {"queued", "running"}, within_s=30)

    def result(self) -> bytes:
        answer = self.daemon.call("GET", f"{RUNS}/{self.only()['id']}/result")
        assert answer.status_code == 200, answer.text
        return answer.content

    def files(self) -> list[str]:
        return sorted(path.name for path in (self.daemon.state_dir / "runs").iterdir())

    def assert_succeeded(self, *, executions: int) -> None:
        run = self.ended()
        assert (run["status"], run["executions"]) == ("succeeded", executions)
        assert self.result() == LINE + LAST
        wait_for(self.files, lambda names: names == [f"{run['id']}.result"])

    def assert_interrupted(self) -> None:
        run = self.ended()
        assert (run["status"], run["executions"]) == ("interrupted", 1)
        assert run["error"]["code"] == "interrupted"
        assert self.files() == []


@contextmanager
def rig(home: Path, server: Server, **gateway: Any) -> Iterator[Runs]:
    config = {
        "gpus": "none",
        "instances": {"one": {"driver": "external", "url": server.scripted.url}},
        "lifecycle": {"probe_interval_s": 0.5, "resync_interval_s": 1},
        "gateway": gateway,
    }
    with Daemon(home, config, engine_url="unix:///nonexistent/docker.sock") as daemon:
        yield Runs(daemon)


@pytest.fixture
def runs(tmp_path: Path, server: Server) -> Iterator[Runs]:
    with rig(tmp_path, server) as found:
        yield found


def test_a_run_whose_body_alone_was_written_never_was(runs: Runs, server: Server) -> None:
    runs.start("body")
    runs.submit_until_dead()
    assert len(runs.files()) == 1
    runs.start()
    assert runs.all() == []
    assert runs.files() == []
    assert server.asked == 0


def test_a_run_that_was_stored_is_executed_by_the_next_daemon(runs: Runs, server: Server) -> None:
    runs.start("stored")
    runs.submit_until_dead()
    assert server.asked == 0
    runs.start()
    runs.assert_succeeded(executions=1)
    assert server.asked == 1


@pytest.mark.parametrize("idempotent", [False, True])
def test_a_run_that_was_stored_as_sent_is_executed_again_only_if_it_is_idempotent(
    runs: Runs, server: Server, idempotent: bool
) -> None:
    runs.start("running")
    runs.submit_until_dead(idempotent=idempotent)
    runs.start()
    if idempotent:
        runs.assert_succeeded(executions=2)
    else:
        runs.assert_interrupted()
    assert server.asked == idempotent


@pytest.mark.parametrize("idempotent", [False, True])
def test_a_run_whose_server_was_at_work_is_executed_again_only_if_it_is_idempotent(
    runs: Runs, server: Server, idempotent: bool
) -> None:
    server.hold()
    runs.start()
    run_id = runs.submit(idempotent=idempotent)
    assert server.begun.acquire(timeout=20)
    runs.daemon.kill()
    assert f"{run_id}.body" in runs.files()
    server.answers()
    runs.start()
    if idempotent:
        runs.assert_succeeded(executions=2)
    else:
        runs.assert_interrupted()
    assert server.asked == 1 + idempotent


@pytest.mark.parametrize("idempotent", [False, True])
def test_a_result_that_was_written_and_not_stored_does_not_count(
    runs: Runs, server: Server, idempotent: bool
) -> None:
    runs.start("settled")
    runs.submit_until_dead(idempotent=idempotent)
    assert any(name.endswith(".result") for name in runs.files())
    runs.start()
    if idempotent:
        runs.assert_succeeded(executions=2)
    else:
        runs.assert_interrupted()
    assert server.asked == 1 + idempotent


def test_a_run_that_has_ended_keeps_its_result(runs: Runs, server: Server) -> None:
    runs.start("ended")
    runs.submit_until_dead(idempotent=True)
    assert len(runs.files()) == 2
    runs.start()
    runs.assert_succeeded(executions=1)
    assert server.asked == 1


@pytest.mark.parametrize("step", ["ended", "cancelled"])
def test_a_run_that_was_cancelled_stays_so(runs: Runs, server: Server, step: str) -> None:
    config = runs.daemon.config
    server.hold()
    runs.daemon.configure({**config, "runs": {"concurrency": 1}})
    runs.start(step)
    wanted = runs.submit(idempotent=True)
    assert server.begun.acquire(timeout=20)
    if step == "cancelled":
        wanted = runs.submit()
    with suppress(requests.ConnectionError):
        runs.daemon.call("DELETE", f"{RUNS}/{wanted}")
    assert runs.daemon.wait_until_dead() == KILLED
    assert f"{wanted}.body" in runs.files()
    server.answers()
    runs.start()
    statuses = wait_for(
        lambda: {run["id"]: run["status"] for run in runs.all()},
        lambda found: set(found.values()) <= {"cancelled", "succeeded"},
    )
    assert statuses[wanted] == "cancelled"
    assert f"{wanted}.body" not in runs.files()


@pytest.mark.parametrize("idempotent", [False, True])
def test_a_run_that_outlasts_the_drain_of_sigterm_is_interrupted_or_taken_up_again(
    tmp_path: Path, server: Server, idempotent: bool
) -> None:
    with rig(tmp_path, server, drain_timeout_s=0.3) as runs:
        server.hold()
        runs.start()
        runs.submit(idempotent=idempotent)
        assert server.begun.acquire(timeout=20)
        assert runs.daemon.stop() == 0
        server.answers()
        runs.start()
        if idempotent:
            runs.assert_succeeded(executions=2)
        else:
            runs.assert_interrupted()


def test_a_run_that_ends_within_the_drain_is_not_touched(runs: Runs, server: Server) -> None:
    server.hold()
    runs.start()
    runs.submit()
    assert server.begun.acquire(timeout=20)
    process = runs.daemon.process
    assert process is not None
    process.terminate()
    wait_for(lambda: "ending" in runs.daemon.log())
    server.answers()
    assert runs.daemon.wait_until_dead() == 0
    runs.start()
    runs.assert_succeeded(executions=1)


def replaced(runs: Runs) -> Process:
    """Begin to replace the daemon; return the old process."""
    old = runs.daemon.process
    assert old is not None
    runs.daemon.start(until_ready=False, arguments=("--replace",))
    return old


def test_a_daemon_that_is_replaced_lets_its_runs_end_and_begins_no_other(runs: Runs, server: Server) -> None:
    server.hold()
    runs.daemon.configure({**runs.daemon.config, "runs": {"concurrency": 1}})
    runs.start()
    runs.submit()
    assert server.begun.acquire(timeout=20)
    waiting = runs.submit()
    old = replaced(runs)
    wait_for(lambda: "replacement_waits" in runs.daemon.log())
    assert server.asked == 1
    server.answers()
    assert old.wait(30) == 0
    runs.daemon.wait_until_alive()
    found = wait_for(runs.all, lambda all_: all(run["status"] == "succeeded" for run in all_))
    assert [run["executions"] for run in found] == [1, 1]
    assert waiting in {run["id"] for run in found}


@pytest.mark.parametrize("idempotent", [False, True])
def test_runs_hold_up_a_replacement_for_the_drain_time_at_most(
    tmp_path: Path, server: Server, idempotent: bool
) -> None:
    with rig(tmp_path, server, drain_timeout_s=0.5) as runs:
        server.hold()
        runs.start()
        runs.submit(idempotent=idempotent)
        assert server.begun.acquire(timeout=20)
        old = replaced(runs)
        assert old.wait(30) == 0
        server.answers()
        runs.daemon.wait_until_alive()
        if idempotent:
            runs.assert_succeeded(executions=2)
        else:
            runs.assert_interrupted()
