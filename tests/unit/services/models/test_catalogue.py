"""What all instances know of themselves: who is asked, how often, and what is told of the others."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.classification import AutoRules, Lexicon, Tier
from manager.domain.facts import ModelFacts
from manager.domain.instance import DeviceKind, Driver, Health, InstanceSpec, Limits, Model, Phase
from manager.domain.keys import Permit
from manager.domain.roles import RequestKind, Role, RoutingSettings
from manager.domain.template import Template
from manager.services.models.catalogue import Catalogue
from manager.services.models.model_lists import ModelLists
from manager.services.overview import Overviews
from manager.wire.listing import Alias, KnownModel

if TYPE_CHECKING:
    from collections.abc import Mapping

LIMITS = Limits(900, 300, 30, 60, 2, 15, 20)
NOON = datetime(2026, 8, 1, 12, tzinfo=UTC)
TINY = {"name": "tiny:latest", "size": 1}


class Instance:
    """One that answers when it is told to."""

    def __init__(
        self, id_: str, *, ready: bool = True, healthy: bool = True, version: str | None = None, seen: int = 0
    ) -> None:
        self.id = id_
        self.spec = InstanceSpec(id_, Driver.EXTERNAL, None, LIMITS, url="http://x")
        self.ready = ready
        self.version = version
        self.models: tuple[Model, ...] = ()
        self.listed: tuple[Mapping[str, Any], ...] | None = None
        self.listed_at = 0.0
        self.in_flight = 0
        self.phase = Phase.READY
        self.drained: object = None
        self.last_used_at = NOON
        self.health = Health.HEALTHY if healthy else Health.UNHEALTHY
        self.last_seen_at = NOON + timedelta(seconds=seen)
        self.asked: list[bool] = []
        self.answer = asyncio.Event()
        self.answer.set()

    def usable_endpoint(self) -> str | None:
        return "http://x" if self.ready else None

    def view(self) -> Instance:
        return self

    async def probe(self, *, tags: bool) -> None:
        self.asked.append(tags)
        await self.answer.wait()


async def is_asked(one: Instance) -> None:
    while not one.asked:  # noqa: ASYNC110  (nobody tells)
        await asyncio.sleep(0)


LATENCIES_MS = {("one", "tiny:latest"): 30.0, ("two", "tiny:latest"): 20.0, ("one", "other:latest"): 1.0}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        Clock.now += 0.001  # no two moments are the same
        return Clock.now


class Reader:
    """Counts the looks at volumes."""

    def __init__(self) -> None:
        self.looks = 0

    async def look(self, *, within_s: float) -> None:
        assert within_s == 5.0
        self.looks += 1


class Details:
    """Nothing is missing."""

    async def look(self, *, within_s: float) -> None:
        assert within_s == 1.0


def catalogue(
    *instances: Instance,
    images: tuple[str, ...] = (),
    roles: tuple[Role, ...] = (),
    list_roles: bool = True,
    auto: AutoRules | None = None,
) -> Catalogue:
    by_id = {one.id: one for one in instances}
    fleet: Any = SimpleNamespace(instances=lambda: instances, images=lambda: images, get=by_id.__getitem__)
    settings: Any = SimpleNamespace(
        routing=RoutingSettings({role.name: role for role in roles}, list_roles=list_roles, auto=auto)
    )
    nothing: Any = None
    stored = {f"instance:{one.id}": one.listed for one in instances if one.listed is not None}
    status: Any = SimpleNamespace(at_work=dict, idle_status=lambda _key: "not_loaded")
    overload: Any = SimpleNamespace(recent_ms=lambda id_, key: LATENCIES_MS.get((id_, key)))
    lists = ModelLists(nothing, nothing, stored)
    overviews = Overviews(fleet, nothing, (), (), lists=lists, settings=settings, breakers=nothing)
    return Catalogue(
        fleet,
        overviews,
        status,
        overload,
        lists,
        settings=settings,
        reader=Reader(),  # type: ignore[arg-type]
        details=Details(),  # type: ignore[arg-type]
        now=Clock(),
    )


# --- the version ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instances", "images", "version"),
    [
        ([Instance("a", version="0.31.0"), Instance("b", version="0.32.0")], ("x:0.1.0",), "0.31.0"),
        ([Instance("a", ready=False, version="0.31.0"), Instance("b", version="0.32.0")], (), "0.32.0"),
        (
            [
                Instance("a", ready=False, version="0.31.0", seen=9),
                Instance("b", ready=False, version="0.32.0"),
            ],
            ("ollama/ollama:0.30.0",),
            "0.31.0",
        ),
        ([Instance("a")], ("ollama/ollama:latest", "ollama/ollama:0.30.1-rocm"), "0.30.1"),
        ([], ("registry:5000/ollama:0.30.1-rc2", "ollama:0.1.0"), "0.30.1-rc2"),
        ([], ("ollama/ollama@sha256:0123", "ollama-manager/simulated:abc"), "0.32.15"),
    ],
)
def test_the_version_is_the_best_that_is_known(
    instances: list[Instance], images: tuple[str, ...], version: str
) -> None:
    assert catalogue(*instances, images=images).version() == version


# --- who is asked ---------------------------------------------------------------------------------


async def test_only_who_is_ready_and_well_is_asked() -> None:
    well, ill, away = Instance("a"), Instance("b", healthy=False), Instance("c", ready=False)
    await catalogue(well, ill, away).refresh(lists=True)
    assert (well.asked, ill.asked, away.asked) == ([True], [], [])


async def test_those_who_ask_during_a_question_share_the_next_one() -> None:
    one = Instance("a")
    known = catalogue(one)
    one.answer.clear()
    first = asyncio.ensure_future(known.refresh(lists=True))
    await is_asked(one)
    one.in_flight = 1  # it is used: what it says may be old as soon as it is said
    others = [asyncio.ensure_future(known.refresh(lists=True)) for _ in range(20)]
    await asyncio.sleep(0)
    one.answer.set()
    await asyncio.gather(first, *others)
    assert one.asked == [True, True]


async def test_one_that_leaves_leaves_the_question_to_the_next() -> None:
    one = Instance("a")
    known = catalogue(one)
    one.answer.clear()
    first = asyncio.ensure_future(known.refresh(lists=False))
    second = asyncio.ensure_future(known.refresh(lists=False))
    await is_asked(one)
    first.cancel()
    one.answer.set()
    await second
    assert one.asked == [False, False]


async def test_who_was_asked_just_now_and_not_used_since_is_left_alone() -> None:
    Clock.now += 1000.0
    one = Instance("a")
    known = catalogue(one)
    await known.refresh(lists=True)
    await known.refresh(lists=False)
    assert one.asked == [True]
    one.last_used_at = NOON + timedelta(seconds=1)
    await known.refresh(lists=False)
    await known.refresh(lists=False)
    assert one.asked == [True, False], "used since"
    await known.refresh(lists=True)
    assert one.asked == [True, False, True], "the models on its volume are another question"
    Clock.now += 1.0
    await known.refresh(lists=True)
    assert len(one.asked) == 4, "long ago"


# --- what is known --------------------------------------------------------------------------------


def test_a_model_is_told_once_with_all_who_have_it_and_hold_it() -> None:
    one, two, away = Instance("one"), Instance("two"), Instance("away", ready=False)
    one.listed = away.listed = (TINY | {"digest": "aaa"},)
    two.listed = (TINY | {"digest": "bbb"},)
    two.models = away.models = (Model("Tiny", "d", 4, 1, None, entry={"name": "Tiny"}),)
    known = catalogue(one, two, away)
    (model,) = known.models()
    assert (model.instances, model.loaded_on, model.status) == (("one", "two", "away"), ("two",), "ready")
    assert (model.offload, model.latency_ms) == (0.25, 20.0)
    assert model.digests == {"aaa": ("one", "away"), "bbb": ("two",)}
    assert known.loaded() == (("two", {"name": "Tiny"}),)


def test_a_model_that_answered_nothing_has_no_latency_whatever_its_instance_did() -> None:
    one = Instance("one")
    one.listed = (TINY, {"name": "fresh:latest"})
    assert [model.latency_ms for model in catalogue(one).models()] == [30.0, None]


def test_a_name_means_a_role_that_has_a_model_before_a_model() -> None:
    one = Instance("one")
    one.listed = (TINY, {"name": "control:latest"}, {"name": "output:latest"})
    roles = (
        Role("tiny", RequestKind.GENERATE, "other"),
        Role("thinking", RequestKind.GENERATE, "TINY"),
        Role("control", RequestKind.GENERATE, None),
    )
    known = catalogue(one, roles=(*roles, Role("output", RequestKind.GENERATE, "tiny")))
    assert isinstance(known.find("tiny"), Alias)
    assert isinstance(known.find("tiny:latest"), KnownModel)
    assert isinstance(known.find("control"), KnownModel), "the role has no model"
    assert isinstance(known.find("Output"), Alias)
    assert isinstance(known.find("output:latest"), KnownModel)
    assert isinstance(known.find("thinking:latest"), Alias), "no model has that name"
    found = known.find("thinking")
    assert isinstance(found, Alias)
    assert (found.model, found.of) == ("TINY", KnownModel(TINY, ("one",), (), latency_ms=30.0))
    assert known.find("thinking:8b") is known.find("nope") is None
    assert [alias.name for alias in known.aliases()] == ["tiny", "thinking", "output"]


def test_a_model_is_available_where_an_instance_runs_or_can_be_started_and_has_its_stated_tier() -> None:
    one = Instance("one")
    one.listed = (TINY,)
    known = catalogue(one)
    (found,) = known.models()
    assert (found.is_available, found.tier) == (True, None)
    one.phase = Phase.STOPPED
    assert known.models()[0].is_available
    one.phase = Phase.UNAVAILABLE
    assert not known.models()[0].is_available
    one.phase, one.drained = Phase.READY, "an order"
    assert not known.models()[0].is_available
    settings: Any = known._settings
    settings.routing = RoutingSettings({}, facts={"tiny:latest": ModelFacts("tiny", Tier.FAST)})
    assert known.models()[0].tier is Tier.FAST


def test_roles_are_kept_out_of_ollamas_list_where_that_is_wanted() -> None:
    one = Instance("one")
    one.listed = (TINY,)
    roles = (Role("thinking", RequestKind.GENERATE, "tiny"),)
    known = catalogue(one, roles=roles)
    assert [alias.name for alias in known.listed_aliases()] == ["thinking"]
    known = catalogue(one, roles=roles, list_roles=False)
    assert (known.listed_aliases(), len(known.aliases())) == ((), 1)


AUTO = AutoRules(Lexicon(()))


def tiers(**fallbacks: tuple[str, ...]) -> tuple[Role, ...]:
    models = {"fast": "tiny", "medium": "gone", "complex": "large"}
    return tuple(
        Role(name, RequestKind.GENERATE, model, fallbacks=fallbacks.get(name, ()))
        for name, model in models.items()
    )


def opened(known: Catalogue, permit: Permit | None = None) -> dict[str, tuple[str, bool]]:
    """The names that leave the choice open: the model of each, and whether an instance has it."""
    return {
        alias.name: (alias.model, alias.of is not None)
        for alias in known.listed_aliases(permit)
        if alias.name.startswith("auto")
    }


def test_names_that_leave_the_choice_open_are_listed_as_the_first_model_that_is_there() -> None:
    one = Instance("one")
    one.listed = (TINY, {"name": "large:latest"})
    assert opened(catalogue(one, roles=tiers())) == {}
    assert opened(catalogue(one, roles=tiers(), auto=AUTO)) == {
        "auto": ("tiny", True),
        "auto:fast": ("tiny", True),
        "auto:medium": ("gone", False),
        "auto:complex": ("large", True),
    }
    known = catalogue(one, roles=tiers(medium=("complex",)), auto=AUTO)
    assert opened(known)["auto"] == opened(known)["auto:medium"] == ("large", True)
    assert opened(catalogue(one, roles=tiers(), auto=AUTO, list_roles=False)) == {}
    named = catalogue(one, roles=(*tiers(), Role("auto", RequestKind.GENERATE, "large")), auto=AUTO)
    assert [alias.name for alias in named.aliases()].count("auto") == 1


def test_a_name_that_leaves_the_choice_open_means_the_usual_model_before_a_model_of_that_name() -> None:
    one = Instance("one")
    one.listed = (TINY, {"name": "large:latest"}, {"name": "auto:latest"})
    known = catalogue(one, roles=tiers(), auto=AUTO)
    for name, model in (("auto", "tiny"), ("AUTO:latest", "tiny"), ("auto:complex", "large")):
        found = known.find(name)
        assert isinstance(found, Alias)
        assert found.model == model
    assert isinstance(catalogue(one, roles=tiers()).find("auto"), KnownModel)
    assert catalogue(one, auto=AUTO).find("auto") is None


def test_a_key_sees_the_names_of_the_tiers_that_it_may_use() -> None:
    one = Instance("one")
    one.listed = (TINY, {"name": "large:latest"})
    known = catalogue(one, roles=tiers(fast=("complex",), complex=("fast",)), auto=AUTO)
    fast = Permit("a", roles=frozenset({"fast"}))
    assert opened(known, fast) == {"auto": ("tiny", True), "auto:fast": ("tiny", True)}
    large = Permit("a", models=("large*",))
    assert opened(known, large) == dict.fromkeys(("auto", "auto:fast", "auto:complex"), ("large", True))
    assert opened(known, Permit("a", roles=frozenset({"fast"}), models=("large*",))) == {}
    assert opened(known, Permit("a", roles=frozenset({"thinking"}))) == {}
    assert known.find("auto:complex", fast) is None


async def test_a_list_of_models_has_unlisted_volumes_read_and_one_of_loaded_models_has_not() -> None:
    known = catalogue(Instance("one"))
    reader: Any = known._reader
    await known.refresh(lists=False)
    assert reader.looks == 0
    await known.refresh(lists=True)
    assert reader.looks == 1


def test_a_name_is_that_of_a_role_as_it_stands_only() -> None:
    known = catalogue(roles=(Role("thinking", RequestKind.GENERATE, "tiny"),))
    assert known.is_role("thinking")
    assert not known.is_role("thinking:latest")
    assert not known.is_role("tiny")


@pytest.mark.parametrize(
    ("values", "is_disabled"),
    [
        (["1", " TRUE "], True),
        (["yes"], True),
        (["1", None], False),
        (["1", ""], False),
        (["0"], False),
        (["f"], False),
        (["False"], False),
    ],
)
def test_the_cloud_is_disabled_where_every_instance_was_made_without_it(
    values: list[str | None], *, is_disabled: bool
) -> None:
    instances = [Instance(f"i{number}") for number, _ in enumerate(values)]
    for instance, value in zip(instances, values, strict=True):
        env = {} if value is None else {"OLLAMA_NO_CLOUD": value}
        template = Template(image="x", device=DeviceKind.CPU, env=env)
        instance.spec = replace(instance.spec, template=template)
    assert catalogue(*instances).is_cloud_disabled() is is_disabled
    assert not catalogue(*instances, Instance("external")).is_cloud_disabled()
