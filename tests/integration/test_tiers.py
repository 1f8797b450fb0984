"""Requests that leave the choice of their model to the daemon, on a real engine: a tier starts containers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.support.daemon import wait_for

if TYPE_CHECKING:
    import requests

    from tests.support.daemon import Daemon
    from tests.support.fixtures import NewDaemon

INSTANCES = {"small": {"template": "sim"}, "large": {"template": "sim"}}
CONFIG: dict[str, Any] = {
    "routing": {"auto": True},
    "roles": {
        "fast": {"model": "tiny", "target": "small"},
        "medium": {"model": "tiny", "target": "small"},
        "complex": {"model": "tiny", "target": "large", "fallbacks": ["fast"]},
    },
}
SMALL, LARGE = "hello", "Compare both strategies step by step."


def ask(daemon: Daemon, text: str, model: str = "auto") -> requests.Response:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "stream": False}
    answer = daemon.call("POST", "/api/chat", json=body)
    assert answer.status_code == 200, answer.text
    return answer


def test_a_question_starts_the_container_of_its_tier(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(instances=INSTANCES, config=CONFIG).start()
    small = ask(daemon, SMALL)
    assert (small.headers["X-Instance"], small.headers["X-Tier"]) == ("small", "fast")
    assert int(small.headers["X-Start-Ms"]) > 0
    assert daemon.instance("large")["phase"] == "stopped"
    large = ask(daemon, LARGE)
    assert (large.headers["X-Instance"], large.headers["X-Task-Type"]) == ("large", "strategy")
    assert int(large.headers["X-Start-Ms"]) > 0
    found = wait_for(
        lambda: daemon.call("GET", "/v1/cluster/routes/resolve", params={"role": "complex"}).json(),
        lambda one: one["because"] == "loaded",
    )
    assert found["instance"] == "large"
    stats = daemon.call("GET", "/api/v1/llm/routing-stats").json()
    assert {one["tier"]: one["requests"] for one in stats["by_tier"]} == {
        "fast": 1,
        "medium": 0,
        "complex": 1,
    }


def test_a_tier_whose_container_is_out_of_service_falls_back_visibly(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(instances=INSTANCES, config=CONFIG).start()
    assert daemon.call("POST", "/api/runtime/compute/instances/large/drain", json={}).ok
    answer = ask(daemon, LARGE)
    assert (answer.headers["X-Instance"], answer.headers["X-Tier"]) == ("small", "complex")
    assert answer.headers["X-Fallback-Reason"] == "instance_unavailable"
    health = daemon.call("GET", "/v1/cluster/health").json()
    assert health["status"] in ("ok", "degraded")


def test_a_benchmark_measures_what_runs(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(instances=INSTANCES, config=CONFIG).start()
    ask(daemon, SMALL)
    begun = daemon.call("POST", "/api/v1/benchmarks", json={"instance": "small", "model": "tiny"})
    assert begun.status_code == 202, begun.text
    place = f"/api/v1/benchmarks/{begun.json()['id']}"
    one = wait_for(lambda: daemon.call("GET", place).json(), lambda found: found["ended_at"] is not None)
    assert one["status"] == "succeeded"
    assert daemon.instance("large")["phase"] == "stopped"
    assert daemon.call("GET", "/v1/cluster/benchmarks").json()
