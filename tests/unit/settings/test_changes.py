"""What a configuration that is read again changes at once, and what waits for a restart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import yaml

from manager.errors import ConfigurationError
from manager.settings import load_settings, load_templates
from manager.settings.changes import LIVE, Changes, changes
from manager.settings.model import Settings
from manager.settings.schema import fields_of

if TYPE_CHECKING:
    from pathlib import Path

INSTANCES = {
    "cpu": {"template": "ollama-cpu"},
    "nas": {"driver": "external", "url": "http://127.0.0.1:9"},
}


def compared(home: Path, before: dict[str, Any], after: dict[str, Any]) -> Changes:
    environ = {"HOME": str(home)}
    loaded = []
    for name, config in (("before.yaml", before), ("after.yaml", after)):
        (home / name).write_text(yaml.safe_dump({"instances": INSTANCES, **config}))
        loaded.append(load_settings(home / name, environ=environ))
    templates = load_templates(loaded[0].settings)
    return changes(*loaded, templates=templates, wanted_templates=templates)


@pytest.mark.parametrize(
    ("before", "after", "key"),
    [
        ({}, {"schedules": [{"cron": "@daily", "action": "reap"}]}, "schedules"),
        ({}, {"roles": {"thinking": {"model": "a"}}}, "roles.thinking.model"),
        ({"roles": {"own": {"model": "a"}}}, {}, "roles.own"),
        ({}, {"models": {"auto_pull": True}}, "models.auto_pull"),
        ({}, {"models": {"facts": {"a": {"temperature": 0.5}}}}, "models.facts.a"),
        ({}, {"routing": {"auto": True}}, "routing.auto"),
        ({"routing": {"escalate_below": 0.5}}, {}, "routing.escalate_below"),
        ({}, {"routing": {"weights": {"text": 3}}}, "routing.weights.text"),
        ({}, {"routing": {"ensemble": {"models": ["a", "b"], "judge": "c"}}}, "routing.ensemble"),
        ({}, {"lifecycle": {"ttl_s": 1}}, "lifecycle.ttl_s"),
        ({"lifecycle": {"max_running": 1}}, {}, "lifecycle.max_running"),
        ({}, {"gateway": {"keep_alive_s": 1}}, "gateway.keep_alive_s"),
        ({}, {"log": {"level": "debug"}}, "log.level"),
        ({}, {"server": {"allowed_hosts": ["a.example"]}}, "server.allowed_hosts"),
        (
            {},
            {"instances": {**INSTANCES, "cpu": {"template": "ollama-cpu", "ttl_s": 5}}},
            "instances.cpu.ttl_s",
        ),
        (
            {},
            {"instances": {**INSTANCES, "nas": {**INSTANCES["nas"], "priority": 5}}},
            "instances.nas.priority",
        ),
    ],
)
def test_what_can_change_now_is_applied(tmp_path: Path, before: Any, after: Any, key: str) -> None:
    found = compared(tmp_path, before, after)
    assert (found.applied, found.waiting) == ((key,), ())
    assert (
        found.loaded.settings
        == load_settings(tmp_path / "after.yaml", environ={"HOME": str(tmp_path)}).settings
    )


@pytest.mark.parametrize(
    ("after", "key"),
    [
        ({"server": {"port": 1234}}, "server.port"),
        ({"server": {"host": "::1"}}, "server.host"),
        ({"state": {"dir": "/elsewhere"}}, "state.dir"),
        ({"engine": {"url": "unix:///elsewhere.sock"}}, "engine.url"),
        ({"manager_id": "other"}, "manager_id"),
        ({"gpus": "none"}, "gpus"),
        ({"lifecycle": {"probe_interval_s": 3}}, "lifecycle.probe_interval_s"),
        ({"log": {"format": "json"}}, "log.format"),
        ({"instances": {"cpu": {"template": "ollama-cpu"}}}, "instances.nas"),
        ({"instances": {**INSTANCES, "more": {"template": "ollama-cpu"}}}, "instances.more"),
        ({"instances": {**INSTANCES, "cpu": {"template": "ollama-gpu"}}}, "instances.cpu.template"),
        ({"models": {"writers": {"ollama-models": "cpu"}}}, "models.writers.ollama-models"),
    ],
)
def test_what_cannot_change_now_waits(tmp_path: Path, after: Any, key: str) -> None:
    found = compared(tmp_path, {}, after)
    assert (found.applied, found.waiting) == ((), (key,))
    assert (
        found.loaded.settings
        == load_settings(tmp_path / "before.yaml", environ={"HOME": str(tmp_path)}).settings
    )


def test_both_kinds_in_one_file_are_told_apart(tmp_path: Path) -> None:
    found = compared(tmp_path, {}, {"server": {"port": 1234}, "lifecycle": {"ttl_s": 7}})
    assert (found.applied, found.waiting) == (("lifecycle.ttl_s",), ("server.port",))
    assert found.loaded.settings.server.port == 11435
    assert {spec.id: spec.limits.ttl_s for spec in found.specs} == {"cpu": 7, "nas": 7}


def test_a_template_that_was_changed_waits(tmp_path: Path) -> None:
    loaded = load_settings(environ={"HOME": str(tmp_path)})
    templates = load_templates(loaded.settings)
    other = templates["ollama-cpu"].model_copy(update={"image": "ollama/ollama:0.1"})
    found = changes(loaded, loaded, templates=templates, wanted_templates={**templates, "ollama-cpu": other})
    assert found.waiting == ("template ollama-cpu",)


def test_what_only_fits_after_a_restart_is_refused_as_a_whole(tmp_path: Path) -> None:
    after = {
        "instances": {**INSTANCES, "more": {"template": "ollama-cpu"}},
        "schedules": [{"cron": "@daily", "action": "start", "instance": "more"}],
    }
    with pytest.raises(
        ConfigurationError, match=r"after\.yaml:\d+: schedules\.0\.instance: 'more' is no instance"
    ):
        compared(tmp_path, {}, after)


def test_a_key_is_not_given_up_while_other_machines_can_reach_the_daemon(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a-key-of-many-characters")
    before = {"server": {"host": "0.0.0.0", "key_file": "key"}}
    with pytest.raises(ConfigurationError, match=r"server\.host: '0\.0\.0\.0' can be reached"):
        compared(tmp_path, before, {"server": {"host": "127.0.0.1"}})


def test_every_live_key_is_a_setting() -> None:
    for path in LIVE:
        kind: Any = Settings
        for key in path:
            fields = fields_of(kind)
            if fields is None:  # instances.*
                assert key == "*"
                from manager.settings import InstanceSettings  # noqa: PLC0415

                kind = InstanceSettings
                continue
            assert key in fields, path
            kind = fields[key]
