"""Judgements of servers by their answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from manager.errors import Reason


class Judgement(NamedTuple):
    """`reason` is None where the error is about the request: every server would answer the same.

    `may_start` is whether another instance is worth starting for this request.
    """

    reason: Reason | None
    may_start: bool = True
    is_error: bool = True


GOOD = Judgement(None, is_error=False)
ABOUT_THE_REQUEST = Judgement(None)
