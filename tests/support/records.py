"""Records of requests, as they are once a request has ended."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from manager.domain.record import RequestRecord
from manager.domain.roles import RequestKind

TRACE, SPAN, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", "b7ad6b7169203331"


def a_record(**values: Any) -> RequestRecord:
    """A chat that went well, but for `values`."""
    said = {
        "ts": datetime(2026, 3, 1, 12, 0, 0, 250_000, tzinfo=UTC),
        "request_id": "0badc0ffee0000000001",
        "trace_id": TRACE,
        "span_id": SPAN,
        "parent_span_id": None,
        "project_id": "default",
        "path": "/api/chat",
        "sampled": True,
        "kind": RequestKind.GENERATE,
        "role": "thinking",
        "model": "qwen3:8b",
        "effective_target": "gpu0",
        "endpoint": "http://127.0.0.1:11500",
        "policy": "auto",
        "attempts": 1,
        "status": 200,
        "stream": True,
        "queue_ms": 1.5,
        "ttfb_ms": 200.0,
        "duration_ms": 1500.5,
        "input_tokens": 12,
        "output_tokens": 34,
    }
    return RequestRecord(**{**said, **values})
