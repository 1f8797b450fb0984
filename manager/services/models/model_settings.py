"""Which model and instance each role has: what was configured, and above it what was changed at run time."""

from __future__ import annotations

import asyncio
import json
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import structlog

from manager.domain.scoring import DEFAULT_WEIGHTS
from manager.errors import InvalidRequestError
from manager.services.finishing import finish
from manager.settings.fallback_overrides import (
    DEFAULTS,
    fallback_complaints,
    fallback_key,
    fallback_overlaid,
    is_fallback_key,
)
from manager.settings.overrides import overlaid, with_change
from manager.settings.routing import routing_settings
from manager.settings.servers import to_fallback

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from manager.domain.classification import AutoRules
    from manager.domain.roles import RoutingSettings
    from manager.domain.scoring import Weights
    from manager.services.journal import Journal
    from manager.services.ports import Registry
    from manager.settings import ModelsSettings
    from manager.settings.auto import EnsembleSettings
    from manager.settings.overrides import Change, Ignored, Overlay, Sourced
    from manager.settings.section import FoundIds

_log = structlog.get_logger("settings")

# Values that may be long, or nobody else's business: events and the log name them only.
_UNTOLD = ("body.defaults", "body.overrides", "system.text")
NOTHING: Mapping[str, Any] = MappingProxyType({})


class ModelSettings:
    """Owns the saved overrides. `routing` is what is in force; `version` grows whenever that changes.

    `fallback` has the values of that section in force, each with its source. `ensemble` is what ensembles
    are where a request does not say, None where there are none.

    Args:
        written: what the configuration says of each role.
        models: the section of that name.
        instances: for every instance there is now whether it runs on a GPU, None where that is not declared.
        slots: the slots of every instance there is now, None where they are not limited.
        denied: the patterns of models that every instance must not run.
        found: the instances that may be found later.
        fallback: what the configuration says of the section of that name.
        paid: for every instance there is now whether it costs money.
        auto: the rules for requests that leave the choice of a model to the daemon; None while that is off.
        weights: those of the strategy `scored`.
    """

    def __init__(
        self,
        registry: Registry,
        journal: Journal,
        *,
        written: Mapping[str, Mapping[str, Sourced]],
        models: ModelsSettings,
        instances: Callable[[], Mapping[str, bool | None]],
        slots: Callable[[], Mapping[str, int | None]],
        denied: Callable[[], Mapping[str, tuple[str, ...]]],
        found: FoundIds,
        fallback: Mapping[str, Sourced] = DEFAULTS,
        paid: Callable[[], Mapping[str, bool]] = dict,
        auto: AutoRules | None = None,
        ensemble: EnsembleSettings | None = None,
        weights: Weights = DEFAULT_WEIGHTS,
    ) -> None:
        self._auto, self._weights = auto, weights
        self.ensemble = ensemble
        self._registry = registry
        self._journal = journal
        self._written = written
        self._models = models
        self._instances = instances
        self._slots = slots
        self._denied = denied
        self._found = found
        self._written_fallback = fallback
        self._paid = paid
        self._changing = asyncio.Lock()
        self.fallback = fallback
        self._take({})
        self.version = 0

    async def load(self) -> None:
        """Read what was saved. What does not fit the configuration any more is ignored, and said so."""
        self._take(await self._registry.overrides())

    async def reload(self) -> None:
        """Put in force what another gateway has saved.

        Raises:
            ManagerError: the registry cannot be read; the settings are as they were.
        """
        async with self._changing:
            after = await self._registry.overrides()
            keys = sorted({*after, *self._overrides})
            changed = [key for key in keys if _text(after, key) != _text(self._overrides, key)]
            if changed:
                self._put_in_force(after, changed)

    @property
    def values(self) -> Mapping[str, Mapping[str, Sourced]]:
        """Role -> field -> value in force, with its source; fields are dotted, as in `body.defaults`."""
        return self._overlay.values

    @property
    def written(self) -> Mapping[str, Mapping[str, Sourced]]:
        """The values without overrides, as `values`; a role that was made here has none."""
        return self._written

    @property
    def written_fallback(self) -> Mapping[str, Sourced]:
        """The values of `fallback` without overrides."""
        return self._written_fallback

    @property
    def ignored(self) -> tuple[Ignored, ...]:
        """The saved overrides that do not count, and why."""
        return (*self._overlay.ignored, *self._ignored_of_fallback)

    def reconfigure(
        self,
        written: Mapping[str, Mapping[str, Sourced]],
        models: ModelsSettings,
        fallback: Mapping[str, Sourced] = DEFAULTS,
        auto: AutoRules | None = None,
        ensemble: EnsembleSettings | None = None,
        *,
        weights: Weights = DEFAULT_WEIGHTS,
    ) -> None:
        """Take over a new configuration. Overrides stay above it; those that do not fit are ignored."""
        self._written, self._models, self._written_fallback = written, models, fallback
        self._auto, self.ensemble, self._weights = auto, ensemble, weights
        self._take(self._overrides, told={one.key for one in self.ignored})
        self.version += 1

    async def change(self, change: Change, fallback: Mapping[str, Any] = NOTHING) -> None:
        """Change values of roles, and of `fallback`: saved first, then in force at once.

        None takes an override back.

        Raises:
            InvalidRequestError: it cannot be meant; `details.fields` says where and why. Nothing changed.
            ConflictError: another gateway has changed settings at the same moment. Nothing changed.
            RegistryUnwritableError: it could not be saved. Nothing changed.
        """
        async with self._changing:
            ignored = {one.key for one in self.ignored}
            after, problems = with_change(
                self._written,
                self._overrides,
                change,
                self._gpu_of(),
                self._slots(),
                deny_of=self._denied(),
                ignored=ignored,
            )
            for field, value in fallback.items():
                if value is None:
                    after.pop(fallback_key(field), None)
                else:
                    problems += fallback_complaints({field: value}, self._paid())
                    after[fallback_key(field)] = value
            if problems:
                fields = [{"field": key, "message": text} for key, text in dict.fromkeys(problems)]
                message = "; ".join(f"{one['field']}: {one['message']}" for one in fields)
                raise InvalidRequestError(message, details={"fields": fields})
            # As text: to Python 1 and true are equal.
            keys = sorted({*after, *self._overrides})
            changed = [key for key in keys if _text(after, key) != _text(self._overrides, key)]
            if changed:
                await finish(self._save(after, changed))  # what is in force is what was saved

    async def _save(self, after: dict[str, Any], changed: list[str]) -> None:
        await self._registry.save_overrides(after, was=self._overrides)
        self._put_in_force(after, changed)

    def _put_in_force(self, after: dict[str, Any], changed: list[str]) -> None:
        told = {one.key for one in self.ignored}
        self._take(after, preferred={key for key in after if key in changed or key not in told}, told=told)
        self.version += 1
        self._journal.record("settings_changed", detail="; ".join(_told(after, key) for key in changed))

    def _take(
        self, overrides: dict[str, Any], *, preferred: Collection[str] = (), told: Collection[str] = ()
    ) -> None:
        self._overrides = overrides
        of_roles = {key: value for key, value in overrides.items() if not is_fallback_key(key)}
        self._overlay: Overlay = self._overlaid(of_roles, preferred)
        self.fallback, section, self._ignored_of_fallback = fallback_overlaid(
            self._written_fallback, overrides, self._paid()
        )
        self.routing: RoutingSettings = routing_settings(
            self._overlay.roles, self._models, to_fallback(section), self._auto, self._weights
        )
        for one in self.ignored:
            if one.key not in told:
                _log.warning("override_ignored", override=one.key, reason=one.reason)

    def _overlaid(self, overrides: Mapping[str, Any], preferred: Collection[str] = ()) -> Overlay:
        return overlaid(
            self._written,
            overrides,
            self._instances(),
            self._slots(),
            deny_of=self._denied(),
            found=self._found,
            preferred=preferred,
        )

    def _gpu_of(self) -> dict[str, bool | None]:
        """All instances, and those that are not found yet while a role names them."""
        named = {
            name
            for role in self._overlay.roles.values()
            for name in (role.target, *(role.instances or ()), *role.keep_warm)
            if name is not None
        }
        there_are = dict(self._instances())
        later = {name: self._found.on_gpu(name) for name in sorted(named - set(there_are))}
        return there_are | {name: on_gpu for name, on_gpu in later.items() if on_gpu is not None}


def _text(overrides: Mapping[str, Any], key: str) -> str | None:
    return json.dumps(overrides[key], sort_keys=True) if key in overrides else None


def _told(overrides: Mapping[str, Any], key: str) -> str:
    if key not in overrides:
        return f"{key} as configured"
    return f"{key} changed" if key.endswith(_UNTOLD) else f"{key} = {json.dumps(overrides[key])}"
