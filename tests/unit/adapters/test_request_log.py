"""One line a request, as other programs and people read it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from manager.adapters.request_log import RequestLog, line
from manager.errors import Reason
from tests.support.records import CALLER, SPAN, TRACE, a_record

TEXT, FLAG, COUNT, MS = str, bool, int, float
DOCUMENTED: dict[str, tuple[type, bool]] = {
    # name: its type, and whether it may be null
    "ts": (TEXT, False),
    "request_id": (TEXT, False),
    "trace_id": (TEXT, False),
    "project_id": (TEXT, False),
    "lane": (TEXT, True),
    "role": (TEXT, True),
    "model": (TEXT, True),
    "requested_target": (TEXT, True),
    "effective_target": (TEXT, True),
    "policy": (TEXT, True),
    "fallback": (FLAG, False),
    "fallback_reason": (TEXT, True),
    "attempts": (COUNT, False),
    "status": (COUNT, False),
    "outcome": (TEXT, False),
    "stream": (FLAG, False),
    "queue_ms": (MS, False),
    "start_ms": (MS, True),
    "ttfb_ms": (MS, True),
    "duration_ms": (MS, False),
    "input_tokens": (COUNT, True),
    "output_tokens": (COUNT, True),
    "cost_usd": (MS, False),
}
BEYOND: dict[str, tuple[type, bool]] = {
    "span_id": (TEXT, False),
    "parent_span_id": (TEXT, True),
    "sampled": (FLAG, False),
    "path": (TEXT, False),
    "intent": (TEXT, True),
    "provider": (TEXT, False),
    "endpoint": (TEXT, True),
}
FULL = a_record(
    parent_span_id=CALLER,
    lane="fast",
    intent="summary",
    requested_target="gpu1",
    fallback=True,
    fallback_reason=Reason.INSTANCE_UNAVAILABLE,
    start_ms=800.25,
)
BARE = a_record(
    **dict.fromkeys(name for name, (_, may_be_null) in (DOCUMENTED | BEYOND).items() if may_be_null)
)


def test_a_line_has_the_documented_keys_with_their_types() -> None:
    for record, whole in ((FULL, True), (BARE, False)):
        written = json.loads(line(record))
        assert set(written) == set(DOCUMENTED | BEYOND)
        for name, (kind, may_be_null) in (DOCUMENTED | BEYOND).items():
            expected = type(None) if may_be_null and not whole else kind
            assert type(written[name]) is expected, name


def test_a_line_says_what_the_record_says() -> None:
    written = json.loads(line(FULL))
    assert written["ts"] == "2026-03-01T12:00:00.250000Z"
    assert (written["trace_id"], written["span_id"], written["parent_span_id"]) == (TRACE, SPAN, CALLER)
    assert (written["fallback"], written["fallback_reason"]) == (True, "instance_unavailable")
    assert (written["provider"], written["endpoint"]) == ("local", "http://127.0.0.1:11500")
    assert (written["input_tokens"], written["output_tokens"], written["cost_usd"]) == (12, 34, 0.0)
    assert (written["ttfb_ms"], written["duration_ms"]) == (200.0, 1500.5)


def test_whatever_callers_say_a_record_is_one_line() -> None:
    for name in ("model", "lane", "project_id", "intent"):
        written = line(a_record(**{name: 'a"\n\r\u2028\x00{"outcome":"ok"}'}))
        assert written.count(b"\n") == 1
        assert written.endswith(b"}\n")
        assert json.loads(written)[name] == 'a"\n\r\u2028\x00{"outcome":"ok"}'


async def test_records_are_written_in_order_and_together(capfdbinary: Any) -> None:
    log = RequestLog(asyncio.get_running_loop(), readable=False)
    for number in range(3):
        log.write(a_record(attempts=number))
    assert not capfdbinary.readouterr().err
    log.flush()
    written = capfdbinary.readouterr().err.splitlines()
    assert [json.loads(one)["attempts"] for one in written] == [0, 1, 2]
    log.flush()
    assert not capfdbinary.readouterr().err


# Logging is set up for a process, so these have one of their own.
PREAMBLE = """
import asyncio
from manager.cli.logs import configure_logging, silence
silence()
from manager.adapters.request_log import RequestLog
from manager.settings.model import LogSettings
from tests.support.records import a_record
"""


def run(program: str, stderr: Path) -> str:
    with stderr.open("w") as sink:
        argv = [sys.executable, "-c", PREAMBLE + program]
        return subprocess.run(
            argv, check=False, stdout=subprocess.PIPE, stderr=sink, text=True, timeout=60
        ).stdout


def test_a_disk_that_is_full_costs_lines_and_nothing_else() -> None:
    program = """
async def main():
    log = RequestLog(asyncio.get_running_loop(), readable=False)
    for _ in range(50):
        for _ in range(100):
            log.write(a_record())
        log.flush()
    print("goes on")
asyncio.run(main())
"""
    assert run(program, Path("/dev/full")) == "goes on\n"


def test_people_read_what_matters_in_the_words_of_the_daemons_log(tmp_path: Path) -> None:
    program = """
configure_logging(LogSettings(format="console"))
async def main():
    log = RequestLog(asyncio.get_running_loop(), readable=True)
    log.write(a_record(model="new\\nline\\x1b[31m"))
    log.write(a_record(outcome="refused", status=404, effective_target=None, ttfb_ms=None))
    await asyncio.sleep(0.3)
asyncio.run(main())
"""
    run(program, tmp_path / "log")
    text = (tmp_path / "log").read_text()
    first, second = text.splitlines()
    for said in ("request", "outcome=ok", "status=200", "effective_target=gpu0", "output_tokens=34"):
        assert said in first
    assert "\x1b" not in text
    assert "outcome=refused" in second
    assert not any(name in second for name in ("effective_target", "ttfb_ms"))
