"""Requests that leave the choice of a model to the daemon, through the real gateway."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.limited import Limited
from tests.support.relaying import Conversation, Scripted, a_word, relaying
from tests.support.storing import ask

if TYPE_CHECKING:
    from pathlib import Path

SMALL, LARGE = "small", "large"
CONFIG: dict[str, Any] = {
    "routing": {"auto": True},
    "roles": {
        "fast": {"model": SMALL},
        "medium": {"model": SMALL},
        "complex": {"model": LARGE, "fallbacks": ["fast"]},
    },
    "models": {"facts": {SMALL: {"temperature": 0.2, "context_window": 4096, "max_tokens": 99}}},
}
HARD = "Compare both strategies step by step."


def chat(text: str, model: str = "auto", **values: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], "stream": False, **values}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", chat),
        ("/api/generate", lambda text: {"model": "auto", "prompt": text, "stream": False}),
        ("/v1/chat/completions", chat),
        ("/v1/completions", lambda text: {"model": "auto", "prompt": text}),
        ("/v1/responses", lambda text: {"model": "auto", "input": text}),
        ("/v1/messages", lambda text: chat(text, max_tokens=5)),
    ],
)
async def test_every_api_gets_a_small_model_for_a_small_question(
    tmp_path: Path, path: str, body: Any
) -> None:
    async with (
        Scripted((SMALL, LARGE)).serving() as server,
        relaying(tmp_path, {"one": server}, config=CONFIG) as front,
    ):
        for text, model, tier in (("hi", SMALL, "fast"), (HARD, LARGE, "complex")):
            reply = await ask(front, "POST", path, body(text))
            assert (reply.status, reply.headers["x-model"], reply.headers["x-tier"]) == (200, model, tier)
            assert server.seen.pop().json()["model"] == model
        assert reply.headers["x-task-type"] == "strategy"
        record = await front.record(1)
        assert (record.requested_model, record.model, record.role) == ("auto", LARGE, "complex")
        assert (record.task_type, record.tier, record.task_confidence) == ("strategy", "complex", 0.8)
        assert record.task_reasoning == "it has 'strateg*'"
        assert record.routing_ms is not None
        assert 0 < record.routing_ms < 1000


async def test_a_large_request_is_read_in_steps_and_classified_by_its_last_message(tmp_path: Path) -> None:
    async with (
        Scripted((SMALL, LARGE)).serving() as server,
        relaying(tmp_path, {"one": server}, config=CONFIG) as front,
    ):
        body = chat(HARD)
        body["messages"] = [{"role": "user", "content": "x" * 3_000_000}, *body["messages"]]
        reply = await ask(front, "POST", "/api/chat", body)
        assert (reply.status, reply.headers["x-model"]) == (200, LARGE)
        body["messages"][-1]["content"] = "thanks"
        reply = await ask(front, "POST", "/api/chat", body)
        assert (reply.headers["x-model"], reply.headers["x-task-type"]) == (SMALL, "chat")


async def test_a_named_tier_is_obeyed_and_a_missing_model_falls_back_along_the_chain(tmp_path: Path) -> None:
    async with (
        Scripted((SMALL,)).serving() as server,
        relaying(tmp_path, {"one": server}, config=CONFIG) as front,
    ):
        reply = await ask(front, "POST", "/api/chat", chat("hi", "auto:complex"))
        assert (reply.status, reply.headers["x-model"], reply.headers["x-tier"]) == (200, SMALL, "complex")
        assert reply.headers["x-fallback-reason"] == "model_missing"
        assert server.seen


async def test_facts_count_where_the_request_says_nothing(tmp_path: Path) -> None:
    async with (
        Scripted((SMALL, LARGE)).serving() as server,
        relaying(tmp_path, {"one": server}, config=CONFIG) as front,
    ):

        async def sent(path: str, body: dict[str, Any]) -> Any:
            assert (await ask(front, "POST", path, body)).status == 200
            return server.seen.pop().json()

        facts = {"temperature": 0.2, "num_ctx": 4096, "num_predict": 99}
        assert (await sent("/api/chat", chat("hi")))["options"] == facts
        body = chat("hi", SMALL, options={"temperature": 1, "num_predict": 5})
        assert (await sent("/api/chat", body))["options"] == {
            "temperature": 1,
            "num_ctx": 4096,
            "num_predict": 5,
        }
        found = await sent("/v1/chat/completions", chat("hi"))
        assert (found["temperature"], found["max_tokens"], "options" in found) == (0.2, 99, False)
        found = await sent("/v1/chat/completions", chat("hi", max_completion_tokens=7, temperature=0))
        assert (found["temperature"], found["max_completion_tokens"], "max_tokens" in found) == (0, 7, False)
        found = await sent("/v1/responses", {"model": SMALL, "input": "hi"})
        assert (found["temperature"], found["max_output_tokens"]) == (0.2, 99)
        found = await sent("/v1/messages", chat("hi", max_tokens=3))
        assert (found["temperature"], found["max_tokens"]) == (0.2, 3)
        assert "options" not in await sent("/api/chat", chat(HARD))  # the facts are of the other model


@pytest.mark.parametrize("path", ["/api/embed", "/v1/embeddings"])
async def test_embeddings_are_never_a_choice(tmp_path: Path, path: str) -> None:
    async with (
        Scripted((SMALL,)).serving() as server,
        relaying(tmp_path, {"one": server}, config=CONFIG) as front,
    ):
        reply = await ask(front, "POST", path, {"model": "auto", "input": "x"})
        assert reply.status == 404
        assert not server.seen


async def test_it_is_a_name_as_any_other_while_it_is_off(tmp_path: Path) -> None:
    config = {**CONFIG, "routing": {"auto": False}}
    async with (
        Scripted((SMALL, "auto")).serving() as server,
        relaying(tmp_path, {"one": server}, config=config) as front,
    ):
        reply = await ask(front, "POST", "/api/chat", chat("hi"))
        assert (reply.status, reply.headers["x-model"], "x-tier" in reply.headers) == (200, "auto", False)


async def test_a_tier_without_a_model_is_refused_in_words(tmp_path: Path) -> None:
    config = {**CONFIG, "roles": {"fast": {"model": SMALL}}}
    async with (
        Scripted((SMALL,)).serving() as server,
        relaying(tmp_path, {"one": server}, config=config) as front,
    ):
        for path in ("/api/chat", "/v1/chat/completions"):
            reply = await ask(front, "POST", path, chat(HARD))
            assert reply.status == 404
            assert b"set roles.complex.model" in reply.body
        assert not server.seen


async def test_a_choice_is_explained_before_and_after_it_was_made(tmp_path: Path) -> None:
    async with (
        Scripted((SMALL, LARGE)).serving() as server,
        relaying(tmp_path, {"one": server}, config=CONFIG) as front,
    ):
        explain = "/api/runtime/compute/explain?model=auto&text=" + HARD.replace(" ", "%20")
        found = (await ask(front, "GET", explain)).json()
        assert found["classification"] == {
            "task_type": "strategy",
            "tier": "complex",
            "confidence": 0.8,
            "reasoning": "it has 'strateg*'",
        }
        assert (found["role"], found["attempts"][0]["model"]) == ("complex", LARGE)
        assert found["summary"].startswith(
            "auto (task strategy, tier complex: it has 'strateg*') would go to one"
        )
        assert not server.seen
        reply = await ask(front, "POST", "/api/chat", chat(HARD))
        request_id = reply.headers["x-request-id"]
        await front.record()
        shown = (await ask(front, "GET", f"/api/runtime/compute/requests/{request_id}")).json()
        assert (shown["requested_model"], shown["tier"], shown["task_type"]) == (
            "auto",
            "complex",
            "strategy",
        )
        assert "(task strategy, tier complex: it has 'strateg*')" in shown["summary"]
        named = (await ask(front, "GET", "/api/runtime/compute/explain?model=small")).json()
        assert named["classification"] is None


async def test_a_choice_that_none_can_answer_is_explained(tmp_path: Path) -> None:
    config = {**CONFIG, "roles": {"fast": {"model": SMALL}}}
    async with (
        Scripted((SMALL,)).serving() as server,
        relaying(tmp_path, {"one": server}, config=config) as front,
    ):
        explain = "/api/runtime/compute/explain?model=auto:complex"
        found = (await ask(front, "GET", explain)).json()
        assert "set roles.complex.model" in found["refused"]["message"]
        assert "set roles.complex.model" in found["summary"]
        assert not server.seen


async def test_a_run_leaves_the_choice_too(tmp_path: Path) -> None:
    async with (
        Scripted((SMALL, LARGE)).serving() as server,
        relaying(tmp_path, {"one": server}, config=CONFIG) as front,
    ):
        body = {"path": "/api/chat", "body": chat(HARD)}
        reply = await front.ask(body, "/api/v1/runs", {"Content-Type": "application/json"})
        assert reply.status == 202
        record = await front.record()
        assert (record.model, record.tier, record.requested_model) == (LARGE, "complex", "auto")


async def test_clients_find_the_names_in_every_list_and_look_them_up(tmp_path: Path) -> None:
    async with (
        Scripted((SMALL,)).serving() as server,
        relaying(tmp_path, {"one": server}, config=CONFIG) as front,
    ):
        names = ("auto", "auto:fast", "auto:medium", "auto:complex")
        tags = (await ask(front, "GET", "/api/tags")).json()["models"]
        listed = {one["name"]: one["details"]["parent_model"] for one in tags}
        assert {name: listed.get(name) for name in ("auto:latest", *names[1:])} == dict.fromkeys(
            ("auto:latest", *names[1:]), f"{SMALL}:latest"
        )
        models = {one["id"]: one for one in (await ask(front, "GET", "/v1/models")).json()["data"]}
        assert [models[name]["model"] for name in names] == [SMALL] * 4  # that of `complex` is not there
        assert (await ask(front, "GET", "/v1/models/auto:complex")).json() == models["auto:complex"]
        for name in ("auto", "auto:latest", "auto:fast"):
            shown = await ask(front, "POST", "/api/show", {"model": name})
            assert (shown.status, server.seen.pop().json()["model"]) == (200, SMALL)
        assert (await ask(front, "POST", "/api/chat", chat("hi", "auto:latest"))).status == 200


async def test_names_are_in_no_list_while_they_mean_nothing(tmp_path: Path) -> None:
    async with (
        Scripted((SMALL,)).serving() as server,
        relaying(tmp_path, {"one": server}, config={**CONFIG, "routing": {"auto": False}}) as front,
    ):
        for path in ("/api/tags", "/v1/models"):
            assert b"auto" not in (await ask(front, "GET", path)).body
        assert (await ask(front, "POST", "/api/show", {"model": "auto"})).status == 404


async def test_an_unload_of_no_model_in_particular_is_refused(tmp_path: Path) -> None:
    async with (
        Scripted((SMALL, LARGE), loaded=(SMALL, LARGE)).serving() as server,
        relaying(tmp_path, {"one": server}, config=CONFIG) as front,
    ):
        reply = await ask(front, "POST", "/api/generate", {"model": "auto", "prompt": "", "keep_alive": 0})
        assert reply.status == 400
        assert b"stands for no model that could be unloaded" in reply.body
        assert not server.seen


async def test_a_key_keeps_its_limits(tmp_path: Path) -> None:
    async with (
        Scripted((SMALL, LARGE)).serving() as server,
        relaying(tmp_path, {"one": server}, config=CONFIG) as front,
    ):
        key = await Limited(front).make("small", roles=["fast"])
        assert (await front.ask(chat("hi"), "/api/chat", key)).headers["x-tier"] == "fast"
        refused = await front.ask(chat(HARD), "/api/chat", key)
        assert refused.status == 403
        assert b"the key 'small' may use only the roles fast, not 'complex'" in refused.body
        assert len(server.seen) == 1


@pytest.mark.parametrize("stage", ["observe", "shadow", "lanes"])
async def test_what_is_not_managed_passes_to_the_raw_server_as_it_came(tmp_path: Path, stage: str) -> None:
    raw = Scripted((SMALL, "auto"))
    async with raw.serving(), Scripted((SMALL,)).serving() as server:
        config = {
            **CONFIG,
            "roles": {"fast": {"model": SMALL}},
            "rollout": {"stage": stage, "raw_url": raw.url, "lanes": ["output"] if stage == "lanes" else []},
        }
        async with relaying(tmp_path, {"one": server}, config=config) as front:
            unload = {"model": "auto", "messages": [], "keep_alive": 0, "stream": False}
            for body in (chat("hi"), chat(HARD), unload):
                reply = await ask(front, "POST", "/api/chat", body)
                assert (reply.status, reply.headers["x-instance"]) == (200, "raw")
                assert (reply.headers["x-model"], "x-tier" in reply.headers) == ("auto", False)
                assert raw.seen.pop().json() == body
            record = await front.record(1)
            assert (record.model, record.tier) == ("auto", None if stage == "observe" else "complex")
            assert not server.seen
            assert front.at_rest


async def test_a_model_whose_instance_is_full_gives_way_to_the_next_one_of_its_tier(tmp_path: Path) -> None:
    async with Scripted((SMALL,)).serving() as one, Scripted(("quick",)).serving() as two:
        config = {
            "routing": {"auto": True},
            "roles": {"fast": {"model": SMALL}},
            "models": {"facts": {"quick": {"tier": "fast"}, SMALL: {"tier": "fast"}}},
            "instances": {
                name: {"driver": "external", "url": server.url, "slots": 1}
                for name, server in (("one", one), ("two", two))
            },
        }
        async with relaying(tmp_path, {"one": one, "two": two}, config=config) as front:
            begun, go_on = asyncio.Semaphore(0), asyncio.Event()

            async def waits(talk: Conversation) -> None:
                begun.release()
                await go_on.wait()
                await a_word(talk)

            one.answer = two.answer = waits
            asking = []
            for _ in range(2):
                asking.append(asyncio.create_task(ask(front, "POST", "/api/chat", chat("hi"))))
                await begun.acquire()
            asking.append(asyncio.create_task(ask(front, "POST", "/api/chat", chat("hi"))))
            go_on.set()
            first, second, third = await asyncio.gather(*asking)
            assert (first.headers["x-model"], "x-fallback-reason" in first.headers) == (SMALL, False)
            assert (second.headers["x-model"], second.headers["x-fallback-reason"]) == ("quick", "overloaded")
            assert third.status == 200  # it has waited for any of both
            assert front.at_rest


async def test_two_models_of_a_tier_share_the_slots_of_their_instance(tmp_path: Path) -> None:
    async with Scripted((SMALL, "quick")).serving() as one:
        config = {
            "routing": {"auto": True},
            "roles": {"fast": {"model": SMALL}},
            "models": {"facts": {"quick": {"tier": "fast"}}},
            "instances": {"one": {"driver": "external", "url": one.url, "slots": 1}},
        }
        async with relaying(tmp_path, {"one": one}, config=config) as front:
            replies = await asyncio.gather(*(ask(front, "POST", "/api/chat", chat("hi")) for _ in range(5)))
            assert [reply.status for reply in replies] == [200] * 5
            assert front.at_rest

            async def fails(talk: Conversation) -> None:
                if talk.seen.json()["model"] == SMALL:
                    await talk.whole(503, b'{"error": "busy"}')
                else:
                    await a_word(talk)

            one.answer = fails
            reply = await ask(front, "POST", "/api/chat", chat("hi"))
            assert (reply.status, reply.headers["x-model"]) == (200, "quick")
            assert front.at_rest
