"""A learned classifier tells the task of a vector."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.auto import choose
from manager.domain.classification import AutoRules, Lexicon, Task, Tier, classify
from manager.domain.learned import LearnedModel, Told
from manager.domain.roles import RequestKind, Role, RoutingSettings

MODEL = LearnedModel("minilm", ("chat", "summary"), ((1.0, 0.0), (0.0, 2.0)), (0.0, 0.5), 0.9, 0.5)
LEXICON = Lexicon(
    (Task("summary", Tier.MEDIUM, ("summary",)), Task("plan", Tier.COMPLEX, ("plan",))), ("why",)
)


def test_the_highest_score_tells_the_task_and_its_share_the_confidence() -> None:
    for vector, task, score in (([3.0, 0.0], "chat", 0.5), ([0.0, 0.1], "summary", 2.5)):
        told = MODEL.tell(vector)
        assert told is not None
        assert told.task == task
        assert told.confidence == pytest.approx(1 / (1 + math.exp(-score)))


@pytest.mark.parametrize("vector", [[], [1.0], [1.0, 1.0, 1.0], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_a_vector_of_another_shape_tells_nothing(vector: list[float]) -> None:
    assert MODEL.tell(vector) is None


@given(st.lists(st.floats(-1e100, 1e100), min_size=2, max_size=2))
def test_any_vector_has_a_confidence_between_nothing_and_certainty(vector: list[float]) -> None:
    told = MODEL.tell(vector)
    assert told is None or (told.task in MODEL.tasks and 0.5 <= told.confidence <= 1)


def test_what_was_told_counts_in_place_of_the_words_of_tasks() -> None:
    found = classify("plan", LEXICON, told=Told("summary", 0.71234))
    assert found[:4] == ("summary", Tier.MEDIUM, 0.712, "the learned classifier says so")
    assert classify("plan, and why", LEXICON, told=Told("summary", 0.7)).tier is Tier.COMPLEX
    assert classify("plan", LEXICON, told=Told("chat", 0.7)).tier is Tier.MEDIUM
    assert classify("plan", LEXICON, told=Told("summary", 0.3), escalate_below=0.5).tier is Tier.COMPLEX


def test_a_choice_follows_what_was_told() -> None:
    roles = {name: Role(name, RequestKind.GENERATE, "m") for name in ("fast", "medium", "complex")}
    settings = RoutingSettings(roles, auto=(rules := AutoRules(LEXICON, learned=MODEL)))
    assert choose("auto", "plan", settings, rules).role == "complex"
    assert choose("auto", "plan", settings, rules, Told("summary", 0.9)).role == "medium"
    assert choose("auto:fast", "plan", settings, rules, Told("summary", 0.9)).role == "fast"
