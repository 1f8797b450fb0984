"""`make demo-swarm`: two hosts, an instance on each, and a stream of requests while one of them is lost.

A real Docker Swarm of two engines, each on a host of its own with the simulated Ollama, and a real daemon
process. Every step is checked: the first that is not as it should be ends the demonstration with exit
status 1. Nothing of it stays on the machine.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests

from manager.cli.machine import DOCKERD, IPTABLES
from tests.support.daemon import Daemon, wait_for
from tests.support.fixtures import write_templates
from tests.support.host import HostError, leave_network
from tests.support.swarm import Swarm, SwarmHost, swarm_obstacles
from tests.tools.console import ToolError, say
from tests.tools.system import IP, provide
from tests.tools.transcript import Transcript, expect, run_command, tail

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MANAGER_ID = "demo"
_CLIENTS = 4
_WORDS = 8  # of an answer
_WORDS_PER_S = 16
_PROBE_INTERVAL_S = 0.5
_START_LIMIT_S = 60.0  # of the daemon, on a machine that has other things to do


@dataclass(frozen=True)
class Answered:
    """One request of the stream: when it began, how long it took, and who answered; None: it has failed.

    `moved` is whether another instance should have answered.
    """

    began: float
    took_s: float
    instance: str | None
    moved: bool


class Stream:
    """Clients that ask one request after the other for a role, and note who answers.

    Args:
        url: of the daemon.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._over = threading.Event()
        self._done: list[Answered] = []
        self._clients = [threading.Thread(target=self._ask, daemon=True) for _ in range(_CLIENTS)]

    @contextmanager
    def running(self) -> Iterator[None]:
        for client in self._clients:
            client.start()
        try:
            yield
        finally:
            self._over.set()
            for client in self._clients:
                client.join(timeout=30)

    def since(self, began: float) -> list[Answered]:
        """Return the requests that began since then and have ended."""
        return [one for one in list(self._done) if one.began >= began]

    def across(self, at: float) -> list[Answered]:
        """Return the requests that were open then and have ended."""
        return [one for one in list(self._done) if one.began < at < one.began + one.took_s]

    def _ask(self) -> None:
        message = {"role": "user", "content": "hi"}
        body = {"model": "work", "messages": [message], "stream": False, "options": {"num_predict": _WORDS}}
        with requests.Session() as session:
            while not self._over.is_set():
                began = time.monotonic()
                instance: str | None = None
                moved = False
                try:
                    answer = session.post(f"{self._url}/api/chat", json=body, timeout=60)
                    if answer.ok:
                        instance = answer.headers["X-Instance"]
                        moved = "X-Fallback-Reason" in answer.headers
                except requests.RequestException:
                    pass
                self._done.append(Answered(began, time.monotonic() - began, instance, moved))


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    if os.geteuid() == 0:
        provide([DOCKERD, IPTABLES, IP])
    if obstacles := swarm_obstacles():
        raise ToolError("; ".join(obstacles))
    leave_network()
    show = Transcript()
    show.title("Ollama Endpoint Manager: two hosts, of which one is lost. All of it is on this machine.")
    show.step("A Docker Swarm of two hosts, a simulated Ollama on both, and the daemon")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ollama-manager-demo-") as directory, Swarm() as swarm:
        show.result(f"the hosts `manager` and `worker` are a swarm ({time.monotonic() - began:.1f} s)")
        home = Path(directory)
        with Daemon(home, _configuration(home, swarm), engine_url=swarm.manager.url) as daemon:
            try:
                with show.timed("the daemon is ready, on the host `manager`"):
                    daemon.start(until_ready=False).wait_until_ready(within_s=_START_LIMIT_S)
                _tour(show, daemon, swarm)
            except Exception as error:
                raise ToolError(f"{error}\n\nThe end of the daemon's log:\n{tail(daemon.log())}") from error
    swarm.assert_clean()
    show.end("Done. The daemon, its services, the swarm and both engines are gone")
    return 0


def _tour(show: Transcript, daemon: Daemon, swarm: Swarm) -> None:
    show.step("An instance on each host")
    run_command(show, daemon, "start", "near")
    run_command(show, daemon, "start", "far")
    for instance, host in (("near", swarm.manager), ("far", swarm.worker)):
        endpoint = daemon.instance(instance)["endpoint"]
        expect(endpoint.startswith(f"http://{host.address}:"), f"{instance} is on host {host.hostname}")
        show.result(f"{instance} answers on host {host.hostname}, at {endpoint}")
    expect(_replicas(daemon, swarm) == {"far": 1, "near": 1}, "each instance is a service with one replica")

    show.step(f"{_CLIENTS} clients ask one request after the other")
    stream = Stream(daemon.url)
    with stream.running():
        began = time.monotonic()
        _wait(lambda: {"far", "near"} <= _counts(stream.since(began)).keys(), "both instances answer", 15)
        time.sleep(2)
        show.result(_told(stream.since(began)))
        _lose(show, daemon, swarm.worker, stream)
        show.step("What runs now")
        run_command(show, daemon, "status")
        _return(show, daemon, swarm.worker, stream)
        show.step("End")
    everything = stream.since(0)
    failed = [one for one in everything if one.instance is None]
    slowest = max(one.took_s for one in everything)
    show.result(f"{len(everything)} requests, {len(failed)} of them failed; the slowest took {slowest:.1f} s")
    expect(not failed, "no request has failed")
    run_command(show, daemon, "stop", "near")
    run_command(show, daemon, "stop", "far")
    expect(_replicas(daemon, swarm) == {"far": 0, "near": 0}, "the services stay, without replicas")
    with show.timed("the daemon has ended in order"):
        expect(daemon.stop() == 0, "the daemon exits 0")


def _lose(show: Transcript, daemon: Daemon, host: SwarmHost, stream: Stream) -> None:
    """Cut a host off in the middle of the stream."""
    show.step(f"The host `{host.hostname}` is lost: nothing that is sent to it arrives, and nobody says so")
    host.cut_network()
    lost_at = time.monotonic()
    _wait(lambda: daemon.instance("far")["health"] == "unhealthy", "far is unhealthy", 10)
    noticed_at = time.monotonic()
    show.result(f"far is unhealthy after {noticed_at - lost_at:.1f} s: requests go to near")
    _wait(lambda: daemon.instance("far")["phase"] == "failed", "far has failed", 30)
    show.result(f"far has failed after {time.monotonic() - lost_at:.1f} s: {_reason(daemon)}")
    # Clients whose requests the host has swallowed wait until the kernel gives it up.
    _wait(lambda: len(stream.across(noticed_at)) == _CLIENTS, "nobody waits for the lost host", 30)
    caught = [one for one in stream.since(0) if one.moved and one.began < noticed_at]
    expect(bool(caught), "requests were open on the host")
    expect({one.instance for one in caught} == {"near"}, "near has answered what was open on far")
    slowest = max(one.took_s for one in caught)
    show.result(f"requests that were open there: {len(caught)}; near has answered them ({slowest:.1f} s)")
    since = stream.since(noticed_at)
    expect(set(_counts(since)) == {"near"}, "near alone answers")
    show.result(_told(since))


def _return(show: Transcript, daemon: Daemon, host: SwarmHost, stream: Stream) -> None:
    show.step(f"The host `{host.hostname}` returns")
    host.mend_network()
    with show.timed("it is back in the swarm, which ends its old container"):
        host.wait_for_state("ready")
    run_command(show, daemon, "start", "far")
    began = time.monotonic()
    _wait(lambda: "far" in _counts(stream.since(began)), "far answers again", 15)
    time.sleep(1)
    show.result(_told(stream.since(began)))


def _reason(daemon: Daemon) -> str:
    reason = daemon.instance("far")["reason"]
    return "no reason" if reason is None else str(reason["message"])


def _counts(answered: list[Answered]) -> Counter[str]:
    return Counter(one.instance or "failed" for one in answered)


def _told(answered: list[Answered]) -> str:
    counts = {"far": 0, "near": 0, "failed": 0} | _counts(answered)
    return "answers: " + ", ".join(f"{who} {count}" for who, count in counts.items())


def _replicas(daemon: Daemon, swarm: Swarm) -> dict[str, int]:
    api: Any = swarm.client().api
    found = api.services(filters={"label": f"ollama-manager.manager={daemon.config['manager_id']}"})
    return {
        one["Spec"]["Labels"]["ollama-manager.instance"]: one["Spec"]["Mode"]["Replicated"]["Replicas"]
        for one in found
    }


def _wait(holds: Callable[[], bool], what: str, within_s: float) -> None:
    try:
        wait_for(holds, within_s=within_s)
    except AssertionError as error:
        raise ToolError(f"not within {within_s:g} s as it should be; expected: {what}") from error


def _configuration(home: Path, swarm: Swarm) -> dict[str, Any]:
    pace = {"env": {"OLLAMA_SIM_TOKENS_PER_S": str(_WORDS_PER_S)}}
    templates = write_templates(home / "templates", {"sim": pace})
    hosts = {"near": swarm.manager, "far": swarm.worker}
    return {
        "manager_id": _MANAGER_ID,
        "templates": {"dir": str(templates)},
        "gpus": "none",
        "swarm": {"reach": "host"},
        "instances": {
            name: {
                "driver": "swarm",
                "template": "sim",
                "placement": [f"node.hostname=={host.hostname}"],
                "ttl_s": 0,
            }
            for name, host in hosts.items()
        },
        "roles": {
            "work": {
                "model": "tiny",
                "kind": "generate",
                "instances": ["far", "near"],
                "strategy": "round_robin",
            }
        },
        "lifecycle": {"probe_interval_s": _PROBE_INTERVAL_S, "stop_timeout_s": 5, "start_timeout_s": 60},
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ToolError, HostError, AssertionError) as error:
        say(f"make demo-swarm: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        say("make demo-swarm: interrupted; nothing is left running")
        sys.exit(130)
