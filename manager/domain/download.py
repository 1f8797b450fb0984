"""The progress of a download that comes in layers. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

# A speed is that of so many seconds; a sample is kept for each tenth of them.
_WINDOW_S = 5.0
_SAMPLES = 10
# A model has about five layers. Further ones count in no sum.
_MOST_LAYERS = 64


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer; `completed_bytes` of it are here."""

    digest: str
    completed_bytes: int
    total_bytes: int


class Download:
    """Adds up the layers of one download, and measures its speed.

    Bytes that were here before, from an earlier download, count as completed, and in no speed.
    """

    def __init__(self) -> None:
        self._layers: dict[str, Layer] = {}
        self._fetched_bytes = 0
        self._samples: deque[tuple[float, int]] = deque(maxlen=_SAMPLES)

    def take(self, layer: Layer, now: float) -> None:
        """Take in the state of a layer.

        Args:
            layer: as the server reports it.
            now: seconds on a monotonic clock.
        """
        before = self._layers.get(layer.digest)
        if before is None and len(self._layers) >= _MOST_LAYERS:
            return
        completed = max(0, min(layer.completed_bytes, layer.total_bytes))
        self._layers[layer.digest] = replace(layer, completed_bytes=completed)
        if before is not None:
            self._fetched_bytes += max(0, completed - before.completed_bytes)
        if not self._samples or now - self._samples[-1][0] >= _WINDOW_S / _SAMPLES:
            self._samples.append((now, self._fetched_bytes))

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers in the order in which they were begun."""
        return tuple(self._layers.values())

    @property
    def completed_bytes(self) -> int:
        return sum(layer.completed_bytes for layer in self._layers.values())

    @property
    def total_bytes(self) -> int:
        """The size of the layers that are known: a server may name one after the other."""
        return sum(layer.total_bytes for layer in self._layers.values())

    def bytes_per_s(self, now: float) -> float | None:
        """Return the speed of the last seconds; None before there is one."""
        since = next(((at, count) for at, count in self._samples if now - at <= _WINDOW_S), None)
        if since is None:
            return 0.0 if self._samples else None
        at, count = since
        return (self._fetched_bytes - count) / (now - at) if now > at else None

    def left_s(self, now: float) -> float | None:
        """Return the seconds until the known layers are here; None where the speed does not tell."""
        speed = self.bytes_per_s(now)
        return (self.total_bytes - self.completed_bytes) / speed if speed else None
