"""The rows the registry keeps: what must survive a restart, and nothing that can be asked for again."""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003  (field types, resolved at run time by the adapter)
from dataclasses import dataclass, field
from datetime import datetime  # noqa: TC003
from enum import StrEnum
from typing import TypedDict

from manager.domain.idle import UsageSample  # noqa: TC001
from manager.domain.instance import Target


class Operation(StrEnum):
    """The operation when the row was written: a daemon that died meanwhile leaves it behind."""

    START = "start"
    STOP = "stop"


class OrderKind(StrEnum):
    """The kinds of orders for an instance of any driver, stored beside its row.

    `ROLLOUT` is for no instance: its id is empty.
    """

    DRAINED = "drained"
    LIFTED = "lifted"
    IMAGE = "image"
    ROLLOUT = "rollout"


# The topic of changes of pins and TTLs.
PINS_AND_TTLS = "pins_and_ttls"


class PinAndTtl(TypedDict, total=False):
    """The changes of an operator to an instance at run time; None: as configured."""

    pinned: bool | None
    ttl_s: float | None


@dataclass(frozen=True, slots=True)
class InstanceRow:
    """The row of one instance. Times are UTC; None in `ttl_s` and `pinned` means: as configured.

    `usage` carries the counters behind `last_used_at`, with `at` in seconds since the epoch.
    """

    id: str
    target: Target = Target.STOPPED
    operation: Operation | None = None
    ttl_s: float | None = None
    pinned: bool | None = None
    starts: int = 0
    loopback_port: int | None = None
    last_used_at: datetime | None = None
    recreated_at: datetime | None = None
    usage: UsageSample | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened, as the event stream tells it. `id` grows by one and is never reused."""

    id: int
    at: datetime
    instance: str | None
    kind: str
    reason: str | None
    detail: str


@dataclass(frozen=True, slots=True)
class LearnedSize:
    """The GPU memory a model really took on an instance, measured through NVML.

    `by_card` has the share of each card by UUID where the instance has several, and is empty where it has
    one: no row of one card says which it was.
    """

    instance: str
    model: str
    digest: str
    vram_bytes: int
    measured_at: datetime
    by_card: Mapping[str, int] = field(default_factory=dict, hash=False)
