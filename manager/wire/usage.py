"""The end of an answer: the number of tokens, and whether it is the end at all."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from manager.wire.dialect import message_of
from manager.wire.routes import Dialect

if TYPE_CHECKING:
    from manager.wire.routes import Route

# So much of an answer's end is looked at: the last line of a stream, or the counts behind a long document.
TAIL_BYTES = 16 * 1024

# Within a JSON string the quotes would carry a backslash, so that nothing a model says is taken for these.
# What it calls a tool with is no string in the native dialect, but comes before these: the last one counts.
_COUNTS = {
    Dialect.NATIVE: ((b'"prompt_eval_count"',), (b'"eval_count"',)),
    Dialect.OPENAI: ((b'"prompt_tokens"', b'"input_tokens"'), (b'"completion_tokens"', b'"output_tokens"')),
    Dialect.ANTHROPIC: ((b'"input_tokens"',), (b'"output_tokens"',)),
}
# A longer one, a fraction or a negative one is no number of tokens.
_COUNT = re.compile(rb"\s*:\s*(\d{1,9})(?![\d.eE])")
_LOAD = b'"load_duration"'
# Eleven days at most: a longer one is no time of a load.
_NANOSECONDS = re.compile(rb"\s*:\s*(\d{1,15})(?![\d.eE])")
_DURATION = re.compile(rb'"total_duration"\s*:\s*\d')
_DONE = b'"done"'
_TRUE = re.compile(rb"\s*:\s*true")
_RESPONSE_DONE = re.compile(rb'"type"\s*:\s*"response\.(?:completed|incomplete|failed)"')
_MESSAGE_DONE = re.compile(rb'"type"\s*:\s*"message_stop"')


def token_counts(dialect: Dialect, tail: bytes | bytearray) -> tuple[int | None, int | None]:
    """Input and output tokens as the end of an answer tells them, None where it does not.

    Args:
        dialect: whose words these are.
        tail: the last bytes of the body, at least its last line or event.
    """
    inputs, outputs = _COUNTS[dialect]
    return _last(inputs, tail), _last(outputs, tail)


def load_ms(dialect: Dialect, tail: bytes | bytearray) -> float | None:
    """Return how long the server has loaded the model, as the end of its answer tells; None if it does not.

    Args:
        dialect: only the native one tells it.
        tail: as for `token_counts`.
    """
    at = tail.rfind(_LOAD) if dialect is Dialect.NATIVE else -1
    match = _NANOSECONDS.match(tail, at + len(_LOAD)) if at >= 0 else None
    return None if match is None else int(match[1]) / 1e6


def is_ended(route: Route, tail: bytes) -> bool:
    """Whether a stream of this route has come to the end that its dialect marks.

    Where the last line is longer than `tail`, the figures at its end tell that it is the last: of a native
    answer behind its long `context`, of a response behind the whole text once more.
    """
    if route.dialect is Dialect.NATIVE:
        at = tail.rfind(_DONE)
        if at >= 0:
            return _TRUE.match(tail, at + len(_DONE)) is not None
        return _DURATION.search(tail) is not None
    if route.dialect is Dialect.ANTHROPIC:
        return _MESSAGE_DONE.search(tail) is not None
    if route.path == "/v1/responses":
        return _RESPONSE_DONE.search(tail) is not None or _last((b'"output_tokens"',), tail) is not None
    at = tail.rfind(b"[DONE]")
    return at >= 0 and tail[tail.rfind(b"\n", 0, at) + 1 : at].strip() == b"data:"


def fault_of(route: Route, tail: bytes) -> str | None:
    """Return what is wrong with a stream whose last byte has come, in words; None where it has its end."""
    if is_ended(route, tail):
        return None
    return error_in(tail) or "the server ended the stream before its end"


def error_in(tail: bytes) -> str | None:
    """Return the error that a server tells in the last line of a stream, or None."""
    line = tail.rstrip(b"\r\n").rpartition(b"\n")[2]
    return message_of(line.removeprefix(b"data:").strip())


def _last(names: tuple[bytes, ...], tail: bytes | bytearray) -> int | None:
    for name in names:
        at = tail.rfind(name)
        if at >= 0 and (match := _COUNT.match(tail, at + len(name))) is not None:
            return int(match[1])
    return None
