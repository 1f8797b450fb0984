"""One request of a benchmark, and what is measured of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from manager.domain.benchmarks import Sample, quality
from manager.errors import ManagerError, NotAnsweredError
from manager.services.requests import Origin
from manager.services.routing.whole import Asking
from manager.wire.routes import INFERENCE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from manager.domain.benchmarks import Prompt, Target, Workload
    from manager.services.routing.whole import Whole, WholeRequests

BENCHMARKS_PATH = "/api/v1/benchmarks"
_CHAT = INFERENCE[b"/api/chat"]
# No server was asked, and a later request may be answered.
_TRANSIENT = frozenset({"overloaded", "queue_full", "rate_limited"})
_LONGEST_ERROR = 500
_NS_A_S = 1e9


class NoSlotError(Exception):
    """No slot is free. `message` says where."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


async def warm_up(whole: WholeRequests, target: Target, project: str) -> None:
    """Have a model loaded, so that the time of its load is in no measurement. A failure is no error.

    Raises:
        NoSlotError: no slot is free.
    """
    messages = [{"role": "user", "content": "Hi"}]
    try:
        await _ask(whole, target, project, messages, {"num_predict": 1})
    except ManagerError as error:
        _refuse_transient(error)


async def measure(
    whole: WholeRequests, workload: Workload, prompt: Prompt, target: Target, project: str
) -> Sample:
    """Ask one prompt, and measure its answer.

    Raises:
        NoSlotError: no slot is free.
    """
    messages = [{"role": "user", "content": prompt.text}]
    if prompt.system is not None:
        messages.insert(0, {"role": "system", "content": prompt.system})
    options = {"temperature": workload.temperature, "num_predict": workload.max_tokens}
    place = (workload.name, prompt.name, *target)
    try:
        answer = await _ask(whole, target, project, messages, options)
    except ManagerError as error:
        _refuse_transient(error)
        return Sample(*place, ok=False, error=_clean(error.message))
    record = answer.record
    if record.effective_target != target.instance:
        message = f"{record.effective_target} has answered in place of {target.instance}"
        return Sample(*place, ok=False, error=message)
    text, last = _read(answer.content)
    # Both are spent before the request is sent.
    sent_s = answer.began_s + ((record.queue_ms or 0.0) + (record.start_ms or 0.0)) / 1000
    return Sample(
        *place,
        ok=True,
        ttft_ms=max(0.0, answer.first_s - sent_s) * 1000,
        duration_ms=max(0.0, answer.ended_s - sent_s) * 1000,
        tokens_per_s=_speed(answer, last),
        output_tokens=record.output_tokens,
        quality=quality(prompt.checks, text),
    )


# --- helpers, in call order ---


async def _ask(
    whole: WholeRequests,
    target: Target,
    project: str,
    messages: list[dict[str, str]],
    options: Mapping[str, Any],
) -> Whole:
    fields = {"model": target.model, "messages": messages, "stream": True, "options": options}
    origin = Origin(target.instance, None, project, None, local_only=True, trace=None, fault=None)
    return await whole.ask(_CHAT, fields, Asking(origin, None, BENCHMARKS_PATH, is_background=True))


def _clean(message: str) -> str:
    """Return a message of a server within its bound; half a character would be in no answer of the API."""
    return message[:_LONGEST_ERROR].encode("utf-8", "backslashreplace").decode()


def _refuse_transient(error: ManagerError) -> None:
    if isinstance(error, NotAnsweredError) and error.refused in _TRANSIENT:
        raise NoSlotError(error.message) from None


def _read(content: bytes) -> tuple[str, Mapping[str, Any]]:
    """Return the text of a stream of `/api/chat`, and its last line."""
    pieces: list[str] = []
    last: Mapping[str, Any] = {}
    for last in _lines(content):
        message = last.get("message")
        piece = message.get("content") if isinstance(message, dict) else None
        if isinstance(piece, str):
            pieces.append(piece)
    return "".join(pieces), last


def _lines(content: bytes) -> Iterator[Mapping[str, Any]]:
    for line in content.splitlines():
        try:
            value = orjson.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def _speed(answer: Whole, last: Mapping[str, Any]) -> float | None:
    """Return output tokens a second: by the server's own time, else by the time behind the first piece."""
    tokens, spent_ns = answer.record.output_tokens, last.get("eval_duration")
    if not tokens:
        return None
    if isinstance(spent_ns, int) and not isinstance(spent_ns, bool) and spent_ns > 0:
        return tokens / (spent_ns / _NS_A_S)
    spent_s = answer.ended_s - answer.first_s
    return tokens / spent_s if spent_s > 0 else None
