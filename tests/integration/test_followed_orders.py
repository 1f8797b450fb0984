"""Two gateways on one database and one engine: an order at one is in force at the other, and not undone."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.simulated.image import IMAGE, REPOSITORY
from tests.support.daemon import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import docker

    from tests.support.daemon import Daemon
    from tests.support.fixtures import NewDaemon
    from tests.support.postgres import Postgres

UPGRADE = f"{REPOSITORY}:followed"
# A change at one gateway is in force at the other one within a second; this machine does other things too.
FOLLOWED_S = 2.0
# Several times the quiet time (a resync interval of a second) after which a container would be recreated.
QUIET_S = 4.0
ENDS_ALL = ("--stop-instances",)

Pair = tuple["Daemon", "Daemon"]


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.database()


@pytest.fixture
def pair(url: str, new_daemon: NewDaemon) -> Callable[..., Pair]:
    """Makes two gateways; arguments are given to both, `second` is what differs at the second one."""

    def make(arguments: tuple[str, ...] = (), **second: Any) -> Pair:
        options = {"config": {"state": {"url": url}}, "lifecycle": {"drain_timeout_s": 1}}
        first = new_daemon(**options).start(arguments=arguments)
        return first, new_daemon(**options, name="second", **second).start(arguments=arguments)

    return make


@pytest.fixture
def upgrade(docker_client: docker.DockerClient) -> Iterator[str]:
    docker_client.images.get(IMAGE).tag(UPGRADE)
    yield UPGRADE
    with suppress(Exception):
        docker_client.images.remove(UPGRADE, force=True)


def order(daemon: Daemon, action: str, body: Any = None) -> dict[str, Any]:
    answer = daemon.call("POST", f"instances/cpu/{action}", json=body)
    assert answer.status_code in (200, 202), f"{answer.text}\n{daemon.log()}"
    shown: dict[str, Any] = answer.json()
    return shown


def patch(daemon: Daemon, **values: Any) -> None:
    answer = daemon.call("PATCH", "instances/cpu", json=values)
    assert answer.status_code == 200, answer.text


def follows(daemon: Daemon, holds: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    return wait_for(lambda: daemon.instance("cpu"), holds, within_s=FOLLOWED_S)


def ready_at_both(pair: Pair) -> str:
    """Start the instance at the first gateway; return the container of both."""
    first, second = pair
    container: str = first.started("cpu")["container"]["id"]
    assert second.wait_for_phase("cpu", "ready")["container"]["id"] == container
    return container


def kinds(pair: Pair) -> set[str]:
    return {one["kind"] for daemon in pair for one in daemon.events()}


def stays(pair: Pair, container: str) -> None:
    """Expect that neither gateway replaces the container, although nobody uses it."""
    until = time.monotonic() + QUIET_S
    while time.monotonic() < until:
        for daemon in pair:
            body = daemon.instance("cpu")
            assert (body["phase"], body["container"]["id"]) == ("ready", container)
        time.sleep(0.2)
    assert "recreating" not in kinds(pair)


def test_an_upgrade_at_one_gateway_is_followed_by_the_other_which_does_not_undo_it(
    pair: Callable[..., Pair], upgrade: str
) -> None:
    # The second one lets it go, so that its replacement waits for nobody.
    first, second = both = pair(instances={"cpu": {"template": "sim", "ttl_s": 1.5}})
    ready_at_both(both)
    wait_for(lambda: "let_go" in second.log(), within_s=20)
    body = order(first, "upgrade", {"image": upgrade})["instance"]
    assert (body["phase"], body["container"]["image"]) == ("ready", upgrade)
    follows(second, lambda body: (body["image_override"] or {}).get("image") == upgrade)
    container = body["container"]["id"]
    wait_for(lambda: second.instance("cpu"), lambda one: (one["container"] or {}).get("id") == container)
    second.wait_for_phase("cpu", "ready")
    stays(both, container)
    assert [one.instance("cpu")["reason"] for one in both] == [None, None]
    body = order(first, "rollback")["instance"]
    assert body["container"]["image"] == IMAGE
    follows(second, lambda body: body["image_override"] is None)


def test_gateways_with_different_templates_do_not_replace_the_container_to_and_fro(
    pair: Callable[..., Pair],
) -> None:
    first, second = both = pair(templates={"sim": {"env": {"OLLAMA_NEW": "1"}}})
    container = ready_at_both(both)
    stays(both, container)
    reason = second.instance("cpu")["reason"]
    assert reason["code"] == "template_outdated"
    assert "its next start replaces it" in reason["message"]
    assert first.instance("cpu")["reason"] is None
    second.stopped("cpu", force=True)
    first.wait_for_phase("cpu", "stopped", "failed")
    container = second.started("cpu")["container"]["id"]
    wait_for(lambda: first.instance("cpu"), lambda one: (one["container"] or {}).get("id") == container)
    first.wait_for_phase("cpu", "ready")
    stays(both, container)
    assert second.instance("cpu")["reason"] is None
    assert first.instance("cpu")["reason"]["code"] == "template_outdated"


def test_a_pin_and_a_ttl_hold_at_both_and_are_lost_by_no_use_and_no_restart(
    pair: Callable[..., Pair], url: str, postgres: Postgres
) -> None:
    first, second = both = pair()
    container = ready_at_both(both)
    patch(first, pinned=True)
    follows(second, lambda body: body["pinned"])
    patch(second, ttl_s=77)
    follows(first, lambda body: body["ttl_s"] == 77)
    for daemon in both:  # the last use of each is stored
        body = {"model": "tiny", "prompt": "hi", "stream": False}
        assert daemon.call("POST", "/api/generate", json=body).status_code == 200
    time.sleep(2.5)
    assert postgres.sql(url, "SELECT pinned, ttl_s, starts, operation, last_used_at FROM instances") == [
        (True, 77.0, 0, None, None)
    ]
    for daemon in both:
        daemon.kill()
        daemon.start()
        shown = daemon.wait_for_phase("cpu", "ready")
        assert (shown["pinned"], shown["ttl_s"]) == (True, 77)
        assert shown["container"]["id"] == container
    assert [one.instance("cpu")["starts"] for one in both] == [1, 0]
    patch(second, pinned=None, ttl_s=None)
    follows(first, lambda body: not body["pinned"] and body["ttl_s"] != 77)


def test_a_followed_order_is_not_stored_again(
    pair: Callable[..., Pair], url: str, postgres: Postgres
) -> None:
    first, second = both = pair()
    count = 8
    for number in range(count):
        order(first, "drain", {"reason": f"repair {number}"})
        if number % 2:
            follows(second, lambda body: body["drained"] is not None)
        order(first, "resume")
    for daemon in both:
        follows(daemon, lambda body: body["drained"] is None)
    time.sleep(1.5)
    assert [one.instance("cpu")["drained"] for one in both] == [None, None]
    changes = "SELECT number FROM changes WHERE topic = 'drained'"
    assert postgres.sql(url, changes) == [(2 * count,)]
    # One whose time passes ends at both, and in the database.
    until = datetime.now(UTC) + timedelta(seconds=1.5)
    order(first, "drain", {"until": until.isoformat()})
    follows(second, lambda body: body["drained"] is not None)
    for daemon in both:
        wait_for(lambda: daemon.instance("cpu")["drained"], lambda one: one is None, within_s=10)  # noqa: B023
    wait_for(lambda: postgres.sql(url, "SELECT * FROM operator_state"), lambda rows: rows == [], within_s=5)


def test_a_gateway_that_stops_its_instances_at_its_end_leaves_those_that_another_one_uses(
    pair: Callable[..., Pair], docker_client: docker.DockerClient
) -> None:
    first, second = both = pair(arguments=ENDS_ALL)
    container = ready_at_both(both)
    began = time.monotonic()
    assert first.stop() == 0
    assert time.monotonic() - began < 5, "it has waited for nobody"
    assert docker_client.containers.get(container).status == "running"
    assert second.instance("cpu")["phase"] == "ready"
    body = {"model": "tiny", "prompt": "hi", "stream": False}
    assert second.call("POST", "/api/generate", json=body).status_code == 200
    assert second.instance("cpu")["container"]["id"] == container
    assert second.stop() == 0
    name = f"ollama-manager.manager={first.config['manager_id']}"
    assert docker_client.containers.list(all=True, filters={"label": name}) == []
