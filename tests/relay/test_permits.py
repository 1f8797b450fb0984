"""What a key permits, over real sockets: requests, lists, runs and uploads; no header grants any more."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.keys import Scope
from manager.domain.routing import Attempt
from manager.services.models.volumes import Volumes
from tests.support.inside import until
from tests.support.limited import Limited
from tests.support.relaying import LAST, Conversation, Front, Scripted, relaying

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

CHAT, OPENAI, ANTHROPIC, RUNS = "/api/chat", "/v1/chat/completions", "/v1/messages", "/api/v1/runs"
JSON = {"Content-Type": "application/json"}
UPLOAD = {"Content-Type": "multipart/form-data; boundary=b"}
CONFIG = {
    "roles": {
        "chat": {"model": "small", "fallbacks": ["spare"]},
        "spare": {"model": "other"},
        "think": {"model": "big"},
    }
}


async def answers(talk: Conversation) -> None:
    await talk.whole(200, LAST.strip())


def body(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": False, **more}


def form(model: str) -> bytes:
    fields = f'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n{model}\r\n'
    file = '--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n--b--\r\n'
    return (fields + file).encode()


class Place(Limited):
    """Two servers: `a` has `small` and `big`, `b` has `small` and `other`."""

    def __init__(self, front: Front, a: Scripted, b: Scripted) -> None:
        super().__init__(front)
        self.a, self.b = a, b

    @property
    def asked(self) -> dict[str, int]:
        return {"a": len(self.a.seen), "b": len(self.b.seen)}

    async def submit(self, key: Mapping[str, str], wanted: Mapping[str, Any]) -> str:
        reply = await self.front.ask({"path": CHAT, "body": wanted}, RUNS, {**key, **JSON})
        assert reply.status == 202, reply.body
        run_id: str = reply.json()["id"]
        return run_id

    async def ended(self, key: dict[str, str], run_id: str) -> dict[str, Any]:
        async with asyncio.timeout(20):
            while (run := (await self.call("GET", f"{RUNS}/{run_id}", key)).json())["ended_at"] is None:
                pass
        return dict(run)


@asynccontextmanager
async def permitting(tmp_path: Path) -> AsyncIterator[Place]:
    a, b = Scripted(("small", "big"), loaded=("small", "big")), Scripted(("small", "other"), ("small",))
    a.answer = b.answer = answers
    async with a.serving(), b.serving(), relaying(tmp_path, {"a": a, "b": b}, config=CONFIG) as front:
        yield Place(front, a, b)


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with permitting(tmp_path) as found:
        yield found


# --- requests -------------------------------------------------------------------------------------


async def test_what_a_key_does_not_permit_is_a_403_in_each_dialect_and_asks_nobody(place: Place) -> None:
    ci = await place.make("ci", models=["small"])
    told = "the key 'ci' may use only the models small, not 'big:latest' (forbidden)"
    for path in (CHAT, OPENAI, ANTHROPIC):
        reply = await place.front.ask(body("big", max_tokens=1), path, ci)
        assert reply.status == 403
        error = reply.json()["error"]
        if path == CHAT:
            assert error == told
        else:
            assert (error["type"], error["message"]) == ("permission_error", told)
    reply = await place.front.ask(form("big"), "/v1/audio/transcriptions", {**ci, **UPLOAD})
    assert (reply.status, reply.json()["error"]["message"]) == (403, told)
    assert place.asked == {"a": 0, "b": 0}
    assert [(one.outcome, one.fallback_reason, one.status) for one in place.front.records] == [
        ("refused", "policy", 403)
    ] * 4
    assert (await place.front.ask(body("small"), headers=ci)).status == 200


@pytest.mark.parametrize(
    ("model", "headers", "told"),
    [
        ("small", {"X-Instance": "a"}, "instances b, not 'a'"),
        ("small@a", {}, "instances b, not 'a'"),
        ("small@a", {"X-Instance": "b"}, "instances b, not 'a'"),
        ("big", {"X-Lane": "chat"}, "roles chat, not 'big'"),
        ("small", {"X-Lane": "think"}, "roles chat, not 'think'"),
        ("think", {"X-Lane": "chat"}, "roles chat, not 'think'"),
        ("other", {"X-Project-ID": "spare"}, "roles chat, not 'other'"),
    ],
)
async def test_no_header_and_no_pin_grants_what_the_key_does_not_have(
    place: Place, model: str, headers: dict[str, str], told: str
) -> None:
    ci = await place.make("ci", roles=["chat"], instances=["b"])
    reply = await place.front.ask(body(model), headers={**ci, **headers})
    error = f"the key 'ci' may use only the {told} (forbidden)"
    assert (reply.status, reply.json()) == (403, {"error": error})
    assert place.asked == {"a": 0, "b": 0}


async def test_requests_of_a_key_go_to_its_instances_only(place: Place) -> None:
    ci = await place.make("ci", instances=["b"])
    replies = await asyncio.gather(*(place.front.ask(body("chat"), headers=ci) for _ in range(8)))
    assert {reply.status for reply in replies} == {200}
    assert place.asked == {"a": 0, "b": 8}


async def test_a_failed_attempt_is_not_followed_by_one_that_the_key_does_not_permit(place: Place) -> None:
    async def fails(talk: Conversation) -> None:
        await talk.whole(503, b'{"error":"busy"}')

    place.a.answer = fails
    ci = await place.make("ci", roles=["chat"], instances=["a"])
    assert (await place.front.ask(body("chat"), headers=ci)).status == 503
    assert place.asked == {"a": 1, "b": 0}


async def test_an_unload_reaches_only_the_instances_of_the_key(place: Place) -> None:
    ci = await place.make("ci", instances=["b"])
    reply = await place.front.ask({"model": "small", "keep_alive": 0}, "/api/generate", ci)
    assert reply.status == 200
    assert place.asked == {"a": 0, "b": 1}
    root = await place.front.ask({"model": "small", "keep_alive": 0}, "/api/generate", place.root)
    assert root.status == 200
    assert place.asked == {"a": 1, "b": 2}


async def test_a_conversation_does_not_lead_to_an_instance_that_the_key_does_not_permit(place: Place) -> None:
    ci = await place.make("ci", instances=["b"])
    await place.front.ask(body("small"), headers={**place.root, "X-Instance": "a"})
    await place.front.ask(body("small"), headers=ci)
    assert place.asked == {"a": 1, "b": 1}


async def test_the_project_of_a_key_counts_for_uploads_too(place: Place) -> None:
    ci = await place.make("ci", project="shop")
    headers = {**ci, **UPLOAD, "X-Project-ID": "else"}
    await place.front.ask(form("small"), "/v1/audio/transcriptions", headers)
    assert ((await place.front.record()).project_id, place.front.records[0].key) == ("shop", "ci")


async def test_decisions_of_keys_are_remembered_apart_and_bounded(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manager.services.routing.router._MAX_DECISIONS_BY_KEY", 3)
    router = place.front.daemon.backend.passing.routing.router
    for number in range(5):
        key = await place.make(f"ci{number}", models=["*"])
        assert (await place.front.ask(body("small"), headers=key)).status == 200
        assert len(router._decisions_by_key) <= 3
        assert all(facts.permit is None for facts in router._decisions)


# --- lists ----------------------------------------------------------------------------------------


async def lists(place: Place, key: dict[str, str]) -> dict[str, list[str]]:
    tags = (await place.call("GET", "/api/tags", key)).json()["models"]
    models = (await place.call("GET", "/v1/models", key)).json()["data"]
    loaded = (await place.call("GET", "/api/ps", key)).json()["models"]
    return {
        "tags": sorted(one["name"].removesuffix(":latest") for one in tags),
        "models": sorted(one["id"].removesuffix(":latest") for one in models),
        "ps": sorted(f"{one['name'].removesuffix(':latest')}@{one['instance']}" for one in loaded),
    }


@pytest.mark.parametrize(
    ("limits", "names", "loaded"),
    [
        ({}, ["big", "chat", "other", "small", "spare", "think"], ["big@a", "small@a", "small@b"]),
        ({"models": ["s*"]}, ["chat", "small"], ["small@a", "small@b"]),
        ({"instances": ["b"]}, ["chat", "other", "small", "spare"], ["small@b"]),
        ({"roles": ["chat"]}, ["chat"], ["small@a", "small@b"]),
        ({"roles": ["think"], "models": ["big"]}, ["big", "think"], ["big@a"]),
        ({"roles": ["think"], "models": ["small"], "instances": ["a"]}, ["small"], ["small@a"]),
    ],
)
async def test_lists_have_what_the_key_permits(
    place: Place, limits: dict[str, Any], names: list[str], loaded: list[str]
) -> None:
    ci = await place.make("ci", **limits)
    found = await lists(place, ci)
    # A role without a model at hand is in OpenAI's list only.
    assert {**found, "models": [one for one in found["models"] if one in names]} == {
        "tags": names,
        "models": names,
        "ps": loaded,
    }
    extra = set(found["models"]) - set(names)
    assert extra <= ({"think"} if limits == {"instances": ["b"]} else set())
    for name in ("big", "chat", "other", "small", "spare", "think"):
        reply = await place.call("GET", f"/v1/models/{name}", ci)
        assert (reply.status == 200) is (name in found["models"]), name
        shown = await place.front.ask({"model": name}, "/api/show", ci)
        assert (shown.status == 404) is (name not in names), (name, shown.body)
    listed = (await place.call("GET", "/v1/models", ci)).json()["data"]
    if "instances" in limits:
        assert {id_ for one in listed for id_ in one.get("instances", [])} == set(limits["instances"])


async def test_show_asks_only_instances_of_the_key(place: Place) -> None:
    ci = await place.make("ci", instances=["b"])
    for _ in range(3):
        reply = await place.front.ask({"model": "chat"}, "/api/show", ci)
        assert (reply.status, reply.headers.get("x-instance")) == (200, "b"), reply
    reply = await place.front.ask({"model": "small"}, "/api/show", {**ci, "X-Instance": "a"})
    assert (reply.status, reply.json()) == (
        403,
        {"error": "the key 'ci' may use only the instances b, not 'a' (forbidden)"},
    )


async def test_show_passes_over_other_instances_of_the_same_volume(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only instances that the daemon starts share a volume.
    both = tuple(Attempt(instance, "small", None, "running") for instance in ("a", "b"))
    monkeypatch.setattr(Volumes, "readers", lambda *_: both)
    ci = await place.make("ci", instances=["b"])
    shown = [await place.front.ask({"model": "small"}, "/api/show", key) for key in (place.root, ci)]
    assert [reply.headers["x-instance"] for reply in shown] == ["a", "b"]


async def test_a_404_names_only_what_the_key_permits(place: Place) -> None:
    ci = await place.make("ci", instances=["b"])
    text = (await place.front.ask(body("nope"), headers=ci)).json()["error"]
    assert "models: other" in text
    assert "big" not in text
    assert " a" not in text


async def test_explain_tells_what_a_key_permits(place: Place) -> None:
    await place.make("ci", instances=["b"])
    path = "/api/runtime/compute/explain?model=small"
    found = (await place.call("GET", f"{path}&key=ci")).json()
    assert [one["instance"] for one in found["attempts"]] == ["b"]
    detail = "the key 'ci' may use only the instances b, not 'a'"
    assert [(one["instance"], one["reason"], one["detail"]) for one in found["passed_over"]] == [
        ("a", "policy", detail)
    ]
    reply = await place.call("GET", f"{path}&key=nobody")
    assert (reply.status, reply.json()["error"]["code"]) == (404, "unknown_key")
    assert len((await place.call("GET", path)).json()["attempts"]) == 2


# --- runs -----------------------------------------------------------------------------------------


async def test_a_run_is_executed_within_its_key_and_keeps_the_name(place: Place) -> None:
    ci = await place.make("ci", instances=["b"], project="shop")
    run = await place.ended(ci, await place.submit({**ci, "X-Project-ID": "else"}, body("small")))
    assert (run["status"], run["key"], run["project_id"], run["instance"]) == ("succeeded", "ci", "shop", "b")
    assert [(one.key, one.project_id) for one in place.front.records] == [("ci", "shop")]
    run = await place.ended(ci, await place.submit(ci, body("big")))
    told = "the key 'ci' may use only the instances b, not 'a' (forbidden)"
    assert (run["status"], run["error"]) == ("failed", {"code": "forbidden", "message": told})
    assert (run["result"]["status"], place.asked["a"]) == (403, 0)


async def test_a_run_of_a_key_that_was_revoked_meanwhile_fails(place: Place) -> None:
    ci = await place.make("ci")
    place.front.daemon.backend.runs.pause()
    run_id = await place.submit(ci, body("small"))
    await place.keyring.revoke("ci")
    again = await place.make("ci")  # another key of that name is not the one that submitted it
    place.front.daemon.backend.runs.resume()
    run = await place.ended(place.root, run_id)
    told = "the key 'ci' that submitted this run is revoked or expired (forbidden)"
    assert (run["status"], run["error"]) == ("failed", {"code": "forbidden", "message": told})
    assert place.asked == {"a": 0, "b": 0}
    assert (await place.call("GET", f"{RUNS}/{run_id}", again)).status == 404
    assert (await place.call("GET", RUNS, again)).json()["runs"] == []


async def test_a_key_sees_its_own_runs_only_and_an_operator_all(place: Place) -> None:
    ci, other = await place.make("ci"), await place.make("other")
    operator = await place.make("ops", Scope.OPERATOR, Scope.CLIENT)
    run_id = await place.submit(ci, body("small"))
    theirs = await place.submit(other, body("small"))
    await place.ended(ci, run_id)
    await place.ended(other, theirs)

    async def listed(key: dict[str, str]) -> set[str]:
        return {one["id"] for one in (await place.call("GET", RUNS, key)).json()["runs"]}

    assert await listed(ci) == {run_id}
    assert await listed(other) == {theirs}
    assert await listed(operator) == await listed(place.root) == {run_id, theirs}
    missing = json.loads((await place.call("GET", f"{RUNS}/run_0000000000000000", other)).body)
    for method, path in (("GET", ""), ("GET", "/result"), ("DELETE", "")):
        reply = await place.call(method, f"{RUNS}/{run_id}{path}", other)
        text = reply.json()["error"]["message"].replace(run_id, "run_0000000000000000")
        assert (reply.status, text) == (404, missing["error"]["message"]), (method, path)
        assert (await place.call(method, f"{RUNS}/{run_id}{path}", operator)).status in (200, 409)


async def test_a_waiting_run_is_cancelled_by_its_own_key_only(place: Place) -> None:
    ci, other = await place.make("ci"), await place.make("other")
    place.front.daemon.backend.runs.pause()
    run_id = await place.submit(ci, body("small"))
    assert (await place.call("DELETE", f"{RUNS}/{run_id}", other)).status == 404
    assert (await place.call("GET", f"{RUNS}/{run_id}", ci)).json()["status"] == "queued"
    assert (await place.call("DELETE", f"{RUNS}/{run_id}", ci)).json()["status"] == "cancelled"
    await until(lambda: place.in_flight("ci") == 0)
