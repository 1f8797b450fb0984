"""The JSON of the control API. Times are RFC 3339 in UTC, sizes bytes, durations seconds."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
)

from manager.domain.breaker import BreakerState  # noqa: TC001
from manager.domain.instance import (  # pydantic reads annotations at run time
    DeviceKind,  # noqa: TC001
    Driver,  # noqa: TC001
    Health,  # noqa: TC001
    Phase,  # noqa: TC001
    Target,  # noqa: TC001
)
from manager.domain.start_progress import StartStep  # noqa: TC001
from manager.domain.target import Protocol  # noqa: TC001
from manager.domain.template import IMAGE_PATTERN

if TYPE_CHECKING:
    from manager.domain.drained import Drained
    from manager.domain.gpu import Gpu, NamedCard
    from manager.domain.image_override import ImageInForce
    from manager.domain.instance import InstanceSpec
    from manager.domain.lifted import Lifted
    from manager.domain.registry import Event
    from manager.domain.start_progress import StartProgress
    from manager.services.instances.sweeps import Swept
    from manager.services.overview import InstanceState, Overview
    from manager.services.routing.breakers import BreakerView

_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:[Zz]|[+-]\d\d:\d\d)", re.ASCII)


@lru_cache(4096)  # most times of an instance stay as they are from one list to the next
def _rfc3339(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


Time = Annotated[datetime, PlainSerializer(_rfc3339, return_type=str, when_used="json")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DeviceCard(_Body):
    """One card of an instance; `uuid` is null for a slot in which no card was ever found.

    `host` is the name of the machine it is in, null for the daemon's own.
    """

    uuid: str | None
    index: int | None
    name: str | None
    host: str | None
    pci_bus_id: str | None
    vram_total_bytes: int | None
    vram_used_bytes: int | None
    vram_free_bytes: int | None


class Device(_Body):
    """The device of an instance. `kind` is null for an external server that did not declare it.

    `uuid`, `index` and `name` are those of its first card. The sizes are sums over `cards`, null where one of
    them is not known.
    """

    kind: DeviceKind | None
    uuid: str | None = None
    index: int | None = None
    name: str | None = None
    vram_total_bytes: int | None = None
    vram_used_bytes: int | None = None
    vram_free_bytes: int | None = None
    cards: list[DeviceCard] = Field(default_factory=list)


class ReasonBody(_Body):
    code: str
    message: str
    log_tail: list[str]


class ContainerBody(_Body):
    id: str
    name: str
    image: str
    template_hash: str | None


class ModelBody(_Body):
    name: str
    digest: str
    size_bytes: int
    vram_bytes: int
    expires_at: Time | None


class DrainedBody(_Body):
    """An order that keeps an instance out of service; `until` is null where only a resume ends it."""

    since: Time
    until: Time | None
    reason: str | None


class LiftedBody(_Body):
    """An order that the deny rules of an instance do not hold until then."""

    since: Time
    until: Time
    reason: str | None


class ImageOverrideBody(_Body):
    """An upgrade that is in force; `previous` is the image that a roll-back returns to."""

    image: str
    previous: str
    since: Time


class BreakerBody(_Body):
    """The breaker of an instance. `failures` are those in a row, `reason` is that of the last one.

    It is `half_open` from `retry_at` on, and stays so until a request has tried the instance.
    """

    state: BreakerState
    failures: int
    opened_at: Time | None
    retry_at: Time | None
    reason: str | None


class StartBody(_Body):
    """The step of a start that goes on: it waits for memory of a card, the container, or its server's answer.

    `until` is the moment at which the start is given up, null where nothing limits the step.
    """

    step: StartStep
    since: Time | None
    until: Time | None


class RulesBody(_Body):
    """The deny rules of an instance: patterns of models, and the largest number of parameters."""

    deny_models: list[str]
    max_parameters: int | None


class InstanceBody(_Body):
    """One instance. `ttl_remaining_s` is null while its clock does not run.

    `image` is that of its next container; `loading` are the models that are being loaded; `start` is null
    while no start goes on, and `rules` where there are none. `node` is the host name of the node of its
    service, null where it is no service of Docker Swarm, or has no node yet.
    """

    id: str
    driver: Driver
    protocol: Protocol
    template: str | None
    image: str | None
    device: Device
    node: str | None
    endpoint: str | None
    target: Target
    phase: Phase
    health: Health
    reason: ReasonBody | None
    start: StartBody | None
    in_flight: int
    pinned: bool
    ttl_s: float
    ttl_remaining_s: float | None
    started_at: Time | None
    ready_at: Time | None
    last_used_at: Time | None
    last_seen_at: Time | None
    starts: int
    container: ContainerBody | None
    image_override: ImageOverrideBody | None
    drained: DrainedBody | None
    lifted: LiftedBody | None
    rules: RulesBody | None
    models: list[ModelBody]
    loading: list[str]
    breaker: BreakerBody


class InstancesBody(_Body):
    """`rollout` is the stage, where not every request is managed."""

    instances: list[InstanceBody]
    count: int
    rollout: Literal["observe", "shadow", "lanes"] | None = None


class ChangeBody(_Body):
    """The instance after a start or stop; `changed` is false when nothing had to be done."""

    instance: InstanceBody
    changed: bool


class InstancePatch(_Body):
    """Overrides of one instance, kept across restarts; `ttl_s` 0 means never stopped for being idle.

    What is left out stays; null takes an override back, and the configured value is in force again.
    """

    ttl_s: float | None = Field(default=None, strict=True, ge=0, le=31_622_400, allow_inf_nan=False)
    pinned: bool | None = Field(default=None, strict=True)


def _timestamp(value: object) -> object:
    """Let through RFC 3339 only; a number could be seconds or milliseconds."""
    if not isinstance(value, str) or _RFC3339.fullmatch(value) is None:
        raise ValueError("expected a time as in RFC 3339, with its offset, such as 2026-08-01T18:00:00Z")
    return value


def _in_utc(time: datetime) -> datetime:
    try:
        return time.astimezone(UTC)
    except OverflowError:
        raise ValueError("expected a time that has a year of 1 to 9999 in UTC too") from None


GivenTime = Annotated[AwareDatetime, BeforeValidator(_timestamp), AfterValidator(_in_utc)]
GivenReason = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=500)]


class DrainRequest(_Body):
    """An order. Fields that are left out are null: a second order replaces reason, end and `stop`."""

    reason: GivenReason | None = None
    until: GivenTime | None = None
    stop: bool = Field(default=True, strict=True)


class LiftRequest(_Body):
    """The deny rules do not hold until then; an order that comes again replaces end and reason."""

    until: GivenTime
    reason: GivenReason | None = None


class EmptyRequest(_Body):
    """No fields: the body is left out, or an empty object."""


NOTHING = EmptyRequest()


class UpgradeRequest(_Body):
    image: str = Field(max_length=255, pattern=IMAGE_PATTERN)


class SweptBody(_Body):
    id: str
    action: Literal["stopped", "would_stop", "kept", "failed"]
    detail: str


class SweepBody(_Body):
    instances: list[SweptBody]
    count: int


class PullRequest(_Body):
    """The image to pull; left out, every image of the configured instances."""

    image: str | None = Field(default=None, max_length=512, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:@-]*$")


class ProcessBody(_Body):
    pid: int
    name: str | None
    used_bytes: int | None
    instance: str | None


class GpuBody(_Body):
    """One card. `reserved_bytes` were promised to instances and loads that do not hold them yet.

    `host` is the name of the machine it is in, null for the daemon's own; `index` is its number there.
    `pci_bus_id` is empty where it is not known. `memory_unknown` says why its memory is not known, null where
    it is known or no more can be said.
    """

    uuid: str
    host: str | None
    index: int
    pci_bus_id: str
    name: str
    vram_total_bytes: int | None
    vram_used_bytes: int | None
    vram_free_bytes: int | None
    reserved_bytes: int | None
    lost: str | None
    memory_unknown: str | None
    utilisation_percent: int | None
    temperature_c: int | None
    power_watts: float | None
    power_limit_watts: float | None
    processes: list[ProcessBody]


class GpuErrorBody(_Body):
    code: str
    message: str


class GpusBody(_Body):
    gpus: list[GpuBody]
    error: GpuErrorBody | None


class OrphanBody(_Body):
    """A container that carries this manager's label and belongs to no instance. `remedy` is a command."""

    id: str
    name: str
    image: str
    instance: str | None
    running: bool
    why: str
    remedy: str


class OrphansBody(_Body):
    orphans: list[OrphanBody]
    count: int


class EventBody(_Body):
    id: int
    at: Time
    instance: str | None
    kind: str
    reason: str | None
    detail: str


class HealthBody(_Body):
    status: Literal["ok"]


class ReadinessBody(_Body):
    """`rollout` is the stage, where not every request is managed.

    `shared_database` says why what other gateways change is not in force here, while that is so.
    """

    status: Literal["ready", "not_ready"]
    reasons: list[str]
    shared_database: str | None = None
    rollout: Literal["observe", "shadow", "lanes"] | None = None


class ErrorDetail(_Body):
    code: str
    message: str
    instance: str | None = None
    details: dict[str, object] | None = None


class ErrorBody(_Body):
    error: ErrorDetail


def instance_json(state: InstanceState) -> dict[str, object]:
    """The values of an `InstanceBody`.

    The list of all instances is what everyone polls, and building models would cost more than the rest of the
    request. A test holds this against the model.
    """
    view = state.view
    explanation = view.explanation
    container = view.container
    remaining_s = view.ttl_remaining_s
    return {
        "id": view.spec.id,
        "driver": view.spec.driver,
        "protocol": view.spec.protocol,
        "template": view.spec.template_name,
        "image": view.spec.template.image if view.spec.template else None,
        "device": _device(state),
        "node": state.node,
        "endpoint": view.endpoint,
        "target": view.target,
        "phase": view.phase,
        "health": view.health,
        "reason": {
            "code": explanation.code,
            "message": explanation.message,
            "log_tail": explanation.log_tail,
        }
        if explanation
        else None,
        "start": _start(view.start),
        "in_flight": view.in_flight,
        "pinned": view.pinned,
        "ttl_s": view.ttl_s,
        "ttl_remaining_s": None if remaining_s is None else round(remaining_s, 3),
        "started_at": time_json(view.started_at),
        "ready_at": time_json(view.ready_at),
        "last_used_at": time_json(view.last_used_at),
        "last_seen_at": time_json(view.last_seen_at),
        "starts": view.starts,
        "container": {
            "id": container.id,
            "name": container.name,
            "image": container.image,
            "template_hash": view.template_hash,
        }
        if container
        else None,
        "image_override": _image_override(view.image),
        "drained": _drained(view.drained),
        "lifted": _lifted(state.lifted),
        "rules": _rules(view.spec),
        "models": [
            {
                "name": model.name,
                "digest": model.digest,
                "size_bytes": model.size_bytes,
                "vram_bytes": model.vram_bytes,
                "expires_at": time_json(model.expires_at),
            }
            for model in view.models
        ],
        "loading": state.loading,
        "breaker": _breaker(state.breaker),
    }


def _start(start: StartProgress | None) -> dict[str, object] | None:
    if start is None:
        return None
    return {"step": start.step, "since": time_json(start.since), "until": time_json(start.until)}


def _rules(spec: InstanceSpec) -> dict[str, object] | None:
    if not spec.deny_models and spec.max_parameters is None:
        return None
    return {"deny_models": spec.deny_models, "max_parameters": spec.max_parameters}


def _breaker(breaker: BreakerView) -> dict[str, object]:
    return {
        "state": breaker.state,
        "failures": breaker.failures,
        "opened_at": time_json(breaker.opened_at),
        "retry_at": time_json(breaker.retry_at),
        "reason": breaker.reason,
    }


def _drained(drained: Drained | None) -> dict[str, object] | None:
    if drained is None:
        return None
    return {"since": time_json(drained.since), "until": time_json(drained.until), "reason": drained.reason}


def _lifted(lifted: Lifted | None) -> dict[str, object] | None:
    if lifted is None:
        return None
    return {"since": time_json(lifted.since), "until": time_json(lifted.until), "reason": lifted.reason}


def _image_override(chosen: ImageInForce | None) -> dict[str, object] | None:
    if chosen is None:
        return None
    return {"image": chosen.image, "previous": chosen.previous, "since": time_json(chosen.since)}


def _device(state: InstanceState) -> dict[str, object]:
    view = state.view
    cards = [_card(*one) for one in zip(view.cards, state.gpus, strict=True)]
    first = cards[0] if cards else _NO_CARD
    return {
        "kind": view.spec.device_kind,
        "uuid": first["uuid"],
        "index": first["index"],
        "name": first["name"],
        "vram_total_bytes": _sum(cards, "vram_total_bytes"),
        "vram_used_bytes": _sum(cards, "vram_used_bytes"),
        "vram_free_bytes": _sum(cards, "vram_free_bytes"),
        "cards": cards,
    }


_NO_CARD: dict[str, Any] = {"uuid": None, "index": None, "name": None}


def _card(named: NamedCard, gpu: Gpu | None) -> dict[str, Any]:
    if gpu is None:
        place = named.selector if named.uuid is None else None
        none = dict.fromkeys(
            ("index", "name", "host", "vram_total_bytes", "vram_used_bytes", "vram_free_bytes")
        )
        return {"uuid": named.uuid, "pci_bus_id": place, **none}
    return {
        "uuid": named.uuid,
        "index": gpu.index,
        "name": gpu.name,
        "host": gpu.host,
        "pci_bus_id": gpu.pci_bus_id,
        "vram_total_bytes": gpu.vram_total_bytes,
        "vram_used_bytes": gpu.vram_used_bytes,
        "vram_free_bytes": gpu.vram_free_bytes,
    }


def _sum(cards: list[dict[str, Any]], key: str) -> int | None:
    """Return the sum over all cards, None where there are none or one value is unknown."""
    known = [card[key] for card in cards if card[key] is not None]
    return sum(known) if known and len(known) == len(cards) else None


def time_json(time: datetime | None) -> str | None:
    """Return a time as `Time` writes it."""
    return None if time is None else _rfc3339(time)


def gpus_body(overview: Overview) -> GpusBody:
    trouble = overview.cards_trouble
    return GpusBody(
        gpus=[
            GpuBody(
                uuid=gpu.uuid,
                host=gpu.host,
                index=gpu.index,
                pci_bus_id=gpu.pci_bus_id,
                name=gpu.name,
                vram_total_bytes=gpu.vram_total_bytes,
                vram_used_bytes=gpu.vram_used_bytes,
                vram_free_bytes=gpu.vram_free_bytes,
                reserved_bytes=card.reserved_bytes,
                lost=gpu.lost,
                memory_unknown=gpu.why_unknown,
                utilisation_percent=gpu.utilisation_percent,
                temperature_c=gpu.temperature_c,
                power_watts=gpu.power_watts,
                power_limit_watts=gpu.power_limit_watts,
                processes=[
                    ProcessBody(
                        pid=holder.pid,
                        name=holder.name,
                        used_bytes=holder.used_bytes,
                        instance=holder.instance,
                    )
                    for holder in card.holders
                ],
            )
            for card in overview.cards
            for gpu in (card.gpu,)
        ],
        error=GpuErrorBody(code=trouble.code, message=trouble.message) if trouble else None,
    )


def event_json(event: Event) -> dict[str, object]:
    """The values of an `EventBody`."""
    return {
        "id": event.id,
        "at": time_json(event.at),
        "instance": event.instance,
        "kind": event.kind,
        "reason": event.reason,
        "detail": event.detail,
    }


def orphans_body(overview: Overview) -> OrphansBody:
    orphans = [
        OrphanBody(
            id=one.id,
            name=one.name,
            image=one.image,
            instance=one.instance,
            running=one.is_running,
            why=one.why,
            remedy=one.remedy,
        )
        for one in overview.orphans
    ]
    return OrphansBody(orphans=orphans, count=len(orphans))


def swept_body(swept: Swept) -> SweptBody:
    return SweptBody(id=swept.instance, action=swept.action, detail=swept.detail)
