"""`ollama-manager collections`, against an HTTP server that answers like a daemon."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.cli.stand_in import Answer, error

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    from tests.unit.cli.stand_in import StandInDaemon

    Run = Callable[..., Result]

API = "/api/v1/collections"
DOCS = f"{API}/docs"
VERSION = "0123456789abcdef"


@pytest.fixture(autouse=True)
def found(daemon: StandInDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands talk to this daemon."""
    monkeypatch.setenv("OLLAMA_MANAGER_URL", daemon.url)


def a_collection(**changes: Any) -> dict[str, Any]:
    """A collection in the shape of the API: one with items, unless `changes` say otherwise."""
    return {
        "name": "docs",
        "model": "minilm:latest",
        "prefix": "",
        "dimensions": None,
        "truncate": False,
        "keep_text": True,
        "created_at": "2026-11-28T12:00:00.000Z",
        "version": VERSION,
        "state": "active",
        "items": 1000,
        "coverage": 0.9999,
        "versions": 2,
        "backfill": "running",
    } | changes


EMPTY = a_collection(
    name="notes", version=None, state=None, items=0, coverage=None, versions=0, backfill=None
)


def a_version(**changes: Any) -> dict[str, Any]:
    return {
        "version": VERSION,
        "model": "minilm:latest",
        "digest": "6cf97aa9ab2e7b3b0dc526238904e189",
        "dimensions": 384,
        "prefix": "passage: ",
        "truncate": False,
        "policy": None,
        "state": "active",
        "items": 1000,
        "rows": 999,
        "quarantined": 1,
        "coverage": 0.999,
        "created_at": "2026-11-28T12:00:00.000Z",
        "activated_at": "2026-11-28T12:00:00.000Z",
        "archived_at": None,
        "stale_since": None,
    } | changes


def a_backfill(**changes: Any) -> dict[str, Any]:
    """A backfill in the shape of the API: one that runs, unless `changes` say otherwise."""
    return {
        "version": VERSION,
        "model": "minilm:latest",
        "status": "running",
        "threshold": 1.0,
        "rate": None,
        "auto_cutover": False,
        "items": 1000,
        "rows": 250,
        "missing": 750,
        "quarantined": 0,
        "coverage": 0.25,
        "items_per_s": 50.0,
        "eta_s": 15.0,
        "waits_for": None,
        "error": None,
        "started_at": "2026-11-28T12:00:00.000Z",
        "ended_at": None,
        "failures": [],
    } | changes


DONE = a_backfill(status="succeeded", rows=1000, missing=0, coverage=1.0, items_per_s=None, eta_s=None)


def body(daemon: StandInDaemon) -> Any:
    return json.loads(daemon.seen[-1].body)


# --- collections ----------------------------------------------------------------------------------


def test_list_has_a_line_for_each_and_never_rounds_up(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"GET {API}"] = Answer({"collections": [a_collection(), EMPTY], "count": 2})
    heading, docs, notes = run("collections", "list").stdout.splitlines()
    assert heading.split()[:4] == ["NAME", "MODEL", "VERSION", "STATE"]
    assert docs.split()[:8] == ["docs", "minilm:latest", VERSION, "active", "1000", "99.9%", "2", "running"]
    assert notes.split()[:8] == ["notes", "minilm:latest", "-", "-", "0", "-", "0", "-"]
    document = json.loads(run("collections", "list", "--json").stdout)
    assert document["collections"] == [a_collection(), EMPTY]


def test_show_has_a_line_for_each_value(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"GET {DOCS}"] = Answer(a_collection())
    lines = dict(line.split(maxsplit=1) for line in run("collections", "show", "docs").stdout.splitlines())
    assert (lines["version"], lines["coverage"], lines["keep_text"]) == (VERSION, "99.9%", "true")
    assert "dimensions" not in lines
    assert json.loads(run("collections", "show", "docs", "--json").stdout) == a_collection()


def test_create_sends_what_is_given(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"POST {API}"] = Answer(a_collection(), 201)
    result = run("collections", "create", "docs")
    assert (result.exit_code, result.stdout) == (0, "docs is made, for vectors of minilm:latest\n")
    assert body(daemon) == {"name": "docs", "keep_text": True, "truncate": False}
    options = ("--model", "minilm", "--prefix", "p: ", "--dimensions", "64", "--truncate", "--no-keep-text")
    run("collections", "create", "docs", *options)
    assert body(daemon) == {
        "name": "docs", "model": "minilm", "prefix": "p: ", "dimensions": 64, "truncate": True,
        "keep_text": False,
    }  # fmt: skip


def test_a_refusal_is_told_with_the_next_step(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"GET {DOCS}"] = Answer(error("unknown_collection", "there is no collection 'docs'"), 404)
    result = run("collections", "show", "docs")
    assert result.exit_code == 2
    assert "there is no collection 'docs' (unknown_collection)" in result.stderr
    assert "`ollama-manager collections list`" in result.stderr


def test_delete_asks_and_does_nothing_without_an_answer(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"GET {DOCS}"] = Answer(a_collection())
    daemon.answers[f"DELETE {DOCS}"] = Answer({"removed": "docs"})
    result = run("collections", "delete", "docs")
    assert result.exit_code == 2
    assert "give --yes to agree" in result.stderr
    assert [seen.method for seen in daemon.seen] == ["GET"]
    result = run("collections", "delete", "docs", "--yes")
    assert (result.exit_code, result.stdout) == (0, "docs is removed\n")


# --- versions -------------------------------------------------------------------------------------


def test_versions_has_a_line_for_each(daemon: StandInDaemon, run: Run) -> None:
    stale = a_version(version="f" * 16, state="stale", digest=None, prefix="")
    daemon.answers[f"GET {DOCS}/versions"] = Answer([a_version(), stale])
    _, first, second = run("collections", "versions", "docs").stdout.splitlines()
    assert first.split()[:8] == [
        VERSION, "active", "minilm:latest", "6cf97aa9ab2e", "384", "999/1000", "99.9%", "1",
    ]  # fmt: skip
    assert second.split()[:4] == ["f" * 16, "stale", "minilm:latest", "-"]
    assert json.loads(run("collections", "versions", "docs", "--json").stdout) == [a_version(), stale]


@pytest.mark.parametrize("answer", [{"versions": []}, [1], "text"])
def test_another_answer_than_a_list_is_told(daemon: StandInDaemon, run: Run, answer: Any) -> None:
    daemon.answers[f"GET {DOCS}/versions"] = Answer(answer)
    result = run("collections", "versions", "docs")
    assert result.exit_code == 3
    assert "is not an ollama-manager of this version" in result.stderr


def test_cutover_takes_the_version_of_the_last_backfill(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"GET {DOCS}/backfill"] = Answer(DONE)
    daemon.answers[f"POST {DOCS}/cutover"] = Answer(a_collection())
    result = run("collections", "cutover", "docs")
    assert (result.exit_code, result.stdout) == (0, f"version {VERSION} of docs is active\n")
    assert body(daemon) == {"version": VERSION, "threshold": None}
    run("collections", "cutover", "docs", "other", "--threshold", "0.95")
    assert body(daemon) == {"version": "other", "threshold": 0.95}


@pytest.mark.parametrize("arguments", [("cutover", "docs", VERSION), ("rollback", "docs")])
def test_below_the_threshold_each_item_is_named(
    daemon: StandInDaemon, run: Run, arguments: tuple[str, ...]
) -> None:
    message = "version v has vectors of 2 of 7 items (below_threshold: 1)"
    lacking = {"missing": 4, "missing_ids": ["a", "b\x1b[2J"], "quarantined": 1, "quarantined_ids": ["q"]}
    refusal = Answer(error("below_threshold", message, **lacking), 409)
    daemon.answers[f"POST {DOCS}/{arguments[0]}"] = refusal
    result = run("collections", *arguments)
    assert result.exit_code == 4
    assert message in result.stderr
    lines = [line.strip() for line in result.stderr.splitlines()]
    for line in ("| a is missing", "| b is missing", "| 2 more: each is missing", "| q is in quarantine"):
        assert line in lines
    assert "--threshold" in lines[-1]


def test_rollback_and_delete_version_say_what_they_did(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"POST {DOCS}/rollback"] = Answer(a_collection(version="f" * 16))
    daemon.answers[f"DELETE {DOCS}/versions/{VERSION}"] = Answer({"removed": VERSION})
    assert run("collections", "rollback", "docs").stdout == f"version {'f' * 16} of docs is active\n"
    assert body(daemon) == {"threshold": None}
    result = run("collections", "delete-version", "docs", VERSION)
    assert (result.exit_code, result.stdout) == (0, f"version {VERSION} of docs is removed\n")


@pytest.mark.parametrize("threshold", ["0", "1.1", "all", "nan"])
def test_a_threshold_that_is_no_share_is_refused(daemon: StandInDaemon, run: Run, threshold: str) -> None:
    result = run("collections", "rollback", "docs", "--threshold", threshold)
    assert (result.exit_code, daemon.seen) == (2, [])


# --- backfill -------------------------------------------------------------------------------------


def test_backfill_begins_with_what_is_given(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"POST {DOCS}/backfill"] = Answer(a_backfill(), 202)
    result = run("collections", "backfill", "docs")
    assert (result.exit_code, body(daemon)) == (0, {})
    lines = {line[:10].strip(): line[10:].strip() for line in result.stdout.splitlines()}
    assert (lines["status"], lines["coverage"], lines["left"]) == ("running", "25%", "15s")
    options = ("--model", "m", "--prefix", "", "--dimensions", "8", "--no-truncate", "--threshold", "0.9")
    run("collections", "backfill", "docs", *options, "--rate", "5", "--auto-cutover")
    assert body(daemon) == {
        "model": "m", "prefix": "", "dimensions": 8, "truncate": False, "threshold": 0.9, "rate": 5.0,
        "auto_cutover": True,
    }  # fmt: skip


@pytest.mark.parametrize("action", ["pause", "resume", "cancel"])
def test_a_backfill_that_there_is_gets_changed(daemon: StandInDaemon, run: Run, action: str) -> None:
    daemon.answers[f"POST {DOCS}/backfill/{action}"] = Answer(a_backfill(status="paused"))
    result = run("collections", "backfill", "docs", f"--{action}", "--json")
    assert (result.exit_code, json.loads(result.stdout)["status"]) == (0, "paused")
    result = run("collections", "backfill", "docs", f"--{action}", "--rate", "5")
    assert result.exit_code == 2
    assert f"--{action} is about the backfill that there is: it goes without --rate" in result.stderr


def test_wait_ends_with_the_backfill(
    daemon: StandInDaemon, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = iter([a_backfill(rows=300, waits_for="no server is free"), DONE])
    daemon.answers[f"POST {DOCS}/backfill"] = Answer(a_backfill(), 202)
    daemon.answers[f"GET {DOCS}/backfill"] = Answer(lambda: iter([json.dumps(next(states))]))
    monkeypatch.setattr("manager.cli.collection_backfills._LOOK_S", 0.0)
    result = run("collections", "backfill", "docs", "--wait")
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        "250/1000 items, 50.0 a second, 15s left",
        "300/1000 items, 50.0 a second, 15s left, waits: no server is free",
    ]
    assert "succeeded" in result.stdout


@pytest.mark.parametrize(
    ("changes", "exit_code", "message"),
    [
        ({"status": "failed", "error": "version_stale"}, 1, "the backfill is failed: version_stale"),
        ({"status": "paused"}, 1, "the backfill is paused"),
        ({"status": "succeeded", "error": "it did not cut over"}, 4, "it did not cut over"),
    ],
)
def test_wait_tells_another_end(
    daemon: StandInDaemon, run: Run, changes: dict[str, Any], exit_code: int, message: str
) -> None:
    daemon.answers[f"GET {DOCS}/backfill"] = Answer(a_backfill(**changes))
    result = run("collections", "backfill", "docs", "--status", "--wait")
    assert result.exit_code == exit_code
    assert message in result.stderr
    assert run("collections", "backfill", "docs", "--status").exit_code == 0


def test_failures_are_told_up_to_a_bound(daemon: StandInDaemon, run: Run) -> None:
    failures = [{"id": str(n), "attempts": 3, "message": "too long", "quarantined": n < 5} for n in range(12)]
    daemon.answers[f"GET {DOCS}/backfill"] = Answer(a_backfill(failures=failures))
    lines = run("collections", "backfill", "docs", "--status").stderr.splitlines()
    assert lines[0] == "warning: item 0 in quarantine after 3 tries: too long"
    assert lines[9] == "warning: item 9 is tried again after 3 tries: too long"
    assert lines[10:] == ["warning: 2 more failures: --json lists them"]
