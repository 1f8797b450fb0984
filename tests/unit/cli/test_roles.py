"""`roles`: the table, and the changes of one role, with the values as they are written on a command line."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from manager.cli.role_values import KINDS, nested
from manager.settings.overrides import FIELDS
from manager.settings.routing import RoleSettings, role_values
from tests.unit.cli.stand_in import Answer, error

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    from tests.unit.cli.stand_in import StandInDaemon

    Run = Callable[..., Result]

SETTINGS, EFFECTIVE = "/api/settings/models", "/api/settings/models/effective"


def role(**values: tuple[Any, str]) -> dict[str, Any]:
    """One effective role: defaults, but for `values` by key (`__` for a dot) with their sources."""
    defaults = {**role_values(RoleSettings()), "kind": "generate"}
    entries: dict[str, Any] = {key: {"value": one, "source": "default"} for key, one in defaults.items()}
    for key, (value, source) in values.items():
        entries[key.replace("__", ".")] = {"value": value, "source": source}
    return nested(entries)


def effective(**roles: dict[str, Any]) -> Answer:
    return Answer({"roles": roles, "ignored": []})


def columns(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def test_the_command_line_reads_every_setting_of_a_role_and_no_other() -> None:
    assert tuple(KINDS) == FIELDS


def test_roles_are_a_table_with_the_source_of_what_is_no_default(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"GET {EFFECTIVE}"] = effective(
        thinking=role(
            model=("qwen3:8b", "override"),
            instances=(["gpu0", "cpu"], "file"),
            queue__wait_s=(2.5, "environment"),
            concurrency=(4, "file"),
        ),
        control=role(target=("gpu0", "file")),
    )
    daemon.answers[f"GET {EFFECTIVE}"].body["ignored"] = [
        {"key": "roles.old.model", "value": "m", "reason": "there is no role 'old'"}
    ]
    missing = {"key": "roles.thinking.model", "message": "no instance is known to have the model 'qwen3:8b'"}
    daemon.answers[f"GET {SETTINGS}"] = Answer({"roles": {}, "warnings": [missing]})
    result = run("roles", "--url", daemon.url)
    assert result.exit_code == 0
    head, thinking, control = map(columns, result.stdout.splitlines())
    assert head == [
        "ROLE", "MODEL", "INSTANCES", "POLICY", "MODE", "RESERVED", "CONCURRENCY", "QUEUE", "WEIGHT",
        "NOT THE DEFAULT",
    ]  # fmt: skip
    assert thinking == [
        "thinking", "qwen3:8b", "gpu0,cpu", "auto", "sync", "0", "4", "100, 2.5 s", "1",
        "model (override), instances (file), concurrency (file), queue.wait_s (environment)",
    ]  # fmt: skip
    assert control[1:3] == ["-", "gpu0"]
    assert result.stderr.splitlines() == [
        "warning: roles.old.model is ignored: there is no role 'old'",
        "warning: no instance is known to have the model 'qwen3:8b'",
    ]


def test_roles_as_json_are_what_the_api_says(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"GET {EFFECTIVE}"] = effective(thinking=role())
    assert json.loads(run("roles", "--json", "--url", daemon.url).stdout) == effective(thinking=role()).body


def set_values(daemon: StandInDaemon, run: Run, *arguments: str) -> Any:
    """Change the role `thinking`; the body that the daemon gets."""
    daemon.answers[f"GET {EFFECTIVE}"] = effective(thinking=role())
    daemon.answers[f"POST {SETTINGS}"] = Answer({"roles": {}, "warnings": []})
    result = run("roles", *arguments, "--url", daemon.url)
    assert result.exit_code == 0, result.output
    (posted,) = (json.loads(seen.body) for seen in daemon.seen if seen.method == "POST")
    return posted


@pytest.mark.parametrize(
    ("pair", "values"),
    [
        ("model=qwen3:8b", {"model": "qwen3:8b"}),
        ("model=null", {"model": None}),
        ("queue.length=5", {"queue": {"length": 5}}),
        ("queue.wait_s=2m", {"queue": {"wait_s": 120.0}}),
        ("queue.wait_s=1.5", {"queue": {"wait_s": 1.5}}),
        ("queue.wait_s=", {"queue": {"wait_s": None}}),
        ("instances=gpu0, cpu", {"instances": ["gpu0", "cpu"]}),
        ("attempt_timeouts_s=45,1m", {"attempt_timeouts_s": [45.0, 60.0]}),
        ("attempt_timeouts_s=[]", {"attempt_timeouts_s": []}),
        ("keep_warm=", {"keep_warm": None}),
        ("fallbacks=[]", {"fallbacks": []}),
        ("concurrency=null", {"concurrency": None}),
        ("reserved= 1 ", {"reserved": 1}),
        ("think=False", {"think": False}),
        ("paid_fallback=true", {"paid_fallback": True}),
        ("strategy=scored", {"strategy": "scored"}),
        ("system.text=You = brief.", {"system": {"text": "You = brief."}}),
        ('body.defaults={"options": {"seed": 0}}', {"body": {"defaults": {"options": {"seed": 0}}}}),
    ],
)
def test_a_value_is_read_as_its_setting_wants_it(
    daemon: StandInDaemon, run: Run, pair: str, values: dict[str, Any]
) -> None:
    assert set_values(daemon, run, "set", "thinking", pair) == {"roles": {"thinking": values}}


def test_several_values_are_one_change(daemon: StandInDaemon, run: Run) -> None:
    pairs = ("queue.length=5", "model=qwen3:8b", "queue.wait_s=2m", "keep_warm=")
    assert set_values(daemon, run, "set", "thinking", *pairs) == {
        "roles": {
            "thinking": {"queue": {"length": 5, "wait_s": 120.0}, "model": "qwen3:8b", "keep_warm": None}
        }
    }


def test_unset_takes_the_named_values_back_or_all(daemon: StandInDaemon, run: Run) -> None:
    assert set_values(daemon, run, "unset", "thinking", "model", "queue.length") == {
        "roles": {"thinking": {"model": None, "queue": {"length": None}}}
    }
    daemon.seen.clear()
    assert set_values(daemon, run, "unset", "thinking") == {"roles": {"thinking": None}}


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("weigth=2", "'weigth' is no setting of a role; did you mean 'weight'? allowed: model, target, "),
        ("queue=5", "'queue' is no setting of a role; "),
        ("model", "'model'; expected KEY=VALUE"),
        ("weight=many", "weight: 'many'; expected a whole number"),
        ("weight=1.5", "weight: '1.5'; expected a whole number"),
        ("think=yes", "think: 'yes'; expected true or false"),
        ("queue.wait_s=soon", "queue.wait_s: 'soon'; expected seconds, or a duration such as 90s"),
        ("attempt_timeouts_s=45,,60", "attempt_timeouts_s: '45,,60'; expected durations with commas"),
        ("body.defaults=[1]", "body.defaults: '[1]'; expected a JSON object such as"),
        ("body.defaults={", "body.defaults: '{'; expected a JSON object such as"),
    ],
)
def test_a_wrong_key_or_value_is_exit_2_and_nothing_is_asked(
    daemon: StandInDaemon, run: Run, pair: str, words: str
) -> None:
    result = run("roles", "set", "thinking", "reserved=1", pair, "--url", daemon.url)
    assert (result.exit_code, result.stdout, daemon.seen) == (2, "", [])
    assert result.stderr.startswith(f"error: {words}")


def test_a_key_that_is_given_twice_or_unset_and_unknown_is_exit_2(daemon: StandInDaemon, run: Run) -> None:
    twice = run("roles", "set", "thinking", "model=a", "model=b", "--url", daemon.url)
    unknown = run("roles", "unset", "thinking", "weigth", "--url", daemon.url)
    assert (twice.exit_code, unknown.exit_code, daemon.seen) == (2, 2, [])
    assert "model is given twice" in twice.stderr
    assert "did you mean 'weight'?" in unknown.stderr


def test_what_the_daemon_refuses_is_told_in_its_words(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"GET {EFFECTIVE}"] = effective(thinking=role())
    words = "body.roles.thinking.weight: 0; expected 1 or more"
    daemon.answers[f"POST {SETTINGS}"] = Answer(error("invalid_request", words), 422)
    result = run("roles", "set", "thinking", "weight=0", "--url", daemon.url)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr


def changed(daemon: StandInDaemon, run: Run, before: Answer, after: Answer, *arguments: str) -> Result:
    """Run a command; the daemon shows `after` once it has got the change."""

    def change() -> Any:
        daemon.answers[f"GET {EFFECTIVE}"] = after
        warnings = [
            {"key": "roles.thinking.model", "message": "nobody has it"},
            {"key": "roles.control.model", "message": "of another role"},
        ]
        yield json.dumps({"roles": {}, "warnings": warnings})

    daemon.answers[f"GET {EFFECTIVE}"] = before
    daemon.answers[f"POST {SETTINGS}"] = Answer(change())
    result = run("roles", *arguments, "--url", daemon.url)
    assert result.exit_code == 0
    return result


def test_set_prints_each_change_with_its_sources_and_warns_of_what_cannot_work(
    daemon: StandInDaemon, run: Run
) -> None:
    before = effective(thinking=role(keep_warm=(["cpu"], "file")))
    after = effective(
        thinking=role(keep_warm=([], "override"), model=("m", "override"), queue__wait_s=(120.0, "override"))
    )
    pairs = ("model=m", "keep_warm=[]", "queue.wait_s=2m")
    result = changed(daemon, run, before, after, "set", "thinking", *pairs)
    assert result.stdout.splitlines() == [
        "thinking.model: null (default) -> m (override)",
        "thinking.queue.wait_s: 60 (default) -> 120 (override)",
        "thinking.keep_warm: cpu (file) -> [] (override)",
    ]
    assert result.stderr == "warning: nobody has it\n"


def test_a_value_that_was_so_before_is_no_change(daemon: StandInDaemon, run: Run) -> None:
    same = effective(thinking=role(model=("m", "override")))
    result = changed(daemon, run, same, same, "set", "thinking", "model=m")
    assert result.stdout == "thinking: nothing changed\n"


def test_a_new_role_is_shown_as_it_is_and_one_that_goes_as_gone(daemon: StandInDaemon, run: Run) -> None:
    none, one = effective(), effective(code=role(model=("m", "override"), kind=("generate", "override")))
    made = changed(daemon, run, none, one, "set", "code", "kind=generate", "model=m")
    assert "code.model: m (override)" in made.stdout.splitlines()
    assert "code.kind: generate (override)" in made.stdout.splitlines()
    assert "default" not in made.stdout
    assert changed(daemon, run, one, none, "unset", "code").stdout == "code: removed\n"


def test_options_may_stand_before_the_subcommand(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"GET {EFFECTIVE}"] = effective(thinking=role())
    daemon.answers[f"POST {SETTINGS}"] = Answer({"roles": {}, "warnings": []})
    assert run("roles", "--url", daemon.url, "set", "thinking", "weight=2").exit_code == 0
