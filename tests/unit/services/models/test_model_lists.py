"""The models of each volume: the newest reading counts, and what it said is kept."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from manager.domain.instance import Driver, InstanceSpec, Limits
from manager.domain.template import Template
from manager.errors import RegistryUnwritableError
from manager.services.models import model_lists
from manager.services.models.model_lists import ModelLists, volume_of
from manager.wire.details import Details

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pytest

LIMITS = Limits(900, 300, 30, 60, 2, 15, 20)
TINY = {"name": "tiny:latest", "size": 760257, "details": {"family": "llama"}}
QWEN = {"name": "Qwen3:8b", "size": 5_000_000_000}


class Registry:
    def __init__(self) -> None:
        self.saved: list[tuple[str, tuple[Mapping[str, Any], ...]]] = []
        self.full = False

    async def save_model_list(self, volume: str, entries: Sequence[Mapping[str, Any]]) -> None:
        if self.full:
            self.full = False
            raise RegistryUnwritableError("no space left")
        self.saved.append((volume, tuple(entries)))


class Journal:
    def __init__(self) -> None:
        self.kinds: list[str] = []

    def record(self, kind: str, **_: object) -> None:
        self.kinds.append(kind)


def lists(stored: Mapping[str, Sequence[Mapping[str, Any]]] | None = None) -> ModelLists:
    return ModelLists(Registry(), Journal(), stored or {})  # type: ignore[arg-type]


def spec(instance: str, *volumes: tuple[str, str]) -> InstanceSpec:
    template = Template.model_validate(
        {
            "image": "ollama/ollama:1",
            "device": "cpu",
            "volumes": [{"source": source, "target": target} for source, target in volumes],
        }
    )
    return InstanceSpec(instance, Driver.DOCKER, None, LIMITS, template=template)


def test_instances_on_one_volume_share_its_models_and_others_are_alone() -> None:
    assert volume_of(spec("a", ("models", "/root/.ollama"))) == "models"
    assert volume_of(spec("a", ("cache", "/tmp/cache"), ("m", "/root/.ollama/models"))) == "m"
    assert volume_of(spec("a", ("cache", "/root/.ollamas"))) == "instance:a"
    assert volume_of(InstanceSpec("nas", Driver.EXTERNAL, None, LIMITS, url="http://x")) == "instance:nas"


def test_services_share_models_on_one_node_only() -> None:
    def service(name: str, *placement: str) -> InstanceSpec:
        mounted = spec(name, ("models", "/root/.ollama"))
        return replace(mounted, driver=Driver.SWARM, placement=placement)

    assert volume_of(service("a", "node.id==n1")) == volume_of(service("b", "node.id==n1")) == "models@n1"
    assert volume_of(service("a", "node.hostname==gpu-box")) == "models@gpu-box"
    assert volume_of(service("a", "node.role==worker")) == "models@a"
    assert volume_of(replace(spec("a"), driver=Driver.SWARM)) == "instance:a"


def test_a_list_that_was_never_read_is_none_and_an_empty_one_is_empty() -> None:
    known = lists({"read": ()})
    assert known.of("never") is None
    assert known.entries("never") == {}
    assert known.of("read") == {}


def test_names_and_entries_are_found_by_the_key_of_a_model() -> None:
    known = lists({"v": (TINY,)})
    known.read("v", (QWEN, {"size": 5}, TINY), 1.0)
    assert known.of("v") == {"qwen3:8b": "Qwen3:8b", "tiny:latest": "tiny:latest"}
    assert known.entries("v") == {"qwen3:8b": QWEN, "tiny:latest": TINY}


def test_an_older_reading_changes_nothing() -> None:
    known = lists()
    known.read("v", (TINY,), 2.0)
    known.read("v", (), 1.0)
    known.read("v", (), 2.0)
    assert known.of("v") == {"tiny:latest": "tiny:latest"}


def test_an_instance_that_was_never_asked_adds_nothing() -> None:
    known = lists()
    instance = SimpleNamespace(spec=spec("a", ("v", "/root/.ollama")), listed=None, listed_at=1.0)
    known.take(instance)  # type: ignore[arg-type]
    assert known.of("v") is None
    instance.listed = (TINY,)
    known.take(instance)  # type: ignore[arg-type]
    assert known.entries("v") == {"tiny:latest": TINY}


def test_the_version_grows_with_the_names_only() -> None:
    known = lists({"v": (TINY,)})
    known.read("v", (TINY,), 1.0)
    known.read("v", ({**TINY, "size": 1},), 2.0)
    assert known.version == 0
    assert known.entries("v")["tiny:latest"]["size"] == 1
    known.read("v", (TINY, QWEN), 3.0)
    assert known.version == 1


async def test_what_changed_is_stored_and_stored_again_when_that_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_lists, "_RETRY_S", 0.0)
    registry, journal = Registry(), Journal()
    registry.full = True
    known = ModelLists(registry, journal, {"v": (TINY,)})  # type: ignore[arg-type]
    running = asyncio.ensure_future(known.run())
    known.read("v", (TINY,), 1.0)
    known.read("w", (QWEN,), 1.0)
    while not registry.saved:  # noqa: ASYNC110  (there is no event to wait for)
        await asyncio.sleep(0)
    running.cancel()
    assert registry.saved == [("w", (QWEN,))]
    assert journal.kinds == ["model_list_not_stored"]


async def test_what_changes_while_another_list_is_stored_is_stored_at_once() -> None:
    stored, goes_on = asyncio.Event(), asyncio.Event()

    class Slow(Registry):
        async def save_model_list(self, volume: str, entries: Sequence[Mapping[str, Any]]) -> None:
            stored.set()
            await goes_on.wait()
            await super().save_model_list(volume, entries)

    registry = Slow()
    known = ModelLists(registry, Journal(), {})  # type: ignore[arg-type]
    running = asyncio.ensure_future(known.run())
    known.read("v", (TINY,), 1.0)
    await stored.wait()
    known.read("v", (TINY, QWEN), 2.0)
    goes_on.set()
    async with asyncio.timeout(2):  # not after the pause that follows a failure
        while len(registry.saved) < 2:  # noqa: ASYNC110  (there is no event to wait for)
            await asyncio.sleep(0)
    running.cancel()
    assert registry.saved[-1] == ("v", (TINY, QWEN))


def test_a_number_of_parameters_that_becomes_known_is_news() -> None:
    known = lists()
    known.read("v", [TINY, QWEN], 1.0)
    assert (known.version, known.sizes("v"), known.sizes("other")) == (1, {}, {})
    detailed = {**TINY, "details": {"parameter_size": "14.8B"}}
    known.read("v", [detailed, QWEN], 2.0)
    assert (known.version, known.sizes("v")) == (2, {"tiny:latest": 14.8e9})
    known.read("v", [{**detailed, "size": 1}, QWEN], 3.0)
    assert known.version == 2


def test_details_that_were_asked_for_stay_with_the_model_and_are_stored() -> None:
    known = lists()
    found = Details(2048, ("completion",))
    one, other = {**TINY, "digest": "d1"}, {**QWEN, "digest": "d2"}
    known.read("v", [one, other], 1.0)
    known.read("w", [{**one, "name": "same:latest"}], 1.0)
    known._unsaved.clear()
    known.learn("d1", found)
    assert known._unsaved == {"v", "w"}
    said = {**one, "capabilities": ["completion"], "details": {"family": "llama", "context_length": 2048}}
    assert known.entries("v") == {"tiny:latest": said, "qwen3:8b": other}
    assert known.entries("w")["same:latest"]["capabilities"] == ["completion"]
    before = known.entries("v")
    known.learn("d1", Details(1, ()))
    known.read("v", [one, other], 2.0)
    assert known.entries("v") is before, "a server that says less takes nothing back"
    known.read("v", [{**one, "digest": "d3"}, other], 3.0)
    assert "capabilities" not in known.entries("v")["tiny:latest"], "another model has that name now"


def test_details_of_a_list_that_is_not_to_be_stored_are_not_stored() -> None:
    known = lists()
    known.read("v", [{**TINY, "digest": "d1"}], 1.0, store=False)
    known.learn("d1", Details(2048, ("completion",)))
    assert known.entries("v")["tiny:latest"]["capabilities"] == ["completion"]
    assert known._unsaved == set()
