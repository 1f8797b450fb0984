"""A classifier learned from labelled requests: multinomial logistic regression over embeddings. Pure.

`P(task) = softmax(W v + b)` for a vector `v` of length 1. An operator trains it with
`ollama-manager classifier train`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import mul
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_TASKS = 100
MOST_DIMENSIONS = 8192


class Told(NamedTuple):
    """The task of a request as a learned classifier tells it; `confidence` is from 0 to 1."""

    task: str
    confidence: float


@dataclass(frozen=True)
class LearnedModel:
    """A trained classifier.

    Attributes:
        embedding_model: what makes the vectors.
        tasks: the names of the tasks, one a row of `weights`.
        weights: of each task, as many as a vector has dimensions.
        bias: of each task.
        accuracy: on requests that it was not trained with.
        rules_accuracy: that of the rules over words on the same requests.
    """

    embedding_model: str
    tasks: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]
    accuracy: float
    rules_accuracy: float

    @property
    def dimensions(self) -> int:
        return len(self.weights[0])

    def tell(self, vector: Sequence[float]) -> Told | None:
        """Return the task of a request by its vector; None for one of other dimensions, or of length 0."""
        length = math.sqrt(math.fsum(map(mul, vector, vector)))
        if len(vector) != self.dimensions or not math.isfinite(length) or length == 0:
            return None
        scores = [
            sum(map(mul, row, vector)) / length + bias
            for row, bias in zip(self.weights, self.bias, strict=True)
        ]
        highest = max(scores)
        shares = [math.exp(score - highest) for score in scores]
        return Told(self.tasks[scores.index(highest)], 1 / math.fsum(shares))
