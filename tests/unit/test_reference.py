"""docs/reference.md names every phase, reason and event, and none that does not exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from manager.api.cluster import ClusterHealthBody
from manager.domain.embeddings import STALE, BackfillStatus, VersionState
from manager.domain.instance import Health, Phase
from manager.domain.roles import Strategy
from manager.domain.runs import RunStatus
from manager.errors import Reason

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
# Where an event is recorded its name is the first argument, or one of two.
RECORDED = re.compile(
    r'[rR]ecord\(\s*"([a-z_]+)"(?: if [^"]+ else "([a-z_]+)")?'
    # Those of collections are named where they are chosen.
    r'|event="([a-z_]+)"|BackfillStatus\.[A-Z]+: "([a-z_]+)"'
)


def named(section: str) -> set[str]:
    """The words in the first column of a section's table."""
    text = REFERENCE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+) \|", text, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([a-z_]+)`", row)}


def test_every_phase_and_reason_is_named() -> None:
    assert named("Phases of an instance") == {phase.value for phase in Phase}
    assert named("Reasons") == {reason.value for reason in Reason}
    assert {health.value for health in Health} <= set(re.findall(r"`([a-z]+)`", REFERENCE))


def test_every_status_of_a_run_is_named() -> None:
    assert named("Statuses of a run") == {status.value for status in RunStatus}


def test_every_state_of_a_version_and_every_status_of_a_backfill_is_named() -> None:
    assert named("States of a version") == {state.value for state in VersionState} | {STALE}
    assert named("Statuses of a backfill") == {status.value for status in BackfillStatus}


def test_every_event_is_named() -> None:
    recorded = {
        name
        for file in (ROOT / "manager").rglob("*.py")
        for names in RECORDED.findall(file.read_text(encoding="utf-8"))
        for name in names
        if name
    }
    assert named("Events") - {"healthy", "unhealthy"} == recorded - {"healthy", "unhealthy"}


@pytest.mark.parametrize("document", ["README.md", "compose/README.md"])
def test_a_document_that_uses_docker_compose_says_how_to_get_it(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert "\ndocker compose up" in text
    for package in ("docker-compose-v2", "docker-compose-plugin"):
        assert f"{package}`" in text


def test_every_strategy_and_every_status_of_the_cluster_is_named() -> None:
    assert named("Strategies of a role") == {strategy.value for strategy in Strategy}
    statuses = ClusterHealthBody.model_fields["status"].annotation
    assert named("Statuses of the cluster") == set(get_args(statuses))
