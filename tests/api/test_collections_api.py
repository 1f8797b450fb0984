"""`/api/v1/collections` from outside: a daemon, its store, its tables, and a server whose model changes."""

from __future__ import annotations

import itertools
import json
import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from tests.api.raw_http import Answer, request, say
from tests.support.daemon import COMPUTE, wait_for
from tests.support.embedding_server import DIMENSIONS, MODEL, TOO_LONG, EmbeddingServer, digest_of, vector_of
from tests.support.gateway import Gateway, gateway_over

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import requests

PATH = "/api/v1/collections"
COLLECTION = {
    "name", "model", "prefix", "dimensions", "truncate", "keep_text", "created_at", "version", "state", "items",
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
_numbers = itertools.count()


class Client:
    """One collection of the daemon, and the server that embeds its texts."""

    def __init__(self, gateway: Gateway, server: EmbeddingServer, name: str) -> None:
        self.gateway, self.server, self.name = gateway, server, name
        self.path = f"{PATH}/{name}"

    def ask(self, method: str, path: str = "", json: Any = None, **options: Any) -> requests.Response:
        return self.gateway.call(method, self.path + path, json=json, **options)

    def good(self, method: str, path: str = "", json: Any = None, **options: Any) -> Any:
        answer = self.ask(method, path, json, **options)
        assert answer.ok, answer.text
        return answer.json()

    def put(self, *items: dict[str, Any]) -> Any:
        return self.good("PUT", "/items", {"items": items})

    def backfilled(self, *statuses: str) -> dict[str, Any]:
        return wait_for(lambda: self.good("GET", "/backfill"), lambda body: body["status"] in statuses)


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddingServer]:
    with EmbeddingServer() as server:
        yield server


@pytest.fixture(scope="module")
def gateway(server: EmbeddingServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    instances = {"one": {"driver": "external", "url": server.url}}
    config = {"roles": {"embedding": {"model": MODEL}}, "gateway": {"max_body": 8 * 2**20}}
    home = tmp_path_factory.mktemp("collections")
    with gateway_over(home, (), instances=instances, config=config) as gateway:
        gateway.wait_until_usable("one")
        yield gateway


@pytest.fixture
def docs(gateway: Gateway, server: EmbeddingServer) -> Iterator[Client]:
    """An empty collection of the test's own, over the first build of the model."""
    server.become("first", DIMENSIONS)
    client = Client(gateway, server, f"docs-{next(_numbers)}")
    made = gateway.call("POST", PATH, json={"name": client.name})
    assert made.status_code == 201, made.text
    yield client
    client.ask("DELETE")


def raw(gateway: Gateway, method: str, path: str, body: bytes = b"") -> Answer:
    """Send a path as it is; the connection stays open meanwhile, as a client keeps it."""
    length = f"Content-Length: {len(body)}"
    return say(
        gateway.port, request(path, "Content-Type: application/json", length, method=method), body, end=False
    )


def error_of(answer: requests.Response) -> tuple[int, str]:
    error = answer.json()["error"]
    assert set(error) <= {"code", "message", "details"}
    return answer.status_code, error["code"]


def fields_of(answer: requests.Response) -> list[str]:
    assert error_of(answer) == (422, "invalid_request"), answer.text
    return [one["field"] for one in answer.json()["error"]["details"]["fields"]]


def message_of(answer: requests.Response) -> str:
    return str(answer.json()["error"]["message"])


# --- collections ----------------------------------------------------------------------------------


def test_a_collection_has_the_model_of_the_role_unless_one_is_named(docs: Client) -> None:
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


def test_a_name_is_taken_once(docs: Client) -> None:
    answer = docs.gateway.call("POST", PATH, json={"name": docs.name})
    assert error_of(answer) == (409, "collection_exists")


# --- items ----------------------------------------------------------------------------------------


def test_items_are_embedded_and_say_what_embedded_them(docs: Client) -> None:
    written = docs.put({"id": "a", "text": "hello", "metadata": {"n": 1}}, {"id": "b", "text": "world"})
    version = docs.good("GET")["version"]
    assert written["created_at"]
    assert written == {
        "written": 2,
        "version": version,
        "versions": [version],
        "embedding_model": MODEL,
        "embedding_dim": DIMENSIONS,
        "embedding_version": version,
        "created_at": written["created_at"],
    }
    item = docs.good("GET", "/items/a")
    made = {"embedding_version": version, "embedding_model": MODEL, "embedding_dim": DIMENSIONS}
    assert item == {
        "id": "a",
        "text": "hello",
        "metadata": {"n": 1},
        "created_at": written["created_at"],
        **made,
        "versions": [{**made, "state": "active", "created_at": written["created_at"]}],
    }
    vector = docs.good("GET", "/items/a?vector=true")["vector"]
    assert vector == pytest.approx(vector_of(digest_of("first"), "hello"), abs=1e-6)
    assert docs.good("DELETE", "/items/a") == {"removed": "a"}
    assert error_of(docs.ask("GET", "/items/a")) == (404, "unknown_item")
    assert error_of(docs.ask("DELETE", "/items/a")) == (404, "unknown_item")
    assert docs.good("GET")["items"] == 1


def test_the_request_of_an_embed_is_in_the_history_by_its_route(docs: Client) -> None:
    headers = {"X-Project-ID": f"project-of-{docs.name}"}
    docs.good("PUT", "/items", {"items": [{"id": "a", "text": "x"}]}, headers=headers)
    docs.good("POST", "/query", {"text": "x"}, headers=headers)
    found = docs.gateway.get(f"{COMPUTE}/requests?project={headers['X-Project-ID']}")["requests"]
    assert {(one["path"], one["outcome"], one["effective_target"]) for one in found} == {
        (f"{PATH}/{{name}}/items", "ok", "one"),
        (f"{PATH}/{{name}}/query", "ok", "one"),
    }


def test_a_header_that_cannot_be_used_is_refused(docs: Client) -> None:
    body = {"items": [{"id": "a", "text": "x"}]}
    answer = docs.ask("PUT", "/items", body, headers={"X-Local-Only": "perhaps"})
    assert fields_of(answer) == ["header"]
    answer = docs.ask("PUT", "/items", body, headers={"X-Ollama-Instance": "nowhere"})
    assert answer.status_code == 404, "the pin of a request counts"
    assert docs.good("GET")["items"] == 0


@pytest.mark.parametrize(
    "item_id",
    [
        "a/b",
        "a%2Fb",
        "../..",
        "...",
        ".a",
        "?x=1#y",
        "ä ö/日本 🙂",
        "a+b c",
        "x" * 512,
        "🙂" * 512,
        "/",
        "//",
        "a/",
        "%",
        "%2e%2e",
        "'; --",
        "\u202e\u2028",
    ],
)
def test_an_id_may_be_anything_that_a_path_can_say(docs: Client, item_id: str) -> None:
    docs.put({"id": item_id, "text": "x"})
    path = f"/items/{quote(item_id, safe='')}"
    assert docs.good("GET", path)["id"] == item_id
    assert docs.good("GET", "/items")["items"][0]["id"] == item_id
    assert docs.good("DELETE", path) == {"removed": item_id}
    assert docs.good("GET")["items"] == 0


@pytest.mark.parametrize("item_id", [".", "..", "", "a\nb", "\x00", "\x7f", "x" * 513])
def test_an_id_that_no_path_can_say_is_refused(docs: Client, item_id: str) -> None:
    answer = docs.ask("PUT", "/items", {"items": [{"id": item_id, "text": "x"}]})
    assert fields_of(answer) == ["body.items.0.id"]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize(
    "behind",
    [
        "/items/..",
        "/items/.",
        "/items/%2E%2E",
        "/items/%2e.",
        "/items/../",
        "/items/x/..",
        "/",
        "/items/",
        "//",
    ],
)
def test_no_step_in_a_path_leads_from_an_item_to_its_collection(
    docs: Client, method: str, behind: str
) -> None:
    """Clients that resolve `..` themselves leave a slash at the end, which is the second half."""
    docs.put({"id": "a", "text": "x"})
    answer = raw(docs.gateway, method, docs.path + behind)
    assert answer.status == 404, answer
    assert docs.good("GET")["items"] == 1


def test_an_id_that_is_no_text_is_told(docs: Client) -> None:
    docs.put({"id": "\ufffd", "text": "x"})
    answer = raw(docs.gateway, "DELETE", f"{docs.path}/items/%FF")
    assert answer.status == 422
    assert docs.good("GET")["items"] == 1


def test_the_pages_have_all_items_in_the_order_of_their_ids(docs: Client) -> None:
    ids = sorted(f"{number:03}" for number in range(25))
    docs.put(*({"id": one, "text": f"text {one}", "metadata": {"id": one}} for one in reversed(ids)))
    found: list[str] = []
    after = ""
    while True:
        page = docs.good("GET", f"/items?limit=10{after}")
        assert page["count"] == len(page["items"]) <= 10
        assert all(one["text"] == f"text {one['id']}" for one in page["items"])
        assert all(one["metadata"] == {"id": one["id"]} for one in page["items"])
        found += [one["id"] for one in page["items"]]
        if page["next"] is None:
            break
        after = f"&after={page['next']}"
    assert found == ids
    assert docs.good("GET", "/items?limit=25")["next"] == "024"
    assert docs.good("GET", "/items?after=024") == {"items": [], "count": 0, "next": None}
    for query in ("limit=0", "limit=101", "limit=x", "befor=1"):
        assert fields_of(docs.ask("GET", f"/items?{query}")) == [f"query.{query.partition('=')[0]}"]


def test_a_vector_from_outside_is_brought_to_length_one(docs: Client) -> None:
    docs.put({"id": "a", "vector": [3, 4]}, {"id": "b", "vector": [0.0, -1e-300]})
    assert docs.good("GET", "/items/a?vector=true")["vector"] == pytest.approx([0.6, 0.8])
    assert docs.good("GET", "/items/b?vector=true")["vector"] == [0.0, -1.0]
    item = docs.good("GET", "/items/a")
    assert (item["text"], item["embedding_dim"]) == (None, 2)
    answer = docs.ask("PUT", "/items", {"items": [{"id": "c", "vector": [1, 2, 3]}]})
    assert fields_of(answer) == ["body.items.0.vector"]


def test_a_refused_item_is_named_and_nothing_is_written(docs: Client) -> None:
    items = [{"id": "a", "text": "x"}, {"id": "b", "text": f"an {TOO_LONG} text"}]
    answer = docs.ask("PUT", "/items", {"items": items})
    assert fields_of(answer) == ["body.items.1.text"]
    assert "'b'" in message_of(answer)
    assert docs.good("GET")["items"] == 0


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"[]", "body"),
        (b"{", "body"),
        (b"", "body"),
        (b"\xff", "body"),
        (b"{}", "body.items"),
        (b'{"items": {}}', "body.items"),
        (b'{"items": []}', "body.items"),
        (b'{"items": [1]}', "body.items.0"),
        (b'{"items": [{"id": "a", "text": "x"}], "more": 1}', "body.more"),
        (b'{"items": [], "items": []}', "body.items"),
        (b'{"items": [{"id": "a"}]}', "body.items.0"),
        (b'{"items": [{"id": "a", "text": "x", "vector": [1]}]}', "body.items.0"),
        (b'{"items": [{"id": "a", "text": ""}]}', "body.items.0.text"),
        (b'{"items": [{"id": "a", "text": 1}]}', "body.items.0.text"),
        (b'{"items": [{"id": "a", "text": "\\ud800"}]}', "body.items.0"),
        (b'{"items": [{"id": "a", "text": "x", "metadata": {"\\udc00": 1}}]}', "body.items.0"),
        (b'{"items": [{"id": "a", "vector": [1, NaN]}]}', "body"),
        (b'{"items": [{"id": "a", "vector": [1e400]}]}', "body.items.0"),
        (b'{"items": [{"id": "a", "vector": [1, "2"]}]}', "body.items.0.vector.1"),
        (b'{"items": [{"id": "a", "vector": [true]}]}', "body.items.0.vector.0"),
        (b'{"items": [{"id": "a", "vector": [0, 0]}]}', "body.items.0.vector"),
        (b'{"items": [{"id": "a", "vector": []}]}', "body.items.0.vector"),
        (b'{"items": [{"id": 1, "text": "x"}]}', "body.items.0.id"),
        (b'{"items": [{"text": "x"}]}', "body.items.0.id"),
        (b'{"items": [{"id": "a", "text": "x", "metadata": []}]}', "body.items.0.metadata"),
        (b'{"items": [{"id": "a", "text": "x", "metdata": {}}]}', "body.items.0.metdata"),
        (
            b'{"items": [{"id": "a", "text": "x", "metadata": %b1%b}]}' % (b'{"a":' * 300, b"}" * 300),
            "body.items.0.metadata",
        ),
        (
            b'{"items": [{"id": "a", "text": "x", "metadata": %b1%b}]}' % (b'{"a":' * 9000, b"}" * 9000),
            "body.items.0",
        ),
        (b'{"items": [{"id": "a", "text": "x", "metadata": {"a": "%b"}}]}' % (b"x" * 16384), "body.items.0.metadata"),
        (b'{"items": [{"id": "a", "text": "%b"}]}' % (b"x" * 100_001), "body.items.0.text"),
        (b'{"items": [{"id": "a", "vector": [1%b]}]}' % (b",1" * 8192), "body.items.0.vector"),
        (b'{"items": [%b{"id": "a", "text": "x"}]}' % b"".join(b'{"id": "%d", "text": "x"},' % n for n in range(1000)),
         "body.items"),
    ],
)  # fmt: skip
def test_a_body_that_is_wrong_is_refused_by_field(docs: Client, body: bytes, field: str) -> None:
    answer = docs.ask("PUT", "/items", data=body, headers={"Content-Type": "application/json"})
    assert fields_of(answer) == [field]
    assert docs.good("GET")["items"] == 0


def test_an_id_that_comes_twice_is_named_at_both_places(docs: Client) -> None:
    items = [{"id": one, "text": "x"} for one in ("a", "b", "a")]
    answer = docs.ask("PUT", "/items", {"items": items})
    assert fields_of(answer) == ["body.items.2.id"]
    assert "body.items.0" in message_of(answer)


def test_a_body_may_be_larger_than_others_but_not_larger_than_max_body(docs: Client) -> None:
    text = "x" * 100_000
    docs.put(*({"id": str(number), "text": text} for number in range(30)))
    assert docs.good("GET")["items"] == 30
    answer = docs.ask(
        "PUT", "/items", data=b" " * (8 * 2**20 + 1), headers={"Content-Type": "application/json"}
    )
    assert error_of(answer) == (413, "body_too_large")
    answer = docs.ask(
        "POST", "/query", data=b" " * (4 * 2**20 + 1), headers={"Content-Type": "application/json"}
    )
    assert error_of(answer) == (413, "body_too_large")


def test_a_body_that_does_not_say_that_it_is_json_is_refused(docs: Client) -> None:
    body = b'{"items": [{"id": "a", "text": "x"}]}'
    assert fields_of(docs.ask("PUT", "/items", data=body, headers={"Content-Type": "text/plain"})) == ["body"]


# --- queries --------------------------------------------------------------------------------------


def test_a_query_finds_the_nearest_items_of_the_active_version(docs: Client) -> None:
    texts = [f"text {number}" for number in range(20)]
    docs.put(*({"id": text, "text": text, "metadata": {"n": n}} for n, text in enumerate(texts)))
    answer = docs.good("POST", "/query", {"text": "text 7", "k": 5})
    version = docs.good("GET")["version"]
    assert {name: answer[name] for name in ("version", "active", "state", "model", "coverage")} == {
        "version": version, "active": True, "state": "active", "model": MODEL, "coverage": 1.0,
    }  # fmt: skip
    asked = vector_of(digest_of("first"), "text 7")
    scores = {text: math.sumprod(asked, vector_of(digest_of("first"), text)) if hasattr(math, "sumprod") else
              sum(a * b for a, b in zip(asked, vector_of(digest_of("first"), text), strict=True)) for text in texts}  # fmt: skip
    best = sorted(texts, key=lambda text: -scores[text])[:5]
    assert [one["id"] for one in answer["items"]] == best
    first = answer["items"][0]
    assert first == {
        "id": "text 7", "score": pytest.approx(1.0, abs=1e-5), "metadata": {"n": 7}, "embedding_version": version,
    }  # fmt: skip
    same = docs.good("POST", "/query", {"vector": [2 * value for value in asked], "k": 5, "version": version})
    assert [one["id"] for one in same["items"]] == best
    assert len(docs.good("POST", "/query", {"text": "x"})["items"]) == 10, "the default of k"
    few = docs.good("POST", "/query", {"text": "x", "filter": {"n": {"$gte": 18}}})
    assert {one["id"] for one in few["items"]} == {"text 18", "text 19"}


def test_a_query_of_an_empty_collection_finds_nothing(docs: Client) -> None:
    assert docs.good("POST", "/query", {"text": "x"}) == {
        "version": None, "active": False, "state": None, "model": None, "coverage": 1.0, "items": [],
    }  # fmt: skip
    assert docs.server.requests >= 0


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "body"),
        ([], "body"),
        ({"text": "x", "vector": [1]}, "body"),
        ({"text": ""}, "body.text"),
        ({"text": "x", "k": 0}, "body.k"),
        ({"text": "x", "k": 1001}, "body.k"),
        ({"text": "x", "k": True}, "body.k"),
        ({"text": "x", "k": 1.0}, "body.k"),
        ({"text": "x", "version": 1}, "body.version"),
        ({"text": "x", "filter": []}, "body.filter"),
        ({"text": "x", "filter": {"": 1}}, "body.filter"),
        ({"text": "x", "filter": {"a": {"$gt": True}}}, "body.filter.a.$gt"),
        ({"text": "x", "filter": {"a": {"$no": 1}}}, "body.filter.a"),
        ({"text": "x", "filter": {"a": {}}}, "body.filter.a"),
        ({"vector": [1, 2]}, "body.vector"),
        ({"vector": [0] * DIMENSIONS}, "body.vector"),
        ({"text": f"{TOO_LONG}"}, "body.text"),
        ({"text": "x", "top_k": 3}, "body.top_k"),
    ],
)
def test_a_query_that_is_wrong_is_refused_by_field(docs: Client, body: Any, field: str) -> None:
    docs.put({"id": "a", "text": "x"})
    assert fields_of(docs.ask("POST", "/query", body)) == [field]


def test_a_version_that_is_not_there_is_404(docs: Client) -> None:
    docs.put({"id": "a", "text": "x"})
    answer = docs.ask("POST", "/query", {"text": "x", "version": "0" * 16})
    assert error_of(answer) == (404, "unknown_version")


# --- versions -------------------------------------------------------------------------------------


def changed(docs: Client, build: str, **wanted: Any) -> dict[str, Any]:
    """Replace the model by another build, backfill, and return the backfill once it has ended."""
    docs.server.become(build)
    answer = docs.ask("POST", "/backfill", wanted)
    assert answer.status_code == 202, answer.text
    assert set(answer.json()) == BACKFILL
    return docs.backfilled("succeeded", "failed", "cancelled")


def test_a_model_change_is_a_backfill_a_cutover_and_a_rollback(docs: Client) -> None:
    docs.put(*({"id": str(n), "text": f"text {n}"} for n in range(40)))
    old = docs.good("GET")["version"]
    done = changed(docs, "second")
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


def test_a_cutover_below_the_threshold_says_what_is_missing(docs: Client) -> None:
    docs.put(
        *({"id": str(n), "text": f"text {n}"} for n in range(3)), {"id": "v", "vector": [1.0] * DIMENSIONS}
    )
    done = changed(docs, "second")
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


def test_a_backfill_can_be_paused_resumed_and_cancelled(docs: Client) -> None:
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


def test_a_backfill_may_cut_over_by_itself_with_another_recipe(docs: Client) -> None:
    docs.put({"id": "a", "text": "x"})
    done = changed(
        docs, "second", prefix="passage: ", dimensions=8, auto_cutover=True, threshold=0.9, rate=100
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
    docs: Client, changes: dict[str, Any], field: str
) -> None:
    docs.put({"id": "a", "text": "x"})
    headers = {"Content-Type": "application/json"}
    answer = docs.ask("POST", "/backfill", data=json.dumps(changes), headers=headers)
    assert fields_of(answer) == [field]
    assert error_of(docs.ask("GET", "/backfill")) == (404, "unknown_backfill")


def test_a_model_that_no_instance_has_embeds_nothing(docs: Client) -> None:
    answer = docs.ask("POST", "/backfill", {"model": "elsewhere:7b"})
    assert error_of(answer) == (404, "model_missing")


def test_a_build_that_was_replaced_refuses_texts_and_says_what_to_do(docs: Client) -> None:
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
def test_an_unknown_parameter_is_refused(docs: Client, method: str, path: str, body: Any) -> None:
    assert fields_of(docs.ask(method, f"{path}?x=1", body)) == ["query.x"]


def test_writers_and_readers_at_the_same_time_are_all_served(docs: Client) -> None:
    def write(number: int) -> int:
        return int(
            docs.put(*({"id": f"{number}-{n}", "text": f"{number} {n}"} for n in range(10)))["written"]
        )

    def read(number: int) -> bool:
        answer = docs.good("POST", "/query", {"text": str(number)})
        return {one["embedding_version"] for one in answer["items"]} <= {answer["version"]}

    docs.put({"id": "first", "text": "x"})
    with ThreadPoolExecutor(8) as pool:
        writes, reads = pool.map(write, range(16)), pool.map(read, range(16))
        assert list(writes) == [10] * 16
        assert all(reads)
    assert docs.good("GET")["items"] == 161


def test_nothing_of_this_was_a_defect(gateway: Gateway) -> None:
    log = gateway.log()
    assert "Traceback" not in log
    assert "request_failed" not in log
