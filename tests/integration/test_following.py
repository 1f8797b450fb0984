"""`ollama-manager logs -f` and `events -f`: streams that last, against a real daemon and a real engine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from asyncio import to_thread
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import requests

from manager.api.log_followers import MOST
from tests.support.daemon import ROOT, Daemon, wait_for
from tests.support.inside import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.integration.conftest import NewDaemon
    from tests.support.inside import NewInside

LIMIT_S = 60


class Command:
    """A command of the program that runs, with its output in files."""

    def __init__(self, daemon: Daemon, directory: Path, *arguments: str) -> None:
        name = "-".join(arguments).replace("/", "_")
        self.out, self.err = directory / f"{name}.out", directory / f"{name}.err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "manager", *arguments, "--config", str(daemon.config_file)],
                cwd=ROOT,
                env=daemon.environment,
                stdout=out,
                stderr=err,
            )

    def stdout(self) -> str:
        return self.out.read_text(encoding="utf-8")

    def stderr(self) -> str:
        return self.err.read_text(encoding="utf-8")

    def wait_for(self, words: str) -> None:
        wait_for(lambda: (self.stdout(), self.stderr()), lambda texts: any(words in one for one in texts))


@contextmanager
def running(daemon: Daemon, directory: Path, *arguments: str) -> Iterator[Command]:
    command = Command(daemon, directory, *arguments)
    try:
        yield command
    finally:
        command.process.kill()
        command.process.wait()


def write_line(endpoint: str, words: str) -> None:
    """Have the server in a container write a line into its log."""
    requests.get(f"{endpoint}/{words}", timeout=10)


def test_logs_are_followed_until_the_container_ends(new_daemon: NewDaemon, tmp_path: Path) -> None:
    daemon = new_daemon().start()
    endpoint = daemon.started("cpu")["endpoint"]
    write_line(endpoint, "before")
    wait_for(lambda: daemon.call("GET", "instances/cpu/logs").text, lambda text: "/before" in text)
    with running(daemon, tmp_path, "logs", "cpu", "-f", "--tail", "1000") as command:
        command.wait_for("Listening on")
        command.wait_for("/before")
        write_line(endpoint, "while-it-is-followed")
        command.wait_for("/while-it-is-followed")
        daemon.stopped("cpu")
        assert command.process.wait(LIMIT_S) == 0
        assert command.stderr() == "the container of cpu has ended\n"
        assert command.stdout().count("/while-it-is-followed") == 1


def test_a_container_that_is_replaced_ends_its_log(new_daemon: NewDaemon, tmp_path: Path) -> None:
    daemon = new_daemon().start()
    daemon.started("cpu")
    with running(daemon, tmp_path, "logs", "cpu", "-f") as command:
        command.wait_for("Listening on")
        # Until the next container is there the command cannot ask about it.
        command.process.send_signal(signal.SIGSTOP)
        daemon.stopped("cpu")
        daemon.started("cpu")
        command.process.send_signal(signal.SIGCONT)
        assert command.process.wait(LIMIT_S) == 0
        assert command.stderr().startswith("the container of cpu was replaced; ")


def test_without_a_container_the_kept_lines_are_all(new_daemon: NewDaemon, tmp_path: Path) -> None:
    daemon = new_daemon().start()
    daemon.started("cpu")
    daemon.stopped("cpu")
    with running(daemon, tmp_path, "logs", "cpu", "-f") as command:
        assert command.process.wait(LIMIT_S) == 0
        assert "Listening on" in command.stdout()
        assert command.stderr() == "cpu had no container (it was stopped); these lines were kept\n"


def test_a_daemon_that_dies_ends_a_followed_log_with_3(new_daemon: NewDaemon, tmp_path: Path) -> None:
    daemon = new_daemon().start()
    daemon.started("cpu")
    with running(daemon, tmp_path, "logs", "cpu", "-f") as command:
        command.wait_for("Listening on")
        daemon.kill()
        assert command.process.wait(LIMIT_S) == 3
        assert "the daemon ended, or the connection to it broke" in command.stderr()


def test_a_daemon_that_is_stopped_does_not_wait_for_who_follows(
    new_daemon: NewDaemon, tmp_path: Path
) -> None:
    daemon = new_daemon().start()
    daemon.started("cpu")
    with (
        running(daemon, tmp_path, "logs", "cpu", "-f") as logs,
        running(daemon, tmp_path, "events", "-f") as events,
    ):
        logs.wait_for("Listening on")
        events.wait_for("ready")
        assert daemon.stop() == 0
        assert logs.process.wait(LIMIT_S) == 3
        assert "Traceback" not in logs.stderr()


def test_ctrl_c_and_a_closed_pipe_end_a_followed_log_without_a_traceback(
    new_daemon: NewDaemon, tmp_path: Path
) -> None:
    daemon = new_daemon().start()
    endpoint = daemon.started("cpu")["endpoint"]
    with running(daemon, tmp_path, "logs", "cpu", "-f") as command:
        command.wait_for("Listening on")
        command.process.send_signal(signal.SIGINT)
        assert command.process.wait(LIMIT_S) == 130
        assert command.stderr().strip() == ""
    arguments = [sys.executable, "-m", "manager", "logs", "cpu", "-f", "--config", str(daemon.config_file)]
    piped = subprocess.Popen(
        arguments, cwd=ROOT, env=daemon.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert piped.stdout is not None
    assert piped.stderr is not None
    with piped, piped.stdout as stdout, piped.stderr as stderr:
        stdout.readline()
        stdout.close()
        for _ in range(1000):
            write_line(endpoint, "more")
            if piped.poll() is not None:
                break
        assert piped.wait(LIMIT_S) in (0, 1)
        assert stderr.read() == b""


def test_an_unknown_instance_is_2_and_an_external_one_4(new_daemon: NewDaemon, tmp_path: Path) -> None:
    nas = {"driver": "external", "url": "http://127.0.0.1:9", "device": "cpu"}
    daemon = new_daemon(instances={"cpu": {"template": "sim"}, "nas": nas}).start()
    for arguments in (("logs", "nope"), ("logs", "nope", "-f")):
        with running(daemon, tmp_path, *arguments) as command:
            assert command.process.wait(LIMIT_S) == 2
            assert "unknown_instance" in command.stderr()
    with running(daemon, tmp_path, "logs", "nas", "-f") as command:
        assert command.process.wait(LIMIT_S) == 4


def log_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "docker-logs"]


async def test_clients_that_leave_a_followed_log_leave_no_thread_and_make_room(new_inside: NewInside) -> None:
    inside = await new_inside()
    cpu = inside.get("cpu")
    await cpu.start()
    url = f"{inside.compute_url}/instances/cpu/logs?follow=true"

    def follow() -> requests.Response:
        return requests.get(url, stream=True, timeout=30)

    answers = [await to_thread(follow) for _ in range(MOST)]
    assert {answer.status_code for answer in answers} == {200}
    assert len(log_threads()) == MOST
    refused = await to_thread(follow)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert int(refused.headers["Retry-After"]) > 0
    refused.close()
    # The container writes nothing meanwhile: a client that leaves is noticed by its connection.
    answers.pop().close()
    await until(lambda: len(log_threads()) == MOST - 1)
    answers.append(await to_thread(follow))
    assert answers[-1].status_code == 200
    for answer in answers:
        answer.close()
    await until(lambda: log_threads() == [])


def test_events_are_followed_over_a_restart_of_the_daemon_and_none_is_missed(
    new_daemon: NewDaemon, tmp_path: Path
) -> None:
    daemon = new_daemon().start()
    with running(daemon, tmp_path, "events", "-f", "--limit", "10000", "--json") as command:
        daemon.started("cpu")
        command.wait_for('"ready"')
        daemon.stop()
        command.wait_for("the daemon is away: ")
        daemon.start()
        command.wait_for("the daemon is back")
        daemon.stopped("cpu")
        command.wait_for('"stopped"')
        seen = [json.loads(line) for line in command.stdout().splitlines()]
        command.process.send_signal(signal.SIGINT)
        assert command.process.wait(LIMIT_S) == 130
        kept = daemon.events()
    assert seen == kept[: len(seen)]
    assert [one["id"] for one in seen] == list(range(1, len(seen) + 1))
    assert command.stderr().count("the daemon is away") == command.stderr().count("the daemon is back") == 1


def test_a_list_of_events_has_the_last_ones_and_ends(new_daemon: NewDaemon, tmp_path: Path) -> None:
    daemon = new_daemon().start()
    daemon.started("cpu")
    for arguments, count in ((("--limit", "3"), 3), (("--limit", "10000"), len(daemon.events()))):
        with running(daemon, tmp_path, "events", *arguments) as command:
            assert command.process.wait(LIMIT_S) == 0
            head, *lines = command.stdout().splitlines()
            assert head.split() == ["TIME", "INSTANCE", "KIND", "REASON", "DETAIL"]
            assert len(lines) == count
    kept: list[dict[str, Any]] = daemon.events()
    newest = kept[-1]["id"]
    for query, headers, expected in (
        ("follow=false", {}, []),
        ("follow=false&last=2", {}, kept[-2:]),
        ("follow=false", {"Last-Event-ID": "0"}, kept),
        ("follow=false", {"Last-Event-ID": str(newest)}, []),
        ("follow=false", {"Last-Event-ID": str(newest + 5)}, []),
    ):
        answer = daemon.call("GET", f"events?{query}", headers=headers, timeout_s=5)
        found = [line for line in answer.text.splitlines() if line.startswith("data: ")]
        assert [json.loads(line.removeprefix("data: ")) for line in found] == expected, query
