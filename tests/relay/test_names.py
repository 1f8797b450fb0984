"""What a name in a request means, and what is said where it means nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.support.inside import until
from tests.support.relaying import Scripted, relaying
from tests.support.storing import ask

if TYPE_CHECKING:
    from pathlib import Path

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": False}
MESSAGES = {**CHAT, "max_tokens": 4}


async def test_a_copy_under_a_roles_name_does_not_take_the_role_over(tmp_path: Path) -> None:
    roles = {"embedding": {"model": "minilm", "policy": "cpu_only", "target": "cpu"}}
    cpu, gpu = Scripted(("minilm", "embedding")), Scripted(("minilm", "embedding"), loaded=("embedding",))
    async with (
        cpu.serving(),
        gpu.serving(),
        relaying(
            tmp_path,
            {"gpu": gpu, "cpu": cpu},
            config={"roles": roles},
            devices={"gpu": "gpu", "cpu": "cpu"},
        ) as front,
    ):
        for path, model, sent in (
            ("/api/embed", "embedding", "minilm"),
            ("/v1/embeddings", "Embedding", "minilm"),
            ("/api/embeddings", "minilm", "minilm"),
            ("/api/embed", "MiniLM:latest", "MiniLM:latest"),
        ):
            body = {"model": model, "input": "x", "prompt": "x"}
            reply = await ask(front, "POST", path, body)
            assert (reply.status, reply.headers["x-instance"]) == (200, "cpu"), (path, model)
            assert cpu.seen.pop().json()["model"] == sent
        assert not gpu.seen
        reply = await ask(front, "POST", "/api/embed", {"model": "embedding:latest", "input": "x"})
        assert reply.headers["x-instance"] == "gpu"
        await until(lambda: len(front.records) == 5)
        assert [record.role for record in front.records] == ["embedding"] * 4 + [None]


@pytest.mark.parametrize(
    ("path", "body"),
    [("/api/chat", CHAT), ("/v1/chat/completions", CHAT), ("/v1/messages", MESSAGES), ("/api/embed", CHAT)],
)
async def test_an_unknown_lane_is_refused_in_the_words_of_the_client(
    tmp_path: Path, path: str, body: dict[str, object]
) -> None:
    roles = {f"own-{number:02}": {"model": "tiny"} for number in range(20)}
    async with (
        Scripted().serving() as server,
        relaying(tmp_path, {"a": server}, config={"roles": roles}) as front,
    ):
        reply = await front.ask(body, path, {"X-Lane": "fast"})
        error = reply.json()["error"]
        message = error if isinstance(error, str) else error["message"]
        assert reply.status == 400
        assert message.startswith("there is no lane 'fast'; lanes: thinking, control,")
        assert message.endswith("own-04 and 15 more")
        assert isinstance(error, str) or error["type"] == "invalid_request_error"
        assert not server.seen
        nameless = {key: value for key, value in body.items() if key != "model"}
        assert (await front.ask(nameless, path, {"X-Lane": "fast"})).status == 400


NOT_CHAT = "does embed, and this request wants to generate; lanes for that: thinking"
NOT_VECTORS = "and this request wants to embed; lanes for that: embedding"


@pytest.mark.parametrize(
    ("path", "body", "lane", "words"),
    [
        (
            "/api/chat",
            CHAT,
            "embedding",
            NOT_CHAT,
        ),
        (
            "/v1/chat/completions",
            CHAT,
            "embedding",
            NOT_CHAT,
        ),
        ("/v1/messages", MESSAGES, "embedding", NOT_CHAT),
        (
            "/api/embed",
            {"model": "tiny", "input": "x"},
            "thinking",
            NOT_VECTORS,
        ),
    ],
)
async def test_a_lane_for_other_requests_is_refused_in_the_words_of_the_client(
    tmp_path: Path, path: str, body: dict[str, object], lane: str, words: str
) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        reply = await front.ask(body, path, {"X-Lane": lane})
        error = reply.json()["error"]
        message = error if isinstance(error, str) else error["message"]
        assert reply.status == 400
        assert message.startswith(f"X-Lane: the lane {lane!r}")
        assert words in message
        assert isinstance(error, str) or error["type"] == "invalid_request_error"
        assert not server.seen


async def test_an_unknown_name_is_a_404_although_a_server_was_never_reached(tmp_path: Path) -> None:
    async with Scripted(("tiny",)).serving() as server:
        instances = {
            "a": {"driver": "external", "url": server.url},
            "nas": {"driver": "external", "url": "http://127.0.0.1:9"},  # discard: nobody listens there
        }
        async with relaying(tmp_path, {"a": server}, config={"instances": instances}) as front:
            reply = await front.ask({**CHAT, "model": "tony"}, "/api/chat")
            assert reply.status == 404
            assert reply.json()["error"].startswith(
                "model 'tony' not found; models: tiny:latest; could not be asked: nas ("
            )
            reply = await ask(front, "POST", "/api/show", {"model": "tony"})
            assert reply.status == 404
            assert reply.json()["error"].startswith("model 'tony' not found; could not be asked: nas (")
            reply = await front.ask({**CHAT, "model": "tony@nas"}, "/api/chat")
            assert reply.status == 503


async def test_what_nobody_has_is_told_as_ollama_tells_it_and_names_ten_things_at_most(
    tmp_path: Path,
) -> None:
    models = tuple(f"m{number:03}" for number in range(40))
    async with Scripted(models).serving() as server, relaying(tmp_path, {"a": server}) as front:
        for path, body, beginning in (
            ("/api/chat", CHAT, "model 'nope' not found; models: m000:latest, "),
            ("/v1/messages", MESSAGES, "model 'nope' not found; models: "),
            ("/api/embed", {"input": "x"}, 'model "nope" not found, try pulling it first; models: '),
            ("/v1/embeddings", {"input": "x"}, 'model "nope" not found, try pulling it first; models: '),
        ):
            reply = await front.ask({**body, "model": "nope"}, path)
            error = reply.json()["error"]
            message = error if isinstance(error, str) else error["message"]
            assert reply.status == 404, path
            assert message.startswith(beginning), message
            assert message.endswith("m009:latest and 30 more"), message


async def test_a_model_that_differs_between_instances_is_an_event_and_shown(tmp_path: Path) -> None:
    same, other = Scripted(), Scripted()
    other.digest = "another"
    async with (
        same.serving() as one,
        other.serving() as two,
        relaying(tmp_path, {"a": one, "b": two}) as front,
    ):
        (entry,) = json.loads((await ask(front, "GET", "/v1/models")).body)["data"]
        assert entry["digests"] == {"d": ["a"], "another": ["b"]}
        await until(lambda: "models_differ" in front.kinds())


async def test_a_model_that_never_answered_has_no_latency(tmp_path: Path) -> None:
    names = ("tiny", "other")
    async with Scripted(names, names).serving() as server, relaying(tmp_path, {"a": server}) as front:
        await until(lambda: front.daemon.fleet.get("a").models)
        await front.ask({**CHAT, "stream": True})
        await until(lambda: len(front.records) == 1)
        listed = json.loads((await ask(front, "GET", "/v1/models")).body)["data"]
        latencies = {entry["id"]: entry["latency_ms"] for entry in listed}
        assert latencies["tiny:latest"] > 0
        assert latencies["other:latest"] is None


WHOLE = {"model": "tiny", "messages": [], "stream": False}


@pytest.mark.parametrize(
    "path", ["/api/chat", "/v1/chat/completions", "/v1/messages", "/api/show", "/api/pull"]
)
async def test_a_value_of_local_only_that_is_neither_true_nor_false_is_refused(
    tmp_path: Path, path: str
) -> None:
    async with (
        Scripted().serving() as server,
        relaying(tmp_path, {"a": server}, gateway={"headers": {"local_only": "X-At-Home"}}) as front,
    ):
        reply = await front.ask(WHOLE, path, {"X-At-Home": "perhaps"})
        assert reply.status == 400
        error = reply.json()["error"]
        message = error if isinstance(error, str) else error["message"]
        assert message == "x-at-home is 'perhaps'; allowed are true and false"
        assert server.seen == []
        assert (await front.record()).outcome == "client_error"
        assert (await front.ask(WHOLE, "/api/chat", {"X-Local-Only": "perhaps"})).status == 200
        assert (await front.ask(WHOLE, "/api/chat", {"X-At-Home": "true"})).status == 200
        await until(lambda: len(front.records) == 3)
        assert [record.local_only for record in front.records] == [False, False, True]
