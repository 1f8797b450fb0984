"""Money in whole micro-dollars, and what a request to a paid model costs at most. Pure.

A price is in micro-dollars per million tokens, so that no amount is ever a fraction: a cost is rounded up to
the next micro-dollar once, for all tokens of a request together.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Final

MICRO_PER_USD: Final = 1_000_000
_TOKENS_PER_PRICE: Final = 1_000_000
# The output of a request that names no limit, where the price list names none either. It is sent along.
DEFAULT_MAX_OUTPUT_TOKENS: Final = 4096


@dataclass(frozen=True, slots=True)
class Price:
    """The price of a model, in micro-dollars per million tokens.

    `max_output_tokens` bounds the answer of a request, whatever the client asks for.
    """

    input_micro_usd: int
    output_micro_usd: int
    max_output_tokens: int = DEFAULT_MAX_OUTPUT_TOKENS

    def cost(self, input_tokens: int, output_tokens: int) -> int:
        """Return the cost in micro-dollars, rounded up."""
        parts = input_tokens * self.input_micro_usd + output_tokens * self.output_micro_usd
        return -(-parts // _TOKENS_PER_PRICE)


def micro_usd(usd: Decimal | float | str) -> int:
    """Return dollars as micro-dollars, rounded to the nearest.

    Raises:
        decimal.InvalidOperation: the text is no number.
    """
    return int((Decimal(str(usd)) * MICRO_PER_USD).to_integral_value())


def in_usd(micro: int) -> float:
    """Return micro-dollars as dollars, for JSON."""
    return micro / MICRO_PER_USD


def usd_text(micro: int) -> str:
    """Return micro-dollars as dollars for people, such as `0.00001` or `30`."""
    return f"{Decimal(micro) / MICRO_PER_USD:.6f}".rstrip("0").rstrip(".")
