"""Where a conversation was last, and what that counts against the load of instances."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.roles import RequestKind
from manager.domain.routing import RequestFacts
from manager.services.routing import affinity
from manager.services.routing.affinity import Affinity, LeaningLoad
from tests.support.instances import Ground

if TYPE_CHECKING:
    from collections.abc import Mapping

FACTS = RequestFacts("tiny", RequestKind.GENERATE)
TALK: Any = SimpleNamespace(fields={"messages": b'[{"role":"user","content":"hi"}]'})


def test_the_place_that_was_not_seen_for_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affinity, "MOST_CONVERSATIONS", 2)
    places = Affinity()
    for conversation, instance in ((1, "a"), (2, "b"), (1, "c"), (3, "d")):
        places.note(conversation, instance)
    assert [places.find(one) for one in (1, 2, 3)] == ["c", None, "d"]


@pytest.mark.parametrize(("busy", "best"), [(0, "b"), (1, "b"), (2, "a"), (5, "a")])
def test_an_instance_is_preferred_unless_it_is_busier_by_more_than_one(busy: int, best: str) -> None:
    load = LeaningLoad({"a": 0, "b": busy, "c": 9}, "b")
    assert min(("a", "b", "c"), key=load.__getitem__) == best


def ground(**load: int) -> Ground:
    found = Ground("a", "b")
    for name, count in load.items():
        found[name].loaded = ("tiny",)
        for _ in range(count):
            found[name].try_lease()
    return found


def order(of: Ground, body: Any = TALK, facts: RequestFacts = FACTS) -> tuple[int, list[str]]:
    attempts = of.router.attempts(facts)
    conversation = attempts.lean(body)
    found = []
    while (attempt := attempts.next()) is not None:
        found.append(attempt.instance)
    return conversation, found


@pytest.mark.parametrize(
    ("load", "found"),
    [
        ({"a": 0, "b": 0}, ["b", "a"]),
        ({"a": 0, "b": 1}, ["b", "a"]),
        ({"a": 0, "b": 2}, ["a", "b"]),
        ({"a": 3, "b": 4}, ["b", "a"]),
    ],
)
def test_a_conversation_goes_back_unless_its_instance_is_busier(
    load: Mapping[str, int], found: list[str]
) -> None:
    of = ground(**load)
    conversation, _ = order(of)
    of.router.affinity.note(conversation, "b")
    assert order(of)[1] == found


def test_a_conversation_that_nobody_has_goes_to_the_least_busy() -> None:
    assert order(ground(a=1, b=0))[1] == ["b", "a"]


def test_conversations_with_two_models_are_two() -> None:
    of = ground(a=0, b=0)
    of["a"].reads("tiny", "big")
    one, other = order(of)[0], order(of, facts=RequestFacts("big", RequestKind.GENERATE))[0]
    assert one != other
    assert 0 not in (one, other)


def test_requests_for_vectors_and_those_without_an_opening_belong_to_none() -> None:
    of = ground(a=0, b=0)
    assert order(of, facts=RequestFacts("tiny", RequestKind.EMBED))[0] == 0
    empty: Any = SimpleNamespace(fields={})
    assert order(of, empty)[0] == 0


def test_the_choices_of_a_lane_lean_too() -> None:
    of = ground(a=0, b=1)
    of.router.affinity.note(order(of)[0], "b")
    attempts = of.router.attempts(FACTS)
    attempts.lean(TALK)
    assert [one.instance for one in attempts.choices()] == ["b", "a"]
