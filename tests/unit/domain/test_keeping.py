"""When a model that is to stay in memory is loaded, and when it is left alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from manager.domain.keeping import Keeping, is_kept
from manager.errors import Reason

NOON = datetime(2026, 8, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("left", "kept"), [(None, True), (3600.0, True), (61.0, True), (60.0, False), (-5.0, False)]
)
def test_a_time_in_memory_that_ends_soon_is_renewed(left: float | None, kept: bool) -> None:
    expires_at = None if left is None else NOON + timedelta(seconds=left)
    assert is_kept(expires_at, NOON) is kept


def test_a_load_that_fails_is_tried_again_after_a_growing_pause() -> None:
    keeping, pauses = Keeping(), []
    for _ in range(12):
        keeping = keeping.failed(100.0, Reason.OVERLOADED, None)
        pauses.append(keeping.retry_at - 100.0)
    assert pauses[:4] == [1, 2, 4, 8]
    assert pauses[-1] == 300
    assert (keeping.is_kept, keeping.trouble) == (False, Reason.OVERLOADED)
    assert keeping.failed(100.0, Reason.OVERLOADED, 1000.0).retry_at == 1100.0, "as the error says"


def test_what_is_in_memory_has_no_trouble_and_its_failures_are_forgotten() -> None:
    keeping = Keeping().failed(0.0, Reason.OVERLOADED, None).loaded(5.0).kept()
    assert (keeping.is_kept, keeping.trouble, keeping.failures) == (True, None, 0)
    assert keeping.barred(Reason.HOST_DENIED).trouble is Reason.HOST_DENIED
    assert not keeping.barred(Reason.HOST_DENIED).is_kept


def test_a_model_that_leaves_memory_again_and_again_is_loaded_with_a_growing_pause() -> None:
    keeping, now, pauses = Keeping(), 1000.0, []
    for _ in range(9):
        keeping = keeping.loaded(now)
        pauses.append(keeping.retry_at - now)
        now = keeping.retry_at + 0.5
    assert pauses == [0, 1, 2, 4, 8, 16, 30, 30, 30]


def test_a_model_that_stayed_for_a_while_is_loaded_at_once() -> None:
    keeping = Keeping().loaded(0.0).loaded(1.0)
    assert keeping.retry_at == 2.0
    assert keeping.loaded(200.0).retry_at == 200.0
