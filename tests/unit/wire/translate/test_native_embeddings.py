"""Vectors of OpenAI servers as native clients get them."""

from __future__ import annotations

import json
import struct
from base64 import b64encode
from math import hypot, inf, nan
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.body import BadBodyError
from manager.wire.translate import Translation, Untranslatable
from manager.wire.translate.hub import Usage
from manager.wire.translate.openai_vectors import MOST_VECTOR_BYTES
from tests.contract.compare import load_recordings
from tests.support.native_clients import answered, asked, sent

RECORDED = {one["name"]: one for one in load_recordings()}
NO_API = "the server sent an answer that is not of OpenAI's API"


def embedding(texts: Any = "a") -> Translation:
    return asked("/api/embed", {"input": texts})[0]


def vectors_of(*vectors: Any, **more: Any) -> bytes:
    data = [{"object": "embedding", "index": at, "embedding": one} for at, one in enumerate(vectors)]
    return json.dumps({"object": "list", "data": data, **more}).encode()


# --- requests -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"input": "a"}, {"input": ["a"]}),
        ({"input": ["a", ""]}, {"input": ["a", ""]}),
        ({"input": "a", "dimensions": 64}, {"input": ["a"], "dimensions": 64}),
        ({"input": "a", "dimensions": 0}, {"input": ["a"]}),
        (
            {"input": "a", "truncate": True, "keep_alive": -1, "options": {"num_ctx": 512, "seed": 1}},
            {"input": ["a"]},
        ),
    ],
)
def test_requests_for_vectors(fields: dict[str, Any], said: dict[str, Any]) -> None:
    through, document = asked("/api/embed", fields)
    assert through.path == "/v1/embeddings"
    assert document == {"model": "served", **said}


def test_the_older_request_has_one_text() -> None:
    said = sent("/api/embeddings", {"prompt": "a", "options": {}, "keep_alive": "1m"})
    assert said == {"model": "served", "input": ["a"]}


@pytest.mark.parametrize(
    ("path", "fields", "named"),
    [
        ("/api/embed", {"input": ""}, "an empty input"),
        ("/api/embed", {"input": []}, "an empty input"),
        ("/api/embed", {}, "an empty input"),
        ("/api/embeddings", {"prompt": ""}, "an empty prompt"),
        ("/api/embed", {"input": "a", "prompt": "b"}, "prompt cannot be passed on"),
        ("/api/embeddings", {"prompt": "a", "input": "b"}, "input cannot be passed on"),
    ],
)
def test_requests_are_refused_where_the_server_has_no_word(
    path: str, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(Untranslatable) as refused:
        sent(path, fields)
    assert str(refused.value).startswith(named)


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("/api/embed", {"input": 1}, "input must be a string or a list of strings, not 1"),
        ("/api/embed", {"input": [["a"]]}, "input must be a string or a list of strings, not a list"),
        ("/api/embeddings", {"prompt": ["a"]}, "prompt must be a string, not a list"),
        ("/api/embed", {"input": "a", "dimensions": -1}, "dimensions must be a whole number"),
        ("/api/embed", {"input": "a", "options": 1}, "options must be an object, not 1"),
    ],
)
def test_a_wrong_value_is_shown(path: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadBodyError) as refused:
        sent(path, fields)
    assert str(refused.value).startswith(message)


# --- answers --------------------------------------------------------------------------------------


def test_answers_have_the_fields_of_recorded_ones() -> None:
    answer = json.loads(answered(embedding(), [vectors_of([3, 4], usage={"prompt_tokens": 3})]))
    recorded = [name for name in RECORDED["embed"]["json"] if name != "load_duration"]
    assert list(answer) == recorded
    assert answer["prompt_eval_count"] == 3
    old = json.loads(answered(asked("/api/embeddings", {"prompt": "a"})[0], [vectors_of([3, 4])]))
    assert old == {"embedding": [3.0, 4.0]}
    assert list(old) == list(RECORDED["embeddings"]["json"])


def test_vectors_stand_in_the_order_of_their_texts() -> None:
    through = embedding(["a", "b", "c"])
    data = [
        {"index": 2, "embedding": [1, 0]},
        {"index": 0, "embedding": [0, 1]},
        {"index": 1, "embedding": [-1, 0]},
    ]
    answer = json.dumps({"data": data, "usage": {"prompt_tokens": 5, "total_tokens": 5}}).encode()
    assert json.loads(answered(through, [answer[:9], answer[9:]]))["embeddings"] == [[0, 1], [-1, 0], [1, 0]]
    assert through.usage == Usage(5, 0)
    assert through.fault is None


def test_vectors_without_places_stand_as_they_come() -> None:
    answer = b'{"data":[{"embedding":[1,0]},{"index":"x","embedding":[0,1]}]}'
    through = embedding(["a", "b"])
    assert json.loads(answered(through, [answer]))["embeddings"] == [[1, 0], [0, 1]]
    assert through.usage is None


def test_base64_is_read_too() -> None:
    text = RECORDED["v1-embeddings-base64"]["json"]["data"][0]["embedding"]
    numbers = json.loads(answered(asked("/api/embeddings", {"prompt": "a"})[0], [vectors_of(text)]))[
        "embedding"
    ]
    wanted = RECORDED["embeddings"]["json"]["embedding"][:4]
    assert numbers[:4] == pytest.approx(wanted, abs=1e-6)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=8))
def test_vectors_of_embed_have_the_length_one(vector: list[float]) -> None:
    found = json.loads(answered(embedding(), [vectors_of(vector)]))["embeddings"][0]
    length = hypot(*vector)
    if length:
        assert hypot(*found) == pytest.approx(1)
        assert [one * length for one in found] == pytest.approx(vector)
    else:
        assert found == vector


def test_a_vector_without_a_length_stays() -> None:
    assert json.loads(answered(embedding(), [vectors_of([0, 0])]))["embeddings"] == [[0, 0]]


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (b"", NO_API),
        (b"[]", NO_API),
        (b"{}", NO_API),
        (b'{"data":[1]}', NO_API),
        (b'{"data":[{"index":0}]}', NO_API),
        (vectors_of([]), NO_API),
        (vectors_of([True]), NO_API),
        (vectors_of(["1"]), NO_API),
        (vectors_of([1e39]), NO_API),
        (vectors_of("!"), NO_API),
        (vectors_of("é"), NO_API),
        (vectors_of("AAAA"), NO_API),
        (vectors_of(b64encode(struct.pack("<2f", 1, nan)).decode()), NO_API),
        (vectors_of(b64encode(struct.pack("<2f", 1, inf)).decode()), NO_API),
        (vectors_of(), "the server sent 0 vectors for 1 texts"),
        (vectors_of([1], [2]), "the server sent 2 vectors for 1 texts"),
        (b'{"data":[{"index":7,"embedding":[1]}]}', "the server sent 1 vectors for 1 texts"),
        (b'{"error":{"message":"too long"}}', "too long"),
    ],
)
def test_a_bad_answer_is_a_fault(answer: bytes, fault: str) -> None:
    through = embedding()
    assert (answered(through, [answer]), through.fault) == (b"", fault)


def test_an_answer_beyond_the_bound_is_a_fault() -> None:
    through = embedding()
    half = b" " * (MOST_VECTOR_BYTES // 2)
    assert [through.feed(piece) for piece in (half, half, b" ", b" ")] == [b""] * 4
    assert (through.end(), through.fault) == (
        b"",
        f"the server sent an answer of more than {MOST_VECTOR_BYTES} bytes",
    )
    assert through.end() == b""


@given(st.binary(max_size=40))
def test_any_bytes_are_an_answer_or_a_fault(data: bytes) -> None:
    through = embedding()
    assert (answered(through, [data]) == b"") == (through.fault is not None)
