"""Gateways on one database and one swarm whose connections and processes end in the middle of something."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import pytest
import requests

from tests.integration.test_shared_instances import Gateways, chat, events, gateways
from tests.integration.test_swarm_defects import Stream
from tests.support.daemon import wait_for
from tests.support.swarm import Swarm, swarm_obstacles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.postgres import Postgres

__all__ = ["gateways"]

pytestmark = pytest.mark.skipif(bool(swarm_obstacles()), reason="; ".join(swarm_obstacles()))


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    with Swarm() as swarm:
        yield swarm
    swarm.assert_clean()


def test_an_instance_in_use_is_not_stopped_when_the_connection_of_its_gateway_is_cut(
    gateways: Callable[..., Gateways], postgres: Postgres
) -> None:
    pair = gateways(ttls_s=(600, 1.5))
    first, second = pair
    first.started("far")
    second.wait_for_phase("far", "ready")
    wait_for(lambda: events(second, "let_go"), within_s=20)
    (task,) = pair.tasks()
    stream = Stream(first, "tiny@far", tokens=100)
    url = first.config["state"]["url"]
    cut = """SELECT pg_terminate_backend(pid) FROM pg_locks
        WHERE locktype = 'advisory' AND mode = 'ShareLock' AND granted"""
    for _ in range(4):
        assert len(wait_for(lambda: postgres.sql(url, cut))) == 1
        until = time.monotonic() + 2
        while time.monotonic() < until:
            second.call("POST", "reap")
        assert pair.tasks() == [task]
    stream.assert_whole()
    assert pair.tasks() == [task]


def test_settings_of_an_instance_that_one_gateway_has_stored_are_not_undone_by_the_other(
    gateways: Callable[..., Gateways],
) -> None:
    pair = gateways()
    first, second = pair
    first.started("far")
    second.wait_for_phase("far", "ready")
    assert first.call("PATCH", "instances/far", json={"ttl_s": 77, "pinned": True}).status_code == 200
    assert chat(second).status_code == 200
    second.stopped("far", force=True)
    second.started("far")
    first.stop()
    first.start()
    body = first.wait_for_phase("far", "ready")
    assert (body["ttl_s"], body["pinned"]) == (77, True)


@pytest.mark.parametrize("step", ["stored", "created", "started", "ready"])
def test_a_gateway_that_is_killed_in_a_start_leaves_the_instance_to_the_other(
    gateways: Callable[..., Gateways], step: str
) -> None:
    pair = gateways()
    first, second = pair
    first.stop()
    first.start(die_at=f"far:{step}")
    with suppress(requests.ConnectionError):
        first.begin("far", "start")
    assert first.wait_until_dead() == -signal.SIGKILL
    assert chat(second).status_code == 200
    assert len(pair.tasks()) == 1
    first.start()
    first.wait_for_phase("far", "ready")
    assert chat(first).status_code == 200
    assert len(pair.tasks()) == 1


@pytest.mark.parametrize("step", ["stored:2", "signalled", "ended", "removed"])
def test_a_gateway_that_is_killed_in_a_stop_cuts_nothing_when_it_is_back(
    gateways: Callable[..., Gateways], step: str
) -> None:
    pair = gateways(ttls_s=(1.5, 600))
    first, second = pair
    first.stop()
    second.stop()
    first.start(die_at=f"far:{step}")
    with suppress(requests.ConnectionError):
        first.begin("far", "start")
    assert first.wait_until_dead() == -signal.SIGKILL  # of its idle stop
    second.start()
    second.wait_for_phase("far", "stopped", "ready")  # it completes the stop that was begun
    assert chat(second).status_code == 200
    (task,) = pair.tasks()
    stream = Stream(second, "tiny@far", tokens=100)
    first.start()
    stream.assert_whole()
    assert pair.tasks() == [task]
    assert second.instance("far")["phase"] == "ready"


@pytest.mark.parametrize("action", ["start", "stop"])
def test_a_database_that_hangs_during_an_operation_leaves_what_the_status_says(
    gateways: Callable[..., Gateways], postgres: Postgres, action: str
) -> None:
    pair = gateways()
    first, second = pair
    if action == "stop":
        first.started("far")
        second.wait_for_phase("far", "ready")
    path = "instances/far/start" if action == "start" else "instances/far/stop?force=true"
    thread = threading.Thread(target=first.call, args=("POST", path))
    thread.start()
    wait_for(lambda: bool(pair.tasks()) is (action == "start"))
    postgres.freeze()
    try:
        for one in pair:
            wait_for(partial(events, one, "database_away"))
    finally:
        postgres.thaw()
    thread.join(60)
    for one in pair:
        wait_for(partial(events, one, "database_back"))
        one.wait_for_phase("far", "ready", "stopped", "failed")
    if action == "stop":
        for one in pair:
            one.wait_for_phase("far", "stopped")
        assert pair.tasks() == []
    else:
        wait_for(lambda: bool(pair.tasks()) is (first.instance("far")["phase"] == "ready"))
    assert [chat(one).status_code for one in pair] == [200, 200]
    assert len(pair.tasks()) == 1
