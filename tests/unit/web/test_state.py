from __future__ import annotations

from typing import Any

import pytest

from manager.domain.instance import Phase
from manager.web.devices import card_parts, fills_of
from manager.web.state import State, instance_state
from manager.web.texts import read_texts


def instance(**values: Any) -> dict[str, Any]:
    healthy = {"phase": "ready", "health": "healthy", "drained": None, "in_flight": 0}
    healthy |= {"target": "stopped", "reason": None}
    return {**healthy, "breaker": {"state": "closed"}, **values}


@pytest.mark.parametrize(
    ("values", "state"),
    [
        ({}, State("ok", "ready")),
        ({"in_flight": 2}, State("ok", "in_use")),
        ({"health": "unhealthy", "in_flight": 2}, State("bad", "unhealthy")),
        ({"breaker": {"state": "open"}}, State("warn", "breaker_open")),
        ({"drained": {"since": "now"}}, State("warn", "drained")),
        ({"drained": {"since": "now"}, "phase": "stopped"}, State("off", "drained")),
        ({"drained": {"since": "now"}, "phase": "failed"}, State("bad", "failed")),
        ({"phase": "stopped"}, State("off", "stopped")),
        ({"phase": "stopped", "target": "running"}, State("work", "starting")),
        ({"phase": "stopped", "target": "running", "reason": {"code": "x"}}, State("work", "waiting")),
    ],
)
def test_the_worst_that_is_known_of_an_instance_is_its_state(values: Any, state: State) -> None:
    assert instance_state(instance(**values)) == state


@pytest.mark.parametrize("phase", Phase)
def test_every_phase_has_a_word(phase: Phase) -> None:
    texts = read_texts()
    assert texts.state.get(instance_state(instance(phase=phase.value)).word, "") != ""


GPU = {"vram_total_bytes": 100, "vram_used_bytes": 60, "reserved_bytes": 0, "processes": []}


def process(name: str, used: int | None, owner: str | None = None) -> dict[str, Any]:
    return {"pid": 7, "name": name, "used_bytes": used, "instance": owner}


def test_the_memory_of_a_card_is_split_by_owner_and_the_rest_is_named() -> None:
    processes = [process("ollama", 20, "a"), process("ollama", 10, "a"), process("python3", 5)]
    parts = card_parts({**GPU, "processes": processes}, {"a": "1"})
    shares = [(one["name"], one["fill"], one["share"]) for one in parts]
    assert shares == [("a", "1", 0.3), ("python3", "foreign", 0.05), ("other", "foreign", 0.25)]


@pytest.mark.parametrize(("reserved", "share"), [(30, 0.3), (90, 0.4), (None, None), (0, None)])
def test_reserved_memory_comes_last_and_ends_with_the_card(reserved: int | None, share: float | None) -> None:
    parts = card_parts({**GPU, "reserved_bytes": reserved}, {})
    found = [one["share"] for one in parts if one["name"] == "reserved"]
    assert found == ([] if share is None else [share])
    assert parts[-1]["fill"] == ("foreign" if share is None else "reserved")


@pytest.mark.parametrize("unknown", ["vram_total_bytes", "vram_used_bytes"])
def test_unknown_memory_has_no_parts(unknown: str) -> None:
    assert card_parts({**GPU, unknown: None}, {}) == []


def test_a_process_without_a_known_size_is_no_part() -> None:
    (rest,) = card_parts({**GPU, "processes": [process("", None)]}, {})
    assert rest["bytes"] == 60


def test_instances_have_colours_in_turn() -> None:
    assert list(fills_of({"id": str(one)} for one in range(7)).values()) == [*"123456", "1"]
