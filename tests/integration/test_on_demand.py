"""A client that knows one address has what it asks for started, kept while it is used, and stopped."""

from __future__ import annotations

import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest
import requests

from tests.support.daemon import wait_for

if TYPE_CHECKING:
    import docker

    from tests.support.daemon import Daemon
    from tests.support.fixtures import NewDaemon

TINY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def chat(daemon: Daemon, body: dict[str, Any] | None = None, **options: Any) -> requests.Response:
    return daemon.call("POST", "/api/chat", json={**TINY, **(body or {})}, **options)


def unused_s(body: dict[str, Any]) -> float:
    """How long its probes have found no use of an instance."""
    seen, used = (datetime.fromisoformat(body[name]) for name in ("last_seen_at", "last_used_at"))
    return (seen - used).total_seconds()


def slowly(seconds: float) -> dict[str, dict[str, Any]]:
    """A template whose answers take so long."""
    return {"sim": {"env": {"OLLAMA_SIM_TOKENS": "20", "OLLAMA_SIM_TOKENS_PER_S": str(20 / seconds)}}}


def test_the_first_request_starts_what_it_needs_and_later_ones_find_it_warm(new_daemon: NewDaemon) -> None:
    daemon = new_daemon().start()
    assert daemon.instance("cpu")["phase"] == "stopped"
    answer = chat(daemon)
    assert answer.status_code == 200
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert lines[-1]["done"] is True
    assert answer.headers["X-Instance"] == "cpu"
    assert answer.headers["X-Model"] == "tiny"
    assert int(answer.headers["X-Start-Ms"]) > 0
    assert "X-Fallback-Reason" not in answer.headers
    again = chat(daemon, {"stream": False})
    assert again.json()["done"] is True
    assert "X-Start-Ms" not in again.headers
    record = wait_for(lambda: [line for line in records(daemon) if line["path"] == "/api/chat"])[0]
    assert record["outcome"] == "ok"
    assert record["effective_target"] == "cpu"
    assert record["output_tokens"] > 0


def records(daemon: Daemon) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in daemon.log().splitlines() if line.startswith("{"))
    return [line for line in lines if "request_id" in line]


def test_many_first_requests_share_one_start(
    new_daemon: NewDaemon, docker_client: docker.DockerClient
) -> None:
    daemon = new_daemon().start()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: chat(daemon, {"stream": False}), range(16)))
    assert {answer.status_code for answer in answers} == {200}
    assert daemon.instance("cpu")["starts"] == 1
    assert daemon.instance("cpu")["in_flight"] == 0


def test_a_caller_that_gives_up_does_not_stop_the_start_for_the_others(new_daemon: NewDaemon) -> None:
    templates = {"sim": {"env": {"OLLAMA_SIM_START_DELAY_S": "2"}}}
    daemon = new_daemon(templates=templates).start()
    with ThreadPoolExecutor(2) as pool:
        patient = pool.submit(chat, daemon, {"stream": False})
        daemon.wait_for_phase("cpu", "starting")
        with pytest.raises(requests.ReadTimeout):
            chat(daemon, timeout_s=0.5)
        assert patient.result().status_code == 200
    assert daemon.instance("cpu")["starts"] == 1
    wait_for(lambda: daemon.instance("cpu")["in_flight"] == 0)


def test_an_open_stream_outlives_the_ttl_and_the_idle_instance_does_not(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(instances={"cpu": {"template": "sim", "ttl_s": 1}}, templates=slowly(4)).start()
    answer = chat(daemon)
    assert [json.loads(line)["done"] for line in answer.text.splitlines()][-1] is True
    daemon.wait_for_phase("cpu", "stopped", within_s=30)
    assert chat(daemon, {"stream": False, "options": {"num_predict": 1}}).status_code == 200
    assert daemon.instance("cpu")["starts"] == 2


def test_a_request_during_a_stop_waits_and_starts_again(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(templates=slowly(3)).start()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(chat, daemon)
        wait_for(lambda: daemon.instance("cpu")["in_flight"] == 1)
        assert daemon.begin("cpu", "stop", wait="false").status_code == 202
        daemon.wait_for_phase("cpu", "draining")
        second = chat(daemon, {"stream": False, "options": {"num_predict": 1}})
        assert first.result().text.splitlines()[-1].find('"done":true') > 0
    assert second.status_code == 200
    assert daemon.instance("cpu")["starts"] == 2


def test_a_failed_start_is_an_error_with_its_reason_in_the_words_of_the_caller(new_daemon: NewDaemon) -> None:
    templates = {"sim": {"env": {"OLLAMA_SIM_CRASH": "start"}}}
    daemon = new_daemon(templates=templates).start()
    answer = chat(daemon)
    assert answer.status_code == 503
    assert set(answer.json()) == {"error"}
    openai = daemon.call("POST", "/v1/chat/completions", json=TINY)
    assert (openai.status_code, openai.json()["error"]["type"]) == (503, "api_error")
    assert int(openai.headers["Retry-After"]) >= 1
    errors = daemon.call("GET", "/metrics").text
    assert 'ollama_manager_target_errors_total{reason="container_exited",target="cpu"}' in errors


def test_a_model_that_no_instance_has_is_404_and_names_those_there_are(new_daemon: NewDaemon) -> None:
    daemon = new_daemon().start()
    answer = chat(daemon, {"model": "nope"})
    assert answer.status_code == 404
    assert "tiny" in answer.json()["error"]
    assert daemon.instance("cpu")["phase"] == "ready"  # its list had never been read
    daemon.stopped("cpu")
    assert chat(daemon, {"model": "nope"}).status_code == 404
    assert daemon.instance("cpu")["phase"] == "stopped"  # now it is known
    daemon.stop()
    daemon.start()
    assert chat(daemon, {"model": "nope"}).status_code == 404
    assert daemon.instance("cpu")["phase"] == "stopped"


def test_an_instance_that_fails_is_left_for_the_next_and_told_so(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(
        instances={
            "best": {"template": "broken", "priority": 10},
            "cpu": {"template": "sim"},
        },
        templates={"broken": {"env": {"OLLAMA_SIM_CRASH": "start"}}},
    ).start()
    answer = chat(daemon, {"stream": False})
    assert answer.status_code == 200
    assert answer.headers["X-Instance"] == "cpu"
    assert answer.headers["X-Fallback-Reason"] == "container_exited"
    assert any(event["kind"] == "fallback" for event in daemon.events())


def test_a_pin_is_held(new_daemon: NewDaemon) -> None:
    instances = {name: {"template": "sim"} for name in ("one", "two")}
    daemon = new_daemon(instances=instances).start()
    answer = chat(daemon, {"model": "tiny@two", "stream": False})
    assert (answer.status_code, answer.headers["X-Instance"], answer.headers["X-Model"]) == (
        200,
        "two",
        "tiny",
    )
    answer = chat(daemon, {"stream": False}, headers={"X-Instance": "one"})
    assert answer.headers["X-Instance"] == "one"
    # Both run, and both have the model loaded.
    wait_for(lambda: all(daemon.instance(name)["models"] for name in instances))
    answer = chat(daemon, {"model": "tiny@three"})
    assert answer.status_code == 404
    assert "one, two" in answer.json()["error"]


def test_a_role_on_the_cpu_only_never_gets_a_gpu(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(
        instances={"cpu": {"template": "sim"}, "other": {"template": "sim", "priority": 100}},
        config={
            "roles": {
                "embedding": {"model": "minilm", "policy": "cpu_only", "target": "cpu"},
                "thinking": {"model": "tiny"},
            }
        },
    ).start()
    answer = daemon.call("POST", "/api/embed", json={"model": "embedding", "input": "x"})
    assert (answer.status_code, answer.headers["X-Instance"]) == (200, "cpu")
    assert answer.headers["X-Model"] == "minilm"
    answer = chat(daemon, {"model": "embedding"})
    assert answer.status_code == 422
    answer = chat(daemon, {"model": "thinking", "stream": False})
    assert answer.json()["model"] == "tiny"


def test_live_streams_end_before_the_daemon_does_and_containers_run_on(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(templates=slowly(3)).start()
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(chat, daemon)
        wait_for(lambda: daemon.instance("cpu")["in_flight"] == 1)
        assert daemon.stop() == 0
        assert '"done":true' in stream.result().text.splitlines()[-1]
    daemon.start()
    daemon.wait_for_phase("cpu", "ready")
    assert daemon.instance("cpu")["starts"] == 1


def test_a_second_signal_cuts_what_is_under_way_with_an_error_line(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(templates=slowly(60)).start()
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(chat, daemon)
        wait_for(lambda: daemon.instance("cpu")["in_flight"] == 1)
        process = daemon.process
        assert process is not None
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: not listens(daemon))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        daemon.process = None
        assert "being stopped" in json.loads(stream.result().text.splitlines()[-1])["error"]


def listens(daemon: Daemon) -> bool:
    try:
        daemon.call("GET", "/healthz", timeout_s=2)
    except requests.RequestException:
        return False
    return True


def test_the_containers_are_stopped_with_the_daemon_where_that_is_wanted(
    new_daemon: NewDaemon, docker_client: docker.DockerClient, manager_id: str
) -> None:
    daemon = new_daemon().start()
    daemon.stop()
    daemon.start(arguments=["--stop-instances"])
    assert chat(daemon, {"stream": False}).status_code == 200
    assert daemon.stop() == 0
    label = f"ollama-manager.manager={manager_id}"
    assert docker_client.containers.list(all=True, filters={"label": label}) == []


def test_a_container_that_dies_in_mid_stream_is_told_and_leaves_no_lease(
    new_daemon: NewDaemon, docker_client: docker.DockerClient, manager_id: str
) -> None:
    daemon = new_daemon(templates=slowly(60)).start()
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(chat, daemon)
        wait_for(lambda: daemon.instance("cpu")["in_flight"] == 1)
        container = docker_client.containers.get(f"{manager_id}-ollama-cpu")
        threading.Timer(0.5, container.kill).start()
        assert "error" in json.loads(stream.result().text.splitlines()[-1])
    # A request that reaches the server while it dies is not repeated: this one comes after its end was seen.
    wait_for(lambda: daemon.instance("cpu"), lambda body: body["phase"] != "ready" or body["starts"] > 1)
    answer = chat(daemon, {"stream": False, "options": {"num_predict": 1}})
    assert daemon.instance("cpu")["in_flight"] == 0
    assert answer.status_code == 200, answer.text


def test_a_server_that_hangs_is_left_for_another_while_its_callers_wait(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(
        instances={"best": {"template": "hangs", "priority": 10}, "cpu": {"template": "sim"}},
        templates={"hangs": {"env": {"OLLAMA_SIM_LOAD_S": "600"}}},
    ).start()
    endpoint = daemon.started("best")["endpoint"]
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(chat, daemon, {"stream": False})
        wait_for(lambda: daemon.instance("best")["in_flight"] == 1)
        requests.post(f"{endpoint}/_sim/knobs", json={"hang": "all"}, timeout=10)
        answer = waits.result()
    assert answer.headers["X-Instance"] == "cpu"
    assert answer.headers["X-Fallback-Reason"] == "instance_unhealthy"
    wait_for(lambda: daemon.instance("best")["in_flight"] == 0)


def test_where_no_more_may_run_what_nobody_uses_makes_way(new_daemon: NewDaemon) -> None:
    instances = {
        "one": {"template": "sim"},
        "two": {"template": "sim", "priority": 1},
        "three": {"template": "sim"},
    }
    daemon = new_daemon(instances=instances, lifecycle={"max_running": 2}).start()

    def runs() -> set[str]:
        return {body["id"] for body in daemon.get("instances")["instances"] if body["phase"] != "stopped"}

    for instance in ("two", "one"):
        assert chat(daemon, {"model": f"tiny@{instance}", "stream": False}).status_code == 200
    assert runs() == {"one", "two"}
    # What is in use goes last, whatever its priority: the probes must have seen that the answer is over.
    wait_for(lambda: unused_s(daemon.instance("one")) > 1)
    # `two` was used longer ago, but has the higher priority. Many that want the same cost one instance.
    with ThreadPoolExecutor(8) as pool:
        asked = {"model": "tiny@three", "stream": False}
        answers = list(pool.map(lambda _: chat(daemon, asked), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert runs() == {"two", "three"}
    assert "to make way for three" in daemon.log()


def test_what_is_used_or_pinned_does_not_make_way(new_daemon: NewDaemon) -> None:
    instances = {"one": {"template": "sim"}, "two": {"template": "sim"}}
    daemon = new_daemon(instances=instances, lifecycle={"max_running": 1}, templates=slowly(5)).start()
    other = {"model": "tiny@two", "stream": False}
    with ThreadPoolExecutor(1) as pool:
        used = pool.submit(chat, daemon, {"model": "tiny@one"})
        wait_for(lambda: daemon.instance("one")["in_flight"] == 1 and daemon.instance("one")["ready_at"])
        refused = chat(daemon, other)
        assert refused.status_code == 503
        assert "max_running is 1; running already: one" in refused.json()["error"]
        assert used.result().text.splitlines()[-1].find('"done":true') > 0
    daemon.call("PATCH", "instances/one", json={"pinned": True})
    assert chat(daemon, other).status_code == 503
    assert daemon.instance("one")["phase"] == "ready"


TWO = {"one": {"template": "sim"}, "two": {"template": "sim"}}


def one_of_two(new_daemon: NewDaemon, **env: str) -> Daemon:
    """A daemon that lets one instance run at a time; `one` runs, and both are known to have the model."""
    templates = {"sim": {"env": {f"OLLAMA_SIM_{name}": value for name, value in env.items()}}}
    daemon = new_daemon(instances=TWO, lifecycle={"max_running": 1}, templates=templates).start()
    for instance in ("two", "one"):
        assert chat(daemon, {"model": f"tiny@{instance}", "stream": False}).status_code == 200
    return daemon


def test_who_gives_up_while_another_makes_way_leaves_it_to_the_others(new_daemon: NewDaemon) -> None:
    daemon = one_of_two(new_daemon, SHUTDOWN_S="6")
    wanted = {"model": "tiny@two", "stream": False}
    with ThreadPoolExecutor(1) as pool:
        patient = pool.submit(hasty, daemon, wanted)
        daemon.wait_for_phase("one", "stopping")
        answer = chat(daemon, wanted)
        assert patient.result() is None
    assert answer.status_code == 200
    assert daemon.instance("two")["starts"] == 2


def hasty(daemon: Daemon, body: dict[str, Any]) -> None:
    with pytest.raises(requests.ReadTimeout):
        chat(daemon, body, timeout_s=4)  # a look at its use takes up to 2 s on Docker 20.10


def test_what_makes_way_does_not_take_its_place_back(new_daemon: NewDaemon) -> None:
    daemon = one_of_two(new_daemon, SHUTDOWN_S="2")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(chat, daemon, {"model": "tiny@two", "stream": False})
        daemon.wait_for_phase("one", "stopping")
        second = chat(daemon, {"model": "tiny@one", "stream": False})
        assert first.result().status_code == 200
    assert second.status_code in (200, 503)  # its turn may come, behind the other
    assert daemon.instance("two")["starts"] == 2


def test_a_place_that_becomes_free_anyway_is_waited_for(new_daemon: NewDaemon) -> None:
    daemon = one_of_two(new_daemon, SHUTDOWN_S="2")
    assert daemon.begin("one", "stop", wait="false").status_code == 202
    assert chat(daemon, {"model": "tiny@two", "stream": False}).status_code == 200


def test_what_a_request_has_failed_on_does_not_make_way_for_it(new_daemon: NewDaemon) -> None:
    daemon = one_of_two(new_daemon)
    endpoint = daemon.instance("one")["endpoint"]
    assert requests.post(f"{endpoint}/_sim/knobs", json={"queue_full": True}, timeout=10).ok
    answer = chat(daemon, {"stream": False})
    assert answer.status_code == 503
    assert "server busy" in answer.json()["error"] or "status 503" in answer.json()["error"]
    assert daemon.instance("one")["phase"] == "ready"


def test_the_first_request_ever_may_pull_its_model(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(
        templates={"sim": {"env": {"OLLAMA_SIM_PULLABLE": "big"}}}, config={"models": {"auto_pull": True}}
    ).start()
    answer = chat(daemon, {"model": "big", "stream": False})
    assert (answer.status_code, answer.headers["X-Model"]) == (200, "big")
