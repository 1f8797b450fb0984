"""`rollout`, and what `status` and `doctor` say of it."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from manager.cli.doctor_raw import raw_server
from manager.cli.findings import Verdict
from manager.cli.rollout import _STAGES
from manager.cli.tables import ROLLOUT_WORDS
from manager.domain.rollout import Stage
from tests.unit.cli.stand_in import API, Answer, StandInDaemon, error, instance

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    Run = Callable[..., Result]

SETTINGS, EFFECTIVE = "/api/settings/models", "/api/settings/models/effective"
RAW = "http://10.0.0.1:11434"


def effective(stage: str, lanes: list[str], raw_url: str | None, source: str = "file") -> Answer:
    values = {"stage": stage, "lanes": lanes, "raw_url": raw_url}
    rollout = {key: {"value": value, "source": source} for key, value in values.items()}
    return Answer({"roles": {}, "rollout": rollout, "ignored": []})


def test_every_stage_has_its_words() -> None:
    assert set(ROLLOUT_WORDS) == set(_STAGES) == {stage.value for stage in Stage}


def test_the_stage_is_shown_with_its_source(daemon: StandInDaemon, run: Run) -> None:
    answer = effective("lanes", ["output", "embedding"], RAW)
    answer.body["ignored"] = [
        {"key": "rollout.stage", "value": "x", "reason": "gone"},
        {"key": "roles.x", "value": 1, "reason": "another matter"},
    ]
    daemon.answers[f"GET {EFFECTIVE}"] = answer
    result = run("rollout", "--url", daemon.url)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"stage: lanes (file) - {ROLLOUT_WORDS['lanes']}",
        "lanes: output, embedding (file)",
        f"raw_url: {RAW} (file)",
    ]
    assert "rollout.stage is ignored: gone" in result.stderr
    assert "another matter" not in result.stderr
    assert json.loads(run("rollout", "--json", "--url", daemon.url).stdout)["stage"]["value"] == "lanes"


@pytest.mark.parametrize(
    ("arguments", "sent"),
    [
        (("set", "observe"), {"stage": "observe"}),
        (
            ("set", "lanes", "--lane", "output", "--lane", "control", "--lane", "output", "--raw-url", RAW),
            {"stage": "lanes", "lanes": ["output", "control"], "raw_url": RAW},
        ),
        (("unset",), None),
    ],
)
def test_a_change_says_no_more_than_it_is_given(
    daemon: StandInDaemon, run: Run, arguments: tuple[str, ...], sent: Any
) -> None:
    daemon.answers[f"POST {SETTINGS}"] = Answer({})
    daemon.answers[f"GET {EFFECTIVE}"] = effective("observe", [], RAW, "override")
    result = run("rollout", *arguments, "--url", daemon.url)
    assert result.exit_code == 0, result.output
    (posted,) = [one for one in daemon.seen if one.method == "POST"]
    assert json.loads(posted.body) == {"rollout": sent}
    assert result.stdout.startswith("stage: observe (override) - all requests pass")


def test_a_refusal_is_told(daemon: StandInDaemon, run: Run) -> None:
    refusal = Answer(error("invalid_request", "body.rollout.raw_url: missing"), 422)
    daemon.answers[f"POST {SETTINGS}"] = refusal
    result = run("rollout", "set", "shadow", "--url", daemon.url)
    assert result.exit_code != 0
    assert "body.rollout.raw_url: missing" in result.stderr
    assert run("rollout", "set", "some").exit_code == 2


def test_status_names_the_stage_where_not_all_is_managed(daemon: StandInDaemon, run: Run) -> None:
    daemon.has(instance("cpu"))
    assert "rollout" not in run("status", "--url", daemon.url).output
    daemon.answers[f"GET {API}/instances"].body["rollout"] = "shadow"
    result = run("status", "--url", daemon.url)
    assert f"rollout: stage shadow - {ROLLOUT_WORDS['shadow']}" in result.stderr
    assert "rollout" not in result.stdout


@contextmanager
def no_server() -> Any:
    with StandInDaemon() as server:
        url = server.url
    yield url


def test_doctor_warns_of_a_raw_server_that_does_not_answer(daemon: StandInDaemon) -> None:
    assert raw_server(daemon.url, 5.0).verdict is Verdict.FINE  # 404 is an answer
    with no_server() as url:
        gone = raw_server(url, 5.0)
    assert gone.verdict is Verdict.WARNING
    assert f"{url} cannot be reached" in gone.message
    assert "start that server" in gone.remedy
