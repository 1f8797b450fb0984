"""Models of one name that differ between instances are told once a change."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from manager.services.models import differing
from manager.services.models.differing import DifferingModels
from manager.services.models.model_lists import ModelLists
from manager.services.overview import Overviews
from tests.support.breakers import quiet_breakers
from tests.support.fleet_rig import Journal, Rig, until


class Stage:
    """Instances with a list each, and the models that differ between them."""

    def __init__(self) -> None:
        nothing: Any = None
        rig = Rig("a", "b", "c")
        self.lists = ModelLists(nothing, nothing, {})
        cards: Any = rig.cards
        settings: Any = SimpleNamespace(version=1)
        overviews = Overviews(
            rig.fleet,
            rig.capacity,
            [rig.link],
            [cards],
            lists=self.lists,
            settings=settings,
            breakers=quiet_breakers(),
        )
        self.journal = Journal()
        journal: Any = self.journal
        self.differing = DifferingModels(overviews, journal)
        self._at = 0.0

    def read(self, instance: str, **digests: str) -> None:
        self._at += 1.0
        entries = [{"name": f"{name}:1", "digest": digest} for name, digest in digests.items()]
        self.lists.read(f"instance:{instance}", entries, self._at)

    def events(self) -> list[tuple[str, str]]:
        """Look, and return what was recorded at that."""
        before = len(self.journal.kinds)
        self.differing.look()
        details = {kind: self.journal.details_of(kind) for kind in ("models_differ", "models_agree")}
        return [(kind, details[kind].pop()) for kind in reversed(self.journal.kinds[before:])][::-1]


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_a_model_that_differs_is_one_event_until_it_changes(stage: Stage) -> None:
    stage.read("a", tiny="aaa", other="ooo")
    stage.read("b", tiny="aaa")
    stage.read("c", tiny="", other="ooo")
    assert stage.events() == []
    stage.read("b", tiny="bbb")
    assert stage.events() == [("models_differ", "tiny:1 (aaa on a; bbb on b)")]
    stage.read("a", tiny="aaa", other="ooo", more="mmm")
    assert stage.events() == [], "nothing of it has changed"
    stage.read("c", tiny="bbb", other="ooo")
    assert stage.events() == [("models_differ", "tiny:1 (aaa on a; bbb on b, c)")]
    stage.read("a", tiny="bbb", other="new")
    assert stage.events() == [
        ("models_differ", "other:1 (new on a; ooo on c)"),
        ("models_agree", "tiny:1"),
    ]
    stage.read("a")
    assert stage.events() == [("models_agree", "other:1")]


def test_two_stores_of_different_sources_are_one_event_with_the_first_names(stage: Stage) -> None:
    names = [f"m{number}" for number in range(1000)]
    stage.read("a", **dict.fromkeys(names, "aaa"))
    stage.read("b", **dict.fromkeys(names, "bbb"))
    ((kind, detail),) = stage.events()
    assert kind == "models_differ"
    assert detail.count(" on a") == 8
    assert detail.endswith(" and 992 more")


async def test_it_looks_again_and_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differing, "_LOOK_S", 0.001)
    running = asyncio.ensure_future(stage.differing.run())
    stage.read("a", tiny="aaa")
    await asyncio.sleep(0)
    stage.read("b", tiny="bbb")
    await until(lambda: "models_differ" in stage.journal.kinds)
    running.cancel()
