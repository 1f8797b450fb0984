"""What the end of an answer says: how many tokens there were, and whether it is the end at all."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from manager.wire.routes import Dialect

if TYPE_CHECKING:
    from manager.wire.routes import Route

# So much of an answer's end is looked at: the last line of a stream, or the counts behind a long document.
TAIL_BYTES = 16 * 1024

# Within a JSON string the quotes would carry a backslash, so that nothing a model says is taken for these.
_COUNTS = {
    Dialect.NATIVE: ((b'"prompt_eval_count"',), (b'"eval_count"',)),
    Dialect.OPENAI: ((b'"prompt_tokens"', b'"input_tokens"'), (b'"completion_tokens"', b'"output_tokens"')),
    Dialect.ANTHROPIC: ((b'"input_tokens"',), (b'"output_tokens"',)),
}
_COUNT = re.compile(rb"\s*:\s*(\d{1,15})")
_DONE = re.compile(rb'"done"\s*:\s*true')
_RESPONSE_DONE = re.compile(rb'"type"\s*:\s*"response\.(?:completed|incomplete|failed)"')


def token_counts(dialect: Dialect, tail: bytes | bytearray) -> tuple[int | None, int | None]:
    """Input and output tokens as the end of an answer tells them, None where it does not.

    Args:
        dialect: whose words these are.
        tail: the last bytes of the body, at least its last line or event.
    """
    inputs, outputs = _COUNTS[dialect]
    return _last(inputs, tail), _last(outputs, tail)


def is_ended(route: Route, tail: bytes) -> bool:
    """Whether a stream of this route has come to the end that its dialect marks."""
    if route.dialect is Dialect.NATIVE:
        return _DONE.search(tail) is not None
    if route.dialect is Dialect.ANTHROPIC:
        return b"message_stop" in tail
    if route.path == "/v1/responses":
        return _RESPONSE_DONE.search(tail) is not None
    return b"[DONE]" in tail


def _last(names: tuple[bytes, ...], tail: bytes | bytearray) -> int | None:
    for name in names:
        at = tail.rfind(name)
        if at >= 0 and (match := _COUNT.match(tail, at + len(name))) is not None:
            return int(match[1])
    return None
