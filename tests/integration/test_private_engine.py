"""The private engine does what the tests of the daemon need of one, and leaves nothing behind."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from docker.errors import APIError
from docker.types import DeviceRequest, Healthcheck

from tests.simulated.image import IMAGE, ensure_simulated_image
from tests.support.engine import EngineError, PrivateEngine, acquire_engine, private_engine_obstacles
from tests.support.engine_kinds import needs_names, needs_word_of_lost_memory, not_on_podman
from tests.support.ollama import set_knobs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import docker
    from docker.models.containers import Container

pytestmark = pytest.mark.skipif(
    bool(private_engine_obstacles()), reason="; ".join(private_engine_obstacles())
)

LIMIT_S = 20.0
T = TypeVar("T")
NETWORK = "ollama-manager"
GPU = "GPU-6f4b3a52-0000-4000-8000-000000000001"


@pytest.fixture(scope="module")
def engine() -> Iterator[PrivateEngine]:
    with PrivateEngine() as engine:
        ensure_simulated_image(engine.client())
        yield engine
    engine.assert_clean()


@pytest.fixture
def client(engine: PrivateEngine) -> Iterator[docker.DockerClient]:
    client = engine.client()
    yield client
    for container in client.containers.list(all=True):
        container.remove(force=True)


def within_limit(attempt: Callable[[], T]) -> T:
    """The result of `attempt` as soon as it neither fails nor is false."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            if result := attempt():
                return result
        except (OSError, URLError, APIError):
            if time.monotonic() > deadline:
                raise
        assert time.monotonic() < deadline
        time.sleep(0.01)


def version_of(url: str) -> Any:
    with urlopen(f"{url}/api/version", timeout=2) as answer:
        return json.load(answer)["version"]


def started(client: docker.DockerClient, **options: Any) -> Container:
    container = client.containers.create(IMAGE, **options)
    container.start()
    container.reload()
    return container


def test_a_container_is_reached_by_its_address_on_a_user_network_and_by_a_loopback_port(
    client: docker.DockerClient,
) -> None:
    network = client.networks.create(NETWORK)
    container = started(client, network=NETWORK, ports={"11434/tcp": ("127.0.0.1", None)})
    settings = container.attrs["NetworkSettings"]
    address = settings["Networks"][NETWORK]["IPAddress"]
    (binding,) = settings["Ports"]["11434/tcp"]

    assert within_limit(lambda: version_of(f"http://{address}:11434")) == "0.24.0"
    assert binding["HostIp"] == "127.0.0.1"
    assert within_limit(lambda: version_of(f"http://127.0.0.1:{binding['HostPort']}")) == "0.24.0"

    container.remove(force=True)
    network.remove()


@needs_names()
def test_a_container_reaches_the_host_and_another_container_by_name(client: docker.DockerClient) -> None:
    network = client.networks.create(NETWORK)
    network.reload()
    gateway = network.attrs["IPAM"]["Config"][0]["Gateway"]
    started(client, network=NETWORK, name="one")
    two = started(client, network=NETWORK, name="two")
    # `ollama list` is a client too: it asks whatever OLLAMA_HOST names.
    within_limit(
        lambda: two.exec_run(["ollama", "list"], environment={"OLLAMA_HOST": "one:11434"}).exit_code == 0
    )
    with socket.create_server((gateway, 0)) as listener:
        host = f"{gateway}:{listener.getsockname()[1]}"
        two.exec_run(["ollama", "list"], environment={"OLLAMA_HOST": host}, detach=True)
        listener.settimeout(LIMIT_S)
        listener.accept()[0].close()
    for container in client.containers.list():
        container.remove(force=True)
    network.remove()


@not_on_podman("cards come by CDI, not by the hook of the NVIDIA runtime")
def test_a_device_request_shows_the_gpu_to_the_container(client: docker.DockerClient) -> None:
    request = DeviceRequest(driver="nvidia", device_ids=[GPU], capabilities=[["gpu"]])
    container = started(client, device_requests=[request])
    assert f"NVIDIA_VISIBLE_DEVICES={GPU}" in _seen_environment(container)
    assert within_limit(lambda: f"id={GPU} " in container.logs().decode())


def test_without_a_device_request_the_image_shows_all_gpus_as_the_real_one_does(
    client: docker.DockerClient,
) -> None:
    container = started(client)
    assert "NVIDIA_VISIBLE_DEVICES=all" in _seen_environment(container)
    assert within_limit(lambda: "library=CUDA" in container.logs().decode())


def test_a_container_that_is_kept_off_the_gpus_says_so(client: docker.DockerClient) -> None:
    container = started(client, environment={"NVIDIA_VISIBLE_DEVICES": "void"})
    assert within_limit(lambda: "id=cpu library=cpu" in container.logs().decode())


@not_on_podman("it does not look at the driver of a device request")
def test_an_unknown_device_driver_is_refused_at_start(client: docker.DockerClient) -> None:
    request = DeviceRequest(driver="other", device_ids=[GPU], capabilities=[["gpu"]])
    container = client.containers.create(IMAGE, device_requests=[request])
    with pytest.raises(APIError, match="could not select device driver"):
        container.start()


@not_on_podman("its health checks are timers of systemd, which a private engine has not")
def test_ollama_list_is_a_health_check(client: docker.DockerClient) -> None:
    check = Healthcheck(test=["CMD", "ollama", "list"], interval=10**9, timeout=5 * 10**9)
    container = started(client, healthcheck=check)

    def healthy() -> bool:
        container.reload()
        return bool(container.attrs["State"]["Health"]["Status"] == "healthy")

    assert within_limit(healthy)


def test_the_image_starts_with_a_hardened_and_read_only_container(client: docker.DockerClient) -> None:
    container = started(
        client,
        read_only=True,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        pids_limit=64,
        mem_limit="256m",
        memswap_limit="256m",
    )
    assert within_limit(lambda: version_of(_url(container))) == "0.24.0"


def test_sigterm_ends_a_container_at_once_however_soon_it_comes(client: docker.DockerClient) -> None:
    for _ in range(5):
        container = client.containers.create(IMAGE)
        container.start()
        container.stop(timeout=30)
        assert container.wait()["StatusCode"] == 0  # 137 would mean that SIGTERM was lost
        container.remove()


def test_models_on_a_shared_volume_are_seen_by_another_container(client: docker.DockerClient) -> None:
    volume = {"models": {"bind": "/root/.ollama", "mode": "rw"}}
    one, two = started(client, volumes=volume), started(client, volumes=volume)
    within_limit(lambda: version_of(_url(one)) and version_of(_url(two)))
    set_knobs(_url(one), pullable="qwen3:0.6b")
    with urlopen(f"{_url(one)}/api/pull", b'{"model": "qwen3:0.6b"}', timeout=10) as answer:
        assert json.loads(answer.read().splitlines()[-1]) == {"status": "success"}
    assert b"qwen3:0.6b" in two.exec_run(["ollama", "list"], stream=False).output


@needs_word_of_lost_memory()
def test_a_container_that_takes_too_much_memory_is_killed(client: docker.DockerClient) -> None:
    container = started(
        client,
        mem_limit="64m",
        memswap_limit="64m",
        environment={"OLLAMA_SIM_ALLOCATE_BYTES": str(256 << 20)},
    )
    assert container.wait()["StatusCode"] == 137
    container.reload()
    assert container.attrs["State"]["OOMKilled"]


def test_a_child_that_takes_too_much_memory_dies_alone(client: docker.DockerClient) -> None:
    container = started(client, mem_limit="96m", memswap_limit="96m")
    within_limit(lambda: version_of(_url(container)))
    set_knobs(_url(container), allocate_bytes=512 << 20, allocate_in="child")
    assert within_limit(lambda: "llama runner terminated" in container.logs().decode())
    assert version_of(_url(container)) == "0.24.0"


@not_on_podman("containers outlive its service")
def test_a_killed_engine_comes_back_with_its_containers_ended(
    engine: PrivateEngine, client: docker.DockerClient
) -> None:
    container = started(client)
    url = _url(container)
    within_limit(lambda: version_of(url))
    engine.kill()
    assert version_of(url) == "0.24.0"  # a container outlives its daemon until that comes back
    engine.start()
    container.reload()
    assert container.status == "exited"
    container.start()
    container.reload()
    assert within_limit(lambda: version_of(_url(container))) == "0.24.0"


@not_on_podman("containers outlive its service")
def test_an_engine_can_be_restarted_in_order(engine: PrivateEngine, client: docker.DockerClient) -> None:
    before = engine.pid
    container = started(client)
    engine.restart()
    assert engine.pid != before
    container.reload()
    assert container.status == "exited"


def test_a_paused_engine_is_silent_until_it_is_resumed(engine: PrivateEngine) -> None:
    address = engine.url.removeprefix("unix://")
    request = b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n"
    engine.pause()
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(address)
            connection.sendall(request)
            connection.settimeout(0.3)
            with pytest.raises(TimeoutError):
                connection.recv(1)
            engine.resume()
            connection.settimeout(LIMIT_S)
            assert b" 200 " in connection.recv(64)
    finally:
        engine.resume()


def test_with_live_restore_containers_outlive_a_killed_engine() -> None:
    with PrivateEngine(live_restore=True) as engine:
        client = engine.client()
        ensure_simulated_image(client)
        client.networks.create(NETWORK)  # the default bridge of Podman 4 is one for the whole machine
        container = started(client, network=NETWORK)
        url = f"http://{container.attrs['NetworkSettings']['Networks'][NETWORK]['IPAddress']}:11434"
        within_limit(lambda: version_of(url))
        engine.kill()
        engine.start()
        container.reload()
        assert container.status == "running"
        assert version_of(url) == "0.24.0"
    engine.assert_clean()


def test_the_disk_of_an_engine_can_be_full() -> None:
    with (
        PrivateEngine(data_limit_bytes=8 << 20) as engine,
        pytest.raises(APIError, match="no space left on device"),
    ):
        ensure_simulated_image(engine.client())
    engine.assert_clean()


def test_two_engines_do_not_see_each_other(engine: PrivateEngine, client: docker.DockerClient) -> None:
    container = started(client, ports={"11434/tcp": ("127.0.0.1", None)})
    with PrivateEngine() as other:
        assert other.client().containers.list(all=True) == []
        assert other.bridge != engine.bridge
        assert within_limit(lambda: version_of(_url(container))) == "0.24.0"
    other.assert_clean()
    assert version_of(_url(container)) == "0.24.0"


@pytest.mark.parametrize("state", ["running", "killed", "paused"])
def test_nothing_is_left_after_stop_in_whatever_state_the_engine_is(state: str) -> None:
    with PrivateEngine() as engine:
        client = engine.client()
        ensure_simulated_image(client)
        client.networks.create(NETWORK)
        container = started(client, network=NETWORK, ports={"11434/tcp": ("127.0.0.1", None)})
        within_limit(
            lambda: version_of(
                f"http://{container.attrs['NetworkSettings']['Networks'][NETWORK]['IPAddress']}:11434"
            )
        )
        with pytest.raises(AssertionError, match="process"):
            engine.assert_clean()
        if state == "killed":
            engine.kill()
        if state == "paused":
            engine.pause()
    engine.assert_clean()


def test_an_engine_that_does_not_start_says_why_and_leaves_nothing() -> None:
    engine = PrivateEngine(["--storage-opt", "nonsense=1"])
    with pytest.raises(EngineError, match="nonsense"):
        engine.__enter__()
    engine.assert_clean()


def test_acquire_engine_yields_a_private_engine_where_one_can_run() -> None:
    with acquire_engine() as engine:
        assert isinstance(engine, PrivateEngine)
        assert engine.client().ping()
    engine.assert_clean()


def _url(container: Container) -> str:
    container.reload()
    return f"http://{container.attrs['NetworkSettings']['IPAddress']}:11434"


def _seen_environment(container: Container) -> list[str]:
    """The environment of the process itself, which has what the engine added for a device request."""
    pid = container.attrs["State"]["Pid"]
    return Path(f"/proc/{pid}/environ").read_text().split("\0")
