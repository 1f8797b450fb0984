"""Values of roles that were changed at run time, above what was written in file, environment or command line.

An override is kept under the key `roles.NAME.FIELD`, with the value as JSON has it. A name with a dot is
quoted in it, as in TOML: `roles."gpt-4.1".model`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import ValidationError

from manager.domain.roles import RequestKind
from manager.domain.wording import listed
from manager.settings.problems import from_validation
from manager.settings.routing import (
    LONGEST_ROLE_NAME,
    ROLE_NAME,
    RoleSettings,
    read_role,
    role_refusals,
    role_values,
)
from manager.settings.section import FoundIds

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from manager.domain.template import Refusal
    from manager.settings.load import LoadedSettings

Origin: TypeAlias = Literal["override", "command line", "environment", "file", "default"]
# Role -> field -> new value, None to take an override back; None instead of fields takes all of a role back.
Change: TypeAlias = "Mapping[str, Mapping[str, Any] | None]"

_DEFAULTS = role_values(RoleSettings())
FIELDS = tuple(_DEFAULTS)
_ROLE = re.compile(ROLE_NAME)
_KEY = re.compile(r'roles\.(?:"(?P<quoted>[^"]*\.[^"]*)"|(?P<name>[^".]*))\.(?P<field>.+)')
_KINDS = ", ".join(RequestKind)


@dataclass(frozen=True, slots=True)
class Sourced:
    """A value as JSON has it, and where it was said."""

    value: Any
    source: Origin


# A role that was made at run time has these below its overrides.
DEFAULTS = {field: Sourced(value, "default") for field, value in _DEFAULTS.items()}


@dataclass(frozen=True, slots=True)
class Ignored:
    """An override that does not count, and why."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True, slots=True)
class Overlay:
    """All roles as they are in force. `values` has every field of every role."""

    values: Mapping[str, Mapping[str, Sourced]]
    roles: Mapping[str, RoleSettings]
    ignored: tuple[Ignored, ...]


def setting_key(role: str, field: str) -> str:
    """The key of one value of a role."""
    return f"{role_key(role)}.{field}"


def role_key(role: str) -> str:
    """The key of all that is said of a role."""
    return f'roles."{role}"' if "." in role else f"roles.{role}"


def split_key(key: str) -> tuple[str, str] | None:
    """The role and the field that `setting_key` made a key of; None for any other text."""
    match = _KEY.fullmatch(key)
    return (match["quoted"] or match["name"], match["field"]) if match else None


def written_roles(loaded: LoadedSettings) -> dict[str, dict[str, Sourced]]:
    """The sources of each role; of a mapping that several have a part in, the highest of them."""
    return {
        name: {
            field: Sourced(value, loaded.kind_of_source(("roles", name, *field.split("."))))
            for field, value in role_values(role).items()
        }
        for name, role in loaded.settings.roles.items()
    }


def overlaid(
    written: Mapping[str, Mapping[str, Sourced]],
    overrides: Mapping[str, Any],
    gpu_of: Mapping[str, bool | None],
    slots_of: Mapping[str, int | None],
    *,
    deny_of: Mapping[str, tuple[str, ...]] | None = None,
    found: FoundIds,
    preferred: Collection[str] = (),
) -> Overlay:
    """The roles as written with `overrides` above; those that cannot be meant any more are ignored.

    Args:
        written: what the sources say.
        overrides: by key; whatever was stored.
        gpu_of: see `role_contradictions`.
        slots_of: see `role_contradictions`.
        deny_of: see `role_refusals`.
        found: see `role_refusals`.
        preferred: of overrides that contradict each other, those that stay.
    """
    active: dict[str, Any] = {}
    ignored: list[Ignored] = []
    # Kinds first: they say which roles there are.
    for key, value in sorted(overrides.items(), key=lambda item: (not item[0].endswith(".kind"), item[0])):
        if (reason := _why_unusable(key, value, written, active)) is None:
            active[key] = value
        else:
            ignored.append(Ignored(key, value, reason))
    roles = _roles(written, active)
    while True:
        refusal = next(role_refusals(roles, gpu_of, slots_of, deny_of=deny_of, found=found), None)
        if refusal is None:
            break
        culprit = _culprit(refusal, roles, active, preferred)
        if culprit is None:
            break
        ignored.append(Ignored(culprit, active.pop(culprit), refusal.message))
        roles = _roles(written, active)
    values = {name: {field: _value(written, active, name, field) for field in FIELDS} for name in roles}
    return Overlay(values, roles, tuple(ignored))


def with_change(
    written: Mapping[str, Mapping[str, Sourced]],
    overrides: Mapping[str, Any],
    change: Change,
    gpu_of: Mapping[str, bool | None],
    slots_of: Mapping[str, int | None],
    *,
    deny_of: Mapping[str, tuple[str, ...]] | None = None,
    ignored: Collection[str],
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The overrides after `change`, and what is wrong with it as (key, message).

    Args:
        written: what the sources say.
        overrides: those there are.
        change: what is asked for.
        gpu_of: see `role_contradictions`.
        slots_of: see `role_contradictions`.
        deny_of: see `role_refusals`.
        ignored: keys of overrides that do not count; they stay, unless the change says something of them.
    """
    after = dict(overrides)
    problems: list[tuple[str, str]] = []
    for role, values in change.items():
        if values is None:
            problems += _take_back(role, written, after)
        else:
            problems += _put(role, values, written, after)
    touched = {setting_key(role, field) for role, values in change.items() for field in values or ()}
    candidate = {key: value for key, value in after.items() if key in touched or key not in ignored}
    there_is = _names(written, candidate)
    for role, values in change.items():
        if values is not None and role not in there_is:
            problems.append((role_key(role), _no_role(role, there_is)))
    if not problems:
        roles = _roles(written, candidate)
        for refusal in role_refusals(roles, gpu_of, slots_of, deny_of=deny_of, found=FoundIds()):
            name, field = map(str, refusal.key)
            problems.append((setting_key(name, field), refusal.message))
    return after, problems


def _take_back(
    role: str, written: Mapping[str, Mapping[str, Sourced]], overrides: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """Remove all overrides of a role; complain when there is no such role."""
    gone = [key for key in overrides if key.startswith(f"{role_key(role)}.")]
    if not gone and role not in written:
        yield role_key(role), _no_role(role, _names(written, overrides))
    for key in gone:
        del overrides[key]


def _put(
    role: str,
    values: Mapping[str, Any],
    written: Mapping[str, Mapping[str, Sourced]],
    overrides: dict[str, Any],
) -> Iterator[tuple[str, str]]:
    """Set and remove overrides of one role; complain about values that cannot be."""
    if not _is_name(role):
        expected = f"text that matches {_ROLE.pattern}, at most {LONGEST_ROLE_NAME} characters"
        yield role_key(role), f"{role!r} as a role; expected {expected}"
    for field, given in values.items():
        value = given.strip() if isinstance(given, str) else given
        key = setting_key(role, field)
        if value is None or value == "":
            overrides.pop(key, None)
        elif found := list(_complaints(field, value)):
            yield from ((setting_key(role, where), text) for where, text in found)
        elif field != "kind" or role not in written:
            overrides[key] = role_values(read_role({field: value}))[field]
        elif value != (kind := written[role]["kind"].value):
            yield key, _other_kind(role, kind)


def _why_unusable(
    key: str, value: Any, written: Mapping[str, Mapping[str, Sourced]], active: Mapping[str, Any]
) -> str | None:
    """The reason why an override means nothing here; None when it does."""
    role, field = split_key(key) or ("", "")
    if not _is_name(role) or field not in FIELDS or value is None:
        return "there is no such setting"
    for where, text in _complaints(field, value):
        return text if where == field else f"{where}: {text}"
    if field == "kind" and role in written:
        kind = written[role]["kind"].value
        return None if value == kind else _other_kind(role, kind)
    there_is = _names(written, active)
    return None if field == "kind" or role in there_is else _no_role(role, there_is)


def _no_role(role: str, there_is: list[str]) -> str:
    return f"there is no role {role!r} (there is: {listed(there_is)}); a new one needs its kind: {_KINDS}"


def _is_name(role: str) -> bool:
    return len(role) <= LONGEST_ROLE_NAME and _ROLE.fullmatch(role) is not None


def _other_kind(role: str, kind: str) -> str:
    return f"the role {role!r} does {kind}, which cannot be changed"


def _complaints(field: str, value: Any) -> Iterator[tuple[str, str]]:
    try:
        read_role({field: value})
    except ValidationError as error:
        for problem in from_validation(error, RoleSettings, lambda _: ""):
            yield problem.key, problem.text


def _names(written: Mapping[str, Any], overrides: Mapping[str, Any]) -> list[str]:
    """All roles: those that are written, then those that an override gives a kind."""
    own = {role for role, field in filter(None, map(split_key, overrides)) if field == "kind"}
    return [*written, *sorted(own - set(written))]


def _roles(
    written: Mapping[str, Mapping[str, Sourced]], overrides: Mapping[str, Any]
) -> dict[str, RoleSettings]:
    return {
        name: read_role({field: _value(written, overrides, name, field).value for field in FIELDS})
        for name in _names(written, overrides)
    }


def _value(
    written: Mapping[str, Mapping[str, Sourced]], overrides: Mapping[str, Any], role: str, field: str
) -> Sourced:
    key = setting_key(role, field)
    if key in overrides and not (role in written and field == "kind"):
        return Sourced(overrides[key], "override")
    if role in written:
        return written[role][field]
    return Sourced(_DEFAULTS[field], "default")


def _culprit(
    refusal: Refusal, roles: Mapping[str, RoleSettings], active: Mapping[str, Any], preferred: Collection[str]
) -> str | None:
    """The override to leave out because of `refusal`; None when it is not about overrides."""
    role, field = map(str, refusal.key)
    others = [setting_key(name, "model") for name in roles[role].fallbacks]
    concerned = {
        "target": [setting_key(role, name) for name in ("target", "policy", "instances")],
        "fallbacks": [setting_key(role, "fallbacks"), setting_key(role, "model"), *others],
        "instances": [setting_key(role, "instances")],
        "mode": [setting_key(role, name) for name in ("mode", "kind")],
        "keep_warm": [setting_key(role, name) for name in ("keep_warm", "instances", "model")],
        # The reservations of several roles may add up to too many.
        "reserved": [
            setting_key(name, inner) for name in (role, *roles) for inner in ("reserved", "instances")
        ],
    }[field]
    there = [key for key in concerned if key in active]
    return min(there, key=lambda key: key in preferred, default=None)
