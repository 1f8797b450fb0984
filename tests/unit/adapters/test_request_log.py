"""One line a request, as other programs and people read it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from manager.adapters.request_log import MOST_CHARACTERS, RequestLog, line
from manager.domain.roles import RequestKind
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
    "kind": (TEXT, True),
    "local_only": (FLAG, False),
    "load_ms": (MS, True),
    "fallback_from": (TEXT, True),
    "failed_attempts": (list, False),
    "shadow_target": (TEXT, True),
    "shadow_refused": (TEXT, True),
    "disagreement": (TEXT, True),
    "key": (TEXT, True),
    "requested_model": (TEXT, True),
    "task_type": (TEXT, True),
    "tier": (TEXT, True),
    "task_confidence": (MS, True),
    "task_reasoning": (TEXT, True),
    "routing_ms": (MS, True),
}
FULL = a_record(
    parent_span_id=CALLER,
    lane="fast",
    intent="summary",
    requested_target="gpu1",
    fallback=True,
    fallback_reason=Reason.INSTANCE_UNAVAILABLE,
    fallback_from="gpu1",
    key="alice",
    kind=RequestKind.GENERATE,
    start_ms=800.25,
    load_ms=150.5,
    shadow_target="gpu0",
    shadow_refused=Reason.MODEL_MISSING,
    disagreement="refused",
    requested_model="auto",
    task_type="chat",
    tier="fast",
    task_confidence=0.5,
    task_reasoning="it is short (2 characters)",
    routing_ms=0.2,
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


class Hostile:
    """A value that JSON has no form for and that has no text either."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("model", "\ud800", "\\ud800"),
        ("model", "a\udcffb", "a\\udcffb"),
        ("model", 5, 5),
        ("model", ["a", "\ud800"], "['a', '\\ud800']"),
        ("role", b"bytes", "b'bytes'"),
        ("project_id", {1: {2}}, "{1: {2}}"),
        ("input_tokens", 2**70, str(2**70)),
        ("output_tokens", float("inf"), None),
        ("lane", Hostile(), "<Hostile>"),
    ],
)
def test_a_record_with_any_value_is_one_line_and_keeps_its_other_fields(
    name: str, value: object, expected: object
) -> None:
    written = json.loads(line(a_record(**{name: value})))
    assert written == json.loads(line(a_record())) | {name: expected}


@pytest.mark.parametrize(
    "name", ["model", "lane", "project_id", "intent", "role", "requested_target", "path"]
)
@pytest.mark.parametrize("character", ["a", "é", "\U0001f600", "\ud800"])
def test_a_long_text_is_cut(name: str, character: str) -> None:
    written = line(a_record(**{name: character * 1_000_000}))
    assert len(json.loads(written)[name].replace("\\ud800", "s")) == MOST_CHARACTERS + 1
    assert len(written) < 16 * 1024
    at_the_bound = json.loads(line(a_record(**{name: "a" * MOST_CHARACTERS})))
    assert at_the_bound[name] == "a" * MOST_CHARACTERS


def test_each_record_is_one_line_in_order() -> None:
    lines: list[bytes] = []
    log = RequestLog(lines.append, readable=False)
    for number in range(3):
        log.write(a_record(attempts=number, model="\ud800" if number == 1 else "tiny"))
    assert [json.loads(one)["attempts"] for one in lines] == [0, 1, 2]


# Logging is set up for a process, so this has one of its own.
READABLE = """
from manager.cli.logs import configure_logging, silence
silence()
from manager.adapters.request_log import RequestLog
from manager.settings.model import LogSettings
from tests.support.records import a_record
log = RequestLog(configure_logging(LogSettings(format="console")).write, readable=True)
log.write(a_record(model="new\\nline\\x1b[31m", project_id="lab"))
log.write(a_record(outcome="refused", status=404, effective_target=None, ttfb_ms=None))
log.write(a_record(model="\\ud800", project_id="p" * 100_000))
"""


def test_people_read_what_matters_in_the_words_of_the_daemons_log() -> None:
    argv = [sys.executable, "-c", READABLE]
    text = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stderr
    first, second, third = text.splitlines()
    fields = ("path=/api/chat", "status=200", "outcome=ok", "effective_target=gpu0", "output_tokens=34",
              "project_id=lab", "request_id=0badc0ffee0000000001")  # fmt: skip
    assert "request" in first
    assert [first.index(field) for field in fields] == sorted(first.index(field) for field in fields)
    assert "\x1b" not in text
    assert "outcome=refused" in second
    assert not any(name in second for name in ("effective_target", "ttfb_ms"))
    assert "\\ud800" in third
    assert len(third) < 2 * MOST_CHARACTERS
