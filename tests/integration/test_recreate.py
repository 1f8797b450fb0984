"""A container that a better one should replace is replaced when nobody uses it, and not before."""

from __future__ import annotations

from contextlib import closing
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import pytest
import requests

from tests.nvml.standin import Card
from tests.simulated.image import IMAGE, REPOSITORY
from tests.support.cards import GIB, A, Machine
from tests.support.daemon import wait_for
from tests.support.engine import private_engine_obstacles
from tests.support.engine_kinds import needs_cards
from tests.support.fixtures import write_templates
from tests.support.ollama import set_knobs
from tests.support.state import stored_instance

if TYPE_CHECKING:
    from pathlib import Path

    import docker

    from tests.support.daemon import Daemon
    from tests.support.fixtures import NewDaemon

needs_device_requests = pytest.mark.skipif(
    bool(private_engine_obstacles()), reason="; ".join(private_engine_obstacles())
)


def recreated(daemon: Daemon, instance: str, before: dict[str, Any]) -> dict[str, Any]:
    """The instance once it is ready in another container."""
    return wait_for(
        lambda: daemon.instance(instance),
        lambda body: body["phase"] == "ready" and body["container"]["id"] != before["container"]["id"],
    )


def count(daemon: Daemon, kind: str) -> int:
    return [event["kind"] for event in daemon.events()].count(kind)


class Talker(Thread):
    """Somebody in the middle of a long answer of a container, who talks to it directly."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(daemon=True)
        set_knobs(endpoint, tokens=10**6, tokens_per_s=200)
        self._endpoint = endpoint
        self._enough = Event()
        self.cut = False
        self.lines = 0

    def run(self) -> None:
        body = {"model": "tiny", "prompt": "go on"}
        url = f"{self._endpoint}/api/generate"
        try:
            with requests.post(url, json=body, stream=True, timeout=20) as answer:
                for _ in answer.iter_lines():
                    self.lines += 1
                    if self._enough.is_set():
                        return
        except requests.RequestException:
            pass
        self.cut = True

    def hang_up(self) -> None:
        self._enough.set()
        self.join()


def test_a_container_of_an_older_template_is_replaced_when_idle_and_never_in_use(
    new_daemon: NewDaemon, docker_client: docker.DockerClient
) -> None:
    daemon = new_daemon().start()
    before = daemon.started("cpu")
    daemon.stop()
    write_templates(daemon.home / "templates", {"sim": {"env": {"OLLAMA_NEW": "1"}}})
    talker = Talker(before["endpoint"])
    talker.start()
    wait_for(lambda: talker.lines)
    daemon.start()
    body = daemon.wait_for_phase("cpu", "ready")
    assert body["container"]["id"] == before["container"]["id"]
    assert body["reason"]["code"] == "template_outdated"
    # Through several times the quiet time (a resync interval) that a recreation waits for.
    so_far = talker.lines
    wait_for(lambda: talker.lines > so_far + 800 or talker.cut)
    talker.hang_up()
    assert not talker.cut
    body = recreated(daemon, "cpu", before)
    assert body["reason"] is None
    assert body["container"]["template_hash"] != before["container"]["template_hash"]
    container = docker_client.containers.get(body["container"]["id"])
    assert "OLLAMA_NEW=1" in container.attrs["Config"]["Env"]


def test_a_container_of_an_older_template_is_replaced_after_the_last_request_that_came_due_under_it(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon(lifecycle={"resync_interval_s": 2}).start()
    before = daemon.started("cpu")
    daemon.stop()
    write_templates(daemon.home / "templates", {"sim": {"env": {"OLLAMA_NEW": "1"}}})
    daemon.start()
    daemon.wait_for_phase("cpu", "ready")
    set_knobs(before["endpoint"], tokens=10**6, tokens_per_s=50)
    body = {"model": "tiny", "prompt": "go on"}
    with requests.post(f"{daemon.url}/api/generate", json=body, stream=True, timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines)
        wait_for(lambda: daemon.instance("cpu")["in_flight"], lambda leases: leases == 1)
        for _ in range(50 * 5):  # through the quiet time of a resync interval, and again
            assert next(lines)
        assert daemon.instance("cpu")["container"]["id"] == before["container"]["id"]
        assert count(daemon, "recreating") == 0
    # The lease is given back, and nothing else happens that could wake anybody.
    assert recreated(daemon, "cpu", before)["reason"] is None


def test_a_container_of_an_older_template_stays_while_the_image_of_the_new_one_is_missing(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon().start()
    before = daemon.started("cpu")
    daemon.stop()
    missing = f"{REPOSITORY}:missing"
    write_templates(daemon.home / "templates", {"sim": {"image": missing}})
    daemon.start()
    body = wait_for(
        lambda: daemon.instance("cpu"), lambda body: body["reason"] and missing in body["reason"]["message"]
    )
    assert body["reason"]["code"] == "template_outdated"
    assert (body["phase"], body["health"]) == ("ready", "healthy")
    assert body["container"]["id"] == before["container"]["id"]
    assert body["container"]["image"].removeprefix("docker.io/") == IMAGE  # Podman says where it is from
    assert requests.get(f"{body['endpoint']}/api/version", timeout=5).ok
    assert count(daemon, "recreating") == 0


@needs_device_requests
@needs_cards()
def test_a_gpu_container_whose_log_names_the_cpu_is_replaced_once_and_not_again_so_soon(
    new_daemon: NewDaemon, tmp_path: Path
) -> None:
    machine = Machine(tmp_path, Card(A))
    daemon = new_daemon(
        instances={"gpu0": {"template": "sim-gpu", "device": A}},
        templates={"sim-gpu": {"device": "gpu", "env": {"OLLAMA_SIM_CPU_FALLBACK": "1"}}},
        environment=machine.environment,
    ).start()
    before = daemon.started("gpu0")  # it works, if slowly: that is better than nothing
    body = wait_for(lambda: daemon.instance("gpu0"), lambda body: body["reason"])
    assert (body["phase"], body["reason"]["code"]) == ("ready", "gpu_fallback")
    after = recreated(daemon, "gpu0", before)
    body = wait_for(lambda: daemon.instance("gpu0"), lambda body: body["reason"])
    assert body["reason"]["code"] == "gpu_fallback"
    assert stored_instance(daemon.state_dir, "gpu0")["recreated_at"] is not None
    daemon.kill()
    daemon.start()  # which knows that it has been tried
    daemon.wait_for_phase("gpu0", "ready")
    body = wait_for(lambda: daemon.instance("gpu0"), lambda body: body["reason"])
    assert body["reason"]["code"] == "gpu_fallback"
    wait_for(
        lambda: daemon.instance("gpu0")["ttl_remaining_s"], lambda left: left < 900 - 3
    )  # idle long enough
    assert daemon.instance("gpu0")["container"] == after["container"]
    assert count(daemon, "recreating") == 1


@needs_device_requests
@needs_cards()
def test_a_gpu_container_with_a_model_that_is_not_on_the_gpu_is_replaced(
    new_daemon: NewDaemon, tmp_path: Path
) -> None:
    machine = Machine(tmp_path, Card(A, vram_total=24 * GIB))
    daemon = new_daemon(
        instances={"gpu0": {"template": "sim-gpu", "device": A}}, environment=machine.environment
    ).start()
    before = daemon.started("gpu0")
    requests.post(f"{before['endpoint']}/api/generate", json={"model": "tiny"}, timeout=10)
    body = wait_for(lambda: daemon.instance("gpu0"), lambda body: body["models"])
    assert body["models"][0]["vram_bytes"] > 0
    assert body["reason"] is None
    set_knobs(before["endpoint"], cpu_fallback=True)  # the card was lost under its feet
    body = wait_for(lambda: daemon.instance("gpu0"), lambda body: body["reason"])
    assert (body["phase"], body["reason"]["code"]) == ("ready", "gpu_fallback")
    body = recreated(daemon, "gpu0", before)
    assert body["reason"] is None
    with closing(requests.get(f"{body['endpoint']}/api/ps", timeout=5)) as answer:
        assert answer.json()["models"] == []
