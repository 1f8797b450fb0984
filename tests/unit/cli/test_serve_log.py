"""`serve` with a log that cannot be written: requests, `/healthz` and signals are not held up by it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import requests

from tests.support.daemon import wait_for
from tests.support.serving import LIMIT_S, serving

if TYPE_CHECKING:
    from pathlib import Path

# The pipe holds 64 KiB and the queue 10,000 lines.
MORE_THAN_FITS = 12_000
BATCH = 4_000


def requests_in(lines: list[bytes]) -> list[str]:
    """The request ids of the log, in its order."""
    return [entry["request_id"] for entry in map(json.loads, lines) if "request_id" in entry]


def test_a_stderr_that_nobody_reads_holds_up_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, stderr=subprocess.PIPE) as daemon:
        # The lines of the start are written before the log is full, so that only requests are dropped.
        events = f"{daemon.url}/api/runtime/compute/events?follow=false&last=10"
        wait_for(lambda: "engine_" in requests.get(events, timeout=LIMIT_S).text)
        # The history takes its time, and logs what it loses.
        for done in range(BATCH, MORE_THAN_FITS + 1, BATCH):
            daemon.chat(BATCH)
            wait_for(lambda done=done: daemon.requests_stored() == done, within_s=LIMIT_S)  # type: ignore[misc]
        assert daemon.is_alive()
        dropped = daemon.lines_dropped()
        assert dropped > 0
        # Once it is read, every line that was not counted as dropped is there, and a line says how many were.
        stderr = daemon.process.stderr
        assert stderr is not None
        lines = [stderr.readline() for _ in range(MORE_THAN_FITS - dropped)]
        while json.loads(lines[-1]).get("event") != "log_lines_dropped":
            lines.append(stderr.readline())
        assert json.loads(lines[-1])["lines"] == dropped
        assert len(requests_in(lines)) == MORE_THAN_FITS - dropped
        assert requests_in(lines) == sorted(requests_in(lines))
        daemon.chat(1)
        assert len(requests_in([stderr.readline()])) == 1
        assert daemon.end() == 0
        assert json.loads(stderr.readlines()[-1])["event"] == "ended"


def test_a_signal_ends_it_while_stderr_is_stuck(tmp_path: Path) -> None:
    with serving(tmp_path, stderr=subprocess.PIPE) as daemon:
        daemon.chat(2500)
        began_at = time.monotonic()
        assert daemon.end() == 0
        assert time.monotonic() - began_at < 10


@pytest.mark.parametrize("broken", ["full disk", "closed pipe"])
def test_a_stderr_that_fails_costs_counted_lines(tmp_path: Path, broken: str) -> None:
    with (
        open("/dev/full", "wb") as full,  # noqa: PTH123
        serving(tmp_path, stderr=full if broken == "full disk" else subprocess.PIPE) as daemon,
    ):
        if daemon.process.stderr is not None:
            daemon.process.stderr.close()
        daemon.chat(2500)
        wait_for(daemon.lines_dropped, lambda dropped: dropped >= 2500, within_s=LIMIT_S)
        assert daemon.is_alive()
        assert daemon.end() == 0


def test_no_model_name_costs_the_lines_of_others(tmp_path: Path) -> None:
    log = tmp_path / "log"
    names = (rb'"\ud800"', rb'"a\udfffb"', b"5", b'["a"]', b'{"a":1}', b'"%b"' % (b"m" * 10**6))
    with log.open("wb") as stderr, serving(tmp_path, stderr=stderr) as daemon:
        for name in names:
            for path in ("/api/show", "/api/chat", "/v1/chat/completions"):
                daemon.chat(20)
                requests.post(daemon.url + path, data=b'{"model":' + name + b"}", timeout=LIMIT_S)
        assert daemon.lines_dropped() == 0
        assert daemon.end() == 0
    lines = log.read_bytes().splitlines()
    assert len(requests_in(lines)) == len(names) * 3 * (20 + 1)
    assert max(map(len, lines)) < 16 * 1024


def test_a_defect_while_stderr_is_stuck_still_ends_the_process(tmp_path: Path) -> None:
    source = (
        "import logging, sys, manager.daemon, manager.cli\n"
        "async def serve(loaded, **_):\n"
        "    for _ in range(2000): logging.getLogger('lib').warning('x' * 200)\n"
        "    raise ValueError('it broke')\n"
        "manager.daemon.serve = serve\n"
        "sys.argv = ['ollama-manager', 'serve', '--config', sys.argv[1]]\n"
        "manager.cli.main()\n"
    )
    (tmp_path / "c.yaml").write_text("state: {dir: state}\n")
    argv = [sys.executable, "-c", source, str(tmp_path / "c.yaml")]
    with subprocess.Popen(argv, stderr=subprocess.PIPE) as process:
        try:
            assert process.wait(LIMIT_S) == 1
        finally:
            process.kill()
