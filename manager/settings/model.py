"""Every setting, its default and its bounds. Reading them is `load.py`'s business."""

from __future__ import annotations

import difflib
import os
import re
import zoneinfo
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, StrictBool, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from manager.domain import auto, cron
from manager.domain.container import container_name
from manager.domain.durations import duration_text
from manager.domain.gpu import ALL, AUTO, SLICE, normal_pci
from manager.domain.instance import DeviceKind, Driver
from manager.domain.models import parameter_count, parameter_text
from manager.domain.roles import USUAL_KINDS, RequestKind
from manager.domain.target import Protocol  # noqa: TC001  (pydantic reads annotations at run time)
from manager.domain.template import Refusal
from manager.settings.addresses import (
    engine_url,
    host_header,
    http_url,
    is_loopback,
    listen_host,
    postgresql_url,
    without_password,
)
from manager.settings.auto import RoutingSection
from manager.settings.budgets import MOST_BUDGETS, BudgetSettings, repeated
from manager.settings.rollout import RolloutSettings, rollout_refusals
from manager.settings.routing import (
    ANY_INSTANCE,
    GatewaySettings,
    ModelsSettings,
    RolesSettings,
    Size,
    default_roles,
    role_refusals,
    writer_refusals,
)
from manager.settings.section import (
    YEAR_S,
    Duration,
    FoundIds,
    InstanceId,
    Interval,
    Section,
    Text,
    Timeout,
    Ttl,
    Wait,
    WholeNumber,
    refuse,
)
from manager.settings.servers import (
    EnvName,
    FallbackSettings,
    ServedModels,
    cloud_refusals,
    external_model_refusals,
    order_refusals,
)
from manager.settings.swarm import Placement, SwarmSettings, swarm_refusals
from manager.settings.tls import (
    ClientTlsSettings,
    ListenerTlsSettings,
    client_tls_refusals,
    unequal_tls_refusals,
)
from manager.wire.origins import check_pattern

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

DEFAULT_ENGINE_URL = "unix:///var/run/docker.sock"
DEFAULT_INSTANCE = "cpu"
CPU_TEMPLATE = "ollama-cpu"
GPU_TEMPLATE = "ollama-gpu"

MOST_CARDS = 64
MOST_KEY_FILES = 16

LONGEST_NAME = 63  # a container is reached by its name as well, and a DNS label ends there


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """`$XDG_STATE_HOME/ollama-manager`; a relative value counts as unset (XDG Base Directory 0.8).

    Raises:
        ValueError: no home directory is known.
    """
    base = Path(environ.get("XDG_STATE_HOME", "").strip())
    if not base.is_absolute():
        home = environ.get("HOME", "").strip()
        try:
            base = (Path(home) if home else Path.home()) / ".local" / "state"
        except RuntimeError as error:
            raise ValueError("expected a directory: there is no home directory to put it in") from error
    return base / "ollama-manager"


def _state_dir(value: object) -> object:
    return default_state_dir(os.environ) if value is None else value


def _null_engine_url(value: object) -> object:
    return DEFAULT_ENGINE_URL if value is None else value


def _not_empty(value: object) -> object:
    if value == "":
        raise ValueError("expected a path")
    return value


def _key_files(value: object) -> object:
    """One file stands for a list of one."""
    value = _not_empty(value)
    if isinstance(value, str | Path):
        return (value,)
    if not isinstance(value, list | tuple):
        raise ValueError("expected a path, or a list of paths")  # noqa: TRY004  (pydantic's protocol)
    if not value:
        raise ValueError("expected a path, or a list of at least one")
    return value


def _key_files_text(files: tuple[Path, ...] | None) -> str | list[str] | None:
    """As it is written: a single file as such."""
    if files is None:
        return None
    return str(files[0]) if len(files) == 1 else list(map(str, files))


def _port(port: int) -> int:
    if not 1 <= port <= 65535:  # noqa: PLR2004
        raise ValueError("expected a port, 1-65535")
    return port


def _bind(entry: str) -> str:
    directory, separator, mode = entry.partition(":")
    if not directory.startswith("/") or ".." in directory.split("/") or (separator and mode != "rw"):
        raise ValueError("expected an absolute directory without '..', as DIR (read-only) or DIR:rw")
    return entry


def _cron_line(line: str) -> str:
    cron.parse(line)
    return line


def _timezone(name: str) -> str:
    try:
        zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
        near = difflib.get_close_matches(name, zoneinfo.available_timezones(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"expected a time zone such as Europe/Berlin{hint}") from error
    return name


def _kinds(kinds: tuple[RequestKind, ...]) -> tuple[RequestKind, ...]:
    """Each once and in order, so that two ways to say the same are the same."""
    if not kinds:
        raise ValueError("expected at least one of generate, embed, transcribe")
    return tuple(sorted(set(kinds)))


def _devices(value: object) -> object:
    """One device as text is a list of one."""
    if value is None or isinstance(value, list | tuple):
        return value
    if not isinstance(value, str):
        raise ValueError("expected text, or a list of the UUIDs or PCI bus ids of cards")  # noqa: TRY004
    return (value,)


def _devices_text(devices: tuple[str, ...] | None) -> str | list[str] | None:
    if devices is None:
        return None
    return devices[0] if len(devices) == 1 else list(devices)


def _each_device_once(devices: tuple[str, ...]) -> tuple[str, ...]:
    if not devices:
        raise ValueError("an empty list; expected auto, all, or the UUIDs or PCI bus ids of cards")
    seen: set[str] = set()
    for device in devices:
        if len(devices) > 1 and device in (AUTO, ALL):
            raise ValueError(f"{device!r} in a list; expected the UUIDs or PCI bus ids of cards")
        if len(devices) > 1 and device.startswith(SLICE):
            message = "is a slice of a card (MIG), and a program uses one slice alone or whole cards"
            raise ValueError(f"{device!r} {message}; expected whole cards in a list")
        key = normal_pci(device) or device.lower()
        if key in seen:
            raise ValueError(f"{device!r} is listed twice; expected each card once")
        seen.add(key)
    return devices


def _parameters(value: object) -> object:
    return parameter_count(value) if isinstance(value, str) else value


Devices = Annotated[
    tuple[Text, ...],
    Field(max_length=MOST_CARDS),
    BeforeValidator(_devices),
    AfterValidator(_each_device_once),
]
Parameters = Annotated[WholeNumber, Field(ge=1, le=10**15), BeforeValidator(_parameters)]
Port = Annotated[WholeNumber, AfterValidator(_port)]
FilePath = Annotated[Path, BeforeValidator(_not_empty)]
KeyFiles = Annotated[tuple[FilePath, ...], Field(max_length=MOST_KEY_FILES), BeforeValidator(_key_files)]


class ServerSettings(Section):
    host: Annotated[str, AfterValidator(listen_host)] = "127.0.0.1"
    port: Port = 11435
    key_file: Annotated[KeyFiles | None, PlainSerializer(_key_files_text, when_used="json")] = None
    tls: ListenerTlsSettings = Field(default_factory=ListenerTlsSettings)
    allowed_hosts: tuple[Annotated[str, AfterValidator(host_header)], ...] = (
        "localhost",
        "127.0.0.1",
        "[::1]",
    )
    allowed_origins: tuple[Annotated[str, AfterValidator(check_pattern)], ...] = ()

    @property
    def key_files(self) -> tuple[Path, ...]:
        return self.key_file or ()

    @model_validator(mode="after")
    def _open_only_with_a_key(self) -> Self:
        if not is_loopback(self.host) and not self.key_files:
            allowed = "set server.key_file, or listen on 127.0.0.1"
            message = f"{self.host!r} can be reached from other machines; {allowed}"
            refuse([Refusal(key=("host",), message=message)])
        return self


class StateSettings(Section):
    """`url` is the database that several gateways share; None: all is in `dir`."""

    dir: Annotated[FilePath, BeforeValidator(_state_dir)] = Field(
        default_factory=lambda: default_state_dir(os.environ)
    )
    url: Annotated[
        Annotated[str, AfterValidator(postgresql_url)] | None,
        PlainSerializer(lambda url: url and without_password(url), when_used="json"),
    ] = Field(default=None, repr=False)


class EngineSettings(Section):
    url: Annotated[str, AfterValidator(engine_url), BeforeValidator(_null_engine_url)] = DEFAULT_ENGINE_URL
    timeout_s: Timeout = 30.0


class TemplatesSettings(Section):
    dir: FilePath | None = None


class AllowSettings(Section):
    """Limits of templates: glob patterns, `binds` as `DIR` or `DIR:rw`."""

    images: tuple[Text, ...] = ("ollama/ollama:*", "ollama-manager/simulated:*")
    env: tuple[Text, ...] = (
        "OLLAMA_*",
        "CUDA_VISIBLE_DEVICES",
        "NVIDIA_VISIBLE_DEVICES",
        "NVIDIA_DRIVER_CAPABILITIES",
    )
    networks: tuple[Text, ...] = ("ollama-manager",)
    volumes: tuple[Text, ...] = ("ollama-models",)
    binds: tuple[Annotated[str, AfterValidator(_bind)], ...] = ()


class InstanceSettings(Section):
    """One instance as it is written; `ttl_s` and `start_timeout_s` None mean what `lifecycle` says.

    `device` has the cards of a GPU instance: one, several, or ("all",). `slots` None is no limit. `protocol`,
    `key_env`, `key_file` and `models` are for servers that somebody else runs. `placement` has constraints of
    Docker Swarm on the node.
    """

    driver: Driver = Driver.DOCKER
    template: Text | None = None
    device: Annotated[Devices | None, PlainSerializer(_devices_text, when_used="json")] = None
    url: Annotated[str, AfterValidator(http_url)] | None = None
    tls: ClientTlsSettings | None = None
    protocol: Protocol | None = None
    key_env: EnvName | None = None
    key_file: FilePath | None = None
    models: ServedModels | None = None
    ttl_s: Ttl | None = None
    start_timeout_s: Timeout | None = None
    pinned: StrictBool = False
    priority: Annotated[WholeNumber, Field(ge=-1000, le=1000)] = 0
    prewarm: StrictBool = False
    serves: Annotated[tuple[RequestKind, ...], AfterValidator(_kinds)] = tuple(sorted(USUAL_KINDS))
    slots: Annotated[WholeNumber, Field(ge=1, le=10_000)] | None = None
    deny_models: Annotated[tuple[Text, ...], Field(max_length=1000)] = ()
    placement: Placement = ()
    max_parameters: Annotated[
        Parameters | None,
        PlainSerializer(lambda count: None if count is None else parameter_text(count), when_used="json"),
    ] = None

    @model_validator(mode="after")
    def _keys_fit_the_driver(self) -> Self:
        refuse(_REFUSALS[self.driver](self))
        refuse(client_tls_refusals(self.url, self.tls, has_container=self.driver.has_container))
        return self


class LifecycleSettings(Section):
    """Seconds throughout; `ttl_s` 0 means never idle-stopped, `max_running` None means no limit."""

    ttl_s: Ttl = 900.0
    start_timeout_s: Timeout = 300.0
    stop_timeout_s: Timeout = 30.0
    drain_timeout_s: Wait = 60.0
    probe_interval_s: Interval = 2.0
    resync_interval_s: Interval = 15.0
    vram_wait_s: Wait = 20.0
    max_running: Annotated[WholeNumber, Field(ge=1, le=1000)] | None = None


class ScheduleSettings(Section):
    cron: Annotated[str, AfterValidator(_cron_line)]
    action: Literal["start", "stop", "reap"]
    instance: InstanceId | None = None
    timezone: Annotated[str, AfterValidator(_timezone)] | None = None

    @model_validator(mode="after")
    def _instance_fits_the_action(self) -> Self:
        if self.action == "reap" and self.instance is not None:
            message = "reap goes over all instances; leave `instance` out"
            refuse([Refusal(key=("instance",), message=message)])
        if self.action != "reap" and self.instance is None:
            message = f"missing; {self.action} needs the id of an instance"
            refuse([Refusal(key=("instance",), message=message)])
        return self


class DiscoverySettings(Section):
    """`manifest` is a file with servers that become external instances; see `settings.manifest`."""

    manifest: FilePath | None = None


class AuditSettings(Section):
    """The bounds of the history of requests and of usage; `retention_days` 0 keeps no request."""

    retention_days: Annotated[WholeNumber, Field(ge=0, le=3650)] = 90
    max_rows: Annotated[WholeNumber, Field(ge=1, le=100_000_000)] = 1_000_000
    usage_days: Annotated[WholeNumber, Field(ge=1, le=36_500)] = 400


class BreakerSettings(Section):
    """`failures` in a row open the breaker of an instance, for `open_s` at first; seconds throughout."""

    failures: Annotated[WholeNumber, Field(ge=1, le=1000)] = 2
    open_s: Timeout = 30.0
    max_open_s: Timeout = 300.0

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if self.max_open_s < self.open_s:
            message = f"{self.max_open_s:g}, less than open_s; expected {self.open_s:g} or more"
            refuse([Refusal(key=("max_open_s",), message=message)])
        return self


class LogSettings(Section):
    """`auto` is console on a terminal and json elsewhere."""

    format: Literal["auto", "json", "console"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"


class RunsSettings(Section):
    """Async runs. `concurrency` is how many are begun at once, `max_queued` how many may not have ended.

    `max_body` and `max_result` bound the files of one run, `max_stored` those of all runs together. A result
    is kept for `expires_s` after the end of its run, unless the run says otherwise, and the run itself is
    listed for `retention_s`.
    """

    concurrency: Annotated[WholeNumber, Field(ge=1, le=64)] = 4
    max_queued: Annotated[WholeNumber, Field(ge=1, le=10_000)] = 1000
    max_body: Size = 8 * 2**20
    max_result: Size = 64 * 2**20
    max_stored: Size = 4 * 2**30
    expires_s: Annotated[Duration, Field(gt=0, le=YEAR_S)] = 86_400.0
    retention_s: Annotated[Duration, Field(gt=0, le=YEAR_S)] = 604_800.0

    @model_validator(mode="after")
    def _bounds_fit_each_other(self) -> Self:
        refusals = []
        if self.expires_s > self.retention_s:
            allowed = f"at most runs.retention_s, {duration_text(self.retention_s)}"
            message = f"{duration_text(self.expires_s)}; expected {allowed}"
            refusals.append(Refusal(key=("expires_s",), message=message))
        if self.max_body + self.max_result > self.max_stored:
            message = "expected room for one body and one result, max_body + max_result"
            refusals.append(Refusal(key=("max_stored",), message=message))
        refuse(refusals)
        return self


class Settings(BaseSettings):
    """All settings, checked. Building one reads no environment: `load_settings` brings the sources."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    server: ServerSettings = Field(default_factory=ServerSettings)
    state: StateSettings = Field(default_factory=StateSettings)
    manager_id: Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,47}$")] = "default"
    engine: EngineSettings = Field(default_factory=EngineSettings)
    templates: TemplatesSettings = Field(default_factory=TemplatesSettings)
    allow: AllowSettings = Field(default_factory=AllowSettings)
    instances: dict[InstanceId, InstanceSettings] = Field(
        default_factory=lambda: {DEFAULT_INSTANCE: InstanceSettings(template=CPU_TEMPLATE)}
    )
    gpus: Literal["auto", "none"] = "auto"
    lifecycle: LifecycleSettings = Field(default_factory=LifecycleSettings)
    schedules: tuple[ScheduleSettings, ...] = ()
    roles: RolesSettings = Field(default_factory=default_roles)
    models: ModelsSettings = Field(default_factory=ModelsSettings)
    gateway: GatewaySettings = Field(default_factory=GatewaySettings)
    runs: RunsSettings = Field(default_factory=RunsSettings)
    breaker: BreakerSettings = Field(default_factory=BreakerSettings)
    fallback: FallbackSettings = Field(default_factory=FallbackSettings)
    log: LogSettings = Field(default_factory=LogSettings)
    audit: AuditSettings = Field(default_factory=AuditSettings)
    budgets: tuple[BudgetSettings, ...] = Field(default=(), max_length=MOST_BUDGETS)
    rollout: RolloutSettings = Field(default_factory=RolloutSettings)
    routing: RoutingSection = Field(default_factory=RoutingSection)
    discovery: DiscoverySettings = Field(default_factory=DiscoverySettings)
    swarm: SwarmSettings = Field(default_factory=SwarmSettings)

    @property
    def found_ids(self) -> FoundIds:
        """Return the instances that may be found while the daemon runs."""
        return FoundIds(cards=self.gpus == "auto", nodes=self.swarm.instances != "none")

    @property
    def uses_swarm(self) -> bool:
        """Return whether there are, or may be, instances of driver swarm."""
        configured = any(one.driver is Driver.SWARM for one in self.instances.values())
        return configured or self.swarm.instances != "none"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    @model_validator(mode="after")
    def _sections_fit_each_other(self) -> Self:
        refuse(
            [
                *_name_refusals(self),
                *_schedule_refusals(self),
                *_loop_refusals(self),
                *unequal_tls_refusals(self.instances),
                *_routing_refusals(self),
                *repeated(self.budgets),
                *_rollout_refusals(self),
            ]
        )
        return self


# The sections that the last validator compares; while one of them is wrong its verdict means nothing.
COMPARED = frozenset(
    {
        "server",
        "manager_id",
        "instances",
        "gpus",
        "schedules",
        "roles",
        "models",
        "fallback",
        "budgets",
        "rollout",
        "swarm",
    }
)


# What an external instance may not say, because somebody else starts and stops its server.
NOT_EXTERNAL = ("template", "ttl_s", "start_timeout_s", "pinned", "prewarm")


# The same for a paid server, which is the last resort for what it is named for, whatever else is configured.
NOT_CLOUD = (*NOT_EXTERNAL, "device", "priority", "slots", "deny_models", "max_parameters")
_NOT_DOCKER = ("protocol", "key_env", "key_file", "models")


def _container_refusals(instance: InstanceSettings) -> Iterator[Refusal]:
    """Refusals of an instance whose server the daemon starts, whatever starts it."""
    for key in _NOT_DOCKER:
        if getattr(instance, key) is not None:
            yield Refusal(key=(key,), message="only for the drivers external and cloud")


def _placement_refusals(instance: InstanceSettings) -> Iterator[Refusal]:
    if instance.placement:
        yield Refusal(
            key=("placement",), message="only for driver swarm, whose services run on several nodes"
        )


def _docker_refusals(instance: InstanceSettings) -> Iterator[Refusal]:
    if instance.template is None:
        yield Refusal(key=("template",), message="missing; an instance of driver docker needs a template")
    if instance.url is not None:
        yield Refusal(
            key=("url",), message="only for driver external; the endpoint follows from the template"
        )
    yield from _container_refusals(instance)
    yield from _placement_refusals(instance)
    for device in instance.device or ():
        if not (
            device in (AUTO, ALL) or re.fullmatch(r"(?:GPU|MIG)-[A-Za-z0-9/-]+", device) or normal_pci(device)
        ):
            allowed = "auto, all, a UUID (GPU-… or MIG-…), a PCI bus id such as 00000000:01:00.0, or a list"
            yield Refusal(key=("device",), message=f"{device!r}; expected {allowed}")


def _swarm_refusals(instance: InstanceSettings) -> Iterator[Refusal]:
    yield from _container_refusals(instance)
    yield from swarm_refusals(instance)


def _external_refusals(instance: InstanceSettings) -> Iterator[Refusal]:
    yield from _placement_refusals(instance)
    if instance.url is None:
        yield Refusal(key=("url",), message="missing; an instance of driver external needs a url")
    for key in NOT_EXTERNAL:
        if key in instance.model_fields_set:
            message = "not for driver external, whose server is started and stopped by somebody else"
            yield Refusal(key=(key,), message=message)
    kinds = [kind.value for kind in DeviceKind]
    if instance.device is not None and instance.device not in [(kind,) for kind in kinds]:
        given = _devices_text(instance.device)
        message = f"{given!r}; expected {' or '.join(kinds)} for driver external"
        yield Refusal(key=("device",), message=message)
    yield from _key_refusals(instance)
    yield from external_model_refusals(instance.protocol, instance.models)


def _cloud_refusals(instance: InstanceSettings) -> Iterator[Refusal]:
    yield from _placement_refusals(instance)
    if instance.url is None:
        yield Refusal(key=("url",), message="missing; an instance of driver cloud needs a url")
    elif instance.url.startswith("http://") and not is_loopback(urlsplit(instance.url).hostname or ""):
        message = f"{instance.url!r} would carry the key in clear; expected https:// beyond this machine"
        yield Refusal(key=("url",), message=message)
    for key in NOT_CLOUD:
        if key in instance.model_fields_set and getattr(instance, key) is not None:
            yield Refusal(key=(key,), message="not for driver cloud, whose server is somebody else's service")
    yield from _key_refusals(instance)
    if instance.key_env is None and instance.key_file is None:
        yield Refusal(key=("key_env",), message="missing; driver cloud needs a key: key_env or key_file")
    yield from cloud_refusals(instance.protocol, instance.models)


def _key_refusals(instance: InstanceSettings) -> Iterator[Refusal]:
    if instance.key_env is not None and instance.key_file is not None:
        yield Refusal(key=("key_file",), message="beside key_env; expected one of them")


_REFUSALS = {
    Driver.DOCKER: _docker_refusals,
    Driver.EXTERNAL: _external_refusals,
    Driver.CLOUD: _cloud_refusals,
    Driver.SWARM: _swarm_refusals,
}


def _name_refusals(settings: Settings) -> Iterator[Refusal]:
    for instance_id, instance in settings.instances.items():
        if instance_id == ANY_INSTANCE:
            message = "the word for any instance, wherever one is named; expected another id"
            yield Refusal(key=("instances", instance_id), message=message)
        length = len(container_name(settings.manager_id, instance_id))
        if instance.driver.has_container and length > LONGEST_NAME:
            allowed = f"at most {LONGEST_NAME}: shorten it or manager_id"
            message = f"its container's name has {length} characters; {allowed}"
            yield Refusal(key=("instances", instance_id), message=message)


def _schedule_refusals(settings: Settings) -> Iterator[Refusal]:
    for index, schedule in enumerate(settings.schedules):
        wanted = schedule.instance
        if wanted is None:
            continue
        key = ("schedules", index, "instance")
        known = settings.instances.get(wanted)
        if known is not None and not known.driver.has_container:
            message = f"{wanted!r} has driver {known.driver.value} and cannot be started or stopped from here"
            yield Refusal(key=key, message=message)
        elif known is None and settings.found_ids.on_gpu(wanted) is None:
            ids = ", ".join(settings.instances) or "nothing"
            found = "".join(f" or {words}" for words in settings.found_ids.words)
            yield Refusal(key=key, message=f"{wanted!r} is no instance; expected {ids}{found}")


def _loop_refusals(settings: Settings) -> Iterator[Refusal]:
    """An external instance must not be this daemon: a request would go round for ever."""
    for instance_id, instance in settings.instances.items():
        if instance.url is None:
            continue
        parts = urlsplit(instance.url)
        host = parts.hostname or ""
        if parts.port == settings.server.port and (is_loopback(host) or host == settings.server.host):
            message = "this is the daemon's own address; expected another server's"
            yield Refusal(key=("instances", instance_id, "url"), message=message)


def _rollout_refusals(settings: Settings) -> Iterator[Refusal]:
    for refusal in rollout_refusals(settings.rollout, settings, settings.roles):
        yield Refusal(key=("rollout", *refusal.key), message=refusal.message)


def _routing_refusals(settings: Settings) -> Iterator[Refusal]:
    """Refusals that do not depend on templates; the others follow in `resolve_instances`."""
    instances = settings.instances
    found = settings.found_ids
    # A role reaches a paid server by `paid_fallback`, never as one of its instances.
    local = {id_: instance for id_, instance in instances.items() if instance.driver is not Driver.CLOUD}
    gpu_of = {id_: _surely_gpu(instance) for id_, instance in local.items()}
    slots_of = {id_: instance.slots for id_, instance in instances.items()}
    deny_of = {id_: instance.deny_models for id_, instance in instances.items()}
    for refusal in role_refusals(settings.roles, gpu_of, slots_of, deny_of=deny_of, found=found):
        yield Refusal(key=("roles", *refusal.key), message=refusal.message)
    if settings.routing.auto and auto.AUTO in settings.roles:
        message = f"routing.auto gives the name {auto.AUTO!r} another meaning; expected another name"
        yield Refusal(key=("roles", auto.AUTO), message=message)
    managed = {id_: instance.driver.has_container for id_, instance in instances.items()}
    for refusal in writer_refusals(settings.models, managed, found=found):
        yield Refusal(key=("models", *refusal.key), message=refusal.message)
    paid = {id_: instance.driver is Driver.CLOUD for id_, instance in instances.items()}
    for refusal in order_refusals(settings.fallback, paid):
        yield Refusal(key=("fallback", *refusal.key), message=refusal.message)


def _surely_gpu(instance: InstanceSettings) -> bool | None:
    if instance.driver is Driver.EXTERNAL:
        return None if instance.device is None else instance.device == (DeviceKind.GPU,)
    return instance.device is not None  # without one, the template decides
