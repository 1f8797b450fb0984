"""Two gateways on one database: what one is told holds at the other, and no money is spent twice."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.relay.test_cloud import PRICES
from tests.support.daemon import ROOT, Daemon, wait_for
from tests.support.fixtures import new_manager_id
from tests.support.gateway import NO_ENGINE
from tests.support.keyed import KEYS, as_header
from tests.support.ollama import running_ollama
from tests.support.provider import INPUTS, OUTPUTS, Provider
from tests.support.replacing import Replaceable, processes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import requests

    from tests.support.fixtures import NewDaemon
    from tests.support.nursery import Process
    from tests.support.postgres import Postgres

__all__ = ["processes"]

REFUSED = 4
# A change at one gateway is in force at the other one within it.
FOLLOWED_S = 1.0
COST = (INPUTS + 2 * OUTPUTS) / 1_000_000
BUDGETS, SETTINGS = "/api/v1/budgets", "/api/settings/models"
# For a machine that does other things too.
BUSY_S = 1.0


class Pair:
    """Two daemons with state directories of their own, and the paid server behind both."""

    def __init__(self, daemons: list[Daemon], provider: Provider) -> None:
        self.daemons = daemons
        self.provider = provider
        self.secrets: dict[str, str] = {}

    def ask(
        self, gateway: int, method: str, path: str, key: str | None = "root", **options: Any
    ) -> requests.Response:
        headers = as_header(self.secrets[key]) if key in self.secrets else {}
        return self.daemons[gateway].call(method, path, headers=headers, **options)

    def make(self, gateway: int, name: str, *scopes: str, **limits: Any) -> None:
        body = {"name": name, "scopes": scopes or ["client"], **limits}
        answer = self.ask(gateway, "POST", KEYS, json=body)
        assert answer.status_code == 201, answer.text
        self.secrets[name] = answer.json()["secret"]

    def chat(self, gateway: int, key: str | None, model: str = "free") -> requests.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": False}
        return self.ask(gateway, "POST", "/api/chat", key, json=body)

    def statuses(self, gateway: int, key: str) -> int:
        return self.chat(gateway, key).status_code

    def begin(self) -> None:
        """Make an admin key, which both gateways want from then on."""
        self.make(0, "root", "admin", "client")
        follows(lambda: self.chat(1, None).status_code == 401)


def follows(holds: Callable[[], object], *, within_s: float = FOLLOWED_S + BUSY_S) -> float:
    """Wait until something holds; return the seconds that took."""
    began = time.monotonic()
    wait_for(holds, within_s=within_s)
    return time.monotonic() - began


@contextmanager
def serving(provider: Provider) -> Iterator[None]:
    """Run a provider on a loop of its own."""
    loop, begun = asyncio.new_event_loop(), threading.Event()
    done = asyncio.Event()

    async def serve() -> None:
        async with provider.serving():
            begun.set()
            await done.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert begun.wait(20)
        yield
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join()
        loop.close()


@contextmanager
def two_gateways(home: Path, url: str, **sections: Any) -> Iterator[Pair]:
    with ExitStack() as stack:
        provider = Provider()
        stack.enter_context(serving(provider))
        server = stack.enter_context(running_ollama())
        config = {
            "manager_id": new_manager_id(),
            "gpus": "none",
            "instances": {
                "home": {"driver": "external", "url": server.url},
                "paid": {
                    "driver": "cloud",
                    "protocol": "openai",
                    "url": provider.url,
                    "key_env": "PROVIDER_KEY",
                    "models": {"gpt": {**PRICES, "for": ["pays"]}},
                },
            },
            "roles": {"free": {"model": "tiny"}, "pays": {"paid_fallback": True}},
            "fallback": {"enabled": True},
            "lifecycle": {"probe_interval_s": 0.5, "resync_interval_s": 1},
            "state": {"url": url},
            **sections,
        }
        daemons = [
            stack.enter_context(
                Daemon(home / name, config, engine_url=NO_ENGINE, environment={"PROVIDER_KEY": "sk-1"})
            )
            for name in ("one", "two")
        ]
        for daemon in daemons:
            daemon.start(until_ready=False)
        for daemon in daemons:
            daemon.wait_until_alive()
            daemon.wait_for_phase("home", "ready")
            daemon.wait_for_phase("paid", "ready")
        yield Pair(daemons, provider)


def test_a_key_that_one_gateway_makes_changes_or_revokes_does_so_at_the_other(
    postgres: Postgres, tmp_path: Path
) -> None:
    with two_gateways(tmp_path, postgres.database()) as pair:
        pair.begin()
        pair.make(0, "bot")
        follows(lambda: pair.statuses(1, "bot") == 200)
        took = []
        for gateway, other in ((0, 1), (1, 0)):
            name = f"bot{gateway}"
            pair.make(gateway, name)
            took.append(follows(lambda: pair.statuses(other, name) == 200))  # noqa: B023
            assert pair.ask(gateway, "DELETE", f"{KEYS}/{name}").status_code == 200
            took.append(follows(lambda: pair.statuses(other, name) == 401))  # noqa: B023
        assert max(took) <= FOLLOWED_S + BUSY_S, took
        assert min(took) < FOLLOWED_S, took
        rotated = pair.ask(1, "POST", f"{KEYS}/bot/rotate", json={"overlap_s": 0})
        assert rotated.status_code in (200, 201), rotated.text
        follows(lambda: pair.statuses(0, "bot") == 401)
        pair.secrets["bot"] = rotated.json()["secret"]
        assert pair.statuses(0, "bot") == 200


def test_settings_and_orders_of_one_gateway_are_in_force_at_the_other(
    postgres: Postgres, tmp_path: Path
) -> None:
    database, home = postgres.database(), "/api/runtime/compute/instances/home"
    with two_gateways(tmp_path, database) as pair:

        def shown(gateway: int, path: str = home) -> Any:
            return pair.ask(gateway, "GET", path).json()

        def change(gateway: int, method: str, path: str, body: Any = None) -> None:
            answer = pair.ask(gateway, method, path, json=body)
            assert answer.status_code in (200, 202), answer.text

        pair.begin()
        change(0, "POST", SETTINGS, {"roles": {"free": {"model": "other"}}})
        effective = "/api/settings/models/effective"
        follows(lambda: shown(1, effective)["roles"]["free"]["model"]["value"] == "other")
        change(1, "POST", f"{home}/drain", {"reason": "repair"})
        follows(lambda: shown(0)["drained"] is not None)
        change(0, "POST", f"{home}/resume")
        follows(lambda: shown(1)["drained"] is None)
        change(0, "POST", f"{home}/lift", {"until": "2100-01-01T00:00:00Z", "reason": "a test"})
        follows(lambda: shown(1)["lifted"] is not None)
        change(1, "DELETE", f"{home}/lift")
        follows(lambda: shown(0)["lifted"] is None)
        stage = {"stage": "observe", "raw_url": "http://127.0.0.1:1"}
        change(0, "POST", SETTINGS, {"rollout": stage})
        follows(lambda: shown(1, "/readyz").get("rollout") == "observe")
        # An order that was carried out here is none for the other one.
        counted = "SELECT topic, number FROM changes ORDER BY 1"
        time.sleep(1.2)
        before = postgres.sql(database, counted)
        time.sleep(1.2)
        assert postgres.sql(database, counted) == before
        assert {topic for topic, _ in before} == {"drained", "keys", "lifted", "overrides", "rollout"}


def test_a_budget_is_spent_once_by_both_together(postgres: Postgres, tmp_path: Path) -> None:
    hard = 0.002
    budgets = [{"scope": "global", "period": "month", "hard_usd": hard}]
    url = postgres.database()
    with two_gateways(tmp_path, url, budgets=budgets) as pair:
        pair.begin()
        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(lambda number: pair.chat(number % 2, "root", "pays"), range(200)))
        codes = [answer.status_code for answer in answers]
        assert set(codes) <= {200, 402}, [
            answer.text for answer in answers if answer.status_code not in (200, 402)
        ]
        paid = codes.count(200)
        assert paid == len(pair.provider.seen)
        assert 402 in codes

        def money(gateway: int) -> tuple[float, float]:
            (first,) = pair.ask(gateway, "GET", BUDGETS).json()["budgets"]
            return first["spent_usd"], first["reserved_usd"]

        wait_for(lambda: money(0)[1] == money(1)[1] == 0)
        assert money(0) == money(1)
        assert money(0)[0] == pytest.approx(paid * COST)
        assert money(0)[0] <= hard
        most = "SELECT count(*), count(DISTINCT gateway) FROM ledger WHERE kind = 'reserved'"
        assert postgres.sql(url, most) == [(paid, 2)]
        # All of it can be spent.
        while pair.chat(0, "root", "pays").status_code == 200:
            pass
        wait_for(lambda: money(1)[1] == 0)
        worst = 0.0004  # of one request, by the length of its text
        assert hard - worst <= money(1)[0] <= hard


def test_requests_go_on_while_the_database_is_away_and_paid_ones_do_not(
    postgres: Postgres, tmp_path: Path
) -> None:
    budgets = [{"scope": "global", "period": "month", "hard_usd": 1}]
    with two_gateways(tmp_path, postgres.database(), budgets=budgets) as pair:
        pair.begin()
        pair.make(0, "bot")
        follows(lambda: pair.statuses(1, "bot") == 200)
        ends, free, slowest = threading.Event(), [], [0.0]

        def load(gateway: int) -> None:
            while not ends.is_set():
                began = time.monotonic()
                free.append(pair.statuses(gateway, "bot"))
                slowest[0] = max(slowest[0], time.monotonic() - began)

        def ready(gateway: int) -> Any:
            return pair.ask(gateway, "GET", "/readyz").json()

        with ThreadPoolExecutor(4) as pool, ExitStack() as stack:
            stack.callback(ends.set)
            loads = [pool.submit(load, number % 2) for number in range(4)]
            try:
                assert [pair.chat(gateway, "root", "pays").status_code for gateway in (0, 1)] == [200, 200]
                postgres.kill()
                sent = len(pair.provider.seen)
                for gateway in (0, 1):
                    refused = pair.chat(gateway, "root", "pays")
                    assert refused.status_code == 503, refused.text
                    assert "no paid request is sent" in refused.text
                    assert "postgresql:///" in refused.text
                    made = pair.ask(gateway, "POST", KEYS, json={"name": "late", "scopes": ["client"]})
                    assert (made.status_code, made.json()["error"]["code"]) == (503, "registry_unwritable")
                    wait_for(lambda: "shared_database" in ready(gateway), within_s=15)  # noqa: B023
                assert len(pair.provider.seen) == sent
                assert pair.ask(0, "DELETE", f"{KEYS}/bot").status_code == 503
                assert pair.statuses(0, "bot") == 401, "a revocation holds although it cannot be stored"
                assert pair.statuses(1, "bot") == 200
                bots = free.count(200)
                wait_for(lambda: free.count(200) > bots + 20)
            finally:
                postgres.start()
            for gateway in (0, 1):
                wait_for(lambda: "shared_database" not in ready(gateway), within_s=15)  # noqa: B023
            # What could not be stored is stored now.
            follows(lambda: pair.statuses(1, "bot") == 401, within_s=5)
            wait_for(lambda: pair.chat(0, "root", "pays").status_code == 200)
            assert pair.chat(1, "root", "pays").status_code == 200
            ends.set()
            for one in loads:
                one.result()
        assert set(free) == {200, 401}
        assert slowest[0] < 5
        for daemon in pair.daemons:
            assert "database_away" in daemon.log()
            assert "database_back" in daemon.log()
            assert "Traceback" not in daemon.log()


def test_a_daemon_ends_in_time_although_the_database_does_not_answer(
    postgres: Postgres, tmp_path: Path
) -> None:
    with two_gateways(tmp_path, postgres.database()) as pair:
        pair.begin()
        postgres.freeze()
        try:
            assert pair.statuses(1, "root") == 200
            for daemon in pair.daemons:
                assert daemon.stop() == 0
                assert "Traceback" not in daemon.log()
        finally:
            postgres.thaw()


def test_a_gateway_is_replaced_beside_another(
    postgres: Postgres,
    tmp_path: Path,
    processes: list[Process],
) -> None:
    url = postgres.database()
    budgets = [{"scope": "global", "period": "month", "hard_usd": 1}]
    with two_gateways(tmp_path, url, budgets=budgets) as pair:
        pair.begin()
        assert pair.chat(0, "root", "pays").status_code == 200
        old = Replaceable(pair.daemons[0], processes).replace()
        assert old.wait(20) == 0
        assert pair.chat(0, "root", "pays").status_code == 200
        pair.make(1, "bot")
        follows(lambda: pair.statuses(0, "bot") == 200)
        assert "gateway_doubled" not in pair.daemons[0].log()
        assert postgres.sql(url, "SELECT count(DISTINCT gateway) FROM ledger") == [(1,)]


def test_the_limit_of_a_minute_counts_at_both(postgres: Postgres, tmp_path: Path) -> None:
    with two_gateways(tmp_path, postgres.database()) as pair:
        pair.begin()
        pair.make(0, "bot", rpm=20)
        follows(lambda: pair.statuses(1, "bot") == 200)
        codes = []
        for number in range(60):
            codes.append(pair.statuses(number % 2, "bot"))
            time.sleep(0.1)
        # About five requests a second reach each gateway: so many can be unknown to the other one.
        assert 20 <= codes.count(200) + 1 <= 20 + 6
        assert codes[-10:] == [429] * 10


def test_containers_of_one_gateway_belong_to_the_other_and_a_state_directory_to_one(
    postgres: Postgres, new_daemon: NewDaemon
) -> None:
    url = postgres.database()
    first = new_daemon(config={"state": {"url": url}}).start()
    before = first.started("cpu")
    second = new_daemon(name="second", config={"state": {"url": url}}).start()
    assert second.wait_for_phase("cpu", "ready")["container"]["id"] == before["container"]["id"]
    same = {"state": {"url": url, "dir": str(first.state_dir)}}
    for other in (new_daemon(name="third", config=same), new_daemon(name="alone")):
        refused = subprocess.run(
            [sys.executable, "-m", "manager", "serve", "--config", str(other.config_file)],
            cwd=ROOT,
            env=other.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        # The second one has no database: the containers are not its own.
        assert refused.returncode == REFUSED, refused.stderr
        assert "Traceback" not in refused.stderr
