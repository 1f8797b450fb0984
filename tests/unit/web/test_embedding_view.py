from __future__ import annotations

from typing import Any

import pytest

from manager.web.embedding_view import embedding_fragment, health_fragment, runtime_state

CARD = {"kind": "gpu", "index": 0, "name": "RTX"}
PROCESSOR = {"kind": "cpu", "index": None, "name": None}
UNDECLARED = {"kind": None, "index": None, "name": None}


def instance(
    id_: str, device: dict[str, Any], phase: str = "ready", health: str = "healthy"
) -> dict[str, Any]:
    return {
        "id": id_,
        "device": device,
        "phase": phase,
        "health": health,
        "drained": None,
        "breaker": {"state": "closed"},
        "in_flight": 0,
        "reason": None,
    }


def sections(
    *,
    policy: str = "prefer_gpu",
    target: str = "auto",
    goes_to: str | None = "cpu",
    reason: str | None = None,
    requests: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    now = {
        "model": "minilm",
        "effective_target": goes_to,
        "requested_target": target,
        "fallback_reason": reason,
        "message": None,
    }
    facts = {
        "model": "minilm",
        "policy": policy,
        "target": None if target == "auto" else target,
        "serving": ["cpu", "gpu0"],
        "unread": [],
        "instances": ["cpu"],
        "loaded_on": ["cpu"],
        "dimensions": 384,
        "is_asked": False,
    }
    instances = [instance("cpu", PROCESSOR), instance("gpu0", CARD), instance("nas", UNDECLARED)]
    return {
        "embedding": facts,
        "routing": {"embedding": now},
        "instances": instances,
        "requests": requests or [],
    }


@pytest.mark.parametrize(
    ("values", "fell"),
    [
        ({}, True),
        ({"goes_to": "gpu0"}, False),
        ({"goes_to": "nas", "reason": "gpu_missing"}, False),  # nobody has said where it runs
        ({"goes_to": None}, False),
        ({"policy": "auto"}, False),  # the CPU is as good as any
        ({"policy": "cpu_only"}, False),
        ({"policy": "auto", "target": "gpu0", "reason": "instance_unavailable"}, True),
        ({"policy": "auto", "target": "cpu"}, False),
    ],
)
def test_a_fall_to_the_cpu_is_one_where_a_gpu_was_asked_for(values: dict[str, Any], *, fell: bool) -> None:
    assert embedding_fragment(sections(**values)).context["fell_to_cpu"] is fell


def request(role: str = "embedding", **values: Any) -> dict[str, Any]:
    return {
        "request_id": "r1",
        "role": role,
        "open": False,
        "fallback": True,
        "fallback_reason": "gpu_missing",
        "effective_target": "cpu",
        **values,
    }


@pytest.mark.parametrize(
    ("requests", "is_told"),
    [
        ([], False),
        ([request("output")], False),
        ([request(open=True), request(fallback=False)], False),
        ([request(fallback=False), request()], False),  # the last one counts
        ([request(open=True), request("output"), request()], True),
        ([request(effective_target=None)], True),
    ],
)
def test_the_last_embedding_is_told_where_it_was_a_fallback(
    requests: list[dict[str, Any]], *, is_told: bool
) -> None:
    last = embedding_fragment(sections(requests=requests)).context["last"]
    assert (last is not None) is is_told


@pytest.mark.parametrize(
    ("phase", "health", "word"),
    [
        ("ready", "healthy", "runtime_running"),
        ("draining", "unknown", "runtime_running"),
        ("ready", "unhealthy", "runtime_unavailable"),
        ("failed", "unknown", "runtime_unavailable"),
        ("unavailable", "unknown", "runtime_unavailable"),
        ("stopped", "unknown", "runtime_stopped"),
        ("starting", "unknown", "runtime_stopped"),
        ("stopping", "unknown", "runtime_stopped"),
    ],
)
def test_an_instance_is_running_stopped_or_unavailable(phase: str, health: str, word: str) -> None:
    assert runtime_state(instance("a", CARD, phase, health)).word == word


def test_there_is_a_card_for_each_instance_that_could_embed() -> None:
    found = health_fragment(sections(policy="cpu_only", target="cpu")).context["cards"]
    assert [one["id"] for one in found] == ["cpu", "gpu0"]
    first, second = found
    assert first["is_target"]
    assert first["in_effect"]
    assert first["has_model"]
    assert first["is_loaded"]
    assert first["is_allowed"]
    assert not second["is_allowed"]
    assert not second["has_model"]
