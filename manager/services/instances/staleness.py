"""Containers that should be replaced when nobody uses them: an older template, or a GPU that was lost."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from manager.domain.container import LABEL_DEVICE, LABEL_HASH, device_text
from manager.domain.instance import Explanation
from manager.domain.models import model_key
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
# A model may be listed before its process has memory, and for a moment after that has gone.
_WITHOUT_MEMORY_S = 5.0
# A request for the CPU is remembered while its model is listed, and for this time, as it may yet be loaded.
_LOAD_S = 300.0
_MOST_CPU_REQUESTS = 64


class Staleness:
    """Owns the answer to "should this container be replaced, and why"."""

    def __init__(self, world: World, instance: str) -> None:
        self._world = world
        self._instance = instance
        self._device_unproven = False
        self._not_before = 0.0
        self._without_memory_since: float | None = None
        self._cpu_requests: dict[str, float] = {}
        self._other_cards: Explanation | None = None
        self.why: Explanation | None = None

    def expect_on_cpu(self, model: str) -> None:
        """A request asks for a model to be computed by the processor: that is no fault of the container."""
        key = model_key(model)
        self._cpu_requests.pop(key, None)
        if len(self._cpu_requests) >= _MOST_CPU_REQUESTS:
            del self._cpu_requests[next(iter(self._cpu_requests))]
        self._cpu_requests[key] = self._world.now()

    def fresh(self, container: ContainerFacts, *, wanted_hash: str | None, on_gpu: bool) -> None:
        """A container has become ready.

        Args:
            container: what it is.
            wanted_hash: the template hash it would have if it were made now, None when nobody can tell.
            on_gpu: it is bound to a card, which is to be proven.
        """
        self.clear()
        self._not_before = 0.0
        self._device_unproven = on_gpu
        if wanted_hash is not None and container.labels.get(LABEL_HASH) != wanted_hash:
            self.why = Explanation(
                Reason.TEMPLATE_OUTDATED,
                f"{container.name} was made from an older template; it is recreated when idle",
            )

    def clear(self) -> None:
        self.why = self._other_cards = None
        self._device_unproven = False
        self._without_memory_since = None
        self._cpu_requests.clear()

    def compare_cards(self, container: ContainerFacts, uuids: Sequence[str]) -> bool:
        """Compare the cards of a container with those that a new one would get.

        Args:
            container: the one that runs.
            uuids: the cards of a new one; none where it would not start.

        Returns:
            True when a difference was found just now.
        """
        made_for, wanted = container.labels.get(LABEL_DEVICE), device_text(uuids)
        if made_for is None or wanted is None or made_for == wanted:
            if self._other_cards is not None and self.why is self._other_cards:
                self.why = None
            self._other_cards = None
            return False
        if self._other_cards is not None:
            return False
        self._other_cards = Explanation(
            Reason.TEMPLATE_OUTDATED,
            f"{container.name} was made for {made_for}, and its cards are {wanted} by now; "
            "it is recreated when idle",
        )
        if self.why is None or self.why.code is Reason.TEMPLATE_OUTDATED:
            self.why = self._other_cards
        return True

    def card_was_lost(self, message: str) -> None:
        """The card of the container was lost and is back: only a new container can use it."""
        self.why = Explanation(Reason.GPU_MISSING, f"{message}, for a while; it is recreated when idle")

    async def prove_device(self, container: ContainerFacts, models: Sequence[Model]) -> bool:
        """Look for signs that a GPU container computes on the CPU; True when one was found just now."""
        how = None
        if self._has_model_on_cpu(models):
            how = "a loaded model has no byte in GPU memory"
        elif await self._is_without_memory(models):
            # The server may go on to report what it allocated once (seen with Ollama 0.24).
            how = "a model is loaded, and no process of the container holds memory on the card"
        elif self._device_unproven and await self._log_names_cpu(container):
            how = "its log names the CPU as its only device"
        if how is None or (self.why is not None and self.why.code in _DEVICE_REASONS):
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

    def wait(self, pause_s: float) -> None:
        """Do not replace the container for so long: other gateways use it."""
        self._not_before = self._world.now() + pause_s

    def recreate_at(self, recreated_at: datetime | None) -> float | None:
        """From when on the container may be replaced, None when there is no reason to."""
        if self.why is None:
            return None
        if self.why.code is not Reason.GPU_FALLBACK or recreated_at is None:
            return self._not_before
        ago_s = (self._world.utcnow() - recreated_at).total_seconds()
        return max(self._not_before, self._world.now() - ago_s + RECREATE_PAUSE_S)

    # --- helpers ---

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

    def _has_model_on_cpu(self, models: Sequence[Model]) -> bool:
        """Whether a model is computed by the processor although no request has asked for that.

        Where another model of the container holds memory on the card, the container has its card.
        """
        listed = {model_key(model.name): model for model in models}
        oldest = self._world.now() - _LOAD_S
        self._cpu_requests = {
            key: at for key, at in self._cpu_requests.items() if key in listed or at >= oldest
        }
        on_cpu = [key for key, model in listed.items() if model.size_bytes > 0 and model.vram_bytes == 0]
        if all(key in self._cpu_requests for key in on_cpu):
            return False
        return self._world.gpus.holds_memory(self._instance) is not True

    async def _is_without_memory(self, models: Sequence[Model]) -> bool:
        """Whether no process has held memory on the card for a while, with a model that should."""
        if not any(model.vram_bytes > 0 for model in models):
            self._without_memory_since = None
            return False
        if self._world.gpus.holds_memory(self._instance) is False:
            await self._world.gpus.refresh()  # the last reading may be older than the load
        if self._world.gpus.holds_memory(self._instance) is not False:
            self._without_memory_since = None
            return False
        now = self._world.now()
        if self._without_memory_since is None:
            self._without_memory_since = now
        return now - self._without_memory_since >= _WITHOUT_MEMORY_S
