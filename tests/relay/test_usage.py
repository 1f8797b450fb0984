"""Usage over the API and on the command line, of a daemon that has answered requests."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.daemon import ROOT
from tests.support.gateway import Gateway, gateway_over

if TYPE_CHECKING:
    from collections.abc import Iterator

USAGE = "/api/v1/usage"
CHAT = {
    "messages": [{"role": "user", "content": "hi"}],
    "stream": False,
    "options": {"num_predict": 3},
}
NUMBERS = [
    "requests",
    "share",
    "ok",
    "fallbacks",
    "input_tokens",
    "output_tokens",
    "cost_usd",
    "mean_ms",
    "p50_ms",
    "p95_ms",
]
ASKED = {"shop": ["tiny", "tiny:latest", "fast"], "lab": ["tiny", "unknown"]}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    config = {"roles": {"fast": {"model": "tiny"}}}
    with gateway_over(tmp_path_factory.mktemp("usage"), config=config) as gateway:
        for project, models in ASKED.items():
            for model in models:
                gateway.call(
                    "POST", "/api/chat", json={**CHAT, "model": model}, headers={"X-Project-ID": project}
                )
        yield gateway


def asked(gateway: Gateway, **query: str) -> Any:
    answer = gateway.call("GET", USAGE, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def command(gateway: Gateway, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "manager", "usage", *arguments, "--url", gateway.url],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip


def test_requests_that_have_ended_are_counted_at_once_by_project(gateway: Gateway) -> None:
    found = asked(gateway)
    assert found["by"] == ["project"]
    shop, lab = found["rows"]
    assert list(shop) == ["project", *NUMBERS]
    assert list(found["total"]) == NUMBERS
    assert [(one["project"], one["requests"], one["share"], one["ok"]) for one in (shop, lab)] == [
        ("shop", 3, 0.6, 3),
        ("lab", 2, 0.4, 1),
    ]
    assert (shop["output_tokens"], lab["output_tokens"], found["total"]["output_tokens"]) == (9, 3, 12)
    assert shop["input_tokens"] > 0
    assert 0 < shop["p50_ms"] <= shop["p95_ms"]
    assert (found["total"]["requests"], found["total"]["share"], found["total"]["cost_usd"]) == (5, 1.0, 0.0)


def test_each_dimension_tells_groups_apart_and_a_model_has_one_name(gateway: Gateway) -> None:
    rows = asked(gateway, by="project,key,role,model,instance,day")["rows"]
    names = ("project", "key", "role", "model", "instance", "requests")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("shop", "", "", "tiny", "one", 2),
        ("lab", "", "", "tiny", "one", 1),
        ("lab", "", "", "unknown", "", 1),
        ("shop", "", "fast", "tiny", "one", 1),
    ]
    assert {row["day"] for row in rows} <= {datetime.now(UTC).strftime("%Y-%m-%d"), rows[0]["day"]}


def test_by_hour_the_hours_are_those_in_which_requests_ended(gateway: Gateway) -> None:
    rows = asked(gateway, by="hour,project", **{"from": "2d"})["rows"]
    assert sum(row["requests"] for row in rows) == 5
    hours = {row["hour"] for row in rows}
    assert len(hours) <= 2  # the requests may have been made at the turn of an hour
    now = datetime.now(UTC)
    for hour in hours:
        assert timedelta(0) <= now - datetime.fromisoformat(hour) < timedelta(hours=2)


def test_a_table_of_commas_has_the_same_numbers(gateway: Gateway) -> None:
    answer = gateway.call("GET", USAGE, params={"format": "csv", "by": "model,project"})
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert list(rows[0]) == ["model", "project", *NUMBERS]
    told = [(row["model"], row["project"], row["requests"], row["cost_usd"]) for row in rows]
    assert told == [("tiny", "shop", "3", "0"), ("tiny", "lab", "1", "0"), ("unknown", "lab", "1", "0")]
    assert command(gateway, "--csv", "--by", "model,project") == answer.text.replace("\r\n", "\n")


def test_a_time_without_requests_has_none(gateway: Gateway) -> None:
    found = asked(gateway, **{"from": "2026-01-01T00:00:00Z", "to": "2026-01-02T00:00:00Z"})
    assert (found["rows"], found["total"]["requests"], found["total"]["p95_ms"]) == ([], 0, None)
    assert (found["from"], found["to"]) == ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z")


@pytest.mark.parametrize(
    ("query", "words"),
    [
        (
            {"by": "project,nobody"},
            "query.by: 'project,nobody'; 'nobody' is unknown; expected some of project",
        ),
        ({"by": "day,day"}, "names one of them twice"),
        ({"from": "yesterday"}, "query.from: 'yesterday'; expected a time with its zone"),
        ({"format": "xml"}, "query.format: 'xml'"),
        ({"since": "2h"}, "query.since"),
    ],
)
def test_a_query_that_cannot_be_meant_is_refused_by_its_field(
    gateway: Gateway, query: dict[str, str], words: str
) -> None:
    answer = gateway.call("GET", USAGE, params=query)
    assert answer.status_code == 422
    assert words in answer.json()["error"]["message"]


def test_the_command_shows_a_table_of_yesterday_and_today(gateway: Gateway) -> None:
    lines = command(gateway, "--by", "project,model", "--since", "yesterday").splitlines()
    assert lines[1].split()[:4] == ["PROJECT", "MODEL", "REQUESTS", "SHARE"]
    assert [line.split()[:4] for line in lines[2:5]] == [
        ["shop", "tiny", "3", "60.0%"],
        ["lab", "tiny", "1", "20.0%"],
        ["lab", "unknown", "1", "20.0%"],
    ]
    assert lines[5].split()[:4] == ["total", "-", "5", "100.0%"]
    document = json.loads(command(gateway, "--json"))
    assert [row["project"] for row in document["rows"]] == ["shop", "lab"]
