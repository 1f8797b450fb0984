"""Facts about models that the operator states: what they are good for, and how they are asked."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from manager.domain.classification import Tier


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The operator's statements about one model; None and empty: nothing.

    Attributes:
        name: of the model.
        tier: the tier that it belongs to.
        context_tokens: its context window, which requests get where they ask for none.
        latency_ms: the time to the first token that is expected; within a tier the lowest one goes first.
        cost_factor: its cost compared with the other models; 1 is usual.
        output_tokens: the most that an answer has where the request says nothing.
        temperature: that of requests which say nothing.
        capabilities: such as `tools` and `vision`.
    """

    name: str
    tier: Tier | None = None
    context_tokens: int | None = None
    latency_ms: float | None = None
    cost_factor: float = 1.0
    output_tokens: int | None = None
    temperature: float | None = None
    capabilities: tuple[str, ...] = ()

    @property
    def parameters(self) -> tuple[float | None, int | None, int | None]:
        """Temperature, tokens of context and of output, where a request says nothing."""
        return self.temperature, self.context_tokens, self.output_tokens


def models_by_tier(facts: Iterable[ModelFacts]) -> Mapping[str, tuple[str, ...]]:
    """Return the models of each tier, the one that is expected to be fastest first."""
    found: dict[str, list[ModelFacts]] = {}
    for one in facts:
        if one.tier is not None:
            found.setdefault(one.tier.value, []).append(one)
    return MappingProxyType(
        {tier: tuple(map(_name, sorted(some, key=_latency))) for tier, some in found.items()}
    )


def _name(facts: ModelFacts) -> str:
    return facts.name


def _latency(facts: ModelFacts) -> float:
    return float("inf") if facts.latency_ms is None else facts.latency_ms
