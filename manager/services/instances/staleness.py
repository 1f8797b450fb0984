"""Containers that should be replaced when nobody uses them: an older template, or a GPU that was lost."""

from __future__ import annotations

from dataclasses import replace
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

_LOG_LINES = 200


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

    async def prove_device(self, container: ContainerFacts, models: Sequence[Model]) -> bool:
        """Look for signs that a GPU container computes on the CPU; True when one was found just now."""
        how = None
        if any(model.size_bytes > 0 and model.vram_bytes == 0 for model in models):
            how = "a loaded model has no byte in GPU memory"
        elif self._device_unproven:
            try:
                verdict = fell_back_to_cpu(await self._world.engine.logs(container.id, _LOG_LINES))
            except EngineError:
                return False
            # Discovery may end after the server answers: no line yet is no proof.
            self._device_unproven = verdict is None
            how = "its log names the CPU as its only device" if verdict else None
        if how is None or (self.why is not None and self.why.code is Reason.GPU_FALLBACK):
            return False
        self.why = Explanation(
            Reason.GPU_FALLBACK,
            f"{self._instance} is bound to a GPU but runs on the CPU: {how}; it is recreated when idle",
        )
        return True

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
