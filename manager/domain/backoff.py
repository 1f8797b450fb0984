"""Back-off: the time for which a failing instance is left alone."""

from __future__ import annotations

FIRST_S = 1.0
CAP_S = 300.0


def delay_s(failures: int) -> float:
    """Seconds to wait after `failures` failures in a row: 1, 2, 4, … up to five minutes; 0 after none."""
    if failures <= 0:
        return 0.0
    # The exponent is bounded too: 2.0**1024 overflows.
    return min(CAP_S, FIRST_S * 2.0 ** min(failures - 1, 32))


# A server that ran for this long was sound: what ends it now is not the trouble it had before.
STABLE_S = 60.0


def failures_left(failures: int, ran_s: float) -> int:
    """The failures in a row that still count, after a server has run for `ran_s`."""
    return 0 if ran_s >= STABLE_S else failures
