from __future__ import annotations

import pytest

from manager.domain.backoff import CAP_S, FIRST_S, STABLE_S, delay_s, failures_left


def test_nothing_failed_means_no_wait() -> None:
    assert delay_s(0) == 0.0
    assert delay_s(-1) == 0.0


def test_the_wait_doubles_from_one_second() -> None:
    assert [delay_s(failures) for failures in range(1, 6)] == [FIRST_S, 2.0, 4.0, 8.0, 16.0]


@pytest.mark.parametrize("failures", [10, 33, 1024, 10**9])
def test_the_wait_never_exceeds_five_minutes(failures: int) -> None:
    assert delay_s(failures) == CAP_S == 300.0


def test_the_wait_never_shrinks_with_more_failures() -> None:
    waits = [delay_s(failures) for failures in range(50)]
    assert waits == sorted(waits)


@pytest.mark.parametrize(("ran_s", "left"), [(0.0, 3), (STABLE_S - 0.1, 3), (STABLE_S, 0), (1e9, 0)])
def test_failures_are_forgotten_once_a_server_has_run_for_a_while(ran_s: float, left: int) -> None:
    assert failures_left(3, ran_s) == left
