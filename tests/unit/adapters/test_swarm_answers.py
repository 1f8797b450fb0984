"""What Docker Engine says of services, tasks and nodes, as engines of 20.10 and 28 say it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from manager.adapters import swarm_answers as answers
from manager.domain.swarm import TaskStage
from manager.errors import Reason

MADE = "2026-08-01T10:00:00.123456789Z"
ENTRY = {
    "ID": "s1",
    "Version": {"Index": 42},
    "Spec": {
        "Name": "m-ollama-cpu",
        "Labels": {"ollama-manager.manager": "m"},
        "TaskTemplate": {"ContainerSpec": {"Image": "ollama/ollama:1@sha256:" + "0" * 64}},
        "Mode": {"Replicated": {"Replicas": 1}},
    },
}
NODE: dict[str, Any] = {
    "ID": "n1",
    "Spec": {"Role": "worker", "Availability": "active", "Labels": {"rack": "a"}},
    "Description": {
        "Hostname": "gpu-box",
        "Engine": {"EngineVersion": "28.5.2", "Labels": {}},
        "Resources": {
            "NanoCPUs": 4_000_000_000,
            "GenericResources": [
                {"NamedResourceSpec": {"Kind": "NVIDIA-GPU", "Value": "GPU-1"}},
                {"NamedResourceSpec": {"Kind": "NVIDIA-GPU", "Value": "GPU-2"}},
                {"NamedResourceSpec": {"Kind": "FPGA", "Value": "f1"}},
                {"DiscreteResourceSpec": {"Kind": "NVIDIA-GPU", "Value": 3}},
                {"NamedResourceSpec": {"Kind": "NVIDIA-GPU"}},
            ],
        },
    },
    "Status": {"State": "ready", "Addr": "10.0.0.3"},
}


def task_entry(
    state: str, *, desired: str = "running", err: str = "", exit_code: int | None = None, **values: Any
) -> dict[str, Any]:
    status: dict[str, Any] = {"State": state, "Message": "started", "Timestamp": MADE}
    if err:
        status["Err"] = err
    if exit_code is not None:
        status["ContainerStatus"] = {"ContainerID": "c1", "PID": 0, "ExitCode": exit_code}
    entry = {"ID": "t1", "ServiceID": "s1", "NodeID": "n1", "CreatedAt": MADE, "DesiredState": desired}
    return entry | {"Status": status} | values


def node_entry(**values: Any) -> dict[str, Any]:
    return NODE | values


# --- services ---


def test_a_service_is_read_without_the_digest_that_was_added_to_its_image() -> None:
    read = answers.service(ENTRY)
    assert (read.id, read.name, read.version, read.replicas) == ("s1", "m-ollama-cpu", 42, 1)
    assert (read.image, read.labels) == ("ollama/ollama:1", {"ollama-manager.manager": "m"})


@pytest.mark.parametrize(
    "mode", [None, {}, {"Global": {}}, {"Replicated": {}}, {"Replicated": {"Replicas": 0}}]
)
def test_a_service_without_a_number_of_replicas_has_none(mode: object) -> None:
    read = answers.service({"ID": "s", "Version": {"Index": 1}, "Spec": {"Name": "x", "Mode": mode}})
    assert (read.replicas, read.labels, read.image) == (0, {}, "")


# --- tasks ---


def test_a_running_task_has_a_node_and_no_exit_code() -> None:
    read = answers.task(task_entry("running", exit_code=0))
    assert (read.id, read.service, read.node, read.stage) == ("t1", "s1", "n1", TaskStage.RUNNING)
    assert (read.wanted, read.error, read.exit_code, read.reason) == (True, "", None, None)
    assert read.created_at == datetime(2026, 8, 1, 10, 0, 0, 123456, UTC)


@pytest.mark.parametrize("desired", ["shutdown", "remove", "complete", "orphaned", ""])
def test_swarm_wants_no_task_that_is_to_end(desired: str) -> None:
    assert not answers.task(task_entry("running", desired=desired)).wanted


@pytest.mark.parametrize("desired", ["running", "ready", "accepted"])
def test_swarm_wants_a_task_that_is_to_run_now_or_soon(desired: str) -> None:
    assert answers.task(task_entry("pending", desired=desired)).wanted


def test_an_exit_code_is_told_as_a_number_and_not_in_words() -> None:
    read = answers.task(
        task_entry("failed", desired="shutdown", err="task: non-zero exit (137)", exit_code=137)
    )
    assert (read.stage, read.exit_code, read.error, read.reason) == (TaskStage.ENDED, 137, "", None)
    read = answers.task(task_entry("complete", desired="shutdown", exit_code=0))
    assert (read.exit_code, read.error) == (0, "")


@pytest.mark.parametrize(
    ("state", "err", "reason"),
    [
        ("rejected", "No such image: no-such/image:1", Reason.IMAGE_MISSING),
        (
            "failed",
            "starting container failed: driver failed programming: listen tcp4: bind: address already in use",
            Reason.PORT_TAKEN,
        ),
        (
            "failed",
            'starting container failed: failed to create shim task: runc create failed: exec: "/x": stat',
            Reason.START_FAILED,
        ),
        ("rejected", "assigned node no longer meets constraints", Reason.START_FAILED),
        ("failed", "No such container: a.1.t", Reason.START_FAILED),
    ],
)
def test_the_words_for_a_container_that_never_ran_have_a_reason_and_no_exit_code(
    state: str, err: str, reason: Reason
) -> None:
    read = answers.task(task_entry(state, desired="shutdown", err=err, exit_code=128))
    assert (read.stage, read.reason, read.exit_code) == (TaskStage.ENDED, reason, None)
    assert read.error.startswith(err)


def test_an_image_that_a_node_lacks_is_pulled_there_and_not_by_the_manager() -> None:
    read = answers.task(task_entry("rejected", desired="shutdown", err="No such image: no-such/image:1"))
    assert read.error == (
        "No such image: no-such/image:1: its node has no such image, and could not pull it; "
        "run `docker pull` there"
    )


def test_a_task_that_waits_says_why_and_has_no_node() -> None:
    err = "no suitable node (insufficient resources on 2 nodes)"
    entry = task_entry("pending", err=err)
    del entry["NodeID"]
    read = answers.task(entry)
    assert (read.stage, read.node, read.error, read.reason) == (TaskStage.WAITING, None, err, None)


@pytest.mark.parametrize("made", ["", None, "yesterday"])
def test_a_task_without_a_time_is_none(made: object) -> None:
    with pytest.raises(ValueError, match="is no time"):
        answers.task(task_entry("running", CreatedAt=made))


def test_a_task_of_no_known_state_counts_as_ended() -> None:
    entry = task_entry("running")
    del entry["Status"]
    assert answers.task(entry).stage is TaskStage.ENDED


# --- nodes ---


def test_a_node_has_the_cards_of_the_kind_that_is_asked_for() -> None:
    read = answers.node(NODE, "NVIDIA-GPU")
    assert (read.id, read.hostname, read.address, read.labels) == ("n1", "gpu-box", "10.0.0.3", {"rack": "a"})
    assert (read.is_up, read.is_active, read.is_manager) == (True, True, False)
    assert (read.cards, read.engine) == (("GPU-1", "GPU-2"), "28.5.2")
    assert answers.node(NODE, "FPGA").cards == ("f1",)


def test_a_node_without_resources_has_no_cards() -> None:
    descriptions: list[Any] = [{}, None, {"Hostname": "x"}, {"Resources": {}}]
    for description in descriptions:
        read = answers.node(node_entry(Description=description), "NVIDIA-GPU")
        assert (read.cards, read.engine) == ((), "")


@pytest.mark.parametrize(
    ("state", "is_up"), [("ready", True), ("unknown", True), ("down", False), ("disconnected", False)]
)
def test_a_node_that_a_new_manager_has_not_heard_of_yet_counts_as_up(state: str, is_up: bool) -> None:
    assert answers.node(node_entry(Status={"State": state}), "x").is_up is is_up


@pytest.mark.parametrize("availability", ["drain", "pause"])
def test_a_drained_or_paused_node_is_not_active(availability: str) -> None:
    assert not answers.node(node_entry(Spec={"Availability": availability}), "x").is_active


@pytest.mark.parametrize("addr", ["", "0.0.0.0", "127.0.0.1", "::", "::1", None])
def test_a_manager_without_an_address_as_a_node_has_that_of_its_managers_port(addr: object) -> None:
    entry = node_entry(Status={"State": "ready", "Addr": addr}, ManagerStatus={"Addr": "10.0.0.2:2377"})
    read = answers.node(entry, "x")
    assert (read.address, read.is_manager) == ("10.0.0.2", True)
    assert answers.node(node_entry(Status={"State": "ready", "Addr": addr}), "x").address == ""


def test_an_address_of_version_6_is_in_brackets_as_in_a_url() -> None:
    assert answers.node(node_entry(Status={"Addr": "fd00::3"}), "x").address == "[fd00::3]"
    entry = node_entry(Status={"Addr": "::"}, ManagerStatus={"Addr": "[fd00::2]:2377"})
    assert answers.node(entry, "x").address == "[fd00::2]"
