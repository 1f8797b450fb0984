"""What is said of requests: a line each, counts that agree with the lines, events for changes, one trace."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families

import manager.adapters
from manager.domain.record import Outcome
from manager.errors import ConfigurationError
from tests.support.inside import until
from tests.support.relaying import LINE, Conversation, Front, Scripted, a_word, relaying
from tests.unit.adapters.test_otel import Collector
from tests.unit.adapters.test_request_log import BEYOND, DOCUMENTED

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from manager.domain.record import RequestRecord

TINY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
WHOLE = {**TINY, "stream": False}
TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
OUTCOMES = get_args(Outcome)


async def fails(talk: Conversation) -> None:
    await talk.whole(500, b'{"error":"model failed to load"}')


async def says_nothing(talk: Conversation) -> None:
    await talk.left()


async def begins(talk: Conversation) -> None:
    await talk.begin()
    await talk.chunk(LINE)
    await talk.left()


@asynccontextmanager
async def one_of_each(home: Path, **more: Any) -> AsyncIterator[Front]:
    """A gateway that has answered one request for each outcome."""
    limits = {"total_timeout_s": 3, **more}
    async with Scripted().serving() as server, relaying(home, {"a": server}, gateway=limits) as front:
        traffic = front.daemon.backend.passing.routing.traffic

        def write(record: RequestRecord) -> None:
            front.records.append(record)
            front.to_the_log(record)

        traffic._write = write
        await front.ask(TINY, headers={"X-Lane": "output", "X-Project-ID": "lab", "X-Intent": "test"})
        await front.ask(b"{no json")
        await front.ask({**TINY, "model": "unknown"})
        server.answer = fails
        await front.ask(WHOLE)
        server.answer = says_nothing
        assert (await front.ask(WHOLE)).status == 504
        server.answer = begins
        leaving = await front.connect()
        await leaving.send(TINY)
        await leaving.head()
        leaving.leave()
        await until(lambda: front.at_rest)
        staying = await front.connect()
        await staying.send(TINY)
        await staying.head()
        for exchange in tuple(front.relay.exchanges):
            exchange.cut("the test is over")
        await until(lambda: front.at_rest)
        staying.leave()
        yield front


def logged(errors: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in errors.splitlines() if line.startswith(b'{"ts":')]


async def test_each_request_is_one_line_with_the_documented_keys(tmp_path: Path, capfdbinary: Any) -> None:
    async with one_of_each(tmp_path) as front:
        assert front.log.close(10)
        lines = logged(capfdbinary.readouterr().err)
        assert sorted(line["outcome"] for line in lines) == sorted(OUTCOMES)
        assert len({line["request_id"] for line in lines}) == len({line["trace_id"] for line in lines}) == 7
        for line in lines:
            assert set(line) == set(DOCUMENTED | BEYOND)
            for name, (kind, may_be_null) in (DOCUMENTED | BEYOND).items():
                assert type(line[name]) is kind or (may_be_null and line[name] is None), name
        by_outcome = {line["outcome"]: line for line in lines}
        assert {name: line["status"] for name, line in by_outcome.items()} == {
            "ok": 200,
            "client_error": 400,
            "client_gone": 200,
            "refused": 404,
            "upstream_error": 500,
            "timeout": 504,
            "cut": 200,
        }
        ok = by_outcome["ok"]
        assert (ok["project_id"], ok["lane"], ok["intent"]) == ("lab", "output", "test")
        assert (ok["provider"], ok["effective_target"], ok["model"]) == ("local", "a", "tiny")
        assert ok["endpoint"] == front.daemon.fleet.get("a").usable_endpoint()
        assert (ok["input_tokens"], ok["output_tokens"], ok["cost_usd"]) == (12, 34, 0.0)
        assert (ok["attempts"], ok["fallback"], ok["fallback_reason"]) == (1, False, None)
        assert 0 < ok["ttfb_ms"] <= ok["duration_ms"]
        assert by_outcome["timeout"]["duration_ms"] >= 2900
        refused = by_outcome["refused"]
        assert (refused["fallback_reason"], refused["endpoint"]) == ("model_missing", None)


async def scraped(front: Front) -> dict[str, Any]:
    caller = await front.connect()
    await caller.raw(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
    text = (await caller.reply()).body.decode()
    caller.leave()
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics_agree_with_the_lines(tmp_path: Path) -> None:
    async with one_of_each(tmp_path) as front:
        metrics = await scraped(front)
        counted: dict[str, float] = {}
        for record in front.records:
            labels = {
                "target": record.effective_target or "",
                "role": record.role or "",
                "outcome": record.outcome,
            }
            name = f"ollama_manager_requests_total{sorted(labels.items())}"
            counted[name] = counted.get(name, 0) + 1
        assert {
            name: value for name, value in metrics.items() if name.startswith("ollama_manager_requests_total")
        } == counted
        there = [record for record in front.records if record.effective_target == "a"]
        name = "ollama_manager_request_duration_seconds"
        assert metrics[f"{name}_count[('target', 'a')]"] == len(there) == 5
        total_s = sum(record.duration_ms for record in there) / 1000
        assert metrics[f"{name}_sum[('target', 'a')]"] == pytest.approx(total_s)
        # Of errors, whole answers and streams that broke off the first byte is no token.
        streamed = [record for record in there if record.stream and record.outcome == "ok"]
        assert metrics["ollama_manager_time_to_first_token_seconds_count[('target', 'a')]"] == len(streamed)
        labels_of_error = "[('reason', 'model_load_failed'), ('target', 'a')]"
        assert metrics[f"ollama_manager_target_errors_total{labels_of_error}"] == 1
        assert metrics["ollama_manager_in_flight[('target', 'a')]"] == 0


async def test_of_what_went_well_only_a_share_is_logged_but_all_is_counted(tmp_path: Path) -> None:
    async with one_of_each(tmp_path, access_log=0) as front:
        assert sorted(record.outcome for record in front.records) == sorted(set(OUTCOMES) - {"ok"})
        counts = front.daemon.backend.passing.routing.traffic.requests
        assert sum(count for (_, _, outcome), count in counts.items() if outcome == "ok") == 1


def fallbacks(front: Front) -> list[tuple[str, str | None, str | None]]:
    return [
        (event.kind, event.instance, event.reason)
        for event in front.daemon.backend.journal._recent
        if event.kind.startswith("fallback")
    ]


async def test_a_fallback_is_an_event_when_it_begins_and_when_it_ends_not_for_each_request(
    tmp_path: Path,
) -> None:
    role = {"model": "tiny", "target": "a", "policy": "prefer_gpu"}
    async with (
        Scripted().serving() as one,
        Scripted().serving() as other,
        relaying(
            tmp_path,
            {"a": one, "b": other},
            config={"roles": {"output": role}},
            devices={"a": "gpu", "b": "cpu"},
        ) as front,
    ):
        ask = {**WHOLE, "model": "output"}
        await front.ask(ask)
        assert fallbacks(front) == []
        one.answer = fails
        for _ in range(3):
            assert (await front.ask(ask)).headers["x-instance"] == "b"
        began = ("fallback", "b", "model_load_failed")
        assert fallbacks(front) == [began]
        one.answer = a_word
        for _ in range(3):
            assert (await front.ask(ask)).headers["x-instance"] == "a"
        assert fallbacks(front) == [began, ("fallback_ended", "a", None)]
        one.answer = fails
        await front.ask(ask)
        assert fallbacks(front)[2:] == [began]
        counts = front.daemon.backend.passing.routing.traffic.fallbacks
        assert counts == {("a", "b", "model_load_failed"): 4}
        lines = [record for record in front.records if record.fallback]
        assert {record.endpoint for record in lines} == {other.url}
        assert {record.attempts for record in lines} == {2}


async def test_the_endpoint_is_that_of_the_attempt_whose_answer_the_client_gets(tmp_path: Path) -> None:
    one, other = Scripted(), Scripted()
    slowly = {"lifecycle": {"probe_interval_s": 30}}
    async with one.serving(), AsyncExitStack() as stack:
        async with other.serving():
            front = await stack.enter_async_context(relaying(tmp_path, {"a": one, "b": other}, config=slowly))
        one.answer = fails
        reply = await front.ask(WHOLE)
        assert (reply.status, reply.json()) == (500, {"error": "model failed to load"})
        record = await front.record()
        assert (record.attempts, record.effective_target) == (2, "a")
        assert record.endpoint == one.url
        assert [tuple(one) for one in record.failed_attempts] == [
            ("a", "model_load_failed"),
            ("b", "upstream_unreachable"),
        ]


@pytest.mark.parametrize(
    ("given", "kept", "flags"),
    [
        (f"00-{TRACE}-{CALLER}-01", True, "01"),
        (f"00-{TRACE}-{CALLER}-00", True, "00"),
        (f"00-{TRACE}-{CALLER}-03", True, "01"),
        (f"01-{TRACE}-{CALLER}-01-more", True, "01"),
        (f"00-{'0' * 32}-{CALLER}-01", False, "00"),
        (f"ff-{TRACE}-{CALLER}-01", False, "00"),
        ("nonsense", False, "00"),
        (None, False, "00"),
    ],
)
async def test_a_trace_goes_on_with_a_span_of_its_own_and_one_that_is_none_begins_anew(
    tmp_path: Path, given: str | None, kept: bool, flags: str
) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        headers = {"tracestate": "vendor=1", **({"traceparent": given} if given else {})}
        for _ in range(2):
            await front.ask(WHOLE, headers=headers)
        sent = [(seen.header("traceparent") or "").split("-") for seen in server.seen]
        records = front.records
        assert sent == [["00", record.trace_id, record.span_id, flags] for record in records]
        assert [record.parent_span_id for record in records] == [CALLER if kept else None] * 2
        assert len({record.trace_id for record in records}) == (1 if kept else 2)
        assert all((record.trace_id == TRACE) is kept for record in records)
        assert len({record.span_id for record in records}) == 2
        assert server.seen[0].header("tracestate") is None


async def test_the_span_of_a_request_is_the_one_that_the_server_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Collector().serving() as collector, Scripted().serving() as server:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.port}")
        tracing = {"tracing": True, "access_log": 0}
        async with relaying(tmp_path, {"a": server}, gateway=tracing) as front:
            await front.ask(TINY, headers={"traceparent": f"00-{TRACE}-{CALLER}-01", "X-Project-ID": "lab"})
            await front.ask(TINY, headers={"traceparent": f"00-{TRACE}-{CALLER}-00"})
            await front.ask({"model": "tiny", "input": "hi"}, "/v1/embeddings")
            await front.ask({**TINY, "model": "unknown"})
            first, unsampled, root = ((seen.header("traceparent") or "").split("-") for seen in server.seen)
            assert (unsampled[3], root[3]) == ("00", "01")
        by_span = {span.span_id.hex(): span for span in collector.spans}
        assert len(by_span) == len(collector.spans) == 3
        assert unsampled[2] not in by_span
        span = by_span[first[2]]
        assert (span.trace_id.hex(), span.parent_span_id.hex(), span.name) == (TRACE, CALLER, "chat tiny")
        said = {one.key: one.value for one in span.attributes}
        assert said["gen_ai.request.model"].string_value == "tiny"
        assert said["gen_ai.usage.input_tokens"].int_value == 12
        assert said["gen_ai.usage.output_tokens"].int_value == 34
        assert said["ollama_manager.project_id"].string_value == "lab"
        assert said["ollama_manager.provider"].string_value == "local"
        assert said["ollama_manager.endpoint"].string_value == server.url
        assert said["ollama_manager.cost_usd"].double_value == 0
        span = by_span[root[2]]
        assert (span.trace_id.hex(), span.parent_span_id, span.name) == (root[1], b"", "embeddings tiny")
        (refused,) = by_span.keys() - {first[2], root[2]}
        said = {one.key: one.value for one in by_span[refused].attributes}
        assert said["error.type"].string_value == "model_missing"


async def test_tracing_without_its_extra_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("opentelemetry.sdk")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "manager.adapters.otel")
    monkeypatch.delattr(manager.adapters, "otel")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'ollama-endpoint-manager\[otel\]'"):
        async with relaying(tmp_path, {}, gateway={"tracing": True}):
            pass


def test_without_tracing_nothing_of_it_is_imported() -> None:
    program = "import sys, manager.app; print([name for name in sys.modules if 'opentelemetry.sdk' in name])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
