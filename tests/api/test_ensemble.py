"""Ensembles over the real gateway: several models answer, one chooses, and the run keeps all of it."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.keys import Scope
from manager.domain.runs import RunStatus
from manager.errors import Reason, RegistryUnwritableError
from tests.support.inside import until
from tests.support.limited import Limited
from tests.support.relaying import Conversation, Front, Scripted, relaying
from tests.support.storing import ask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from manager.domain.runs import Run

JSON = {"Content-Type": "application/json"}
ENSEMBLE = "/api/v1/llm/ensemble"
QUESTION = {"messages": [{"role": "user", "content": "Why is the sky blue?"}]}
CONFIG: dict[str, Any] = {
    "roles": {"fast": {"model": "small"}, "complex": {"model": "large"}},
    "routing": {"ensemble": {"models": ["fast", "medium-model", "none"], "judge": "complex"}},
}


class Speaking(Scripted):
    """A server whose models say what the test has written; a number is a status to fail with."""

    def __init__(self) -> None:
        super().__init__(("small", "medium-model", "large"))
        self.says: dict[str, str | int] = {
            "small": "Because.",
            "medium-model": "Air scatters short waves more.",
            "large": '{"best": 2, "reason": "it explains"}',
        }
        self.held = asyncio.Event()
        self.held.set()
        self.answer = self.speak

    async def speak(self, talk: Conversation) -> None:
        await self.held.wait()
        said = self.says[talk.seen.json()["model"]]
        if isinstance(said, int):
            await talk.whole(said, b'{"error": "not today"}')
            return
        answer = {"message": {"role": "assistant", "content": said}, "done": True, "eval_count": 3}
        await talk.whole(200, json.dumps(answer).encode())

    def asked(self, model: str) -> list[Any]:
        return [one.json() for one in self.seen if one.json()["model"] == model]


@asynccontextmanager
async def speaking(tmp_path: Path, config: Any = CONFIG) -> AsyncIterator[tuple[Front, Speaking]]:
    server = Speaking()
    async with server.serving(), relaying(tmp_path, {"one": server}, config=config) as front:
        yield front, server


async def ended(front: Front, body: Any = QUESTION) -> tuple[Any, Any]:
    """Submit an ensemble; return its run, once it has ended, and the result."""
    reply = await front.ask(body, ENSEMBLE, JSON)
    assert reply.status == 202, reply.body
    place = reply.headers["location"]
    async with asyncio.timeout(20):
        while (run := (await ask(front, "GET", place)).json())["ended_at"] is None:
            pass
    result = await ask(front, "GET", f"{place}/result")
    return run, result.json()


async def test_the_judge_chooses_the_best_of_the_answers(tmp_path: Path) -> None:
    async with speaking(tmp_path) as (front, server):
        run, result = await ended(front)
        assert (run["status"], run["path"], run["instance"]) == ("succeeded", ENSEMBLE, "one")
        assert (result["response"], result["model"]) == ("Air scatters short waves more.", "medium-model")
        assert (result["verdict"]["best"], result["verdict"]["reason"]) == (1, "it explains")
        assert [one["response"] for one in result["answers"]] == [
            "Because.",
            "Air scatters short waves more.",
            None,
        ]
        assert result["answers"][2]["error"]["code"] == "model_missing"
        (judged,) = server.asked("large")
        assert judged["format"]["properties"]["best"]["enum"] == [1, 2]
        assert judged["format"]["additionalProperties"] is False
        assert judged["think"] is False
        shown = json.loads(judged["messages"][1]["content"])
        assert [one["answer"] for one in shown["answers"]] == ["Because.", "Air scatters short waves more."]
        paths = {record.path for record in front.records}
        assert paths == {ENSEMBLE}
        assert len(front.records) == 4
        assert front.at_rest


async def test_one_answer_needs_no_judge(tmp_path: Path) -> None:
    async with speaking(tmp_path) as (front, server):
        server.says["medium-model"] = 500
        run, result = await ended(front)
        assert (run["status"], result["response"]) == ("succeeded", "Because.")
        assert result["verdict"] == {"best": 0, "reason": None}
        assert not server.asked("large")


@pytest.mark.parametrize("says", ['{"best": 3, "reason": ""}', '{"best": true}', "the second", "{}", 500])
async def test_where_the_judge_fails_the_answers_are_kept(tmp_path: Path, says: str | int) -> None:
    async with speaking(tmp_path) as (front, server):
        server.says["large"] = says
        run, result = await ended(front)
        assert run["status"] == "failed"
        assert run["error"]["code"] in ("invalid_output", "upstream_error")
        assert (result["response"], result["verdict"]) == (None, None)
        assert [one["response"] for one in result["answers"][:2]] == [
            "Because.",
            "Air scatters short waves more.",
        ]


async def test_without_any_answer_the_run_has_failed(tmp_path: Path) -> None:
    async with speaking(tmp_path) as (front, server):
        server.says.update({"small": 500, "medium-model": 400})
        run, result = await ended(front)
        assert (run["status"], run["error"]["code"]) == ("failed", "upstream_error")
        assert all(one["error"]["message"] for one in result["answers"])
        assert not server.asked("large")


async def test_a_request_names_models_and_judge_of_its_own(tmp_path: Path) -> None:
    async with speaking(tmp_path) as (front, server):
        server.says["small"] = '{"best": 1, "reason": "so"}'
        run, result = await ended(front, {**QUESTION, "models": ["large", "medium-model"], "judge": "fast"})
        assert (run["status"], run["model"], result["verdict"]["model_used"]) == (
            "succeeded",
            "fast",
            "small",
        )
        assert result["model"] == "large"


async def test_a_cancelled_ensemble_ends_what_it_has_begun(tmp_path: Path) -> None:
    async with speaking(tmp_path) as (front, server):
        server.held.clear()
        place = (await front.ask(QUESTION, ENSEMBLE, JSON)).headers["location"]
        await until(lambda: len(server.seen) == 2)
        assert (await ask(front, "GET", place)).json()["status"] == "running"
        run = (await ask(front, "DELETE", place)).json()
        assert run["status"] == "cancelled"
        await until(lambda: front.at_rest)
        assert {record.fallback_reason for record in front.records[-2:]} == {Reason.CANCELLED}
        server.held.set()


async def test_nothing_is_under_way_after_a_run_that_could_not_be_stored_as_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with speaking(tmp_path) as (front, server):
        server.held.clear()
        registry, failures = (
            front.daemon.backend.runs._registry,
            [RegistryUnwritableError("the disk is full")],
        )
        save = registry.save_run

        async def fail_once(run: Run) -> None:
            if failures and run.status is RunStatus.RUNNING:
                raise failures.pop()
            await save(run)

        monkeypatch.setattr(registry, "save_run", fail_once)
        await front.ask(QUESTION, ENSEMBLE, JSON)
        await until(lambda: not failures)
        await until(lambda: front.at_rest, within_s=2)  # then the run is executed again
        server.held.set()


async def test_ensembles_are_off_unless_they_are_configured(tmp_path: Path) -> None:
    async with speaking(tmp_path, {"roles": CONFIG["roles"]}) as (front, server):
        reply = await front.ask(QUESTION, ENSEMBLE, JSON)
        assert (reply.status, reply.json()["error"]["code"]) == (409, "ensemble_off")
        assert not server.seen


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"messages": []}, "body.messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "body.messages.0.role"),
        ({**QUESTION, "models": ["a"]}, "body.models"),
        ({**QUESTION, "models": ["a"] * 9}, "body.models"),
        ({**QUESTION, "judge": ""}, "body.judge"),
    ],
)
async def test_what_is_no_ensemble_is_refused(tmp_path: Path, body: Any, field: str) -> None:
    async with speaking(tmp_path) as (front, _):
        reply = await front.ask(body, ENSEMBLE, JSON)
        assert reply.status == 422
        assert [one["field"] for one in reply.json()["error"]["details"]["fields"]] == [field]


async def test_messages_that_are_too_large_for_a_run_are_refused(tmp_path: Path) -> None:
    async with speaking(tmp_path, {**CONFIG, "runs": {"max_body": "1 KB"}}) as (front, server):
        reply = await front.ask({"messages": [{"role": "user", "content": "x" * 2000}]}, ENSEMBLE, JSON)
        assert reply.status == 422
        assert "at most 1" in reply.json()["error"]["message"]
        assert "runs.max_body" in reply.json()["error"]["message"]
        assert not server.seen


async def test_the_limits_of_the_key_hold_for_each_request(tmp_path: Path) -> None:
    async with speaking(tmp_path) as (front, server):
        limited = Limited(front)
        key = await limited.make("some", Scope.CLIENT, roles=["fast", "complex"])
        reply = await front.ask(QUESTION, ENSEMBLE, {**JSON, **key})
        assert reply.status == 202
        place = reply.headers["location"]
        async with asyncio.timeout(20):
            while (run := (await limited.call("GET", place, key)).json())["ended_at"] is None:
                pass
        assert run["status"] == "succeeded"
        result = (await limited.call("GET", f"{place}/result", key)).json()
        assert [one["error"] and one["error"]["code"] for one in result["answers"]] == [
            None,
            "policy",
            "policy",
        ]
        assert not server.asked("medium-model")
