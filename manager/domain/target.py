"""The place that a request is sent to."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.domain.money import Price


class Protocol(StrEnum):
    """The API that a server speaks."""

    OLLAMA = "ollama"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"


@dataclass(frozen=True, slots=True)
class Target:
    """One server, as a lease on its instance leads to it.

    `endpoint` is the base URL. `headers` are added to each request, such as the credentials of a server that
    somebody else runs. Each request to a server with `prices`, by model, costs money; None costs nothing. A
    request to a target that is not `repeatable` is sent once, whatever becomes of it.
    """

    instance: str
    endpoint: str
    headers: tuple[tuple[bytes, bytes], ...] = field(default=(), repr=False)  # they hold secrets
    protocol: Protocol = Protocol.OLLAMA
    prices: Mapping[str, Price] | None = field(default=None, hash=False)
    repeatable: bool = True

    @property
    def paid(self) -> bool:
        """Return whether each request costs money."""
        return self.prices is not None
