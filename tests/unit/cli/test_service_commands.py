"""The commands about service, restart and image, against an HTTP server that answers like a daemon."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.cli.stand_in import API, Answer, error, instance, ready

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    from tests.unit.cli.stand_in import StandInDaemon

    Run = Callable[..., Result]

DRAINED = {"since": "2026-08-01T10:00:00.000Z", "until": None, "reason": None}
UNTIL = DRAINED | {"until": "2026-08-01T18:30:00.000Z", "reason": "driver update"}
SHOWN = "drained until 2026-08-01 18:30:00 UTC: driver update"
IMAGE = "ollama/ollama:2"
UPGRADED = {"image": IMAGE, "previous": "ollama/ollama:1", "since": "2026-08-01T10:00:00.000Z"}


def answers(daemon: StandInDaemon, verb: str, body: dict[str, Any], *, changed: bool = True) -> None:
    daemon.has(instance("cpu"))
    daemon.answers[f"POST {API}/instances/cpu/{verb}"] = Answer({"instance": body, "changed": changed})


def sent(daemon: StandInDaemon) -> Any:
    (post,) = [one for one in daemon.seen if one.method == "POST"]
    return json.loads(post.body)


@pytest.mark.parametrize(
    ("options", "body", "shown"),
    [
        ((), instance("cpu", drained=DRAINED), "cpu is out of service (drained); it is stopped\n"),
        (
            ("--reason", "driver update", "--keep-running"),
            ready("cpu", drained=UNTIL),
            f"cpu is out of service ({SHOWN}); its container runs on\n",
        ),
        (
            (),
            ready("cpu", driver="external", drained=DRAINED),
            "cpu is out of service (drained); its server runs on\n",
        ),
        ((), instance("cpu"), "cpu was drained, and is in service again\n"),
    ],
)
def test_a_drain_sends_the_order_and_shows_what_stands(
    daemon: StandInDaemon, run: Run, options: tuple[str, ...], body: dict[str, Any], shown: str
) -> None:
    answers(daemon, "drain", body)
    result = run("drain", "cpu", *options, "--url", daemon.url)
    assert (result.exit_code, result.stdout) == (0, shown)
    reason = "driver update" if options else None
    assert sent(daemon) == {"reason": reason, "until": None, "stop": not options}


def test_a_drain_for_a_time_ends_after_it(daemon: StandInDaemon, run: Run) -> None:
    answers(daemon, "drain", instance("cpu", drained=UNTIL))
    before = datetime.now(UTC)
    assert run("drain", "cpu", "--for", "2h", "--url", daemon.url).exit_code == 0
    until = datetime.fromisoformat(sent(daemon)["until"])
    assert before + timedelta(hours=2) <= until <= datetime.now(UTC) + timedelta(hours=2)


@pytest.mark.parametrize("given", ["soon", "0", "-1h", "999999999d"])
def test_a_time_that_is_none_is_refused_with_what_was_given(
    daemon: StandInDaemon, run: Run, given: str
) -> None:
    result = run("drain", "cpu", f"--for={given}", "--url", daemon.url)
    assert result.exit_code == 2
    assert "--for" in result.stderr
    assert daemon.seen == []


@pytest.mark.parametrize(
    ("changed", "shown"), [(True, "cpu is in service again\n"), (False, "cpu was in service already\n")]
)
def test_a_resume_says_whether_there_was_anything_to_do(
    daemon: StandInDaemon, run: Run, *, changed: bool, shown: str
) -> None:
    answers(daemon, "resume", instance("cpu"), changed=changed)
    result = run("resume", "cpu", "--url", daemon.url)
    assert (result.exit_code, result.stdout) == (0, shown)


def test_a_restart_shows_the_address(daemon: StandInDaemon, run: Run) -> None:
    answers(daemon, "restart", ready("cpu"))
    assert run("restart", "cpu", "--url", daemon.url).stdout.startswith("cpu is ready at http://172.18.0.2:")


@pytest.mark.parametrize(
    ("body", "changed", "shown"),
    [
        (ready("cpu", image_override=UPGRADED), True, f"cpu uses {IMAGE}; it is ready at http://172.18."),
        (instance("cpu", image_override=UPGRADED), True, f"cpu uses {IMAGE}; it is stopped, and its next"),
        (ready("cpu", image_override=UPGRADED), False, f"cpu uses {IMAGE} already\n"),
    ],
)
def test_an_upgrade_says_when_the_image_is_used(
    daemon: StandInDaemon, run: Run, *, body: dict[str, Any], changed: bool, shown: str
) -> None:
    answers(daemon, "upgrade", body, changed=changed)
    result = run("upgrade", "cpu", IMAGE, "--url", daemon.url)
    assert result.stdout.startswith(shown)
    assert sent(daemon) == {"image": IMAGE}


@pytest.mark.parametrize(
    ("chosen", "shown"),
    [
        (None, "cpu uses the image of its template again; it is ready"),
        (UPGRADED, f"cpu uses {IMAGE} again; "),
    ],
)
def test_a_rollback_says_which_image_is_used(
    daemon: StandInDaemon, run: Run, chosen: dict[str, Any] | None, shown: str
) -> None:
    answers(daemon, "rollback", ready("cpu", image_override=chosen))
    assert run("rollback", "cpu", "--url", daemon.url).stdout.startswith(shown)


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [
        (404, "unknown_instance", 2),
        (409, "drained", 4),
        (422, "invalid_request", 2),
        (503, "start_failed", 1),
    ],
)
@pytest.mark.parametrize("arguments", ["drain", "resume", "restart", "upgrade cpu image", "rollback"])
def test_a_refusal_shows_message_and_code_and_ends_with_its_exit_code(
    daemon: StandInDaemon, run: Run, *, arguments: str, status: int, code: str, exit_code: int
) -> None:
    verb, *more = arguments.split()
    daemon.has(instance("cpu"))
    daemon.answers[f"POST {API}/instances/cpu/{verb}"] = Answer(error(code, "cpu cannot"), status)
    result = run(verb, *(more or ["cpu"]), "--url", daemon.url)
    assert result.exit_code == exit_code
    assert f"cpu cannot ({code})" in result.stderr
    assert result.stdout == ""


def test_a_missing_image_is_told_once_with_the_command_that_pulls_it(daemon: StandInDaemon, run: Run) -> None:
    daemon.has(instance("cpu"))
    message = f"the engine has no image {IMAGE}; pull it with `ollama-manager pull {IMAGE}`"
    daemon.answers[f"POST {API}/instances/cpu/upgrade"] = Answer(error("image_missing", message), 503)
    result = run("upgrade", "cpu", IMAGE, "--url", daemon.url)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f"error: cpu keeps its image: {message} (image_missing)"


def test_status_shows_who_is_out_of_service_and_who_was_upgraded(daemon: StandInDaemon, run: Run) -> None:
    daemon.has(instance("cpu", drained=UNTIL), ready("gpu0", image_override=UPGRADED))
    _, cpu, gpu0 = run("status", "--url", daemon.url).stdout.splitlines()
    assert cpu.endswith(SHOWN)
    assert gpu0.endswith(f"upgraded to {IMAGE} from ollama/ollama:1")


def test_status_shows_lifted_deny_rules_with_their_end(daemon: StandInDaemon, run: Run) -> None:
    lifted = {"since": "2026-08-01T16:00:00Z", "until": "2026-08-01T16:34:10Z", "reason": "incident 7"}
    daemon.has(ready("cpu", lifted=lifted), ready("gpu0", lifted=lifted | {"reason": None}))
    _, cpu, gpu0 = run("status", "--url", daemon.url).stdout.splitlines()
    assert cpu.endswith("  deny rules lifted until 2026-08-01 16:34:10 UTC (incident 7)")
    assert gpu0.endswith("  deny rules lifted until 2026-08-01 16:34:10 UTC")
