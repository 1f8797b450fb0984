"""What happens on the engine without the daemon, and what the daemon asks the engine for."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import requests

from manager.domain.registry import InstanceRow
from tests.simulated.image import IMAGE, ensure_simulated_image
from tests.support.daemon import Daemon, free_port, wait_for
from tests.support.engine import PrivateEngine, private_engine_obstacles
from tests.support.engine_kinds import is_podman, not_on_podman
from tests.support.fixtures import making_daemons, new_manager_id, write_templates
from tests.support.host import interface_addresses
from tests.support.proxy import EngineProxy
from tests.support.state import store_instance

if TYPE_CHECKING:
    from collections.abc import Iterator

    import docker
    from docker.models.containers import Container

    from tests.support.engine import Engine
    from tests.support.fixtures import NewDaemon

# The aim is 200 ms; what is asserted leaves room for a machine that does other things too.
NOTICED_S = 4.0
ANSWER_S = 6.0
PROBE_S = 1.0

needs_private_engine = pytest.mark.skipif(
    bool(private_engine_obstacles()), reason="; ".join(private_engine_obstacles())
)


@pytest.fixture(scope="module")
def by_hand(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that lists the engine so seldom that only an event can tell it something in time."""
    directory = tmp_path_factory.mktemp("by-hand")
    with making_daemons(engine, directory, new_manager_id()) as make:
        yield make(lifecycle={"resync_interval_s": 60}).start()


@pytest.fixture
def running(by_hand: Daemon, docker_client: docker.DockerClient) -> Container:
    """The container of its one instance, which is ready."""
    return docker_client.containers.get(by_hand.started("cpu")["container"]["id"])


def happened(daemon: Daemon, since: int, *kinds: str) -> dict[str, Any]:
    """The first event of one of these kinds after the one numbered `since`."""
    found = wait_for(lambda: [event for event in daemon.events(since) if event["kind"] in kinds])
    first: dict[str, Any] = found[0]
    return first


def last_event(daemon: Daemon) -> int:
    return int(wait_for(daemon.events)[-1]["id"])


def seconds_after(event: dict[str, Any], began: datetime) -> float:
    return (datetime.fromisoformat(event["at"]) - began).total_seconds()


@pytest.mark.parametrize("how", ["stop", "kill", "remove"])
def test_a_container_ended_by_hand_is_noticed_by_its_event_and_not_started_again(
    by_hand: Daemon, running: Container, docker_client: docker.DockerClient, how: str
) -> None:
    since = last_event(by_hand)
    if how == "stop":
        running.stop(timeout=10)
    elif how == "kill":
        running.kill()
    else:
        running.remove(force=True)
    done = datetime.now(UTC)
    event = happened(by_hand, since, "container_ended")
    assert seconds_after(event, done) < NOTICED_S
    body = by_hand.wait_for_phase("cpu", "failed")
    assert body["target"] == "stopped"
    assert body["endpoint"] is None
    assert body["reason"]["code"] == "container_exited"
    if how != "remove":
        running.reload()
        assert running.status == "exited"  # it stays for a while, for whoever wants to look at it
        code = {"stop": 0, "kill": 137}[how]  # 137 alone is no proof of too little memory
        assert f"exit code {code}" in body["reason"]["message"]
        body = wait_for(lambda: by_hand.instance("cpu"), lambda body: body["reason"]["log_tail"])
        assert "/api/" in "\n".join(body["reason"]["log_tail"])
        assert "Listening on" in by_hand.call("GET", "instances/cpu/logs?tail=10000").text
    assert by_hand.started("cpu")["reason"] is None


def test_a_container_started_by_hand_is_adopted_by_its_event(by_hand: Daemon, running: Container) -> None:
    running.stop()
    by_hand.wait_for_phase("cpu", "failed")
    since = last_event(by_hand)
    running.start()
    done = datetime.now(UTC)
    assert seconds_after(happened(by_hand, since, "adopting"), done) < NOTICED_S
    body = by_hand.wait_for_phase("cpu", "ready")
    assert (body["target"], body["reason"], body["container"]["id"]) == ("running", None, running.id)


def test_a_container_restarted_by_hand_is_adopted_at_its_new_address(
    by_hand: Daemon, running: Container
) -> None:
    since = last_event(by_hand)
    running.restart()
    done = datetime.now(UTC)
    assert seconds_after(happened(by_hand, since, "adopting"), done) < NOTICED_S
    body = by_hand.wait_for_phase("cpu", "ready")
    assert (body["target"], body["reason"], body["container"]["id"]) == ("running", None, running.id)
    assert requests.get(f"{body['endpoint']}/api/version", timeout=5).ok


def test_a_paused_container_is_unhealthy_at_once_and_says_how_to_let_it_go_on(
    by_hand: Daemon, running: Container
) -> None:
    since = last_event(by_hand)
    running.pause()
    done = datetime.now(UTC)
    assert seconds_after(happened(by_hand, since, "unhealthy"), done) < NOTICED_S
    body = by_hand.instance("cpu")
    assert (body["phase"], body["health"]) == ("ready", "unhealthy")
    assert body["reason"]["code"] == "instance_unhealthy"
    assert f"docker unpause {running.name}" in body["reason"]["message"]
    running.unpause()
    done = datetime.now(UTC)
    assert seconds_after(happened(by_hand, since, "healthy"), done) < NOTICED_S
    body = by_hand.instance("cpu")
    assert (body["phase"], body["health"], body["reason"]) == ("ready", "healthy", None)


def test_a_paused_container_can_be_stopped(
    by_hand: Daemon, running: Container, docker_client: docker.DockerClient
) -> None:
    running.pause()
    by_hand.stopped("cpu")
    assert docker_client.containers.list(all=True, filters={"id": str(running.id)}) == []


@pytest.mark.parametrize("events", ["silent", "refused"])
def test_without_events_the_listing_finds_what_was_done_by_hand(
    engine: Engine,
    new_daemon: NewDaemon,
    docker_client: docker.DockerClient,
    events: Literal["silent", "refused"],
) -> None:
    with EngineProxy(engine.url) as proxy:
        proxy.events = events
        daemon = new_daemon(engine_url=proxy.url).start()
        container = docker_client.containers.get(daemon.started("cpu")["container"]["id"])
        wait_for(lambda: any(request.startswith("GET /events") for request in proxy.requests))
        container.stop()
        body = daemon.wait_for_phase("cpu", "failed")
        assert (body["target"], body["reason"]["code"]) == ("stopped", "container_exited")
        container.start()
        assert daemon.wait_for_phase("cpu", "ready")["container"]["id"] == container.id
        container.pause()
        body = wait_for(lambda: daemon.instance("cpu"), lambda body: body["health"] == "unhealthy")
        assert body["phase"] == "ready"
        container.unpause()
        wait_for(lambda: daemon.instance("cpu"), lambda body: body["health"] == "healthy")
        container.remove(force=True)
        # The listing may find it ended first, and removed the next time.
        body = wait_for(lambda: daemon.instance("cpu"), lambda body: body["container"] is None)
        assert (body["phase"], body["reason"]["code"]) == ("failed", "container_exited")
        assert daemon.started("cpu")["phase"] == "ready"
        told = [event["detail"] for event in daemon.events() if event["kind"] == "events_refused"]
        assert told == (["Forbidden"] if events == "refused" else [])


def an_address_of_this_machine() -> str:
    return next(str(address) for _, address in interface_addresses() if not address.is_loopback)


def test_instances_of_an_engine_on_another_machine_say_what_they_need_to_be_reached(
    engine: Engine, new_daemon: NewDaemon, docker_client: docker.DockerClient, manager_id: str
) -> None:
    with EngineProxy(engine.url, address=an_address_of_this_machine()) as proxy:
        daemon = new_daemon(
            instances={"lost": {"template": "sim"}, "routed": {"template": "routed"}},
            templates={"routed": {"reach": "network"}},
            engine_url=proxy.url,
        ).start()
        body = daemon.instance("lost")
        assert (body["phase"], body["reason"]["code"]) == ("unavailable", "instance_unavailable")
        answer = daemon.begin("lost", "start")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "instance_unavailable")
        for part in (proxy.url, "another machine", "`reach: network`", "'sim'"):
            assert part in answer.json()["error"]["message"]
        assert docker_client.containers.list(all=True, filters={"name": f"{manager_id}-ollama-lost"}) == []
        assert daemon.started("routed")["phase"] == "ready"


# --- what is asked for ---


def test_a_missing_image_is_refused_with_the_remedy_and_never_pulled_silently(
    engine: Engine, new_daemon: NewDaemon, docker_client: docker.DockerClient, manager_id: str
) -> None:
    unreachable = "127.0.0.1:1/nothing:here"
    with EngineProxy(engine.url) as proxy:
        daemon = new_daemon(
            templates={"sim": {"image": unreachable}},
            config={"allow": {"images": [IMAGE, unreachable]}},
            engine_url=proxy.url,
        ).start()
        answer = daemon.begin("cpu", "start")
        assert answer.status_code == 503
        error = answer.json()["error"]
        assert error["code"] == "image_missing"
        assert "ollama-manager pull" in error["message"]
        assert not any("/images/create" in request for request in proxy.requests)
        body = daemon.instance("cpu")
        assert (body["phase"], body["target"], body["container"]) == ("failed", "stopped", None)

        answer = daemon.call("POST", "pull", json={})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "image_missing"
        assert unreachable in answer.json()["error"]["message"]
        assert "Traceback" not in daemon.log()
        assert daemon.call("GET", "/readyz").status_code == 200


def test_a_missing_network_is_created_once_and_never_removed(
    new_daemon: NewDaemon, docker_client: docker.DockerClient, manager_id: str
) -> None:
    name = f"net-{manager_id}"
    longer = docker_client.networks.create(f"{name}-of-somebody-else")  # the engine's filter finds it too
    try:
        ids = [f"cpu{number}" for number in range(6)]
        daemon = new_daemon(
            instances={id_: {"template": "sim"} for id_ in ids},
            templates={"sim": {"network": name}},
            config={"allow": {"networks": ["ollama-manager", name]}},
        ).start()
        with ThreadPoolExecutor(len(ids)) as pool:
            bodies = list(pool.map(daemon.started, ids))
        (network,) = docker_client.networks.list(names=[f"^{name}$"])
        network.reload()
        assert {container.id for container in network.containers} == {
            body["container"]["id"] for body in bodies
        }
        with ThreadPoolExecutor(len(ids)) as pool:
            list(pool.map(daemon.stopped, ids))
        network.reload()
        assert network.containers == []
        network.remove()
        daemon.started("cpu0")  # and it is created again when somebody removed it
        daemon.stopped("cpu0")
        daemon.stop()
        names = sorted(str(network.name) for network in docker_client.networks.list(names=[name]))
        assert names == [name, f"{name}-of-somebody-else"]
        longer.reload()
        assert longer.containers == []
    finally:
        for network in docker_client.networks.list(names=[name]):
            network.remove()


def test_a_container_is_hardened_and_computes_on_the_cpu_alone(
    new_daemon: NewDaemon, docker_client: docker.DockerClient, manager_id: str
) -> None:
    limits = {"memory": "256m", "pids": 128, "shm": "32m"}
    daemon = new_daemon(templates={"sim": {"limits": limits}}).start()
    body = daemon.started("cpu")
    container = docker_client.containers.get(body["container"]["id"])
    host = container.attrs["HostConfig"]
    status = Path(f"/proc/{container.attrs['State']['Pid']}/status").read_text()
    assert re.findall(r"^Cap(?:Inh|Prm|Eff|Bnd|Amb):\s*(\S+)", status, re.MULTILINE) == ["0" * 16] * 5
    assert re.search(r"^NoNewPrivs:\s*1$", status, re.MULTILINE)
    assert not host["CapAdd"]
    assert host["Privileged"] is False
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert host["ReadonlyRootfs"] is True
    podman_s_own = {"/run", "/var/tmp"} if is_podman() else set()  # Podman 4 adds them to a read-only root
    assert set(host["Tmpfs"]) - podman_s_own == {"/root/.ollama", "/tmp"}
    assert all("nosuid" in options and "nodev" in options for options in host["Tmpfs"].values())
    assert (host["PidsLimit"], host["ShmSize"]) == (128, 32 * 2**20)
    assert host["Memory"] == host["MemorySwap"] == 256 * 2**20
    assert host["RestartPolicy"]["Name"] == "no"
    assert host["AutoRemove"] is False
    published = [bindings for bindings in (host["PortBindings"] or {}).values() if bindings]
    assert published == []  # nothing is published when the address is reachable
    assert list(container.attrs["NetworkSettings"]["Networks"]) == ["ollama-manager"]
    if not is_podman():  # it reports neither
        assert host["LogConfig"]["Config"]["max-size"]
        assert host["Runtime"] == "runc"
    assert {"host", "container"}.isdisjoint({host["PidMode"], host["IpcMode"], host["UTSMode"]})
    assert container.labels["ollama-manager.manager"] == manager_id
    assert container.labels["ollama-manager.instance"] == "cpu"
    assert container.labels["ollama-manager.device"] == "cpu"
    assert container.labels["ollama-manager.template-hash"] == body["container"]["template_hash"]

    assert host["DeviceRequests"] is None
    assert host["Devices"] in (None, [])
    environment = Path(f"/proc/{container.attrs['State']['Pid']}/environ").read_text().split("\0")
    assert {
        "NVIDIA_VISIBLE_DEVICES=void",
        "CUDA_VISIBLE_DEVICES=-1",
        "OLLAMA_VULKAN=0",
        "OLLAMA_LLM_LIBRARY=cpu",
    } < set(environment)
    requests.post(f"{body['endpoint']}/api/generate", json={"model": "tiny"}, timeout=10)
    (model,) = requests.get(f"{body['endpoint']}/api/ps", timeout=5).json()["models"]
    assert model["size_vram"] == 0


def test_reached_by_loopback_an_instance_keeps_its_one_port_for_good(
    new_daemon: NewDaemon, docker_client: docker.DockerClient
) -> None:
    daemon = new_daemon(templates={"sim": {"reach": "loopback"}})
    port = free_port()
    store_instance(daemon.state_dir, InstanceRow(id="cpu", loopback_port=port))
    daemon.start()
    endpoint = daemon.started("cpu")["endpoint"]
    assert endpoint == f"http://127.0.0.1:{port}"
    assert requests.get(f"{endpoint}/api/version", timeout=5).ok
    container = docker_client.containers.get(daemon.instance("cpu")["container"]["id"])
    assert container.attrs["HostConfig"]["PortBindings"] == {
        "11434/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(port)}]
    }
    daemon.stopped("cpu")
    assert daemon.started("cpu")["endpoint"] == endpoint
    daemon.stop()
    daemon.start()
    assert daemon.wait_for_phase("cpu", "ready")["endpoint"] == endpoint


# --- an engine that goes away ---


@pytest.fixture(scope="module")
def private() -> Iterator[PrivateEngine]:
    with PrivateEngine() as engine:
        ensure_simulated_image(engine.client())
        yield engine
    engine.assert_clean()


@contextmanager
def daemon_on(engine: PrivateEngine, directory: Path) -> Iterator[Daemon]:
    """A daemon with two instances, of which `cpu` is ready; `slow` needs long to start."""
    with making_daemons(engine, directory, new_manager_id()) as make:
        daemon = make(
            instances={"cpu": {"template": "sim"}, "slow": {"template": "slow"}},
            templates={"slow": {"env": {"OLLAMA_SIM_START_DELAY_S": "15"}}},
            lifecycle={"probe_interval_s": PROBE_S},
        ).start()
        daemon.started("cpu")
        yield daemon
        daemon.kill()


def answered(daemon: Daemon, method: str, path: str, **options: Any) -> requests.Response:
    """The answer to a call that must not wait for the engine."""
    began = time.monotonic()
    answer = daemon.call(method, path, **options)
    assert time.monotonic() - began < ANSWER_S
    return answer


def assert_the_engine_is_missed(daemon: Daemon, since: datetime) -> None:
    """It is said within two probe intervals, and all that needs no engine goes on."""
    answer = wait_for(
        lambda: daemon.call("GET", "/readyz"), lambda answer: answer.status_code == 503, within_s=10
    )
    assert any("engine" in reason for reason in answer.json()["reasons"])
    event = next(event for event in daemon.events() if event["kind"] == "engine_down")
    assert seconds_after(event, since) < 2 * PROBE_S + NOTICED_S
    for id_ in ("cpu", "slow"):
        assert answered(daemon, "GET", f"instances/{id_}").json()["reason"]["code"] == "engine_unavailable"
    for path in ("start", "start?wait=false", "stop", "stop?force=true"):
        for id_ in ("cpu", "slow"):
            answer = answered(daemon, "POST", f"instances/{id_}/{path}")
            if answer.ok:  # what runs already need not be started, what is stopped stopped
                assert answer.json()["changed"] is False
                continue
            assert answer.status_code == 503, answer.text
            assert answer.json()["error"]["code"] == "engine_unavailable"
            assert int(answer.headers["Retry-After"]) >= 1
    assert answered(daemon, "GET", "/healthz").status_code == 200
    assert answered(daemon, "GET", "/metrics").status_code == 200
    body = daemon.instance("cpu")
    assert (body["phase"], body["health"]) == ("ready", "healthy")
    assert requests.get(f"{body['endpoint']}/api/version", timeout=5).ok


@needs_private_engine
@not_on_podman("containers outlive its service (see the test of those that outlive their engine)")
def test_a_killed_engine_is_missed_and_what_it_ended_is_noticed_when_it_is_back(
    private: PrivateEngine, tmp_path: Path
) -> None:
    with daemon_on(private, tmp_path) as daemon, ThreadPoolExecutor(1) as pool:
        start = pool.submit(daemon.begin, "slow", "start")
        wait_for(lambda: daemon.instance("slow")["container"])
        killed = datetime.now(UTC)
        private.kill()
        try:
            answer = start.result(timeout=10)  # those who wait for a start are told, and not kept
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
            assert_the_engine_is_missed(daemon, killed)
        finally:
            private.start()
        daemon.wait_until_ready()
        body = daemon.wait_for_phase("cpu", "failed")
        assert body["reason"]["code"] == "container_exited"
        daemon.wait_for_phase("slow", "failed", "stopped")
        assert daemon.started("cpu")["phase"] == "ready"
        assert daemon.stopped("cpu")["phase"] == "stopped"


@needs_private_engine
def test_a_hung_engine_is_missed_and_nothing_has_changed_when_it_goes_on(
    private: PrivateEngine, tmp_path: Path
) -> None:
    with daemon_on(private, tmp_path) as daemon:
        before = daemon.instance("cpu")
        hung = datetime.now(UTC)
        private.pause()
        try:
            assert_the_engine_is_missed(daemon, hung)
        finally:
            private.resume()
        daemon.wait_until_ready()
        body = wait_for(lambda: daemon.instance("cpu"), lambda body: body["reason"] is None)
        assert (body["phase"], body["container"]) == ("ready", before["container"])
        kinds = [event["kind"] for event in daemon.events()]
        assert kinds.count("adopted") == kinds.count("container_ended") == 0
        assert daemon.stopped("cpu")["phase"] == "stopped"


@needs_private_engine
def test_a_log_is_refused_at_once_while_the_engine_hangs(private: PrivateEngine, tmp_path: Path) -> None:
    with daemon_on(private, tmp_path) as daemon:
        private.pause()
        try:
            wait_for(lambda: daemon.call("GET", "/readyz").status_code == 503)
            answer = answered(daemon, "GET", "instances/cpu/logs")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
        finally:
            private.resume()
        daemon.wait_until_ready()


@needs_private_engine
def test_containers_that_outlive_their_engine_stay_ready_all_along(tmp_path: Path) -> None:
    with PrivateEngine(live_restore=True) as engine:
        ensure_simulated_image(engine.client())
        with daemon_on(engine, tmp_path) as daemon:
            before = daemon.instance("cpu")
            killed = datetime.now(UTC)
            engine.kill()
            try:
                assert_the_engine_is_missed(daemon, killed)
            finally:
                engine.start()
            daemon.wait_until_ready()
            body = wait_for(lambda: daemon.instance("cpu"), lambda body: body["reason"] is None)
            assert (body["phase"], body["container"]) == ("ready", before["container"])
            assert "container_ended" not in [event["kind"] for event in daemon.events()]
            # Its events are heard again, on a new connection.
            with closing(engine.client()) as client:
                client.containers.get(before["container"]["id"]).kill()
            assert daemon.wait_for_phase("cpu", "failed")["reason"]["code"] == "container_exited"


@needs_private_engine
def test_a_daemon_may_be_there_before_its_engine(tmp_path: Path) -> None:
    engine = PrivateEngine()
    config = {
        "manager_id": new_manager_id(),
        "templates": {"dir": str(write_templates(tmp_path / "templates", {}))},
        "instances": {"cpu": {"template": "sim"}},
        "gpus": "none",
        "lifecycle": {"probe_interval_s": PROBE_S},
    }
    with Daemon(tmp_path, config, engine_url=engine.url) as daemon:
        daemon.start(until_ready=False).wait_until_alive()
        answer = daemon.call("GET", "/readyz")
        assert answer.status_code == 503
        assert engine.url in "".join(answer.json()["reasons"])
        body = daemon.instance("cpu")
        assert (body["phase"], body["reason"]["code"]) == ("unavailable", "engine_unavailable")
        for action in ("start", "stop"):
            answer = answered(daemon, "POST", f"instances/cpu/{action}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
        with engine:
            ensure_simulated_image(engine.client())
            daemon.wait_until_ready()
            assert daemon.instance("cpu")["phase"] == "stopped"
            assert daemon.started("cpu")["phase"] == "ready"
            daemon.stop()
