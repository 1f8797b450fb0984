"""Many instances, how many may run, and what the daemon begins by itself."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.daemon import wait_for
from tests.support.inside import until
from tests.support.ollama import running_ollama, set_knobs
from tests.support.proxy import EngineProxy

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from tests.support.daemon import Daemon
    from tests.support.engine import Engine
    from tests.support.fixtures import NewDaemon
    from tests.support.inside import NewInside

COUNT = 64
CHANGING = 6
AT_ONCE = 8


def assert_consistent(body: dict[str, Any]) -> None:
    """What one answer says of an instance is of one piece. The target may be ahead of the phase."""
    if body["phase"] == "ready":
        assert body["endpoint"]
        assert body["container"]
        assert body["ready_at"]
        assert body["starts"] >= 1
    else:
        assert body["ttl_remaining_s"] is None
    if body["phase"] in ("stopped", "starting"):
        assert (body["endpoint"], body["ready_at"]) == (None, None)


def test_the_list_of_many_instances_is_right_while_they_change(new_daemon: NewDaemon) -> None:
    ids = [f"cpu{number:02}" for number in range(COUNT)]
    daemon = new_daemon(instances={id_: {"template": "sim"} for id_ in ids}).start()
    done = Event()

    def read() -> Counter[str]:
        seen: Counter[str] = Counter()
        while not done.is_set():
            answer = daemon.get("instances")
            assert answer["count"] == COUNT
            assert [body["id"] for body in answer["instances"]] == ids
            for body in answer["instances"]:
                assert_consistent(body)
            seen.update(body["phase"] for body in answer["instances"])
        return seen

    def change(id_: str) -> None:
        for _ in range(2):
            assert daemon.started(id_)["phase"] == "ready"
            assert daemon.stopped(id_)["phase"] == "stopped"
        assert daemon.started(id_)["starts"] == 3

    with ThreadPoolExecutor(CHANGING + 1) as pool:
        reader = pool.submit(read)
        try:
            list(pool.map(change, ids[:CHANGING]))
        finally:
            done.set()
        assert {"stopped", "starting", "ready"} <= set(reader.result())
    phases = Counter(body["phase"] for body in daemon.get("instances")["instances"])
    assert phases == {"ready": CHANGING, "stopped": COUNT - CHANGING}


def test_an_engine_gets_a_few_starts_at_a_time_and_stops_never_wait_for_them(
    engine: Engine, new_daemon: NewDaemon
) -> None:
    ids = [f"cpu{number:02}" for number in range(AT_ONCE + 2)]
    instances = {id_: {"template": "sim"} for id_ in (*ids, "other")}
    with EngineProxy(engine.url) as proxy:
        daemon = new_daemon(instances=instances, engine_url=proxy.url).start()
        daemon.started("other")
        before, started = proxy.count("/containers/create"), proxy.count("/start")
        proxy.held = "/start"
        for id_ in ids:
            assert daemon.begin(id_, "start", wait="false").status_code == 202
        wait_for(lambda: proxy.count("/start") == started + AT_ONCE)
        assert daemon.stopped("other")["phase"] == "stopped"
        waiting = [body["id"] for body in daemon.get("instances")["instances"] if not body["container"]]
        assert len(waiting) == 3  # the one that was stopped, and those that wait for their turn
        waiting.remove("other")
        assert daemon.stopped(waiting[0])["phase"] == "stopped"
        assert proxy.count("/containers/create") - before == AT_ONCE
        proxy.release()
        for id_ in ids:
            if id_ != waiting[0]:
                daemon.wait_for_phase(id_, "ready")
        assert proxy.count("/containers/create") - before == AT_ONCE + 1


def test_no_more_instances_run_than_may_however_many_are_asked_for_at_once(new_daemon: NewDaemon) -> None:
    ids = [f"cpu{number}" for number in range(5)]
    daemon = new_daemon(
        instances={id_: {"template": "sim"} for id_ in ids}, lifecycle={"max_running": 2}
    ).start()
    with ThreadPoolExecutor(len(ids)) as pool:
        answers = dict(zip(ids, pool.map(lambda id_: daemon.begin(id_, "start"), ids), strict=True))
    running = [id_ for id_, answer in answers.items() if answer.ok]
    refused = [id_ for id_ in ids if id_ not in running]
    assert len(running) == 2
    for id_ in refused:
        assert answers[id_].status_code == 409
        error = answers[id_].json()["error"]
        assert (error["code"], error["instance"]) == ("max_running_reached", id_)
        assert all(other in error["message"] for other in running)
        body = daemon.instance(id_)
        assert (body["phase"], body["target"], body["reason"]) == ("stopped", "stopped", None)
    assert (
        daemon.begin(running[0], "start").json()["changed"] is False
    )  # it runs: no further one is asked for
    # An unused instance makes way for a start by hand, as for a request; a pinned one does not.
    daemon.started(refused[0])
    phases = {body["id"]: body["phase"] for body in daemon.get("instances")["instances"]}
    assert Counter(phases.values()) == {"ready": 2, "stopped": 3}
    for id_ in (id_ for id_, phase in phases.items() if phase == "ready"):
        daemon.call("PATCH", f"instances/{id_}", json={"pinned": True}).raise_for_status()
    assert daemon.begin(refused[1], "start").status_code == 409


def test_an_instance_to_be_prewarmed_starts_with_the_daemon_and_others_do_not(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(
        instances={"warm": {"template": "sim", "prewarm": True}, "cold": {"template": "sim"}}
    ).start()
    assert daemon.wait_for_phase("warm", "ready")["target"] == "running"
    assert daemon.instance("cold")["phase"] == "stopped"
    daemon.stopped("warm")
    daemon.stop()
    daemon.start()  # it was stopped on purpose, and is to be there when the daemon is
    daemon.wait_for_phase("warm", "ready")


def test_an_external_instance_is_probed_and_listed_and_never_touched(new_daemon: NewDaemon) -> None:
    with running_ollama() as ollama:
        instances = {
            "nas": {"driver": "external", "url": ollama.url, "device": "gpu"},
            "away": {"driver": "external", "url": "http://127.0.0.1:1"},
        }
        daemon = new_daemon(instances=instances).start()
        body = daemon.wait_for_phase("nas", "ready")
        assert (body["driver"], body["device"]["kind"], body["endpoint"]) == ("external", "gpu", ollama.url)
        assert (body["container"], body["health"], body["ttl_remaining_s"]) == (None, "healthy", None)
        body = wait_for(lambda: daemon.instance("away"), lambda body: body["reason"])
        assert (body["phase"], body["health"]) == ("unavailable", "unhealthy")
        assert (body["reason"]["code"], body["device"]["kind"]) == ("upstream_unreachable", None)
        for action in ("start", "stop"):
            assert daemon.begin("nas", action).status_code == 409
        assert daemon.call("PATCH", "instances/nas", json={"ttl_s": 1}).status_code == 409
        assert daemon.call("GET", "instances/nas/logs").status_code == 409
        assert daemon.call("POST", "reap").json()["count"] == 0

        assert_follows(daemon, lambda: set_knobs(ollama.url, hang="all"), "unavailable")
        assert_follows(daemon, lambda: set_knobs(ollama.url, hang=""), "ready")
        assert_follows(daemon, ollama.process.kill, "unavailable")
        assert daemon.call("GET", "/readyz").status_code == 200


def assert_follows(daemon: Daemon, change: Callable[[], object], phase: str) -> None:
    change()
    daemon.wait_for_phase("nas", phase)


# --- schedules ---


class Recorder:
    """A scheduler whose ticks come when the test says so."""

    def __init__(self) -> None:
        self.ticks: dict[str, Callable[[], None]] = {}
        self.lines: list[tuple[str, str | None]] = []

    def every(self, name: str, interval_s: float, tick: Callable[[], None]) -> None:
        self.ticks[name] = tick

    def cron(self, name: str, line: str, timezone: str | None, tick: Callable[[], None]) -> None:
        self.ticks[name] = tick
        self.lines.append((line, timezone))

    def remove(self, name: str) -> None:
        del self.ticks[name]

    def upcoming(self, name: str, count: int) -> tuple[datetime, ...]:
        return ()

    def start(self) -> None: ...
    def stop(self) -> None: ...


SCHEDULES: list[dict[str, str]] = [
    {"cron": "0 8 * * mon-fri", "action": "start", "instance": "cpu", "timezone": "Europe/Berlin"},
    {"cron": "0 20 * * 1-5", "action": "stop", "instance": "cpu"},
    {"cron": "*/5 * * * *", "action": "reap"},
]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


async def test_a_schedule_starts_stops_and_sweeps(new_inside: NewInside, recorder: Recorder) -> None:
    inside = await new_inside(config={"schedules": SCHEDULES})
    inside.daemon.parts.sweeps.schedule(recorder)
    assert recorder.lines == [(str(s["cron"]), s.get("timezone")) for s in SCHEDULES]
    start, stop, reap = (recorder.ticks[f"schedules[{number}]"] for number in range(3))
    start()
    await until(lambda: inside.phase("cpu") == "ready")
    start()  # it runs already: nothing happens, and that is no failure
    stop()
    await until(lambda: inside.phase("cpu") == "stopped")
    stop()
    start()
    await until(lambda: inside.phase("cpu") == "ready")
    await inside.get("cpu").configure({"ttl_s": 0.05})
    reap()
    await until(lambda: inside.phase("cpu") == "stopped")
    assert "schedule_failed" not in inside.kinds("cpu")
    assert inside.kinds("cpu").count("scheduled") == 3


async def test_a_schedule_that_cannot_be_kept_says_why_and_ends_nothing(
    new_inside: NewInside, recorder: Recorder
) -> None:
    inside = await new_inside(
        instances={"cpu": {"template": "sim"}, "other": {"template": "sim"}},
        lifecycle={"max_running": 1},
        config={"schedules": SCHEDULES},
    )
    inside.daemon.parts.sweeps.schedule(recorder)
    await inside.get("other").start()
    await inside.get("other").configure({"pinned": True})
    recorder.ticks["schedules[0]"]()
    await until(lambda: "schedule_failed" in inside.kinds("cpu"))
    assert inside.phase("cpu") == "stopped"
    await inside.get("other").stop()
    recorder.ticks["schedules[0]"]()
    await until(lambda: inside.phase("cpu") == "ready")
