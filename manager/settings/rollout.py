"""The section `rollout` of the configuration, and its values that were changed at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from manager.domain.instance import Driver
from manager.domain.rollout import RAW, Stage, Stages
from manager.domain.template import Refusal
from manager.domain.wording import listed
from manager.settings.addresses import http_url, is_loopback
from manager.settings.overrides import Ignored, Sourced
from manager.settings.problems import from_validation
from manager.settings.routing import RoleName
from manager.settings.section import Section, refuse

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from manager.settings.load import LoadedSettings
    from manager.settings.model import Settings

SECTION = "rollout"
MOST_LANES = 1000
MOST_URL = 2048
_PORTS = {"http": 80, "https": 443}


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is listed twice; expected each role once")
    return names


def _empty_is_null(value: object) -> object:
    return None if isinstance(value, str) and not value.strip() else value


Lanes = Annotated[tuple[RoleName, ...], Field(max_length=MOST_LANES), AfterValidator(_each_once)]
RawUrl = Annotated[
    Annotated[str, Field(max_length=MOST_URL), AfterValidator(http_url)] | None,
    BeforeValidator(_empty_is_null),
]


class RolloutSettings(Section):
    """Which requests are managed; all others pass to `raw_url` as they came. `lanes` are for that stage."""

    stage: Stage = Stage.ALL
    lanes: Lanes = ()
    raw_url: RawUrl = None

    @model_validator(mode="after")
    def _stage_has_what_it_needs(self) -> Self:
        refusals = []
        if self.stage is not Stage.ALL and self.raw_url is None:
            message = f"missing; the stage {self.stage.value!r} passes requests there"
            refusals.append(Refusal(key=("raw_url",), message=message))
        if self.stage is Stage.LANES and not self.lanes:
            message = "empty; the stage 'lanes' needs at least one role (nothing is managed in 'observe')"
            refusals.append(Refusal(key=("lanes",), message=message))
        refuse(refusals)
        return self

    @property
    def stages(self) -> Stages:
        return Stages(self.stage, frozenset(self.lanes), self.raw_url)


FIELDS = tuple(RolloutSettings.model_fields)
DEFAULTS: Mapping[str, Sourced] = {
    field: Sourced(value, "default") for field, value in RolloutSettings().model_dump(mode="json").items()
}


def rollout_refusals(
    section: RolloutSettings, settings: Settings, roles: Collection[str]
) -> Iterator[Refusal]:
    """Yield what contradicts the other sections, with keys relative to the section.

    Args:
        section: as it is to be.
        settings: the other sections.
        roles: all roles.
    """
    for name in section.lanes:
        if name not in roles:
            yield Refusal(key=("lanes",), message=f"{name!r} is no role; expected some of: {listed(roles)}")
    if section.raw_url is None:
        return
    raw, server = urlsplit(section.raw_url), settings.server
    host = raw.hostname or ""
    if raw.port == server.port and (is_loopback(host) or host == server.host):
        yield Refusal(key=("raw_url",), message="this is the daemon's own address; expected another server's")
    for instance_id, instance in settings.instances.items():
        if instance_id == RAW:
            message = f"an instance has the id {RAW!r}, which is the name of this server everywhere"
            yield Refusal(key=("raw_url",), message=message)
        is_paid = instance.driver is Driver.CLOUD and instance.url is not None
        if is_paid and _is_same(str(instance.url), section.raw_url):
            message = f"this is the server of {instance_id!r}, which costs money; expected one that is free"
            yield Refusal(key=("raw_url",), message=message)


def _is_same(one: str, other: str) -> bool:
    """Return whether two URLs lead to one server."""
    first, second = urlsplit(one), urlsplit(other)
    ports = [parts.port or _PORTS.get(parts.scheme) for parts in (first, second)]
    return first.hostname == second.hostname and ports[0] == ports[1]


def written_rollout(loaded: LoadedSettings) -> dict[str, Sourced]:
    """Return the values as they were written, each with its source."""
    values = loaded.settings.rollout.model_dump(mode="json")
    return {field: Sourced(value, loaded.kind_of_source((SECTION, field))) for field, value in values.items()}


class Overlaid(NamedTuple):
    """The values in force, the section that they make, and the overrides that do not count."""

    values: Mapping[str, Sourced]
    section: RolloutSettings
    ignored: tuple[Ignored, ...]


def rollout_overlaid(
    written: Mapping[str, Sourced],
    overrides: Mapping[str, Any],
    refusals: Callable[[RolloutSettings], Iterable[Refusal]],
) -> Overlaid:
    """Put overrides above what was written; all of them are ignored where they make no section with it.

    A lane whose role is gone since stays: no request names it.

    Args:
        written: the values as they were written.
        overrides: by field; whatever was stored.
        refusals: see `rollout_refusals`.
    """
    changed = {field: Sourced(overrides[field], "override") for field in FIELDS if field in overrides}
    values = {**written, **changed}
    why = [f"{key}: {text}" for key, text in rollout_complaints(values)]
    if not why:
        section = section_of(values)
        why = [one.message for one in refusals(section) if one.key == ("raw_url",)] if changed else []
        if not why:
            return Overlaid(values, section, ())
    ignored = tuple(
        Ignored(f"{SECTION}.{field}", value, "; ".join(why)) for field, value in overrides.items()
    )
    return Overlaid(written, section_of(written), ignored)


def rollout_complaints(values: Mapping[str, Sourced]) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with values, as (key, message)."""
    try:
        section_of(values)
    except ValidationError as error:
        for problem in from_validation(error, RolloutSettings, lambda _: ""):
            yield f"{SECTION}.{problem.key}", problem.text


def section_of(values: Mapping[str, Sourced]) -> RolloutSettings:
    """Return the section that values make.

    Raises:
        ValidationError: they make none.
    """
    return RolloutSettings.model_validate({field: one.value for field, one in values.items()})
