"""What `status` looks like on terminals of several widths, and how `--watch` follows what happens."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from io import StringIO
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from manager.cli.client import Daemon
from manager.cli.locate import Endpoint
from manager.cli.status import _picture, _Watch
from manager.cli.tables import size, terminal_view
from tests.unit.cli.stand_in import API, Answer, StandInDaemon, error, instance, ready

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LINES = ["one", "two", "three", "four"]
DIED = {"code": "container_exited", "message": "it ended by itself with exit code 2", "log_tail": LINES}
GPU = {
    "kind": "gpu", "uuid": "GPU-6f4b3a52-0000-4000-8000-000000000001", "index": None, "name": None,
    "vram_total_bytes": None, "vram_used_bytes": None, "vram_free_bytes": None,
}  # fmt: skip
MODEL = {"name": "qwen3:8b", "digest": "d", "size_bytes": 2**30, "vram_bytes": 0, "expires_at": None}
LIMIT_S = 60


def drawn(daemon: StandInDaemon, width: int) -> str:
    reader = Daemon(Endpoint(daemon.url))
    console = Console(file=StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(terminal_view(reader.read_instances(reader.status_document()), width))
    output: Any = console.file
    return str(output.getvalue())


@pytest.mark.parametrize("width", [200, 100, 80, 60, 40])
def test_nothing_that_matters_is_lost_on_a_narrow_terminal(daemon: StandInDaemon, width: int) -> None:
    daemon.has(
        ready("cpu", in_flight=2, models=[MODEL], ttl_remaining_s=None),
        instance("gpu0", phase="failed", reason=DIED, device=GPU),
    )
    output = drawn(daemon, width)
    assert all(len(line) <= width for line in output.splitlines())
    words = " ".join(output.split())
    for wanted in ("cpu", "gpu0", "ready", "healthy", "failed !", "GPU-6f4b3a52…", "2", "qwen3:8b"):
        assert wanted in words
    assert "container_exited: it ended by itself with exit code 2" in words
    assert "| two | three | four" in words


def test_a_wide_terminal_has_one_table_with_every_column(daemon: StandInDaemon) -> None:
    daemon.has(ready("cpu"), instance("nas", driver="external", device=GPU | {"kind": None}))
    head, cpu, nas = drawn(daemon, 120).splitlines()
    columns = "INSTANCE DRIVER DEVICE PHASE HEALTH TARGET IN FLIGHT TTL LEFT MODELS"
    assert " ".join(head.split()) == columns
    assert cpu.split()[:3] == ["cpu", "docker", "cpu"]
    assert nas.split()[:3] == ["nas", "external", "undeclared"]


def test_a_paid_server_has_no_device_that_could_be_declared(daemon: StandInDaemon) -> None:
    daemon.has(instance("openai", driver="cloud", device=GPU | {"kind": None}))
    assert drawn(daemon, 120).splitlines()[1].split()[:3] == ["openai", "cloud", "-"]


def test_an_instance_of_a_swarm_is_shown_on_its_node_with_its_ttl(daemon: StandInDaemon) -> None:
    card = {"uuid": "GPU-1", "index": 0, "name": "Card"}
    seen = GPU | {"index": 0, "name": "Card", "cards": [card | {"host": "other-box"}]}
    daemon.has(
        ready("far", driver="swarm", node="gpu-box", ttl_remaining_s=61.0),
        instance("away", driver="swarm", node=None),
        instance("blind", driver="swarm", node="gpu-box", device=GPU),
        instance("card", driver="swarm", node="gpu-box", device=seen),
    )
    rows = [line.split("  ") for line in drawn(daemon, 200).splitlines()]
    far, away, blind, card_row = (" | ".join(cell.strip() for cell in row if cell) for row in rows[1:5])
    assert "swarm | cpu on gpu-box | ready | healthy | running" in far
    assert "1m01s" in far
    assert "swarm | cpu | stopped" in away
    assert "gpu GPU-6f4b3a52… on gpu-box not seen" in blind
    assert "gpu 0 on other-box Card" in card_row


def test_a_table_that_hardly_fits_does_without_driver_and_target(daemon: StandInDaemon) -> None:
    daemon.has(ready("cpu"))
    assert "DRIVER" in drawn(daemon, 90)
    head = drawn(daemon, 72).splitlines()[0]
    assert "DRIVER" not in head
    assert "TTL LEFT" in head


CARD = GPU | {
    "index": 0,
    "name": "NVIDIA GeForce RTX 4070 Laptop GPU",
    "vram_total_bytes": 12 * 2**30,
    "vram_used_bytes": 2**30,
}


@pytest.mark.parametrize("width", [86, 100, 120])
def test_a_table_with_cards_stays_a_table_without_their_names(daemon: StandInDaemon, width: int) -> None:
    daemon.has(ready("cpu"), *(ready(f"gpu{n}", device=CARD, models=[MODEL]) for n in range(4)))
    lines = drawn(daemon, width).splitlines()
    assert lines[0].split()[:2] in (["INSTANCE", "DEVICE"], ["INSTANCE", "DRIVER"])
    assert sum("1.0/12.0 GiB" in line for line in lines) == 4


def test_the_name_of_a_card_is_shown_where_it_fits(daemon: StandInDaemon) -> None:
    daemon.has(ready("gpu0", device=CARD))
    assert "gpu 0 NVIDIA GeForce RTX 4070 Laptop GPU 1.0/12.0 GiB" in drawn(daemon, 140)


def over_cards(*cards: tuple[int | None, str | None]) -> dict[str, Any]:
    unknown: dict[str, Any] = {
        "uuid": "GPU-1",
        "pci_bus_id": None,
        "vram_total_bytes": None,
        "vram_used_bytes": None,
    }
    shown = [unknown | {"index": index, "name": name} for index, name in cards]
    return CARD | {"cards": shown, "vram_total_bytes": 48 * 2**30, "vram_used_bytes": 3 * 2**30}


def on_host(device: dict[str, Any]) -> dict[str, Any]:
    return device | {"cards": [one | {"host": "node-1"} for one in device["cards"]]}


@pytest.mark.parametrize(
    ("device", "shown"),
    [
        (over_cards((0, "RTX"), (1, "RTX")), "gpu 0+1 2 x RTX 3.0/48.0 GiB"),
        (over_cards((0, "RTX"), (2, "A100"), (3, "RTX")), "gpu 0+2+3 2 x RTX + A100 3.0/48.0 GiB"),
        (over_cards((0, "RTX"), (None, None)), "gpu 0+? RTX + unknown 3.0/48.0 GiB"),
        (
            over_cards((None, None), (1, "RTX")) | {"index": None, "vram_total_bytes": None},
            "gpu ?+1 unknown + RTX VRAM unknown",
        ),
        (over_cards((0, "RTX")) | {"name": "RTX"}, "gpu 0 RTX 3.0/48.0 GiB"),
        (on_host(over_cards((0, "RTX")) | {"name": "RTX"}), "gpu 0 on node-1 RTX 3.0/48.0 GiB"),
        (on_host(over_cards((0, "RTX"), (1, "RTX"))), "gpu 0+1 on node-1 2 x RTX 3.0/48.0 GiB"),
    ],
)
def test_every_card_of_an_instance_is_shown(daemon: StandInDaemon, device: Any, shown: str) -> None:
    daemon.has(ready("both", device=device))
    assert shown in drawn(daemon, 160)


def test_a_narrow_table_has_the_numbers_of_several_cards_without_their_names(daemon: StandInDaemon) -> None:
    daemon.has(ready("both", device=over_cards((0, "N" * 40), (1, "N" * 40))))
    assert "gpu 0+1 3.0/48.0 GiB" in drawn(daemon, 100)


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [
        (0, "0B"),
        (512, "512B"),
        (2**10, "1K"),
        (45_960_996, "44M"),
        (2**30, "1.0G"),
        (int(4.7 * 2**30), "4.7G"),
    ],
)
def test_a_small_model_has_a_size(size_bytes: int, shown: str) -> None:
    assert size(size_bytes) == shown


def test_no_instances_are_said_to_be_none(daemon: StandInDaemon) -> None:
    daemon.has()
    assert drawn(daemon, 80).strip() == "no instances are configured"


@contextmanager
def begun(port: int) -> Iterator[_Watch]:
    watch = _Watch(lambda: Endpoint(f"http://127.0.0.1:{port}"))
    try:
        watch.begin()
        yield watch
    finally:
        watch.end()


def pictured(watch: _Watch) -> str:
    console = Console(file=StringIO(), width=100)
    console.print(_picture(watch, 100))
    output: Any = console.file
    return str(output.getvalue())


def look_until(watch: _Watch, holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline
        watch.wait()
        watch.look()


def test_a_watch_outlives_the_daemon_and_says_so_meanwhile() -> None:
    with ExitStack() as stack:
        with StandInDaemon() as daemon:
            daemon.has(ready("cpu"))
            watch = stack.enter_context(begun(port := daemon.port))
            assert watch.seen.trouble is None
        look_until(watch, lambda: watch.seen.trouble is not None)
        shown = pictured(watch)
        assert "daemon unreachable for 0s, last seen state below" in shown
        assert "ready" in shown
        again = stack.enter_context(StandInDaemon(port))
        again.has(ready("cpu", phase="draining"))
        look_until(watch, lambda: watch.seen.trouble is None)
        assert watch.instances[0].phase == "draining"
        assert "unreachable" not in pictured(watch)


def test_a_ttl_counts_down_between_two_frames(daemon: StandInDaemon) -> None:
    daemon.has(ready("cpu", ttl_remaining_s=872.0))
    with begun(daemon.port) as watch:
        assert "14m32s" in pictured(watch)
        watch.seen = replace(watch.seen, at={"instances": watch.seen.at["instances"] - 72})
        assert "13m20s" in pictured(watch)


@contextmanager
def watching(daemon: StandInDaemon, *options: str) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-m", "manager", "status", "--watch", "--url", daemon.url, *options]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_a_watch_into_a_pipe_writes_a_line_for_every_change_and_ends_on_an_interrupt(
    daemon: StandInDaemon,
) -> None:
    daemon.has(ready("cpu"), ready("nas"))
    with watching(daemon) as process:
        assert line_of(process).startswith("INSTANCE")
        assert line_of(process).startswith("cpu ")
        assert line_of(process).startswith("nas ")
        daemon.has(ready("cpu", ttl_remaining_s=5.0), ready("nas"))  # a clock that runs is no change
        hostile = "\x1b[2Jevil\x07\u009b1m [red]name[/red]"
        daemon.has(ready("cpu", phase="stopping", models=[MODEL | {"name": hostile}]), ready("nas"))
        line = line_of(process)
        assert line.split()[:4] == ["cpu", "docker", "cpu", "stopping"]
        assert "evil1m [red]name[/red]" in line
        assert line.removesuffix("\n").isprintable()
        daemon.has(ready("nas"))
        assert line_of(process) == "cpu is no instance any more\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 0
        assert process.stderr is not None
        assert process.stderr.read().strip() == ""


def test_a_watch_into_a_pipe_says_that_the_daemon_is_away_and_goes_on_when_it_is_back() -> None:
    with ExitStack() as stack:
        with StandInDaemon() as daemon:
            daemon.has(ready("cpu"))
            process = stack.enter_context(watching(daemon))
            assert [line_of(process)[:4] for _ in range(2)] == ["INST", "cpu "]
        assert process.stderr is not None
        assert process.stderr.readline().startswith("daemon unreachable: ")
        again = stack.enter_context(StandInDaemon(daemon.port))
        again.has(ready("cpu", phase="draining"))
        assert process.stderr.readline() == "the daemon is back\n"
        assert " draining " in line_of(process)


def test_a_watch_as_json_is_one_line_for_every_change(daemon: StandInDaemon) -> None:
    daemon.has(ready("cpu"))
    with watching(daemon, "--json") as process:
        assert json.loads(line_of(process))["instances"][0]["phase"] == "ready"
        daemon.has(instance("cpu"))
        assert json.loads(line_of(process))["instances"][0]["phase"] == "stopped"


def test_a_watch_follows_the_events(daemon: StandInDaemon) -> None:
    event = {"id": 7, "at": "2026-01-02T03:04:05.678Z", "instance": "cpu", "kind": "start_failed",
             "reason": "container_exited", "detail": "exit code 2"}  # fmt: skip
    daemon.answers[f"GET {API}/events"] = Answer(
        iter([": events follow\n\n", f"id: 7\ndata: {json.dumps(event)}\n\n"])
    )
    events = list(Daemon(Endpoint(daemon.url)).events())
    assert events[0] is None
    daemon.has(ready("cpu"))
    with begun(daemon.port) as watch:
        assert events[1] is not None
        watch.events.append(events[1])
        assert "03:04:05  cpu  start_failed  container_exited  exit code 2" in pictured(watch)


def test_a_watch_that_is_refused_ends(daemon: StandInDaemon) -> None:
    daemon.answers[f"GET {API}/live"] = Answer(error("unauthorized", "present the key"), 401)
    with watching(daemon) as process:
        assert process.wait(LIMIT_S) == 2
