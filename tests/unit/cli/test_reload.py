"""SIGHUP, a changed key file and an odd TZ, with the daemon as a process."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.daemon import Daemon, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEY = "the-first-key-of-this-daemon"
NEW_KEY = "another-key-for-this-daemon"
CONFIG: dict[str, Any] = {
    "server": {"key_file": "key"},
    "instances": {"cpu": {"template": "ollama-cpu"}},
    "gpus": "none",
    "roles": {"thinking": {"model": "first"}, "output": {"model": "first"}},
    "schedules": [{"cron": "0 8 * * *", "action": "reap"}],
    "log": {"level": "info", "format": "json"},
}


def put_key(home: Path, key: str) -> None:
    (home / "new").write_text(key)
    (home / "new").chmod(0o600)
    (home / "new").rename(home / "key")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    home = tmp_path_factory.mktemp("reload")
    put_key(home, KEY)
    with Daemon(home, CONFIG, engine_url="unix:///no/engine.sock", environment={"TZ": "UTC0"}) as daemon:
        daemon.start(until_ready=False)
        daemon.wait_until_alive()
        yield daemon


@pytest.fixture
def daemon(running: Daemon) -> Iterator[Daemon]:
    """The daemon with the first configuration and the first key in force."""
    put_key(running.home, KEY)
    running.configure(CONFIG)
    reloaded(running)
    yield running
    assert running.process is not None
    assert running.process.poll() is None


def events(daemon: Daemon, since: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in daemon.log().splitlines()[since:]]


def reloaded(daemon: Daemon) -> list[dict[str, Any]]:
    """Send SIGHUP; what was logged until the reload had ended."""
    assert daemon.process is not None
    before = len(daemon.log().splitlines())
    ends = {"reloaded", "reload_refused", "reload_needs_restart", "reload_failed"}
    daemon.process.send_signal(signal.SIGHUP)
    wait_for(lambda: events(daemon, before), lambda found: any(one["event"] in ends for one in found))
    # One more request, answered after the reload: what it logs together has been written.
    daemon.call("GET", "/healthz")
    return [one for one in events(daemon, before) if one["logger"] == "reload"]


def ask(daemon: Daemon, path: str, key: str = KEY) -> Any:
    answer = daemon.call("GET", path, headers={"X-API-Key": key})
    assert answer.status_code == 200, answer.text
    return answer.json()


def changed(**sections: Any) -> dict[str, Any]:
    return CONFIG | sections


def test_what_can_change_is_in_force_at_once(daemon: Daemon) -> None:
    daemon.configure(
        changed(
            lifecycle={"ttl_s": 77},
            roles={"thinking": {"model": "second"}, "output": {"model": "first"}},
            schedules=[],
        )
    )
    (said,) = reloaded(daemon)
    assert said["event"] == "reloaded"
    assert sorted(said["applied"]) == ["lifecycle.ttl_s", "roles.thinking.model", "schedules"]
    assert ask(daemon, "instances/cpu")["ttl_s"] == 77
    assert ask(daemon, "/api/settings/models")["roles"]["thinking"]["model"] == "second"


def test_the_choice_of_models_and_its_words_change_at_once(daemon: Daemon) -> None:
    words = daemon.home / "words.yaml"

    def task() -> Any:
        found = ask(daemon, "/api/runtime/compute/explain?model=auto&text=the+blue+moon")["classification"]
        return found and found["task_type"]

    assert task() is None
    words.write_text("tasks: {lunar: {tier: fast, words: [moon]}}")
    config = changed(routing={"auto": True, "words": str(words)}, models={"facts": {"a": {"tier": "fast"}}})
    daemon.configure(config)
    (said,) = reloaded(daemon)
    assert sorted(said["applied"]) == ["models.facts.a", "routing.auto", "routing.words"]
    assert task() == "lunar"
    words.write_text("tasks: {colour: {tier: fast, words: [blue]}}")
    reloaded(daemon)
    assert task() == "colour"
    words.unlink()
    (said,) = reloaded(daemon)
    assert said["event"] == "reload_refused"
    assert task() == "colour"
    daemon.configure(CONFIG)  # the file of words is not needed any more
    (said,) = reloaded(daemon)
    assert said["event"] == "reloaded"
    assert task() is None


def test_what_needs_a_restart_is_named_and_not_done(daemon: Daemon) -> None:
    daemon.configure(changed(server={"key_file": "key", "port": 1}, lifecycle={"ttl_s": 78}, gpus="auto"))
    reload = reloaded(daemon)
    waiting = wait_for(lambda: [one for one in events(daemon) if one.get("waiting")])
    assert reload[0]["event"] == "reloaded"
    assert waiting[-1]["event"] == "reload_needs_restart"
    assert waiting[-1]["level"] == "warning"
    assert waiting[-1]["waiting"] == ["server.port", "gpus"]
    assert ask(daemon, "instances/cpu")["ttl_s"] == 78


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (changed(lifecycle={"ttl_s": -1}), "lifecycle.ttl_s: -1"),
        (changed(roles={"thinking": {"model": "x"}}, nonsense=1), "nonsense: unknown key"),
        (changed(instances={"cpu": {"template": "no-such"}}), "'no-such' is no template"),
        (changed(server={"key_file": "nowhere"}), "nowhere"),
    ],
)
def test_an_invalid_file_changes_nothing_and_says_why(daemon: Daemon, config: Any, problem: str) -> None:
    before = ask(daemon, "/api/settings/models"), ask(daemon, "instances/cpu")
    daemon.configure(config)
    (said,) = reloaded(daemon)
    assert (said["event"], said["level"]) == ("reload_refused", "error")
    assert problem in said["problem"]
    assert before == (ask(daemon, "/api/settings/models"), ask(daemon, "instances/cpu"))


def test_a_file_that_is_no_yaml_changes_nothing(daemon: Daemon) -> None:
    daemon.config_file.write_text("{", encoding="utf-8")
    (said,) = reloaded(daemon)
    assert said["event"] == "reload_refused"
    assert ask(daemon, "/api/settings/models")["roles"]["thinking"]["model"] == "first"


def test_what_was_changed_over_the_api_stays_on_top(daemon: Daemon) -> None:
    headers = {"X-API-Key": KEY}
    change = {"roles": {"output": {"model": "mine"}}}
    assert daemon.call("POST", "/api/settings/models", json=change, headers=headers).ok
    assert daemon.call("PATCH", "instances/cpu", json={"ttl_s": 5}, headers=headers).ok
    daemon.configure(changed(roles={"output": {"model": "third"}}, lifecycle={"ttl_s": 79}))
    reloaded(daemon)
    effective = ask(daemon, "/api/settings/models/effective")["roles"]
    assert effective["output"]["model"] == {"value": "mine", "source": "override"}
    assert effective["thinking"]["model"] == {"value": None, "source": "default"}
    assert ask(daemon, "instances/cpu")["ttl_s"] == 5
    assert daemon.call("PATCH", "instances/cpu", json={"ttl_s": None}, headers=headers).ok
    assert ask(daemon, "instances/cpu")["ttl_s"] == 79
    assert daemon.call("POST", "/api/settings/models", json={"roles": {"output": None}}, headers=headers).ok
    assert ask(daemon, "/api/settings/models")["roles"]["output"]["model"] == "third"


def test_the_level_of_the_log_changes(daemon: Daemon) -> None:
    quiet = {"thinking": {"model": "quiet"}}
    daemon.configure(changed(log={"level": "error", "format": "json"}, roles=quiet))
    assert daemon.process is not None
    before = len(daemon.log().splitlines())
    daemon.process.send_signal(signal.SIGHUP)
    wait_for(
        lambda: ask(daemon, "/api/settings/models")["roles"]["thinking"]["model"], lambda m: m == "quiet"
    )
    daemon.configure(changed(lifecycle={"ttl_s": -1}))
    reloaded(daemon)
    assert [one["event"] for one in events(daemon, before)] == ["reload_refused"]  # the one error


def test_a_new_key_is_in_force_without_a_signal(daemon: Daemon) -> None:
    put_key(daemon.home, NEW_KEY)
    wait_for(
        lambda: daemon.call("GET", "instances", headers={"X-API-Key": NEW_KEY}).status_code,
        lambda s: s == 200,
    )
    assert daemon.call("GET", "instances", headers={"X-API-Key": KEY}).status_code == 401
    assert daemon.call("GET", "/api/tags", headers={"X-API-Key": KEY}).status_code == 401
    assert NEW_KEY not in daemon.log()


def weaknesses(daemon: Daemon, since: int) -> list[str]:
    return [one["detail"] for one in events(daemon, since) if one["event"] == "weak_key"]


def test_a_weak_key_is_reported_at_a_reload_and_when_its_file_changes(daemon: Daemon) -> None:
    before = len(daemon.log().splitlines())
    (daemon.home / "weak").write_text("short")
    (daemon.home / "weak").chmod(0o604)
    daemon.configure(changed(server={"key_file": "weak"}))
    said = [one["event"] for one in reloaded(daemon)]
    assert said == ["weak_key", "weak_key", "reloaded"]
    open_to_all, guessable = weaknesses(daemon, before)
    assert f"chmod o= {daemon.home}/weak" in open_to_all
    assert "5 characters" in guessable
    assert "short" not in daemon.log()

    (daemon.home / "weak").chmod(0o600)
    wait_for(lambda: weaknesses(daemon, before)[2:], lambda found: len(found) == 1)
    (daemon.home / "weak").write_text("brief!")
    wait_for(lambda: weaknesses(daemon, before)[3:], lambda found: len(found) == 1)
    assert "6 characters" in weaknesses(daemon, before)[3]


def test_a_key_file_that_is_wrong_leaves_the_old_key(daemon: Daemon) -> None:
    before = len(daemon.log().splitlines())
    put_key(daemon.home, "two words")
    wait_for(lambda: [one for one in events(daemon, before) if one["event"] == "reload_refused"])
    assert ask(daemon, "instances")["count"] == 1


def test_a_time_zone_without_a_name_is_utc_with_a_warning(daemon: Daemon) -> None:
    (said,) = [one for one in events(daemon) if one["event"] == "local_time_zone_unknown"][:1]
    assert said["level"] == "warning"
    assert "UTC0" in said["problem"]
