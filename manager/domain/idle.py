"""When an instance counts as idle. Times are seconds on one monotonic clock."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime  # noqa: TC003  (a field type, resolved at run time by tools)


def ttl_remaining_s(
    *,
    now: float,
    ttl_s: float,
    pinned: bool,
    in_flight: int,
    last_use: float | None,
) -> float | None:
    """Seconds until the instance may be stopped; 0 means now, None means its clock does not run.

    The clock starts at `last_use` (ready, the last release, or use seen from outside) and stands still
    while a lease is open: what counts is leases, not arrivals.
    """
    if pinned or ttl_s <= 0 or in_flight > 0 or last_use is None:
        return None
    return max(0.0, last_use + ttl_s - now)


@dataclass(frozen=True, slots=True)
class UsageSample:
    """The work of a container up to a moment, in counters that only grow.

    `network_bytes` is all traffic in both directions, `own_bytes` what our own probes may have caused of
    it, `cpu_s` processor time, `expirations` the models in memory with their `expires_at`.
    """

    at: float
    network_bytes: int
    own_bytes: int
    cpu_s: float
    expirations: tuple[tuple[str, datetime | None], ...]


# Address resolution, neighbour discovery and TCP keep-alive, measured on idle containers: well below 100 B/s.
_NETWORK_NOISE_BYTES = 600
_NETWORK_NOISE_BYTES_PER_S = 100.0

# An idle server stays below 1 % of one core even while it is probed; one that answers uses whole cores.
_IDLE_CPU_SHARE = 0.05
_IDLE_CPU_S = 0.05


def was_used(before: UsageSample, after: UsageSample) -> bool:
    """Whether somebody other than us used the server between two samples.

    A merely loaded model is not use. A counter that shrank belongs to a new process: that is no use
    either. A model that left memory (expired) is not use; one that came, or whose expiry moved, is.
    """
    elapsed_s = max(0.0, after.at - before.at)
    known = dict(before.expirations)
    if any(name not in known or known[name] != expiry for name, expiry in after.expirations):
        return True
    foreign = (after.network_bytes - before.network_bytes) - (after.own_bytes - before.own_bytes)
    if foreign > _NETWORK_NOISE_BYTES + _NETWORK_NOISE_BYTES_PER_S * elapsed_s:
        return True
    return after.cpu_s - before.cpu_s > _IDLE_CPU_S + _IDLE_CPU_SHARE * elapsed_s
