"""What a server that is no Ollama gets of a request, and what its answers mean."""

from __future__ import annotations

from typing import Any

import pytest

from manager.domain.money import Price
from manager.domain.roles import BodyChanges
from manager.domain.target import Protocol, Target
from manager.errors import Reason
from manager.services.routing.speaking import Speaking, server_path
from manager.wire.body import read_body
from manager.wire.errors import BadBodyError
from manager.wire.routes import INFERENCE
from tests.support.records import a_record

CHAT, NATIVE = INFERENCE[b"/v1/chat/completions"], INFERENCE[b"/api/chat"]


def target(protocol: Protocol = Protocol.OPENAI, *, paid: bool = True, url: str = "https://x/v1") -> Target:
    prices = {"gpt": Price(1, 1)} if paid else None
    return Target("far", url, ((b"authorization", b"Bearer k"),), protocol, prices, repeatable=not paid)


def speaking(route: Any = NATIVE, **values: Any) -> Speaking:
    return Speaking(route, target(**values), a_record(request_id="42", trace_id="t" * 32, span_id="s" * 16))


def test_the_version_stands_in_the_base_url() -> None:
    assert server_path(target(), "/v1/chat/completions") == "/chat/completions"
    assert server_path(target(), "/v1/audio/transcriptions?x=1") == "/audio/transcriptions?x=1"
    assert server_path(target(Protocol.OLLAMA), "/v1/messages") == "/v1/messages"
    assert speaking().path == "/chat/completions"


def test_a_provider_gets_no_ids_of_ours() -> None:
    names = {name for name, _ in speaking().headers()}
    assert names == {b"Content-Type", b"Accept", b"User-Agent", b"authorization"}
    assert {b"X-Request-Id", b"traceparent"} <= {name for name, _ in speaking(paid=False).headers()}


def test_openai_itself_has_another_name_for_the_limit() -> None:
    body = read_body(b'{"model":"m","messages":[{"role":"user","content":"x"}]}', NATIVE)
    for url, field in (
        ("https://api.openai.com/v1", b'"max_completion_tokens":9'),
        ("https://x.openai.azure.com/openai/v1", b'"max_completion_tokens":9'),
        ("https://openai.com.evil.example/v1", b'"max_tokens":9'),
    ):
        assert field in speaking(url=url).request(body, "gpt", BodyChanges(), 9)


def test_a_route_without_a_call_is_refused() -> None:
    with pytest.raises(BadBodyError, match="anthropic"):
        speaking(INFERENCE[b"/api/embed"], protocol=Protocol.ANTHROPIC)


@pytest.mark.parametrize(
    ("status", "body", "reason", "told", "message"),
    [
        (307, None, Reason.UPSTREAM_ERROR, 502, "far answers with a redirect (status 307), which is not"),
        (401, b'{"error":"sk-secret is bad"}', Reason.UPSTREAM_ERROR, 502, "far refuses the manager's key"),
        (404, b'{"error":"no model"}', Reason.MODEL_MISSING, 404, "far: no model"),
        (429, b'{"error":{"message":"slow"}}', Reason.OVERLOADED, 429, "far: slow"),
        (529, None, Reason.OVERLOADED, 503, "far: the server answered with status 529"),
        (204, None, Reason.UPSTREAM_ERROR, 502, "far answered with status 204 in place of an answer"),
        (400, b'{"error":{"message":"too long"}}', None, 400, "too long"),
        (500, b"<html>", Reason.UPSTREAM_ERROR, 500, "far: the server answered with status 500"),
    ],
)
def test_each_error_says_what_it_means(
    status: int, body: bytes | None, reason: Reason | None, told: int, message: str
) -> None:
    error = speaking().error(status, body)
    assert (error.judgement.reason, error.status) == (reason, told)
    assert error.message.startswith(message)
    assert error.message.encode() in error.content
    assert b"secret" not in error.content


def test_a_paid_answer_that_was_cut_is_estimated_by_what_came() -> None:
    one = speaking(CHAT)
    one.request(read_body(b'{"model":"m","stream":true,"messages":[]}', CHAT), "gpt", BodyChanges(), 9)
    assert one.tokens == (None, None)
    one.came(b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n' * 5, complete=False)
    assert one.tokens == (None, 5)
    one.came(b"data: " + b"x" * 4000, complete=False)
    assert one.tokens[1] is not None
    assert one.tokens[1] > 400
    free = speaking(CHAT, paid=False)
    free.came(b"data: x\n\n", complete=False)
    assert free.tokens == (None, None)
