from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from manager.domain.idle import UsageSample, ttl_remaining_s, was_used

NOW = 1000.0
EXPIRY = datetime(2026, 8, 1, 12, 0, tzinfo=UTC)
BEFORE = UsageSample(
    at=100.0, network_bytes=50_000, own_bytes=40_000, cpu_s=10.0, expirations=(("qwen3", EXPIRY),)
)


def remaining(
    *, ttl_s: float = 60.0, pinned: bool = False, in_flight: int = 0, last_use: float | None = NOW
) -> float | None:
    return ttl_remaining_s(now=NOW, ttl_s=ttl_s, pinned=pinned, in_flight=in_flight, last_use=last_use)


def test_the_full_ttl_remains_right_after_the_last_use() -> None:
    assert remaining() == 60.0


def test_what_has_passed_since_the_last_use_is_taken_off() -> None:
    assert remaining(last_use=NOW - 45.0) == 15.0


@pytest.mark.parametrize("idle_s", [60.0, 61.0, 1e9])
def test_nothing_remains_from_the_ttl_on(idle_s: float) -> None:
    assert remaining(last_use=NOW - idle_s) == 0.0


def test_the_clock_stands_still_while_a_lease_is_open() -> None:
    assert remaining(in_flight=1, last_use=NOW - 1e6) is None


def test_the_clock_does_not_run_for_a_pinned_instance() -> None:
    assert remaining(pinned=True, last_use=NOW - 1e6) is None


@pytest.mark.parametrize("ttl_s", [0.0, -1.0])
def test_a_ttl_of_zero_means_never(ttl_s: float) -> None:
    assert remaining(ttl_s=ttl_s, last_use=NOW - 1e6) is None


def test_the_clock_does_not_run_before_the_first_use() -> None:
    assert remaining(last_use=None) is None


def after(
    *,
    elapsed_s: float = 10.0,
    network: int = 0,
    own: int = 0,
    cpu_s: float = 0.0,
    expirations: tuple[tuple[str, datetime | None], ...] = BEFORE.expirations,
) -> UsageSample:
    return UsageSample(
        at=BEFORE.at + elapsed_s,
        network_bytes=BEFORE.network_bytes + network,
        own_bytes=BEFORE.own_bytes + own,
        cpu_s=BEFORE.cpu_s + cpu_s,
        expirations=expirations,
    )


def test_a_merely_loaded_model_is_no_use() -> None:
    assert not was_used(BEFORE, after())


def test_a_moved_expiry_is_use() -> None:
    assert was_used(BEFORE, after(expirations=(("qwen3", EXPIRY + timedelta(seconds=1)),)))


def test_an_expiry_that_came_or_went_is_use() -> None:
    assert was_used(BEFORE, after(expirations=(("qwen3", None),)))
    assert was_used(replace(BEFORE, expirations=(("qwen3", None),)), after())


def test_the_same_expiry_written_in_another_time_zone_is_no_use() -> None:
    berlin = EXPIRY.astimezone(tz=None)
    assert not was_used(BEFORE, after(expirations=(("qwen3", berlin),)))


def test_a_model_that_was_loaded_is_use() -> None:
    assert was_used(BEFORE, after(expirations=(*BEFORE.expirations, ("llama3", EXPIRY))))


def test_a_model_that_expired_is_no_use() -> None:
    assert not was_used(BEFORE, after(expirations=()))


def test_traffic_beyond_our_own_probes_is_use() -> None:
    assert was_used(BEFORE, after(network=20_000, own=10_000))


def test_the_traffic_of_our_own_probes_is_no_use() -> None:
    assert not was_used(BEFORE, after(network=20_000, own=20_000))


@pytest.mark.parametrize("elapsed_s", [0.0, 1.0, 10.0, 3600.0])
def test_the_noise_of_an_idle_network_is_no_use_however_long_it_goes_on(elapsed_s: float) -> None:
    noise = int(600 + 100 * elapsed_s)
    assert not was_used(BEFORE, after(elapsed_s=elapsed_s, network=noise))
    assert was_used(BEFORE, after(elapsed_s=elapsed_s, network=noise + 1))


def test_traffic_counters_that_began_again_are_no_use() -> None:
    assert not was_used(BEFORE, after(network=-50_000, own=1_000))


def test_processor_time_above_idle_is_use() -> None:
    assert was_used(BEFORE, after(elapsed_s=10.0, cpu_s=0.6))


def test_processor_time_of_an_idle_server_is_no_use() -> None:
    assert not was_used(BEFORE, after(elapsed_s=10.0, cpu_s=0.5))


def test_processor_time_that_began_again_is_no_use() -> None:
    assert not was_used(BEFORE, after(cpu_s=-10.0))


def test_a_clock_that_went_back_widens_nothing() -> None:
    assert not was_used(BEFORE, after(elapsed_s=-100.0, network=600, cpu_s=0.04))
    assert was_used(BEFORE, after(elapsed_s=-100.0, network=601))
