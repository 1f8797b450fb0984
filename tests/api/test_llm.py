"""`/api/v1/llm` over the real gateway: small jobs, the models of the tiers, and what routing has saved."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.inside import until
from tests.support.relaying import Conversation, Front, Scripted, relaying
from tests.support.storing import ask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

SMALL, LARGE = "small", "large"
CONFIG: dict[str, Any] = {
    "roles": {"fast": {"model": SMALL}, "complex": {"model": LARGE, "fallbacks": ["fast"]}},
    "models": {
        "facts": {
            "quick": {"tier": "fast", "expected_latency_ms": 50, "capabilities": ["tools"]},
            LARGE: {"context_window": 8192, "cost_factor": 12, "max_tokens": 500, "temperature": 0.7},
        }
    },
}
HARD = "Compare both strategies step by step."


class Writing(Scripted):
    """A server that answers with what the test has written last."""

    def __init__(self, *models: str) -> None:
        super().__init__(models or (SMALL, LARGE))
        self.says = "fine"
        self.answer = self.write

    async def write(self, talk: Conversation) -> None:
        body = {
            "model": talk.seen.json()["model"],
            "message": {"role": "assistant", "content": self.says},
            "done": True,
            "done_reason": "stop",
            "prompt_eval_count": 12,
            "eval_count": 34,
        }
        await talk.whole(200, json.dumps(body).encode())


@asynccontextmanager
async def writing(*models: str) -> AsyncIterator[Writing]:
    server = Writing(*models)
    async with server.serving():
        yield server


async def post(front: Front, name: str, body: Any, status: int = 200) -> Any:
    reply = await front.ask(body, f"/api/v1/llm/{name}", {"Content-Type": "application/json"})
    assert reply.status == status, reply.body
    return reply.json()


async def get(front: Front, name: str) -> Any:
    reply = await ask(front, "GET", f"/api/v1/llm/{name}", None)
    assert reply.status == 200, reply.body
    return reply.json()


async def test_a_sentiment_is_one_of_three_words(tmp_path: Path) -> None:
    async with writing() as server, relaying(tmp_path, {"one": server}, config=CONFIG) as front:
        server.says = '{"sentiment": "BULLISH", "confidence": 0.9}'
        found = await post(front, "sentiment", {"text": "Profits have doubled."})
        assert (found["sentiment"], found["confidence"], found["model_used"]) == ("BULLISH", 0.9, SMALL)
        assert found["latency_ms"] > 0
        routing = found["routing"]
        assert (routing["task_type"], routing["tier"], routing["instance"]) == ("sentiment", "fast", "one")
        assert not routing["was_fallback"]
        assert routing["routing_ms"] > 0
        sent = server.seen.pop().json()
        assert sent["format"]["properties"]["sentiment"]["enum"] == ["BULLISH", "BEARISH", "NEUTRAL"]
        assert sent["format"]["additionalProperties"] is False
        assert sent["options"]["temperature"] == 0
        assert sent["messages"][-1] == {"role": "user", "content": "Profits have doubled."}
        record = await front.record()
        assert (record.path, record.role, record.task_type) == ("/api/v1/llm/sentiment", "fast", "sentiment")
        assert (record.input_tokens, record.output_tokens, record.outcome) == (12, 34, "ok")
        assert front.at_rest


async def test_a_model_that_thinks_has_its_few_tokens_for_the_answer(tmp_path: Path) -> None:
    config = {**CONFIG, "roles": {**CONFIG["roles"], "classification": {"model": LARGE, "think": True}}}
    async with writing() as server, relaying(tmp_path, {"one": server}, config=config) as front:
        server.says = '{"sentiment": "BULLISH", "confidence": 0.9}'
        await post(front, "sentiment", {"text": "x"})
        assert server.seen.pop().json()["think"] is False
        server.says = '{"category": "a"}'
        await post(front, "classify", {"text": "x", "categories": ["a", "b"]})
        assert server.seen.pop().json()["think"] is True  # the configuration wins
        await post(front, "chat", {"message": "x"})
        assert "think" not in server.seen.pop().json()


@pytest.mark.parametrize("name", ["sentiment", "classify", "chat"])
async def test_a_client_that_leaves_ends_its_request(tmp_path: Path, name: str) -> None:
    async with writing() as server, relaying(tmp_path, {"one": server}, config=CONFIG) as front:
        begun = asyncio.Event()

        async def waits(talk: Conversation) -> None:
            begun.set()
            await talk.left()

        server.answer = waits
        text = {"chat": {"message": "x"}, "sentiment": {"text": "x"}}
        caller = await front.connect()
        body = text.get(name, {"text": "x", "categories": ["a", "b"]})
        await caller.send(body, f"/api/v1/llm/{name}", {"Content-Type": "application/json"})
        await begun.wait()
        assert not front.at_rest
        caller.leave()
        assert (await front.record()).outcome == "client_gone"
        await until(lambda: front.at_rest)


async def test_a_confidence_out_of_its_bounds_is_held_within_them(tmp_path: Path) -> None:
    async with writing() as server, relaying(tmp_path, {"one": server}, config=CONFIG) as front:
        server.says = '{"sentiment": "NEUTRAL", "confidence": 90}'
        assert (await post(front, "sentiment", {"text": "x"}))["confidence"] == 1.0


@pytest.mark.parametrize(
    "says",
    [
        "It is bullish.",
        '{"sentiment": "GOOD", "confidence": 1}',
        '{"sentiment": ["BULLISH"], "confidence": 1}',
        '{"sentiment": "BULLISH", "confidence": true}',
        '{"sentiment": "BULLISH"}',
        "[]",
        "",
    ],
)
async def test_free_text_is_no_sentiment(tmp_path: Path, says: str) -> None:
    async with writing() as server, relaying(tmp_path, {"one": server}, config=CONFIG) as front:
        server.says = says
        found = await post(front, "sentiment", {"text": "x"}, 502)
        assert found["error"]["code"] == "invalid_output"


async def test_a_text_gets_one_of_the_categories(tmp_path: Path) -> None:
    async with writing() as server, relaying(tmp_path, {"one": server}, config=CONFIG) as front:
        body = {"text": "It does not start.", "categories": ["bug", 'a "wish"']}
        server.says = '{"category": "bug"}'
        found = await post(front, "classify", body)
        assert (found["category"], found["model_used"]) == ("bug", SMALL)
        assert server.seen.pop().json()["format"]["properties"]["category"]["enum"] == body["categories"]
        server.says = '{"category": "question"}'
        assert (await post(front, "classify", body, 502))["error"]["code"] == "invalid_output"


@pytest.mark.parametrize(
    ("name", "body", "field"),
    [
        ("sentiment", {}, "body.text"),
        ("sentiment", {"text": ""}, "body.text"),
        ("sentiment", {"text": 5}, "body.text"),
        ("sentiment", {"text": "x", "more": 1}, "body.more"),
        ("classify", {"text": "x", "categories": ["a"]}, "body.categories"),
        ("classify", {"text": "x", "categories": ["a", "a"]}, "body.categories"),
        ("classify", {"text": "x", "categories": ["a", " "]}, "body.categories"),
        ("chat", {"message": "x", "auto_route": "yes"}, "body.auto_route"),
        ("chat", {"message": "x", "force_model": ""}, "body.force_model"),
    ],
)
async def test_a_body_that_cannot_be_meant_is_refused(
    tmp_path: Path, name: str, body: Any, field: str
) -> None:
    async with writing() as server, relaying(tmp_path, {"one": server}, config=CONFIG) as front:
        found = await post(front, name, body, 422)
        assert [one["field"] for one in found["error"]["details"]["fields"]] == [field]
        assert not server.seen


async def test_a_message_gets_a_model_that_fits_it(tmp_path: Path) -> None:
    async with writing() as server, relaying(tmp_path, {"one": server}, config=CONFIG) as front:
        found = await post(front, "chat", {"message": "hi"})
        assert (found["response"], found["model"], found["tier"]) == ("fine", SMALL, "fast")
        assert (found["input_tokens"], found["output_tokens"]) == (12, 34)
        assert found["routing"]["reasoning"] == "it is short (2 characters)"
        found = await post(front, "chat", {"message": HARD})
        assert (found["model"], found["tier"], found["routing"]["confidence"]) == (LARGE, "complex", 0.8)
        found = await post(front, "chat", {"message": "hi", "auto_route": False})
        assert (found["model"], found["tier"], found["routing"]["confidence"]) == (LARGE, "complex", 1.0)
        found = await post(front, "chat", {"message": HARD, "force_model": SMALL})
        assert (found["model"], found["tier"], found["routing"]["task_type"]) == (SMALL, None, None)
        assert [one.json()["model"] for one in server.seen] == [SMALL, LARGE, LARGE, SMALL]


async def test_a_fallback_is_visible(tmp_path: Path) -> None:
    async with (
        Writing(SMALL).serving() as server,
        relaying(tmp_path, {"one": server}, config=CONFIG) as front,
    ):
        found = await post(front, "chat", {"message": HARD})
        assert (found["model"], found["tier"]) == (SMALL, "complex")
        routing = found["routing"]
        assert (routing["was_fallback"], routing["fallback_reason"]) == (True, "model_missing")


async def test_what_cannot_be_answered_says_why(tmp_path: Path) -> None:
    async with writing() as server, relaying(tmp_path, {"one": server}) as front:
        found = await post(front, "chat", {"message": HARD}, 404)
        assert "set roles.complex.model" in found["error"]["message"]
        found = await post(front, "chat", {"message": HARD, "force_model": "none"}, 404)
        assert "none" in found["error"]["message"]
        assert not server.seen

        async def fails(talk: Conversation) -> None:
            await talk.whole(500, b'{"error": "out of order"}')

        server.answer = fails
        found = await post(front, "chat", {"message": "x", "force_model": SMALL}, 502)
        assert "out of order" in found["error"]["message"]

        async def refuses(talk: Conversation) -> None:
            await talk.whole(400, b'{"error": "not like this"}')

        server.answer = refuses
        found = await post(front, "chat", {"message": "x", "force_model": SMALL}, 422)
        assert "not like this" in found["error"]["message"]
        assert front.at_rest


async def test_the_models_of_the_tiers_are_listed_with_their_facts(tmp_path: Path) -> None:
    config = {**CONFIG, "routing": {"auto": True}}
    async with writing() as server, relaying(tmp_path, {"one": server}, config=config) as front:
        found = await get(front, "models")
        assert found["auto"] is True
        assert found["tiers"] == {"fast": [SMALL, "quick"], "complex": [LARGE]}
        rows = {one["name"].removesuffix(":latest"): one for one in found["models"]}
        assert set(rows) == {SMALL, LARGE, "quick"}
        assert (rows[SMALL]["tiers"], rows[SMALL]["available"]) == (["fast"], True)
        large = rows[LARGE]
        assert (large["context_window"], large["cost_factor"], large["max_tokens"]) == (8192, 12, 500)
        assert (large["temperature"], large["instances"], large["loaded"]) == (0.7, ["one"], False)
        quick = rows["quick"]
        assert (quick["available"], quick["expected_latency_ms"], quick["capabilities"]) == (
            False,
            50,
            ["tools"],
        )
        assert server.models


async def test_the_statistics_are_of_the_tiers_and_their_tasks(tmp_path: Path) -> None:
    async with writing() as server, relaying(tmp_path, {"one": server}, config=CONFIG) as front:
        empty = await get(front, "routing-stats")
        assert (empty["total"]["requests"], empty["saved"]) == (0, {"requests": 0, "seconds": None})
        for message in ("hi", "ho", HARD):
            await post(front, "chat", {"message": message})
        await post(front, "chat", {"message": "x", "force_model": SMALL})  # no tier has answered it
        server.models = (SMALL,)
        found = await get(front, "routing-stats?from=1h")
        assert found["total"]["requests"] == 3
        tiers = {one["tier"]: one for one in found["by_tier"]}
        assert [tiers[name]["requests"] for name in ("fast", "medium", "complex")] == [2, 0, 1]
        assert tiers["fast"]["share"] == pytest.approx(2 / 3, abs=1e-6)
        assert tiers["fast"]["p95_ms"] is not None
        assert [(one["model"], one["requests"]) for one in found["by_model"]] == [(SMALL, 2), (LARGE, 1)]
        assert found["fallback_rate"] == 0.0
        assert found["saved"]["requests"] == 2
        assert found["saved"]["seconds"] is not None


@pytest.mark.parametrize(
    "query", ["to=225637844d", "from=1h&to=2h", "to=9999d", "from=2026-01-02&to=2026-01-01"]
)
async def test_a_time_that_is_none_is_refused_or_empty(tmp_path: Path, query: str) -> None:
    async with writing() as server, relaying(tmp_path, {"one": server}, config=CONFIG) as front:
        for path in ("/api/v1/llm/routing-stats", "/api/v1/usage"):
            reply = await ask(front, "GET", f"{path}?{query}", None)
            assert reply.status in (200, 422), reply.body
