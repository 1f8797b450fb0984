"""The changes of a configuration that is read again: those that apply at once, and those for a restart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from manager.settings.problems import Problem, configuration_error, dotted, from_validation
from manager.settings.sources import place_of
from manager.settings.templates import resolve_instances

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from manager.domain.instance import InstanceSpec
    from manager.domain.template import Template
    from manager.settings.load import LoadedSettings
    from manager.settings.model import Settings
    from manager.settings.schema import KeyPath

# Keys that can change while the daemon runs, with everything below them; `*` is the id of an instance that
# there was at the start. All others wait for a restart.
LIVE = frozenset(
    tuple(key.split("."))
    for key in (
        "server.key_file",
        "server.allowed_hosts",
        "server.allowed_origins",
        "instances.*.ttl_s",
        "instances.*.start_timeout_s",
        "instances.*.pinned",
        "instances.*.priority",
        "instances.*.serves",
        "instances.*.slots",
        "instances.*.deny_models",
        "instances.*.max_parameters",
        "instances.*.models",
        "lifecycle.ttl_s",
        "lifecycle.start_timeout_s",
        "lifecycle.stop_timeout_s",
        "lifecycle.drain_timeout_s",
        "lifecycle.vram_wait_s",
        "lifecycle.max_running",
        "schedules",
        "roles",
        "models.auto_pull",
        "models.list_roles",
        "models.settings",
        "models.facts",
        "routing.auto",
        "routing.words",
        "routing.escalate_below",
        "routing.ensemble",
        "routing.learned",
        "routing.weights",
        "breaker",
        "fallback",
        "gateway.keep_alive_s",
        "gateway.default_project",
        "gateway.access_log",
        "runs",
        "log.level",
        "audit",
        "budgets",
        "rollout",
    )
)


@dataclass(frozen=True, slots=True)
class Changes:
    """The result of a comparison.

    Attributes:
        loaded: what is in force afterwards, with the new sources.
        specs: the configured instances under it.
        applied: keys that change now.
        waiting: keys, and templates as `template NAME`, that change with a restart.
    """

    loaded: LoadedSettings
    specs: tuple[InstanceSpec, ...]
    applied: tuple[str, ...]
    waiting: tuple[str, ...]


def changes(
    running: LoadedSettings,
    wanted: LoadedSettings,
    *,
    templates: Mapping[str, Template],
    wanted_templates: Mapping[str, Template],
) -> Changes:
    """Compare what is in force with what was read again.

    Args:
        running: what is in force.
        wanted: what was read; valid by itself, together with its templates.
        templates: those that the running instances are made of.
        wanted_templates: those that were read.

    Raises:
        ConfigurationError: `wanted` is valid, but what can change now does not fit what stays.
    """
    before, after = running.settings, wanted.settings
    settings: Settings = _partly(before, after, (), wanted)
    mixed = replace(wanted, settings=settings)
    names = sorted({*templates, *wanted_templates})
    return Changes(
        loaded=mixed,
        specs=resolve_instances(mixed, templates),
        applied=tuple(map(dotted, _differences(_values(before), _values(settings), ()))),
        waiting=(
            *map(dotted, _differences(_values(settings), _values(after), ())),
            *(f"template {name}" for name in names if templates.get(name) != wanted_templates.get(name)),
        ),
    )


def _partly(before: Any, after: Any, path: KeyPath, wanted: LoadedSettings) -> Any:
    """`before` with the live keys of `after`, checked again."""
    if _is_live(path):
        return after
    if isinstance(before, BaseModel):
        pairs = {name: (getattr(before, name), getattr(after, name)) for name in type(before).model_fields}
        partly = before.model_copy(
            update={
                name: _partly(*pair, (*path, name), wanted)
                for name, pair in pairs.items()
                if pair[0] != pair[1]
            }
        )
        return _checked(partly, path, wanted)
    if isinstance(before, dict) and path == ("instances",):
        return {
            name: _partly(one, after[name], (*path, name), wanted) if name in after else one
            for name, one in before.items()
        }
    return before


def _is_live(path: KeyPath) -> bool:
    spelt = (path[0], "*", *path[2:]) if len(path) > 2 and path[0] == "instances" else path  # noqa: PLR2004
    return spelt in LIVE


def _checked(section: BaseModel, path: KeyPath, wanted: LoadedSettings) -> BaseModel:
    """The section, built again: a copy with changed values is not validated by itself."""
    try:
        return type(section).model_validate(
            {name: getattr(section, name) for name in section.model_fields_set}
        )
    except ValidationError as error:
        found = from_validation(
            error, type(section), lambda inner: str(place_of((*path, *inner), wanted.sources))
        )
        raise configuration_error(
            Problem(one.source, ".".join(filter(None, (dotted(path), one.key))), one.text) for one in found
        ) from error


def _values(settings: Settings) -> dict[str, Any]:
    return settings.model_dump(mode="json")


def _differences(before: Any, after: Any, path: KeyPath) -> Iterator[KeyPath]:
    """The keys whose values differ; a whole mapping where it is only on one side."""
    if before == after:
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            yield from _differences(before.get(key), after.get(key), (*path, key))
    else:
        yield path
