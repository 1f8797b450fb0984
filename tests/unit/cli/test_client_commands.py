"""The commands that talk to a daemon, against an HTTP server that answers like one."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

import pytest

from manager.adapters.docker_answers import not_pulled
from tests.unit.cli.stand_in import API, Answer, error, instance, ready

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

    from tests.unit.cli.stand_in import StandInDaemon

    Run = Callable[..., Result]

KEY = "a-key-that-nobody-may-see"
FALLBACK = {"code": "gpu_fallback", "message": "it computes on the CPU", "log_tail": []}
GPU = {
    "kind": "gpu", "uuid": "GPU-6f4b3a52-0000-4000-8000-000000000001", "index": 0, "name": "NVIDIA H200",
    "vram_total_bytes": 140 * 2**30, "vram_used_bytes": 12 * 2**30, "vram_free_bytes": 128 * 2**30,
}  # fmt: skip


@pytest.fixture
def nowhere() -> str:
    """An address that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_status_has_a_line_for_every_instance_with_device_use_models_and_reason(
    daemon: StandInDaemon, run: Run
) -> None:
    model = {"name": "qwen3:8b", "digest": "d", "size_bytes": 6 * 2**30, "vram_bytes": 0, "expires_at": None}
    daemon.has(
        instance("cpu"), ready("gpu0", device=GPU, in_flight=3, reason=FALLBACK, models=[model], pinned=True)
    )
    result = run("status", "--url", daemon.url)
    assert result.exit_code == 0
    head, cpu, gpu0 = result.stdout.splitlines()
    columns = "INSTANCE DRIVER DEVICE PHASE HEALTH TARGET IN FLIGHT TTL LEFT MODELS REASON"
    assert " ".join(head.split()) == columns
    assert cpu.split() == ["cpu", "docker", "cpu", "stopped", "unknown", "stopped", "0", "-", "-", "-"]
    assert "gpu 0 NVIDIA H200 12.0/140.0 GiB" in gpu0
    assert gpu0.split()[8:15] == ["ready", "healthy", "running", "3", "pinned", "qwen3:8b", "6.0G"]
    assert gpu0.endswith("gpu_fallback: it computes on the CPU")


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"ttl_remaining_s": 872.4}, "14m32s"),
        ({"ttl_remaining_s": 0.2}, "0s"),
        ({"ttl_remaining_s": 90_000.0}, "1d01h"),
        ({"ttl_remaining_s": 7_500.0}, "2h05m"),
        ({"ttl_s": 0.0, "ttl_remaining_s": None}, "never"),
        ({"ttl_remaining_s": None, "in_flight": 1}, "in use"),
    ],
)
def test_status_tells_how_much_of_the_ttl_is_left(
    daemon: StandInDaemon, run: Run, changes: dict[str, Any], shown: str
) -> None:
    daemon.has(ready("cpu", **changes))
    assert f"  {shown}  " in run("status", "--url", daemon.url).stdout


def test_status_as_json_is_what_the_api_says(daemon: StandInDaemon, run: Run) -> None:
    daemon.has(ready("cpu"), instance("gpu0", reason=FALLBACK))
    result = run("status", "--json", "--url", daemon.url)
    assert json.loads(result.stdout) == daemon.answers[f"GET {API}/instances"].body | {
        "instances": [ready("cpu"), instance("gpu0", reason=FALLBACK)]
    }
    assert result.stderr == ""


def test_text_from_a_container_cannot_steer_the_terminal(daemon: StandInDaemon, run: Run) -> None:
    daemon.has(instance("cpu", reason=FALLBACK | {"message": "\x1b[2J\x1b]0;title\x07gone\r\x9bno"}))
    assert run("status", "--url", daemon.url).stdout.endswith("gpu_fallback: goneno\n")


def test_the_key_is_sent_and_never_shown(
    daemon: StandInDaemon, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_MANAGER_KEY", KEY)
    daemon.answers[f"GET {API}/instances"] = Answer(error("unauthorized", "present the key"), 401)
    result = run("status", "--url", daemon.url)
    assert daemon.seen[0].headers["Authorization"] == f"Bearer {KEY}"
    assert result.exit_code == 2
    assert "$OLLAMA_MANAGER_KEY" in result.stderr
    assert KEY not in result.output


def test_without_a_key_none_is_sent_whatever_netrc_says(
    daemon: StandInDaemon, run: Run, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login somebody password something\n")
    daemon.has()
    assert run("status", "--url", daemon.url).exit_code == 0
    assert "Authorization" not in daemon.seen[0].headers


def test_a_key_that_no_header_can_carry_is_refused_unseen(
    daemon: StandInDaemon, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_MANAGER_KEY", "two words")
    result = run("status", "--url", daemon.url)
    assert (result.exit_code, daemon.seen) == (2, [])
    assert "two words" not in result.output


def test_a_proxy_of_the_environment_is_not_used(
    daemon: StandInDaemon, run: Run, nowhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", nowhere)
    monkeypatch.setenv("http_proxy", nowhere)
    daemon.has()
    assert run("status", "--url", daemon.url).exit_code == 0


def test_the_address_comes_from_the_option_then_the_environment(
    daemon: StandInDaemon, run: Run, nowhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.has()
    monkeypatch.setenv("OLLAMA_MANAGER_URL", daemon.url + "/")
    assert run("status").exit_code == 0
    monkeypatch.setenv("OLLAMA_MANAGER_URL", nowhere)
    assert run("status").exit_code == 3
    assert run("status", "--url", daemon.url).exit_code == 0
    assert run("--url", daemon.url, "status").exit_code == 0


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("localhost:11435", "'localhost:11435'"),
        ("ftp://localhost", "'ftp://localhost'"),
        ("http://", "'http://'"),
        ("http://user:pass@localhost:1", "'http://…@localhost:1'"),
        ("user:pass@localhost:1", "'…@localhost:1'"),
        ("http://localhost:1?key=pass", "'http://localhost:1'"),
        ("http://localhost:1#pass", "'http://localhost:1'"),
        ("http://a b", "'http://a b'"),
        ("http://a\x1b[31m:1", r"'http://a\x1b[31m:1'"),
        ("http://a:x", "'http://a:x'"),
    ],
)
def test_an_address_that_is_none_is_shown_without_what_may_be_secret(run: Run, url: str, shown: str) -> None:
    result = run("status", "--url", url)
    assert result.exit_code == 2
    assert (
        f"the address of the daemon is {shown}; expected http://HOST:PORT or https://HOST:PORT\n"
        in result.stderr
    )
    assert "pass" not in result.output
    assert "--url" in result.stderr


def test_a_daemon_that_is_away_is_exit_3_and_says_what_to_do(run: Run, nowhere: str) -> None:
    for command in (
        ("status",),
        ("start", "cpu"),
        ("stop", "cpu"),
        ("pull",),
        ("reap",),
        ("status", "--watch"),
    ):
        result = run(*command, "--url", nowhere)
        assert result.exit_code == 3, command
        assert result.stderr.endswith(
            "start it with `ollama-manager serve`, or name another one with --url\n"
        )
        assert result.stderr.count("error: ") == 1
        assert "Connection refused" in result.stderr


@pytest.mark.parametrize(
    "answer",
    [
        Answer("Ollama is running"),
        Answer("<html>not found</html>", 404),
        Answer([1, 2]),
        Answer({"instances": [{"id": "cpu"}]}),
        Answer({"detail": "elsewhere"}, 500),
        Answer("", 302, {"Location": "http://127.0.0.1:1/"}),
    ],
)
def test_another_program_at_the_address_is_not_taken_for_the_daemon(
    daemon: StandInDaemon, run: Run, answer: Answer
) -> None:
    daemon.answers[f"GET {API}/instances"] = answer
    result = run("status", "--url", daemon.url)
    assert result.exit_code == 3
    assert "is not an ollama-manager" in result.stderr


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [
        (404, "unknown_instance", 2),
        (409, "conflict", 4),
        (409, "max_running_reached", 4),
        (422, "invalid_request", 2),
        (500, "internal_error", 1),
        (503, "engine_unavailable", 1),
        (504, "start_timeout", 1),
    ],
)
def test_a_refusal_shows_message_and_code_and_ends_with_its_exit_code(
    daemon: StandInDaemon, run: Run, status: int, code: str, exit_code: int
) -> None:
    daemon.has(instance("cpu"))
    for verb in ("start", "stop"):
        daemon.answers[f"POST {API}/instances/cpu/{verb}"] = Answer(error(code, "cpu cannot"), status)
        result = run(verb, "cpu", "--url", daemon.url)
        assert result.exit_code == exit_code
        assert f"cpu cannot ({code})" in result.stderr
        assert result.stdout == ""


def test_start_puts_progress_on_stderr_and_the_result_on_stdout(daemon: StandInDaemon, run: Run) -> None:
    daemon.has(instance("cpu", phase="starting"))

    def as_soon_as_it_was_looked_at() -> Any:
        daemon.wait_for_request("GET", f"{API}/instances/cpu")
        yield json.dumps({"instance": ready("cpu"), "changed": True})

    daemon.answers[f"POST {API}/instances/cpu/start"] = Answer(as_soon_as_it_was_looked_at())
    result = run("start", "cpu", "--url", daemon.url)
    assert result.exit_code == 0
    assert result.stderr == "cpu: starting\n"
    assert result.stdout.startswith("cpu is ready at http://172.18.0.2:11434 (")


def test_start_of_a_running_instance_is_done_and_shows_its_fallback(daemon: StandInDaemon, run: Run) -> None:
    body = {"instance": ready("gpu0", reason=FALLBACK), "changed": False}
    daemon.answers[f"POST {API}/instances/gpu0/start"] = Answer(body)
    result = run("start", "gpu0", "--url", daemon.url)
    assert result.exit_code == 0
    assert result.stdout == "gpu0 was running already, at http://172.18.0.2:11434\n"
    assert result.stderr == "note: it computes on the CPU (gpu_fallback)\n"


def test_a_failed_start_shows_the_last_lines_of_the_container(daemon: StandInDaemon, run: Run) -> None:
    daemon.has(instance("cpu"))
    lines = [f"line {number}" for number in range(30)] + ["\x1b[31mpanic\x1b[0m: out of luck"]
    body = error("container_exited", "it ended with exit code 2", log_tail=lines)
    daemon.answers[f"POST {API}/instances/cpu/start"] = Answer(body, 503, {"Retry-After": "7"})
    result = run("start", "cpu", "--url", daemon.url)
    assert result.exit_code == 1
    first, *tail = result.stderr.splitlines()
    assert first == (
        "error: cpu did not start: it ended with exit code 2 (container_exited); its container said last:"
    )
    assert tail[-3:] == ["  | line 29", "  | panic: out of luck", "  waiting may help: try again in 7 s"]
    assert "  | line 5" not in tail


def test_log_lines_that_the_refusal_lacks_are_taken_from_the_instance(
    daemon: StandInDaemon, run: Run
) -> None:
    daemon.has(
        instance("cpu", reason={"code": "start_timeout", "message": "too slow", "log_tail": ["loading"]})
    )
    daemon.answers[f"POST {API}/instances/cpu/start"] = Answer(error("start_timeout", "too slow"), 504)
    assert "  | loading\n" in run("start", "cpu", "--url", daemon.url).stderr


def test_an_id_cannot_reach_another_route(daemon: StandInDaemon, run: Run) -> None:
    assert run("start", "../../readyz?x=", "--url", daemon.url).exit_code == 2
    assert {seen.path for seen in daemon.seen} == {f"{API}/instances/..%2F..%2Freadyz%3Fx%3D/start"}


def test_stop_forces_only_when_asked_to(daemon: StandInDaemon, run: Run) -> None:
    daemon.has(instance("cpu"))
    done = {"instance": instance("cpu"), "changed": True}
    daemon.answers[f"POST {API}/instances/cpu/stop"] = Answer(done | {"changed": False})
    daemon.answers[f"POST {API}/instances/cpu/stop?force=true"] = Answer(done)
    assert run("stop", "cpu", "--url", daemon.url).stdout == "cpu was stopped already\n"
    assert run("stop", "cpu", "--force", "--url", daemon.url).stdout == "cpu is stopped\n"


def pull_lines(*entries: dict[str, Any]) -> Answer:
    return Answer(iter([json.dumps(entry) + "\n" for entry in entries]))


def test_pull_prints_every_step_of_a_layer_once_and_the_images_on_stdout(
    daemon: StandInDaemon, run: Run
) -> None:
    image = "ollama/ollama:0.32.15"
    step = {"image": image, "layer": "4f4fb700ef54", "status": "Downloading", "total_bytes": 9}
    daemon.answers[f"POST {API}/pull"] = pull_lines(
        {"image": image, "layer": "0.32.15", "status": "Pulling from ollama/ollama"},
        step | {"current_bytes": 1},
        step | {"current_bytes": 9},
        {"image": image, "layer": "4f4fb700ef54", "status": "Pull complete"},
        {"image": "b:1", "status": "Status: Image is up to date for b:1"},
        {"status": "done"},
    )
    result = run("pull", "--url", daemon.url)
    assert result.exit_code == 0
    assert result.stdout == f"pulled {image}\nb:1 is up to date\n"
    assert result.stderr.splitlines() == [
        "0.32.15: Pulling from ollama/ollama",
        "4f4fb700ef54: Downloading",
        "4f4fb700ef54: Pull complete",
        "Status: Image is up to date for b:1",
    ]
    assert daemon.seen[0].body == b"{}"


def test_pull_that_fails_half_way_is_exit_1_with_the_reason(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"POST {API}/pull"] = pull_lines(
        {"image": "a:1", "status": "Downloading"}, error("image_missing", "no space left")
    )
    result = run("pull", "a:1", "--url", daemon.url)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "error: no space left (image_missing)" in result.stderr
    assert json.loads(daemon.seen[0].body) == {"image": "a:1"}
    assert "ollama-manager pull" not in result.stderr, "the advice is not what has just failed"
    assert "`docker pull` says more" in result.stderr


def test_pull_that_is_refused_at_once_does_not_advise_to_pull(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"POST {API}/pull"] = Answer(error("image_missing", "no such image"), 503)
    result = run("pull", "a:1", "--url", daemon.url)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "ollama-manager pull" not in result.stderr


def test_the_advice_of_the_daemon_for_a_failed_pull_is_not_repeated(daemon: StandInDaemon, run: Run) -> None:
    refusal = not_pulled("a:1", "no such host")
    daemon.answers[f"POST {API}/pull"] = Answer(error("image_missing", refusal.message), 503)
    stderr = run("pull", "a:1", "--url", daemon.url).stderr
    assert [stderr.count(words) for words in ("a:1", "name", "registry")] == [1, 1, 1]


def test_pull_whose_daemon_ends_half_way_is_not_taken_for_done(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"POST {API}/pull"] = pull_lines({"image": "a:1", "status": "Downloading"})
    result = run("pull", "a:1", "--url", daemon.url)
    assert (result.exit_code, result.stdout) == (3, "")


def swept(action: str) -> Answer:
    return Answer({"instances": [{"id": "cpu", "action": action, "detail": "idle"}], "count": 1})


@pytest.mark.parametrize(
    ("action", "words", "exit_code"),
    [
        ("stopped", "stopped", 0),
        ("kept", "kept", 0),
        ("would_stop", "would be stopped", 0),
        ("failed", "failed", 1),
    ],
)
def test_reap_prints_a_line_for_every_instance(
    daemon: StandInDaemon, run: Run, action: str, words: str, exit_code: int
) -> None:
    daemon.has(instance("cpu"))
    daemon.answers[f"POST {API}/reap"] = swept(action)
    result = run("reap", "--url", daemon.url)
    assert (result.exit_code, result.stdout) == (exit_code, f"cpu: {words}: idle\n")


def test_a_dry_run_asks_for_a_dry_run(daemon: StandInDaemon, run: Run) -> None:
    daemon.has(instance("cpu"))
    daemon.answers[f"POST {API}/reap?dry_run=true"] = swept("would_stop")
    assert run("reap", "--dry-run", "--url", daemon.url).exit_code == 0


def test_reap_is_exit_1_while_the_daemon_has_no_engine(daemon: StandInDaemon, run: Run) -> None:
    away = error("engine_unavailable", "the engine is away")
    daemon.answers[f"POST {API}/reap"] = Answer(away, 503)
    result = run("reap", "--url", daemon.url)
    assert result.exit_code == 1
    assert "error: the engine is away" in result.stderr


def test_a_defect_is_one_line_and_no_traceback(
    daemon: StandInDaemon, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.has(instance("cpu"))
    monkeypatch.setattr("manager.cli.status.plain_table", lambda instances: 1 / 0)
    result = run("status", "--url", daemon.url)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: unexpected: ZeroDivisionError: division by zero\n")
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "arguments", [("start",), ("nothing",), ("serve", "--port", "many"), ("status", "--wach")]
)
def test_wrong_usage_is_exit_2_with_usage_and_error(run: Run, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr
    assert "error: " in result.stderr


OPEN = {
    "state": "open",
    "failures": 2,
    "opened_at": "2026-11-28T12:00:00.000Z",
    "retry_at": "2026-11-28T12:00:30.000Z",
    "reason": "attempt_timeout",
}


def test_status_says_of_a_breaker_that_is_not_closed_what_it_keeps_away(
    daemon: StandInDaemon, run: Run
) -> None:
    older = {key: value for key, value in ready("old").items() if key != "breaker"}
    daemon.has(
        ready("shut", breaker=OPEN),
        ready("tried", breaker={**OPEN, "state": "half_open"}, reason=FALLBACK),
        ready("well"),
        older,
    )
    _, shut, tried, well, old = run("status", "--url", daemon.url).stdout.splitlines()
    after = "after 2 failures in a row, the last one attempt_timeout"
    assert shut.endswith(f"breaker_open: no requests {after}; retry at 2026-11-28T12:00:30.000Z")
    half = f"breaker_open: half-open {after}; the next request tries the instance"
    assert tried.endswith(f"gpu_fallback: it computes on the CPU; {half}")
    assert well.endswith("-")
    assert old.endswith("-")


def test_a_breaker_is_reset_by_name(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"POST {API}/instances/gpu0/breaker/reset"] = Answer(ready("gpu0"))
    result = run("breaker", "reset", "gpu0", "--url", daemon.url)
    assert (result.exit_code, result.stdout) == (
        0,
        "the breaker of gpu0 is closed: it gets requests again as soon as its server answers\n",
    )
    refused = error("unknown_instance", "there is no instance 'x'")
    daemon.answers[f"POST {API}/instances/x/breaker/reset"] = Answer(refused, 404)
    result = run("breaker", "reset", "x", "--url", daemon.url)
    assert result.exit_code == 2
    assert "there is no instance 'x'" in result.stderr
