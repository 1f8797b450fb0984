"""The history outlives its daemon: what a kill can take has a bound, and a replacement takes nothing."""

from __future__ import annotations

import sqlite3
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
import requests

from manager.services.requests_history import EVERY_S
from tests.support.daemon import wait_for
from tests.support.gateway import gateway_over

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.gateway import Gateway

TINY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": False}
# What ended so long before a kill is stored: a batch is due every second, and takes a moment to be written.
BOUND_S = EVERY_S + 1.0


class Load:
    """Clients that send one request after the other; `answered` are ids and the times of their answers."""

    def __init__(self, gateway: Gateway, clients: int = 4) -> None:
        self.answered: list[tuple[str, float]] = []
        self._url = f"{gateway.url}/api/chat"
        self._ends = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        with requests.Session() as session:
            while not self._ends.is_set():
                try:
                    answer = session.post(self._url, json=TINY, timeout=30)
                except requests.RequestException:
                    return
                assert answer.status_code == 200, answer.text
                self.answered.append((answer.headers["X-Request-Id"], time.monotonic()))


def stored(gateway: Gateway) -> list[str]:
    with closing(sqlite3.connect(gateway.state_dir / "registry.sqlite3")) as connection:
        return [row[0] for row in connection.execute("SELECT request_id FROM requests")]


def test_a_kill_under_load_takes_what_ended_last_and_nothing_before(tmp_path: Path) -> None:
    with gateway_over(tmp_path) as gateway:
        load = Load(gateway)
        wait_for(lambda: load.answered and time.monotonic() - load.answered[0][1] > 3 * BOUND_S)
        killed_at = time.monotonic()
        gateway.kill()
        load.end()
        gateway.start(until_ready=False)
        gateway.wait_until_alive()
        kept = stored(gateway)
        assert len(kept) == len(set(kept))
        due = {id_ for id_, at in load.answered if at < killed_at - BOUND_S}
        assert len(due) > 50
        assert not due - set(kept)
        listed = gateway.get("requests?limit=1000")["requests"]
        assert {one["request_id"] for one in listed} <= set(kept)


def test_a_stop_takes_nothing(tmp_path: Path) -> None:
    with gateway_over(tmp_path) as gateway:
        load = Load(gateway)
        wait_for(lambda: len(load.answered) > 50)
        gateway.stop()
        load.end()
        kept = stored(gateway)
        assert {id_ for id_, _ in load.answered} <= set(kept)
        assert len(kept) == len(set(kept))


def test_a_replacement_under_load_takes_nothing(tmp_path: Path) -> None:
    knobs = {"one": {"tokens": 20, "tokens_per_s": 10.0}}
    with gateway_over(tmp_path, knobs=knobs) as gateway:
        load = Load(gateway, clients=12)
        wait_for(lambda: len(load.answered) > 12)
        old = gateway.process
        assert old is not None
        gateway.start(arguments=("--replace",), until_ready=False)
        old.wait(timeout=60)
        count = len(load.answered)
        wait_for(lambda: len(load.answered) > count + 12)
        load.end()
        ids = {id_ for id_, _ in load.answered}
        assert len({id_[:12] for id_ in ids}) == 2, "both daemons have answered"

        def kept() -> set[str]:
            gateway.get("requests")  # what waits is written before the answer
            return set(stored(gateway))

        wait_for(kept, lambda found: ids <= found, within_s=10)
        assert len(stored(gateway)) == len(ids)


@pytest.mark.parametrize("retention", [{"retention_days": 0}, {"max_rows": 5}])
def test_the_retention_can_change_while_the_daemon_runs(tmp_path: Path, retention: dict[str, Any]) -> None:
    with gateway_over(tmp_path) as gateway:
        for _ in range(3):
            gateway.call("POST", "/api/chat", json=TINY)
        assert gateway.get("requests")["count"] == 3
        gateway.configure({**gateway.config, "audit": retention})
        process = gateway.process
        assert process is not None
        process.send_signal(1)
        wait_for(lambda: "settings_reloaded" in gateway.log())
        for _ in range(3):
            gateway.call("POST", "/api/chat", json=TINY)
        found = gateway.get("requests")["count"]
        assert found == (3 if "retention_days" in retention else 6), "it is pruned once a minute"
