"""Containers that should be replaced when nobody uses them: an older template, or a GPU that was lost."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from manager.domain.container import LABEL_HASH
from manager.domain.instance import Explanation
from manager.domain.reconcile import RECREATE_PAUSE_S
from manager.errors import EngineError, Reason
from manager.wire.ollama_log import fell_back_to_cpu

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from manager.domain.instance import ContainerFacts, Model
    from manager.services.world import World

# GPU discovery ends within this time after the start of a container; its verdict is in the log then.
_DISCOVERY = timedelta(minutes=2)
_DEVICE_REASONS = (Reason.GPU_FALLBACK, Reason.GPU_MISSING)


class Staleness:
    """Owns the answer to "should this container be replaced, and why"."""

    def __init__(self, world: World, instance: str) -> None:
        self._world = world
        self._instance = instance
        self._device_unproven = False
        self._not_before = 0.0
        self.why: Explanation | None = None

    def fresh(self, container: ContainerFacts, *, wanted_hash: str | None, on_gpu: bool) -> None:
        """A container has become ready.

        Args:
            container: what it is.
            wanted_hash: the template hash it would have if it were made now, None when nobody can tell.
            on_gpu: it is bound to a card, which is to be proven.
        """
        self.why = None
        self._not_before = 0.0
        self._device_unproven = on_gpu
        if wanted_hash is not None and container.labels.get(LABEL_HASH) != wanted_hash:
            self.why = Explanation(
                Reason.TEMPLATE_OUTDATED,
                f"{container.name} was made from an older template; it is recreated when idle",
            )

    def clear(self) -> None:
        self.why = None
        self._device_unproven = False

    def card_was_lost(self, message: str) -> None:
        """The card of the container was lost and is back: only a new container can use it."""
        self.why = Explanation(Reason.GPU_MISSING, f"{message}, for a while; it is recreated when idle")

    async def prove_device(self, container: ContainerFacts, models: Sequence[Model]) -> bool:
        """Look for signs that a GPU container computes on the CPU; True when one was found just now."""
        how = None
        if any(model.size_bytes > 0 and model.vram_bytes == 0 for model in models):
            how = "a loaded model has no byte in GPU memory"
        elif self._device_unproven and await self._log_names_cpu(container):
            how = "its log names the CPU as its only device"
        if how is None or (self.why is not None and self.why.code in _DEVICE_REASONS):
            return False
        self.why = Explanation(
            Reason.GPU_FALLBACK,
            f"{self._instance} is bound to a GPU but runs on the CPU: {how}; it is recreated when idle",
        )
        return True

    async def _log_names_cpu(self, container: ContainerFacts) -> bool:
        began = container.started_at
        if began is None:
            self._device_unproven = False
            return False
        until = began + _DISCOVERY
        try:
            lines = await self._world.engine.logs_between(container.id, began, until)
        except EngineError:
            return False
        verdict = fell_back_to_cpu(lines)
        # Discovery may end after the server answers: no line yet is no proof.
        self._device_unproven = verdict is None and self._world.utcnow() < until
        return bool(verdict)

    def postpone(self, image: str, pause_s: float) -> None:
        """The better container could not be made: its image is not there."""
        self._not_before = self._world.now() + pause_s
        note = f", once image {image} has been pulled"
        if self.why is not None and not self.why.message.endswith(note):
            self.why = replace(self.why, message=self.why.message + note)

    def recreate_at(self, recreated_at: datetime | None) -> float | None:
        """From when on the container may be replaced, None when there is no reason to."""
        if self.why is None:
            return None
        if self.why.code is not Reason.GPU_FALLBACK or recreated_at is None:
            return self._not_before
        ago_s = (self._world.utcnow() - recreated_at).total_seconds()
        return max(self._not_before, self._world.now() - ago_s + RECREATE_PAUSE_S)
