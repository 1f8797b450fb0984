"""Whatever is done to instances, in whatever order and by whomever: they come to rest and say what is so."""

from __future__ import annotations

import fcntl
import secrets
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import requests
from docker.errors import APIError, NotFound
from hypothesis import HealthCheck, settings
from hypothesis import Phase as HypothesisPhase
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tests.support.inside import own_containers, write_configuration
from tests.support.leasing import LeasingDaemon

if TYPE_CHECKING:
    import docker

    from tests.support.engine import Engine

INSTANCES = {
    "loose": {"template": "sim", "ttl_s": 0},
    "kept": {"template": "sim", "ttl_s": 0, "pinned": True},
}
INSTANCE = st.sampled_from(sorted(INSTANCES))
RESTS_WITHIN_S = 60.0


class Expected:
    """What an instance should come to.

    Attributes:
        state: `running`; `down`, stopped or ended with nobody wanting it; `crashed`, ended while it should
            run, so that it is started again after a pause.
    """

    def __init__(self) -> None:
        self.state = "down"
        self.paused = False
        self.leases = 0


class Lifecycle(RuleBasedStateMachine):
    engine: ClassVar[Engine]

    def __init__(self) -> None:
        super().__init__()
        self.manager_id = f"s{secrets.token_hex(4)}"
        self.folder = tempfile.TemporaryDirectory(prefix="stateful-")
        self.home = Path(self.folder.name)
        self.client: docker.DockerClient = self.engine.client()
        self.expected = {instance: Expected() for instance in INSTANCES}
        self.daemon = LeasingDaemon(
            write_configuration(
                self.home,
                self.manager_id,
                self.engine.url,
                instances=INSTANCES,
                templates={},
                lifecycle={"drain_timeout_s": 0.3, "stop_timeout_s": 2, "probe_interval_s": 1},
            )
        )

    @initialize()
    def begin(self) -> None:
        self.daemon.start()

    # --- through the daemon ---

    @rule(instance=INSTANCE)
    def start(self, instance: str) -> None:
        answer = self.daemon.call("POST", f"instances/{instance}/start")
        assert answer.status_code == 200, answer.text
        self.expected[instance].state = "running"

    @rule(instance=INSTANCE, force=st.booleans())
    def stop(self, instance: str, force: bool) -> None:
        answer = self.daemon.call("POST", f"instances/{instance}/stop", force=str(force).lower())
        assert answer.status_code == 200, answer.text
        self.expected[instance].state = "down"
        self.expected[instance].paused = False

    @rule(instance=INSTANCE, actions=st.lists(st.sampled_from(["start", "stop"]), min_size=2, max_size=4))
    def ask_without_waiting(self, instance: str, actions: list[str]) -> None:
        if self.expected[instance].paused:
            return
        for action in actions:
            answer = self.daemon.call("POST", f"instances/{instance}/{action}", wait="false")
            assert answer.status_code == 202, answer.text
        self.expected[instance].state = "running" if actions[-1] == "start" else "down"

    @rule(instance=INSTANCE)
    def lease(self, instance: str) -> None:
        expected = self.expected[instance]
        answer = self.daemon.call("POST", f"/lease/{instance}")
        if answer.status_code == 503 and expected.state != "running":
            assert "left alone" in answer.json()["error"]["message"]
            return
        assert answer.status_code == 200, answer.text
        expected.state = "running"
        expected.leases += 1
        if not expected.paused:
            assert answers(answer.json()["endpoint"])

    # No rule has a precondition: what is drawn must not depend on how fast the engine was.
    @rule(instance=INSTANCE)
    def release(self, instance: str) -> None:
        if self.expected[instance].leases:
            assert self.daemon.call("DELETE", f"/lease/{instance}").status_code == 200
            self.expected[instance].leases -= 1

    @rule()
    def kill_the_daemon_and_start_it_again(self) -> None:
        self.daemon.kill()
        self.daemon.start()
        for expected in self.expected.values():
            expected.leases = 0

    # --- behind its back ---

    @rule(instance=INSTANCE, how=st.sampled_from(["kill", "stop", "remove"]))
    def end_behind_its_back(self, instance: str, how: str) -> None:
        expected = self.expected[instance]
        container = self.running_container(instance)
        if expected.state != "running" or container is None:
            return
        if how == "remove" or expected.paused:
            container.remove(force=True)
        elif how == "kill":
            container.kill()
        else:
            container.stop(timeout=1)
        expected.state = "crashed" if "pinned" in INSTANCES[instance] else "down"
        expected.paused = False

    @rule()
    def start_behind_its_back(self) -> None:
        # The pinned one is started again by itself, which is a race that anyone may win.
        for container in own_containers(self.client, self.manager_id, "loose"):
            with suppress(APIError):  # it may be being removed
                container.start()
                self.expected["loose"].state = "running"

    @rule(instance=INSTANCE)
    def pause_or_unpause(self, instance: str) -> None:
        expected = self.expected[instance]
        container = self.running_container(instance)
        if expected.state != "running" or container is None:
            return
        if expected.paused:
            container.unpause()
        else:
            container.pause()
        expected.paused = not expected.paused

    # --- what always holds ---

    @invariant()
    def everything_comes_to_rest_as_expected(self) -> None:
        deadline = time.monotonic() + RESTS_WITHIN_S
        while (wrong := self.differences()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not wrong, "\n".join([*wrong, self.daemon.log()[-6000:]])

    def differences(self) -> list[str]:
        wrong = []
        for instance, expected in self.expected.items():
            body = self.daemon.instance(instance)
            containers = own_containers(self.client, self.manager_id, instance)
            assert len(containers) <= 1, containers
            wrong += [f"{instance}: {what}: {body}" for what in self._compare(expected, body, containers)]
        return wrong

    def _compare(self, expected: Expected, body: dict[str, Any], containers: list[Any]) -> list[str]:
        alive = [one for one in containers if one.status in ("running", "paused")]
        wrong = [] if body["in_flight"] == expected.leases else [f"{expected.leases} leases"]
        if expected.state == "running":
            if body["phase"] != "ready" or body["target"] != "running" or not alive:
                wrong.append("it should run")
            elif body["container"]["id"] != alive[0].id:
                wrong.append("another container is shown")
            elif (body["health"] == "unhealthy") != expected.paused or body["health"] == "unknown":
                wrong.append("its health is another")
            elif not expected.paused and not answers(body["endpoint"]):
                wrong.append("its endpoint does not answer")
        elif expected.state == "crashed":
            if body["target"] != "running" or body["phase"] not in ("failed", "starting", "ready"):
                wrong.append("it should be started again")
            elif body["phase"] == "ready":
                expected.state = "running"
        elif body["phase"] not in ("stopped", "failed") or body["target"] != "stopped" or alive:
            wrong.append("it should not run")
        return wrong

    def running_container(self, instance: str) -> Any:
        """The container, None when there is none that is alive."""
        with suppress(NotFound):
            container = self.client.containers.get(f"{self.manager_id}-ollama-{instance}")
            return container if container.status in ("running", "paused") else None
        return None

    # --- the end ---

    def teardown(self) -> None:
        try:
            for instance, expected in self.expected.items():
                for _ in range(expected.leases):
                    self.daemon.call("DELETE", f"/lease/{instance}")
                self.daemon.call("POST", f"instances/{instance}/stop", force="true")
                assert self.daemon.instance(instance)["in_flight"] == 0
            assert own_containers(self.client, self.manager_id) == []
            locks = list((self.home / "state" / "locks").glob("*.lock"))
            assert all(is_free(lock) for lock in locks)
        finally:
            self.daemon.kill()
            for container in own_containers(self.client, self.manager_id):
                container.remove(force=True)
            self.client.close()
            self.folder.cleanup()


def answers(endpoint: str) -> bool:
    try:
        return requests.get(f"{endpoint}/api/version", timeout=5).status_code == 200
    except requests.RequestException:
        return False


def is_free(lock: Path) -> bool:
    with closing(lock.open()) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_whatever_happens_every_instance_comes_to_rest_and_its_status_is_the_truth(engine: Engine) -> None:
    class OnThisEngine(Lifecycle):
        pass

    OnThisEngine.engine = engine
    run_state_machine_as_test(
        OnThisEngine,
        settings=settings(
            max_examples=5,
            stateful_step_count=12,
            deadline=None,
            derandomize=True,
            database=None,
            # Each step takes its time on a real engine: what fails is reported as it is, not made smaller.
            phases=[HypothesisPhase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
