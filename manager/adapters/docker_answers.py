"""Reads the answers of Docker Engine and of Podman's Docker-compatible API. No SDK and no I/O in here."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from manager.domain.container import LABEL_INSTANCE
from manager.domain.instance import ContainerFacts, ContainerStatus
from manager.errors import ContainerGoneError, EngineError, NetworkMissingError, Reason
from manager.services.ports import ContainerCounters, EngineEvent, EngineInfo, PullProgress
from manager.wire.ollama import read_time

if TYPE_CHECKING:
    from datetime import datetime

_NOT_FOUND = 404
_FRAME_HEAD_BYTES = 8
# Beside the two outputs: what the engine itself says of a log, for one of a service.
_SYSTEM_ERROR = 3

# The engine's words for a container's state -> what it means for us. `restarting` cannot last, because our
# containers have no restart policy; a state we do not know is treated as ended, which is looked into.
_STATUS: dict[str, ContainerStatus] = {
    "created": "created",
    "running": "running",
    "paused": "paused",
    "restarting": "exited",
    "removing": "exited",
    "exited": "exited",
    "dead": "exited",
}


def engine_info(info: dict[str, Any], podman: tuple[int, int] | None) -> EngineInfo:
    """Read `GET /info`; `podman` is what `podman_version` says."""
    security = " ".join(info.get("SecurityOptions") or ())
    return EngineInfo(
        version=str(info.get("ServerVersion", "")),
        desktop="Docker Desktop" in str(info.get("OperatingSystem", "")),
        rootless="name=rootless" in security,
        runtimes=tuple(info.get("Runtimes") or ()),
        podman=podman is not None,
        gives_cards=podman is None or podman_gives_cards(podman),
    )


def podman_version(version: dict[str, Any]) -> tuple[int, int] | None:
    """Return Podman's major and minor version out of `GET /version`, None for any other engine."""
    for component in version.get("Components") or ():
        if component.get("Name") == "Podman Engine":
            match = re.match(r"(\d+)\.(\d+)", str(component.get("Version")))
            return (int(match[1]), int(match[2])) if match else (0, 0)
    return None


def podman_gives_cards(version: tuple[int, int]) -> bool:
    """Whether its Docker-compatible API gives cards; an older one ignores that a card is asked for.

    Since 5.4, and by the Container Device Interface only: github.com/containers/podman/pull/25171.
    """
    return version >= (5, 4)


def listed(entry: dict[str, Any]) -> ContainerFacts:
    names = entry.get("Names") or ["/"]
    networks = (entry.get("NetworkSettings") or {}).get("Networks") or {}
    return ContainerFacts(
        id=entry["Id"],
        name=names[0].lstrip("/"),
        image=str(entry.get("Image", "")),
        status=_STATUS.get(str(entry.get("State", "")).lower(), "exited"),
        labels=dict(entry.get("Labels") or {}),
        address=_address(networks),
        exit_code=_exit_code(str(entry.get("Status", ""))),
    )


def inspected(entry: dict[str, Any]) -> ContainerFacts:
    state = entry.get("State") or {}
    config = entry.get("Config") or {}
    networks = (entry.get("NetworkSettings") or {}).get("Networks") or {}
    status = _STATUS.get(str(state.get("Status", "")).lower(), "exited")
    return ContainerFacts(
        id=entry["Id"],
        name=str(entry.get("Name", "")).lstrip("/"),
        image=str(config.get("Image", "")),
        status=status,
        labels=dict(config.get("Labels") or {}),
        address=_address(networks),
        exit_code=state.get("ExitCode") if status == "exited" else None,
        out_of_memory=bool(state.get("OOMKilled")),
        error=str(state.get("Error") or ""),
        pid=state.get("Pid") or None,
        started_at=_time(state.get("StartedAt")),
        networks=tuple(networks),
    )


def _address(networks: dict[str, Any]) -> str | None:
    return next((str(n["IPAddress"]) for n in networks.values() if n.get("IPAddress")), None)


_EXITED = re.compile(r"Exited \((\d+)\)")


def _exit_code(status: str) -> int | None:
    match = _EXITED.match(status)
    return int(match[1]) if match else None


def _time(text: Any) -> datetime | None:
    """The engine writes year 1 for "never"."""
    time = read_time(text)
    return time if time is not None and time.year > 1 else None


def counters(stats: dict[str, Any]) -> ContainerCounters:
    networks = (stats.get("networks") or {}).values()
    cpu_ns = ((stats.get("cpu_stats") or {}).get("cpu_usage") or {}).get("total_usage") or 0
    return ContainerCounters(
        network_bytes=sum(n.get("rx_bytes", 0) + n.get("tx_bytes", 0) for n in networks),
        cpu_s=cpu_ns / 1e9,
    )


# What Podman calls differently.
_PODMAN_ACTIONS = {"remove": "destroy"}


def event(entry: dict[str, Any]) -> EngineEvent | None:
    """None for one that is not about a container of an instance."""
    actor = entry.get("Actor") or {}
    attributes = actor.get("Attributes") or {}
    instance = attributes.get(LABEL_INSTANCE)
    if instance is None or entry.get("Type") != "container":
        return None
    exit_code = str(attributes.get("exitCode", ""))
    action = str(entry.get("Action", ""))
    return EngineEvent(
        action=_PODMAN_ACTIONS.get(action, action),
        container_id=str(actor.get("ID", "")),
        instance=instance,
        exit_code=int(exit_code) if exit_code.isdigit() else None,
    )


def pull_progress(image: str, entry: dict[str, Any]) -> PullProgress:
    """One line of a pull's progress.

    Raises:
        EngineError: the line says that the pull has failed.
    """
    if "error" in entry:
        raise not_pulled(image, str(entry["error"]))
    detail = entry.get("progressDetail") or {}
    return PullProgress(
        status=str(entry.get("status", "")),
        layer=entry.get("id"),
        current_bytes=detail.get("current"),
        total_bytes=detail.get("total"),
    )


def not_pulled(image: str, said: str) -> EngineError:
    """Whatever the engine said of a pull that failed, what is missing is the image."""
    remedy = "check its name and whether the engine can reach the registry"
    what = "could not be pulled" if image in said else f"{image} could not be pulled"
    return EngineError(f"{what}: {said}; {remedy}", reason=Reason.IMAGE_MISSING)


# Words of a refusal, in the order in which they are looked for -> the reason and the remedy. The wording was
# read in moby, in the NVIDIA container toolkit and in Podman's answers (4.3, 5.8); none has an error code.
_REFUSALS: tuple[tuple[str, Reason, str], ...] = (
    ("no such image", Reason.IMAGE_MISSING, "pull it with `ollama-manager pull`"),
    ("manifest unknown", Reason.IMAGE_MISSING, "check the image's name and tag"),
    ("pull access denied", Reason.IMAGE_MISSING, "check the image's name and tag"),
    ("is already in use by", Reason.NAME_CONFLICT, "remove or rename that container"),
    ("port is already allocated", Reason.PORT_TAKEN, "another container holds the port"),
    ("address already in use", Reason.PORT_TAKEN, "another program holds the port"),
    ("ports are not available", Reason.PORT_TAKEN, "another program holds the port"),
    ("could not select device driver", Reason.GPU_MISSING, "install the NVIDIA container toolkit"),
    ("unknown device", Reason.GPU_MISSING, "the card is not there; check `nvidia-smi -L`"),
    ("nvidia-container-cli", Reason.GPU_MISSING, "check the NVIDIA driver with `nvidia-smi`"),
    ("unresolvable cdi devices", Reason.GPU_MISSING, "check the CDI specification of the NVIDIA driver"),
    ("no space left on device", Reason.START_FAILED, "free some disk space for the engine"),
)


def demultiplexed(raw: bytes) -> bytes:
    """Both outputs of a container without a terminal, out of the frames that they come in.

    A frame begins with eight bytes: which output, three zeros and the length (Docker's API, attach).
    """
    text = bytearray()
    at = 0
    while at + _FRAME_HEAD_BYTES <= len(raw):
        if raw[at] > _SYSTEM_ERROR or raw[at + 1 : at + 4] != b"\0\0\0":
            return bytes(text) + raw[at:]  # one with a terminal writes as it comes
        begin = at + _FRAME_HEAD_BYTES
        end = begin + int.from_bytes(raw[at + 4 : begin], "big")
        if raw[at] != _SYSTEM_ERROR:
            text += raw[begin:end]
        at = end
    return bytes(text)


def said(body: bytes) -> str:
    """The message of a refusal, which is in JSON where an engine wrote it."""
    try:
        told: Any = json.loads(body)
    except ValueError:
        told = None
    message = told.get("message") if isinstance(told, dict) else None
    return message if isinstance(message, str) else body.decode("utf-8", "replace")


def names_no_container(said: str) -> bool:
    """Whether a 404 is about the container; older engines say "no such container:path" of a missing file."""
    lowered = said.lower()
    return "no such container" in lowered and "no such container:path" not in lowered


def refusal(status: int | None, said: str) -> EngineError:
    """The error for a call that the engine refused with that HTTP status and in those words."""
    said = said.strip() or "the engine refused without a word"
    lowered = said.lower()
    for words, reason, remedy in _REFUSALS:
        if words in lowered:
            return EngineError(f"{said}: {remedy}", reason=reason)
    if status == _NOT_FOUND and "no such container" in lowered:
        return ContainerGoneError(said)
    # Docker refuses a start with 404, Podman a create with 500.
    if "unable to find network" in lowered or (status == _NOT_FOUND and "network" in lowered):
        return NetworkMissingError(said)
    return EngineError(said, reason=Reason.START_FAILED)


def is_not_running(error: EngineError) -> bool:
    """Whether a signal was refused because the container has ended or never ran."""
    return "is not running" in error.message or "can only kill running containers" in error.message


def is_being_removed(error: EngineError) -> bool:
    """Whether a removal was refused because another one is under way."""
    return "is already in progress" in error.message


def exists_already(error: EngineError) -> bool:
    """Whether a network was not created because there is one of that name."""
    return "already exists" in error.message
