"""`ollama-manager keys`, against an HTTP server that answers like a daemon."""

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

KEYS = "/api/v1/keys"
SECRET = "om_" + "s" * 43


@pytest.fixture(autouse=True)
def found(daemon: StandInDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands talk to this daemon."""
    monkeypatch.setenv("OLLAMA_MANAGER_URL", daemon.url)


def a_key(**changes: Any) -> dict[str, Any]:
    """A key in the shape of the API: one without limits, unless `changes` say otherwise."""
    limits = dict.fromkeys(
        ("project", "roles", "models", "instances", "concurrency", "rpm", "tokens_per_day", "usd_per_month")
    )
    return {
        "name": "alice",
        "state": "active",
        "scopes": ["client"],
        **limits,
        "local_only": False,
        "created_at": "2026-11-28T12:00:00.000Z",
        "expires_at": None,
        "revoked_at": None,
        "last_used_at": None,
        "secrets": [{"prefix": "om_sssss", "created_at": "2026-11-28T12:00:00.000Z", "ends_at": None}],
    } | changes


def test_a_key_is_made_as_the_options_say_and_printed_alone(run: Run, daemon: StandInDaemon) -> None:
    daemon.answers[f"POST {KEYS}"] = Answer(a_key(secret=SECRET), 201)
    result = run(
        "keys", "create", "alice", "--scope", "client", "--scope", "read", "--project", "shop", "--role", "r",
        "--model", "qwen3:*", "--model", "tiny", "--instance", "gpu0", "--concurrency", "2", "--rpm", "60",
        "--tokens-per-day", "1000", "--usd-per-month", "0", "--local-only", "--expires", "90d",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{SECRET}\n"
    assert "only a hash of it is stored" in result.stderr
    assert json.loads(daemon.seen[-1].body) == {
        "name": "alice",
        "scopes": ["client", "read"],
        "project": "shop",
        "roles": ["r"],
        "models": ["qwen3:*", "tiny"],
        "instances": ["gpu0"],
        "concurrency": 2,
        "rpm": 60,
        "tokens_per_day": 1000,
        "usd_per_month": 0.0,
        "local_only": True,
        "expires_s": 90 * 86_400.0,
    }


def test_what_was_not_asked_for_is_left_out(run: Run, daemon: StandInDaemon) -> None:
    daemon.answers[f"POST {KEYS}"] = Answer(a_key(secret=SECRET), 201)
    assert run("keys", "create", "alice", "--scope", "admin").exit_code == 0
    assert json.loads(daemon.seen[-1].body) == {"name": "alice", "scopes": ["admin"]}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "error: Missing option '--scope'. Choose from: client, read, operator, admin"),
        (("--scope", "root"), "'client', 'read', 'operator', 'admin'"),
        (("--scope", "read", "--rpm", "0"), "--rpm"),
        (("--scope", "read", "--rpm", "x"), "Invalid value for '--rpm': 'x' is not a whole number."),
        (("--scope", "read", "--usd-per-month", "x"), "'x' is not a number."),
        (("--scope", "read", "--usd-per-month", "-1"), "--usd-per-month"),
        (("--scope", "read", "--expires", "soon"), "'soon': expected seconds, or a duration"),
    ],
)
def test_options_that_cannot_be_are_refused(
    run: Run, daemon: StandInDaemon, options: tuple[str, ...], words: str
) -> None:
    result = run("keys", "create", "alice", *options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not daemon.seen


def test_the_list_shows_everything_but_secrets(run: Run, daemon: StandInDaemon) -> None:
    limited = a_key(
        name="bob", state="revoked", scopes=["client", "read"], project="shop", models=["a*", "b"], rpm=60,
        usd_per_month=1.5, local_only=True, secrets=[], last_used_at="2026-11-28T13:00:00.000Z",
    )  # fmt: skip
    document = {"keys": [a_key(), limited], "count": 2, "required": True}
    daemon.answers[f"GET {KEYS}"] = Answer(document)
    result = run("keys", "list")
    heading, alice, bob = result.stdout.splitlines()
    assert heading.split()[:4] == ["NAME", "STATE", "SCOPES", "PREFIX"]
    assert alice.split()[:5] == ["alice", "active", "client", "om_sssss", "-"]
    assert bob.split()[:5] == ["bob", "revoked", "client,read", "-", "shop"]
    assert bob.endswith("models=a*,b rpm=60 usd_per_month=1.5 local_only=true")
    assert result.stderr == ""
    assert json.loads(run("keys", "list", "--json").stdout) == document


def test_a_daemon_that_needs_no_key_is_warned_of(run: Run, daemon: StandInDaemon) -> None:
    daemon.answers[f"GET {KEYS}"] = Answer({"keys": [], "count": 0, "required": False})
    assert "requests need no key" in run("keys", "list").stderr


@pytest.mark.parametrize(
    ("options", "query", "left", "printed", "warned"),
    [
        ((), "", (True, True), "alice is revoked\n", ""),
        (("--cut",), "?cut=true", (True, True), "alice is revoked; 2 open requests were ended\n", ""),
        (
            ("--forget",),
            "?forget=true",
            (False, False),
            "alice is forgotten\n",
            "requests need none any more",
        ),
        ((), "", (True, False), "alice is revoked\n", "stays closed to requests without one"),
    ],
)
def test_a_revocation_tells_what_is_left(
    run: Run,
    daemon: StandInDaemon,
    *,
    options: tuple[str, ...],
    query: str,
    left: tuple[bool, bool],
    printed: str,
    warned: str,
) -> None:
    required, admin_left = left
    body = {"key": a_key(), "cut": 2, "required": required, "admin_left": admin_left}
    daemon.answers[f"DELETE {KEYS}/alice{query}"] = Answer(body)
    result = run("keys", "revoke", "alice", *options)
    assert (result.exit_code, result.stdout) == (0, printed)
    assert (warned in result.stderr) if warned else result.stderr == ""
    assert json.loads(run("keys", "revoke", "alice", *options, "--json").stdout) == body


def test_a_rotation_prints_the_new_secret_and_when_the_earlier_one_ends(
    run: Run, daemon: StandInDaemon
) -> None:
    old = {"prefix": "om_old00", "created_at": "2026-11-28T12:00:00Z", "ends_at": "2026-11-29T12:00:00Z"}
    key = a_key(secret=SECRET, secrets=[old, *a_key()["secrets"]])
    daemon.answers[f"POST {KEYS}/alice/rotate"] = Answer(key)
    result = run("keys", "rotate", "alice")
    assert result.stdout == f"{SECRET}\n"
    assert "the earlier secret om_old00… ends at 2026-11-29" in result.stderr
    assert json.loads(daemon.seen[-1].body) == {"overlap_s": 86_400}
    run("keys", "rotate", "alice", "--overlap", "0")
    assert json.loads(daemon.seen[-1].body) == {"overlap_s": 0}
    assert run("keys", "rotate", "alice", "--overlap", "x").exit_code == 2


def test_a_refusal_says_what_to_do(run: Run, daemon: StandInDaemon) -> None:
    daemon.answers[f"DELETE {KEYS}/a%2Fb"] = Answer(error("unknown_key", "there is no key 'a/b'"), 404)
    result = run("keys", "revoke", "a/b")
    assert result.exit_code == 2
    assert "`ollama-manager keys list` lists the keys" in result.stderr
    daemon.answers[f"GET {KEYS}"] = Answer(error("forbidden", "it needs admin"), 403)
    result = run("keys", "list")
    assert result.exit_code == 2
    assert "$OLLAMA_MANAGER_KEY" in result.stderr
