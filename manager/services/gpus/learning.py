"""The GPU memory that each model has really taken, measured and remembered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from manager.domain.gpu import agree, is_news
from manager.domain.models import model_key
from manager.domain.registry import LearnedSize
from manager.errors import RegistryUnwritableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from manager.domain.instance import Model
    from manager.services.ports import Registry

_MOST_SIZES = 4096


@dataclass(frozen=True, slots=True)
class _Measurement:
    models: tuple[tuple[str, str], ...]
    used_bytes: int | None

    def confirms(self, other: _Measurement | None) -> bool:
        """Whether nothing has changed since the other one: no load goes on, no process is on its way out."""
        if other is None or self.models != other.models:
            return False
        if self.used_bytes is None or other.used_bytes is None:
            return self.used_bytes is other.used_bytes
        return agree(self.used_bytes, other.used_bytes)


class Learned:
    """Owns the learned sizes: at most `_MOST_SIZES`, of which the oldest is forgotten first."""

    def __init__(self, registry: Registry, *, utcnow: Callable[[], datetime]) -> None:
        self._registry = registry
        self._utcnow = utcnow
        self._sizes: dict[tuple[str, str, str], LearnedSize] = {}
        self._last: dict[str, _Measurement] = {}

    async def load(self) -> None:
        """Read what earlier runs have stored."""
        stored = sorted(await self._registry.learned_sizes(), key=lambda size: size.measured_at)
        self._sizes = {(s.instance, s.model, s.digest): s for s in stored[-_MOST_SIZES:]}

    async def measure(self, instance: str, models: Sequence[Model], used_bytes: int | None) -> bool:
        """Take in what an instance holds with these models in memory; whether the last measurement agrees.

        A size is learned where one model is in memory, all of it on the card, and two measurements in a row
        agree: a load that goes on, or the end of another model, would be counted otherwise.
        """
        measurement = _Measurement(tuple(sorted((one.name, one.digest) for one in models)), used_bytes)
        is_stable = measurement.confirms(self._last.get(instance))
        self._last[instance] = measurement
        if is_stable and used_bytes and len(models) == 1 and 0 < models[0].size_bytes <= models[0].vram_bytes:
            await self._learn(instance, models[0], used_bytes)
        return is_stable

    def forget_measurement(self, instance: str) -> None:
        """The instance has ended: what it held last says nothing of what follows."""
        self._last.pop(instance, None)

    def of_start(self, instance: str) -> int:
        """The size of the model that was learned last on an instance; 0 where none was."""
        return _newest([size for size in self._sizes.values() if size.instance == instance])

    def here(self, instance: str, model: str, digest: str | None) -> int:
        """The learned size of a model on an instance; 0 where it is unknown.

        The digest tells which names are of one model, and that a name is of another model than before.
        """
        sizes = [one for one in self._sizes.values() if one.instance == instance]
        if digest is None:
            key = model_key(model)
            return _newest([one for one in sizes if model_key(one.model) == key])
        return max((one.vram_bytes for one in sizes if one.digest == digest), default=0)

    def elsewhere(self, digest: str | None) -> int:
        """The least that a model took on any instance; 0 where it is unknown."""
        sizes = self._sizes.values() if digest is not None else ()
        return min((one.vram_bytes for one in sizes if one.digest == digest), default=0)

    async def _learn(self, instance: str, model: Model, used_bytes: int) -> None:
        key = instance, model.name, model.digest
        known = self._sizes.get(key)
        now = self._utcnow()
        known_bytes, known_at = (known.vram_bytes, known.measured_at) if known else (None, None)
        if not is_news(used_bytes, now, known_bytes, known_at):
            return
        size = LearnedSize(instance, model.name, model.digest, used_bytes, now)
        self._sizes.pop(key, None)
        self._sizes[key] = size
        if len(self._sizes) > _MOST_SIZES:
            del self._sizes[next(iter(self._sizes))]
        try:
            await self._registry.save_learned_size(size)
        except RegistryUnwritableError:
            return  # known in memory; the next different measurement is stored again


def _newest(sizes: Sequence[LearnedSize]) -> int:
    return max(sizes, key=lambda size: size.measured_at).vram_bytes if sizes else 0
