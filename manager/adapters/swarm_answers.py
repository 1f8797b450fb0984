"""Reads what Docker Engine says of services, tasks and nodes. No I/O in here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manager.adapters import docker_answers as answers
from manager.domain.swarm import Node, Service, Task, TaskStage, stage_of
from manager.errors import Reason
from manager.wire.ollama import read_time

if TYPE_CHECKING:
    from datetime import datetime

# The address of a node that is the manager which was asked, and of one whose agent has not said it yet.
_NO_ADDRESSES = ("", "0.0.0.0", "::", "127.0.0.1", "::1")  # noqa: S104
# The desired states of a task that is to run, now or in a moment.
_WANTED = ("running", "ready", "accepted", "assigned", "pending", "new")
# The engine's words for an exit code, which is told beside them.
_EXIT = "task: non-zero exit"
_NOT_PULLED = "its node has no such image, and could not pull it; run `docker pull` there"


def service(entry: dict[str, Any]) -> Service:
    spec = entry["Spec"]
    replicated = (spec.get("Mode") or {}).get("Replicated") or {}
    container = (spec.get("TaskTemplate") or {}).get("ContainerSpec") or {}
    return Service(
        id=str(entry["ID"]),
        name=str(spec.get("Name", "")),
        version=int(entry["Version"]["Index"]),
        # A registry's digest is added to the image of a service that was made by the command line.
        image=str(container.get("Image", "")).partition("@sha256:")[0],
        labels=dict(spec.get("Labels") or {}),
        replicas=int(replicated.get("Replicas") or 0),
    )


def task(entry: dict[str, Any]) -> Task:
    status = entry.get("Status") or {}
    stage = stage_of(str(status.get("State", "")))
    container = status.get("ContainerStatus") or {}
    error, reason = str(status.get("Err") or ""), None
    if error.startswith(_EXIT):
        error = ""
    elif error and stage is TaskStage.ENDED:
        refused = answers.refusal(None, error)
        reason = refused.reason
        # `ollama-manager pull` pulls nothing on another node.
        error = f"{error}: {_NOT_PULLED}" if reason is Reason.IMAGE_MISSING else refused.message
    return Task(
        id=str(entry["ID"]),
        service=str(entry["ServiceID"]),
        stage=stage,
        wanted=entry.get("DesiredState") in _WANTED,
        created_at=_time(entry["CreatedAt"]),
        node=str(entry.get("NodeID") or "") or None,
        error=error,
        exit_code=container.get("ExitCode") if stage is TaskStage.ENDED and reason is None else None,
        reason=reason,
    )


def node(entry: dict[str, Any], resource: str) -> Node:
    """Read a node; `resource` is the kind of generic resource that cards are advertised as."""
    spec, description = entry.get("Spec") or {}, entry.get("Description") or {}
    status, manager = entry.get("Status") or {}, entry.get("ManagerStatus") or {}
    address = str(status.get("Addr") or "")
    if address in _NO_ADDRESSES:
        address = str(manager.get("Addr") or "").rpartition(":")[0].strip("[]")
    resources = (description.get("Resources") or {}).get("GenericResources") or ()
    named = (one.get("NamedResourceSpec") or {} for one in resources)
    return Node(
        id=str(entry["ID"]),
        hostname=str(description.get("Hostname") or ""),
        address=f"[{address}]" if ":" in address else address,
        # `unknown` is what a manager says of others when it has just become one.
        is_up=status.get("State") not in ("down", "disconnected"),
        is_active=spec.get("Availability") == "active",
        is_manager=bool(manager),
        cards=tuple(str(one["Value"]) for one in named if one.get("Kind") == resource and one.get("Value")),
        labels=dict(spec.get("Labels") or {}),
        engine=str((description.get("Engine") or {}).get("EngineVersion") or ""),
    )


def _time(text: Any) -> datetime:
    time = read_time(text)
    if time is None:
        raise ValueError(f"{text!r} is no time")
    return time
