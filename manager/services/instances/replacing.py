"""A new container for one instance on an operator's order: a restart, or another image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manager.domain.condition import RestartRequested
from manager.domain.image_override import shown_override, with_image
from manager.domain.instance import Phase

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager.domain.condition import Condition
    from manager.domain.image_override import ImageInForce, ImageOverride
    from manager.domain.instance import InstanceSpec
    from manager.services.instances.starting import Starting
    from manager.services.instances.workings import Workings


class Replacing:
    """Owns the operator's choice of the image, and requests restarts.

    Args:
        workings: the container and what acts on it.
        starting: refuses what could not be started again.
        configured: the configured side of the instance, with the image of its template.
        override: the stored choice, None for the image of the template.
        changed: called after a restart was requested, with the condition before it and the reason.

    Attributes:
        override: the choice that is in force.
    """

    def __init__(
        self,
        workings: Workings,
        starting: Starting,
        *,
        configured: InstanceSpec,
        override: ImageOverride | None,
        changed: Callable[[Condition, str], None],
    ) -> None:
        self._w = workings
        self._starting = starting
        self._configured = configured
        self._changed = changed
        self.override = override
        self._w.remedy = self._remedy()

    @property
    def image(self) -> str:
        """The image of the next container."""
        return self._w.template.image

    @property
    def in_force(self) -> ImageInForce | None:
        """The choice, and the image that a roll-back returns to; None where there is no choice."""
        template = self._configured.template
        return shown_override(self.override, template.image) if template is not None else None

    @property
    def has_container(self) -> bool:
        """Return whether a container runs, as of the last inspection."""
        return self._w.condition.state.is_alive

    @property
    def is_stopped(self) -> bool:
        """Return whether nothing runs, nothing has failed and nothing was requested."""
        state = self._w.condition.state
        return state.phase is Phase.STOPPED and state.intent is None

    @property
    def can_restart(self) -> bool:
        """Return whether there is something to replace; a start does for the rest."""
        state = self._w.condition.state
        return state.is_alive or state.intent is not None or state.occupies

    def effective(self, configured: InstanceSpec) -> InstanceSpec:
        """Take over a new configured side; return it with the image that is in force."""
        self._configured = configured
        spec = with_image(configured, self.override)
        if spec.template is not None:
            self._w.template = spec.template
        self._w.remedy = self._remedy()
        return spec

    def choose(self, override: ImageOverride | None) -> InstanceSpec:
        """Use another image from the next start on, None for that of the template; return as `effective`."""
        self.override = override
        return self.effective(self._configured)

    def refuse(self) -> None:
        """Raise the error that keeps the container from being replaced now.

        Raises:
            ManagerError: it is out of service, or could not be started again.
        """
        w, state = self._w, self._w.condition.state
        if state.drained is not None:
            raise w.out_of_service(state.drained)
        if not w.engine_up or not state.is_listed:
            raise w.engine_away()
        self._starting.refuse_unusable()

    def begin(self, detail: str) -> None:
        """Request a new container, without waiting; open requests end first."""
        before = self._w.condition.state
        self._w.condition.apply(RestartRequested())
        self._changed(before, detail)

    async def ended(self) -> None:
        """Wait until the instance is ready again.

        Raises:
            ManagerError: it could not be stopped or started, was cancelled, or is out of service.
        """
        state = self._w.condition.state
        if state.drained is not None:
            raise self._w.out_of_service(state.drained)
        if state.usable_endpoint is None:
            await self._w.condition.starters.outcome()

    def _remedy(self) -> str:
        chosen = self.in_force
        if chosen is None:
            return ""
        command = f"ollama-manager rollback {self._w.id}"
        return f"; `{command}` goes back from {chosen.image} to {chosen.previous}"
