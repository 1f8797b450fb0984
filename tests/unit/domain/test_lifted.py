"""An order that lifts deny rules."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from manager.domain.lifted import Lifted, lifted_from

NOON = datetime(2026, 8, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize("reason", [None, "maintenance"])
def test_what_is_stored_is_read_again(reason: str | None) -> None:
    lifted = Lifted(NOON, NOON + timedelta(hours=2), reason)
    assert lifted_from(json.loads(json.dumps(lifted.stored()))) == lifted


def test_it_passes_at_its_end() -> None:
    lifted = Lifted(NOON, NOON + timedelta(hours=2))
    assert not lifted.has_passed(NOON + timedelta(minutes=119))
    assert lifted.has_passed(NOON + timedelta(hours=2))


@pytest.mark.parametrize(
    "stored",
    [{}, {"since": "x", "until": NOON.isoformat(), "reason": None}, {"since": 1, "until": 2, "reason": 3}],
)
def test_anything_else_is_an_error_that_tells_a_corrupt_registry(stored: dict[str, Any]) -> None:
    with pytest.raises((LookupError, TypeError, ValueError)):
        lifted_from(stored)
