"""An instance is taken out of service, put back, restarted and upgraded, and no request fails for it."""

from __future__ import annotations

import io
import json
import signal
import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from threading import Event
from typing import TYPE_CHECKING, Any

import pytest
import requests

from tests.simulated.image import IMAGE, REPOSITORY
from tests.support.daemon import wait_for
from tests.support.fixtures import making_daemons, new_manager_id
from tests.support.state import stored, stored_instance

if TYPE_CHECKING:
    from collections.abc import Iterator

    import docker

    from tests.support.daemon import Daemon
    from tests.support.fixtures import NewDaemon

TINY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
SHORT = {**TINY, "stream": False, "options": {"num_predict": 1}}
TWO = {"a": {"template": "sim"}, "b": {"template": "sim"}}
UPGRADE = f"{REPOSITORY}:0.24.1"
BROKEN = f"{REPOSITORY}:broken"


def chat(daemon: Daemon, body: dict[str, Any], on: str | None = None, **options: Any) -> requests.Response:
    headers = {} if on is None else {"X-Instance": on}
    return daemon.call("POST", "/api/chat", json=body, headers=headers, **options)


def order(daemon: Daemon, instance: str, verb: str, body: Any = None, **query: Any) -> requests.Response:
    return daemon.call("POST", f"instances/{instance}/{verb}", json=body or {}, params=query)


def done(answer: requests.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def slowly(seconds: float) -> dict[str, dict[str, Any]]:
    """A template whose answers take so long."""
    return {"sim": {"env": {"OLLAMA_SIM_TOKENS": "20", "OLLAMA_SIM_TOKENS_PER_S": str(20 / seconds)}}}


def containers(client: docker.DockerClient, daemon: Daemon) -> list[str]:
    labels = [f"ollama-manager.manager={daemon.config.get('manager_id', daemon.manager_id)}"]
    found = client.containers.list(all=True, sparse=True, filters={"label": labels})
    return [container.attrs["Names"][0] for container in found]


def kinds(daemon: Daemon, instance: str) -> list[str]:
    return [event["kind"] for event in daemon.events() if event["instance"] == instance]


# --- drain and resume ---


def test_a_drain_cuts_no_stream_lets_no_request_in_and_then_stops_the_container(
    new_daemon: NewDaemon, docker_client: docker.DockerClient
) -> None:
    daemon = new_daemon(instances=TWO, templates=slowly(4), lifecycle={"drain_timeout_s": 1}).start()
    daemon.started("b")
    with ThreadPoolExecutor(3) as pool:
        streams = [pool.submit(chat, daemon, TINY, "a") for _ in range(3)]
        wait_for(lambda: daemon.instance("a")["in_flight"] == 3)
        answer = order(daemon, "a", "drain", {"reason": "driver update"}, wait="false")
        assert (answer.status_code, answer.json()["changed"]) == (202, True)
        body = answer.json()["instance"]
        assert (body["drained"]["reason"], body["drained"]["until"]) == ("driver update", None)
        daemon.wait_for_phase("a", "draining")
        assert chat(daemon, SHORT).headers["X-Instance"] == "b"
        refused = chat(daemon, SHORT, "a")
        assert refused.status_code == 503
        assert "drained: driver update" in refused.json()["error"]
        explicit = daemon.begin("a", "start")
        assert (explicit.status_code, explicit.json()["error"]["code"]) == (409, "drained")
        assert "driver update" in explicit.json()["error"]["message"]
        waiting = pool.submit(order, daemon, "a", "drain", {"reason": "driver update"})
        for stream in streams:
            assert json.loads(stream.result().text.splitlines()[-1])["done"] is True
        assert done(waiting.result())["changed"] is False
    body = daemon.instance("a")
    assert (body["phase"], body["target"], body["in_flight"]) == ("stopped", "stopped", 0)
    assert len(containers(docker_client, daemon)) == 1
    seen = kinds(daemon, "a")
    assert seen[seen.index("drained") :] == ["drained", "draining", "drain_waits", "stopping", "stopped"]


def test_an_order_is_kept_over_a_restart_and_a_kill_and_a_resume_ends_it(
    new_daemon: NewDaemon, docker_client: docker.DockerClient
) -> None:
    daemon = new_daemon(templates=slowly(30)).start()
    daemon.started("cpu")
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(_quietly, daemon)
        wait_for(lambda: daemon.instance("cpu")["in_flight"] == 1)
        assert order(daemon, "cpu", "drain", {"reason": "why"}, wait="false").status_code == 202
        daemon.wait_for_phase("cpu", "draining")
        daemon.kill()
        stream.result()
    assert len(containers(docker_client, daemon)) == 1
    daemon.start()
    body = daemon.wait_for_phase("cpu", "stopped")
    assert body["drained"]["reason"] == "why"
    wait_for(lambda: containers(docker_client, daemon) == [])
    for ended_by in (signal.SIGTERM, signal.SIGKILL):
        daemon.stop(ended_by)
        daemon.start()
        assert daemon.begin("cpu", "start").status_code == 409
        assert chat(daemon, SHORT).status_code == 503
        assert daemon.instance("cpu")["drained"]["since"] == body["drained"]["since"]
    assert done(order(daemon, "cpu", "resume"))["instance"]["drained"] is None
    assert done(order(daemon, "cpu", "resume"))["changed"] is False
    assert chat(daemon, SHORT).status_code == 200
    assert stored(daemon.state_dir, "SELECT * FROM operator_state") == []


def _quietly(daemon: Daemon) -> None:
    with suppress(requests.RequestException):
        chat(daemon, TINY)


def test_a_container_that_is_drained_but_kept_runs_on_and_gets_no_request(
    new_daemon: NewDaemon, docker_client: docker.DockerClient
) -> None:
    instances = {"cpu": {"template": "sim", "pinned": True, "prewarm": True}}
    daemon = new_daemon(instances=instances).start()
    before = daemon.wait_for_phase("cpu", "ready")
    body = done(order(daemon, "cpu", "drain", {"stop": False}))["instance"]
    assert (body["phase"], body["container"]["id"]) == ("ready", before["container"]["id"])
    assert chat(daemon, SHORT).status_code == 503
    daemon.kill()
    daemon.start()
    body = daemon.wait_for_phase("cpu", "ready")
    assert (body["container"]["id"], body["in_flight"]) == (before["container"]["id"], 0)
    assert chat(daemon, SHORT).status_code == 503
    # Its end is told, and nothing starts it: it is pinned and to be there with the daemon.
    docker_client.containers.get(before["container"]["id"]).kill()
    daemon.wait_for_phase("cpu", "failed", "stopped")
    daemon.kill()
    daemon.start()
    assert daemon.wait_for_phase("cpu", "failed", "stopped")["target"] == "stopped"
    assert order(daemon, "cpu", "restart").json()["error"]["code"] == "drained"
    assert done(order(daemon, "cpu", "resume"))["changed"] is True
    assert daemon.wait_for_phase("cpu", "ready")["container"]["id"] != before["container"]["id"]


def test_a_container_started_by_hand_while_drained_is_stopped_and_not_used(
    new_daemon: NewDaemon, docker_client: docker.DockerClient
) -> None:
    daemon = new_daemon(lifecycle={"resync_interval_s": 20}).start()
    first = daemon.started("cpu")
    done(order(daemon, "cpu", "drain", {"stop": False}))
    docker_client.containers.get(first["container"]["id"]).kill()
    daemon.wait_for_phase("cpu", "failed")
    done(order(daemon, "cpu", "drain", {"stop": True}))
    docker_client.containers.get(first["container"]["id"]).start()
    wait_for(lambda: containers(docker_client, daemon) == [])
    body = daemon.wait_for_phase("cpu", "stopped")
    assert body["drained"] is not None
    assert daemon.instance("cpu")["starts"] == 1


def test_a_drain_ends_by_itself_when_its_time_has_passed_even_while_no_daemon_runs(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon().start()
    before = daemon.started("cpu")
    until = (datetime.now(UTC) + timedelta(seconds=2)).isoformat()
    body = done(order(daemon, "cpu", "drain", {"until": until}))["instance"]
    assert (body["phase"], body["drained"]["until"][:19]) == ("stopped", until[:19])
    wait_for(lambda: daemon.instance("cpu")["drained"] is None)
    assert "resumed" in kinds(daemon, "cpu")
    assert chat(daemon, SHORT).status_code == 200
    until = (datetime.now(UTC) + timedelta(seconds=1)).isoformat()
    kept = done(order(daemon, "cpu", "drain", {"until": until, "stop": False}))["instance"]
    daemon.kill()
    wait_for(lambda: datetime.now(UTC).isoformat() > until)
    daemon.start()
    body = daemon.wait_for_phase("cpu", "ready")
    assert body["container"]["id"] == kept["container"]["id"] != before["container"]["id"]
    wait_for(lambda: daemon.instance("cpu")["drained"] is None)
    assert chat(daemon, SHORT).status_code == 200


def test_a_resume_in_the_middle_of_a_drain_keeps_the_container(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(templates=slowly(4)).start()
    before = daemon.started("cpu")
    with ThreadPoolExecutor(2) as pool:
        stream = pool.submit(chat, daemon, TINY)
        wait_for(lambda: daemon.instance("cpu")["in_flight"] == 1)
        draining = pool.submit(order, daemon, "cpu", "drain")
        daemon.wait_for_phase("cpu", "draining")
        done(order(daemon, "cpu", "resume"))
        assert draining.result().status_code == 409
        assert daemon.instance("cpu")["phase"] == "ready"
        assert chat(daemon, SHORT).status_code == 200
        assert json.loads(stream.result().text.splitlines()[-1])["done"] is True
    assert daemon.instance("cpu")["container"]["id"] == before["container"]["id"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"until": "2020-01-01T00:00:00Z"}, "until"),
        ({"until": "tomorrow"}, "until"),
        ({"until": 1900000000}, "until"),
        ({"until": "2099-01-01T00:00:00"}, "until"),
        ({"stop": "yes"}, "stop"),
        ({"reason": ""}, "reason"),
        ({"why": "x"}, "why"),
    ],
)
def test_an_order_that_makes_no_sense_is_refused_and_names_the_field(
    quiet_daemon: Daemon, body: dict[str, Any], field: str
) -> None:
    answer = order(quiet_daemon, "cpu", "drain", body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_request")
    assert field in answer.json()["error"]["message"]
    assert quiet_daemon.instance("cpu")["drained"] is None


@pytest.fixture(scope="module")
def quiet_daemon(engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with making_daemons(engine, tmp_path_factory.mktemp("service"), new_manager_id()) as make:
        yield make().start()


# --- restart ---


def test_a_restart_under_load_fails_no_request_where_another_instance_can_serve(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon(instances=TWO).start()
    before = {id_: daemon.started(id_)["container"]["id"] for id_ in TWO}
    enough, answers = Event(), list[requests.Response]()

    def ask() -> None:
        while not enough.is_set() or len(answers) < 150:
            answers.append(chat(daemon, {**TINY, "options": {"num_predict": 8}}))

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        wait_for(lambda: len(answers) > 20)
        for id_ in TWO:
            body = done(order(daemon, id_, "restart"))["instance"]
            assert body["phase"] == "ready"
            assert body["container"]["id"] != before[id_]
        enough.set()
        for each in asking:
            each.result()
    assert len(answers) >= 150
    assert {answer.status_code for answer in answers} == {200}
    assert all(json.loads(answer.text.splitlines()[-1])["done"] for answer in answers)
    assert {answer.headers["X-Instance"] for answer in answers} == {"a", "b"}


def test_requests_that_only_the_restarted_instance_can_serve_wait_for_it(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(templates=slowly(2)).start()
    before = daemon.started("cpu")
    with ThreadPoolExecutor(8) as pool:
        stream = pool.submit(chat, daemon, TINY)
        wait_for(lambda: daemon.instance("cpu")["in_flight"] == 1)
        assert order(daemon, "cpu", "restart", wait="false").status_code == 202
        daemon.wait_for_phase("cpu", "draining")
        later = [pool.submit(chat, daemon, SHORT) for _ in range(6)]
        assert json.loads(stream.result().text.splitlines()[-1])["done"] is True
        assert {each.result().status_code for each in later} == {200}
    body = daemon.instance("cpu")
    assert (body["starts"], body["drained"]) == (2, None)
    assert body["container"]["id"] != before["container"]["id"]


@pytest.mark.parametrize("step", ["stored:2", "signalled", "ended", "removed", "created:2", "started:2"])
def test_a_daemon_killed_in_a_restart_is_followed_by_one_that_completes_it(
    new_daemon: NewDaemon, docker_client: docker.DockerClient, step: str
) -> None:
    daemon = new_daemon().start(die_at=f"cpu:{step}")
    before = daemon.started("cpu")["container"]["id"]
    with suppress(requests.ConnectionError):
        order(daemon, "cpu", "restart")
    assert daemon.wait_until_dead() == -signal.SIGKILL
    assert stored_instance(daemon.state_dir, "cpu")["target"] == "running"
    daemon.start()
    body = wait_for(
        lambda: daemon.instance("cpu"),
        lambda body: body["phase"] == "ready" and body["container"]["id"] != before,
    )
    assert (body["target"], body["drained"]) == ("running", None)
    assert len(containers(docker_client, daemon)) == 1
    assert chat(daemon, SHORT).status_code == 200


def test_a_stopped_instance_is_started_by_a_restart(new_daemon: NewDaemon) -> None:
    daemon = new_daemon().start()
    assert done(order(daemon, "cpu", "restart"))["instance"]["phase"] == "ready"


# --- another image ---


@pytest.fixture
def images(docker_client: docker.DockerClient) -> Iterator[None]:
    """A second image of the simulated Ollama, and one that cannot be started."""
    docker_client.images.get(IMAGE).tag(UPGRADE)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("nothing"))
    repository, _, tag = BROKEN.partition(":")
    docker_client.api.import_image_from_data(
        archive.getvalue(), repository=repository, tag=tag, changes=['ENTRYPOINT ["/nothing"]']
    )
    yield
    for image in (UPGRADE, BROKEN):
        with suppress(Exception):
            docker_client.images.remove(image, force=True)


@pytest.mark.usefixtures("images")
def test_an_upgrade_is_used_at_once_kept_over_restarts_and_rolled_back(new_daemon: NewDaemon) -> None:
    daemon = new_daemon().start()
    before = daemon.started("cpu")
    assert (before["container"]["image"], before["image_override"]) == (IMAGE, None)
    body = done(order(daemon, "cpu", "upgrade", {"image": UPGRADE}))["instance"]
    assert (body["phase"], body["container"]["image"]) == ("ready", UPGRADE)
    chosen = body["image_override"]
    assert (chosen["image"], chosen["previous"]) == (UPGRADE, IMAGE)
    assert done(order(daemon, "cpu", "upgrade", {"image": UPGRADE}))["changed"] is False
    daemon.kill()
    daemon.start()
    again = daemon.wait_for_phase("cpu", "ready")
    assert again["container"] == body["container"]
    assert (again["reason"], again["image_override"]) == (None, chosen)
    # It is not taken for a container of an older template, neither then nor after its next start.
    daemon.stopped("cpu")
    assert daemon.started("cpu")["container"]["image"] == UPGRADE
    assert "recreating" not in kinds(daemon, "cpu")
    body = done(order(daemon, "cpu", "rollback"))["instance"]
    assert (body["container"]["image"], body["image_override"]) == (IMAGE, None)
    refused = order(daemon, "cpu", "rollback")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
    assert chat(daemon, SHORT).status_code == 200


@pytest.mark.usefixtures("images")
def test_an_image_that_does_not_become_ready_is_told_and_one_command_goes_back(new_daemon: NewDaemon) -> None:
    daemon = new_daemon().start()
    daemon.started("cpu")
    answer = order(daemon, "cpu", "upgrade", {"image": BROKEN})
    assert answer.status_code == 503, answer.text
    how = f"`ollama-manager rollback cpu` goes back from {BROKEN} to {IMAGE}"
    assert how in answer.json()["error"]["message"]
    body = daemon.instance("cpu")
    assert (body["phase"], body["image_override"]["image"]) == ("failed", BROKEN)
    assert how in body["reason"]["message"]
    body = done(order(daemon, "cpu", "rollback"))["instance"]
    assert (body["phase"], body["container"]["image"], body["image_override"]) == ("ready", IMAGE, None)


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(
    ("image", "status", "code"),
    [
        ("ollama-manager/other:1", 422, "invalid_request"),
        ("No Image", 422, "invalid_request"),
        (f"{REPOSITORY}:absent", 503, "image_missing"),
    ],
)
def test_a_refused_image_changes_nothing(new_daemon: NewDaemon, image: str, status: int, code: str) -> None:
    daemon = new_daemon().start()
    before = daemon.started("cpu")
    answer = order(daemon, "cpu", "upgrade", {"image": image})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    if code == "image_missing":
        assert f"`ollama-manager pull {image}`" in answer.json()["error"]["message"]
    body = daemon.instance("cpu")
    assert (body["container"], body["image_override"]) == (before["container"], None)
    assert stored(daemon.state_dir, "SELECT * FROM operator_state") == []
