"""The swarm of tests does what the tests of a daemon need of one, and leaves nothing behind."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import pytest
from docker.types import EndpointSpec, Resources, RestartPolicy

from tests.simulated.image import IMAGE
from tests.support.daemon import wait_for
from tests.support.swarm import CARD_KIND, Swarm, SwarmHost, swarm_obstacles

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(bool(swarm_obstacles()), reason="; ".join(swarm_obstacles()))

CARD = "GPU-aaaaaaaa-0000-4000-8000-000000000001"
PORT = 30000


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    with Swarm(cards={"worker": (CARD,)}) as swarm:
        yield swarm
    swarm.assert_clean()


@pytest.fixture
def services(swarm: Swarm) -> Iterator[list[str]]:
    """Ids of services that are removed after the test; their containers end soon after."""
    made: list[str] = []
    yield made
    api: Any = swarm.client().api
    for service in made:
        api.remove_service(service)


def ollama_on(host: SwarmHost, swarm: Swarm, services: list[str], **options: Any) -> str:
    services_of_manager: Any = swarm.client().services
    service = services_of_manager.create(
        IMAGE,
        constraints=[f"node.id=={host.node_id}"],
        restart_policy=RestartPolicy(condition="none"),
        **{"endpoint_spec": EndpointSpec(mode="dnsrr"), **options},
    )
    services.append(service.id)
    return str(service.id)


def published(port: int) -> EndpointSpec:
    ports: Any = {port: (11434, "tcp", "host")}
    return EndpointSpec(mode="dnsrr", ports=ports)


def wait_until_running(swarm: Swarm, service: str) -> dict[str, Any]:
    tasks = wait_for(
        lambda: swarm.tasks(service),
        lambda tasks: bool(tasks) and tasks[0]["Status"]["State"] == "running",
        within_s=20,
    )
    return tasks[0]


def version_at(url: str) -> str | None:
    try:
        with urlopen(f"{url}/api/version", timeout=2) as answer:
            return str(json.load(answer)["version"])
    except OSError:
        return None


def test_both_nodes_are_ready_under_their_names_and_addresses(swarm: Swarm) -> None:
    nodes = swarm.client().nodes.list()
    assert {
        (node.attrs["Description"]["Hostname"], node.attrs["Spec"]["Role"], node.attrs["Status"]["State"])
        for node in nodes
    } == {("manager", "manager", "ready"), ("worker", "worker", "ready")}
    assert {node.id: node.attrs["Status"]["Addr"] for node in nodes} == {
        host.node_id: host.address for host in swarm.hosts
    }


def test_a_published_port_of_a_task_answers_at_the_address_of_its_host(
    swarm: Swarm, services: list[str]
) -> None:
    service = ollama_on(swarm.worker, swarm, services, endpoint_spec=published(PORT))
    assert wait_until_running(swarm, service)["NodeID"] == swarm.worker.node_id
    assert wait_for(lambda: version_at(f"http://{swarm.worker.address}:{PORT}"), within_s=20) == "0.24.0"
    assert version_at(f"http://{swarm.manager.address}:{PORT}") is None


def test_a_container_on_one_host_reaches_a_task_on_another_by_the_name_of_its_service() -> None:
    # A swarm of its own: where another test has cut the network, overlay networks need a minute to recover.
    with Swarm() as swarm:
        swarm.overlay("between")
        service = ollama_on(swarm.worker, swarm, [], name="far", networks=["between"])
        wait_until_running(swarm, service)
        near = swarm.manager.client().containers.run(IMAGE, detach=True, network="between")
        far = {"OLLAMA_HOST": "far:11434"}
        wait_for(lambda: near.exec_run(["ollama", "list"], environment=far).exit_code == 0, within_s=20)
    swarm.assert_clean()


def test_a_card_goes_to_one_task(swarm: Swarm, services: list[str]) -> None:
    one_card = Resources(generic_resources={CARD_KIND: 1})
    first = ollama_on(swarm.worker, swarm, services, resources=one_card)
    task = wait_until_running(swarm, first)
    assert task["GenericResources"] == [{"NamedResourceSpec": {"Kind": CARD_KIND, "Value": CARD}}]
    second = ollama_on(swarm.worker, swarm, services, resources=one_card)
    (task,) = wait_for(lambda: swarm.tasks(second), lambda tasks: tasks and "Err" in tasks[0]["Status"])
    assert "insufficient resources" in task["Status"]["Err"]


def test_a_node_without_network_is_down_until_the_network_is_back(swarm: Swarm) -> None:
    swarm.worker.cut_network()
    try:
        swarm.worker.wait_for_state("down")
    finally:
        swarm.worker.mend_network()
    swarm.worker.wait_for_state("ready")


def test_a_paused_engine_is_down_until_it_is_resumed(swarm: Swarm) -> None:
    swarm.worker.pause()
    try:
        swarm.worker.wait_for_state("down")
    finally:
        swarm.worker.resume()
    swarm.worker.wait_for_state("ready")


def test_a_killed_engine_is_down_until_it_is_started(swarm: Swarm) -> None:
    swarm.worker.kill()
    try:
        swarm.worker.wait_for_state("down")
    finally:
        swarm.worker.start()
    swarm.worker.wait_for_state("ready")


def test_the_engine_of_the_manager_can_be_restarted(swarm: Swarm) -> None:
    swarm.manager.restart()
    for host in swarm.hosts:
        host.wait_for_state("ready")


def test_a_drained_node_gets_no_task_until_it_is_active(swarm: Swarm, services: list[str]) -> None:
    swarm.worker.drain()
    try:
        service = ollama_on(swarm.worker, swarm, services)
        (task,) = wait_for(lambda: swarm.tasks(service), lambda tasks: tasks and "Err" in tasks[0]["Status"])
        assert task["Status"]["State"] == "pending"
    finally:
        swarm.worker.activate()
    wait_until_running(swarm, service)


def test_a_node_keeps_its_labels_and_gets_more(swarm: Swarm) -> None:
    swarm.worker.label(rack="one")
    swarm.worker.label(row="two")
    assert swarm.worker.node()["Spec"]["Labels"] == {"rack": "one", "row": "two"}


def test_hosts_have_the_same_image(swarm: Swarm) -> None:
    (id_,) = {host.client().images.get(IMAGE).id for host in swarm.hosts}
    assert id_


def test_a_container_reaches_what_listens_in_the_test(swarm: Swarm) -> None:
    with socket.create_server((swarm.address, 0)) as listener:
        listener.settimeout(20)
        where = {"OLLAMA_HOST": f"{swarm.address}:{listener.getsockname()[1]}"}
        client = swarm.worker.client()
        container = client.containers.run(IMAGE, ["list"], environment=where, detach=True)
        connection, (address, _) = listener.accept()
        connection.close()
        container.remove(force=True)
    assert address == swarm.worker.address


@pytest.mark.parametrize("state", ["killed", "paused", "cut off"])
def test_nothing_is_left_in_whatever_state_the_hosts_are(state: str) -> None:
    with Swarm() as swarm:
        swarm.overlay("between")
        service = ollama_on(swarm.worker, swarm, [], networks=["between"], endpoint_spec=published(PORT))
        wait_until_running(swarm, service)
        with pytest.raises(AssertionError, match="process"):
            swarm.assert_clean()
        for host in swarm.hosts:
            if state == "killed":
                host.kill()
            if state == "paused":
                host.pause()
            if state == "cut off":
                host.cut_network()
    swarm.assert_clean()
