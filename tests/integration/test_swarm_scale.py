"""10 hosts and 80 instances of Docker Swarm, on stand-ins. Figures of more are in docs/performance.md."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from tests.bench.rig import Client
from tests.bench.swarm_rig import MODEL, SwarmRig, swarm_rig
from tests.support.daemon import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

HOSTS, CARDS = 10, 7
OF_HOST = CARDS + 1
# What Docker tells of one node, service or task here is less.
MOST_BYTES = 8 * 1024


@pytest.fixture(scope="module")
def rig() -> Iterator[SwarmRig]:
    """All instances are ready."""
    with swarm_rig(HOSTS, CARDS) as rig:
        rig.daemon.start()
        wait_for(lambda: len(rig.ids()) == HOSTS * OF_HOST)
        rig.start(rig.ids())
        yield rig


def test_each_host_gives_an_instance_for_its_cpu_and_each_card(rig: SwarmRig) -> None:
    instances = rig.instances()
    assert Counter(one["id"].partition("-")[0] for one in instances) == {
        f"host{number:02}": OF_HOST for number in range(HOSTS)
    }
    assert len({one["endpoint"] for one in instances}) == HOSTS * OF_HOST
    cards = [card["uuid"] for one in instances for card in one["device"]["cards"]]
    assert len(set(cards)) == len(cards) == HOSTS * CARDS


def test_a_start_reads_what_concerns_its_own_host_and_service(rig: SwarmRig) -> None:
    ids = rig.of_host(1)
    for id_ in ids:
        rig.daemon.stopped(id_)
    before = rig.calls()
    rig.start(ids)
    after = rig.calls()
    made = {kind: after[kind] - before.get(kind, 0) for kind in after}
    # The lists of everything, which are read again and again, are left aside: there are few of them.
    everything = HOSTS * OF_HOST * MOST_BYTES * 2 + HOSTS * MOST_BYTES
    lists = made["GET swarm"] + 2
    assert made["bytes"] < len(ids) * 60 * MOST_BYTES + lists * everything


@pytest.mark.parametrize("silent", [False, True], ids=["ended", "silent"])
def test_a_host_that_is_lost_is_out_of_routing_and_comes_back(rig: SwarmRig, silent: bool) -> None:
    lost = set(rig.of_host(2))
    assert lost <= rig.running(MODEL)
    rig.change("lose", 2, **({"silent": "1"} if silent else {}))
    try:
        # Three probe intervals and some, whatever the machine does besides.
        wait_for(lambda: not lost & rig.running(MODEL), within_s=30)
        assert len(rig.running(MODEL)) == (HOSTS - 1) * OF_HOST
    finally:
        rig.change("mend", 2)
    wait_for(lambda: lost <= rig.running(MODEL), within_s=60)


def test_every_page_and_list_shows_all_of_them(rig: SwarmRig) -> None:
    with Client(rig.daemon.port) as client:
        for path in ("/ui", "/ui/instances", "/ui/gpus", "/metrics"):
            status, body = client.get(path)
            assert status == 200, path
            missing = [id_ for id_ in rig.ids() if id_.encode() not in body]
            assert not missing, path
        (model,) = client.json("/v1/models")["data"]
        assert len(model["instances"]) == HOSTS * OF_HOST


def test_a_daemon_that_was_killed_takes_all_of_them_over(rig: SwarmRig) -> None:
    before = rig.calls()
    rig.daemon.kill()
    rig.daemon.start()
    rig.wait_for_phases({"ready": rig.count})
    assert rig.calls()["POST services"] == before["POST services"], "nothing was made or changed"
