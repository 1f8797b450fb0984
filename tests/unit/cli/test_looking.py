"""`logs`, `events`, `gpus`, `models` and `lanes`, against an HTTP server that answers like a daemon."""

from __future__ import annotations

import json
import re
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.cli.stand_in import API, Answer, error, instance, ready

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    from tests.unit.cli.stand_in import StandInDaemon

    Run = Callable[..., Result]

GIB = 2**30
TIERS = ("/api/v1/llm/models", "/api/v1/llm/routing-stats")
COMMANDS = (("logs", "cpu"), ("logs", "cpu", "-f"), ("events",), ("events", "-f"), ("gpus",), ("models",))
ALL = (
    *COMMANDS,
    ("roles",),
    ("roles", "set", "thinking", "weight=2"),
    ("roles", "unset", "thinking"),
    ("lanes",),
    ("schedules",),
    ("local-only",),
    ("local-only", "on"),
    ("tiers",),
    ("tiers", "stats"),
)


@pytest.fixture
def nowhere() -> str:
    """An address that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def columns(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


@pytest.mark.parametrize("command", ALL, ids=" ".join)
def test_a_daemon_that_is_away_is_exit_3_without_a_traceback(
    run: Run, nowhere: str, command: tuple[str, ...]
) -> None:
    result = run(*command, "--url", nowhere)
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ALL, ids=" ".join)
def test_an_answer_of_another_program_is_exit_3(
    daemon: StandInDaemon, run: Run, command: tuple[str, ...]
) -> None:
    for method in ("GET", "POST"):
        for path in (
            f"{API}/instances/cpu", f"{API}/instances/cpu/logs?tail=100", f"{API}/gpus", f"{API}/lanes",
            f"{API}/schedules", f"{API}/events?last=20&follow=false", f"{API}/events?last=20", "/v1/models",
            "/api/settings/models", "/api/settings/models/effective", *TIERS,
        ):  # fmt: skip
            daemon.answers[f"{method} {path}"] = Answer("<html>", 404)
    result = run(*command, "--url", daemon.url)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "is not an ollama-manager" in result.stderr


@pytest.mark.parametrize(
    "command",
    [("gpus",), ("models",), ("roles",), ("lanes",), ("schedules",), ("tiers",), ("tiers", "stats")],
    ids=" ".join,
)
def test_json_of_another_shape_is_exit_3(daemon: StandInDaemon, run: Run, command: tuple[str, ...]) -> None:
    for path in (
        f"{API}/gpus", f"{API}/lanes", f"{API}/schedules", "/v1/models", "/api/tags", "/api/ps",
        "/api/settings/models", "/api/settings/models/effective", *TIERS,
    ):  # fmt: skip
        daemon.answers[f"GET {path}"] = Answer({"gpus": [{}], "data": [{}], "roles": {"a": {}}})
    result = run(*command, "--url", daemon.url)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "is not an ollama-manager of this version" in result.stderr


# --- logs -----------------------------------------------------------------------------------------


def log_of(daemon: StandInDaemon, query: str, body: Any) -> None:
    daemon.answers[f"GET {API}/instances/cpu/logs?{query}"] = Answer(body)


def test_logs_are_printed_line_by_line_without_what_steers_a_terminal(
    daemon: StandInDaemon, run: Run
) -> None:
    log_of(daemon, "tail=7", "one\n\x1b[31mtwo\x1b[0m\n\nlast, and no end of line")
    result = run("logs", "cpu", "--tail", "7", "--url", daemon.url)
    assert result.exit_code == 0
    assert result.stdout == "one\ntwo\n\nlast, and no end of line\n"
    assert result.stderr == ""


def test_a_followed_line_may_come_in_parts_and_a_long_one_is_not_kept_for_ever(
    daemon: StandInDaemon, run: Run
) -> None:
    daemon.has(ready("cpu", container={"id": "a" * 64}))
    long = "x" * 40_000
    log_of(daemon, "tail=100&follow=true", iter(["be", "gun\nthe ", "ü", "\n", long, long, "end\n"]))
    result = run("logs", "cpu", "-f", "--url", daemon.url)
    assert result.exit_code == 0
    assert result.stdout == f"begun\nthe ü\n{long}{long}\nend\n"
    assert result.stderr == "the container of cpu has ended\n"


@pytest.mark.parametrize("tail", ["0", "-1", "10001", "x"])
def test_a_wrong_number_of_lines_is_exit_2(run: Run, tail: str) -> None:
    result = run("logs", "cpu", "--tail", tail)
    assert result.exit_code == 2
    assert "--tail" in result.stderr


def test_logs_of_an_unknown_instance_are_exit_2(daemon: StandInDaemon, run: Run) -> None:
    for more in ((), ("-f",)):
        result = run("logs", "nope", *more, "--url", daemon.url)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "`ollama-manager status` lists the instances" in result.stderr


# --- events ---------------------------------------------------------------------------------------


def event(number: int, kind: str = "ready", **values: Any) -> dict[str, Any]:
    one = {"id": number, "at": f"2026-08-01T12:00:0{number}.000Z", "instance": "cpu", "kind": kind}
    return {**one, "reason": None, "detail": "", **values}


def sse(*events: dict[str, Any]) -> list[str]:
    return [": events follow\n\n", *(f"id: {one['id']}\ndata: {json.dumps(one)}\n\n" for one in events)]


def test_events_are_lines_with_time_instance_kind_reason_and_detail(daemon: StandInDaemon, run: Run) -> None:
    failed = event(2, "start_failed", reason="image_missing", detail="no\nsuch \x1b[2Jimage", instance="gpu0")
    daemon.answers[f"GET {API}/events?last=2&follow=false"] = Answer(iter(sse(event(1), failed)))
    result = run("events", "--limit", "2", "--url", daemon.url)
    assert result.exit_code == 0
    head, first, second = result.stdout.splitlines()
    assert columns(head) == ["TIME", "INSTANCE", "KIND", "REASON", "DETAIL"]
    assert columns(first)[1:] == ["cpu", "ready", "-", "-"]
    assert columns(second)[1:] == ["gpu0", "start_failed", "image_missing", "no such image"]
    assert re.fullmatch(r"2026-08-0[12] \d\d:\d\d:01", columns(first)[0])


def test_events_as_json_are_lines_of_what_the_api_says(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"GET {API}/events?last=20&follow=false"] = Answer(iter(sse(event(1), event(2))))
    result = run("events", "--json", "--url", daemon.url)
    assert [json.loads(line) for line in result.stdout.splitlines()] == [event(1), event(2)]


def test_a_followed_stream_that_ends_is_resumed_after_the_last_event(
    daemon: StandInDaemon, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manager.cli.events._RETRY_S", 0)
    path = f"GET {API}/events?last=20"

    def then_refuse() -> Any:
        yield from sse(event(2))
        daemon.answers[path] = Answer(error("unauthorized", "present the key"), 401)

    def then_more() -> Any:
        yield from sse(event(1))
        daemon.answers[path] = Answer(then_refuse())

    daemon.answers[path] = Answer(then_more())
    result = run("events", "-f", "--json", "--url", daemon.url)
    assert result.exit_code == 2  # what only a person can mend is no reason to wait
    assert [json.loads(line)["id"] for line in result.stdout.splitlines()] == [1, 2]
    asked = [seen.headers.get("Last-Event-ID") for seen in daemon.seen]
    assert asked == [None, "1", "2"]
    away = "the daemon is away: its stream of events ended; waiting for it"
    assert result.stderr.splitlines()[:3] == [away, "the daemon is back", away]


def test_a_stream_of_events_that_breaks_off_is_named_as_that(daemon: StandInDaemon, run: Run) -> None:
    def cut() -> Any:
        yield from sse(event(1))
        raise ConnectionAbortedError

    daemon.answers[f"GET {API}/events?last=20&follow=false"] = Answer(cut())
    result = run("events", "--url", daemon.url)
    assert result.exit_code == 3
    assert f"the connection to the daemon at {daemon.url} broke off" in result.stderr


# --- gpus -----------------------------------------------------------------------------------------


def card(**values: Any) -> dict[str, Any]:
    one = {"uuid": "GPU-1", "index": 0, "pci_bus_id": "00000000:01:00.0", "name": "NVIDIA H200"}
    memory = {"vram_total_bytes": 140 * GIB, "vram_used_bytes": 12 * GIB, "vram_free_bytes": 128 * GIB}
    return {**one, **memory, "lost": None, "processes": [], **values}


def gpus(daemon: StandInDaemon, *cards: dict[str, Any], trouble: dict[str, str] | None = None) -> None:
    daemon.answers[f"GET {API}/gpus"] = Answer({"gpus": cards, "error": trouble})


def test_each_card_is_a_line_with_its_memory_and_who_holds_it(daemon: StandInDaemon, run: Run) -> None:
    holders = [
        {"pid": 4711, "name": "ollama", "used_bytes": 12 * GIB, "instance": "gpu0"},
        {"pid": 9, "name": None, "used_bytes": None, "instance": None},
    ]
    unread = {"vram_total_bytes": None, "vram_used_bytes": None, "vram_free_bytes": None}
    gpus(daemon, card(processes=holders), card(index=1, uuid="GPU-2", **unread, lost="fell off the bus"))
    result = run("gpus", "--url", daemon.url)
    assert (result.exit_code, result.stderr) == (0, "")
    head, first, second = map(columns, result.stdout.splitlines())
    assert head == ["INDEX", "NAME", "UUID", "USED/TOTAL", "FREE", "PROCESSES"]
    assert first[:5] == ["0", "NVIDIA H200", "GPU-1", "12.0G/140.0G", "128.0G"]
    assert first[5] == "4711 ollama of gpu0 12.0G, 9 unknown unknown"
    assert second[2:] == ["GPU-2", "unknown/unknown", "unknown", "lost: fell off the bus"]


def test_cards_of_other_hosts_are_named_with_them_and_unknown_memory_with_its_reason(
    daemon: StandInDaemon, run: Run
) -> None:
    unread = {"vram_total_bytes": None, "vram_used_bytes": None, "vram_free_bytes": None}
    away = card(uuid="GPU-2", host="node-1", memory_unknown="no exporter is set", **unread)
    trouble = {"code": "vram_unknown", "message": "the memory of GPU-2 on node-1 is unknown"}
    gpus(daemon, card(host=None, memory_unknown=None), away, trouble=trouble)
    result = run("gpus", "--url", daemon.url)
    assert result.exit_code == 0
    assert result.stderr == "warning: the memory of GPU-2 on node-1 is unknown (vram_unknown)\n"
    head, first, second = map(columns, result.stdout.splitlines())
    assert head[:2] == ["HOST", "INDEX"]
    assert first[:4] == ["-", "0", "NVIDIA H200", "GPU-1"]
    assert second[0] == "node-1"
    assert second[4:] == ["unknown/unknown", "unknown", "memory unknown: no exporter is set"]


def test_an_error_of_the_driver_is_told_beside_the_cards(daemon: StandInDaemon, run: Run) -> None:
    gpus(daemon, card(), trouble={"code": "gpu_query_failed", "message": "the driver does not answer"})
    result = run("gpus", "--url", daemon.url)
    assert result.exit_code == 0
    assert "NVIDIA H200" in result.stdout
    assert result.stderr == "warning: the driver does not answer (gpu_query_failed)\n"


def test_without_cards_that_is_told(daemon: StandInDaemon, run: Run) -> None:
    gpus(daemon)
    result = run("gpus", "--url", daemon.url)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no cards\n")


@pytest.mark.parametrize(("command", "path"), [("gpus", f"{API}/gpus"), ("lanes", f"{API}/lanes")])
def test_json_is_what_the_api_says(daemon: StandInDaemon, run: Run, command: str, path: str) -> None:
    daemon.answers[f"GET {path}"] = Answer({"gpus": [], "error": None, "more": "ü"})
    result = run(command, "--json", "--url", daemon.url)
    assert json.loads(result.stdout) == {"gpus": [], "error": None, "more": "ü"}


# --- models ---------------------------------------------------------------------------------------


def models(daemon: StandInDaemon) -> None:
    hints = {"object": "model", "created": 0, "owned_by": "library", "offload": None, "latency_ms": None}
    daemon.answers["GET /v1/models"] = Answer(
        {
            "object": "list",
            "data": [
                {
                    **hints, "id": "qwen3:8b", "instances": ["cpu", "gpu0"], "status": "ready",
                    "digests": {"a" * 64: ["cpu", "gpu0"]},
                },
                {**hints, "id": "bge-m3:latest", "instances": ["cpu"], "status": "not_loaded", "digests": {}},
                {
                    **hints, "id": "thinking", "owned_by": "ollama-manager", "instances": ["cpu"],
                    "status": "ready", "model": "qwen3:8b", "kind": "generate", "digests": {},
                },
            ],
        }
    )  # fmt: skip
    details = {"parameter_size": "8.2B", "parent_model": ""}
    alias = {**details, "parent_model": "qwen3:8b"}
    daemon.answers["GET /api/tags"] = Answer(
        {
            "models": [
                {"name": "qwen3:8b", "size": 5 * GIB, "details": details},
                {"name": "bge-m3:latest", "size": 0, "details": {"parameter_size": ""}},
                {"name": "thinking:latest", "size": 5 * GIB, "details": alias},
            ]
        }
    )  # fmt: skip
    daemon.answers["GET /api/ps"] = Answer(
        {
            "models": [
                {"name": "qwen3:8b", "instance": "gpu0", "size": 6 * GIB, "size_vram": 3 * GIB},
                {"name": "qwen3:8b", "instance": "cpu", "size": 6 * GIB, "size_vram": 0},
            ]
        }
    )
    roles = {
        "thinking": {"model": "Qwen3:8b"},
        "control": {"model": None},
        "embedding": {"model": "bge-m3"},
        "lost": {"model": "gone:1b"},
    }
    daemon.answers["GET /api/settings/models"] = Answer({"roles": roles, "warnings": []})


def test_each_model_is_a_line_with_its_places_its_size_and_its_roles(daemon: StandInDaemon, run: Run) -> None:
    models(daemon)
    result = run("models", "--url", daemon.url)
    assert (result.exit_code, result.stderr) == (0, "")
    head, *lines = map(columns, result.stdout.splitlines())
    assert head == ["MODEL", "SIZE", "PARAMETERS", "ON", "STATUS", "LOADED ON", "ROLES"]
    loaded_on = "gpu0 6.0G (50 % on the card), cpu 6.0G"
    assert lines == [
        ["qwen3:8b", "5.0G", "8.2B", "cpu, gpu0", "ready", loaded_on, "thinking"],
        ["bge-m3:latest", "unknown", "unknown", "cpu", "not_loaded", "-", "embedding"],
        ["gone:1b", "-", "-", "nowhere", "-", "-", "lost"],
    ]  # fmt: skip
    assert {seen.method for seen in daemon.seen} == {"GET"}


def test_a_model_that_differs_between_instances_is_marked_and_warned_of(
    daemon: StandInDaemon, run: Run
) -> None:
    models(daemon)
    digests = {"a" * 64: ["cpu"], "b" * 64: ["gpu0"]}
    for entry in daemon.answers["GET /v1/models"].body["data"]:
        if entry["id"] != "bge-m3:latest":
            entry["digests"] = digests
    result = run("models", "--url", daemon.url)
    _, first, *_ = map(columns, result.stdout.splitlines())
    assert first[3] == "cpu (aaaaaaaaaaaa), gpu0 (bbbbbbbbbbbb)"
    assert result.stderr.startswith("warning: not the same on all instances: qwen3:8b; ")
    assert result.stderr.count("\n") == 1, "the role of the model is no other model"


def test_models_as_json_are_the_answers_of_the_api_by_path(daemon: StandInDaemon, run: Run) -> None:
    models(daemon)
    document = json.loads(run("models", "--json", "--url", daemon.url).stdout)
    paths = ("/v1/models", "/api/tags", "/api/ps", "/api/settings/models")
    assert document == {path: daemon.answers[f"GET {path}"].body for path in paths}


# --- lanes ----------------------------------------------------------------------------------------


def lanes(daemon: StandInDaemon, **values: Any) -> None:
    lane = {"name": "alert-fast", "in_flight": 2, "queued": 3, "oldest_wait_s": 61.0, "concurrency": 4}
    other = {"name": "*", "in_flight": 0, "queued": 0, "oldest_wait_s": None, "concurrency": None}
    slots = [
        {"id": "gcp-a", "slots": 4, "in_use": 3, "reserved_free": 1},
        {"id": "nas", "slots": None, "in_use": 0, "reserved_free": 0},
    ]
    body = {"lanes": [{**lane, "reserved": 1, **values}, {**other, "reserved": 0}], "instances": slots}
    daemon.answers[f"GET {API}/lanes"] = Answer(body)


def test_lanes_are_a_table_of_lanes_and_one_of_slots(daemon: StandInDaemon, run: Run) -> None:
    lanes(daemon)
    result = run("lanes", "--url", daemon.url)
    assert (result.exit_code, result.stderr) == (0, "")
    assert [columns(line) for line in result.stdout.splitlines()] == [
        ["LANE", "IN FLIGHT", "CONCURRENCY", "QUEUED", "OLDEST WAIT", "RESERVED"],
        ["alert-fast", "2", "4", "3", "1m01s", "1"],
        ["*", "0", "-", "0", "-", "0"],
        [""],
        ["INSTANCE", "SLOTS", "IN USE", "RESERVED FREE"],
        ["gcp-a", "4", "3", "1"],
        ["nas", "-", "0", "0"],
    ]


def test_lanes_show_what_is_kept_warm_and_why_not(daemon: StandInDaemon, run: Run) -> None:
    denied = "it is denied there (max_parameters 14b)"
    lanes(
        daemon,
        keep_warm=[
            {"instance": "gcp-a", "is_kept": True, "reason": None, "detail": ""},
            {"instance": "nas", "is_kept": False, "reason": "host_denied", "detail": denied},
        ],
    )
    lines = run("lanes", "--url", daemon.url).stdout.splitlines()
    assert [columns(line) for line in lines[-3:]] == [
        ["KEPT WARM", "INSTANCE", "IN MEMORY", "REASON", "DETAIL"],
        ["alert-fast", "gcp-a", "yes", "-", "-"],
        ["alert-fast", "nas", "no", "host_denied", denied],
    ]


@pytest.mark.parametrize("as_json", [True, False])
def test_watched_lanes_are_printed_when_they_change(
    daemon: StandInDaemon, run: Run, monkeypatch: pytest.MonkeyPatch, *, as_json: bool
) -> None:
    lanes(daemon)
    looks: list[None] = []

    def instead_of_a_wait(_seconds: float) -> None:
        looks.append(None)
        if len(looks) == 2:  # once without a change
            lanes(daemon, queued=7)
        if len(looks) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("manager.cli.lanes.time.sleep", instead_of_a_wait)
    result = run("lanes", "--watch", *(["--json"] if as_json else []), "--url", daemon.url)
    assert result.exit_code == 130
    if as_json:
        queued = [json.loads(line)["lanes"][0]["queued"] for line in result.stdout.splitlines()]
    else:
        queued = [int(columns(line)[3]) for line in result.stdout.splitlines() if "alert-fast" in line]
    assert queued == [3, 7]


def test_a_stopped_instance_is_no_reason_to_fail(daemon: StandInDaemon, run: Run) -> None:
    daemon.has(instance("cpu"))
    log_of(daemon, "tail=100&follow=true", "its last words\n")
    result = run("logs", "cpu", "-f", "--url", daemon.url)
    assert (result.exit_code, result.stdout) == (0, "its last words\n")
    assert result.stderr == "cpu had no container (it was stopped); these lines were kept\n"


# --- schedules ------------------------------------------------------------------------------------


def test_schedules_say_when_next_in_the_time_zone_of_this_machine_and_what_was_done_last(
    daemon: StandInDaemon, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    entry = {
        "cron": "0 8 * * 1",
        "every_s": None,
        "words": "at 08:00, Monday",
        "action": "start",
        "instance": "gpu0",
        "timezone": "Asia/Tokyo",
        "next": ["2026-11-29T23:00:00.000Z", "2026-12-06T23:00:00.000Z"],
        "last": {"at": "2026-11-22T23:00:01.000Z", "detail": "failed: no \x1b[31mGPU"},
    }
    sweep: dict[str, Any] = {
        "cron": None, "every_s": 2.0, "words": "every 2 s", "action": "reap", "instance": None,
        "timezone": None, "next": [], "last": None,
    }  # fmt: skip
    body = {"schedules": [entry, sweep], "count": 2}
    daemon.answers[f"GET {API}/schedules"] = Answer(body)
    try:
        result = run("schedules", "--url", daemon.url)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert (result.exit_code, result.stderr) == (0, "")
    assert [columns(line) for line in result.stdout.splitlines()] == [
        ["WHEN", "CRON", "ACTION", "INSTANCE", "NEXT", "LAST"],
        [
            "at 08:00, Monday", "0 8 * * 1", "start", "gpu0", "Mon 2026-11-30 08:00, Mon 2026-12-07 08:00",
            "Mon 2026-11-23 08:00: failed: no GPU",
        ],
        ["every 2 s", "-", "reap", "-", "-", "-"],
    ]  # fmt: skip
    assert json.loads(run("schedules", "--json", "--url", daemon.url).stdout) == body
