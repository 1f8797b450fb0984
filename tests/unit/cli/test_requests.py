"""`requests` and `explain` read as a person wants them, and say what is wrong."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from manager.cli import requests as command
from manager.cli.commands import program
from manager.cli.failures import MISUSED, REFUSED, UNREACHABLE
from manager.cli.printing import Columns
from tests.support.records import a_record
from tests.unit.cli.stand_in import API, Answer, error

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    from tests.unit.cli.stand_in import StandInDaemon

    Run = Callable[..., Result]


def a_request(number: int = 1, *, is_open: bool = False, **values: Any) -> dict[str, Any]:
    said = a_record(request_id=f"r{number}", **values).as_dict()
    said["ts"] = "2026-03-01T12:00:00.250000Z"
    return {"open": is_open, **said, **({"outcome": None} if is_open else {})}


def page(*requests: dict[str, Any], cursor: int = 7) -> Answer:
    return Answer({"requests": list(requests), "count": len(requests), "cursor": cursor})


EXPLAINED = {
    **a_request(status=200, start_ms=1500.0),
    "summary": "asked for thinking, went to cpu, since gpu1 was drained (driver update)",
    "decision": {
        "asked": {"model": "thinking", "kind": "generate", "instance": None, "lane": None},
        "attempts": [
            {
                "instance": "gpu0",
                "model": "qwen3:8b",
                "role": "thinking",
                "because": "loaded",
                "fallback": None,
                "outcome": "failed",
                "reason": "attempt_timeout",
                "message": "gpu0 did not answer\nwithin 60 s",
            },
            {
                "instance": "cpu",
                "model": "qwen3:8b",
                "role": "thinking",
                "because": "running",
                "fallback": "instance_unavailable",
                "outcome": "ok",
                "reason": None,
                "message": "",
            },
        ],
        "more_attempts": 2,
        "passed_over": [
            {
                "instance": "gpu1",
                "model": "qwen3:8b",
                "reason": "instance_unavailable",
                "detail": "drained: driver update",
                "words": "gpu1 was drained (driver update)",
            }
        ],
        "more_passed_over": 0,
        "refused": None,
        "message": "",
    },
}


def test_each_request_is_a_line(run: Run, daemon: StandInDaemon) -> None:
    daemon.answers[f"GET {API}/requests?limit=20"] = page(
        a_request(2, is_open=True, role=None, effective_target=None, output_tokens=None),
        a_request(1, fallback_reason="overloaded"),
    )
    result = run("requests", "--url", daemon.url)
    heading, first, second = result.stdout.splitlines()
    assert heading.split() == [
        "TIME", "OUTCOME", "PROJECT", "ASKED", "INSTANCE", "MODEL", "TOOK", "TOKENS", "REASON", "ID"
    ]  # fmt: skip
    assert first.split()[2:] == ["open", "default", "qwen3:8b", "-", "-", "1.5", "s", "-", "-", "r2"]
    assert second.split()[2:] == [
        "ok", "default", "thinking", "gpu0", "qwen3:8b", "1.5", "s", "34", "overloaded", "r1"
    ]  # fmt: skip
    assert first.index("open") == second.index("ok") == heading.index("OUTCOME")


def test_filters_go_to_the_daemon(run: Run, daemon: StandInDaemon) -> None:
    query = "limit=5&since=2h&project=lab&role=thinking&model=a%3Ab&instance=cpu&outcome=cut"
    daemon.answers[f"GET {API}/requests?{query}"] = page()
    daemon.has({"id": "cpu"})
    daemon.answers["GET /api/settings/models"] = Answer({"roles": {"thinking": {}}})
    options = (
        "--since=2h",
        "--project=lab",
        "--role=thinking",
        "--model=a:b",
        "--instance=cpu",
        "--outcome=cut",
    )
    result = run("requests", "--url", daemon.url, "--limit=5", *options)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no requests\n")


@pytest.mark.parametrize("option", ["--instance", "--role"])
@pytest.mark.parametrize("way", [(), ("--json",), ("-f",)])
def test_an_instance_or_role_that_is_not_there_is_told_where_nothing_is_found(
    run: Run, daemon: StandInDaemon, monkeypatch: pytest.MonkeyPatch, option: str, way: tuple[str, ...]
) -> None:
    def sleep(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", sleep)
    daemon.answers[f"GET {API}/requests?limit=20&{option[2:]}=typo"] = page()
    daemon.has({"id": "cpu"}, {"id": "gpu0"})
    daemon.answers["GET /api/settings/models"] = Answer({"roles": {"thinking": {}, "output": {}}})
    result = CliRunner().invoke(program, ["requests", option, "typo", "--url", daemon.url, *way])
    there = "cpu, gpu0" if option == "--instance" else "thinking, output"
    assert f"warning: there is no {option[2:]} 'typo'; there is: {there}\n" in result.stderr


def test_an_outcome_or_kind_that_there_is_not_is_refused_with_those_there_are(run: Run) -> None:
    result = run("requests", "--outcome", "good")
    assert result.exit_code == MISUSED
    assert "'good' is not one of 'ok', 'client_error'" in result.stderr
    result = run("explain", "tiny", "--kind", "chat")
    assert result.exit_code == MISUSED
    assert "'chat' is not one of 'generate', 'embed', 'transcribe'" in result.stderr


def test_json_is_what_the_api_says(run: Run, daemon: StandInDaemon) -> None:
    answers = {"requests?limit=20": ("requests",), "requests/r1": ("requests", "show", "r1")}
    for path, arguments in answers.items():
        daemon.answers[f"GET {API}/{path}"] = Answer(EXPLAINED)
        assert json.loads(run("--url", daemon.url, *arguments, "--json").stdout) == json.loads(
            json.dumps(EXPLAINED)
        )


def test_what_a_client_chose_moves_no_cursor(run: Run, daemon: StandInDaemon) -> None:
    daemon.answers[f"GET {API}/requests?limit=20"] = page(a_request(project_id="a\x1b[2Jb\nc"))
    assert "  ab c  " in run("requests", "--url", daemon.url).stdout


def test_one_request_is_explained(run: Run, daemon: StandInDaemon) -> None:
    daemon.answers[f"GET {API}/requests/r1"] = Answer(EXPLAINED)
    result = run("requests", "--url", daemon.url, "show", "r1")
    lines = result.stdout.splitlines()
    assert lines[0] == "asked for thinking, went to cpu, since gpu1 was drained (driver update)"
    pairs = dict(line.split("  ", 1) for line in lines[2 : lines.index("attempts:") - 1])
    assert {name.strip(): value.strip() for name, value in pairs.items()}.items() >= {
        ("request", "r1"), ("started in", "1.5 s"), ("tokens", "12 in, 34 out"), ("project", "default")
    }  # fmt: skip
    assert "lane" not in pairs
    attempts = lines[lines.index("attempts:") + 1 :]
    assert attempts == [
        "  gpu0  qwen3:8b  loaded   failed  attempt_timeout: gpu0 did not answer within 60 s",
        "  cpu   qwen3:8b  running  ok",
        "  and 2 more",
        "",
        "passed over:",
        "  gpu1  qwen3:8b  gpu1 was drained (driver update)",
    ]


def test_a_paid_request_shows_who_was_paid_what_and_its_key(run: Run, daemon: StandInDaemon) -> None:
    paid = {"provider": "openai", "cost_usd": 9e-06, "key": "alice"}
    daemon.answers[f"GET {API}/requests/r1"] = Answer({**EXPLAINED, **paid})
    text = run("requests", "show", "r1", "--url", daemon.url).stdout
    told = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert (told["paid"], told["key"]) == (["0.000009", "USD", "to", "openai"], ["alice"])
    local = {"provider": "local", "cost_usd": 0.0, "key": None}
    daemon.answers[f"GET {API}/requests/r1"] = Answer({**EXPLAINED, **local})
    text = run("requests", "show", "r1", "--url", daemon.url).stdout
    assert "paid" not in text


def test_a_request_without_a_decision_has_no_lists(run: Run, daemon: StandInDaemon) -> None:
    decision = {**EXPLAINED["decision"], "attempts": [], "more_attempts": 0, "passed_over": []}
    unread = {"output_tokens": None, "input_tokens": None, "status": 0}
    daemon.answers[f"GET {API}/requests/r1"] = Answer({**EXPLAINED, **unread, "decision": decision})
    text = run("requests", "show", "r1", "--url", daemon.url).stdout
    assert "attempts:" not in text
    assert "tokens" not in text
    assert "status" not in text


def test_an_open_request_is_cancelled(run: Run, daemon: StandInDaemon) -> None:
    daemon.answers[f"DELETE {API}/requests/r1"] = Answer({"request_id": "r1", "cancelled": True})
    assert run("requests", "cancel", "r1", "--url", daemon.url).stdout == "r1: cancelled\n"


@pytest.mark.parametrize(
    ("status", "code", "exit_code"), [(404, "unknown_request", MISUSED), (409, "request_ended", REFUSED)]
)
def test_what_cannot_be_cancelled_is_said(
    run: Run, daemon: StandInDaemon, status: int, code: str, exit_code: int
) -> None:
    daemon.answers[f"DELETE {API}/requests/r1"] = Answer(error(code, "it is not"), status)
    result = run("requests", "cancel", "r1", "--url", daemon.url)
    assert result.exit_code == exit_code
    assert result.stderr.startswith(f"error: it is not ({code})\n")


def test_a_daemon_that_is_not_there_is_said(run: Run) -> None:
    assert run("requests", "--url", "http://127.0.0.1:1").exit_code == UNREACHABLE


@pytest.mark.parametrize("as_json", [False, True])
def test_following_prints_each_request_once_oldest_first(
    daemon: StandInDaemon, monkeypatch: pytest.MonkeyPatch, *, as_json: bool
) -> None:
    looks = 0

    def sleep(_seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks > 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", sleep)
    daemon.answers[f"GET {API}/requests?limit=20"] = page(
        a_request(9, is_open=True), a_request(2), a_request(1), cursor=2
    )
    daemon.answers[f"GET {API}/requests?limit=1000&after=2"] = page(a_request(4), a_request(3), cursor=4)
    daemon.answers[f"GET {API}/requests?limit=1000&after=4"] = page(cursor=4)
    arguments = ["requests", "-f", "--url", daemon.url, *(["--json"] if as_json else [])]
    result = CliRunner().invoke(program, arguments)
    lines = result.stdout.splitlines()
    ids = [json.loads(line)["request_id"] if as_json else line.split()[-1] for line in lines]
    assert ids == [*([] if as_json else ["ID"]), "r1", "r2", "r3", "r4"]


def test_columns_of_a_follower_only_grow() -> None:
    columns = Columns()
    wide, narrow = (command._cells(one) for one in (a_request(project_id="a-long-project"), a_request()))
    columns.widen([wide])
    before = columns.line(wide)
    columns.widen([narrow])
    columns.widen([])
    assert columns.line(wide) == before
    assert columns.line(narrow).rindex(narrow[-1]) == before.rindex(wide[-1])


def test_where_a_request_would_go(run: Run, daemon: StandInDaemon) -> None:
    daemon.answers[f"GET {API}/explain?model=thinking&kind=generate&lane=output&instance=cpu"] = Answer(
        {
            "summary": "thinking would go to cpu",
            "role": "thinking",
            "policy": "auto",
            "requested_target": "auto",
            "attempts": [
                {"instance": "cpu", "model": "m", "role": None, "because": "running", "fallback": "policy"}
            ],
            "passed_over": [
                {"instance": "gpu1", "model": "m", "reason": "breaker_open", "detail": "until 12:00"}
            ],
            "refused": None,
        }
    )
    options = ("--kind=generate", "--lane=output", "--instance=cpu")
    result = run("explain", "thinking", *options, "--url", daemon.url)
    assert result.stdout.splitlines() == [
        "thinking would go to cpu",
        "role    thinking",
        "policy  auto",
        "",
        "attempts:",
        "  cpu  m  running",
        "",
        "passed over:",
        "  gpu1  m  gpu1 had failed several times and was passed over (until 12:00)",
    ]


@pytest.mark.parametrize("way", [(), ("--json",)])
def test_a_request_that_would_be_refused_is_exit_4(
    run: Run, daemon: StandInDaemon, way: tuple[str, ...]
) -> None:
    daemon.answers[f"GET {API}/explain?model=nope"] = Answer(
        {
            "summary": "nope would be refused: model 'nope' not found",
            "role": None,
            "policy": None,
            "attempts": [],
            "passed_over": [],
            "refused": {"what": "unknown", "reason": "model_missing", "message": "model 'nope' not found"},
        }
    )
    result = run("explain", "nope", "--url", daemon.url, *way)
    assert result.exit_code == REFUSED
    assert "nope would be refused" in result.stdout
    assert result.stderr == ""
