"""An answer with an error to a request for a stream: what breaks off is not filled up with words of ours."""

from __future__ import annotations

import pytest

from tests.support.attempts import attempt
from tests.support.exchanging import ANTHROPIC, CHAT, OPENAI, TINY, bench_of


@pytest.mark.parametrize("path", [CHAT, OPENAI, ANTHROPIC])
async def test_an_error_that_breaks_off_is_no_stream_that_could_be_ended_with_another(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    bench = bench_of(monkeypatch, attempt("a"))
    server = bench.kept()
    exchange, client = bench.ask({**TINY, "stream": True}, path)
    server.head(422, b"application/json")
    server.body(b'{"error":')
    server.breaks()
    assert (client.status, client.body, client.aborted) == (422, b'{"error":', 1)
    assert (client.is_whole, exchange.keep_alive) == (False, False)
    assert bench.at_rest()
    assert (bench.record.outcome, bench.record.status) == ("upstream_error", 422)
