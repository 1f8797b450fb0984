"""The GPU memory that each model has really taken, on each card, measured and remembered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from manager.domain.gpu import agree, is_news
from manager.domain.models import model_key
from manager.domain.registry import LearnedSize
from manager.errors import RegistryUnwritableError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from datetime import datetime

    from manager.domain.instance import Model
    from manager.services.ports import Registry

_MOST_SIZES = 4096


@dataclass(frozen=True, slots=True)
class _Measurement:
    """The models that an instance had in memory, and what it held by the UUID of each of its cards."""

    models: tuple[tuple[str, str], ...]
    used: Mapping[str, int | None]

    def confirms(self, other: _Measurement | None) -> bool:
        """Whether nothing has changed since the other one: no load goes on, no process is on its way out."""
        if other is None or self.models != other.models or self.used.keys() != other.used.keys():
            return False
        return all(_agree(used, other.used[uuid]) for uuid, used in self.used.items())


class Learned:
    """Owns the learned sizes: at most `_MOST_SIZES`, of which the oldest is forgotten first."""

    def __init__(self, registry: Registry, *, utcnow: Callable[[], datetime]) -> None:
        self._registry = registry
        self._utcnow = utcnow
        self._sizes: dict[tuple[str, str, str], LearnedSize] = {}
        self._last: dict[str, _Measurement] = {}
        self.version = 0  # grows with each size that is learned

    async def load(self) -> None:
        """Read what earlier runs have stored."""
        stored = sorted(await self._registry.learned_sizes(), key=lambda size: size.measured_at)
        self._sizes = {(s.instance, s.model, s.digest): s for s in stored[-_MOST_SIZES:]}

    async def measure(self, instance: str, models: Sequence[Model], used: Mapping[str, int | None]) -> bool:
        """Take in what an instance holds with these models in memory; whether the last measurement agrees.

        A size is learned where one model is in memory, all of it on cards, and two measurements in a row
        agree on each card: a load that goes on, or the end of another model, would be counted otherwise.

        Args:
            instance: the instance.
            models: those that its server has in memory.
            used: what it holds, by the UUID of each of its cards; None where that is unknown.
        """
        measurement = _Measurement(tuple(sorted((one.name, one.digest) for one in models)), used)
        is_stable = measurement.confirms(self._last.get(instance))
        self._last[instance] = measurement
        known = {uuid: held for uuid, held in used.items() if held is not None}
        is_whole = len(models) == 1 and 0 < models[0].size_bytes <= models[0].vram_bytes
        if is_stable and is_whole and len(known) == len(used) and any(known.values()):
            await self._learn(instance, models[0], known)
        return is_stable

    def forget_measurement(self, instance: str) -> None:
        """The instance has ended: what it held last says nothing of what follows."""
        self._last.pop(instance, None)

    def of_start(self, instance: str, uuids: Collection[str]) -> LearnedSize | None:
        """Return the size that was learned last on an instance; None where none was on these cards."""
        return _newest(self._on(instance, uuids))

    def here(
        self, instance: str, model: str, digest: str | None, uuids: Collection[str]
    ) -> LearnedSize | None:
        """Return the learned size of a model on an instance with these cards; None where it is unknown.

        The digest tells which names are of one model, and that a name is of another model than before.
        """
        sizes = self._on(instance, uuids)
        if digest is None:
            key = model_key(model)
            return _newest([one for one in sizes if model_key(one.model) == key])
        sizes = [one for one in sizes if one.digest == digest]
        return max(sizes, key=lambda size: size.vram_bytes, default=None)

    def elsewhere(self, digest: str | None) -> int:
        """The least that a model took on any instance; 0 where it is unknown."""
        sizes = self._sizes.values() if digest is not None else ()
        return min((one.vram_bytes for one in sizes if one.digest == digest), default=0)

    def _on(self, instance: str, uuids: Collection[str]) -> list[LearnedSize]:
        return [one for one in self._sizes.values() if one.instance == instance and _is_of(one, uuids)]

    async def _learn(self, instance: str, model: Model, used: Mapping[str, int]) -> None:
        key, used_bytes = (instance, model.name, model.digest), sum(used.values())
        known = self._sizes.get(key)
        if known is not None and not _is_of(known, used):
            known = None  # the instance has other cards by now
        now = self._utcnow()
        known_bytes, known_at = (known.vram_bytes, known.measured_at) if known else (None, None)
        if not is_news(used_bytes, now, known_bytes, known_at):
            return
        by_card = used if len(used) > 1 else {}
        size = LearnedSize(instance, model.name, model.digest, used_bytes, now, by_card)
        self._sizes.pop(key, None)
        self._sizes[key] = size
        self.version += 1
        if len(self._sizes) > _MOST_SIZES:
            del self._sizes[next(iter(self._sizes))]
        try:
            await self._registry.save_learned_size(size)
        except RegistryUnwritableError:
            return  # known in memory; the next different measurement is stored again


def _newest(sizes: Sequence[LearnedSize]) -> LearnedSize | None:
    return max(sizes, key=lambda size: size.measured_at, default=None)


def _is_of(size: LearnedSize, uuids: Collection[str]) -> bool:
    """Return whether a size was measured on these cards; a size of one card is one of any card."""
    return set(size.by_card) == set(uuids) if size.by_card else len(uuids) <= 1


def _agree(one: int | None, other: int | None) -> bool:
    return one is other if one is None or other is None else agree(one, other)
