"""`ollama-manager collections put`, `get`, `export` and `query`, against a server like a daemon."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from manager.cli.commands import program
from tests.unit.cli.stand_in import Answer, error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from click.testing import Result

    from tests.unit.cli.stand_in import StandInDaemon

    Run = Callable[..., Result]

DOCS = "/api/v1/collections/docs"
ITEMS = f"{DOCS}/items"
VERSION = "0123456789abcdef"
WRITTEN = {
    "written": 0,
    "version": VERSION,
    "versions": [VERSION],
    "embedding_model": "minilm:latest",
    "embedding_dim": 3,
    "embedding_version": VERSION,
    "created_at": "2026-11-28T12:00:00.000Z",
}


@pytest.fixture(autouse=True)
def found(daemon: StandInDaemon, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The commands talk to this daemon; they say how long they would wait."""
    waited: list[float] = []
    monkeypatch.setenv("OLLAMA_MANAGER_URL", daemon.url)
    monkeypatch.setattr("manager.cli.collection_items.time.sleep", waited.append)
    return waited


def an_item(item_id: str = "a", **changes: Any) -> dict[str, Any]:
    return {
        "id": item_id,
        "text": f"text of {item_id}",
        "metadata": {"n": 1},
        "created_at": "2026-11-28T12:00:00.000Z",
        "embedding_model": "minilm:latest",
        "embedding_dim": 3,
        "embedding_version": VERSION,
        "versions": [
            {
                "embedding_version": VERSION,
                "embedding_model": "minilm:latest",
                "embedding_dim": 3,
                "state": "active",
                "created_at": "2026-11-28T12:00:00.000Z",
            }
        ],
    } | changes


def lines_of(count: int, first: int = 0) -> list[str]:
    return [json.dumps({"id": str(number), "text": "x"}) for number in range(first, first + count)]


def a_file(tmp_path: Path, lines: list[str]) -> str:
    file = tmp_path / "items.jsonl"
    file.write_text("\n".join(lines))
    return str(file)


def sent(daemon: StandInDaemon) -> list[list[Any]]:
    return [json.loads(seen.body)["items"] for seen in daemon.seen if seen.method == "PUT"]


# --- put ------------------------------------------------------------------------------------------


def test_put_writes_by_the_hundred(daemon: StandInDaemon, run: Run, tmp_path: Path) -> None:
    daemon.answers[f"PUT {ITEMS}"] = Answer(WRITTEN)
    result = run("collections", "put", "docs", a_file(tmp_path, ["", *lines_of(250), " "]))
    assert (result.exit_code, result.stdout) == (0, f"250 items are written to docs, version {VERSION}\n")
    assert [len(batch) for batch in sent(daemon)] == [100, 100, 50]
    assert sent(daemon)[2][-1] == {"id": "249", "text": "x"}


def test_put_reads_stdin_and_prints_json(daemon: StandInDaemon) -> None:
    daemon.answers[f"PUT {ITEMS}"] = Answer(WRITTEN)
    arguments = ["collections", "put", "docs", "--json"]
    result = CliRunner().invoke(program, arguments, input="\n".join(lines_of(3)))
    assert json.loads(result.stdout) == {**WRITTEN, "written": 3}


def test_an_id_that_comes_again_is_written_later(daemon: StandInDaemon, run: Run, tmp_path: Path) -> None:
    daemon.answers[f"PUT {ITEMS}"] = Answer(WRITTEN)
    run("collections", "put", "docs", a_file(tmp_path, [*lines_of(3), *lines_of(1), *lines_of(1, 7)]))
    assert [[item["id"] for item in batch] for batch in sent(daemon)] == [["0", "1", "2"], ["0", "7"]]


def test_large_items_are_sent_in_smaller_batches(daemon: StandInDaemon, run: Run, tmp_path: Path) -> None:
    daemon.answers[f"PUT {ITEMS}"] = Answer(WRITTEN)
    lines = [json.dumps({"id": str(number), "text": "x" * 1_500_000}) for number in range(5)]
    assert run("collections", "put", "docs", a_file(tmp_path, lines)).exit_code == 0
    assert [len(batch) for batch in sent(daemon)] == [2, 2, 1]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "it is not JSON"),
        ("[1]", "expected an object"),
        ('{"id": "a", "vector": [NaN]}', "it is not JSON: NaN is no finite number"),
        ('{"id": "a", "vector": [1e400]}', "it is not JSON: 1e400 is no finite number"),
        ("[" * 100_000, "it is not JSON"),
    ],
)
def test_a_line_that_is_no_item_is_named_with_what_was_written(
    daemon: StandInDaemon, run: Run, tmp_path: Path, line: str, why: str
) -> None:
    daemon.answers[f"PUT {ITEMS}"] = Answer(WRITTEN)
    file = a_file(tmp_path, ["", *lines_of(150), line, *lines_of(100, 150)])
    result = run("collections", "put", "docs", file)
    assert result.exit_code == 2
    assert f"{file}, line 152: {why}" in result.stderr
    assert "100 items were written, to line 101" in result.stderr
    assert [len(batch) for batch in sent(daemon)] == [100]


def test_a_refused_item_is_named_by_its_line(daemon: StandInDaemon, run: Run, tmp_path: Path) -> None:
    fields = [
        {"field": "body.items.2.text", "message": "'' is empty"},
        {"field": "body.items.3.vector.0", "message": "expected a number"},
    ]
    refusal = error("invalid_request", "body.items.2.text: '' is empty", fields=fields)
    answers = iter([Answer(WRITTEN), Answer(refusal, 422)])
    daemon.answers[f"PUT {ITEMS}"] = next(answers)

    def then() -> Iterator[str]:
        daemon.answers[f"PUT {ITEMS}"] = next(answers)
        yield json.dumps(WRITTEN)

    daemon.answers[f"PUT {ITEMS}"] = Answer(then)
    file = a_file(tmp_path, [*lines_of(100), "", *lines_of(10, 100)])
    result = run("collections", "put", "docs", file)
    assert result.exit_code == 2
    assert f"error: {file}, line 104: text: '' is empty" in result.stderr
    assert f"| {file}, line 105: vector.0: expected a number" in result.stderr
    assert "100 items were written, to line 100" in result.stderr


@pytest.mark.parametrize("status", [429, 503])
def test_an_overloaded_daemon_is_asked_again_when_it_says(
    daemon: StandInDaemon, run: Run, tmp_path: Path, found: list[float], status: int
) -> None:
    busy = Answer(error("overloaded", "no slot is free"), status, {"Retry-After": "7"})
    answers = [busy, busy, Answer(WRITTEN)]
    daemon.answers[f"PUT {ITEMS}"] = answers[0]
    monkeyed = found.append

    def next_answer(_pause: float) -> None:
        monkeyed(_pause)
        daemon.answers[f"PUT {ITEMS}"] = answers[len(found)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("manager.cli.collection_items.time.sleep", next_answer)
        result = run("collections", "put", "docs", a_file(tmp_path, lines_of(2)))
    assert (result.exit_code, found) == (0, [7.0, 7.0])
    assert "nothing was written; waiting 7 s: no slot is free" in result.stderr


@pytest.mark.parametrize(("headers", "tries"), [({"Retry-After": "9999"}, 10), ({}, 1)])
def test_a_daemon_that_stays_overloaded_is_given_up(
    daemon: StandInDaemon, tmp_path: Path, found: list[float], headers: dict[str, str], tries: int
) -> None:
    daemon.answers[f"PUT {ITEMS}"] = Answer(error("overloaded", "no slot is free"), 503, headers)
    arguments = ["collections", "put", "docs", a_file(tmp_path, lines_of(2))]
    result = CliRunner().invoke(program, arguments)
    assert result.exit_code == 1
    assert "no slot is free (overloaded); nothing was written" in result.stderr
    assert len(sent(daemon)) == tries
    assert found == [60.0] * (tries - 1)


# --- single items ---------------------------------------------------------------------------------


def test_get_shows_an_item(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"GET {ITEMS}/a%2Fb%20%C3%A4"] = Answer(an_item("a/b ä"))
    result = run("collections", "get", "docs", "a/b ä")
    lines = {line[:12].strip(): line[12:] for line in result.stdout.splitlines()}
    assert (lines["id"], lines["text"], lines["versions"]) == (
        "a/b ä",
        "text of a/b ä",
        f"{VERSION} (active)",
    )
    assert "vector" not in lines
    daemon.answers[f"GET {ITEMS}/a?vector=true"] = Answer(an_item(vector=[0.6, 0.8]))
    assert "[0.6, 0.8]" in run("collections", "get", "docs", "a", "--vector").stdout
    document = json.loads(run("collections", "get", "docs", "a", "--vector", "--json").stdout)
    assert document == an_item(vector=[0.6, 0.8])


def test_delete_item_never_reaches_the_collection(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"DELETE {ITEMS}/a"] = Answer({"removed": "a"})
    daemon.answers[f"DELETE {DOCS}"] = Answer({"removed": "docs"})
    daemon.answers[f"DELETE {DOCS}/"] = Answer({"removed": "docs"})
    result = run("collections", "delete-item", "docs", "a")
    assert (result.exit_code, result.stdout) == (0, "a is removed from docs\n")
    for item_id in ("..", ".", ""):
        result = run("collections", "delete-item", "docs", item_id)
        assert result.exit_code == 2
        assert "names nothing in a collection" in result.stderr
    assert len(daemon.seen) == 1


# --- export ---------------------------------------------------------------------------------------


def test_export_writes_what_put_reads(daemon: StandInDaemon, run: Run) -> None:
    keys = ("id", "text", "metadata", "created_at")
    items = [{key: an_item(one)[key] for key in keys} for one in ("a", "b/?", "c", "d")]
    items[2]["text"] = items[3]["text"] = None
    daemon.answers[f"GET {ITEMS}"] = Answer({"items": items[:2], "count": 2, "next": "b/?"})
    daemon.answers[f"GET {ITEMS}?after=b%2F%3F"] = Answer({"items": items[2:], "count": 2, "next": None})
    daemon.answers[f"GET {ITEMS}/c?vector=true"] = Answer(an_item("c", text=None, vector=[1.0, 0.0]))
    daemon.answers[f"GET {ITEMS}/d?vector=true"] = Answer(an_item("d", text=None, vector=None))
    result = run("collections", "export", "docs")
    assert result.exit_code == 0
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"id": "a", "text": "text of a", "metadata": {"n": 1}},
        {"id": "b/?", "text": "text of b/?", "metadata": {"n": 1}},
        {"id": "c", "metadata": {"n": 1}, "vector": [1.0, 0.0]},
        {"id": "d", "metadata": {"n": 1}},
    ]
    assert "warning: 1 items have neither" in result.stderr


# --- query ----------------------------------------------------------------------------------------


def an_answer(*ids: str, **changes: Any) -> dict[str, Any]:
    items = [{"id": one, "score": 0.5, "metadata": {}, "embedding_version": VERSION} for one in ids]
    return {
        "version": VERSION,
        "active": True,
        "state": "active",
        "model": "minilm:latest",
        "coverage": 1.0,
        "items": items,
    } | changes


def test_query_shows_hits_with_their_texts(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"POST {DOCS}/query"] = Answer(an_answer("a", "b"))
    daemon.answers[f"GET {ITEMS}/a"] = Answer(an_item("a", text="one\ntwo" + "x" * 200))
    daemon.answers[f"GET {ITEMS}/b"] = Answer(error("unknown_item", "it is gone"), 404)
    result = run("collections", "query", "docs", "hello")
    assert json.loads(daemon.seen[0].body) == {"text": "hello", "k": 10, "version": None}
    heading, first, second = result.stdout.splitlines()
    assert heading.split() == ["SCORE", "ID", "METADATA", "TEXT"]
    assert first.split(maxsplit=3) == ["0.5000", "a", "-", "one two" + "x" * 73 + "…"]
    assert second.split() == ["0.5000", "b", "-", "-"]
    assert result.stderr == f"version {VERSION} (the active one), coverage 100%\n"
    assert json.loads(run("collections", "query", "docs", "hello", "--json").stdout) == an_answer("a", "b")


def test_the_texts_of_many_hits_are_not_fetched(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"POST {DOCS}/query"] = Answer(an_answer(*map(str, range(21))))
    result = run("collections", "query", "docs", "hello", "-k", "21")
    assert len(result.stdout.splitlines()) == 22
    assert len(daemon.seen) == 1


def test_query_sends_its_options_and_marks_another_version(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"POST {DOCS}/query"] = Answer(an_answer(active=False, state="building", coverage=0.5))
    options = ("--vector", "[1, 2]", "--filter", '{"n": 1}', "--version", VERSION, "-k", "3")
    result = run("collections", "query", "docs", *options)
    wanted = {"k": 3, "version": VERSION, "text": None, "vector": [1, 2], "filter": {"n": 1}}
    assert json.loads(daemon.seen[0].body) == wanted
    assert f"version {VERSION} (building, not the active one), coverage 50%" in result.stderr
    daemon.answers[f"POST {DOCS}/query"] = Answer(an_answer(version=None, active=False, state=None))
    assert run("collections", "query", "docs", "x").stderr == "docs has no items yet\n"


@pytest.mark.parametrize(
    "arguments",
    [(), ("text", "--vector", "[1]"), ("--vector", "[1"), ("--vector", "[NaN]"), ("text", "--filter", "{"),
     ("text", "-k", "0"), ("text", "-k", "1001")],
)  # fmt: skip
def test_a_query_that_cannot_be_is_refused_at_once(
    daemon: StandInDaemon, run: Run, arguments: tuple[str, ...]
) -> None:
    result = run("collections", "query", "docs", *arguments)
    assert (result.exit_code, daemon.seen) == (2, [])
