"""Breakers for tests of other things."""

from __future__ import annotations

from datetime import UTC, datetime
from time import monotonic
from types import SimpleNamespace
from typing import Any, cast

from manager.domain.breaker import BreakerLimits
from manager.services.routing.breakers import Breakers
from manager.services.world import Revision


def quiet_breakers() -> Breakers:
    """Return breakers whose events nobody reads and whose open time nothing ends."""
    return Breakers(
        cast("Any", SimpleNamespace(record=lambda *_, **__: None)),
        Revision(),
        limits=BreakerLimits(),
        now=monotonic,
        utcnow=lambda: datetime.now(UTC),
        call_later=lambda _delay_s, _call: SimpleNamespace(cancel=lambda: None),
    )
