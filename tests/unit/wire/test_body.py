"""Bodies of inference requests: what is read from them, and what is changed in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.roles import BodyChanges
from manager.wire.body import BadBodyError, body_for, dumped, parsed, read_body
from manager.wire.routes import INFERENCE, Route

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
        (b"{", "is not JSON: Expecting property name"),
        (b'{"model": "tiny",', "is not JSON: "),
        (b'{"model": "m"} x', "is not JSON: Extra data"),
        (b'\xef\xbb\xbf{"model": "m"}', "is not JSON: Unexpected UTF-8 BOM"),
        (b'{"model": "m", "x": NaN}', "is not JSON: NaN is no JSON value"),
        (b'{"model": "m", "x": -Infinity}', "is not JSON: -Infinity is no JSON value"),
        (b'{"model": "m", "x": 1e400}', "is not JSON: a number is beyond any"),
        (b'{"model": "m\nn"}', "is not JSON: Invalid control character"),
        (b'{"model": 5}', "model must be a string"),
        (b'{"model": ["m"]}', "model must be a string"),
        (b'{"model": "m", "stream": "yes"}', "stream must be true or false"),
        (b'{"model": "m", "stream": 1}', "stream must be true or false"),
    ],
)
def test_what_cannot_be_understood_is_refused_with_what_is_wrong(raw: bytes, text: str) -> None:
    with pytest.raises(BadBodyError, match=text):
        read_body(raw, CHAT)


def test_what_is_too_long_for_a_name_or_too_deep_to_be_read_is_refused() -> None:
    assert read_body(bytes_of({"model": "m" * 1024}), CHAT).model == "m" * 1024
    with pytest.raises(BadBodyError, match="at most 1024 characters"):
        read_body(bytes_of({"model": "m" * 1025}), CHAT)
    with pytest.raises(BadBodyError, match="nested too deeply"):
        read_body(b'{"x": ' + b"[" * 100_000, CHAT)


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
    changed = json.loads(body_for(body, GENERATE, "n", UNCHANGED))
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
    assert (body.raw, body.document, body.model) == (b"", {}, "m")


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode) | values.map(bytes_of))
def test_nothing_a_caller_can_send_is_another_error(raw: bytes) -> None:
    for route in INFERENCE.values():
        try:
            body = read_body(raw, route)
        except BadBodyError:
            continue
        json.loads(body_for(body, route, "other", BodyChanges({"a": 1}, {"b": 2}, "c", think=False)))


# --- changing -------------------------------------------------------------------------------------


@given(objects, st.sampled_from(list(INFERENCE.values())))
def test_a_request_for_another_model_is_the_same_but_for_the_name(
    document: dict[str, Any], route: Route
) -> None:
    assert sent(document, route=route, model="other") == document


@given(objects)
def test_a_request_keeps_every_byte_where_nothing_is_changed(document: dict[str, Any]) -> None:
    raw = json.dumps({**document, "model": "m"}, indent=2, ensure_ascii=False).encode("utf-8", "replace")
    body = read_body(raw, CHAT)
    assert body_for(body, CHAT, "m", UNCHANGED) is raw


@pytest.mark.parametrize("number", [2**53 + 1, 2**63 - 1, 2**64 - 1, -(2**63), 0.1, 1e300, -0.0])
def test_numbers_are_passed_on_exactly(number: float) -> None:
    result = sent({"options": {"seed": number}}, BodyChanges({"x": 1}))
    assert repr(result["options"]["seed"]) == repr(number)


@pytest.mark.parametrize("depth", [200, 300, 600, 900])
def test_a_deep_body_can_be_changed_like_any_other(depth: int) -> None:
    raw = b'{"model": "m", "x": ' + b'[{"y": [' * (depth // 3) + b"1" + b"]}]" * (depth // 3) + b"}"
    body = read_body(raw, CHAT)
    changed = body_for(body, CHAT, "n", UNCHANGED)
    assert changed.replace(b" ", b"") == raw.replace(b'"m"', b'"n"').replace(b" ", b"")


def test_a_body_is_written_however_deep_it_is() -> None:
    deep: Any = {"": [], "a": {}, "b": [None, True, "\ud800\u00e9", 2**70]}
    for level in range(5000):
        deep = {"x": deep, "y": level} if level % 2 else [deep, 0.5]
    text = dumped({"d": deep}).decode()
    assert text.count("[") == text.count("]") == 2502
    assert text.count("{") == text.count("}") == 2503
    assert r'{"":[],"a":{},"b":[null,true,"\ud800\u00e9",1180591620717411303424]}' in text.replace(" ", "")


def test_what_the_caller_says_comes_before_defaults_and_overrides_before_what_the_caller_says() -> None:
    changes = BodyChanges(
        defaults={"keep_alive": "1h", "options": {"seed": 1, "top_k": 1, "stop": ["a"]}},
        overrides={"options": {"num_ctx": 4096, "stop": ["b", "c"]}, "format": None},
    )
    said = {"options": {"seed": 2, "num_ctx": 1, "stop": []}, "format": "json", "prompt": "p"}
    assert sent(said, changes) == {
        "keep_alive": "1h",
        "options": {"seed": 2, "top_k": 1, "num_ctx": 4096, "stop": ["b", "c"]},
        "format": None,
        "prompt": "p",
    }


def test_a_mapping_and_what_is_none_are_not_merged() -> None:
    assert sent({"a": 1}, BodyChanges({"a": {"x": 1}})) == {"a": 1}
    assert sent({"a": {"x": 1}}, BodyChanges({}, {"a": 1})) == {"a": 1}
    assert sent({"a": None}, BodyChanges({"a": 1})) == {"a": None}


def test_no_change_names_another_model() -> None:
    sly = {"model": "sly", "Model": "sly"}
    assert sent({}, BodyChanges(sly, sly), model="n") == {}


def test_a_change_meets_a_field_in_whatever_case_the_caller_writes_it() -> None:
    assert sent({"Options": {"seed": 2}}, BodyChanges({"options": {"seed": 1, "top_k": 1}})) == {
        "options": {"seed": 2, "top_k": 1}
    }
    assert sent({"Think": True}, BodyChanges(think=False)) == {"think": True}


def test_changes_stay_as_they_were_whatever_is_merged_with_them() -> None:
    changes = BodyChanges({"options": {"a": 1}, "messages": [1]}, {"options": {"b": 1}}, "s", think=False)
    before = repr(changes)
    sent({"options": {"c": 1}, "messages": [{"role": "user"}]}, changes)
    sent({}, changes)
    assert repr(changes) == before


# --- thinking -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "off", "on"),
    [
        (CHAT, {"think": False}, {"think": True}),
        (GENERATE, {"think": False}, {"think": True}),
        (EMBED, {}, {}),
        (INFERENCE[b"/api/embeddings"], {}, {}),
        (V1_CHAT, {"reasoning_effort": "none"}, {}),
        (V1_MESSAGES, {"thinking": {"type": "disabled"}}, {}),
        (V1_COMPLETIONS, {}, {}),
        (V1_RESPONSES, {}, {}),
    ],
)
def test_thinking_is_switched_in_the_words_of_each_dialect(
    route: Route, off: dict[str, Any], on: dict[str, Any]
) -> None:
    assert sent({}, BodyChanges(think=False), route=route) == off
    assert sent({}, BodyChanges(think=True), route=route) == on
    assert sent({}, BodyChanges({"x": 1}), route=route) == {"x": 1}


@pytest.mark.parametrize(
    ("route", "said"),
    [
        (CHAT, {"think": "high"}),
        (GENERATE, {"think": True}),
        (V1_CHAT, {"reasoning_effort": "high"}),
        (V1_CHAT, {"reasoning": {"effort": "high"}}),
        (V1_MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
    ],
)
def test_who_says_how_to_think_is_listened_to(route: Route, said: dict[str, Any]) -> None:
    changes = BodyChanges(think=False)
    assert sent(said, changes, route=route) == said
    assert sent({}, BodyChanges(said, think=False), route=route) == said
    assert sent({}, BodyChanges({}, said, think=False), route=route).items() >= said.items()


# --- the system prompt ----------------------------------------------------------------------------

USER = {"role": "user", "content": "hello"}
BLOCK = {"type": "text", "text": "old"}


@pytest.mark.parametrize(
    ("route", "field"), [(GENERATE, "system"), (V1_MESSAGES, "system"), (V1_RESPONSES, "instructions")]
)
@pytest.mark.parametrize("mode", ["prepend", "append", "replace"])
def test_a_system_prompt_is_there_where_the_caller_had_none(route: Route, field: str, mode: Any) -> None:
    changes = BodyChanges(system="new", system_mode=mode)
    absent: list[dict[str, Any]] = [{}, {field: None}, {field: ""}, {field: []}]
    for said in absent:
        assert sent(said, changes, route=route) == {field: "new"}


@pytest.mark.parametrize(
    ("mode", "text", "blocks"),
    [
        ("prepend", "new\n\nold", [{"type": "text", "text": "new"}, BLOCK]),
        ("append", "old\n\nnew", [BLOCK, {"type": "text", "text": "new"}]),
        ("replace", "new", "new"),
    ],
)
def test_a_system_prompt_is_put_before_after_or_in_the_place_of_the_callers(
    mode: Any, text: str, blocks: Any
) -> None:
    changes = BodyChanges(system="new", system_mode=mode)
    assert sent({"system": "old"}, changes, route=GENERATE) == {"system": text}
    assert sent({"instructions": "old"}, changes, route=V1_RESPONSES) == {"instructions": text}
    assert sent({"system": [BLOCK]}, changes, route=V1_MESSAGES) == {"system": blocks}
    for route, role in ((CHAT, "system"), (V1_CHAT, "system"), (V1_CHAT, "developer")):
        was: list[dict[str, Any]] = [USER, {"role": role, "content": "old", "name": "n"}]
        now = {"role": role, "content": text, "name": "n"}
        expected = [{"role": "system", "content": text}, USER] if mode == "replace" else [USER, now]
        assert sent({"messages": was}, changes, route=route) == {"messages": expected}
    was = [{"role": "system", "content": [BLOCK]}, USER]
    assert sent({"messages": was}, changes, route=V1_CHAT)["messages"][0]["content"] == blocks


@pytest.mark.parametrize("mode", ["prepend", "append", "replace"])
def test_messages_without_a_system_prompt_begin_with_it(mode: Any) -> None:
    changes = BodyChanges(system="new", system_mode=mode)
    for messages in ([], [USER], ["no message", USER]):
        expected = [{"role": "system", "content": "new"}, *messages]
        assert sent({"messages": messages}, changes) == {"messages": expected}


def test_of_several_system_prompts_the_first_is_added_to_and_all_are_replaced() -> None:
    prompts = [{"role": "system", "content": text} for text in ("a", "b")]
    messages = [prompts[0], USER, prompts[1]]
    added = sent({"messages": messages}, BodyChanges(system="new"))["messages"]
    assert [one["content"] for one in added] == ["new\n\na", "hello", "b"]
    replaced = sent({"messages": messages}, BodyChanges(system="new", system_mode="replace"))["messages"]
    assert [one["content"] for one in replaced] == ["new", "hello"]


@pytest.mark.parametrize("odd", [5, True, {"a": 1}])
def test_a_system_prompt_that_is_none_is_left_for_the_server_to_refuse(odd: object) -> None:
    assert sent({"system": odd}, BodyChanges(system="new"), route=GENERATE) == {"system": odd}


@pytest.mark.parametrize(
    ("route", "said"),
    [
        (EMBED, {"input": "x"}),
        (V1_COMPLETIONS, {"prompt": "x"}),
        (CHAT, {}),
        (CHAT, {"messages": "x"}),
    ],
)
def test_where_there_is_no_system_prompt_nothing_is_changed(route: Route, said: dict[str, Any]) -> None:
    assert sent(said, BodyChanges(system="new"), route=route) == said


@given(values)
def test_what_is_written_reads_the_same(value: Any) -> None:
    assert parsed(dumped({"x": value})) == {"x": value}
