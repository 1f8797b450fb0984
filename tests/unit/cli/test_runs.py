"""`ollama-manager runs`, against an HTTP server that answers like a daemon."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.cli.stand_in import Answer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

    from tests.unit.cli.stand_in import StandInDaemon

    Run = Callable[..., Result]

RUNS = "/api/v1/runs"


def a_run(**changes: Any) -> dict[str, Any]:
    """A run in the shape of the API: one that succeeded, unless `changes` say otherwise."""
    return {
        "id": "run_1",
        "status": "succeeded",
        "path": "/api/chat",
        "model": "tiny",
        "lane": None,
        "project_id": "default",
        "idempotent": False,
        "executions": 1,
        "instance": "gpu0",
        "request_id": "r1",
        "body_bytes": 10,
        "expires_s": 60.0,
        "created_at": "2026-11-28T12:00:00.000Z",
        "started_at": "2026-11-28T12:00:01.000Z",
        "ended_at": "2026-11-28T12:00:02.000Z",
        "expires_at": "2026-11-28T12:01:02.000Z",
        "error": None,
        "result": {"status": 200, "content_type": "application/json", "size_bytes": 9},
    } | changes


FAILED = a_run(
    status="failed",
    error={"code": "model_missing", "message": "model 'tiny' not found"},
    result={"status": 404, "content_type": "application/json", "size_bytes": 9},
)
QUEUED = a_run(
    id="run_2",
    status="queued",
    lane="deep-rca",
    instance=None,
    started_at=None,
    ended_at=None,
    expires_at=None,
    result=None,
)


def refusal(status: int, code: str, **headers: str) -> Answer:
    return Answer({"error": {"code": code, "message": "it cannot be done"}}, status, headers)


def test_submit_sends_the_file_with_its_options_and_prints_the_id(
    daemon: StandInDaemon, run: Run, tmp_path: Path
) -> None:
    daemon.answers[f"POST {RUNS}"] = Answer({"id": "run_1", "status": "queued"}, 202)
    file = tmp_path / "body.json"
    file.write_text('{"model": "tiny"}')
    result = run("runs", "submit", str(file), "--path", "/api/chat", "--url", daemon.url)
    assert (result.exit_code, result.stdout) == (0, "run_1\n")
    options = ("--lane", "deep-rca", "--idempotent", "--expires", "2h")
    run("runs", "submit", str(file), "--path", "/api/chat", *options, "--url", daemon.url)
    plain, full = (json.loads(seen.body) for seen in daemon.seen)
    assert plain == {"path": "/api/chat", "body": {"model": "tiny"}, "idempotent": False}
    assert full == {**plain, "lane": "deep-rca", "idempotent": True, "expires_s": 7200}


def test_submit_refuses_what_is_not_json_or_no_duration(
    daemon: StandInDaemon, run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "body.json"
    file.write_text("{")
    result = run("runs", "submit", str(file), "--path", "/api/chat", "--url", daemon.url)
    assert result.exit_code == 2
    assert "body.json is not JSON" in result.stderr
    result = run("runs", "submit", str(file), "--path", "/x", "--expires", "soon", "--url", daemon.url)
    assert result.exit_code == 2
    assert "'soon'; expected seconds, or a duration such as 90s" in result.stderr
    assert daemon.seen == []


def test_list_has_a_line_for_every_run(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"GET {RUNS}?limit=100"] = Answer({"runs": [QUEUED, a_run()], "count": 2})
    result = run("runs", "list", "--url", daemon.url)
    assert result.exit_code == 0
    head, queued, succeeded = (line.split() for line in result.stdout.splitlines())
    assert head == ["ID", "STATUS", "LANE", "MODEL", "INSTANCE", "CREATED", "ENDED", "RESULT"]
    assert queued == ["run_2", "queued", "deep-rca", "tiny", "-", "2026-11-28T12:00:00.000Z", "-", "-"]
    assert succeeded[:5] == ["run_1", "succeeded", "-", "tiny", "gpu0"]
    assert succeeded[-3:] == ["200,", "9", "B"]


def test_list_passes_its_options_on(daemon: StandInDaemon, run: Run) -> None:
    document = {"runs": [], "count": 0}
    daemon.answers[f"GET {RUNS}?limit=5&status=failed"] = Answer(document)
    result = run("runs", "list", "--status", "failed", "--limit", "5", "--json", "--url", daemon.url)
    assert json.loads(result.stdout) == document
    assert run("runs", "list", "--status", "done", "--url", daemon.url).exit_code == 2


def test_show_has_every_field_that_says_something(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"GET {RUNS}/run_1"] = Answer(FAILED)
    result = run("runs", "show", "run_1", "--url", daemon.url)
    lines = dict(line.split(None, 1) for line in result.stdout.splitlines())
    assert lines["status"] == "failed"
    assert lines["error"] == "model 'tiny' not found (model_missing)"
    assert lines["result"].startswith("status 404, content_type application/json")
    assert "lane" not in lines
    assert json.loads(run("runs", "show", "run_1", "--json", "--url", daemon.url).stdout) == FAILED


def test_cancel_says_what_has_become_of_the_run(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"DELETE {RUNS}/run_2"] = Answer({**QUEUED, "status": "cancelled"})
    result = run("runs", "cancel", "run_2", "--url", daemon.url)
    assert (result.exit_code, result.stdout) == (0, "run_2 is cancelled\n")
    daemon.answers[f"DELETE {RUNS}/run_1"] = refusal(409, "run_ended")
    assert run("runs", "cancel", "run_1", "--url", daemon.url).exit_code == 4


def test_result_writes_the_answer_as_it_came(daemon: StandInDaemon, run: Run, tmp_path: Path) -> None:
    daemon.answers[f"GET {RUNS}/run_1"] = Answer(a_run())
    daemon.answers[f"GET {RUNS}/run_1/result"] = Answer('{"a": 1}\n')
    result = run("runs", "result", "run_1", "--url", daemon.url)
    assert (result.exit_code, result.stdout_bytes) == (0, b'{"a": 1}\n')
    file = tmp_path / "answer"
    result = run("runs", "result", "run_1", "--output", str(file), "--url", daemon.url)
    assert (result.exit_code, result.stdout_bytes) == (0, b"")
    assert file.read_bytes() == b'{"a": 1}\n'


def test_the_answer_of_a_failed_run_is_written_and_said_to_be_one(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"GET {RUNS}/run_1"] = Answer(FAILED)
    daemon.answers[f"GET {RUNS}/run_1/result"] = Answer('{"error":"no"}', 404)
    result = run("runs", "result", "run_1", "--url", daemon.url)
    assert (result.exit_code, result.stdout_bytes) == (1, b'{"error":"no"}')
    assert "the run has failed: model 'tiny' not found (model_missing)" in result.stderr


@pytest.mark.parametrize(
    ("answer", "exit_code", "words"),
    [
        (refusal(404, "unknown_run"), 2, "`ollama-manager runs list` lists the runs"),
        (refusal(409, "run_not_ended"), 4, "`ollama-manager runs show ID` says how far it is"),
        (refusal(409, "run_expired"), 4, "(run_expired)"),
    ],
)
def test_a_refused_result_leaves_no_file(  # noqa: PLR0917  (fixtures and cases)
    daemon: StandInDaemon, run: Run, tmp_path: Path, answer: Answer, exit_code: int, words: str
) -> None:
    daemon.answers[f"GET {RUNS}/run_2"] = Answer(QUEUED)
    daemon.answers[f"GET {RUNS}/run_2/result"] = answer
    file = tmp_path / "answer"
    result = run("runs", "result", "run_2", "--output", str(file), "--url", daemon.url)
    assert result.exit_code == exit_code
    assert "it cannot be done" in result.stderr
    assert words in result.stderr
    assert not file.exists()
