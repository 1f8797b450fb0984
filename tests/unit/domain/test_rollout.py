"""Which requests a stage manages, and where a decision differs from the answer of the raw server."""

from __future__ import annotations

import pytest

from manager.domain.rollout import Disagreement, Stage, Stages, disagreement
from manager.domain.routing import Attempt
from manager.errors import Reason

TINY = Attempt("a", "tiny", None, "loaded")


@pytest.mark.parametrize(
    ("stage", "role", "lane", "managed"),
    [
        (Stage.ALL, None, None, True),
        (Stage.OBSERVE, "output", "output", False),
        (Stage.SHADOW, "output", "output", False),
        (Stage.LANES, "output", None, True),
        (Stage.LANES, None, "output", True),
        (Stage.LANES, "control", "output", True),
        (Stage.LANES, "control", None, False),
        (Stage.LANES, None, None, False),
    ],
)
def test_a_stage_manages_all_the_lanes_named_or_nothing(
    stage: Stage, role: str | None, lane: str | None, managed: bool
) -> None:
    assert Stages(stage, frozenset({"output"}), "http://raw").manages(role, lane) is managed


@pytest.mark.parametrize(
    ("first", "asked", "status", "found"),
    [
        (None, "tiny", 200, Disagreement.REFUSED),
        (None, "tiny", 404, None),
        (None, "tiny", 500, None),
        (TINY, "tiny:latest", 200, None),
        (TINY, "tiny@a", 200, None),
        (TINY, "output", 200, Disagreement.MODEL),
        (TINY, "output", 404, Disagreement.MODEL_MISSING),
        (TINY, "tiny", 400, None),
        (TINY, "tiny", 429, None),
        (TINY, "tiny", 500, Disagreement.RAW_FAILED),
        (TINY._replace(fallback=Reason.OVERLOADED), "tiny", 200, Disagreement.FALLBACK),
    ],
)
def test_a_disagreement_has_one_reason(
    first: Attempt | None, asked: str, status: int, found: Disagreement | None
) -> None:
    assert disagreement(first, asked, status) is found
