"""The next action for one instance: the core decides, the supervisor acts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from manager.domain.instance import Phase, Target
from manager.domain.registry import Operation

# A CPU fallback that comes back after a recreation is not going to be mended by another one soon.
RECREATE_PAUSE_S = 600.0
# An instance in use is looked at again this late at the earliest.
_LEAST_QUIET_S = 1.0


@dataclass(frozen=True, slots=True)
class Situation:
    """All that the decision depends on. Times are seconds on one monotonic clock.

    `intent` is the operation that was asked for and is not finished. `retry_at` keeps a failed operation
    from being repeated at once. `look_at` is when to see what has become of the container.
    `bury_at` is when a container that has ended may be removed. `recreate_at` is when a container that
    should be replaced (outdated, or fallen back to the CPU) may be; None where there is nothing of the kind.
    `unused_since` is the time of the last use, None while the instance is in use. A container is replaced
    when it was unused for `quiet_s`.
    """

    now: float
    engine_up: bool
    target: Target
    phase: Phase
    intent: Operation | None
    retry_at: float
    look_at: float | None
    bury_at: float | None
    recreate_at: float | None
    unused_since: float | None
    quiet_s: float


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do for `for_s` seconds, or (None) until something changes."""

    for_s: float | None


@dataclass(frozen=True, slots=True)
class Look:
    """Ask the engine what has become of the container."""


@dataclass(frozen=True, slots=True)
class Start:
    """Bring the container up, or wait for the one that runs to be ready."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End the container and remove it."""


@dataclass(frozen=True, slots=True)
class Recreate:
    """End the container in order to start a better one."""


@dataclass(frozen=True, slots=True)
class Bury:
    """Remove a container that ended some time ago."""


Action: TypeAlias = Wait | Look | Start | Stop | Recreate | Bury


def next_action(s: Situation) -> Action:
    """The one next thing to do. Without an engine there is none: everything waits for it to come back."""
    if not s.engine_up:
        return Wait(None)
    if s.intent is not None:
        plans: list[tuple[float | None, Action]] = [
            (s.retry_at, Start() if s.intent is Operation.START else Stop())
        ]
    else:
        restart_at = s.retry_at if s.phase is Phase.FAILED and s.target is Target.RUNNING else None
        recreate_at = _recreate_at(s)
        plans = [(s.look_at, Look()), (restart_at, Start()), (s.bury_at, Bury()), (recreate_at, Recreate())]
    dated = [(at, action) for at, action in plans if at is not None]
    for at, action in dated:  # what stands first goes first
        if at <= s.now:
            return action
    return Wait(min(at for at, _ in dated) - s.now if dated else None)


def _recreate_at(s: Situation) -> float | None:
    """When the container may be replaced; None where there is no reason to.

    An instance in use is quiet `quiet_s` after now at the earliest. That bound makes a due replacement
    independent of any notice of the last release.
    """
    if s.phase is not Phase.READY or s.recreate_at is None:
        return None
    if s.unused_since is None:
        quiet_at = s.now + max(s.quiet_s, _LEAST_QUIET_S)
    else:
        quiet_at = s.unused_since + s.quiet_s
    return max(s.recreate_at, quiet_at)
