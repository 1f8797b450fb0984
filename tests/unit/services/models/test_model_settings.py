"""Changes of roles at run time: saved, then in force, or nothing at all."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from manager.adapters.registry import SqlRegistry, open_registry
from manager.domain.roles import Fallback, Policy
from manager.errors import InvalidRequestError, RegistryUnwritableError
from manager.services.journal import Journal
from manager.services.models.model_settings import ModelSettings
from manager.settings import Settings
from manager.settings.load import LoadedSettings
from manager.settings.overrides import Sourced, overlaid, written_roles
from manager.settings.section import FoundIds

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

NOW = datetime(2026, 8, 1, tzinfo=UTC)
INSTANCES: dict[str, bool | None] = {"cpu": False, "gpu0": True, "nas": None}


def configured(**roles: Any) -> Settings:
    return Settings.model_validate(
        {
            "instances": {
                "cpu": {"template": "ollama-cpu"},
                "gpu0": {"template": "ollama-gpu", "device": "auto"},
                "nas": {"driver": "external", "url": "http://nas:11434"},
            },
            "roles": roles,
        }
    )


# By instance.
DENIED: dict[str, tuple[str, ...]] = {}


class Rig:
    """A registry that survives, and whatever a daemon makes of it."""

    def __init__(self, registry: SqlRegistry) -> None:
        self.registry = registry
        self.journal = Journal(registry, last_id=0, utcnow=lambda: NOW)

    async def opened(
        self, config: Settings | None = None, instances: dict[str, bool | None] | None = None
    ) -> ModelSettings:
        config = config or configured(output={"model": "qwen3:8b"})
        settings = ModelSettings(
            self.registry,
            self.journal,
            written=written_roles(LoadedSettings(config, None, ())),
            models=config.models,
            instances=lambda: INSTANCES if instances is None else instances,
            slots=dict,
            denied=lambda: DENIED,
            found=FoundIds(cards=config.gpus == "auto"),
        )
        await settings.load()
        return settings

    async def told(self) -> list[tuple[str, str]]:
        await self.journal.flush()
        return [(event.kind, event.detail) for event in await self.registry.events_after(0, 100)]


@pytest_asyncio.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    registry = await open_registry(tmp_path / "registry.sqlite3", busy_timeout_s=0.05)
    yield Rig(registry)
    await registry.close()


async def test_a_change_is_in_force_at_once_and_after_a_restart(rig: Rig) -> None:
    before = await rig.opened()
    routing = before.routing
    await before.change({"output": {"model": " llama3 ", "policy": "prefer_gpu", "target": "gpu0"}})
    for found in (before, await rig.opened()):
        role = found.routing.roles["output"]
        assert (role.model, role.policy, role.target) == ("llama3", Policy.PREFER_GPU, "gpu0")
        assert found.values["output"]["model"] == Sourced("llama3", "override")
        assert found.ignored == ()
    assert routing.roles["output"].model == "qwen3:8b", "what was handed out does not change"
    assert before.version == 1


async def test_a_change_is_told_once_without_what_may_be_long_or_private(rig: Rig) -> None:
    opened = await rig.opened()
    await opened.change({"output": {"model": "a", "system.text": "hush", "body.defaults": {"n": 1}}})
    await opened.change({"output": {"model": "a"}})
    await opened.change({"output": {"model": None, "think": False}})
    assert await rig.told() == [
        (
            "settings_changed",
            'roles.output.body.defaults changed; roles.output.model = "a"; roles.output.system.text changed',
        ),
        ("settings_changed", "roles.output.model as configured; roles.output.think = false"),
    ]
    assert opened.version == 2


async def test_what_says_the_same_as_before_changes_nothing(rig: Rig) -> None:
    opened = await rig.opened()
    await opened.change({"output": {"body.defaults": {"n": 1, "m": 2}}})
    await opened.change({"output": {"body.defaults": {"m": 2, "n": 1}}, "control": {"model": None}})
    assert opened.version == 1
    await opened.change({"output": {"body.defaults": {"m": 2, "n": True}}})
    assert opened.version == 2
    assert json.dumps(opened.routing.roles["output"].changes.defaults) == '{"m": 2, "n": true}'


async def test_roles_of_ones_own_come_and_go(rig: Rig) -> None:
    opened = await rig.opened()
    await opened.change({"review": {"kind": "generate", "model": "coder", "fallbacks": ["output"]}})
    assert (await rig.opened()).routing.roles["review"].fallbacks == ("output",)
    await opened.change({"review": None})
    assert "review" not in opened.routing.roles
    assert await rig.registry.overrides() == {}


async def test_what_cannot_be_meant_is_refused_with_all_its_fields(rig: Rig) -> None:
    opened = await rig.opened()
    with pytest.raises(InvalidRequestError) as caught:
        await opened.change({"output": {"target": "gpu0", "policy": "cpu_only"}, "control": {"target": "x"}})
    fields = caught.value.details["fields"]
    assert [one["field"] for one in fields] == ["roles.control.target", "roles.output.target"]  # type: ignore[attr-defined]
    assert caught.value.message.startswith(
        "roles.control.target: 'x' is no instance; expected cpu, gpu0, nas"
    )
    assert opened.version == 0


async def test_what_cannot_be_saved_is_not_in_force(rig: Rig) -> None:
    opened = await rig.opened()
    rig.registry._own.path.rename(rig.registry._own.path.with_name("away"))
    with pytest.raises(RegistryUnwritableError):
        await opened.change({"output": {"model": "other"}})
    assert (opened.version, opened.routing.roles["output"].model) == (0, "qwen3:8b")


async def test_a_cancelled_change_is_saved_and_in_force_or_neither(rig: Rig) -> None:
    opened = await rig.opened()
    for turns in range(12):
        task = asyncio.ensure_future(opened.change({"output": {"model": f"m{turns}"}}))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        saved = (await rig.registry.overrides()).get("roles.output.model", "qwen3:8b")
        assert opened.routing.roles["output"].model == saved


async def test_changes_at_the_same_time_are_both_kept(rig: Rig) -> None:
    opened = await rig.opened()
    names = ["thinking", "control", "output", "tool_selector"]
    await asyncio.gather(*(opened.change({name: {"model": f"m-{name}"}}) for name in names))
    assert [opened.routing.roles[name].model for name in names] == [f"m-{name}" for name in names]
    assert opened.version == 4


# --- what does not fit any more -------------------------------------------------------------------


async def test_an_override_whose_instance_is_gone_is_ignored_with_a_warning(rig: Rig) -> None:
    await (await rig.opened()).change({"output": {"target": "nas", "model": "kept"}})
    with structlog.testing.capture_logs() as logs:
        opened = await rig.opened(Settings(), {"cpu": False})
    (ignored,) = opened.ignored
    assert (ignored.key, ignored.value) == ("roles.output.target", "nas")
    assert ignored.reason.startswith("'nas' is no instance; expected cpu")
    assert opened.values["output"]["target"] == Sourced("auto", "default")
    assert opened.routing.roles["output"].model == "kept"
    assert [(one["event"], one["log_level"], one["override"]) for one in logs] == [
        ("override_ignored", "warning", "roles.output.target")
    ]
    await opened.change({"control": {"model": "x"}})
    assert (await rig.opened()).routing.roles["output"].target == "nas", "it is kept for when it is back"


async def test_what_was_just_set_stays_when_an_ignored_override_would_come_back(rig: Rig) -> None:
    embed = {"kind": "embed", "model": "bge-m3"}
    await (await rig.opened(configured(e=embed))).change({"embedding": {"fallbacks": ["e"]}})
    # In the meantime the file got another model: the saved fallback does not fit any more.
    opened = await rig.opened(configured(e=embed, embedding={"model": "other"}))
    assert [one.key for one in opened.ignored] == ["roles.embedding.fallbacks"]
    await opened.change({"embedding": {"model": "third"}})
    assert [one.key for one in opened.ignored] == ["roles.embedding.fallbacks"]
    assert opened.routing.roles["embedding"].model == "third"
    await opened.change({"embedding": {"model": "bge-m3"}})
    assert opened.ignored == ()
    assert opened.routing.roles["embedding"].fallbacks == ("e",)


async def test_what_was_just_set_stays_although_it_repeats_the_configuration(rig: Rig) -> None:
    await (await rig.opened(configured(output={"model": "m"}))).change({"output": {"target": "gpu0"}})
    opened = await rig.opened(configured(output={"model": "m", "policy": "cpu_only"}))
    assert [one.key for one in opened.ignored] == ["roles.output.target"]
    await opened.change({"output": {"policy": "cpu_only"}})
    assert [one.key for one in opened.ignored] == ["roles.output.target"]
    assert opened.values["output"]["policy"] == Sourced("cpu_only", "override")
    await opened.change({"output": {"model": "x"}})
    assert [one.key for one in opened.ignored] == ["roles.output.target"], "what counts already stays, too"


async def test_a_card_that_is_away_stays_a_target_but_becomes_none(rig: Rig) -> None:
    config = Settings.model_validate({"roles": {"output": {"target": "gpu3"}}})
    opened = await rig.opened(config, {"cpu": False})
    await opened.change({"output": {"model": "x"}})
    assert opened.routing.roles["output"].target == "gpu3"
    with pytest.raises(InvalidRequestError, match=r"roles.control.target: 'gpu4' is no instance"):
        await opened.change({"control": {"target": "gpu4"}})
    with pytest.raises(InvalidRequestError, match=r"roles.output.target: 'gpu3' does not run on"):
        await opened.change({"output": {"policy": "cpu_only"}})


# --- whatever is asked for ------------------------------------------------------------------------

ROLES = st.sampled_from(["output", "control", "embedding", "own", "e", "Bad", "x" * 40])
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from([None, "", " a ", "a", "b", "a b", "a@cpu", 1]),
    "target": st.sampled_from([None, "auto", "cpu", "gpu0", "nas", "gone", "gpu7", []]),
    "policy": st.sampled_from([None, "auto", "prefer_gpu", "cpu_only", "gpu", " cpu_only "]),
    "kind": st.sampled_from([None, "generate", "embed", "transcribe", "chat"]),
    "fallbacks": st.lists(ROLES, max_size=2) | st.none() | st.just("output"),
    "body.defaults": st.sampled_from([None, {}, {"n": [1]}, {"model": "x"}, 1]),
    "body.overrides": st.sampled_from([None, {}, {"n": float("inf")}, {"n": True}]),
    "system.text": st.sampled_from([None, "", " ", "Be brief.", 1]),
    "system.mode": st.sampled_from([None, "append", "add"]),
    "think": st.sampled_from([None, True, False, "maybe"]),
    "colour": st.just("red"),
}
CHANGES = st.dictionaries(ROLES, st.none() | st.fixed_dictionaries({}, optional=VALUES), max_size=3)


class MemoryRegistry:
    """As much of a registry as the settings need; the real one keeps the same in SQLite."""

    def __init__(self) -> None:
        self.saved: dict[str, Any] = {}

    async def overrides(self) -> dict[str, Any]:
        return json.loads(json.dumps(self.saved))  # type: ignore[no-any-return]

    async def save_overrides(self, overrides: dict[str, Any], was: dict[str, Any]) -> None:
        assert was == self.saved
        self.saved = json.loads(json.dumps(overrides))


@settings(max_examples=150, deadline=None)
@given(st.lists(CHANGES, min_size=1, max_size=4))
def test_a_refused_change_changes_nothing_and_another_one_is_as_it_is_after_a_restart(
    changes: list[Any],
) -> None:
    asyncio.run(_change_one_after_the_other(changes))


async def _change_one_after_the_other(changes: list[Any]) -> None:
    registry = MemoryRegistry()
    rig = Rig(registry)  # type: ignore[arg-type]
    config = configured(own={"kind": "embed"}, control={"target": "gpu0"})
    written = written_roles(LoadedSettings(config, None, ()))
    opened = await rig.opened(config)
    for change in changes:
        before = (opened.routing, opened.version, dict(registry.saved), rig.journal.last_id, opened.values)
        try:
            await opened.change(change)
        except InvalidRequestError:
            now = (opened.routing, opened.version, registry.saved, rig.journal.last_id, opened.values)
            assert now == before
            assert opened.routing is before[0]
        assert opened.ignored == (), "what was accepted fits"
        again = await rig.opened(config)
        assert again.routing == opened.routing
        assert again.values == opened.values
        whole = overlaid(written, registry.saved, INSTANCES, {}, found=FoundIds())
        assert whole.ignored == ()


async def test_a_new_configuration_is_taken_over_below_the_overrides(rig: Rig) -> None:
    opened = await rig.opened(configured(output={"model": "a"}))
    await opened.change({"control": {"model": "mine"}})
    version = opened.version
    written = written_roles(
        LoadedSettings(configured(output={"model": "b"}, control={"model": "b"}), None, ())
    )
    with structlog.testing.capture_logs() as logs:
        opened.reconfigure(written, Settings().models)
    assert opened.version == version + 1
    assert opened.routing.roles["output"].model == "b"
    assert opened.routing.roles["control"].model == "mine"
    assert logs == []
    own = written_roles(LoadedSettings(Settings(), None, ()))
    opened.reconfigure(own, Settings().models)
    assert opened.routing.roles["output"].model is None
    assert opened.routing.roles["control"].model == "mine"


async def test_an_override_that_stays_ignored_is_logged_once(rig: Rig) -> None:
    await (await rig.opened(configured(output={"model": "m"}))).change({"output": {"target": "gpu0"}})
    cpu_only = configured(output={"model": "m", "policy": "cpu_only"})
    opened = await rig.opened(configured(output={"model": "m"}))
    with structlog.testing.capture_logs() as logs:
        for _ in range(2):
            opened.reconfigure(written_roles(LoadedSettings(cpu_only, None, ())), cpu_only.models)
    assert [one["override"] for one in logs] == ["roles.output.target"]


async def test_the_use_of_paid_servers_is_changed_live_and_kept(rig: Rig) -> None:
    opened = await rig.opened()
    assert not opened.routing.fallback.force_local
    await opened.change({}, {"force_local": True, "enabled": True})
    for found in (opened, await rig.opened()):
        assert found.routing.fallback == Fallback(enabled=True, force_local=True)
        assert found.fallback["force_local"] == Sourced(True, "override")
        assert found.fallback["order"] == Sourced([], "default")
        assert found.ignored == ()
    await opened.change({}, {"force_local": None})
    assert opened.routing.fallback == Fallback(enabled=True)
    assert opened.version == 2
    assert (await rig.told())[0] == (
        "settings_changed",
        "fallback.enabled = true; fallback.force_local = true",
    )


async def test_an_order_of_what_is_not_paid_is_refused_and_ignored_once_it_does_not_fit(rig: Rig) -> None:
    opened = await rig.opened()
    with pytest.raises(InvalidRequestError, match=r"fallback\.order: 'cpu' is no instance") as refused:
        await opened.change({}, {"order": ["cpu"]})
    fields: Any = refused.value.details["fields"]
    assert fields[0]["field"] == "fallback.order"
    await rig.registry.save_overrides({"fallback.order": ["gone"], "fallback.nothing": 1})
    later = await rig.opened()
    assert {one.key for one in later.ignored} == {"fallback.order", "fallback.nothing"}
    assert later.routing.fallback == Fallback()
