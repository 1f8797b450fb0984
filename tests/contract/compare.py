"""Compares an answer with the recording of a real Ollama's answer to the same request.

The same: status, content type, framing (Content-Length or chunked), the order of the parts of a stream and
its terminator, keys, types, and the values that are part of the protocol (`done_reason`, `object`, error
texts, …). Free to differ: words, numbers, times, ids, digests, how many pieces a text comes in, and how many
models there are.

Where a recording was trimmed only what is left can be held against an answer: `…trimmed` stands for any
value, and `…384 numbers in all` at the end of a list for a list of that many numbers.
"""

from __future__ import annotations

import http.client
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

RECORDINGS = Path(__file__).parent / "recordings"

TRIMMED = "…trimmed"
_TRIMMED_NUMBERS = re.compile(r"…(\d+) numbers in all")
_DIGEST = re.compile(r"[0-9a-f]{64}")

PROTOCOL_KEYS = frozenset(
    {"object", "type", "role", "done", "done_reason", "finish_reason", "stop_reason", "status", "error",
    "message",
     "code", "param", "format", "index", "owned_by", "system_fingerprint"}
)  # fmt: skip
"""Keys whose values are protocol, not content. Digests in them are not compared."""

COMPARED_HEADERS = ("Content-Type", "Allow", "Cache-Control")
"""`Connection` is not among them: it belongs to one hop, and a proxy rightly has its own."""

LISTS_OF_MODELS = frozenset({"/api/tags", "/api/ps", "/v1/models"})
"""Paths whose lists may have any length above zero, if the recorded one has entries."""

RACES = {
    "ps-after-unload": "made while the second model was being unloaded: it may be gone from the list",
}
"""Recordings of a moment that does not come back: their lists may be empty."""

FOREIGN_TEXTS = {
    "pull-unreachable": "pull model manifest: ",
    "pull-unreachable-nostream": "pull model manifest: ",
}
"""Recordings whose error text comes from the resolver of that machine: only this beginning is compared."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer with its framing still visible: headers as sent, body put together from its chunks."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class _Rules:
    free_lengths: bool = False
    may_be_empty: bool = False
    error_beginning: str | None = None


def load_recordings() -> list[dict[str, Any]]:
    """All recordings in the order in which they were made."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RECORDINGS.glob("*.json"))]


def ask(base_url: str, request: dict[str, Any], timeout_s: float = 60.0) -> Answer:
    """Send a recorded request. Raises http.client.IncompleteRead when the answer's framing ends too early."""
    url = urlsplit(base_url)
    connection = http.client.HTTPConnection(url.hostname or "", url.port or 80, timeout=timeout_s)
    body = request["body"]
    payload = body if isinstance(body, str) or body is None else json.dumps(body)
    try:
        connection.request(
            request["method"],
            url.path.rstrip("/") + request["path"],
            payload.encode() if payload is not None else None,
            {"Content-Type": "application/json"} if payload else {},
        )
        response = connection.getresponse()
        return Answer(
            response.status, {key.title(): value for key, value in response.getheaders()}, response.read()
        )
    finally:
        connection.close()


def replay(base_url: str) -> dict[str, Answer]:
    """Send every recorded request in order, as later ones build on earlier; answers by recording name."""
    return {recording["name"]: ask(base_url, recording["request"]) for recording in load_recordings()}


def differences(recording: dict[str, Any], answer: Answer) -> list[str]:
    """What is wrong with `answer`, one line each; nothing when it keeps to the contract."""
    name = recording["name"]
    rules = _Rules(
        free_lengths=recording["request"]["path"] in LISTS_OF_MODELS,
        may_be_empty=name in RACES,
        error_beginning=FOREIGN_TEXTS.get(name),
    )
    found = [*_head_differences(recording, answer, rules)]
    try:
        found += _body_differences(recording, answer.body, rules)
    except (ValueError, UnicodeDecodeError) as error:
        found.append(f"body: {error}: {answer.body[:200]!r}")
    return found


def _head_differences(recording: dict[str, Any], answer: Answer, rules: _Rules) -> list[str]:
    recorded = recording["headers"]
    found = [
        f"header {header}: {answer.headers.get(header)!r}, recorded {recorded.get(header)!r}"
        for header in COMPARED_HEADERS
        if answer.headers.get(header) != recorded.get(header)
    ]
    if answer.status != recording["status"]:
        found.append(f"status: {answer.status}, recorded {recording['status']}")
    framing, wanted = _framing(answer.headers), _framing(recorded)
    # A long list is sent in chunks, a short one is not: with other models the length is another.
    if framing != wanted and not rules.free_lengths:
        found.append(f"framing: {framing}, recorded {wanted}")
    if recording["request"]["method"] != "HEAD" and answer.headers.get("Content-Length", "") not in (
        "",
        str(len(answer.body)),
    ):
        found.append(f"Content-Length: {answer.headers['Content-Length']} for {len(answer.body)} bytes")
    return found


def _framing(headers: dict[str, str]) -> str:
    if headers.get("Transfer-Encoding", "").lower() == "chunked":
        return "chunked" if "Content-Length" not in headers else "chunked with a Content-Length"
    return "Content-Length" if "Content-Length" in headers else "neither"


def _body_differences(recording: dict[str, Any], body: bytes, rules: _Rules) -> list[str]:
    text = body.decode()
    if "text" in recording:
        return [] if text == recording["text"] else [f"body: {text!r}, recorded {recording['text']!r}"]
    if "json" in recording:
        return _value_differences("$", recording["json"], json.loads(text), rules)
    if "lines" in recording:
        if not text.endswith("\n"):
            return [f"the last line has no end: {text[-80:]!r}"]
        lines = [json.loads(line) for line in text[:-1].split("\n")]
        return _stream_differences(recording["lines"], lines, rules)
    if not text.endswith("\n\n"):
        return [f"the last event has no blank line after it: {text[-80:]!r}"]
    recorded_events = [_parsed_event(event) for event in recording["sse"] if event]
    return _stream_differences(
        recorded_events, [_parsed_event(event) for event in text[:-2].split("\n\n")], rules
    )


def _parsed_event(event: str) -> dict[str, Any]:
    """An SSE event as its fields, with the data parsed unless it is the terminator `[DONE]`."""
    parsed: dict[str, Any] = {}
    for line in event.split("\n"):
        field, colon, value = line.partition(": ")
        if not colon or field in parsed:
            raise ValueError(f"not a field of an event: {line!r}")
        parsed[field] = value if field != "data" or value == "[DONE]" else json.loads(value)
    # The event's name is protocol; `type` is the key under which that is known.
    return {"type" if field == "event" else field: value for field, value in parsed.items()}


def _stream_differences(recorded: list[Any], actual: list[Any], rules: _Rules) -> list[str]:
    """Both must be the same sequence of runs, a run being one or more parts of the same shape."""
    runs: list[Any] = []
    for part in recorded:
        if not runs or _value_differences("", runs[-1], part, rules):
            runs.append(part)
    position = 0
    for number, run in enumerate(runs):
        if position == len(actual):
            missing = json.dumps(run, ensure_ascii=False)
            return [f"the stream ends after {position} parts; missing: {missing:.200}"]
        first = _value_differences(f"part {position}", run, actual[position], rules)
        if first:
            return [f"part {position} is not what follows as run {number}:", *first]
        while position < len(actual) and not _value_differences("", run, actual[position], rules):
            position += 1
    parts = enumerate(actual[position:], position)
    return [f"part {index} is more than was recorded: {part!r}" for index, part in parts]


def _value_differences(path: str, recorded: Any, actual: Any, rules: _Rules, key: str = "") -> list[str]:
    # Where the real one wrote a fraction a whole number will do; where it wrote none a fraction breaks some.
    whole_for_fraction = isinstance(recorded, float) and _kind(actual) == "integer"
    if recorded == TRIMMED or whole_for_fraction:
        return []
    if _kind(recorded) != _kind(actual):
        return [f"{path}: {_kind(actual)} {actual!r:.80}, recorded {_kind(recorded)} {recorded!r:.80}"]
    if isinstance(recorded, dict):
        return _object_differences(path, recorded, actual, rules)
    if isinstance(recorded, list):
        return _list_differences(path, recorded, actual, rules)
    if key == "error" and rules.error_beginning is not None:
        right = actual.startswith(rules.error_beginning)
    elif key in PROTOCOL_KEYS or "[DONE]" in (actual, recorded) or path == "$.model":
        right = _without_digests(recorded) == _without_digests(actual)
    else:
        right = True
    return [] if right else [f"{path}: {actual!r}, recorded {recorded!r}"]


def _object_differences(
    path: str, recorded: dict[str, Any], actual: dict[str, Any], rules: _Rules
) -> list[str]:
    found = [f"{path}.{key}: missing" for key in recorded.keys() - actual.keys()]
    found += [f"{path}.{key}: not in the recording" for key in actual.keys() - recorded.keys()]
    for key in recorded.keys() & actual.keys():
        found += _value_differences(f"{path}.{key}", recorded[key], actual[key], rules, key)
    return sorted(found)


def _list_differences(path: str, recorded: list[Any], actual: list[Any], rules: _Rules) -> list[str]:
    trimmed = _TRIMMED_NUMBERS.fullmatch(str(recorded[-1])) if recorded else None
    if trimmed:
        wrong = [item for item in actual if _kind(item) not in ("float", "integer")]
        if wrong or len(actual) != int(trimmed[1]):
            return [f"{path}: {len(actual)} items, {len(wrong)} no numbers, recorded {recorded[-1]}"]
        return []
    if not rules.free_lengths:
        if len(recorded) != len(actual):
            return [f"{path}: {len(actual)} items, recorded {len(recorded)}"]
        pairs = enumerate(zip(recorded, actual, strict=True))
        return [
            line
            for index, (one, other) in pairs
            for line in _value_differences(f"{path}[{index}]", one, other, rules)
        ]
    if bool(recorded) != bool(actual) and not rules.may_be_empty:
        return [f"{path}: {len(actual)} items, recorded {len(recorded)}"]
    found: list[str] = []
    for index, item in enumerate(actual):
        tries = [_value_differences(f"{path}[{index}]", one, item, rules) for one in recorded]
        nearest: list[str] = min(tries, key=len, default=[])
        found += nearest
    return found


def _kind(value: Any) -> str:
    kinds = {dict: "object", list: "array", str: "text", bool: "boolean", int: "integer", float: "float"}
    return kinds.get(type(value), "null")


def _without_digests(value: Any) -> Any:
    return _DIGEST.sub("<digest>", value) if isinstance(value, str) else value
