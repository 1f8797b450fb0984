"""Two gateways on one database and one swarm share instances: one start, and no stop under the other."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.daemon import Daemon, wait_for
from tests.support.fixtures import FAST, write_templates
from tests.support.swarm import Swarm, swarm_obstacles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import requests

    from tests.support.postgres import Postgres

pytestmark = pytest.mark.skipif(bool(swarm_obstacles()), reason="; ".join(swarm_obstacles()))


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    with Swarm() as swarm:
        yield swarm
    swarm.assert_clean()


SLOW = {"sim": {"env": {"OLLAMA_SIM_TOKENS_PER_S": "8"}}}


class Gateways:
    """Two daemons on one database and one swarm, and the instance `far` of both."""

    def __init__(self, swarm: Swarm, first: Daemon, second: Daemon) -> None:
        self.swarm = swarm
        self.first = first
        self.second = second

    def __iter__(self) -> Iterator[Daemon]:
        return iter((self.first, self.second))

    def services(self) -> list[dict[str, Any]]:
        api: Any = self.swarm.client().api
        label = f"ollama-manager.manager={self.first.config['manager_id']}"
        found: list[dict[str, Any]] = api.services(filters={"label": label})
        return found

    def tasks(self) -> list[str]:
        """Return the tasks that are to run."""
        tasks = [task for one in self.services() for task in self.swarm.tasks(one["ID"])]
        return [task["ID"] for task in tasks if task["DesiredState"] == "running"]


@pytest.fixture
def gateways(
    swarm: Swarm, postgres: Postgres, tmp_path: Path, manager_id: str
) -> Iterator[Callable[..., Gateways]]:
    with ExitStack() as stack:

        def make(ttls_s: tuple[float, float] = (600, 600)) -> Gateways:
            far = {"driver": "swarm", "template": "sim", "placement": ["node.hostname==worker"]}
            config = {
                "manager_id": manager_id,
                "gpus": "none",
                "roles": {},
                "instances": {},
                "templates": {"dir": str(write_templates(tmp_path / "templates", SLOW))},
                "swarm": {"reach": "host"},
                "lifecycle": FAST,
                "state": {"url": postgres.database()},
            }
            daemons = [
                stack.enter_context(
                    Daemon(
                        tmp_path / name,
                        {**config, "instances": {"far": {**far, "ttl_s": ttl_s}}},
                        engine_url=swarm.manager.url,
                    )
                )
                for name, ttl_s in zip(("first", "second"), ttls_s, strict=True)
            ]
            pair = Gateways(swarm, *(one.start() for one in daemons))
            stack.callback(remove, pair)
            return pair

        yield make


def remove(pair: Gateways) -> None:
    api: Any = pair.swarm.client().api
    for service in pair.services():
        api.remove_service(service["ID"])


def chat(daemon: Daemon) -> requests.Response:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": False,
        "options": {"num_predict": 1},
    }
    return daemon.call("POST", "/api/chat", json=body)


def events(daemon: Daemon, kind: str) -> list[dict[str, Any]]:
    return [one for one in daemon.events() if one["kind"] == kind]


def test_requests_at_both_at_once_start_one_task(gateways: Callable[..., Gateways]) -> None:
    pair = gateways()
    first, second = pair
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(chat, [first, second] * 8))
    assert [one.status_code for one in answers] == [200] * 16, [one.text for one in answers]
    assert len(pair.tasks()) == 1
    readied = [one for daemon in (first, second) for one in events(daemon, "ready")]
    assert len(readied) == 1, "one has started it, and the other has taken it over"


def test_an_instance_is_let_go_by_a_gateway_that_is_done_and_stopped_by_the_last(
    gateways: Callable[..., Gateways],
) -> None:
    pair = gateways(ttls_s=(1.5, 600))
    first, second = pair
    first.started("far")
    second.wait_for_phase("far", "ready")
    (task,) = pair.tasks()
    wait_for(lambda: events(first, "let_go"), within_s=20)
    assert pair.tasks() == [task]
    # A request there takes a share again, without a start, and gives it back later.
    assert chat(first).status_code == 200
    assert pair.tasks() == [task]
    wait_for(lambda: len(events(first, "let_go")), (2).__eq__, within_s=20)
    assert chat(second).status_code == 200
    assert pair.tasks() == [task]
    assert first.instance("far")["starts"] == 1
    answer = second.call("PATCH", "instances/far", json={"ttl_s": 1})
    assert answer.status_code == 200, answer.text
    wait_for(pair.tasks, lambda found: not found, within_s=30)
    for daemon in pair:
        body = daemon.wait_for_phase("far", "stopped", within_s=20)
        assert body["reason"] is None


def test_an_answer_that_takes_longer_than_the_ttl_is_not_cut(gateways: Callable[..., Gateways]) -> None:
    first, second = gateways(ttls_s=(1, 1))
    first.started("far")
    second.wait_for_phase("far", "ready")
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "options": {"num_predict": 32},
    }
    with second.call("POST", "/api/chat", json=body, stream=True) as answer:
        lines = list(answer.iter_lines())
    assert json.loads(lines[-1])["done"] is True
    assert len(lines) > 20


def test_a_stop_by_an_operator_waits_for_the_other_gateway_as_for_open_requests(
    gateways: Callable[..., Gateways],
) -> None:
    pair = gateways()
    first, second = pair
    first.started("far")
    second.wait_for_phase("far", "ready")
    wait_for(lambda: second.instance("far")["health"], lambda health: health == "healthy")
    first.stopped("far", force=True)
    assert pair.tasks() == []
    second.wait_for_phase("far", "stopped", "failed", within_s=10)
    assert chat(second).status_code == 200, "the next request starts it again"


def test_a_gateway_that_was_killed_keeps_no_instance_for_ever(gateways: Callable[..., Gateways]) -> None:
    pair = gateways(ttls_s=(1.5, 1.5))
    first, second = pair
    first.started("far")
    second.wait_for_phase("far", "ready")
    second.kill()
    wait_for(pair.tasks, lambda found: not found, within_s=30)
    first.wait_for_phase("far", "stopped")


def test_while_the_database_is_away_requests_go_on_and_nothing_is_stopped(
    gateways: Callable[..., Gateways], postgres: Postgres
) -> None:
    pair = gateways(ttls_s=(1.5, 1.5))
    first, second = pair
    first.started("far")
    second.wait_for_phase("far", "ready")
    (task,) = pair.tasks()
    postgres.kill()
    try:
        for _ in range(2):
            assert [chat(one).status_code for one in pair] == [200, 200]
            # Idle for longer than the TTL: nobody can tell whether another gateway uses it.
            for one in pair:
                wait_for(lambda one=one: one.instance("far")["ttl_remaining_s"] == 0)  # type: ignore[misc]
        wait_for(lambda: [events(one, "database_away") for one in (first, second)], all, within_s=20)
        assert pair.tasks() == [task]
    finally:
        postgres.start()
    wait_for(pair.tasks, lambda found: not found, within_s=60)
