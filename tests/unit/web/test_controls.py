"""The controls of an instance in each state: those that take effect, and why the others do not."""

from __future__ import annotations

from typing import Any

import pytest

from manager.web.controls import TELLING, can_stop_now, main_controls, more_controls
from manager.web.texts import read_texts

ENGINE_AWAY = {"code": "engine_unavailable"}
DRAINED = {"since": "now"}
RULES = {"deny_models": ["*:70b"]}


def instance(phase: str = "ready", **values: Any) -> dict[str, Any]:
    usual = {
        "driver": "docker", "protocol": "ollama", "phase": phase, "reason": None, "drained": None,
        "lifted": None, "rules": None, "pinned": False, "image_override": None, "in_flight": 0,
        "breaker": {"state": "closed"}, "target": "running" if phase in ("starting", "ready") else "stopped",
    }  # fmt: skip
    return {**usual, **values}


@pytest.mark.parametrize(
    ("one", "start", "stop", "restart"),
    [
        (instance("stopped"), None, "stopped", "not_ready"),
        (instance("stopped", target="running"), "waits", None, "not_ready"),
        (instance("starting"), "runs", None, "not_ready"),
        (instance("ready"), "runs", None, None),
        (instance("draining"), "ends", "ends", "ends"),
        (instance("stopping"), "ends", "ends", "ends"),
        (instance("failed"), None, "stopped", "not_ready"),
        # A failed instance that should run is tried again: a stop ends that.
        (instance("failed", target="running"), None, None, "not_ready"),
        (instance("unavailable"), "unusable", "stopped", "not_ready"),
        (instance("unavailable", reason=ENGINE_AWAY), "engine", "stopped", "not_ready"),
        (instance("ready", reason=ENGINE_AWAY), "runs", "engine", "engine"),
        (instance("stopped", drained=DRAINED), "drained", "stopped", "not_ready"),
        (instance("ready", drained=DRAINED), "runs", None, "drained"),
    ],
)
def test_start_stop_and_restart(
    one: dict[str, Any], start: str | None, stop: str | None, restart: str | None
) -> None:
    found = main_controls(one)
    assert (found["start"], found["stop"], found["restart"]) == (start, stop, restart)
    last = "resume" if one["drained"] else "drain"
    assert list(found) == ["start", "stop", "restart", last]
    assert found[last] is None


@pytest.mark.parametrize("driver", ["external", "cloud"])
def test_a_server_of_another_program_is_only_taken_out_and_put_back(driver: str) -> None:
    assert main_controls(instance(driver=driver)) == {"drain": None}
    assert main_controls(instance(driver=driver, drained=DRAINED)) == {"resume": None}
    assert more_controls(instance(driver=driver), []) == {}
    assert not can_stop_now(instance("ready", driver=driver, in_flight=1))


@pytest.mark.parametrize(
    ("one", "why"),
    [
        (instance("ready"), None),
        (instance("stopped"), None),
        (instance("draining"), None),
        (instance("unavailable"), "unusable"),
        (instance("unavailable", reason=ENGINE_AWAY), "engine"),
        (instance("ready", drained=DRAINED), "drained_runs"),
        (instance("stopped", drained=DRAINED), None),
    ],
)
def test_another_image_is_refused_where_the_api_refuses_it(one: dict[str, Any], why: str | None) -> None:
    assert more_controls({**one, "image_override": {"image": "b"}}, [])["rollback"] == why
    assert more_controls(one, [])["image"] == why
    assert "rollback" not in more_controls(one, [])


@pytest.mark.parametrize(
    ("one", "why"),
    [
        (instance("ready"), None),
        (instance("stopped"), None),
        (instance("draining"), "ends"),
        (instance("unavailable"), "unusable"),
        (instance("unavailable", reason=ENGINE_AWAY), "engine"),
        (instance("stopped", drained=DRAINED), "drained"),
    ],
)
def test_a_load(one: dict[str, Any], why: str | None) -> None:
    assert more_controls(one, ["tiny"])["load"] == why
    assert "load" not in more_controls(one, [])
    assert "load" not in more_controls({**one, "protocol": "openai"}, ["tiny"])


def test_what_means_nothing_for_an_instance_is_left_out() -> None:
    assert list(more_controls(instance(), [])) == ["pin", "ttl", "image"]
    full = instance(pinned=True, rules=RULES, breaker={"state": "half_open"}, image_override={"image": "b"})
    assert list(more_controls(full, ["tiny"])) == [
        "reset",
        "load",
        "unpin",
        "ttl",
        "image",
        "rollback",
        "lift",
    ]
    lifted = instance(driver="external", rules=RULES, lifted={"until": "then"})
    assert list(more_controls(lifted, [])) == ["end_lift"]


@pytest.mark.parametrize(
    ("one", "can"),
    [
        (instance("ready"), False),
        (instance("ready", in_flight=1), True),
        (instance("ready", in_flight=1, reason=ENGINE_AWAY), False),
        (instance("draining"), True),
        (instance("stopping", in_flight=1), False),
    ],
)
def test_a_stop_at_once_is_for_what_waits(one: dict[str, Any], can: bool) -> None:
    assert can_stop_now(one) is can


def test_every_reason_has_a_text() -> None:
    texts = read_texts().instances
    whys = {*TELLING, "runs", "ends", "stopped", "not_ready"}
    assert all(texts.why.get(why, "") for why in whys)
    assert all(texts.steps.get(step, "") for step in ("memory", "container", "answer"))


def test_a_service_of_a_swarm_has_the_controls_of_a_container() -> None:
    service, container = instance(driver="swarm"), instance()
    assert main_controls(service) == main_controls(container)
    assert more_controls(service, []) == more_controls(container, [])
