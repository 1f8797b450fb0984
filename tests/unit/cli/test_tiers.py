"""`tiers`, against an HTTP server that answers like a daemon."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.cli.stand_in import Answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    from tests.unit.cli.stand_in import StandInDaemon

    Run = Callable[..., Result]

MODELS, STATS = "GET /api/v1/llm/models", "GET /api/v1/llm/routing-stats"
HEADING = "TIER MODEL STATUS ON EXPECTED MEASURED COST CONTEXT MAX TOKENS TEMPERATURE CAPABILITIES"


def model(name: str, **facts: Any) -> dict[str, Any]:
    nothing: dict[str, Any] = {
        "tiers": [], "context_window": None, "expected_latency_ms": None, "latency_ms": None,
        "cost_factor": 1.0, "max_tokens": None, "temperature": None, "capabilities": [], "parameters": None,
        "available": False, "loaded": False, "instances": [],
    }  # fmt: skip
    return {"name": name, **nothing, **facts}


SMALL = model(
    "small:latest", expected_latency_ms=200.0, latency_ms=1234.5, context_window=8192, max_tokens=500,
    temperature=0.2, capabilities=["tools", "vision"], available=True, loaded=True, instances=["cpu", "gpu0"],
)  # fmt: skip
LARGE = model("large:70b", cost_factor=6.0, available=True, instances=["gpu0"])
TIERS = {
    "models": [LARGE, model("quick\x1b[31m"), SMALL],
    "tiers": {"fast": ["Small", "quick\x1b[31m"], "medium": [], "complex": ["large:70b"]},
    "auto": True,
}
NUMBERS = {
    "requests": 6, "share": 0.75, "ok": 5, "fallbacks": 2, "input_tokens": 10, "output_tokens": 20,
    "cost_usd": 0.0, "mean_ms": 400.0, "p50_ms": 300.0, "p95_ms": None,
}  # fmt: skip
BEGINS, ENDS = "2026-11-28T12:00:00Z", "2026-11-29T12:00:00Z"


def stats(seconds: float | None, **values: Any) -> dict[str, Any]:
    return {
        "from": BEGINS,
        "to": ENDS,
        "total": {**NUMBERS, "requests": 8, "share": 1.0},
        "fallback_rate": 0.25,
        "by_tier": [
            {"tier": "fast", **NUMBERS},
            {"tier": "complex", **NUMBERS, "requests": 2, "share": 0.25},
        ],
        "by_model": [{"model": "small", **NUMBERS}, {"model": "", **NUMBERS, "requests": 2}],
        "saved": {"requests": 5, "seconds": seconds},
        **values,
    }


def columns(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def test_tiers_have_their_models_in_order_with_facts(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[MODELS] = Answer(TIERS)
    result = run("tiers", "--url", daemon.url)
    assert (result.exit_code, result.stderr) == (0, "")
    heading, *rows = result.stdout.splitlines()
    assert " ".join(heading.split()) == HEADING
    assert list(map(columns, rows)) == [
        [
            "fast",
            "Small",
            "loaded",
            "cpu, gpu0",
            "200 ms",
            "1.2 s",
            "1",
            "8192",
            "500",
            "0.2",
            "tools, vision",
        ],
        ["fast", "quick", "missing", "-", "-", "-", "1", "-", "-", "-", "-"],
        ["medium", "-", "no model of its own", *["-"] * 8],
        ["complex", "large:70b", "available", "gpu0", "-", "-", "6", "-", "-", "-", "-"],
    ]
    assert "\x1b" not in result.stdout


def test_without_tiers_and_without_auto_that_is_said(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[MODELS] = Answer({"models": [LARGE], "tiers": {}, "auto": False})
    result = run("tiers", "--url", daemon.url)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no tiers: no role fast, medium or complex" in result.stderr
    assert "set routing.auto: true" in result.stderr


def test_statistics_are_by_tier_and_by_model_with_what_was_saved(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[STATS] = Answer(stats(12.5))
    result = run("tiers", "stats", "--url", daemon.url)
    assert (result.exit_code, result.stderr) == (0, "")
    span, *lines = result.stdout.splitlines()
    assert " to " in span
    assert [columns(line)[:5] for line in lines] == [
        ["TIER", "REQUESTS", "SHARE", "OK", "FALLBACKS"],
        ["fast", "6", "75.0%", "5", "2"],
        ["complex", "2", "25.0%", "5", "2"],
        ["total", "8", "100.0%", "5", "2"],
        [""],
        ["MODEL", "REQUESTS", "SHARE", "OK", "FALLBACKS"],
        ["small", "6", "75.0%", "5", "2"],
        ["-", "2", "75.0%", "5", "2"],
        [""],
        ["fallbacks: 25.0%"],
        ["saved: about 12.5 s (answered below complex: 5)"],
    ]
    assert columns(lines[1])[5:] == ["10", "20", "0 USD", "400 ms", "300 ms", "-"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "saved: unknown, for complex has answered nothing"),
        (-3.0, "lost: about 3 s"),
        (872.4, "saved: about 14m32s"),
    ],
)
def test_the_time_saved_is_an_estimate_or_unknown(
    daemon: StandInDaemon, run: Run, seconds: float | None, text: str
) -> None:
    daemon.answers[STATS] = Answer(stats(seconds, by_model=[]))
    lines = run("tiers", "stats", "--url", daemon.url).stdout.splitlines()
    assert lines[-1] == f"{text} (answered below complex: 5)"
    assert not any(line.startswith("MODEL") for line in lines)


@pytest.mark.parametrize(
    ("command", "answer"), [(("tiers",), TIERS), (("tiers", "stats"), stats(None))], ids=["tiers", "stats"]
)
def test_as_json_it_is_what_the_api_says(
    daemon: StandInDaemon, run: Run, command: tuple[str, ...], answer: dict[str, Any]
) -> None:
    daemon.answers[MODELS], daemon.answers[STATS] = Answer(TIERS), Answer(stats(None))
    result = run(*command, "--json", "--url", daemon.url)
    assert json.loads(result.stdout) == answer
