"""The server that a request is sent to."""

from __future__ import annotations

from manager.domain.money import Price
from manager.domain.target import Target


def test_a_server_with_prices_is_paid() -> None:
    assert Target("openai", "https://x", prices={"gpt": Price(1, 1)}).paid
    assert not Target("gpu0", "http://x").paid
