"""The section `rollout`: contradictions are refused by name, and overrides stand above what was written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import yaml

from manager.domain.rollout import Stage
from manager.errors import ConfigurationError
from manager.settings import load_settings
from manager.settings.overrides import Sourced
from manager.settings.rollout import DEFAULTS, RolloutSettings, rollout_overlaid, rollout_refusals

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from manager.domain.template import Refusal
    from manager.settings import LoadedSettings

RAW = "http://10.0.0.1:11434"


def loaded(directory: Path, rollout: Any, **more: Any) -> LoadedSettings:
    file = directory / "config.yaml"
    file.write_text(yaml.safe_dump({"rollout": rollout, **more}), encoding="utf-8")
    return load_settings(file, environ={"HOME": "/home/someone"})


def none(_section: RolloutSettings) -> Iterator[Refusal]:
    return iter(())


def test_every_request_is_managed_by_default(tmp_path: Path) -> None:
    rollout = loaded(tmp_path, {}).settings.rollout
    assert (rollout.stage, rollout.lanes, rollout.raw_url) == (Stage.ALL, (), None)


@pytest.mark.parametrize(
    "rollout",
    [
        {"stage": "observe", "raw_url": RAW},
        {"stage": "shadow", "raw_url": f"{RAW}/"},
        {"stage": "lanes", "raw_url": RAW, "lanes": ["output", "own"]},
        {"stage": "all", "raw_url": RAW, "lanes": ["output"]},
        {"raw_url": ""},
    ],
)
def test_what_fits_is_taken(tmp_path: Path, rollout: Any) -> None:
    found = loaded(tmp_path, rollout, roles={"own": {"kind": "embed"}}).settings.rollout
    assert found.raw_url == (RAW if rollout["raw_url"] else None)


@pytest.mark.parametrize(
    ("rollout", "key", "words"),
    [
        ({"stage": "observe"}, "rollout.raw_url", "missing; the stage 'observe'"),
        ({"stage": "shadow"}, "rollout.raw_url", "missing"),
        ({"stage": "lanes", "lanes": ["output"]}, "rollout.raw_url", "missing"),
        ({"stage": "lanes", "raw_url": RAW}, "rollout.lanes", "at least one role"),
        ({"lanes": ["nobody"]}, "rollout.lanes", "'nobody' is no role; expected some of: thinking"),
        ({"lanes": ["output", "output"]}, "rollout.lanes", "twice"),
        ({"stage": "some"}, "rollout.stage", "'observe', 'shadow', 'lanes' or 'all'"),
        ({"raw_url": "unix:///x"}, "rollout.raw_url", "expected http://"),
        ({"raw_url": "http://me:secret@x"}, "rollout.raw_url", "without credentials"),
        ({"raw_url": "http://localhost:11435"}, "rollout.raw_url", "the daemon's own address"),
        ({"raw_url": "http://10.9.9.9:11435"}, "rollout.raw_url", "the daemon's own address"),
    ],
)
def test_a_contradiction_is_refused_by_name(tmp_path: Path, rollout: Any, key: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        loaded(tmp_path, rollout, server={"host": "10.9.9.9", "key_file": "/k", "allowed_hosts": ["x"]})
    assert f"{key}: " in str(refused.value)
    assert words in str(refused.value)
    assert "secret" not in str(refused.value)


def test_no_instance_has_the_name_of_the_raw_server(tmp_path: Path) -> None:
    instances = {"raw": {"driver": "external", "url": "http://10.0.0.2:11434"}}
    assert loaded(tmp_path, {}, instances=instances)
    with pytest.raises(ConfigurationError, match="an instance has the id 'raw'"):
        loaded(tmp_path, {"raw_url": RAW}, instances=instances)


def test_a_server_that_costs_money_is_no_raw_server(tmp_path: Path) -> None:
    models = {
        "gpt-5-mini": {
            "input_usd_per_mtok": 0.25,
            "output_usd_per_mtok": 2.0,
            "max_output_tokens": 1000,
            "for": ["output"],
        }
    }
    paid = {
        "driver": "cloud",
        "protocol": "openai",
        "url": "https://api.example.com/v1",
        "key_env": "KEY",
        "models": models,
    }
    assert loaded(tmp_path, {"raw_url": RAW}, instances={"paid": paid})
    with pytest.raises(ConfigurationError, match="the server of 'paid', which costs money"):
        loaded(tmp_path, {"raw_url": "https://api.example.com:443"}, instances={"paid": paid})
    free = {"driver": "external", "url": RAW}
    assert loaded(tmp_path, {"raw_url": RAW}, instances={"free": free})


def test_overrides_stand_above_what_was_written() -> None:
    written = {**DEFAULTS, "raw_url": Sourced(RAW, "file")}
    found = rollout_overlaid(written, {"stage": "observe"}, none)
    assert (found.section.stage, found.section.raw_url, found.ignored) == (Stage.OBSERVE, RAW, ())
    assert found.values["stage"] == Sourced("observe", "override")
    assert found.values["raw_url"] == Sourced(RAW, "file")


@pytest.mark.parametrize(
    "overrides", [{"stage": "observe"}, {"stage": "gone", "raw_url": RAW}, {"raw_url": 7}]
)
def test_overrides_that_make_no_section_are_ignored_together(overrides: dict[str, Any]) -> None:
    found = rollout_overlaid(DEFAULTS, overrides, none)
    assert (found.values, found.section) == (DEFAULTS, RolloutSettings())
    assert [one.key for one in found.ignored] == [f"rollout.{field}" for field in overrides]


def test_an_override_that_leads_to_the_daemon_itself_is_ignored_and_a_lane_that_is_gone_is_not(
    tmp_path: Path,
) -> None:
    settings = loaded(tmp_path, {}).settings

    def refusals(section: RolloutSettings) -> Iterator[Refusal]:
        return rollout_refusals(section, settings, settings.roles)

    own = {"stage": "observe", "raw_url": "http://127.0.0.1:11435"}
    assert len(rollout_overlaid(DEFAULTS, own, refusals).ignored) == 2
    gone = {"stage": "lanes", "lanes": ["gone", "output"], "raw_url": RAW}
    assert rollout_overlaid(DEFAULTS, gone, refusals).section.lanes == ("gone", "output")
