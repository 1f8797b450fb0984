"""Each row of the control API's table, as facts about what a client sees."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import requests

from manager.api.schemas import InstanceBody
from tests.api.registry import Registry
from tests.simulated.image import IMAGE
from tests.support.daemon import COMPUTE, wait_for
from tests.support.engine import PrivateEngine

if TYPE_CHECKING:
    from collections.abc import Iterator

    import docker

    from tests.api.conftest import Api
    from tests.support.daemon import Daemon
    from tests.support.engine import Engine
    from tests.support.fixtures import NewDaemon

INSTANCE = {
    "id", "driver", "protocol", "template", "image", "device", "node", "endpoint", "target", "phase",
    "health", "reason", "start", "in_flight",
    "pinned", "ttl_s", "ttl_remaining_s", "started_at", "ready_at", "last_used_at", "last_seen_at", "starts",
    "container", "image_override", "drained", "lifted", "rules", "models",
    "loading", "breaker",
}  # fmt: skip
DEVICE = {"kind", "uuid", "index", "name", "vram_total_bytes", "vram_used_bytes", "vram_free_bytes", "cards"}
CONTAINER = {"id", "name", "image", "template_hash"}
MODEL = {"name", "digest", "size_bytes", "vram_bytes", "expires_at"}
REASON = {"code", "message", "log_tail"}
BREAKER = {"state", "failures", "opened_at", "retry_at", "reason"}
EVENT = {"id", "at", "instance", "kind", "reason", "detail"}
PHASES = {"stopped", "starting", "ready", "draining", "stopping", "failed", "unavailable"}
TIMES = ("started_at", "ready_at", "last_used_at", "last_seen_at")
RFC3339_UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")

MOST_TTL_S = 31_622_400


def error_of(answer: requests.Response, status: int) -> dict[str, Any]:
    """The error of an answer that must have this status and the one documented shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert {"code", "message"} <= set(error) <= {"code", "message", "instance", "details"}
    assert re.fullmatch(r"[a-z0-9_]+", error["code"])
    assert error["message"]
    assert "Traceback" not in answer.text
    return error


def check_shape(body: dict[str, Any]) -> None:
    assert set(body) == INSTANCE
    assert set(body["device"]) == DEVICE
    assert body["driver"] in {"docker", "external"}
    assert body["device"]["kind"] in {"cpu", "gpu", None}
    assert body["target"] in {"running", "stopped"}
    assert body["phase"] in PHASES
    assert body["health"] in {"healthy", "unhealthy", "unknown"}
    assert body["container"] is None or set(body["container"]) == CONTAINER
    assert body["reason"] is None or set(body["reason"]) == REASON
    assert set(body["breaker"]) == BREAKER
    assert all(set(model) == MODEL for model in body["models"])
    for name in TIMES:
        assert body[name] is None or RFC3339_UTC.fullmatch(body[name]), (name, body[name])
    for model in body["models"]:
        assert RFC3339_UTC.fullmatch(model["expires_at"])
    InstanceBody.model_validate(body)


# --- instances ------------------------------------------------------------------------------------


def test_the_list_has_every_instance_once_in_the_order_of_the_configuration(daemon: Daemon) -> None:
    body = daemon.get("instances")
    assert set(body) == {"instances", "count"}
    assert body["count"] == 4
    assert [one["id"] for one in body["instances"]] == ["cpu", "second", "nas", "gone"]
    for one in body["instances"]:
        check_shape(one)


def test_a_stopped_instance_says_so_everywhere(daemon: Daemon) -> None:
    body = daemon.instance("cpu")
    check_shape(body)
    assert body["driver"] == "docker"
    assert body["template"] == "sim"
    assert body["device"] == dict.fromkeys(DEVICE) | {"kind": "cpu", "cards": []}
    assert (body["target"], body["phase"], body["health"]) == ("stopped", "stopped", "unknown")
    assert (body["endpoint"], body["container"], body["reason"], body["models"]) == (None, None, None, [])
    assert body["node"] is None
    assert (body["started_at"], body["ttl_remaining_s"], body["in_flight"]) == (None, None, 0)
    assert (body["pinned"], body["ttl_s"]) == (False, 900)


def test_a_ready_instance_has_an_endpoint_a_container_and_all_its_times(api: Api, daemon: Daemon) -> None:
    before = daemon.instance("second")["starts"]
    daemon.started("second")
    body = wait_for(lambda: daemon.instance("second"), lambda b: b["health"] == "healthy")
    check_shape(body)
    assert (body["target"], body["phase"], body["reason"]) == ("running", "ready", None)
    assert re.fullmatch(r"http://[^/]+:\d+", body["endpoint"])
    assert body["container"]["name"] == f"{api.manager_id}-ollama-second"
    assert body["container"]["image"].startswith("ollama-manager/simulated:")
    assert re.fullmatch(r"[0-9a-f]{64}", body["container"]["id"])
    assert re.fullmatch(r"[0-9a-f]+", body["container"]["template_hash"])
    assert all(body[name] for name in TIMES)
    assert body["started_at"] <= body["ready_at"] <= body["last_seen_at"]
    assert 0 < body["ttl_remaining_s"] <= body["ttl_s"] == 60
    assert body["starts"] == before + 1


def test_a_loaded_model_is_listed_with_its_sizes(daemon: Daemon) -> None:
    endpoint = daemon.started("cpu")["endpoint"]
    requests.post(f"{endpoint}/api/generate", json={"model": "tiny"}, timeout=10).raise_for_status()
    body = wait_for(lambda: daemon.instance("cpu"), lambda b: b["models"])
    check_shape(body)
    (model,) = body["models"]
    assert model["name"] == "tiny:latest"
    assert model["size_bytes"] > 0
    assert model["vram_bytes"] == 0


def test_an_unknown_instance_is_404_on_every_route_of_an_instance(daemon: Daemon) -> None:
    for method, path in (
        ("GET", "instances/nope"),
        ("POST", "instances/nope/start"),
        ("POST", "instances/nope/stop"),
        ("GET", "instances/nope/logs"),
        ("POST", "instances/nope/resume"),
        ("POST", "instances/nope/restart"),
        ("POST", "instances/nope/rollback"),
    ):
        error = error_of(daemon.call(method, path), 404)
        assert (error["code"], error["instance"]) == ("unknown_instance", "nope")
        assert "cpu" in error["message"], "it names those there are"
    assert error_of(daemon.call("PATCH", "instances/nope", json={}), 404)["instance"] == "nope"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "instances?state=ready"),
        ("GET", "instances/cpu?x=1"),
        ("POST", "instances/cpu/start?wiat=false"),
        ("POST", "instances/cpu/stop?forced=true"),
        ("POST", "instances/cpu/drain?wiat=false"),
        ("POST", "instances/cpu/resume?wait=false"),
        ("POST", "instances/cpu/restart?force=true"),
        ("PATCH", "instances/cpu?x=1"),
        ("POST", "reap?dryrun=true"),
        ("POST", "pull?image=x"),
        ("GET", "instances/cpu/logs?lines=1"),
        ("GET", "gpus?x=1"),
        ("GET", "events?after=1"),
        ("GET", "/metrics?x=1"),
    ],
)
def test_an_unknown_parameter_is_refused_and_named(daemon: Daemon, method: str, path: str) -> None:
    body: dict[str, str] | None = {} if method == "PATCH" or path.startswith("pull") else None
    error = error_of(daemon.call(method, path, json=body), 422)
    assert error["code"] == "invalid_request"
    name = path.partition("?")[2].partition("=")[0]
    (problem,) = error["details"]["fields"]
    assert problem["field"] == f"query.{name}"
    assert problem["message"].startswith("unknown key; ")
    assert daemon.instance("cpu")["phase"] == "stopped"


@pytest.mark.parametrize(
    "path", ["instances/cpu/start?wait=maybe", "instances/cpu/stop?force=2", "reap?dry_run="]
)
def test_a_wrong_parameter_is_refused_and_nothing_happens(daemon: Daemon, path: str) -> None:
    assert error_of(daemon.call("POST", path), 422)["code"] == "invalid_request"
    assert daemon.instance("cpu")["phase"] == "stopped"


def test_routes_and_methods_that_do_not_exist_have_the_same_shape_of_error(daemon: Daemon) -> None:
    assert error_of(daemon.call("GET", "nothing"), 404)["code"] == "not_found"
    assert error_of(daemon.call("GET", "instances//cpu/x"), 404)["code"] == "not_found"
    answer = daemon.call("DELETE", "instances/cpu")
    assert error_of(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "GET, PATCH"


# --- start and stop -------------------------------------------------------------------------------


def test_start_and_stop_answer_with_the_instance_and_whether_it_changed(daemon: Daemon) -> None:
    for action, phase in (("start", "ready"), ("stop", "stopped")):
        first, second = daemon.begin("cpu", action), daemon.begin("cpu", action)
        for answer, changed in ((first, True), (second, False)):
            assert answer.status_code == 200
            assert set(answer.json()) == {"instance", "changed"}
            assert answer.json()["changed"] is changed
            assert answer.json()["instance"]["phase"] == phase
            check_shape(answer.json()["instance"])


def test_without_wait_start_and_stop_answer_202_at_once(daemon: Daemon) -> None:
    for action, going, done in (("start", "starting", "ready"), ("stop", "stopping", "stopped")):
        answer = daemon.begin("cpu", action, wait="false")
        assert answer.status_code == 202
        assert answer.json()["changed"] is True
        assert answer.json()["instance"]["phase"] in {going, "stopped" if action == "start" else "ready"}
        assert daemon.wait_for_phase("cpu", done)["phase"] == done
        assert daemon.begin("cpu", action, wait="false").status_code == 202


def test_a_start_that_is_cancelled_by_a_stop_is_409(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(templates={"sim": {"env": {"OLLAMA_SIM_START_PORT": "never"}}}).start()
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(daemon.begin, "cpu", "start")
        daemon.wait_for_phase("cpu", "starting")
        wait_for(lambda: daemon.instance("cpu")["container"])
        daemon.stopped("cpu")
        error = error_of(starting.result(), 409)
    assert (error["code"], error["instance"]) == ("cancelled", "cpu")


def test_max_running_is_409(new_daemon: NewDaemon) -> None:
    instances = {"one": {"template": "sim"}, "two": {"template": "sim"}}
    daemon = new_daemon(instances=instances, lifecycle={"max_running": 1}).start()
    daemon.started("one")
    daemon.call("PATCH", "instances/one", json={"pinned": True})
    error = error_of(daemon.begin("two", "start"), 409)
    assert (error["code"], error["instance"]) == ("max_running_reached", "two")
    assert daemon.instance("two")["phase"] == "stopped"


def test_a_start_that_fails_is_503_with_the_last_lines_and_stays_readable(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(
        templates={"sim": {"env": {"OLLAMA_SIM_CRASH": "start", "OLLAMA_SIM_CRASH_EXIT": "3"}}}
    ).start()
    error = error_of(daemon.begin("cpu", "start"), 503)
    assert (error["code"], error["instance"]) == ("container_exited", "cpu")
    assert "exit code 3" in error["message"]
    body = daemon.instance("cpu")
    check_shape(body)
    assert (body["phase"], body["target"], body["endpoint"]) == ("failed", "stopped", None)
    assert body["reason"]["code"] == "container_exited"
    assert body["reason"]["message"] == error["message"]
    assert body["reason"]["log_tail"] == error["details"]["log_tail"] != []


def test_a_start_that_takes_too_long_is_504(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(
        templates={"sim": {"env": {"OLLAMA_SIM_START_PORT": "never"}}}, lifecycle={"start_timeout_s": 1}
    ).start()
    error = error_of(daemon.begin("cpu", "start"), 504)
    assert (error["code"], error["instance"]) == ("start_timeout", "cpu")
    assert daemon.instance("cpu")["reason"]["code"] == "start_timeout"


def test_a_missing_image_is_503_and_says_how_to_get_it(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(templates={"sim": {"image": "ollama-manager/simulated:none"}}).start()
    error = error_of(daemon.begin("cpu", "start"), 503)
    assert (error["code"], error["instance"]) == ("image_missing", "cpu")
    assert "pull" in error["message"]


def test_while_the_engine_is_away_starts_are_503_and_say_when_to_come_back(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(engine_url="unix:///nonexistent/docker.sock").start(until_ready=False)
    daemon.wait_until_alive()
    answer = daemon.begin("cpu", "start")
    error = error_of(answer, 503)
    assert (error["code"], error["instance"]) == ("engine_unavailable", "cpu")
    assert int(answer.headers["retry-after"]) >= 1
    body = daemon.instance("cpu")
    check_shape(body)
    assert body["phase"] == "unavailable"
    assert body["reason"]["code"] == "engine_unavailable"
    answer = daemon.call("GET", "/readyz")
    assert answer.status_code == 503
    assert answer.json()["status"] == "not_ready"
    assert any(reason.startswith("engine: ") for reason in answer.json()["reasons"])
    assert daemon.call("GET", "/healthz").json() == {"status": "ok"}


# --- overrides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch", "field", "value"),
    [
        ({"ttl_s": 0}, "ttl_s", 0),
        ({"ttl_s": 1.5}, "ttl_s", 1.5),
        ({"ttl_s": MOST_TTL_S}, "ttl_s", MOST_TTL_S),
        ({"pinned": True}, "pinned", True),
        ({"pinned": True, "ttl_s": 5}, "ttl_s", 5),
    ],
)
def test_overrides_show_in_the_answer_and_afterwards(
    daemon: Daemon, patch: dict[str, Any], field: str, value: object
) -> None:
    answer = daemon.call("PATCH", "instances/cpu", json=patch)
    assert answer.status_code == 200
    check_shape(answer.json())
    assert answer.json()[field] == daemon.instance("cpu")[field] == value


def test_an_empty_change_changes_nothing_and_is_no_event(daemon: Daemon) -> None:
    before, events = daemon.instance("cpu"), daemon.events()
    answer = daemon.call("PATCH", "instances/cpu", json={})
    assert answer.status_code == 200
    assert answer.json() == before
    assert daemon.events() == events


@pytest.mark.parametrize(
    "body",
    [
        '{"ttl_s": -1}',
        f'{{"ttl_s": {MOST_TTL_S + 1}}}',
        '{"ttl_s": "5"}',
        '{"ttl_s": true}',
        '{"ttl_s": 1e999}',
        '{"ttl_s": NaN}',
        '{"pinned": 1}',
        '{"ttl": 5}',
        '{"ttl_s": 5, "priority": 1}',
        "[]",
        "null",
        "5",
        "",
        "{",
        '{"ttl_s": ' + "9" * 5000 + "}",
        "[" * 100_000,
        '{"\ud800": 1}'.encode("utf-8", "surrogatepass"),
        b"\xff\xfe{",
    ],
    ids=range(18),
)
def test_a_wrong_change_is_422_and_changes_nothing(daemon: Daemon, body: str | bytes) -> None:
    before = daemon.instance("cpu")
    answer = daemon.call("PATCH", "instances/cpu", data=body, headers={"Content-Type": "application/json"})
    assert error_of(answer, 422)["code"] == "invalid_request"
    assert daemon.instance("cpu") == before


def test_null_puts_the_configured_value_in_force_again(daemon: Daemon) -> None:
    daemon.call("PATCH", "instances/second", json={"ttl_s": 7, "pinned": True}).raise_for_status()
    body = daemon.call("PATCH", "instances/second", json={"pinned": None}).json()
    assert (body["ttl_s"], body["pinned"]) == (7, False)
    body = daemon.call("PATCH", "instances/second", json={"ttl_s": None}).json()
    assert (body["ttl_s"], body["pinned"]) == (60, False)


def test_overrides_survive_a_restart(new_daemon: NewDaemon) -> None:
    daemon = new_daemon().start()
    daemon.call("PATCH", "instances/cpu", json={"ttl_s": 7, "pinned": True}).raise_for_status()
    daemon.stop()
    body = daemon.start().instance("cpu")
    assert (body["ttl_s"], body["pinned"]) == (7, True)


# --- sweeps, pulls, logs, cards -------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_stopped_and_stops_nothing(new_daemon: NewDaemon) -> None:
    # The daemon's own sweep must not come first: it runs every probe interval.
    daemon = new_daemon(lifecycle={"probe_interval_s": 60, "resync_interval_s": 60, "ttl_s": 0.05}).start()
    daemon.started("cpu")
    body = wait_for(
        lambda: daemon.call("POST", "reap?dry_run=true").json(),
        lambda b: b["instances"][0]["action"] == "would_stop",
    )
    assert set(body) == {"instances", "count"}
    assert body["count"] == 1
    assert set(body["instances"][0]) == {"id", "action", "detail"}
    assert daemon.instance("cpu")["phase"] == "ready"
    # One last look may find that its server was still busy with starting: that is use like any other.
    wait_for(lambda: daemon.call("POST", "reap").json(), lambda b: b["instances"][0]["action"] == "stopped")
    assert daemon.instance("cpu")["phase"] == "stopped"


def test_a_sweep_names_every_container_instance_and_why_it_is_kept(daemon: Daemon) -> None:
    answer = daemon.call("POST", "reap")
    assert answer.status_code == 200
    assert {one["id"]: (one["action"], one["detail"]) for one in answer.json()["instances"]} == {
        "cpu": ("kept", "stopped"),
        "second": ("kept", "stopped"),
    }


@pytest.mark.parametrize(
    "image",
    [
        "alpine:3",
        "ollama/other:1",
        "ollama/ollama:\u0000",
        "",
        "ollama-manager/simulated:a b",
        "../x",
        7,
    ],
)
def test_an_image_that_is_not_allowed_is_never_pulled(daemon: Daemon, image: object) -> None:
    error = error_of(daemon.call("POST", "pull", json={"image": image}), 422)
    assert error["code"] == "invalid_request"
    assert "image" in error["message"]


def test_a_pull_that_fails_before_it_began_is_an_error_status(daemon: Daemon) -> None:
    answer = daemon.call("POST", "pull", json={"image": "ollama-manager/simulated:none"})
    assert error_of(answer, 503)["code"] in {"image_missing", "start_failed", "engine_unavailable"}


def test_of_all_images_one_that_is_there_and_in_no_registry_is_kept(daemon: Daemon) -> None:
    answer = daemon.call("POST", "pull", json={})
    assert answer.status_code == 200
    kept, done = [json.loads(line) for line in answer.text.splitlines()]
    assert (kept["image"], done) == (IMAGE, {"status": "done"})
    assert kept["status"].startswith("kept: ")


def test_a_pull_tells_its_progress_as_ndjson_and_ends_with_done(
    new_daemon: NewDaemon, engine: Engine, docker_client: docker.DockerClient
) -> None:
    if not isinstance(engine, PrivateEngine):
        pytest.skip("only a private engine reaches a registry on this machine")
    with Registry() as registry:
        image = f"{registry.address}/pulled:1"
        daemon = new_daemon(config={"allow": {"images": ["ollama-manager/simulated:*", image]}}).start()
        answer = daemon.call("POST", "pull", json={"image": image})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert len(lines) > 2
    assert all(set(line) <= {"status", "image", "layer", "current_bytes", "total_bytes"} for line in lines)
    assert all(line["image"] == image for line in lines[:-1])
    assert lines[-1] == {"status": "done"}
    docker_client.images.get(image)
    docker_client.images.remove(image, force=True)


def test_a_pull_that_breaks_half_way_ends_with_an_error_line(new_daemon: NewDaemon, engine: Engine) -> None:
    if not isinstance(engine, PrivateEngine):
        pytest.skip("only a private engine reaches a registry on this machine")
    with Registry(broken=True) as registry:
        image = f"{registry.address}/pulled:2"
        daemon = new_daemon(config={"allow": {"images": ["ollama-manager/simulated:*", image]}}).start()
        answer = daemon.call("POST", "pull", json={"image": image})
    assert answer.status_code == 200
    *progress, last = [json.loads(line) for line in answer.text.splitlines()]
    assert progress
    assert set(last) == {"error"}
    assert {"code", "message"} <= set(last["error"])


def test_logs_are_plain_text_as_many_lines_as_asked_for(daemon: Daemon) -> None:
    daemon.started("cpu")
    answer = wait_for(lambda: daemon.call("GET", "instances/cpu/logs"), lambda a: a.text.count("\n") > 1)
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    one = daemon.call("GET", "instances/cpu/logs?tail=1")
    assert one.text.count("\n") == 1
    daemon.stopped("cpu")
    assert daemon.call("GET", "instances/cpu/logs").text, "the last ones are kept after a stop"
    for tail in ("0", "-1", "10001", "x", "1e3"):
        error_of(daemon.call("GET", f"instances/cpu/logs?tail={tail}"), 422)


def test_without_a_driver_the_list_of_cards_is_empty_and_says_why(daemon: Daemon) -> None:
    body = daemon.get("gpus")
    assert set(body) == {"gpus", "error"}
    if body["error"] is None:
        pytest.skip("this machine has a driver")
    assert body["gpus"] == []
    assert set(body["error"]) == {"code", "message"}
    assert body["error"]["code"] in {"library_missing", "driver_not_loaded"}


# --- events ---------------------------------------------------------------------------------------


def follow(daemon: Daemon, last_event_id: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The id line and the data of each event, live."""
    headers = {} if last_event_id is None else {"Last-Event-ID": last_event_id}
    with requests.get(f"{daemon.url}{COMPUTE}/events", headers=headers, stream=True, timeout=20) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache"
        number = ""
        for line in answer.iter_lines(chunk_size=1, decode_unicode=False):
            if line.startswith(b"id: "):
                number = line.removeprefix(b"id: ").decode()
            if line.startswith(b"data: "):
                yield number, json.loads(line.removeprefix(b"data: "))


def test_events_have_the_documented_keys_and_rising_ids(daemon: Daemon) -> None:
    daemon.started("cpu")
    daemon.stopped("cpu")
    events = daemon.events()
    assert all(set(event) == EVENT for event in events)
    assert all(RFC3339_UTC.fullmatch(event["at"]) for event in events)
    numbers = [event["id"] for event in events]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), "none is missing, none comes twice"
    kinds = [event["kind"] for event in events if event["instance"] == "cpu"]
    assert kinds[-4:] == ["starting", "ready", "stopping", "stopped"]


def test_last_event_id_resumes_after_that_event(daemon: Daemon) -> None:
    daemon.started("cpu")
    events = daemon.events()
    half = events[len(events) // 2]["id"]
    for (number, event), expected in zip(
        follow(daemon, str(half)), [e for e in events if e["id"] > half], strict=False
    ):
        assert event == expected
        assert number == str(event["id"])
        if event == events[-1]:
            break


def first_event(daemon: Daemon, last_event_id: str | None) -> int:
    """The id of the first event that a stream brings while an instance is started and stopped."""
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(lambda: next(follow(daemon, last_event_id)))
        while not first.done():
            daemon.started("cpu")
            daemon.stopped("cpu")
        number: int = first.result()[1]["id"]
        return number


def test_without_last_event_id_only_what_happens_from_now_on_is_told(daemon: Daemon) -> None:
    before: int = daemon.events()[-1]["id"]
    assert first_event(daemon, None) > before


def test_an_event_id_of_the_future_does_not_hide_what_happens(daemon: Daemon) -> None:
    """It belongs to a registry that is no more: whoever reconnects with it must hear of what comes."""
    assert first_event(daemon, str(2**40)) < 2**40


@pytest.mark.parametrize("number", ["x", "-1", "1.5", str(2**70)])
def test_a_last_event_id_that_is_none_is_422(daemon: Daemon, number: str) -> None:
    error_of(daemon.call("GET", "events", headers={"Last-Event-ID": number}), 422)


def test_event_ids_go_on_after_a_restart_and_old_events_are_still_there(new_daemon: NewDaemon) -> None:
    daemon = new_daemon().start()
    daemon.started("cpu")
    before = daemon.events()
    daemon.stop()
    after = daemon.start().events()
    assert after[: len(before)] == before
    assert after[len(before)]["id"] == before[-1]["id"] + 1


# --- health, metrics, description -----------------------------------------------------------------


def test_readyz_turns_503_when_the_engine_goes_and_200_when_it_is_back(
    new_daemon: NewDaemon, engine: object
) -> None:
    if not isinstance(engine, PrivateEngine):
        pytest.skip("only a private engine can be paused")
    daemon = new_daemon().start()
    assert daemon.get("/readyz") == {"status": "ready", "reasons": []}
    engine.pause()
    try:
        answer = wait_for(lambda: daemon.call("GET", "/readyz"), lambda a: a.status_code == 503)
        assert answer.json()["status"] == "not_ready"
        (reason,) = answer.json()["reasons"]
        assert reason.startswith("engine: ")
        assert daemon.get("/healthz") == {"status": "ok"}
        assert daemon.get("instances")["instances"][0]["reason"]["code"] == "engine_unavailable"
    finally:
        engine.resume()
    daemon.wait_until_ready()


def test_metrics_have_the_names_of_the_contract(daemon: Daemon) -> None:
    daemon.started("cpu")
    answer = daemon.call("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    lines = answer.text.splitlines()
    phases = {line for line in lines if line.startswith('ollama_manager_instance_phase{instance="cpu"')}
    assert {line.partition('phase="')[2].partition('"')[0] for line in phases} == PHASES
    assert 'ollama_manager_instance_phase{instance="cpu",phase="ready"} 1.0' in phases
    assert sum(line.endswith(" 1.0") for line in phases) == 1
    assert any(line.startswith('ollama_manager_in_flight{target="cpu"} 0') for line in lines)
    assert any(line.startswith('ollama_manager_starts_total{instance="cpu",result="ok"}') for line in lines)
    assert "# TYPE ollama_manager_gpu_memory_used_bytes gauge" in lines


def test_the_api_describes_itself(daemon: Daemon) -> None:
    document = daemon.get("/openapi.json")
    assert set(document["paths"]) == {
        *(
            f"{COMPUTE}/{path}"
            for path in ("instances", "instances/{instance_id}", "reap", "pull", "gpus", "events", "orphans")
        ),
        f"{COMPUTE}/gpus/history",
        *(f"{COMPUTE}/instances/{{instance_id}}/{action}" for action in ("start", "stop", "logs")),
        *(f"{COMPUTE}/instances/{{instance_id}}/{order}" for order in ("drain", "resume", "restart")),
        *(f"{COMPUTE}/instances/{{instance_id}}/{order}" for order in ("upgrade", "rollback")),
        *(f"{COMPUTE}/instances/{{instance_id}}/{order}" for order in ("lift", "load", "unload")),
        f"{COMPUTE}/instances/{{instance_id}}/breaker/reset",
        *(f"{COMPUTE}/{path}" for path in ("routing", "routing/explain", "lanes", "explain", "schedules")),
        f"{COMPUTE}/live",
        *(f"{COMPUTE}/models{path}" for path in ("", "/pulls", "/pulls/{number}")),
        *(f"{COMPUTE}/requests{path}" for path in ("", "/{request_id}")),
        *(f"/api/v1/runs{path}" for path in ("", "/{run_id}", "/{run_id}/result")),
        "/api/v1/budgets",
        *(f"/api/v1/keys{path}" for path in ("", "/{name}", "/{name}/rotate")),
        *(f"/api/v1/collections{path}" for path in ("", "/{name}")),
        *(
            f"/api/v1/collections/{{name}}/{path}"
            for path in ("items", "items/{item_id}", "query", "cutover", "rollback", "backfill")
        ),
        *(f"/api/v1/collections/{{name}}/versions{path}" for path in ("", "/{version}")),
        *(f"/api/v1/collections/{{name}}/backfill/{verb}" for verb in ("pause", "resume", "cancel")),
        *(f"/api/v1/benchmarks{path}" for path in ("", "/{benchmark_id}", "/compare", "/reports")),
        "/v1/cluster/benchmarks",
        "/api/v1/usage",
        *(
            f"/api/v1/llm/{path}"
            for path in ("sentiment", "classify", "chat", "models", "ensemble", "routing-stats")
        ),
        *(f"/v1/cluster/{path}" for path in ("hosts", "services", "roles", "health")),
        *(f"/v1/cluster/routes/{path}" for path in ("match", "resolve")),
        *(f"/api/settings/{path}" for path in ("models", "models/effective")),
        "/healthz",
        "/readyz",
        "/metrics",
    }
    assert set(document["components"]["schemas"]["InstanceBody"]["properties"]) == INSTANCE
    page = daemon.call("GET", "/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    # It works without a network: all that it loads is here.
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(loaded) >= 3
    for path in loaded:
        assert path.startswith("/")
        assert daemon.call("GET", path).status_code == 200


def test_a_wrong_value_is_told_with_the_one_that_was_given(daemon: Daemon) -> None:
    error = error_of(daemon.call("PATCH", "instances/cpu", json={"ttl_s": "soon"}), 422)
    assert error["message"] == "body.ttl_s: 'soon'; expected a number"


def test_a_body_that_does_not_say_that_it_is_json_is_told_what_to_say(daemon: Daemon) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    error = error_of(daemon.call("PATCH", "instances/cpu", data='{"ttl_s": 5}', headers=headers), 422)
    assert error["message"] == "body: expected JSON, with the header `Content-Type: application/json`"


# --- external instances ---------------------------------------------------------------------------


def test_an_external_instance_is_listed_probed_and_ready(api: Api, daemon: Daemon) -> None:
    body = daemon.wait_for_phase("nas", "ready")
    check_shape(body)
    assert (body["driver"], body["template"], body["container"]) == ("external", None, None)
    assert (body["endpoint"], body["target"], body["health"]) == (api.nas.url, "running", "healthy")
    assert body["device"]["kind"] == "cpu"
    assert body["last_seen_at"]
    assert body["started_at"] is None


def test_an_external_instance_that_does_not_answer_is_unavailable_and_says_why(daemon: Daemon) -> None:
    body = wait_for(lambda: daemon.instance("gone"), lambda b: b["reason"])
    check_shape(body)
    assert (body["phase"], body["health"]) == ("unavailable", "unhealthy")
    assert body["reason"]["code"] == "upstream_unreachable"
    assert body["device"]["kind"] is None


def test_an_external_instance_that_hangs_becomes_unavailable_and_comes_back(api: Api, daemon: Daemon) -> None:
    daemon.wait_for_phase("nas", "ready")
    api.nas.set(hang="all")
    try:
        body = daemon.wait_for_phase("nas", "unavailable")
        assert body["reason"]["code"] == "instance_unhealthy"
    finally:
        api.nas.set(hang="")
    assert daemon.wait_for_phase("nas", "ready")["reason"] is None


@pytest.mark.parametrize("instance", ["nas", "gone"])
def test_an_external_instance_is_never_started_stopped_or_changed(daemon: Daemon, instance: str) -> None:
    for answer in (
        daemon.begin(instance, "start"),
        daemon.begin(instance, "stop"),
        daemon.begin(instance, "start", wait="false"),
        daemon.call("PATCH", f"instances/{instance}", json={"ttl_s": 1}),
        daemon.call("GET", f"instances/{instance}/logs"),
    ):
        error = error_of(answer, 409)
        assert (error["code"], error["instance"]) == ("conflict", instance)
