"""Amounts of money: whole micro-dollars, rounded up once."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.money import Price, in_usd, micro_usd, usd_text

PRICE = Price(input_micro_usd=250_000, output_micro_usd=2_000_000)


@pytest.mark.parametrize(
    ("usd", "micro"),
    [(0, 0), (0.25, 250_000), ("30", 30_000_000), (Decimal("0.0000014"), 1), (0.1 + 0.2, 300_000)],
)
def test_dollars_become_whole_micro_dollars(usd: Decimal | float | str, micro: int) -> None:
    assert micro_usd(usd) == micro


@pytest.mark.parametrize(
    ("tokens", "cost"), [((0, 0), 0), ((1, 0), 1), ((4, 0), 1), ((5, 0), 2), ((1000, 500), 1250)]
)
def test_a_cost_is_rounded_up(tokens: tuple[int, int], cost: int) -> None:
    assert PRICE.cost(*tokens) == cost


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9))
def test_more_tokens_never_cost_less(inputs: int, outputs: int, more: int) -> None:
    assert PRICE.cost(inputs + more, outputs) >= PRICE.cost(inputs, outputs)
    assert PRICE.cost(inputs, outputs + more) >= PRICE.cost(inputs, outputs)


@given(st.integers(0, 10**12))
def test_micro_dollars_survive_json(micro: int) -> None:
    assert micro_usd(in_usd(micro)) == micro


@pytest.mark.parametrize(
    ("micro", "text"),
    [
        (0, "0"),
        (1, "0.000001"),
        (10, "0.00001"),
        (250_000, "0.25"),
        (30_000_000, "30"),
        (10**15, "1000000000"),
    ],
)
def test_amounts_are_written_without_exponents_and_without_rounding(micro: int, text: str) -> None:
    assert usd_text(micro) == text


@given(st.integers(0, 10**15))
def test_no_micro_dollar_is_lost_in_a_text(micro: int) -> None:
    assert micro_usd(usd_text(micro)) == micro
