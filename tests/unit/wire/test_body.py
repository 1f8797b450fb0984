"""Bodies of inference requests: what is read from them."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from statistics import median
from time import process_time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.roles import BodyChanges
from manager.wire.body import SMALL_BYTES, BadBodyError, BodyTooLargeError, read_body, read_fields, reading
from manager.wire.encoding import Encoding, zstd
from manager.wire.rewriting import body_for, rewriting
from manager.wire.routes import INFERENCE, Route
from manager.wire.steps import run

if TYPE_CHECKING:
    from manager.wire.steps import Steps

RECORDINGS = Path(__file__).parents[2] / "contract" / "recordings"
GENERATE, CHAT, EMBED = INFERENCE[b"/api/generate"], INFERENCE[b"/api/chat"], INFERENCE[b"/api/embed"]
V1_CHAT, V1_MESSAGES = INFERENCE[b"/v1/chat/completions"], INFERENCE[b"/v1/messages"]
V1_RESPONSES, V1_COMPLETIONS = INFERENCE[b"/v1/responses"], INFERENCE[b"/v1/completions"]
UNCHANGED = BodyChanges()

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
objects = st.dictionaries(st.sampled_from(["options", "messages", "prompt", "keep_alive", "x"]), values)


def bytes_of(document: Any) -> bytes:
    return json.dumps(document).encode()


def sent(
    document: dict[str, Any], changes: BodyChanges = UNCHANGED, *, route: Route = CHAT, model: str = "m"
) -> dict[str, Any]:
    """What a server is sent for a request, read as strictly as JSON is."""
    body = read_body(bytes_of({"model": "m", **document}), route)
    result = json.loads(body_for(body, route, model, changes).decode("utf-8", "strict"))
    assert result.pop("model") == model
    return dict(result)


def recorded_requests() -> list[tuple[Route, bytes]]:
    recordings = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RECORDINGS.glob("*.json"))]
    return [
        (INFERENCE[one["request"]["path"].encode()], bytes_of(one["request"]["body"]))
        for one in recordings
        if one["request"]["path"].encode() in INFERENCE and isinstance(one["request"]["body"], dict)
    ]


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("route", "raw"), recorded_requests())
def test_a_request_is_read_as_its_server_reads_it_and_sent_on_untouched(route: Route, raw: bytes) -> None:
    document = json.loads(raw)
    body = read_body(raw, route)
    assert body.model == document.get("model", "")
    assert body.stream is document.get("stream", route.streams)
    assert body_for(body, route, body.model, UNCHANGED) is raw


@pytest.mark.parametrize("raw", [b"", b" ", b"\r\n\t "])
def test_an_empty_body_is_missing(raw: bytes) -> None:
    with pytest.raises(BadBodyError, match=r"^missing request body$"):
        read_body(raw, CHAT)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"[]", "must be a JSON object"),
        (b'"m"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"nothing", "is not JSON: a value is expected at byte 0"),
        (b"{", "is not JSON: it ends where the name of a field is expected"),
        (b'{"model"', "is not JSON: it ends where a colon is expected"),
        (b'{"model":', "is not JSON: it ends where a value is expected"),
        (b'{"model": "tiny",', "is not JSON: it ends where the name of a field is expected"),
        (b'{"model": "tiny"', "is not JSON: it ends where a comma or the end of the object is expected"),
        (b'{"model": "m",}', "is not JSON: the name of a field is expected at byte 14"),
        (b'{model: "m"}', "is not JSON: the name of a field is expected at byte 1"),
        (b'{"model" "m"}', "is not JSON: a colon is expected at byte 9"),
        (b'{"a": 1 "model": "m"}', "is not JSON: a comma or the end of the object is expected at byte 8"),
        (b'\xef\xbb\xbf{"model": "m"}', "is not JSON: a value is expected at byte 0"),
        (b'{"model": "m", "x": NaN}', "is not JSON: a value is expected at byte 20"),
        (b'{"model": "m", "x": -Infinity}', "is not JSON: a value is expected at byte 20"),
        (b'{"model": "m", "x": 012}', "is not JSON: a value is expected at byte 20"),
        (b'{"model": "m", "x": nulls}', "is not JSON: a value is expected at byte 20"),
        (b'{"model": "m", "x": [1, [2}', "is not JSON: an object or an array has no end"),
        (b'{"model": "m', "is not JSON: a string has no end"),
        (b'{"model": "m\\"}', "is not JSON: a string has no end"),
        (b'{"model": "m\nn"}', "is not JSON: a string is not well-formed"),
        (b'{"mod\nel": "m"}', "is not JSON: a string is not well-formed"),
        (b'{"model": 5}', "model must be a string"),
        (b'{"model": ["m"]}', "model must be a string"),
        (b'{"model": {}}', "model must be a string"),
        (b'{"model": [' + b"1," * 20_000 + b"1]}", "model must be a string"),
        (b'{"model": "m", "stream": "yes"}', "stream must be true or false"),
        (b'{"model": "m", "stream": 1}', "stream must be true or false"),
        (b'{"model": "m", "stream": "true"}', "stream must be true or false"),
    ],
)
def test_what_cannot_be_understood_is_refused_with_what_is_wrong(raw: bytes, text: str) -> None:
    with pytest.raises(BadBodyError, match=text):
        read_body(raw, CHAT)


@pytest.mark.parametrize("letter", ["m", "\u00e9", "\U0001f600", "\\"])
def test_a_name_has_at_most_1024_characters_however_they_are_written(letter: str) -> None:
    assert read_body(bytes_of({"model": letter * 1024}), CHAT).model == letter * 1024
    for length in (1025, 20_000):
        with pytest.raises(BadBodyError, match=r"^model must be a name of at most 1024 characters$"):
            run(reading([bytes_of({"model": letter * length})], CHAT, 10**9))


@pytest.mark.parametrize(
    "first",
    [b'{"model": "m", "x": [1, {"y": "}"}]}', b' {"model": "m"}', b'{"Model":"m"}', b'{"model": "m"}'],
)
@pytest.mark.parametrize(
    "rest", [b"x", b"{}", b'\n{"model": "other"}', b"]", b"\x00", b'"', b'}, "model": "o"}']
)
def test_what_follows_the_first_value_is_neither_read_nor_sent_on(first: bytes, rest: bytes) -> None:
    for read in (read_body, lambda raw, route: run(reading([raw], route, 10**9))):
        body = read(first + rest, CHAT)
        assert body.model == "m"
        assert json.loads(body_for(body, CHAT, "m", UNCHANGED)) == {
            key.lower(): value for key, value in json.loads(first).items()
        }


def test_an_error_inside_a_value_is_left_to_the_server() -> None:
    for value in (b"[1,,2]", b"[}", b'{"a" 1}', b"1e400", b'"\n"', b'"\\x"', b"[" * 90_000 + b"]" * 90_000):
        raw = b'{"model": "m", "x": %b, "stream": false}' % value
        for body in (read_body(raw, CHAT), run(reading([raw], CHAT, 10**9))):
            assert (body.model, body.stream) == ("m", False)
            assert body_for(body, CHAT, "m", UNCHANGED) == raw
            assert body_for(body, CHAT, "n", UNCHANGED) == b'{"model":"n","x":%b,"stream":false}' % value


def test_nothing_of_a_bad_body_is_repeated_in_the_message() -> None:
    with pytest.raises(BadBodyError) as raised:
        read_body(b'{"model": "m", "prompt": "secret" x}', CHAT)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("raw", [b"{}", b'{"model": null}', b'{"model": ""}', b'{"model": " "}'])
def test_a_request_may_leave_the_model_to_its_lane(raw: bytes) -> None:
    body = read_body(raw, CHAT)
    assert body.model == ""
    assert json.loads(body_for(body, CHAT, "m", UNCHANGED)) == {"model": "m"}


@pytest.mark.parametrize(
    ("raw", "model"),
    [
        (b'{"MODEL": "a"}', "a"),
        (b'{"model": "a", "Model": "b"}', "b"),
        (b'{"Model": "b", "model": "a"}', "a"),
        (b'{"model": "a", "model": "b"}', "b"),
        (b'{"mOdEl": "a", "model": "b", "MODEL": "c"}', "c"),
        (b'{"model ": "a", "model": "b", "models": "c"}', "b"),
        (b'{"model": "a", "Model": "b", "model": "c"}', "c"),
        (b'{"mode\\u006c": "a"}', "a"),
        (b'{"model": "a", "mode\\u006c": "b"}', "b"),
        (b'{"\\u004dODEL": "a"}', "a"),
    ],
)
def test_a_name_counts_in_any_case_and_the_last_one_does(raw: bytes, model: str) -> None:
    body = read_body(raw, CHAT)
    assert body.model == model
    result = json.loads(body_for(body, CHAT, model, UNCHANGED))
    assert [value for key, value in result.items() if key.lower() == "model"] == [model]


@pytest.mark.parametrize(
    ("raw", "stream"),
    [
        (b"{}", True),
        (b'{"stream": null}', True),
        (b'{"stream": false}', False),
        (b'{"Stream": false}', False),
        (b'{"STREAM": false, "stream": true}', True),
        (b'{"stream": true, "STREAM": false}', False),
        ('{"\u017ftream": false}'.encode(), False),
        ('{"stream": true, "\u017fTREAM": false}'.encode(), False),
        (b'{"\\u017ftream": false}', False),
    ],
)
def test_a_stream_is_what_the_server_takes_for_one(raw: bytes, stream: bool) -> None:
    assert read_body(raw, CHAT).stream is stream


@pytest.mark.parametrize("route", INFERENCE.values(), ids=lambda route: route.path)
def test_without_a_word_only_the_native_routes_stream_and_embeddings_never_do(route: Route) -> None:
    assert read_body(b"{}", route).stream is route.streams
    assert read_body(b'{"stream": true}', route).stream is route.can_stream


@pytest.mark.parametrize("model", [" m", "m ", "\tm\n"])
def test_space_around_a_name_is_no_part_of_it(model: str) -> None:
    body = read_body(bytes_of({"model": model}), CHAT)
    assert body.model == "m"
    assert json.loads(body_for(body, CHAT, "m", UNCHANGED)) == {"model": "m"}


def test_broken_utf8_is_read_as_the_server_reads_it_and_sent_on_as_it_came() -> None:
    raw = b'{"model": "m\xff", "prompt": "\xc3\x28", "x": [123456789012345678901234567890, 0.5]}'
    body = read_body(raw, GENERATE)
    assert body.model == "m\ufffd"
    assert body_for(body, GENERATE, body.model, UNCHANGED) is raw
    changed = json.loads(body_for(body, GENERATE, "n", UNCHANGED).decode("utf-8", "replace"))
    assert changed == {"model": "n", "prompt": "\ufffd(", "x": [123456789012345678901234567890, 0.5]}


def test_half_a_surrogate_pair_is_read_as_the_server_reads_it() -> None:
    raw = rb'{"model": "m\ud800", "prompt": "\udfff", "x": "\ud83d\ude00"}'
    body = read_body(raw, GENERATE)
    assert body.model == "m\ufffd"
    assert body_for(body, GENERATE, body.model, UNCHANGED) is raw
    assert json.loads(body_for(body, GENERATE, "n", UNCHANGED)) == {
        "model": "n",
        "prompt": "\udfff",
        "x": "\U0001f600",
    }


def test_what_was_sent_for_good_is_let_go_of() -> None:
    body = read_body(b'{"model": "m"}', CHAT)
    body.forget()
    assert (body.raw, body.fields, body.model, body.size) == (b"", {}, "m", 0)


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode) | values.map(bytes_of))
def test_nothing_a_caller_can_send_is_another_error(raw: bytes) -> None:
    for route in INFERENCE.values():
        try:
            body = read_body(raw, route)
        except BadBodyError:
            continue
        json.loads(body_for(body, route, "other", BodyChanges({"a": 1}, {"b": 2}, "c", think=False)))


# --- of any size ----------------------------------------------------------------------------------


def cut(raw: bytes, *at: int) -> list[bytes]:
    return [raw[start:end] for start, end in zip([0, *at], [*at, len(raw)], strict=True)]


@given(objects, st.data())
def test_a_body_reads_the_same_in_steps(document: dict[str, Any], data: st.DataObject) -> None:
    raw = json.dumps({**document, "Model": "m", "z": "x" * SMALL_BYTES}, indent=1).encode()
    at = data.draw(st.integers(0, len(raw)))
    parts = cut(raw, at)
    body = run(reading(parts, CHAT, 10**9))
    assert parts == []
    assert not body.is_small
    assert (body.model, body.exact, body.size) == ("m", False, len(raw))
    assert {name: json.loads(bytes(value)) for name, value in body.fields.items()} == {
        **{key.lower(): value for key, value in document.items()},
        "model": "m",
        "z": "x" * SMALL_BYTES,
    }


def test_a_large_body_is_sent_on_as_it_came() -> None:
    raw = bytes_of({"model": "m", "prompt": "x" * SMALL_BYTES})
    for parts in ([raw], cut(raw, 10_000, 20_000)):
        body = run(reading(parts, GENERATE, 10**9))
        assert run(rewriting(body, GENERATE, "m", UNCHANGED)) == [raw]
        assert body_for(body, GENERATE, "m", UNCHANGED) == raw


def test_a_large_body_is_sent_on_without_what_follows_it() -> None:
    raw = bytes_of({"model": "m", "prompt": "x" * SMALL_BYTES})
    body = run(reading(cut(raw + b'{"model": "other"}' + b" " * SMALL_BYTES, 10_000), GENERATE, 10**9))
    assert b"".join(run(rewriting(body, GENERATE, "m", UNCHANGED))) == raw


LARGE = 2**21
SHAPES = {
    "numbers": b"[" + b"1," * (LARGE // 2) + b"1]",
    "floats": b"[" + b"-1.5e-7," * (LARGE // 8) + b"1]",
    "empty arrays": b"[" + b"[]," * (LARGE // 3) + b"1]",
    "deep": b"[" * (LARGE // 2) + b"]" * (LARGE // 2),
    "deep again and again": b"[" + (b"[" * 2000 + b"]" * 2000 + b",") * (LARGE // 4000) + b"1]",
    "a little deep": b"[" + b"[[[[[[]]]]]]," * (LARGE // 13) + b"1]",
    "objects": b"[" + b'{"a":{"b":{"c":[1,"x",{}]}}},' * (LARGE // 29) + b"1]",
    "empty strings": b"[" + b'"",' * (LARGE // 3) + b"1]",
    "one string": b'"' + b"x" * LARGE + b'"',
    "quotes in a string": b'"' + b'\\"' * (LARGE // 2) + b'"',
    "backslashes": b'["' + b"\\\\" * (LARGE // 2) + b'"]',
    "space": b" " * LARGE + b"1",
    "many members": b"{" + b'"a":1,' * (LARGE // 6) + b'"a":1}',
}


def steps_of(steps: Steps[Any]) -> tuple[int, float]:
    """How many steps there are, and the CPU time that the median of them takes."""
    times: list[float] = []
    while True:
        began = process_time()
        try:
            next(steps)
        except StopIteration:
            return len(times) + 1, median([*times, process_time() - began])
        times.append(process_time() - began)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_no_shape_of_a_body_makes_a_step_long_or_takes_much_memory(shape: bytes) -> None:
    raw = b'{"model":"m","x":%b}' % shape
    parts = [raw[at : at + 2**16] for at in range(0, len(raw), 2**16)]
    tracemalloc.start()
    try:
        body = run(reading(parts, CHAT, 10**9))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert body.model == "m"
    assert bytes(body.fields["x"]) == shape.lstrip()
    assert peak < 1.3 * len(raw) + 3 * 2**20  # what one step takes meanwhile
    count, typical_s = steps_of(reading([raw], CHAT, 10**9))
    assert count > len(raw) / SMALL_BYTES * 0.9
    assert typical_s < 0.02


def test_an_object_has_a_bounded_number_of_fields() -> None:
    most = b"{" + b",".join(b'"%d":1' % number for number in range(1024)) + b"}"
    assert len(read_body(most, CHAT).fields) == 1024
    many = b'{"model":"m"' + b',"a":[]' * 100_000 + b"}"
    with pytest.raises(BadBodyError, match="an object has more than 1024 fields"):
        run(reading([many], CHAT, 10**9))


def test_the_name_of_a_field_has_a_bounded_length() -> None:
    assert read_body(b'{"%b":1}' % (b"A" * 4000), CHAT).model == ""
    with pytest.raises(BadBodyError, match="the name of a field has more than 4096 bytes"):
        run(reading([b'{"A%b":1}' % (b"a" * 10**6)], CHAT, 10**9))


# --- encoded --------------------------------------------------------------------------------------


def test_an_encoded_body_is_read_decoded() -> None:
    for raw in (bytes_of({"model": "m"}), bytes_of({"model": "m", "prompt": "x" * 10**6})):
        encoded = zstd.compress(raw)
        body = run(reading(cut(encoded, 5), V1_CHAT, 10**7, Encoding.ZSTD))
        assert (body.model, bytes(body.raw)) == ("m", raw)


def test_the_decoded_size_counts() -> None:
    encoded = zstd.compress(bytes_of({"model": "m", "prompt": "x" * 10**6}))
    with pytest.raises(BodyTooLargeError, match="at most 1000 bytes"):
        run(reading([encoded], V1_CHAT, 1000, Encoding.ZSTD))


@pytest.mark.parametrize(
    ("path", "fields", "streams"),
    [
        ("/v1/chat/completions", '"stream":null', False),
        ("/v1/chat/completions", '"stream":true,"stream":null', True),
        ("/v1/completions", '"stream":true,"STREAM":null', True),
        ("/v1/messages", '"stream":false,"stream":null', False),
        ("/v1/chat/completions", '"stream":null,"stream":true', True),
        ("/v1/responses", '"stream":true,"stream":null', False),
        ("/v1/responses", '"stream":null', False),
        ("/api/chat", '"stream":null', True),
        ("/api/chat", '"stream":false,"stream":null', True),
        ("/api/generate", '"stream":null,"stream":false', False),
    ],
)
def test_a_stream_that_is_null_is_what_the_server_takes_it_for(path: str, fields: str, streams: bool) -> None:
    """Ollama reads a bool at some routes, which null leaves as it is, and a pointer at the others."""
    body = read_body(f'{{"model":"m",{fields}}}'.encode(), INFERENCE[path.encode()])
    assert body.stream is streams


def test_a_model_that_is_null_changes_nothing_of_one_that_was_named() -> None:
    route = INFERENCE[b"/api/chat"]
    assert read_body(b'{"model":"m","model":null}', route).model == "m"
    assert read_body(b'{"model":null}', route).model == ""
    assert run(read_fields([b'{"name":"a","model":"m","model":null,"name":null}'])) == {
        "name": b"null",
        "model": b'"m"',
    }
