"""The stages in which a gateway takes over from a server that clients used directly: the raw server."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from manager.domain.models import model_key, split_pin

if TYPE_CHECKING:
    from manager.domain.routing import Attempt

# The name of the raw server in records, headers and metrics. No instance may have it beside one.
RAW = "raw"
_BAD_REQUEST, _NOT_FOUND, _INTERNAL_ERROR = 400, 404, 500


class Stage(StrEnum):
    """Which requests are managed.

    `OBSERVE` and `SHADOW` pass all to the raw server; `SHADOW` records beside it what the decision would have
    been. `LANES` manages some roles and passes the others, `ALL` manages every request.
    """

    OBSERVE = "observe"
    SHADOW = "shadow"
    LANES = "lanes"
    ALL = "all"


class Disagreement(StrEnum):
    """A difference between the answer of the raw server and the decision beside it."""

    REFUSED = "refused"
    MODEL = "model"
    FALLBACK = "fallback"
    MODEL_MISSING = "model_missing"
    RAW_FAILED = "raw_failed"


class Stages(NamedTuple):
    """The settings in force. `raw_url` is set in every stage but `ALL`, where it may be."""

    stage: Stage = Stage.ALL
    lanes: frozenset[str] = frozenset()
    raw_url: str | None = None

    def manages(self, role: str | None, lane: str | None) -> bool:
        """Return whether a request is managed.

        Args:
            role: that the decision found.
            lane: that the request names.
        """
        if self.stage is Stage.LANES:
            return role in self.lanes or lane in self.lanes
        return self.stage is Stage.ALL


def disagreement(first: Attempt | None, asked: str, status: int) -> Disagreement | None:
    """Return how the decision differs from what the raw server did; None where it does not.

    Args:
        first: the first attempt of the decision; None where it refuses.
        asked: the name of the model in the request.
        status: the answer of the raw server, or the error in its place.
    """
    is_served = status < _BAD_REQUEST
    if first is None:
        return Disagreement.REFUSED if is_served else None
    if status == _NOT_FOUND:
        return Disagreement.MODEL_MISSING
    if not is_served:
        # An error about the request would be the same from a managed instance.
        return Disagreement.RAW_FAILED if status >= _INTERNAL_ERROR else None
    if model_key(first.model) != model_key(split_pin(asked)[0]):
        return Disagreement.MODEL
    return None if first.fallback is None else Disagreement.FALLBACK
