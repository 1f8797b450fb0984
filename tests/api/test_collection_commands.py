"""The commands of collections on a daemon: from JSON Lines to another model and back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from manager.cli.commands import program
from tests.support.daemon import wait_for
from tests.support.embedding_server import DIMENSIONS, TOO_LONG

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    from tests.support.collections import Collection

    Run = Callable[..., Result]


@pytest.fixture
def run(docs: Collection, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command of collections on the daemon."""
    monkeypatch.setenv("OLLAMA_MANAGER_URL", docs.gateway.url)
    monkeypatch.delenv("OLLAMA_MANAGER_KEY", raising=False)

    def run(command: str, *arguments: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(program, ["collections", command, *arguments], input=stdin)

    return run


def test_items_go_in_and_out_as_json_lines(docs: Collection, run: Run) -> None:
    items = [{"id": f"{n:03}/ä", "text": f"text {n}", "metadata": {"n": n}} for n in range(230)]
    lines = "".join(f"{json.dumps(one)}\n" for one in items)
    put = run("put", docs.name, stdin=lines)
    assert (put.exit_code, put.stderr) == (0, "")
    assert put.stdout.startswith(f"230 items are written to {docs.name}, version ")
    docs.put({"id": "v", "vector": [1.0] + [0.0] * (DIMENSIONS - 1)})
    exported = [json.loads(line) for line in run("export", docs.name).stdout.splitlines()]
    assert exported[:-1] == items
    assert exported[-1] == {"id": "v", "metadata": {}, "vector": [1.0] + [0.0] * (DIMENSIONS - 1)}
    again = run("put", docs.name, stdin=run("export", docs.name).stdout)
    assert again.exit_code == 0
    shown = json.loads(run("show", docs.name, "--json").stdout)
    assert (shown["items"], shown["versions"], shown["coverage"]) == (231, 1, 1.0)
    first = run("query", docs.name, "text 7", "-k", "3").stdout.splitlines()[1].split()
    assert first[:2] == ["1.0000", "007/ä"]
    assert first[-2:] == ["text", "7"]
    assert run("get", docs.name, "007/ä").exit_code == 0
    assert run("delete-item", docs.name, "007/ä").exit_code == 0
    assert run("get", docs.name, "007/ä").exit_code == 2


def test_a_line_that_the_server_refuses_is_named(docs: Collection, run: Run) -> None:
    lines = [{"id": str(n), "text": "x"} for n in range(120)] + [{"id": "bad", "text": TOO_LONG}]
    result = run("put", docs.name, stdin="\n".join(map(json.dumps, lines)))
    assert result.exit_code == 2, result.output
    assert "line 121: text (id 'bad')" in result.stderr
    assert "100 items were written, to line 100" in result.stderr
    assert docs.good("GET")["items"] == 100


def test_a_change_of_the_model_and_back(docs: Collection, run: Run) -> None:
    docs.put(*({"id": str(n), "text": f"text {n}"} for n in range(20)))
    old = docs.good("GET")["version"]
    docs.server.become("second")
    done = run("backfill", docs.name, "--wait", "--threshold", "0.9")
    assert done.exit_code == 0, done.output
    switched = run("cutover", docs.name)
    assert switched.exit_code == 0, switched.output
    new = docs.good("GET")["version"]
    assert new != old
    versions = json.loads(run("versions", docs.name, "--json").stdout)
    assert [(one["version"], one["state"]) for one in versions] == [(new, "active"), (old, "archived")]
    assert run("rollback", docs.name).exit_code == 4, "its build is gone"
    docs.server.become("first")
    wait_for(lambda: run("rollback", docs.name), lambda result: result.exit_code == 0)
    assert run("delete-version", docs.name, new).exit_code == 0
    assert run("delete", docs.name, "--yes").exit_code == 0
    assert run("show", docs.name).exit_code == 2
