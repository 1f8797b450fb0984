"""The payment of one attempt: the most that it can cost, and what it has cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from manager.domain.budgets import Closing
from manager.domain.money import in_usd

if TYPE_CHECKING:
    from manager.domain.money import Price
    from manager.domain.record import RequestRecord
    from manager.services.accounts.ledger import Ledger, Reserved

# A token of usual tokenizers stands for about four bytes of text, and never for less than one
# (https://help.openai.com/en/articles/4936856).
_BYTES_A_TOKEN = 4


class Bounded(Protocol):
    """A request whose cost has a bound."""

    @property
    def most_input_tokens(self) -> int:
        """No tokenizer makes more of it."""

    @property
    def most_output_tokens(self) -> int | None:
        """The limit that the client sets; None without one."""


def output_limit(price: Price, body: Bounded) -> int:
    """Return the bound of output tokens that a paid request has to carry."""
    wanted = body.most_output_tokens
    return price.max_output_tokens if wanted is None else min(wanted, price.max_output_tokens)


class Payment:
    """Money that is reserved for one attempt. `close` counts once however often it is called.

    Args:
        ledger: has the reservation.
        reserved: the reservation.
        price: of the model.
        most_input_tokens: a bound, as for `Bounded`.
        output_limit: the bound of output tokens that the request carries.

    Attributes:
        is_sent: the server may have begun with the request.
        is_refused: the server has answered with an error, which costs nothing.
    """

    is_sent = False
    is_refused = False
    _is_closed = False

    def __init__(
        self, ledger: Ledger, reserved: Reserved, price: Price, *, most_input_tokens: int, output_limit: int
    ) -> None:
        self._ledger = ledger
        self._reserved = reserved
        self._price = price
        self._most_input_tokens = most_input_tokens
        self.output_limit = output_limit

    @property
    def soft(self) -> str:
        """The budgets whose soft limit is reached, as `global/month, project:x/day`; empty where none is."""
        return ", ".join(f"{budget.scope}/{budget.period}" for budget in self._reserved.soft)

    def cost(self, input_tokens: int | None, output_tokens: int | None) -> int:
        """Return what the attempt costs in micro-dollars, never more than was reserved.

        The request carries the bound that the reservation was made for: a server that counts more errs.
        Tokens of the request that the server does not tell are estimated by its bytes. Where nothing of an
        answer was seen the server may have made all of it, and all that was reserved counts.
        """
        if input_tokens is None and output_tokens is None:
            return self._reserved.reservation.amount
        if input_tokens is None:
            input_tokens = -(-self._most_input_tokens // _BYTES_A_TOKEN)
        return min(self._price.cost(input_tokens, output_tokens or 0), self._reserved.reservation.amount)

    def close(self, record: RequestRecord) -> None:
        """Settle on the tokens of the record, or release where nothing was spent. Note the cost there."""
        if self._is_closed:
            return
        self._is_closed = True
        reservation = self._reserved.reservation
        if not self.is_sent or self.is_refused:
            self._ledger.close_reservation(Closing(reservation.id, "released", 0))
            return
        inputs, outputs = record.input_tokens, record.output_tokens
        cost = self.cost(inputs, outputs)
        record.cost_usd += in_usd(cost)
        self._ledger.close_reservation(Closing(reservation.id, "settled", cost, inputs, outputs))
