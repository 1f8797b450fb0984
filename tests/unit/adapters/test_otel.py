"""Spans as they reach an exporter, and as a collector gets them."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

import manager.adapters.otel
from manager.adapters.otel import Spans
from manager.errors import ConfigurationError, Reason
from tests.support.records import CALLER, SPAN, TRACE, a_record

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from opentelemetry.sdk.trace import ReadableSpan

    from manager.domain.record import RequestRecord


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


async def made(*records: RequestRecord) -> tuple[ReadableSpan, ...]:
    exporter = InMemorySpanExporter()
    spans = Spans(exporter)
    for record in records:
        spans.write(record)
    await spans.close()
    return exporter.get_finished_spans()


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def test_a_span_has_the_ids_and_times_of_its_record() -> None:
    record = a_record(parent_span_id=CALLER)
    root = a_record(trace_id="f" * 32, span_id="e" * 16)
    span, other = await made(record, root)
    assert span.context is not None
    assert (span.context.trace_id, span.context.span_id) == (int(TRACE, 16), int(SPAN, 16))
    assert span.parent is not None
    assert (span.parent.trace_id, span.parent.span_id) == (int(TRACE, 16), int(CALLER, 16))
    assert (span.parent.is_remote, span.kind) == (True, SpanKind.SERVER)
    began_ns = int(record.ts.timestamp() * 1000) * 1_000_000
    assert (span.start_time, span.end_time) == (began_ns, began_ns + 1_500_500_000)
    assert other.context is not None
    assert (other.context.trace_id, other.context.span_id) == (int("f" * 32, 16), int("e" * 16, 16))
    assert other.parent is None


async def test_a_span_says_what_the_conventions_ask_for_and_what_is_ours() -> None:
    (span,) = await made(
        a_record(
            lane="fast",
            intent="summary",
            requested_target="gpu1",
            fallback=True,
            fallback_reason=Reason.INSTANCE_UNAVAILABLE,
            start_ms=800.0,
            attempts=2,
        )
    )
    assert (span.name, span.status.status_code) == ("chat qwen3:8b", StatusCode.UNSET)
    assert attributes(span) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "ollama",
        "gen_ai.request.model": "qwen3:8b",
        "gen_ai.request.stream": True,
        "gen_ai.response.model": "qwen3:8b",
        "gen_ai.response.time_to_first_chunk": 0.2,
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 34,
        "http.route": "/api/chat",
        "http.response.status_code": 200,
        "ollama_manager.request_id": "0badc0ffee0000000001",
        "ollama_manager.project_id": "default",
        "ollama_manager.lane": "fast",
        "ollama_manager.intent": "summary",
        "ollama_manager.role": "thinking",
        "ollama_manager.policy": "auto",
        "ollama_manager.requested_target": "gpu1",
        "ollama_manager.instance": "gpu0",
        "ollama_manager.provider": "local",
        "ollama_manager.endpoint": "http://127.0.0.1:11500",
        "ollama_manager.outcome": "ok",
        "ollama_manager.fallback": True,
        "ollama_manager.fallback_reason": "instance_unavailable",
        "ollama_manager.attempts": 2,
        "ollama_manager.queue_ms": 1.5,
        "ollama_manager.start_ms": 800.0,
        "ollama_manager.cost_usd": 0.0,
    }
    resource = span.resource.attributes
    assert resource["service.name"] == "ollama-manager"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/api/generate", "text_completion qwen3:8b"),
        ("/v1/completions", "text_completion qwen3:8b"),
        ("/v1/chat/completions", "chat qwen3:8b"),
        ("/v1/messages", "chat qwen3:8b"),
        ("/v1/responses", "chat qwen3:8b"),
        ("/api/embed", "embeddings qwen3:8b"),
        ("/v1/embeddings", "embeddings qwen3:8b"),
        ("/api/pull", "/api/pull qwen3:8b"),
    ],
)
async def test_a_span_is_named_after_what_was_done_with_which_model(path: str, name: str) -> None:
    (span,) = await made(a_record(path=path))
    assert span.name == name
    operation = attributes(span).get("gen_ai.operation.name")
    assert operation == (None if path == "/api/pull" else name.partition(" ")[0])


@pytest.mark.parametrize(
    ("values", "error_type", "status"),
    [
        ({"outcome": "client_error", "status": 400}, "client_error", StatusCode.UNSET),
        ({"outcome": "client_gone"}, "client_gone", StatusCode.UNSET),
        (
            {"outcome": "refused", "status": 404, "fallback_reason": Reason.MODEL_MISSING},
            "model_missing",
            StatusCode.UNSET,
        ),
        (
            {"outcome": "refused", "status": 503, "fallback_reason": Reason.POLICY},
            "policy",
            StatusCode.ERROR,
        ),
        ({"outcome": "upstream_error", "status": 200}, "upstream_error", StatusCode.ERROR),
        (
            {"outcome": "upstream_error", "fallback": True, "fallback_reason": Reason.START_FAILED},
            "upstream_error",
            StatusCode.ERROR,
        ),
        (
            {"outcome": "timeout", "status": 504, "fallback_reason": Reason.ATTEMPT_TIMEOUT},
            "attempt_timeout",
            StatusCode.ERROR,
        ),
        ({"outcome": "cut", "status": 503}, "cut", StatusCode.ERROR),
    ],
)
async def test_what_did_not_end_well_says_why(
    values: dict[str, Any], error_type: str, status: StatusCode
) -> None:
    (span,) = await made(a_record(**values))
    assert (attributes(span)["error.type"], span.status.status_code) == (error_type, status)
    assert "gen_ai.response.model" not in attributes(span)


async def test_what_is_not_known_is_left_out() -> None:
    unknown = dict.fromkeys(
        (
            "role",
            "model",
            "effective_target",
            "endpoint",
            "policy",
            "ttfb_ms",
            "input_tokens",
            "output_tokens",
        )
    )
    (span,) = await made(a_record(outcome="client_error", status=0, **unknown))
    assert span.name == "chat"
    said = attributes(span)
    assert None not in said.values()
    assert not {"gen_ai.request.model", "gen_ai.usage.input_tokens", "http.response.status_code"} & set(said)


async def test_the_service_is_called_what_the_variables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "gateway-2")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=lab")
    (span,) = await made(a_record())
    resource = span.resource.attributes
    assert (resource["service.name"], resource["deployment.environment.name"]) == ("gateway-2", "lab")


async def test_a_trace_that_begins_here_is_sampled_as_the_variables_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def share() -> float:
        spans = Spans(InMemorySpanExporter())
        try:
            return sum(spans.samples(f"{number << 54:032x}") for number in range(1024)) / 1024
        finally:
            await spans.close()

    assert await share() == 1
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.25")
    assert await share() == 0.25
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    assert await share() == 0


async def test_more_records_than_one_batch_holds_all_arrive() -> None:
    exporter = InMemorySpanExporter()
    spans = Spans(exporter)
    for number in range(1500):
        spans.write(a_record(span_id=f"{number + 1:016x}"))
        if number % 300 == 0:
            await asyncio.sleep(0.05)
    await spans.close()
    seen = {span.context.span_id for span in exporter.get_finished_spans() if span.context}
    assert seen == set(range(1, 1501))


class Collector:
    """Takes OTLP over HTTP, or answers with `status`."""

    def __init__(self) -> None:
        self.status = 200
        self.requests: list[tuple[str, dict[str, str], ExportTraceServiceRequest]] = []
        self.port = 0

    @property
    def spans(self) -> list[Any]:
        return [
            span
            for _, _, request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Collector]:
        server = await asyncio.start_server(self._talk, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                first, *lines = head.strip().split("\r\n")
                headers = {
                    name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)
                }
                body = await reader.readexactly(int(headers["content-length"]))
                if self.status == 200:
                    request = ExportTraceServiceRequest.FromString(body)
                    self.requests.append((first, headers, request))
                writer.write(f"HTTP/1.1 {self.status} X\r\nContent-Length: 0\r\n\r\n".encode())
                await writer.drain()
        writer.close()


async def test_a_collector_gets_spans_over_http_where_the_variables_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Collector().serving() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-team=models")
        spans = Spans()
        spans.write(a_record(parent_span_id=CALLER))
        await spans.close()
        ((first, headers, request),) = collector.requests
        assert first == "POST /v1/traces HTTP/1.1"
        assert (headers["content-type"], headers["x-team"]) == ("application/x-protobuf", "models")
        (span,) = collector.spans
        assert (span.name, span.trace_id.hex(), span.span_id.hex()) == ("chat qwen3:8b", TRACE, SPAN)
        assert (span.parent_span_id.hex(), span.kind) == (CALLER, span.SPAN_KIND_SERVER)
        assert span.end_time_unix_nano - span.start_time_unix_nano == 1_500_500_000
        said = {one.key: one.value for one in span.attributes}
        assert said["gen_ai.usage.output_tokens"].int_value == 34
        assert said["ollama_manager.instance"].string_value == "gpu0"
        scope = request.resource_spans[0].scope_spans[0].scope
        assert scope.name == "ollama-endpoint-manager"


async def test_a_collector_that_is_away_or_silent_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager.adapters.otel, "_GOODBYE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        for port in (silent.getsockname()[1], closed.getsockname()[1]):
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
            spans = Spans()
            began_at = monotonic()
            for _ in range(3000):
                spans.write(a_record())
            assert monotonic() - began_at < 3  # an export alone is waited for 10 s
            await spans.close()
            assert monotonic() - began_at < 4


def test_the_log_says_once_that_spans_are_lost_and_once_that_they_no_longer_are() -> None:
    program = """
import asyncio
from manager.cli.logs import configure_logging, silence
silence()
from manager.adapters.otel import Spans
from manager.settings.model import LogSettings
from tests.support.records import a_record
from tests.unit.adapters.test_otel import Collector
configure_logging(LogSettings(format="json"))
async def main():
    collector = Collector()
    async with collector.serving():
        import os
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{collector.port}"
        os.environ["OTEL_BSP_SCHEDULE_DELAY"] = "50"
        spans = Spans()
        for collector.status in (400, 200):
            for _ in range(2):
                spans.write(a_record())
                await asyncio.sleep(0.4)
        await spans.close()
        assert collector.spans
asyncio.run(main())
"""
    argv = [sys.executable, "-c", program]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    entries = [json.loads(line) for line in done.stderr.splitlines()]
    assert [entry["event"] for entry in entries if entry["logger"] == "traces"] == [
        "traces_lost",
        "traces_taken",
    ]
    (cause,) = [entry for entry in entries if entry["logger"].startswith("opentelemetry")]
    assert "400" in cause["event"]


async def test_a_variable_that_cannot_be_used_is_an_error_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "1")
    with pytest.raises(ConfigurationError, match=r"gateway\.tracing: .*max_export_batch_size"):
        Spans()
