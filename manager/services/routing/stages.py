"""The section `rollout`: what was configured, and above it what was changed at run time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import structlog

from manager.domain.registry import OrderKind
from manager.domain.rollout import Stage
from manager.errors import InvalidRequestError
from manager.services.finishing import finish
from manager.settings.overrides import Sourced
from manager.settings.rollout import (
    DEFAULTS,
    FIELDS,
    SECTION,
    rollout_complaints,
    rollout_overlaid,
    section_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from manager.domain.template import Refusal
    from manager.services.journal import Journal
    from manager.services.ports import Registry
    from manager.services.routing.rollout import Rollout
    from manager.settings.overrides import Ignored
    from manager.settings.rollout import RolloutSettings

_log = structlog.get_logger("settings")
# The order is for no instance.
_NOBODY = ""


class RolloutControl:
    """Owns the saved overrides of the section, and puts the values in force.

    A change is one step: requests that begin after it obey it, and those under way go on as they began.

    Attributes:
        in_force: the rollout that requests obey.

    Args:
        rollout: obeys.
        registry: keeps the overrides.
        journal: takes an event for each change.
        written: what the configuration says.
        refusals: what contradicts the other sections; see `rollout_refusals`.
    """

    def __init__(
        self,
        rollout: Rollout,
        registry: Registry,
        journal: Journal,
        *,
        written: Mapping[str, Sourced] = DEFAULTS,
        refusals: Callable[[RolloutSettings], Iterable[Refusal]],
    ) -> None:
        self.in_force = rollout
        self._registry = registry
        self._journal = journal
        self._written = written
        self._refusals = refusals
        self._changing = asyncio.Lock()
        self._overrides: dict[str, Any] = {}
        self._overlay = rollout_overlaid(written, {}, refusals)

    async def load(self) -> None:
        """Read what was saved here or by another gateway, and put it in force.

        What does not fit the configuration any more is ignored, and logged.
        """
        async with self._changing:
            stored = await self._registry.orders(OrderKind.ROLLOUT, dict)
            self._take(stored.get(_NOBODY, {}))

    @property
    def values(self) -> Mapping[str, Sourced]:
        """Field -> value in force, with its source."""
        return self._overlay.values

    @property
    def written(self) -> Mapping[str, Sourced]:
        """The values without overrides."""
        return self._written

    @property
    def ignored(self) -> tuple[Ignored, ...]:
        """The saved overrides that do not count, and why."""
        return self._overlay.ignored

    @property
    def partial(self) -> dict[str, Any]:
        """The field `rollout` with the stage, for answers; none where every request is managed."""
        stage = self.in_force.stages.stage
        return {} if stage is Stage.ALL else {"rollout": stage.value}

    def reconfigure(self, written: Mapping[str, Sourced]) -> None:
        """Take over a new configuration. Overrides stay above it; those that do not fit are ignored."""
        self._written = written
        self._take(self._overrides)

    def check(self, change: Mapping[str, Any]) -> dict[str, Any]:
        """Return the overrides after a change; None in it takes an override back.

        Raises:
            InvalidRequestError: it contradicts itself or the configuration.
        """
        # Overrides that do not count stay out of it: this change does not mean them.
        after = {} if self.ignored else dict(self._overrides)
        for field, value in change.items():
            if value is None:
                after.pop(field, None)
            else:
                after[field] = value
        values = {**self._written, **{field: Sourced(after[field], "override") for field in after}}
        problems = list(rollout_complaints(values))
        if not problems:
            refusals = self._refusals(section_of(values))
            problems = [(f"{SECTION}.{one.key[0]}", one.message) for one in refusals]
        if problems:
            fields = [{"field": f"body.{key}", "message": text} for key, text in problems]
            message = "; ".join(f"{one['field']}: {one['message']}" for one in fields)
            raise InvalidRequestError(message, details={"fields": fields})
        return after

    async def change(self, change: Mapping[str, Any]) -> None:
        """Change values: saved first, then in force at once.

        Raises:
            InvalidRequestError: as `check`. Nothing changed.
            RegistryUnwritableError: it could not be saved. Nothing changed.
        """
        async with self._changing:
            after = self.check(change)
            if after != self._overrides:
                await finish(self._save(after))  # what is in force is what was saved

    async def _save(self, after: dict[str, Any]) -> None:
        await self._registry.save_order(_NOBODY, OrderKind.ROLLOUT, after or None)
        self._take(after)

    def _take(self, overrides: dict[str, Any]) -> None:
        told = {one.key for one in self.ignored}
        before = self.in_force.stages
        self._overrides = overrides
        self._overlay = rollout_overlaid(self._written, overrides, self._refusals)
        for one in self.ignored:
            if one.key not in told:
                _log.warning("override_ignored", override=one.key, reason=one.reason)
        self.in_force.put(self._overlay.section.stages)
        if self.in_force.stages != before:
            said = {field: self.values[field].value for field in FIELDS}
            lanes = f", lanes: {', '.join(said['lanes'])}" if said["lanes"] else ""
            raw = f", raw_url: {said['raw_url']}" if said["raw_url"] else ""
            self._journal.record("rollout_changed", detail=f"stage: {said['stage']}{lanes}{raw}")
