"""Details of models: what is asked, of whom, how often, and what is not."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from manager.domain.instance import Driver, Health, InstanceSpec, Limits
from manager.errors import Reason, UnavailableError
from manager.services.models import details as module
from manager.services.models.details import ModelDetails
from manager.services.models.model_lists import ModelLists
from manager.wire.details import Details

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import pytest

LIMITS = Limits(900, 300, 30, 60, 2, 15, 20)
KNOWN = Details(2048, ("completion",))


class Instance:
    """One that describes models when it is told to."""

    def __init__(self, id_: str) -> None:
        self.id = id_
        self.spec = InstanceSpec(id_, Driver.EXTERNAL, None, LIMITS, url="http://x")
        self.endpoint: str | None = "http://x"
        self.health = Health.HEALTHY
        self.asked: list[str] = []
        self.open = 0
        self.most_open = 0
        self.answer: Details | Exception | None = KNOWN
        self.answers = asyncio.Event()
        self.answers.set()

    def usable_endpoint(self) -> str | None:
        return self.endpoint

    def view(self) -> Any:
        return SimpleNamespace(health=self.health)

    async def show(self, model: str) -> Details | None:
        self.asked.append(model)
        self.open += 1
        self.most_open = max(self.open, self.most_open)
        await self.answers.wait()
        self.open -= 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Rig:
    def __init__(self, *ids: str) -> None:
        self.instances = tuple(map(Instance, ids))
        self.lists = ModelLists(cast("Any", None), cast("Any", None), {})
        self.now = 1000.0
        fleet = SimpleNamespace(instances=lambda: self.instances)
        self.details = ModelDetails(cast("Any", fleet), self.lists, now=lambda: self.now)

    def has(self, instance: str, *models: str, **more: Any) -> None:
        self.now += 1
        entries = [{"name": name, "digest": f"d-{name}", **more} for name in models]
        self.lists.read(f"instance:{instance}", entries, self.now)

    def can(self, instance: str, model: str) -> Any:
        return self.lists.entries(f"instance:{instance}")[f"{model}:latest"].get("capabilities")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.ensure_future(self.details.run())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def test_each_model_is_asked_about_once_whoever_has_it() -> None:
    rig = Rig("a", "b")
    one, other = rig.instances
    rig.has("a", "tiny", "big")
    rig.has("b", "tiny", "own")
    async with rig.running():
        for _ in range(3):
            await rig.details.look(within_s=5)
    assert sorted(one.asked + other.asked) == ["big", "own", "tiny"]
    assert [rig.can("a", "tiny"), rig.can("a", "big"), rig.can("b", "tiny"), rig.can("b", "own")] == [
        ["completion"]
    ] * 4


async def test_one_question_is_open_at_an_instance_whoever_looks_meanwhile() -> None:
    rig = Rig("a")
    (one,) = rig.instances
    one.answers.clear()
    rig.has("a", "tiny", "big", "own")
    async with rig.running():
        await asyncio.gather(*(rig.details.look(within_s=0.01) for _ in range(5)))
        assert (one.asked, one.most_open) == (["tiny"], 1), "and a list does not wait for long"
        one.answers.set()
        await rig.details.look(within_s=5)
    assert (one.asked, one.most_open) == (["tiny", "big", "own"], 1)


async def test_what_lists_say_themselves_is_not_asked_for() -> None:
    rig = Rig("a")
    rig.has("a", "tiny", details={"context_length": 1}, capabilities=["completion"])
    async with rig.running():
        await rig.details.look(within_s=5)
    assert rig.instances[0].asked == []


async def test_an_instance_that_does_not_run_or_is_not_well_is_not_asked() -> None:
    rig = Rig("a", "b")
    one, other = rig.instances
    one.endpoint, other.health = None, Health.UNHEALTHY
    rig.has("a", "tiny")
    rig.has("b", "own")
    async with rig.running():
        await rig.details.look(within_s=5)
        assert one.asked == other.asked == []
        one.endpoint = "http://x"
        await rig.details.look(within_s=5)
        assert one.asked == ["tiny"], "it is asked once it runs"


async def test_a_question_that_failed_is_asked_again_after_a_while() -> None:
    rig = Rig("a")
    (one,) = rig.instances
    rig.has("a", "tiny")
    async with rig.running():
        for answer in (UnavailableError("gone", reason=Reason.UPSTREAM_UNREACHABLE), None):
            one.answer = answer
            one.asked.clear()
            for _ in range(3):
                await rig.details.look(within_s=5)
            assert one.asked == ["tiny"]
            rig.now += 61
        one.answer = KNOWN
        await rig.details.look(within_s=5)
    assert rig.can("a", "tiny") == ["completion"]


async def test_an_older_server_that_knows_no_capabilities_is_asked_once() -> None:
    rig = Rig("a")
    (one,) = rig.instances
    one.answer = Details(2048, None)
    rig.has("a", "tiny")
    async with rig.running():
        for _ in range(3):
            await rig.details.look(within_s=5)
            rig.now += 100
    assert one.asked == ["tiny"]


async def test_models_without_a_digest_and_those_beyond_the_bound_are_not_asked_about(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_MOST_ASKED", 2)
    rig = Rig("a")
    (one,) = rig.instances
    one.answer = Details(None, None)
    rig.has("a", "tiny", "big", "own")
    rig.lists.read("instance:a", [*rig.lists.entries("instance:a").values(), {"name": "odd"}], rig.now + 0.5)
    async with rig.running():
        await rig.details.look(within_s=5)
        assert one.asked == ["tiny", "big"]
        rig.has("a", "big", "new")  # the others are gone, and forgotten
        await rig.details.look(within_s=5)
    assert one.asked == ["tiny", "big", "new"]
