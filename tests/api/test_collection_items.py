"""Items and queries of collections from outside."""

from __future__ import annotations

import operator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from tests.support.collections import PATH, error_of, fields_of, message_of, raw
from tests.support.daemon import COMPUTE
from tests.support.embedding_server import DIMENSIONS, MODEL, TOO_LONG, digest_of, vector_of

if TYPE_CHECKING:
    from tests.support.collections import Collection
    from tests.support.gateway import Gateway


# --- items ----------------------------------------------------------------------------------------


def test_items_are_embedded_and_say_what_embedded_them(docs: Collection) -> None:
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


def test_the_request_of_an_embed_is_in_the_history_by_its_route(docs: Collection) -> None:
    headers = {"X-Project-ID": f"project-of-{docs.name}"}
    docs.good("PUT", "/items", {"items": [{"id": "a", "text": "x"}]}, headers=headers)
    docs.good("POST", "/query", {"text": "x"}, headers=headers)
    found = docs.gateway.get(f"{COMPUTE}/requests?project={headers['X-Project-ID']}")["requests"]
    assert {(one["path"], one["outcome"], one["effective_target"]) for one in found} == {
        (f"{PATH}/{{name}}/items", "ok", "one"),
        (f"{PATH}/{{name}}/query", "ok", "one"),
    }


def test_a_header_that_cannot_be_used_is_refused(docs: Collection) -> None:
    body = {"items": [{"id": "a", "text": "x"}]}
    answer = docs.ask("PUT", "/items", body, headers={"X-Local-Only": "perhaps"})
    assert fields_of(answer) == ["header"]
    answer = docs.ask("PUT", "/items", body, headers={"X-Instance": "nowhere"})
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
def test_an_id_may_be_anything_that_a_path_can_say(docs: Collection, item_id: str) -> None:
    docs.put({"id": item_id, "text": "x"})
    path = f"/items/{quote(item_id, safe='')}"
    assert docs.good("GET", path)["id"] == item_id
    assert docs.good("GET", "/items")["items"][0]["id"] == item_id
    assert docs.good("DELETE", path) == {"removed": item_id}
    assert docs.good("GET")["items"] == 0


@pytest.mark.parametrize("item_id", [".", "..", "", "a\nb", "\x00", "\x7f", "x" * 513])
def test_an_id_that_no_path_can_say_is_refused(docs: Collection, item_id: str) -> None:
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
    docs: Collection, method: str, behind: str
) -> None:
    """Clients that resolve `..` themselves leave a slash at the end, which is the second half."""
    docs.put({"id": "a", "text": "x"})
    answer = raw(docs.gateway, method, docs.path + behind)
    assert answer.status == 404, answer
    assert docs.good("GET")["items"] == 1


def test_an_id_that_is_no_text_is_told(docs: Collection) -> None:
    docs.put({"id": "\ufffd", "text": "x"})
    answer = raw(docs.gateway, "DELETE", f"{docs.path}/items/%FF")
    assert answer.status == 422
    assert docs.good("GET")["items"] == 1


def test_the_pages_have_all_items_in_the_order_of_their_ids(docs: Collection) -> None:
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


def test_a_vector_from_outside_is_brought_to_length_one(docs: Collection) -> None:
    docs.put({"id": "a", "vector": [3, 4]}, {"id": "b", "vector": [0.0, -1e-300]})
    assert docs.good("GET", "/items/a?vector=true")["vector"] == pytest.approx([0.6, 0.8])
    assert docs.good("GET", "/items/b?vector=true")["vector"] == [0.0, -1.0]
    item = docs.good("GET", "/items/a")
    assert (item["text"], item["embedding_dim"]) == (None, 2)
    answer = docs.ask("PUT", "/items", {"items": [{"id": "c", "vector": [1, 2, 3]}]})
    assert fields_of(answer) == ["body.items.0.vector"]


def test_a_refused_item_is_named_and_nothing_is_written(docs: Collection) -> None:
    items = [{"id": "a", "text": "x"}, {"id": "b", "text": f"an {TOO_LONG} text"}]
    answer = docs.ask("PUT", "/items", {"items": items})
    assert fields_of(answer) == ["body.items.1.text"]
    assert "'b'" in message_of(answer)
    assert docs.good("GET")["items"] == 0


def test_an_id_that_comes_twice_is_named_at_both_places(docs: Collection) -> None:
    items = [{"id": one, "text": "x"} for one in ("a", "b", "a")]
    answer = docs.ask("PUT", "/items", {"items": items})
    assert fields_of(answer) == ["body.items.2.id"]
    assert "body.items.0" in message_of(answer)


def test_a_body_may_be_larger_than_others_but_not_larger_than_max_body(docs: Collection) -> None:
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


def test_a_body_that_does_not_say_that_it_is_json_is_refused(docs: Collection) -> None:
    body = b'{"items": [{"id": "a", "text": "x"}]}'
    assert fields_of(docs.ask("PUT", "/items", data=body, headers={"Content-Type": "text/plain"})) == ["body"]


# --- queries --------------------------------------------------------------------------------------


def test_a_query_finds_the_nearest_items_of_the_active_version(docs: Collection) -> None:
    texts = [f"text {number}" for number in range(20)]
    docs.put(*({"id": text, "text": text, "metadata": {"n": n}} for n, text in enumerate(texts)))
    answer = docs.good("POST", "/query", {"text": "text 7", "k": 5})
    version = docs.good("GET")["version"]
    assert {name: answer[name] for name in ("version", "active", "state", "model", "coverage")} == {
        "version": version, "active": True, "state": "active", "model": MODEL, "coverage": 1.0,
    }  # fmt: skip
    asked = vector_of(digest_of("first"), "text 7")
    vectors = {text: vector_of(digest_of("first"), text) for text in texts}
    scores = {text: sum(map(operator.mul, asked, vectors[text])) for text in texts}
    best = sorted(texts, key=lambda text: -scores[text])[:5]
    assert [one["id"] for one in answer["items"]] == best
    first = answer["items"][0]
    assert first.pop("score") == pytest.approx(1.0, abs=1e-5)
    assert first == {"id": "text 7", "metadata": {"n": 7}, "embedding_version": version}
    same = docs.good("POST", "/query", {"vector": [2 * value for value in asked], "k": 5, "version": version})
    assert [one["id"] for one in same["items"]] == best
    assert len(docs.good("POST", "/query", {"text": "x"})["items"]) == 10, "the default of k"
    few = docs.good("POST", "/query", {"text": "x", "filter": {"n": {"$gte": 18}}})
    assert {one["id"] for one in few["items"]} == {"text 18", "text 19"}


def test_a_query_of_an_empty_collection_finds_nothing(docs: Collection) -> None:
    assert docs.good("POST", "/query", {"text": "x"}) == {
        "version": None, "active": False, "state": None, "model": None, "coverage": 1.0, "items": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"text": "x", "k": 0}, "body.k"),
        ({"text": "x", "filter": {"a": {"$no": 1}}}, "body.filter.a"),
        ({"vector": [1, 2]}, "body.vector"),
        ({"vector": [0] * DIMENSIONS}, "body.vector"),
        ({"text": f"{TOO_LONG}"}, "body.text"),
        ({"text": "x", "top_k": 3}, "body.top_k"),
    ],
)
def test_a_query_that_is_wrong_is_refused_by_field(docs: Collection, body: Any, field: str) -> None:
    docs.put({"id": "a", "text": "x"})
    assert fields_of(docs.ask("POST", "/query", body)) == [field]


def test_a_version_that_is_not_there_is_404(docs: Collection) -> None:
    docs.put({"id": "a", "text": "x"})
    answer = docs.ask("POST", "/query", {"text": "x", "version": "0" * 16})
    assert error_of(answer) == (404, "unknown_version")


def test_writers_and_readers_at_the_same_time_are_all_served(docs: Collection) -> None:
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
