"""A request for the vectors of texts and its answer, in terms that no dialect owns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from manager.wire.translate.hub import Usage


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """Texts of which each gets one vector. `dimensions` is None where the client does not say."""

    model: str
    inputs: tuple[str, ...]
    dimensions: int | None = None


@dataclass(frozen=True, slots=True)
class VectorsCame:
    """The whole answer: one vector for each text, in their order. `usage` is None where it is not said."""

    vectors: tuple[tuple[float, ...], ...]
    usage: Usage | None = None
