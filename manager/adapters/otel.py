"""Requests as OpenTelemetry spans, over OTLP/HTTP to where OpenTelemetry's own variables say.

Names follow the semantic conventions for generative AI as of version 1.44 (in development,
https://github.com/open-telemetry/semantic-conventions-genai), what they have no name for is below
`ollama_manager.`. Only what is installed with the extra `otel` is imported here.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from typing import TYPE_CHECKING

import structlog
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from manager import __version__
from manager.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.util.types import AttributeValue

    from manager.domain.record import RequestRecord

_log = structlog.get_logger("traces")

_EVERY_S = 0.2
# What is taken in between: fifty times the requests that one process can answer in that time.
_MOST_WAITING = 50_000
# How long a collector that does not answer may hold up the end of the daemon.
_GOODBYE_S = 5.0
_SERVER_ERROR = 500
_OUR_FAULT = ("upstream_error", "timeout", "cut")
_OPERATIONS: Mapping[str, str] = {
    "/api/chat": "chat",
    "/api/generate": "text_completion",
    "/api/embed": "embeddings",
    "/api/embeddings": "embeddings",
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/embeddings": "embeddings",
}


class Spans:
    """Makes a span of each record, in a thread of its own. `close` sends what is left.

    Args:
        exporter: takes the spans; None is OTLP over HTTP.

    Raises:
        ConfigurationError: one of OpenTelemetry's variables has a value that it cannot use.
    """

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        self._ids = _GivenIds()
        try:
            self._exporter = _Watched(exporter or OTLPSpanExporter())
            self._provider = TracerProvider(
                resource=_resource(), id_generator=self._ids, shutdown_on_exit=False
            )
            self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        except ValueError as error:
            raise ConfigurationError(f"gateway.tracing: OpenTelemetry cannot be set up: {error}") from error
        self._tracer = self._provider.get_tracer("ollama-endpoint-manager", __version__)
        self._waiting: deque[RequestRecord] = deque(maxlen=_MOST_WAITING)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="traces", daemon=True)
        self._thread.start()

    def samples(self, trace_id: str) -> bool:
        """Whether a trace that begins here is sampled, as OTEL_TRACES_SAMPLER says."""
        verdict = self._provider.sampler.should_sample(None, int(trace_id, 16), "").decision
        return verdict is Decision.RECORD_AND_SAMPLE

    def write(self, record: RequestRecord) -> None:
        """Take a record whose trace is sampled."""
        self._waiting.append(record)

    async def close(self) -> None:
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._ended.set()
        self._thread.join()
        goodbye = threading.Thread(target=self._provider.shutdown, name="last traces", daemon=True)
        goodbye.start()
        goodbye.join(_GOODBYE_S)
        self._exporter.shutdown()

    def _work(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self._make_spans()
        self._make_spans()

    def _make_spans(self) -> None:
        while self._waiting:
            self._make_span(self._waiting.popleft())

    def _make_span(self, record: RequestRecord) -> None:
        operation = _OPERATIONS.get(record.path)
        self._ids.trace_id = int(record.trace_id, 16)
        self._ids.span_id = int(record.span_id, 16)
        began_ns = round(record.ts.timestamp() * 1e6) * 1000
        span = self._tracer.start_span(
            f"{operation or record.path} {record.model or ''}".rstrip(),
            context=_parent(record),
            kind=SpanKind.SERVER,
            attributes=attributes(record, operation),
            start_time=began_ns,
        )
        if record.outcome in _OUR_FAULT or record.status >= _SERVER_ERROR:
            span.set_status(Status(StatusCode.ERROR))
        span.end(began_ns + round(record.duration_ms * 1e6))


def attributes(record: RequestRecord, operation: str | None) -> dict[str, AttributeValue]:
    """The attributes of a span; those that are not known are left out.

    Args:
        record: the request.
        operation: what the conventions call it; None where it is nothing that a model does.
    """
    answered = operation is not None and record.outcome == "ok"
    first_s = record.ttfb_ms / 1000 if record.stream and record.ttfb_ms is not None else None
    # A reason beside a fallback is that of the fallback, not of what went wrong after it.
    failed = record.fallback_reason if not record.fallback else None
    said = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "ollama",
        "gen_ai.request.model": record.model,
        "gen_ai.request.stream": record.stream if operation is not None else None,
        "gen_ai.response.model": record.model if answered else None,
        "gen_ai.response.time_to_first_chunk": first_s,
        "gen_ai.usage.input_tokens": record.input_tokens,
        "gen_ai.usage.output_tokens": record.output_tokens,
        "error.type": None if record.outcome == "ok" else (failed or record.outcome),
        "http.route": record.path,
        "http.response.status_code": record.status or None,
        "ollama_manager.request_id": record.request_id,
        "ollama_manager.project_id": record.project_id,
        "ollama_manager.lane": record.lane,
        "ollama_manager.intent": record.intent,
        "ollama_manager.role": record.role,
        "ollama_manager.policy": record.policy,
        "ollama_manager.requested_target": record.requested_target,
        "ollama_manager.instance": record.effective_target,
        "ollama_manager.provider": record.provider,
        "ollama_manager.endpoint": record.endpoint,
        "ollama_manager.outcome": record.outcome,
        "ollama_manager.fallback": record.fallback,
        "ollama_manager.fallback_reason": record.fallback_reason,
        "ollama_manager.attempts": record.attempts,
        "ollama_manager.queue_ms": record.queue_ms,
        "ollama_manager.start_ms": record.start_ms,
        "ollama_manager.cost_usd": record.cost_usd,
    }
    return {
        name: str(value) if isinstance(value, str) else value
        for name, value in said.items()
        if value is not None
    }


class _GivenIds(IdGenerator):
    """Has the next span carry the ids that the request had on its way."""

    trace_id = 0
    span_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id

    def generate_span_id(self) -> int:
        return self.span_id


class _Watched(SpanExporter):
    """Tells when spans begin to be lost and when they no longer are, instead of every time."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._losing = False
        self._is_shut = False
        logging.getLogger(OTLPSpanExporter.__module__).addFilter(self._is_news)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        losing = result is not SpanExportResult.SUCCESS
        if losing and not self._losing:
            _log.warning("traces_lost", detail="the collector does not take spans")
        elif self._losing and not losing:
            _log.info("traces_taken", detail="the collector takes spans again")
        self._losing = losing
        return result

    def shutdown(self) -> None:
        if not self._is_shut:
            self._is_shut = True
            self._exporter.shutdown()
            logging.getLogger(OTLPSpanExporter.__module__).removeFilter(self._is_news)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)

    def _is_news(self, _entry: logging.LogRecord) -> bool:
        return not self._losing


def _resource() -> Resource:
    """The sender of spans, by OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES, or else the program's name."""
    told = Resource.create({SERVICE_VERSION: __version__})
    if str(told.attributes[SERVICE_NAME]).startswith("unknown_service"):
        return told.merge(Resource({SERVICE_NAME: "ollama-manager"}))
    return told


def _parent(record: RequestRecord) -> Context:
    """The context that holds the caller's span; an empty one where the trace begins here."""
    if record.parent_span_id is None:
        return Context()
    caller = SpanContext(
        int(record.trace_id, 16),
        int(record.parent_span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
    )
    return set_span_in_context(NonRecordingSpan(caller), Context())
