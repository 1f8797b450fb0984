"""`/api/v1/collections` from outside: a daemon, its store, its tables, and a server whose model changes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.collections import PATH, error_of, fields_of, message_of, raw
from tests.support.daemon import wait_for
from tests.support.embedding_server import DIMENSIONS, MODEL, digest_of, vector_of

if TYPE_CHECKING:
    from tests.support.collections import Collection
    from tests.support.gateway import Gateway

COLLECTION = {
    "name", "model", "prefix", "dimensions", "truncate", "keep_text", "created_at", "version", "state",
    "items",
    "coverage", "versions", "backfill",
}  # fmt: skip
VERSION = {
    "version", "model", "digest", "dimensions", "prefix", "truncate", "policy", "state", "items", "rows",
    "quarantined", "coverage", "created_at", "activated_at", "archived_at", "stale_since",
}  # fmt: skip
BACKFILL = {
    "version", "model", "status", "threshold", "rate", "auto_cutover", "items", "rows", "missing",
    "quarantined", "coverage", "items_per_s", "eta_s", "waits_for", "error", "started_at", "ended_at",
    "failures",
}  # fmt: skip


# --- collections ----------------------------------------------------------------------------------


def test_a_collection_has_the_model_of_the_role_unless_one_is_named(docs: Collection) -> None:
    made = docs.good("GET")
    assert set(made) == COLLECTION
    assert (made["model"], made["version"], made["state"], made["coverage"]) == (MODEL, None, None, None)
    assert (made["items"], made["versions"], made["backfill"], made["keep_text"]) == (0, 0, None, True)
    listed = docs.gateway.get(PATH)
    assert listed["count"] == len(listed["collections"])
    assert made in listed["collections"]
    other = f"{docs.name}-other"
    body = {"name": other, "model": "elsewhere:7b", "prefix": "p: ", "dimensions": 8, "truncate": True}
    answer = docs.gateway.call("POST", PATH, json=body | {"keep_text": False})
    assert answer.status_code == 201
    assert {name: answer.json()[name] for name in body} == body
    assert docs.gateway.call("DELETE", f"{PATH}/{other}").json() == {"removed": other}
    assert error_of(docs.gateway.call("GET", f"{PATH}/{other}")) == (404, "unknown_collection")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": "Docs"}, "body.name"),
        ({"name": "a" * 64}, "body.name"),
        ({"name": "a..b"}, "body.name"),
        ({"name": None}, "body.name"),
        ({"model": "tiny@one"}, "body.model"),
        ({"model": "no such name"}, "body.model"),
        ({"model": "output"}, "body.model"),
        ({"model": ""}, "body.model"),
        ({"dimensions": 0}, "body.dimensions"),
        ({"dimensions": 16.0}, "body.dimensions"),
        ({"dimensions": True}, "body.dimensions"),
        ({"prefix": "x" * 1001}, "body.prefix"),
        ({"prefix": "\ud800"}, "body.prefix"),
        ({"truncate": 1}, "body.truncate"),
        ({"keep_text": "yes"}, "body.keep_text"),
        ({"keeptext": True}, "body.keeptext"),
    ],
)
def test_a_collection_that_cannot_be_is_refused_by_field(
    gateway: Gateway, changes: dict[str, Any], field: str
) -> None:
    body = {"name": "refused"} | changes
    answer = gateway.call("POST", PATH, data=json.dumps(body), headers={"Content-Type": "application/json"})
    assert fields_of(answer) == [field]
    assert error_of(gateway.call("GET", f"{PATH}/refused")) == (404, "unknown_collection")


def test_a_role_without_a_model_is_told_with_the_way_to_set_one(gateway: Gateway) -> None:
    answer = gateway.call("POST", PATH, json={"name": "refused", "model": "output"})
    assert "roles set output model=MODEL" in message_of(answer)


def test_a_name_is_taken_once(docs: Collection) -> None:
    answer = docs.gateway.call("POST", PATH, json={"name": docs.name})
    assert error_of(answer) == (409, "collection_exists")


# --- versions -------------------------------------------------------------------------------------


def test_a_model_change_is_a_backfill_a_cutover_and_a_rollback(docs: Collection) -> None:
    docs.put(*({"id": str(n), "text": f"text {n}"} for n in range(40)))
    old = docs.good("GET")["version"]
    done = docs.changed("second")
    assert done["status"] == "succeeded", done
    new = done["version"]
    assert (done["items"], done["rows"], done["missing"], done["coverage"]) == (40, 40, 0, 1.0)
    versions = docs.good("GET", "/versions")
    assert all(set(one) == VERSION for one in versions)
    # The old build is gone: what it made is stale, and still answers vectors.
    known = {one["version"]: (one["digest"], one["rows"], one["coverage"]) for one in versions}
    assert known == {old: (digest_of("first"), 40, 1.0), new: (digest_of("second"), 40, 1.0)}
    vector = vector_of(digest_of("second"), "text 3")
    asked = docs.good("POST", "/query", {"vector": vector})
    assert (asked["version"], asked["active"]) == (old, True)
    named = docs.good("POST", "/query", {"text": "text 3", "version": new})
    assert (named["version"], named["active"], named["state"]) == (new, False, "building")
    assert {one["embedding_version"] for one in named["items"]} == {new}
    assert named["items"][0]["id"] == "3"

    after = docs.good("POST", "/cutover", {"version": new})
    assert (after["version"], after["state"], after["coverage"]) == (new, "active", 1.0)
    assert docs.good("POST", "/query", {"text": "text 3"})["version"] == new
    assert error_of(docs.ask("DELETE", f"/versions/{new}")) == (409, "version_active")
    assert error_of(docs.ask("POST", "/cutover", {"version": new})) == (409, "version_active")
    assert error_of(docs.ask("POST", "/rollback")) == (409, "version_stale"), "no instance has that build"

    docs.server.become("first")
    wait_for(lambda: docs.ask("POST", "/rollback"), lambda answer: answer.status_code == 200)
    assert docs.good("GET")["version"] == old
    assert docs.good("POST", "/query", {"text": "text 3"})["version"] == old
    assert docs.good("DELETE", f"/versions/{new}") == {"removed": new}
    assert [one["version"] for one in docs.good("GET", "/versions")] == [old]
    events = [event for event in docs.gateway.events() if (event["detail"] or "").startswith(docs.name)]
    assert [event["kind"] for event in events] == [
        "collection_created", "backfill_started", "backfill_succeeded", "collection_cut_over",
        "collection_rolled_back", "version_removed",
    ] or "version_stale" in {event["kind"] for event in events}  # fmt: skip


def test_a_cutover_below_the_threshold_says_what_is_missing(docs: Collection) -> None:
    docs.put(
        *({"id": str(n), "text": f"text {n}"} for n in range(3)), {"id": "v", "vector": [1.0] * DIMENSIONS}
    )
    done = docs.changed("second")
    assert (done["status"], done["quarantined"], done["rows"]) == ("succeeded", 1, 3)
    (failure,) = done["failures"]
    assert (failure["id"], failure["quarantined"]) == ("v", True)
    docs.put({"id": "w", "vector": [1.0] * DIMENSIONS})
    answer = docs.ask("POST", "/cutover", {"version": done["version"]})
    assert error_of(answer) == (409, "below_threshold")
    details = answer.json()["error"]["details"]
    assert (details["missing"], details["missing_ids"]) == (1, ["w"])
    assert (details["quarantined"], details["quarantined_ids"]) == (1, ["v"])
    for threshold in (0, 1.01, -1, "1", True):
        answer = docs.ask("POST", "/cutover", {"version": done["version"], "threshold": threshold})
        assert fields_of(answer) == ["body.threshold"]
        assert fields_of(docs.ask("POST", "/rollback", {"threshold": threshold})) == ["body.threshold"]
    assert (
        docs.good("POST", "/cutover", {"version": done["version"], "threshold": 0.5})["version"]
        == done["version"]
    )


def test_a_backfill_can_be_paused_resumed_and_cancelled(docs: Collection) -> None:
    docs.put(*({"id": str(n), "text": f"text {n}"} for n in range(50)))
    docs.server.become("second")
    assert docs.ask("POST", "/backfill", {"rate": 0.001}).status_code == 202
    assert error_of(docs.ask("POST", "/backfill", {})) == (409, "backfill_open")
    assert docs.good("POST", "/backfill/pause")["status"] == "paused"
    assert docs.good("POST", "/backfill/pause")["status"] == "paused"
    assert docs.good("GET")["backfill"] == "paused"
    assert docs.good("POST", "/backfill/resume")["status"] == "running"
    cancelled = docs.good("POST", "/backfill/cancel")
    assert (cancelled["status"], set(cancelled)) == ("cancelled", BACKFILL)
    assert cancelled["ended_at"] is not None
    assert error_of(docs.ask("POST", "/backfill/resume")) == (409, "backfill_ended")
    states = {one["version"]: one["state"] for one in docs.good("GET", "/versions")}
    assert states[cancelled["version"]] == "archived"


def test_a_backfill_may_cut_over_by_itself_with_another_recipe(docs: Collection) -> None:
    docs.put({"id": "a", "text": "x"})
    done = docs.changed(
        "second", prefix="passage: ", dimensions=8, auto_cutover=True, threshold=0.9, rate=100
    )
    assert (done["status"], done["threshold"], done["rate"], done["auto_cutover"]) == (
        "succeeded",
        0.9,
        100.0,
        True,
    )
    collection = docs.good("GET")
    assert (collection["version"], collection["prefix"], collection["dimensions"]) == (
        done["version"],
        "passage: ",
        8,
    )
    assert "passage: x" in docs.server.texts


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"threshold": 0}, "body.threshold"),
        ({"threshold": float("nan")}, "body.threshold"),
        ({"rate": 0}, "body.rate"),
        ({"rate": float("inf")}, "body.rate"),
        ({"rate": "fast"}, "body.rate"),
        ({"model": "tiny@one"}, "body.model"),
        ({"model": "output"}, "body.model"),
        ({"auto_cutover": 1}, "body.auto_cutover"),
        ({"dimensions": 9000}, "body.dimensions"),
        ({"speed": 1}, "body.speed"),
    ],
)
def test_a_backfill_that_cannot_be_is_refused_by_field(
    docs: Collection, changes: dict[str, Any], field: str
) -> None:
    docs.put({"id": "a", "text": "x"})
    headers = {"Content-Type": "application/json"}
    answer = docs.ask("POST", "/backfill", data=json.dumps(changes), headers=headers)
    assert fields_of(answer) == [field]
    assert error_of(docs.ask("GET", "/backfill")) == (404, "unknown_backfill")


def test_a_model_that_no_instance_has_embeds_nothing(docs: Collection) -> None:
    docs.put({"id": "a", "text": "x"})
    answer = docs.ask("POST", "/backfill", {"model": "elsewhere:7b"})
    assert error_of(answer) == (404, "model_missing")


def test_a_build_that_was_replaced_refuses_texts_and_says_what_to_do(docs: Collection) -> None:
    docs.put({"id": "a", "text": "x"})
    docs.server.become("second")
    for answer in (
        docs.ask("PUT", "/items", {"items": [{"id": "b", "text": "y"}]}),
        docs.ask("POST", "/query", {"text": "y"}),
    ):
        assert error_of(answer) == (409, "version_stale")
        assert "backfill" in message_of(answer)
    assert docs.good("GET")["items"] == 1


# --- all routes -----------------------------------------------------------------------------------

ROUTES = [
    ("GET", "", None),
    ("DELETE", "", None),
    ("PUT", "/items", {"items": [{"id": "a", "text": "x"}]}),
    ("GET", "/items", None),
    ("GET", "/items/a", None),
    ("DELETE", "/items/a", None),
    ("POST", "/query", {"text": "x"}),
    ("GET", "/versions", None),
    ("DELETE", "/versions/0000000000000000", None),
    ("POST", "/cutover", {"version": "0000000000000000"}),
    ("POST", "/rollback", None),
    ("GET", "/backfill", None),
    ("POST", "/backfill", {}),
    *(("POST", f"/backfill/{verb}", None) for verb in ("pause", "resume", "cancel")),
]


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
@pytest.mark.parametrize("name", ["nothing", "..", "%2F", "items", "A" * 300, "%F0%9F%99%82"])
def test_a_collection_that_is_not_there_is_404(
    gateway: Gateway, method: str, path: str, body: Any, name: str
) -> None:
    content = b"" if body is None else json.dumps(body).encode()
    answer = raw(gateway, method, f"{PATH}/{name}{path}", content)
    assert answer.status == 404
    assert answer.error["code"] == "unknown_collection"


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
def test_an_unknown_parameter_is_refused(docs: Collection, method: str, path: str, body: Any) -> None:
    assert fields_of(docs.ask(method, f"{path}?x=1", body)) == ["query.x"]


def test_nothing_of_this_was_a_defect(gateway: Gateway) -> None:
    log = gateway.log()
    assert "Traceback" not in log
    assert "request_failed" not in log
