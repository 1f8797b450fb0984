"""compose/swarm.yaml on two real engines: the daemon as a service, and instances that it reaches by name."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests
import yaml

from tests.support.daemon import COMPUTE, ROOT, wait_for
from tests.support.exporters import smi
from tests.support.fixtures import write_templates
from tests.support.manager_image import ensure_manager_image
from tests.support.swarm import Swarm, swarm_obstacles
from tests.tools.base import ensure_python_image

if TYPE_CHECKING:
    from collections.abc import Iterator

    from docker.models.containers import Container

KEY = "a-key-that-nobody-would-guess"
CARD = "GPU-aaaaaaaa-0000-4000-8000-000000000001"
PORT = 11435
GIB = 2**30
# What an exporter says, without the card that it would need.
EXPORTER = """
import http.server, os
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = os.environ["TOLD"].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer(("", 9835), Answer).serve_forever()
"""


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    if obstacles := swarm_obstacles():
        pytest.skip("; ".join(obstacles))
    if subprocess.run(["docker", "stack", "--help"], capture_output=True, check=False).returncode:
        pytest.skip("the command `docker` is not installed, or knows no stacks")
    with Swarm(cards={"worker": (CARD,)}) as swarm:
        yield swarm
    swarm.assert_clean()


class Stack:
    """compose/swarm.yaml as compose/README.md says, with the simulated Ollama in the templates."""

    def __init__(self, swarm: Swarm, home: Path) -> None:
        self._swarm = swarm
        self._home = home
        socket = Path(swarm.manager.url.removeprefix("unix://"))
        key_file = home / "operator.key"
        key_file.write_text(f"{KEY}\n", encoding="ascii")
        self._environment = {
            **os.environ,
            "DOCKER_HOST": swarm.manager.url,
            "DOCKER_GID": str(socket.stat().st_gid),
            "DOCKER_SOCKET": str(socket),
            "MANAGER_IMAGE": ensure_manager_image(swarm.manager),
            "MANAGER_KEY_FILE": str(key_file),
        }
        templates = write_templates(home / "templates", {"ollama-cpu": {}, "ollama-gpu": {"device": "gpu"}})
        override = {
            "version": "3.8",
            "services": {
                "manager": {
                    "environment": {
                        "OLLAMA_MANAGER_TEMPLATES__DIR": "/templates",
                        "OLLAMA_MANAGER_LIFECYCLE__PROBE_INTERVAL_S": "0.5",
                    },
                    "volumes": [f"{templates}:/templates:ro"],
                },
                "gpu-exporter": {
                    "image": ensure_python_image(swarm.worker.client()),
                    "command": ["python3", "-c", EXPORTER],
                    "environment": {
                        "TOLD": smi(
                            CARD,
                            memory_total_bytes=24 * GIB,
                            memory_used_bytes=2 * GIB,
                            memory_free_bytes=22 * GIB,
                        )
                    },
                },
            },
        }
        self._override = home / "override.yaml"
        self._override.write_text(yaml.safe_dump(override), encoding="utf-8")

    def deploy(self) -> None:
        files = ("-c", str(ROOT / "compose" / "swarm.yaml"), "-c", str(self._override))
        self.docker("stack", "deploy", "--resolve-image", "never", *files, "manager")

    def docker(self, *arguments: str) -> str:
        result = subprocess.run(
            ["docker", *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def call(self, method: str, path: str, **options: Any) -> requests.Response:
        return requests.request(
            method,
            f"http://{self._swarm.manager.address}:{PORT}{path}",
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=60,
            **options,
        )

    def chat(self, model: str) -> requests.Response:
        message = {"role": "user", "content": "hi"}
        return self.call("POST", "/api/chat", json={"model": model, "messages": [message], "stream": False})

    def instance(self, instance_id: str) -> dict[str, Any]:
        body: dict[str, Any] = self.call("GET", f"{COMPUTE}/instances/{instance_id}").json()
        return body

    def instance_ids(self) -> set[str]:
        return {one["id"] for one in self.call("GET", f"{COMPUTE}/instances").json()["instances"]}

    def container(self) -> Container:
        """That of the daemon; raises ValueError unless it is one."""
        found = self._swarm.client().containers.list(
            filters={"label": "com.docker.swarm.service.name=manager_manager"}
        )
        (container,) = found
        return container

    def wait_until_ready(self) -> None:
        def status() -> int:
            try:
                return self.call("GET", "/readyz").status_code
            except requests.ConnectionError:
                return 0

        try:
            wait_for(status, lambda code: code == 200, within_s=60)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.words()}") from None

    def words(self) -> str:
        """What the swarm and the daemon say of it."""
        tasks = self.docker("service", "ps", "--no-trunc", "manager_manager")
        logs = [one.logs().decode() for one in self._swarm.client().containers.list(all=True)]
        return "\n".join([tasks, *logs])


@pytest.mark.timeout(600)
def test_the_daemon_as_a_service_reaches_instances_on_other_nodes_by_name(
    swarm: Swarm, tmp_path: Path
) -> None:
    swarm.worker.label(gpu="true")
    stack = Stack(swarm, tmp_path)
    stack.deploy()
    stack.wait_until_ready()
    wait_for(stack.instance_ids, {"manager-cpu", "worker-cpu", "worker-gpu0"}.__eq__, within_s=20)

    # Not root, with nothing beyond the socket's group, and closed to whoever has no key.
    url = f"http://{swarm.manager.address}:{PORT}"
    assert requests.get(f"{url}{COMPUTE}/instances", timeout=5).status_code == 401
    identity = stack.container().exec_run(["python3", "-c", "import os; print(os.getuid())"])
    assert identity.output == b"10001\n"
    assert stack.container().exec_run(["ollama-manager", "status"]).exit_code == 0

    # An instance on the worker answers through the port of the manager, which reaches it by its name.
    answer = stack.chat("tiny@worker-gpu0")
    assert answer.status_code == 200, f"{answer.text}\n{stack.words()}"
    assert answer.headers["X-Instance"] == "worker-gpu0"
    before = stack.instance("worker-gpu0")
    assert before["endpoint"] == "http://default-ollama-worker-gpu0:11434"
    api: Any = swarm.client().api
    (service,) = api.services(filters={"name": "default-ollama-worker-gpu0"})
    assert "Ports" not in service["Spec"]["EndpointSpec"]
    (task,) = swarm.tasks(service["ID"])
    assert task["NodeID"] == swarm.worker.node_id

    # The exporter beside the card is reached over the same network, and has no port either.
    def free() -> int | None:
        (card,) = stack.call("GET", f"{COMPUTE}/gpus").json()["gpus"]
        found: int | None = card["vram_free_bytes"]
        return found

    wait_for(free, (22 * GIB).__eq__, within_s=30)

    # Another daemon finds the state, and takes over what runs.
    stack.docker("service", "update", "--force", "--detach=false", "--quiet", "manager_manager")
    stack.wait_until_ready()
    after = wait_for(lambda: stack.instance("worker-gpu0"), lambda now: now["phase"] == "ready")
    assert (after["endpoint"], after["starts"]) == (before["endpoint"], before["starts"])
    assert swarm.tasks(service["ID"])[0]["ID"] == task["ID"]
    assert stack.chat("tiny@worker-gpu0").status_code == 200

    assert stack.call("POST", f"{COMPUTE}/instances/worker-gpu0/stop").status_code == 200
    api.remove_service(service["ID"])
    stack.docker("stack", "rm", "manager")
    networks = swarm.client().networks
    wait_for(lambda: networks.list(names=["ollama-manager-swarm"]), lambda found: found == [], within_s=20)
