"""Requests to a server that speaks the client's dialect: the bytes pass, but for what paid answers need.

A paid stream has to say its tokens: the server is asked for them, and the event with them is taken out again
where the client has not asked for it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import orjson

from manager.wire.body import dumped
from manager.wire.dialect import message_of
from manager.wire.errors import BadBodyError
from manager.wire.json_values import NO_JSON
from manager.wire.priced import priced
from manager.wire.rewriting import body_for, rewriting
from manager.wire.routes import Dialect
from manager.wire.steps import run
from manager.wire.translate.hub import Usage
from manager.wire.translate.openai_answer import usage_in
from manager.wire.usage import token_counts
from manager.wire.values import changed_values

if TYPE_CHECKING:
    from manager.domain.roles import BodyChanges
    from manager.wire.body import InferenceBody
    from manager.wire.routes import Route
    from manager.wire.translate import Traits

_OK = 200
# An event with tokens alone is short. A longer one is no such event, and passes.
_MOST_EVENT_BYTES = 16 * 1024
# Anthropic counts these beside the others.
_CACHED = re.compile(rb'"cache_(?:read|creation)_input_tokens"\s*:\s*(\d{1,9})(?![\d.eE])')
# A longer event is no longer held, whatever it has in it.
_MOST_HELD_BYTES = 1024 * 1024


class Passing:
    """One request whose bytes pass, and its answer. Has the interface of `wire.translate.Translation`."""

    usage: Usage | None = None
    fault: str | None = None

    def __init__(self, route: Route, traits: Traits) -> None:
        self._route = route
        self._traits = traits
        self.path = route.path
        self._hides_usage = False
        self._event = bytearray()
        self._start = self._tail = b""

    def request(
        self,
        body: InferenceBody,
        model: str,
        changes: BodyChanges,
        *,
        max_tokens: int | None = None,
        wants_usage: bool = False,
    ) -> bytes:
        """Return the body for the server, as `Translation.request`."""
        if max_tokens is not None and self._route.kind == "generate":
            return self._paid(body, model, changes, max_tokens, wants_usage=wants_usage)
        if body.is_small:
            return body_for(body, self._route, model, changes)
        return b"".join(run(rewriting(body, self._route, model, changes)))

    def _paid(
        self, body: InferenceBody, model: str, changes: BodyChanges, most: int, *, wants_usage: bool
    ) -> bytes:
        """Return a body that costs what was reserved at most. It is written anew: no field is in it twice."""
        try:
            values = changed_values(body, self._route, model, changes)
            values = priced(self._route.path, values, most, self._limit_field)
            if wants_usage and body.stream and self._route.dialect is Dialect.OPENAI:
                given = values.get("stream_options")
                given = given if isinstance(given, dict) else {}
                self._hides_usage = given.get("include_usage") is not True
                values["stream_options"] = {**given, "include_usage": True}
            return dumped({**values, "model": model})
        except RecursionError:
            raise BadBodyError(NO_JSON) from None

    def head(self, status: int) -> tuple[int, bytes]:
        """Return the status, and no content type: that of the server holds."""
        return status, b""

    def feed(self, data: bytes) -> bytes:
        """Return what the client gets of the next piece."""
        if not self._hides_usage:
            if len(self._start) < _MOST_EVENT_BYTES:
                self._start += data[:_MOST_EVENT_BYTES]
            self._tail = (self._tail + data)[-_MOST_EVENT_BYTES:]
            return data
        self._event += data
        whole, rest = _cut(self._event)
        self._event = bytearray(rest)
        written = b"".join(event for event in whole if not self._is_usage(event))
        held = len(self._event)
        if held > _MOST_HELD_BYTES or (held > _MOST_EVENT_BYTES and b'"usage"' not in self._event):
            written += bytes(self._event)
            self._event.clear()
        return written

    def end(self) -> bytes:
        """Return the last bytes, once the server's last byte has come."""
        rest = bytes(self._event)
        self._event.clear()
        if self.usage is None:
            inputs, outputs = token_counts(self._route.dialect, self._tail)
            if inputs is None:  # Anthropic says them in its first event
                inputs, _ = token_counts(self._route.dialect, self._start)
            if inputs is not None or outputs is not None:
                cached = sum(int(found[1]) for found in _CACHED.finditer(self._start))
                self.usage = Usage((inputs or 0) + cached, outputs or 0)
        return b"" if self._hides_usage and self._is_usage(rest) else rest

    def error(self, status: int, body: bytes) -> str:
        """Return the message of an answer with an error."""
        return message_of(body) or f"the server answered with status {status}"

    @property
    def _limit_field(self) -> str:
        if self._route.path == "/v1/chat/completions":
            return self._traits.max_tokens_field
        return "max_tokens"

    def _is_usage(self, event: bytes) -> bool:
        """Take in an event; return whether it has the tokens and nothing else."""
        if b'"usage"' not in event:
            return False
        data = b"".join(
            line[5:].strip() for line in event.replace(b"\r", b"").split(b"\n") if line[:5] == b"data:"
        )
        try:
            said = orjson.loads(data)
        except orjson.JSONDecodeError:
            return False
        usage = said.get("usage") if isinstance(said, dict) else None
        if not isinstance(usage, dict):
            return False
        self.usage = usage_in(usage) or self.usage
        choices = said.get("choices")
        return isinstance(choices, list) and not choices


def _cut(events: bytearray) -> tuple[list[bytes], bytes]:
    """Return the whole events, each with the empty line behind it, and the rest."""
    whole: list[bytes] = []
    start = 0
    while True:
        ends = [(at + len(end)) for end in (b"\n\n", b"\r\n\r\n") if (at := events.find(end, start)) >= 0]
        if not ends:
            return whole, bytes(events[start:])
        whole.append(bytes(events[start : min(ends)]))
        start = min(ends)
