"""The documented sample: complete, equal to the defaults, and its alternatives work as well."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manager.settings import Settings, load_settings, load_templates, resolve_instances
from manager.settings.model import InstanceSettings, ScheduleSettings
from manager.settings.routing import ModelEntrySettings, RoleSettings
from manager.settings.schema import fields_of
from manager.settings.servers import ServedModelSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLE = Path(__file__).resolve().parents[3] / "docs" / "ollama-manager.example.yaml"
ENVIRON = {"HOME": "/home/someone"}


def keys(kind: Any) -> Iterator[str]:
    for name, inner in (fields_of(kind) or {}).items():
        yield name
        yield from keys(inner)


def test_the_sample_says_exactly_the_defaults(tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.touch()
    loaded = load_settings(EXAMPLE, environ=ENVIRON)
    assert loaded.settings == load_settings(empty, environ=ENVIRON).settings
    assert resolve_instances(loaded, load_templates(loaded.settings))[0].id == "cpu"


def test_the_sample_sets_every_key_that_has_a_default() -> None:
    loaded = load_settings(EXAMPLE, environ=ENVIRON)
    for section, kind in (fields_of(Settings) or {}).items():
        for path in [f"{section}.{name}" for name in fields_of(kind) or {}] or [section]:
            assert loaded.source_of(path).startswith(f"file {EXAMPLE}:"), path


def test_the_sample_shows_every_key_there_is() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    for name in {
        *keys(Settings),
        *keys(InstanceSettings),
        *keys(ScheduleSettings),
        *keys(RoleSettings),
        *keys(ModelEntrySettings),
        *keys(ServedModelSettings),
    }:
        assert re.search(rf"\b{name}:", text), name


def test_the_alternatives_in_the_sample_can_be_used(tmp_path: Path) -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    for line in ("schedules: []\n", "  writers: {}\n", "  settings: {}\n"):
        assert line in text
        text = text.replace(line, "")
    file = tmp_path / "all.yaml"
    file.write_text(re.sub(r"(?m)^( *)#(?=\S)", r"\1", text), encoding="utf-8")
    loaded = load_settings(file, environ=ENVIRON)
    assert list(loaded.settings.instances) == [
        *("cpu", "gpu0", "gpu1", "gpu2", "both", "big", "box2", "nas", "far", "vllm", "hears", "openai")
    ]
    assert [one.action for one in loaded.settings.schedules] == ["start", "stop", "reap"]
    assert loaded.settings.roles["code-review"].fallbacks == ("output",)
    assert loaded.settings.models.writers == {"ollama-models": "cpu"}
    assert list(loaded.settings.models.settings) == ["qwen3:8b"]
    assert len(resolve_instances(loaded, load_templates(loaded.settings))) == 12
