"""Docker Swarm: from services, tasks and nodes to the facts that an instance with a container has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from manager.domain.container import Reach
from manager.domain.instance import ContainerFacts
from manager.errors import Reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime


class TaskStage(Enum):
    """The state of a task, as far as it matters here."""

    WAITING = "no node was chosen yet"
    COMING = "a node prepares and starts it"
    RUNNING = "its container runs"
    ENDED = "its container has ended, or never ran"


# Source: docs.docker.com/engine/swarm/how-swarm-mode-works/swarm-task-states. A state of a newer engine
# counts as ended: that leads to an inspection and, for a service that should run, to a new start.
_STAGES: Final = {
    "new": TaskStage.WAITING,
    "allocated": TaskStage.WAITING,
    "pending": TaskStage.WAITING,
    "assigned": TaskStage.COMING,
    "accepted": TaskStage.COMING,
    "preparing": TaskStage.COMING,
    "ready": TaskStage.COMING,
    "starting": TaskStage.COMING,
    "running": TaskStage.RUNNING,
    "complete": TaskStage.ENDED,
    "shutdown": TaskStage.ENDED,
    "failed": TaskStage.ENDED,
    "rejected": TaskStage.ENDED,
    "remove": TaskStage.ENDED,
    "orphaned": TaskStage.ENDED,
}
# The exit codes of a container that is told to end: not known yet, 0, and SIGTERM.
_IN_ORDER: Final = (None, -1, 0, 143)
_HELD: Final = (TaskStage.COMING, TaskStage.RUNNING)


def stage_of(state: str) -> TaskStage:
    """Return the stage of a task by the engine's word for its state."""
    return _STAGES.get(state, TaskStage.ENDED)


@dataclass(frozen=True, slots=True)
class Task:
    """One task of a service: one run of its container on one node.

    Attributes:
        wanted: Swarm wants it to run; otherwise it is being shut down, or has ended.
        node: the id of its node, None before one was chosen.
        error: the engine's words for what is wrong; empty where nothing is.
        reason: the entry of the list of reasons that `error` stands for, None where there is none.
    """

    id: str
    service: str
    stage: TaskStage
    wanted: bool
    created_at: datetime
    node: str | None = None
    error: str = ""
    exit_code: int | None = None
    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """One host of a swarm.

    Attributes:
        id: given by Swarm.
        hostname: of the engine's host; not necessarily unique.
        address: at which other nodes reach it; empty where Swarm does not tell.
        is_up: its engine answers the managers.
        is_active: Swarm gives it tasks: it is neither drained nor paused.
        is_manager: it is a manager node.
        cards: the UUIDs of the cards that it advertises.
        labels: the operator's.
        engine: the version of its engine; empty where Swarm does not tell.
    """

    id: str
    hostname: str
    address: str
    is_up: bool
    is_active: bool
    is_manager: bool
    cards: tuple[str, ...]
    labels: Mapping[str, str]
    engine: str = ""

    @property
    def name(self) -> str:
        """Return its host name, or its id where it has none."""
        return self.hostname or self.id


@dataclass(frozen=True, slots=True)
class Service:
    """One service. `version` is that of Swarm, for updates; `replicas` is how many tasks it should have."""

    id: str
    name: str
    version: int
    image: str
    labels: dict[str, str]
    replicas: int


def newest(tasks: Iterable[Task]) -> Task | None:
    """Return the task that stands for a service: of those that should run, one that does; else the newest.

    Somebody may have scaled the service to more than one replica, and the others find no place.
    """
    return max(
        tasks,
        key=lambda task: (task.wanted, task.stage is TaskStage.RUNNING, task.created_at),
        default=None,
    )


# How far a task has come; one that has ended stands for nothing.
_PROGRESS: Final = (TaskStage.ENDED, TaskStage.WAITING, TaskStage.COMING, TaskStage.RUNNING)


def standing(tasks: Iterable[Task]) -> Task | None:
    """Return the task that stands for a service, of which an operator may have made several.

    It is the one that has come furthest of those that should run, and the oldest of these: it has the work,
    and no other one takes its place before it ends. Where none should run it is the newest.
    """
    tasks = tuple(tasks)
    wanted = [task for task in tasks if task.wanted]
    if not wanted:
        return newest(tasks)
    return min(wanted, key=lambda task: (-_PROGRESS.index(task.stage), task.created_at))


def held(tasks: Iterable[Task], nodes: Mapping[str, Node]) -> list[Task]:
    """Return the tasks that hold something on a node that answers: their containers run, or come up."""
    return [task for task in tasks if task.stage in _HELD and not _is_lost(task, nodes)]


def service_facts(service: Service, tasks: Sequence[Task], nodes: Mapping[str, Node]) -> ContainerFacts:
    """Return the facts of a service, as if it were one container.

    A task on a node that is down counts as ended: nobody reaches its server, and Swarm shuts it down when the
    node is back. So does one that Swarm is ending. The start of a run is the creation of its task: a service
    that was moved or restarted is another run.

    Args:
        service: the service.
        tasks: all its tasks, or those that should run, in any order.
        nodes: all nodes of the swarm, by id.
    """
    holding = held(tasks, nodes)
    if service.replicas == 0:
        # Also while its last container still ends: it is no server to take over, nor to send requests to.
        task = newest(holding)
        status = "parked"
    else:
        task = standing(one for one in holding if one.wanted) or standing(tasks)
        if task is None:
            status = "exited"
        elif task in holding and task.wanted:
            status = "running"
        else:
            status = "created" if task.stage is TaskStage.WAITING else "exited"
    node = None if task is None or task.node is None else nodes.get(task.node)
    lost = task is not None and _is_lost(task, nodes)
    error = "" if task is None else task.error
    reason = None if task is None or status == "running" else task.reason
    if task is None and status == "exited":
        error = "Swarm has no task of it that should run"
    elif status == "created":
        error = f"Swarm finds no node for it ({error})" if error else "Swarm has not chosen a node for it yet"
        reason = reason or Reason.INSTANCE_UNAVAILABLE
    elif lost:
        error = f"its node {'' if node is None else node.name} is down".replace("  ", " ")
        reason = Reason.INSTANCE_UNAVAILABLE
    elif status == "exited" and node is not None and not node.is_active and _ended_in_order(task):
        error = f"its node {node.name} is drained, or paused"
        reason = Reason.INSTANCE_UNAVAILABLE
    elif status == "exited" and task in holding:
        error, reason = error or "Swarm ends its task", Reason.INSTANCE_UNAVAILABLE
    return ContainerFacts(
        id=service.id,
        name=service.name,
        image=service.image,
        status=status,  # type: ignore[arg-type]  # one of the words above
        labels=service.labels,
        address=(node.address or None) if node is not None else None,
        exit_code=task.exit_code if task is not None and status == "exited" else None,
        error="" if status in ("running", "parked") else error,
        started_at=None if task is None else task.created_at,
        reason=reason,
        node=None if node is None else node.name,
    )


def _ended_in_order(task: Task | None) -> bool:
    """Return whether a task ended without a trouble of its own: Swarm, or somebody else, ended it."""
    return task is not None and task.reason is None and task.exit_code in _IN_ORDER


def _is_lost(task: Task, nodes: Mapping[str, Node]) -> bool:
    """Return whether the node of a task is down, or has left the swarm."""
    if task.node is None or task.stage is TaskStage.ENDED:
        return False
    node = nodes.get(task.node)
    return node is None or not node.is_up


# Docker's own notation: `docker service create --constraint`. Values are those of labels, names and ids.
_CONSTRAINT = re.compile(
    r"(?P<key>node\.(?:id|hostname|role|platform\.(?:os|arch)|labels\.[A-Za-z0-9._/-]+)|engine\.labels\.[A-Za-z0-9._/-]+)"
    r"\s*(?P<operator>==|!=)\s*(?P<value>[A-Za-z0-9][A-Za-z0-9._/:@-]*)"
)
_ONE_NODE = ("node.id", "node.hostname")


def normal_constraint(text: str) -> str:
    """Return a constraint in one spelling.

    Raises:
        ValueError: it is none that Docker Swarm knows.
    """
    match = _CONSTRAINT.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            "expected a constraint such as node.hostname==gpu-box, node.id==…, node.role==worker or "
            "node.labels.NAME==VALUE, with == or !="
        )
    return f"{match['key']}{match['operator']}{match['value']}"


def node_of(placement: Iterable[str]) -> str | None:
    """Return the id or host name of the one node that constraints allow; None for several."""
    for constraint in placement:
        key, operator, value = constraint.partition("==")
        if operator and key in _ONE_NODE:
            return value
    return None


def volume_on_node(name: str, placement: Iterable[str], instance_id: str) -> str:
    """Return the key of a volume of a service: each node has a volume of that name of its own.

    A service of no certain node shares its volume with no other, as far as anybody can tell.
    """
    return f"{name}@{node_of(placement) or instance_id}"


def nodes_with(nodes: Iterable[Node], uuids: Iterable[str]) -> tuple[Node, ...]:
    """Return the nodes that advertise all of these cards."""
    wanted = set(uuids)
    return tuple(node for node in nodes if wanted <= set(node.cards))


def home_of(placement: Iterable[str], cards: Iterable[str], nodes: Iterable[Node]) -> str | None:
    """Return the name of the one node that a service can run on; None where Swarm chooses among several.

    Args:
        placement: its constraints.
        cards: the UUIDs of its cards.
        nodes: those of the swarm.
    """
    known, wanted, uuids = tuple(nodes), node_of(placement), tuple(cards)
    if wanted is not None:
        return next((node.name for node in known if wanted in (node.id, node.hostname)), wanted)
    found = nodes_with(known, uuids) if uuids else ()
    return found[0].name if found else None


# A character that no id of an instance may have.
_NOT_IN_AN_ID = re.compile(r"[^a-z0-9]+")
# With six characters of a node's id and the number of a card, an id has at most 32.
_LONGEST_STEM = 18


def instance_stem(node: Node, *, is_only: bool) -> str:
    """Return the beginning of the ids of a node's instances: its host name, as far as an id may have it.

    Args:
        node: the node.
        is_only: no other node of that host name is up; otherwise a part of the node's id follows.
    """
    stem = _NOT_IN_AN_ID.sub("-", node.hostname.partition(".")[0].lower()).strip("-")
    if not stem or not stem[0].isalpha():
        stem = f"node-{stem}"
    stem = stem[:_LONGEST_STEM].strip("-")
    return stem if is_only else f"{stem}-{node.id[:6].lower()}"


def one_node(node: Node, *, is_only: bool) -> str:
    """Return the constraint that only this node meets.

    A host that leaves the swarm and joins again is another node of the same name: by its name it has the same
    instances again.
    """
    return f"node.hostname=={node.hostname}" if is_only and node.hostname else f"node.id=={node.id}"


def live_nodes(nodes: Iterable[Node]) -> list[tuple[Node, bool]]:
    """Return the nodes that give instances, and whether each is the only one of its host name.

    A node that is down gives way to one of its name that is up: the host has joined again.
    """
    by_name: dict[str, list[Node]] = {}
    for node in sorted(nodes, key=lambda one: one.id):
        by_name.setdefault(node.name, []).append(node)
    found: list[tuple[Node, bool]] = []
    for same in by_name.values():
        live = [node for node in same if node.is_up] or same[-1:]
        found += ((node, len(live) == 1) for node in live)
    return found


def why_no_node(nodes: Iterable[Node], placement: Iterable[str]) -> str | None:
    """Return why no node can take a service that is bound to one node; None where one can, or may.

    Args:
        nodes: all nodes of the swarm.
        placement: the constraints of the service.
    """
    wanted = node_of(placement)
    if wanted is None:
        return None
    same = [node for node in nodes if wanted in (node.id, node.hostname)]
    if any(node.is_up and node.is_active for node in same):
        return None
    if not same:
        return f"the swarm has no node {wanted}"
    if any(node.is_up for node in same):
        return f"node {same[0].name} is drained or paused: it takes no tasks"
    return f"node {same[0].name} is down"


def service_reach(wanted: str, *, is_on_network: bool) -> Reach:
    """Return the way to services.

    Args:
        wanted: the setting `swarm.reach`: `auto`, `network` or `host`.
        is_on_network: the daemon runs in a container on the network of the services.
    """
    if wanted == "network" or (wanted == "auto" and is_on_network):
        return Reach.NAME
    return Reach.HOST
