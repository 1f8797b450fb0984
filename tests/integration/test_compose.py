"""The deployment in compose/: its files, and the daemon in a container with everything around it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests
import yaml

from tests.integration.conftest import write_templates
from tests.nvml import standin
from tests.simulated.image import ensure_simulated_image
from tests.support.daemon import COMPUTE, ROOT, free_port, wait_for
from tests.support.engine import PrivateEngine
from tests.support.manager_image import ensure_manager_image

if TYPE_CHECKING:
    import docker
    from docker.models.containers import Container

COMPOSE = ROOT / "compose"
KEY = "a-key-that-nobody-would-guess"
CARD = standin.Card("GPU-8c1f2d34-0b5a-4c1e-9f37-2a6d1e5b7c90", vram_used=2**30)
SIMULATED_ENDPOINT = "http://default-ollama-cpu:11434"

Compose = Callable[..., str]


def compose_command() -> list[str]:
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    found = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    if found.returncode == 0:
        return ["docker", "compose"]
    pytest.skip("neither docker-compose nor the compose plugin is installed")


@dataclass(frozen=True)
class Project:
    """The compose project on an engine of its own.

    Attributes:
        compose: runs docker-compose with the project's files and arguments, returns its output.
        port: where the daemon's API is published.
    """

    compose: Compose
    client: docker.DockerClient
    port: int

    def call(self, method: str, path: str, **options: Any) -> requests.Response:
        return requests.request(
            method,
            f"http://127.0.0.1:{self.port}{path}",
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=60,
            **options,
        )

    def instance(self, instance_id: str) -> dict[str, Any]:
        body: dict[str, Any] = self.call("GET", f"{COMPUTE}/instances/{instance_id}").json()
        return body

    def change(self, instance_id: str, verb: str) -> dict[str, Any]:
        answer = self.call("POST", f"{COMPUTE}/instances/{instance_id}/{verb}")
        assert answer.status_code == 200, f"{answer.text}\n{self.compose('logs', '--no-color')}"
        body: dict[str, Any] = answer.json()["instance"]
        return body

    def daemon(self) -> Container:
        (container,) = self.client.containers.list(filters={"label": "com.docker.compose.service=manager"})
        return container

    def wait_until_ready(self) -> None:
        def status() -> int:
            try:
                return self.call("GET", "/readyz").status_code
            except requests.ConnectionError:
                return 0

        try:
            wait_for(status, lambda code: code == 200, within_s=40)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.compose('logs', '--no-color')}") from None


@pytest.fixture(scope="module")
def private_engine() -> Iterator[PrivateEngine]:
    """Names of networks and volumes are fixed in compose/, so nobody else may be on this engine."""
    compose_command()
    if os.geteuid() != 0:
        pytest.skip("an engine whose socket can be mounted into a container needs root")
    with PrivateEngine() as engine:
        yield engine


@pytest.fixture(scope="module")
def image(private_engine: PrivateEngine) -> str:
    return ensure_manager_image(private_engine)


@contextmanager
def project(engine: PrivateEngine, client: docker.DockerClient, home: Path, image: str) -> Iterator[Project]:
    """The project as compose/README.md says, both files of it, with the simulated Ollama in the templates."""
    socket = Path(engine.url.removeprefix("unix://"))
    group = socket.stat().st_gid
    key_file = home / "operator.key"
    key_file.write_text(f"{KEY}\n", encoding="ascii")
    key_file.chmod(0o640)
    os.chown(key_file, 0, group)
    templates = write_templates(home / "templates", {"ollama-cpu": {}, "ollama-gpu": {"device": "gpu"}})
    library = standin.build(home / "nvml")
    standin.write(home / "nvml" / "state", [CARD])
    port = free_port()
    override = home / "override.yml"
    service = {
        "environment": {
            "OLLAMA_MANAGER_TEMPLATES__DIR": "/templates",
            "OLLAMA_MANAGER_LIFECYCLE__PROBE_INTERVAL_S": "0.5",
            **standin.environment(Path("/nvml/current", library.name), Path("/nvml/state")),
        },
        "volumes": [f"{templates}:/templates:ro", f"{home}/nvml:/nvml:ro"],
    }
    override.write_text(yaml.safe_dump({"services": {"manager": service}}), encoding="utf-8")
    environment = {
        **os.environ,
        "DOCKER_HOST": engine.url,
        "DOCKER_GID": str(group),
        "DOCKER_SOCKET": str(socket),
        "MANAGER_IMAGE": image,
        "MANAGER_KEY_FILE": str(key_file),
        "MANAGER_PORT": str(port),
    }
    files = [COMPOSE / "docker-compose.yml", COMPOSE / "docker-compose.gpu.yml", override]
    arguments = [part for file in files for part in ("--file", str(file))]

    def compose(*command: str) -> str:
        result = subprocess.run(
            [*compose_command(), "--project-name", "oem-test", *arguments, *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    yield Project(compose, client, port)


@pytest.mark.parametrize("files", [["docker-compose.yml"], ["docker-compose.yml", "docker-compose.gpu.yml"]])
def test_compose_reads_the_files_and_publishes_on_loopback_only(files: list[str], tmp_path: Path) -> None:
    (tmp_path / "operator.key").write_text(KEY, encoding="ascii")
    result = subprocess.run(
        [*compose_command(), *(part for file in files for part in ("--file", str(COMPOSE / file))), "config"],
        env={**os.environ, "DOCKER_GID": "997", "MANAGER_KEY_FILE": str(tmp_path / "operator.key")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    service = yaml.safe_load(result.stdout)["services"]["manager"]
    assert [str(gid) for gid in service["group_add"]] == ["997"]
    (port,) = service["ports"]
    published = port if isinstance(port, str) else f"{port.get('host_ip')}:{port['published']}"
    assert published.startswith("127.0.0.1:11435")
    assert ("pid" in service) is (len(files) == 2)


def test_compose_reads_the_profile_for_monitoring_and_publishes_on_loopback_only(tmp_path: Path) -> None:
    keys = ("MANAGER_KEY_FILE", "MONITORING_KEY_FILE", "GRAFANA_PASSWORD_FILE")
    for name in keys:
        (tmp_path / name).write_text(KEY, encoding="ascii")
    result = subprocess.run(
        [
            *compose_command(),
            "--file",
            str(COMPOSE / "docker-compose.yml"),
            "--profile",
            "monitoring",
            "config",
        ],
        env={**os.environ, "DOCKER_GID": "997", **{name: str(tmp_path / name) for name in keys}},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    services = yaml.safe_load(result.stdout)["services"]
    for name in ("prometheus", "grafana"):
        service = services[name]
        assert service["profiles"] == ["monitoring"]
        _, _, tag = service["image"].partition(":")
        assert tag not in ("", "latest")
        for port in service.get("ports", []):
            address = port if isinstance(port, str) else f"{port.get('host_ip')}:{port['published']}"
            assert address.startswith("127.0.0.1:")
        for volume in service["volumes"]:
            source = volume.split(":")[0] if isinstance(volume, str) else volume["source"]
            assert not source.startswith("/") or Path(source).is_file(), source
    assert "profiles" not in services["manager"]


def test_the_exporters_of_a_swarm_are_one_on_each_node_with_cards_and_answer_for_their_own_node() -> None:
    file = COMPOSE / "gpu-exporters.yaml"
    result = subprocess.run(
        [*compose_command(), "--file", str(file), "config"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    (service,) = yaml.safe_load(file.read_text(encoding="utf-8"))["services"].values()
    assert service["deploy"]["mode"] == "global"
    assert service["deploy"]["placement"]["constraints"] == ["node.labels.gpu == true"]
    assert [(port["published"], port["mode"]) for port in service["ports"]] == [(9400, "host")]
    # Swarm ends a task with reserved generic resources at each change of its node.
    assert "reservations" not in service["deploy"]["resources"]
    _, _, tag = service["image"].partition(":")
    assert tag[0].isdigit()


def test_compose_says_what_is_missing_when_the_group_is_not_set() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DOCKER_GID"}
    result = subprocess.run(
        [*compose_command(), "--file", str(COMPOSE / "docker-compose.yml"), "config"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "stat -c %g" in result.stderr


@pytest.mark.timeout(600)
def test_the_daemon_in_a_container_starts_reaches_and_adopts_instances_and_leaves_nothing(
    private_engine: PrivateEngine, image: str, tmp_path: Path
) -> None:
    client = private_engine.client()
    ensure_simulated_image(client)
    with project(private_engine, client, tmp_path, image) as it:
        it.compose("up", "--detach")
        it.wait_until_ready()

        # Not root, with nothing beyond the socket's group, and closed to whoever has no key.
        identity = run_inside(it.daemon(), "import os; print(os.getuid(), os.getgid())")
        assert identity.split() == ["10001", "10001"]
        assert requests.get(f"http://127.0.0.1:{it.port}{COMPUTE}/instances", timeout=5).status_code == 401
        assert requests.get(f"http://127.0.0.1:{it.port}/healthz", timeout=5).status_code == 200

        # The command line works beside it: it finds the daemon and its key.
        for command in ("status", "doctor"):
            answer = it.daemon().exec_run(["ollama-manager", command])
            assert answer.exit_code == 0, answer.output

        # The card is read through NVML, and an instance is bound to it by its UUID.
        devices = it.daemon().attrs["HostConfig"]["DeviceRequests"]
        assert [request["Capabilities"] for request in devices] == [[["utility"]]]
        (card,) = it.call("GET", f"{COMPUTE}/gpus").json()["gpus"]
        assert card["uuid"] == CARD.uuid

        # An instance is reached by its name on the network that it shares with the daemon.
        body = it.change("cpu", "start")
        assert (body["phase"], body["endpoint"]) == ("ready", SIMULATED_ENDPOINT)
        assert "quick brown fox" in answer_from_inside(it.daemon(), body["endpoint"])
        body = it.change("gpu0", "start")
        requested = client.containers.get(body["container"]["id"]).attrs["HostConfig"]["DeviceRequests"]
        assert requested[0]["DeviceIDs"] == [CARD.uuid]

        # A daemon that comes back finds its state, and takes over what runs.
        before = it.instance("cpu")
        it.daemon().restart(timeout=10)
        it.wait_until_ready()
        after = wait_for(lambda: it.instance("cpu"), lambda now: now["phase"] == "ready")
        assert after["container"]["id"] == before["container"]["id"]
        assert after["starts"] == before["starts"]
        assert after["endpoint"] == SIMULATED_ENDPOINT

        it.change("cpu", "stop")
        it.change("gpu0", "stop")
        it.compose("down", "--volumes")
    assert client.containers.list(all=True) == []
    assert [network.name for network in client.networks.list() if network.name == "ollama-manager"] == []
    assert [volume.name for volume in client.volumes.list() if "manager" in volume.name] == []


@pytest.mark.timeout(600)
def test_the_image_says_by_itself_whether_the_daemon_is_alive(
    private_engine: PrivateEngine, image: str
) -> None:
    client = private_engine.client()
    # On its own loopback and without an engine: alive all the same.
    container = client.containers.run(image, detach=True)
    try:
        check = client.images.get(image).attrs["Config"]["Healthcheck"]["Test"][1:]
        wait_for(lambda: container.exec_run(check).exit_code, lambda code: code == 0, within_s=30)
    finally:
        container.remove(force=True, v=True)


def run_inside(container: Container, script: str, *arguments: str) -> str:
    """The output of a Python script in a container."""
    result = container.exec_run(["python3", "-c", script, *arguments])
    assert isinstance(result.output, bytes)
    assert result.exit_code == 0, result.output.decode()
    return result.output.decode()


def answer_from_inside(container: Container, endpoint: str) -> str:
    """What a client in `container` is answered by the instance."""
    script = (
        "import json, sys, urllib.request as u\n"
        "body = json.dumps({'model': 'tiny', 'prompt': 'hello', 'stream': False}).encode()\n"
        "print(json.load(u.urlopen(sys.argv[1] + '/api/generate', body, timeout=20))['response'])\n"
    )
    return run_inside(container, script, endpoint)
