"""Overload: instances that refuse requests for now, and models that have become slow on an instance.

Both only put an instance behind others that are available. No request fails because of them. The speeds of
models are kept beside them, for scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from manager.domain.latency import is_slow, with_speed, with_value
from manager.domain.overload import Overloads

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager.domain.latency import Latency
    from manager.services.world import Revision

_log = structlog.get_logger("routing")

# Ollama's full queue is a 503 without Retry-After; it may have room a moment later.
_SATURATED_S = 1.0
_MOST_SATURATED_S = 30.0
# Pairs of an instance and a model whose times are kept; at the bound the one used longest ago is forgotten.
_MOST_LATENCIES = 4096


class Overload:
    """Owns what is known of the load of instances. A change advances the revision of the fleet.

    Args:
        revision: of the fleet.
        now: seconds on a monotonic clock.
        expected_ms: the time to the first token that the operator expects of a model (its key); None where
            it is not stated, and what is usual counts.
    """

    def __init__(
        self,
        revision: Revision,
        *,
        now: Callable[[], float],
        expected_ms: Callable[[str], float | None] = lambda _key: None,
    ) -> None:
        self._expected_ms = expected_ms
        self._revision = revision
        self._now = now
        self._saturated_until: dict[str, float] = {}
        self._latencies: dict[tuple[str, str], Latency] = {}
        self._speeds: dict[tuple[str, str], float] = {}
        # The models that are slow, by instance.
        self._slow: dict[str, set[str]] = {}

    def saturated(self, instance: str, for_s: float | None) -> None:
        """Take in that a server refused a request because of its load.

        Args:
            instance: its id.
            for_s: the server's Retry-After; None where it gave none.
        """
        now = self._now()
        wait_s = _SATURATED_S if for_s is None else min(max(for_s, 0.0), _MOST_SATURATED_S)
        known = self._saturated_until.get(instance, now)
        if known <= now:
            self._revision.advance()
            _log.info("saturated", instance=instance, for_s=wait_s)
        self._saturated_until[instance] = max(known, now + wait_s)

    def first_token(self, instance: str, key: str, value_ms: float) -> None:
        """Take in how long a model that was loaded took to its first token.

        Args:
            instance: where.
            key: of the model (`model_key`).
            value_ms: from the request's sending to the head of the answer.
        """
        place, now = (instance, key), self._now()
        latency = with_value(self._latencies.pop(place, None), value_ms, now)
        if len(self._latencies) >= _MOST_LATENCIES:
            self._forget(next(iter(self._latencies)))
        self._latencies[place] = latency
        slow = is_slow(latency, now, self._expected_ms(key))
        if slow is not (key in self._slow.get(instance, ())):
            self._mark(instance, key, slow=slow)
            if slow:
                _log.info("slow", instance=instance, model=key, detail=self._words(key, latency))

    def recent_ms(self, instance: str, key: str) -> float | None:
        """Return the recent time to the first token of a model on an instance; None where there is none.

        Loads are in no such time, and neither are answers in one piece.
        """
        latency = self._latencies.get((instance, key))
        return None if latency is None else round(latency.recent_ms, 1)

    def generated(self, instance: str, key: str, tokens: int, duration_s: float) -> None:
        """Take in how long a model took for the tokens after the first one.

        Args:
            instance: where.
            key: of the model (`model_key`).
            tokens: of the answer.
            duration_s: from the head of the answer to its end.
        """
        place = instance, key
        speed = with_speed(self._speeds.pop(place, None), tokens, duration_s)
        if speed is None:
            return
        if len(self._speeds) >= _MOST_LATENCIES:
            del self._speeds[next(iter(self._speeds))]
        self._speeds[place] = speed

    def tokens_per_s(self, instance: str, key: str) -> float | None:
        """Return the recent speed of a model on an instance; None where nothing has streamed there."""
        speed = self._speeds.get((instance, key))
        return None if speed is None else round(speed, 1)

    def server_changed(self, instance: str) -> None:
        """Take in that an instance has another server: the load of the old one is over."""
        self._saturated_until.pop(instance, None)
        for key in self._slow.pop(instance, ()):
            latency = self._latencies[instance, key]
            self._latencies[instance, key] = latency._replace(recent_ms=latency.usual_ms)

    def of(self, instance: str) -> Overloads | None:
        """Return the overload of an instance; None where there is none."""
        until, slow = self._saturated_until.get(instance), self._slow.get(instance)
        if until is None and slow is None:
            return None
        now, refuses = self._now(), ""
        if until is not None and until > now:
            refuses = "the server has too many requests"
        elif until is not None:
            del self._saturated_until[instance]
        found = {}
        for key in tuple(slow or ()):
            latency = self._latencies[instance, key]
            if is_slow(latency, now, self._expected_ms(key)):
                found[key] = self._words(key, latency)
            else:
                self._mark(instance, key, slow=False)
        return Overloads(refuses, found) if refuses or found else None

    def _mark(self, instance: str, key: str, *, slow: bool) -> None:
        self._revision.advance()
        keys = self._slow.setdefault(instance, set())
        if slow:
            keys.add(key)
        else:
            keys.discard(key)
        if not keys:
            del self._slow[instance]

    def _forget(self, place: tuple[str, str]) -> None:
        del self._latencies[place]
        instance, key = place
        if key in self._slow.get(instance, ()):
            self._mark(instance, key, slow=False)

    def _words(self, key: str, latency: Latency) -> str:
        expected_ms = self._expected_ms(key)
        usual = f"usually {latency.usual_ms:.0f}" if expected_ms is None else f"expected {expected_ms:.0f}"
        return f"first token after {latency.recent_ms:.0f} ms of late, {usual} ms"
