"""Times to the first token: what is usual for a model on an instance, and whether it is slow of late; speeds.

Two exponentially weighted means are compared, as Netflix' concurrency-limits does
(https://github.com/Netflix/concurrency-limits, `Gradient2Limit`).
"""

from __future__ import annotations

from typing import NamedTuple

# A recent mean follows a change within about eight values (RFC 6298, SRTT).
_RECENT_WEIGHT = 1 / 8
# The usual one has a window of about 600 values (`Gradient2Limit`, long window: 2 / (n + 1)), after a plain
# mean of the first ones, which alone are no measure of what is usual.
_USUAL_WEIGHT = 2 / 601
LEAST_VALUES = 20
LEAST_VALUES_BESIDE_EXPECTED = 4
# Twice the usual time is slow, unless nobody notices the difference. A single value counts for at most three
# times that excess: it takes four of them in a row, and one long prompt makes nothing slow.
_LEAST_EXCESS_MS = 50.0
_MOST_EXCESSES = 3.0
# Slowness is forgotten when so long nothing came, so that the instance is tried again. A server that takes
# long for each token has longer pauses between its values.
_MEMORY_S = 10.0
_MEMORY_VALUES = 5.0
# A speed of fewer tokens, or of a shorter time, says more of the network than of the model.
_LEAST_TOKENS = 8
_LEAST_DURATION_S = 0.01


class Latency(NamedTuple):
    """The times of one model on one instance: how many, and the monotonic time of the latest."""

    usual_ms: float
    recent_ms: float
    seen: int
    at: float


def with_value(before: Latency | None, value_ms: float, now: float) -> Latency:
    """Return the latency after one more value; `before` is None for the first one."""
    if before is None:
        return Latency(value_ms, value_ms, 1, now)
    usual_ms, seen = before.usual_ms, before.seen + 1
    recent_ms = usual_ms if _is_forgotten(before, now) else before.recent_ms
    weight = 1 / seen
    if seen > LEAST_VALUES:
        weight, value_ms = _USUAL_WEIGHT, min(value_ms, usual_ms + _MOST_EXCESSES * _excess_ms(usual_ms))
    return Latency(
        usual_ms + (value_ms - usual_ms) * weight,
        recent_ms + (value_ms - recent_ms) * _RECENT_WEIGHT,
        seen,
        now,
    )


def with_speed(before: float | None, tokens: int, duration_s: float) -> float | None:
    """Return the recent tokens/s after one more answer, as a mean that follows a change within eight values.

    An answer that is too short to measure changes nothing. `before` is None for the first one.
    """
    if tokens < _LEAST_TOKENS or duration_s < _LEAST_DURATION_S:
        return before
    speed = (tokens - 1) / duration_s  # the time begins with the first token
    return speed if before is None else before + (speed - before) * _RECENT_WEIGHT


def is_slow(latency: Latency, now: float, expected_ms: float | None = None) -> bool:
    """Return whether the recent times are more than twice the usual ones, or those that are expected.

    What is expected is stated, so that fewer values are enough.
    """
    usual_ms = latency.usual_ms if expected_ms is None else expected_ms
    return (
        latency.recent_ms - usual_ms > _excess_ms(usual_ms)
        and latency.seen >= (LEAST_VALUES if expected_ms is None else LEAST_VALUES_BESIDE_EXPECTED)
        and not _is_forgotten(latency, now)
    )


def _excess_ms(usual_ms: float) -> float:
    """Return by how much a recent time may exceed the usual one."""
    return max(usual_ms, _LEAST_EXCESS_MS)


def _is_forgotten(latency: Latency, now: float) -> bool:
    return now - latency.at > max(_MEMORY_S, _MEMORY_VALUES * latency.recent_ms / 1000)
