"""The place that a request is sent to."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class Protocol(StrEnum):
    """The API that a server speaks."""

    OLLAMA = "ollama"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"


class Price(NamedTuple):
    """The price of one model, in micro-dollars for a million tokens.

    `max_output_tokens` bounds an answer where the request does not; None is no known bound.
    """

    input_micro_usd_per_mtok: int
    output_micro_usd_per_mtok: int
    max_output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """One server, as a lease on its instance leads to it.

    `endpoint` is the base URL. `headers` are added to each request, such as the credentials of a server that
    somebody else runs. `paid` servers cost money for each request; `prices` has those of their models, by
    name. A request to a target that is not `repeatable` is sent once, whatever becomes of it.
    """

    instance: str
    endpoint: str
    headers: tuple[tuple[bytes, bytes], ...] = field(default=(), repr=False)  # they hold secrets
    protocol: Protocol = Protocol.OLLAMA
    paid: bool = False
    repeatable: bool = True
    prices: Mapping[str, Price] = field(default_factory=dict, hash=False)
