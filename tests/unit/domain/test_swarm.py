"""From services, tasks and nodes of Docker Swarm to the facts of an instance."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from manager.domain.container import Reach
from manager.domain.swarm import (
    Node,
    Service,
    Task,
    TaskStage,
    held,
    home_of,
    instance_stem,
    live_nodes,
    newest,
    node_of,
    nodes_with,
    normal_constraint,
    one_node,
    service_facts,
    service_reach,
    stage_of,
    standing,
    volume_on_node,
    why_no_node,
)
from manager.errors import Reason

T0 = datetime(2026, 8, 1, tzinfo=UTC)
GPU_BOX = Node(
    "n1",
    "gpu-box",
    "10.0.0.3",
    is_up=True,
    is_active=True,
    is_manager=False,
    cards=("GPU-1", "GPU-2"),
    labels={},
)
DESK = Node("n2", "desk", "10.0.0.2", is_up=True, is_active=True, is_manager=True, cards=(), labels={})
NODES = {"n1": GPU_BOX, "n2": DESK}
DOWN = {"n1": replace(GPU_BOX, is_up=False), "n2": DESK}
SERVICE = Service("s1", "m-ollama-gpu0", 7, "ollama/ollama:1", {"a": "b"}, replicas=1)
PARKED = replace(SERVICE, replicas=0)


def task(stage: TaskStage = TaskStage.RUNNING, *, age_s: float = 0, **values: Any) -> Task:
    usual: dict[str, Any] = {"id": "t1", "service": "s1", "wanted": True, "node": "n1"}
    return Task(stage=stage, created_at=T0 - timedelta(seconds=age_s), **(usual | values))


# --- tasks ---


@pytest.mark.parametrize(
    ("states", "stage"),
    [
        (("new", "allocated", "pending"), TaskStage.WAITING),
        (("assigned", "accepted", "preparing", "ready", "starting"), TaskStage.COMING),
        (("running",), TaskStage.RUNNING),
        (("complete", "shutdown", "failed", "rejected", "remove", "orphaned"), TaskStage.ENDED),
    ],
)
def test_each_state_of_a_task_has_a_stage(states: tuple[str, ...], stage: TaskStage) -> None:
    assert {stage_of(state) for state in states} == {stage}


def test_a_state_of_a_newer_engine_counts_as_ended() -> None:
    assert stage_of("teleported") is TaskStage.ENDED


def test_a_task_that_should_run_stands_for_its_service_before_a_newer_one_that_should_not() -> None:
    running = task(age_s=60, id="runs")
    ended = task(TaskStage.ENDED, id="ended", wanted=False)
    assert newest([ended, running]) == running
    assert newest([ended, task(TaskStage.ENDED, id="old", age_s=5, wanted=False)]) == ended
    assert newest([]) is None


def test_the_task_with_the_work_stands_for_a_service_of_several_until_it_ends() -> None:
    oldest, second = task(age_s=60, id="oldest"), task(age_s=30, id="second", node="n2")
    waiting, ended = task(TaskStage.WAITING, id="waiting", node=None), task(TaskStage.ENDED, wanted=False)
    assert standing([waiting, second, ended, oldest]) == oldest
    assert standing([waiting, second, ended]) == second
    assert standing([waiting, ended]) == waiting
    assert standing([ended]) == ended
    assert standing([]) is None
    facts = service_facts(replace(SERVICE, replicas=3), [waiting, second, oldest], NODES)
    assert (facts.status, facts.node, facts.started_at) == ("running", "gpu-box", oldest.created_at)
    facts = service_facts(replace(SERVICE, replicas=3), [waiting, second, oldest], DOWN)
    assert (facts.status, facts.node) == ("running", "desk")


def test_a_task_that_runs_stands_for_its_service_before_another_replica_that_finds_no_node() -> None:
    running = task(age_s=60, id="runs")
    assert newest([task(TaskStage.WAITING, id="waits", node=None), running]) == running


def test_tasks_that_run_or_come_up_on_nodes_that_answer_hold_something() -> None:
    tasks = [
        task(TaskStage.WAITING, id="waits", node=None),
        task(TaskStage.COMING, id="comes"),
        task(id="runs"),
        task(TaskStage.ENDED, id="ended"),
        task(id="on a node that left", node="gone"),
    ]
    assert [one.id for one in held(tasks, NODES)] == ["comes", "runs"]
    assert held(tasks, DOWN) == []


# --- facts ---


def test_a_service_with_a_running_task_runs_on_its_node_since_the_task_was_made() -> None:
    facts = service_facts(SERVICE, [task()], NODES)
    assert (facts.id, facts.name, facts.image, facts.labels) == (
        *("s1", "m-ollama-gpu0", "ollama/ollama:1"),
        {"a": "b"},
    )
    assert (facts.status, facts.address, facts.node, facts.started_at) == (
        "running",
        "10.0.0.3",
        "gpu-box",
        T0,
    )
    assert (facts.exit_code, facts.error, facts.reason) == (None, "", None)


def test_a_service_whose_task_comes_up_runs_as_a_container_does_that_was_started() -> None:
    assert service_facts(SERVICE, [task(TaskStage.COMING)], NODES).status == "running"


def test_trouble_of_a_task_that_runs_is_none() -> None:
    odd = task(error="scheduling", reason=Reason.START_FAILED)
    facts = service_facts(SERVICE, [odd], NODES)
    assert (facts.status, facts.error, facts.reason) == ("running", "", None)


def test_a_node_without_an_address_gives_none() -> None:
    assert service_facts(SERVICE, [task()], {"n1": replace(GPU_BOX, address="")}).address is None


def test_a_task_that_ended_says_how() -> None:
    facts = service_facts(SERVICE, [task(TaskStage.ENDED, wanted=False, exit_code=137)], NODES)
    assert (facts.status, facts.exit_code, facts.error, facts.reason) == ("exited", 137, "", None)
    missing = task(TaskStage.ENDED, error="no such image", reason=Reason.IMAGE_MISSING)
    facts = service_facts(SERVICE, [missing], NODES)
    assert (facts.status, facts.error, facts.reason) == ("exited", "no such image", Reason.IMAGE_MISSING)


def test_a_service_that_should_run_without_a_task_has_ended_and_says_so() -> None:
    facts = service_facts(SERVICE, [], NODES)
    assert (facts.status, facts.error) == ("exited", "Swarm has no task of it that should run")
    assert (facts.node, facts.address, facts.started_at, facts.exit_code) == (None, None, None, None)


def test_a_task_that_waits_for_a_node_says_what_swarm_says() -> None:
    waits = task(TaskStage.WAITING, node=None, error="no suitable node")
    facts = service_facts(SERVICE, [waits], NODES)
    assert (facts.status, facts.error) == ("created", "Swarm finds no node for it (no suitable node)")
    assert (facts.reason, facts.node) == (Reason.INSTANCE_UNAVAILABLE, None)
    silent = service_facts(SERVICE, [replace(waits, error="")], NODES)
    assert silent.error == "Swarm has not chosen a node for it yet"
    told = service_facts(SERVICE, [replace(waits, reason=Reason.GPU_MISSING)], NODES)
    assert told.reason is Reason.GPU_MISSING


def test_a_running_task_on_a_node_that_is_down_or_has_left_counts_as_ended() -> None:
    facts = service_facts(SERVICE, [task(reason=Reason.START_FAILED)], DOWN)
    assert (facts.status, facts.error) == ("exited", "its node gpu-box is down")
    assert (facts.reason, facts.exit_code, facts.node) == (Reason.INSTANCE_UNAVAILABLE, None, "gpu-box")
    left = service_facts(SERVICE, [task()], {})
    assert (left.status, left.error, left.node) == ("exited", "its node is down", None)
    assert left.address is None


def test_a_task_that_swarm_is_ending_counts_as_ended() -> None:
    # A node that is back ends the tasks that were given up while it was down.
    facts = service_facts(SERVICE, [task(wanted=False)], NODES)
    assert (facts.status, facts.error, facts.exit_code) == ("exited", "Swarm ends its task", None)
    assert facts.reason is Reason.INSTANCE_UNAVAILABLE
    told = service_facts(SERVICE, [task(wanted=False, error="drained")], NODES)
    assert told.error == "drained"


def test_a_task_that_had_ended_before_its_node_went_down_says_how_it_ended() -> None:
    facts = service_facts(SERVICE, [task(TaskStage.ENDED, exit_code=1)], DOWN)
    assert (facts.status, facts.exit_code, facts.error) == ("exited", 1, "")


@pytest.mark.parametrize("exit_code", [None, -1, 0, 143])
def test_a_task_that_ended_in_order_on_a_drained_node_was_ended_by_the_drain(exit_code: int | None) -> None:
    drained = {"n1": replace(GPU_BOX, is_active=False)}
    ended = task(TaskStage.ENDED, wanted=False, exit_code=exit_code)
    facts = service_facts(SERVICE, [ended], drained)
    assert (facts.status, facts.error) == ("exited", "its node gpu-box is drained, or paused")
    assert facts.reason is Reason.INSTANCE_UNAVAILABLE
    assert service_facts(SERVICE, [ended], NODES).reason is None
    assert service_facts(SERVICE, [ended], {}).reason is None


def test_a_task_that_swarm_is_ending_does_not_count_as_running() -> None:
    ending = task(wanted=False)
    facts = service_facts(SERVICE, [ending], NODES)
    assert (facts.status, facts.error) == ("exited", "Swarm ends its task")
    assert (facts.reason, facts.exit_code) == (Reason.INSTANCE_UNAVAILABLE, None)
    assert service_facts(SERVICE, [replace(ending, error="not allowed")], NODES).error == "not allowed"
    drained = service_facts(SERVICE, [ending], {"n1": replace(GPU_BOX, is_active=False)})
    assert drained.error == "its node gpu-box is drained, or paused"
    moved = [ending, task(TaskStage.WAITING, id="next", node=None)]
    assert service_facts(SERVICE, moved, NODES).status == "created"


def test_a_task_with_a_trouble_of_its_own_says_that_on_a_drained_node_too() -> None:
    drained = {"n1": replace(GPU_BOX, is_active=False)}
    crashed = service_facts(SERVICE, [task(TaskStage.ENDED, wanted=False, exit_code=3)], drained)
    assert (crashed.exit_code, crashed.reason, crashed.error) == (3, None, "")
    missing = task(TaskStage.ENDED, error="no such image", reason=Reason.IMAGE_MISSING)
    assert service_facts(SERVICE, [missing], drained).reason is Reason.IMAGE_MISSING
    assert service_facts(SERVICE, [task()], drained).status == "running"
    assert service_facts(SERVICE, [], drained).reason is None


def test_a_service_without_replicas_is_parked_also_while_its_last_task_ends() -> None:
    facts = service_facts(PARKED, [task(TaskStage.ENDED, wanted=False, error="x", exit_code=1)], NODES)
    assert (facts.status, facts.error, facts.exit_code, facts.started_at) == ("parked", "", None, None)
    assert service_facts(PARKED, [], NODES).status == "parked"
    ending = service_facts(PARKED, [task(wanted=False)], NODES)
    assert (ending.status, ending.node) == ("parked", "gpu-box")
    assert service_facts(PARKED, [task(wanted=False)], DOWN).status == "parked"


# --- nodes ---


def test_a_node_is_called_by_its_host_name_and_without_one_by_its_id() -> None:
    assert (GPU_BOX.name, replace(GPU_BOX, hostname="").name) == ("gpu-box", "n1")


def test_the_nodes_with_cards_advertise_all_of_them() -> None:
    other = replace(DESK, cards=("GPU-2", "GPU-3"))
    assert nodes_with([GPU_BOX, other], ["GPU-2"]) == (GPU_BOX, other)
    assert nodes_with([GPU_BOX, other], ["GPU-1", "GPU-2"]) == (GPU_BOX,)
    assert nodes_with([GPU_BOX, other], ["GPU-1", "GPU-3"]) == ()


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("node.hostname==gpu-box", "node.hostname==gpu-box"),
        (" node.id == n1x ", "node.id==n1x"),
        ("node.role != manager", "node.role!=manager"),
        ("node.platform.arch==x86_64", "node.platform.arch==x86_64"),
        ("node.labels.com.example/rack==a:1", "node.labels.com.example/rack==a:1"),
        ("engine.labels.disk==ssd", "engine.labels.disk==ssd"),
    ],
)
def test_a_constraint_has_one_spelling(given: str, normal: str) -> None:
    assert normal_constraint(given) == normal


@pytest.mark.parametrize(
    "given",
    [
        *("", "node.hostname", "node.hostname=gpu-box", "node.hostname==", "node.name==gpu-box", "==gpu-box"),
        *("node.labels.==x", "node.platform==linux", "node.role>=worker", "node.id==-x", "node.id==a\nb"),
    ],
)
def test_what_swarm_does_not_know_is_no_constraint_and_the_refusal_says_what_is_one(given: str) -> None:
    with pytest.raises(ValueError, match=r"node\.hostname==gpu-box.*with == or !="):
        normal_constraint(given)


def test_a_constraint_on_the_id_or_the_host_name_allows_one_node() -> None:
    assert node_of(["node.role==worker", "node.hostname==gpu-box"]) == "gpu-box"
    assert node_of(["node.id==n1"]) == "n1"
    assert node_of(["node.hostname!=gpu-box", "node.labels.rack==a"]) is None
    assert node_of([]) is None


def test_a_volume_is_one_of_its_node_or_of_a_service_of_no_certain_node() -> None:
    assert volume_on_node("models", ["node.hostname==gpu-box"], "a") == "models@gpu-box"
    assert volume_on_node("models", ["node.role==worker"], "a") == "models@a"


def test_the_home_of_a_service_is_the_one_node_that_it_can_run_on() -> None:
    nodes = (GPU_BOX, DESK)
    assert home_of(["node.id==n1"], (), nodes) == "gpu-box"
    assert home_of(["node.hostname==desk"], (), nodes) == "desk"
    assert home_of(["node.hostname==gone"], (), nodes) == "gone"
    assert home_of(["node.role==worker"], ("GPU-2",), nodes) == "gpu-box"
    assert home_of([], ("GPU-9",), nodes) is None
    assert home_of(["node.role==worker"], (), nodes) is None


@pytest.mark.parametrize(
    ("hostname", "stem"),
    [
        ("gpu-box", "gpu-box"),
        ("GPU_Box.example.org", "gpu-box"),
        ("-edge-", "edge"),
        ("1u-server", "node-1u-server"),
        ("", "node"),
        ("...", "node"),
        ("\u7bb1", "node"),
        ("a-very-long-host-name", "a-very-long-host-n"),
        ("seventeen-letters-x", "seventeen-letters"),
    ],
)
def test_the_ids_of_a_nodes_instances_begin_with_its_host_name(hostname: str, stem: str) -> None:
    assert instance_stem(replace(GPU_BOX, hostname=hostname), is_only=True) == stem


def test_nodes_of_one_host_name_get_a_part_of_their_ids() -> None:
    second = replace(GPU_BOX, id="ABCDEFGHI")
    assert instance_stem(second, is_only=False) == "gpu-box-abcdef"
    assert one_node(second, is_only=False) == "node.id==ABCDEFGHI"


def test_the_only_node_of_a_host_name_is_meant_by_that_name() -> None:
    assert one_node(GPU_BOX, is_only=True) == f"node.hostname=={GPU_BOX.hostname}"
    assert one_node(replace(GPU_BOX, hostname=""), is_only=True) == f"node.id=={GPU_BOX.id}"


def test_a_host_that_has_joined_again_takes_the_place_of_its_former_node() -> None:
    former, again = replace(GPU_BOX, id="a", is_up=False), replace(GPU_BOX, id="b")
    other = replace(GPU_BOX, id="c", hostname="desk")
    assert live_nodes([other, again, former]) == [(again, True), (other, True)]
    assert live_nodes([former]) == [(former, True)], "it may come back"
    third = replace(GPU_BOX, id="d")
    assert live_nodes([third, again]) == [(again, False), (third, False)]


@pytest.mark.parametrize(
    ("node", "why"),
    [
        (GPU_BOX, None),
        (replace(GPU_BOX, is_up=False), "node gpu-box is down"),
        (replace(GPU_BOX, is_active=False), "node gpu-box is drained or paused: it takes no tasks"),
    ],
)
def test_a_service_of_one_node_cannot_run_where_that_node_takes_no_tasks(node: Node, why: str | None) -> None:
    for placement in ([f"node.id=={node.id}"], [f"node.hostname=={node.hostname}"]):
        assert why_no_node([node], placement) == why
    assert why_no_node([node], ["node.labels.disk==fast"]) is None, "several nodes may do"


def test_a_service_of_a_node_that_is_unknown_cannot_run() -> None:
    assert why_no_node([GPU_BOX], ["node.id==gone"]) == "the swarm has no node gone"


@pytest.mark.parametrize("hostname", ["a" * 63, "1" * 63, "1-" * 30])
def test_an_id_of_a_node_is_as_short_as_one_in_the_configuration(hostname: str) -> None:
    node = replace(GPU_BOX, hostname=hostname, id="zyxwvutsrq")
    longest = f"{instance_stem(node, is_only=False)}-gpu999"
    assert len(longest) <= 32
    assert "--" not in longest


# --- the way to services ---


@pytest.mark.parametrize(
    ("wanted", "is_on_network", "reach"),
    [
        ("network", False, Reach.NAME),
        ("host", True, Reach.HOST),
        ("auto", True, Reach.NAME),
        ("auto", False, Reach.HOST),
    ],
)
def test_services_are_reached_by_name_on_their_network_or_by_the_address_of_their_host(
    wanted: str, is_on_network: bool, reach: Reach
) -> None:
    assert service_reach(wanted, is_on_network=is_on_network) is reach
