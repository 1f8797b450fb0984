"""Changes in the bodies of inference requests."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.roles import BodyChanges, Parameters
from manager.wire.body import SMALL_BYTES, BadBodyError, read_body, reading
from manager.wire.rewriting import body_for, rewriting
from manager.wire.routes import INFERENCE, Route
from manager.wire.steps import run

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


def test_a_change_may_hold_every_number_that_the_configuration_can() -> None:
    assert sent({}, BodyChanges({"seed": 2**70})) == {"seed": 2**70}


def test_an_empty_object_stays_one() -> None:
    assert sent({"options": {}}, BodyChanges({"options": {}})) == {"options": {}}


def test_a_large_body_for_another_model_is_the_same_but_for_the_name() -> None:
    document = {"prompt": "x" * SMALL_BYTES, "suffix": "y" * SMALL_BYTES, "raw": True}
    body = run(reading([bytes_of({"model": "m", **document})], GENERATE, 10**9))
    pieces = run(rewriting(body, GENERATE, "n", UNCHANGED))
    assert len(pieces) == 5
    assert json.loads(b"".join(pieces)) == {"model": "n", **document}


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
        (V1_RESPONSES, {"reasoning": {"effort": "none"}}, {}),
        (INFERENCE[b"/v1/embeddings"], {}, {}),
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
        (V1_CHAT, {"reasoning": {"Effort": "high"}}),
        (V1_CHAT, {"reasoning": "high"}),
        (V1_RESPONSES, {"reasoning": {"effort": "low", "summary": "auto"}}),
        (V1_RESPONSES, {"reasoning": {"EFFORT": "low"}}),
        (V1_RESPONSES, {"reasoning": 5}),
        (V1_MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
        (V1_MESSAGES, {"output_config": {"effort": "high"}}),
    ],
)
def test_who_says_how_to_think_is_listened_to(route: Route, said: dict[str, Any]) -> None:
    changes = BodyChanges(think=False)
    assert sent(said, changes, route=route) == said
    assert sent({}, BodyChanges(said, think=False), route=route) == said
    assert sent({}, BodyChanges({}, said, think=False), route=route).items() >= said.items()


@pytest.mark.parametrize("said", [{"effort": ""}, {"effort": None}, {"summary": "auto"}, {}])
@pytest.mark.parametrize("route", [V1_CHAT, V1_RESPONSES])
def test_reasoning_without_an_effort_says_nothing_about_thinking(route: Route, said: dict[str, Any]) -> None:
    changed = sent({"reasoning": said, "reasoning_effort": "high"}, BodyChanges(think=False), route=route)
    # The server reads `reasoning_effort` only where there is no `reasoning`.
    assert changed == {"reasoning": {**said, "effort": "none"}, "reasoning_effort": "high"}


@pytest.mark.parametrize(
    ("route", "field", "off"),
    [
        (CHAT, "think", False),
        (V1_CHAT, "reasoning_effort", "none"),
        (V1_RESPONSES, "reasoning", {"effort": "none"}),
        (V1_MESSAGES, "thinking", {"type": "disabled"}),
    ],
)
def test_null_says_nothing_about_thinking(route: Route, field: str, off: object) -> None:
    assert sent({field: None}, BodyChanges(think=False), route=route) == {field: off}
    if route is V1_MESSAGES:
        said = {"output_config": {"format": "json"}}
        assert sent(said, BodyChanges(think=False), route=route) == {**said, field: off}
    if route is V1_CHAT:
        assert sent({"reasoning": None}, BodyChanges(think=False), route=route) == {
            "reasoning": None,
            field: off,
        }


@pytest.mark.parametrize("said", [{"effort": "high"}, {"effort": "high", "summary": "auto"}])
def test_a_default_for_reasoning_comes_before_that_for_thinking(said: dict[str, Any]) -> None:
    for given_ in ({}, {"reasoning": {"generate_summary": "auto"}}):
        changed = sent(given_, BodyChanges({"reasoning": said}, think=False), route=V1_RESPONSES)
        assert changed == {"reasoning": {**given_.get("reasoning", {}), **said}}


# --- names that the server folds ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["options", "OPTIONS", "Options", "option\u017f", "OPTION\u017f", "\\u006fptions", "option\\u017f"],
)
def test_an_override_meets_a_field_in_every_spelling_that_the_server_reads(name: str) -> None:
    changes = BodyChanges(overrides={"options": {"num_ctx": 1}, "format": None})
    raw = f'{{"model": "m", "{name}": {{"num_ctx": 2, "seed": 3}}}}'.encode()
    for body in (read_body(raw, CHAT), run(reading([raw], CHAT, 10**9))):
        changed = json.loads(body_for(body, CHAT, "m", changes), object_pairs_hook=list)
        assert sorted(changed) == [
            ("format", None),
            ("model", "m"),
            ("options", [("seed", 3), ("num_ctx", 1)]),
        ]


@pytest.mark.parametrize("name", ["keep_alive", "KEEP_ALIVE", "\u212aeep_alive", "\\u212aEEP_alive"])
def test_a_kelvin_sign_is_a_k(name: str) -> None:
    raw = f'{{"model": "m", "{name}": -1}}'.encode()
    body = read_body(raw, CHAT)
    assert json.loads(body_for(body, CHAT, "m", BodyChanges({}, {"keep_alive": 5}))) == {
        "model": "m",
        "keep_alive": 5,
    }
    assert json.loads(body_for(body, CHAT, "m", BodyChanges({"keep_alive": 5}))) == {
        "model": "m",
        "keep_alive": -1,
    }


@pytest.mark.parametrize("name", ["EFFORT", "Effort", "e\u017ffort"])
def test_names_inside_of_a_struct_are_folded_too(name: str) -> None:
    if name == "e\u017ffort":
        name = "\u017fummary"
    key = "summary" if "ummary" in name else "effort"
    said = {"reasoning": {name: "high", "other": 1, key: "low", name.swapcase(): "x"}}
    assert sent(said, BodyChanges({}, {"reasoning": {key: "none"}}), route=V1_RESPONSES) == {
        "reasoning": {"other": 1, key: "none"}
    }
    assert sent(
        {"reasoning": {name: "high"}}, BodyChanges({"reasoning": {key: "none"}}), route=V1_RESPONSES
    ) == {"reasoning": {name: "high"}}


def test_names_of_options_are_exact_as_the_server_reads_them() -> None:
    said = {"options": {"NUM_CTX": 1, "Seed": 1}}
    assert sent(said, BodyChanges({"options": {"num_ctx": 2}}, {"options": {"seed": 3}})) == {
        "options": {"NUM_CTX": 1, "Seed": 1, "num_ctx": 2, "seed": 3}
    }


def test_of_a_field_in_several_spellings_the_last_one_counts() -> None:
    raw = b'{"model":"m","reasoning":{"effort":"a","Effort":"b"},"Reasoning":{"Effort":"d","x":{}}}'
    body = read_body(raw, V1_RESPONSES)
    changes = BodyChanges({"reasoning": {"effort": "e", "x": {"y": 1}}})
    assert json.loads(body_for(body, V1_RESPONSES, "m", changes)) == {
        "model": "m",
        "reasoning": {"Effort": "d", "x": {"y": 1}},
    }
    raw = b'{"model":"m","reasoning":{"x":{"a":1},"X":{"b":1},"x":{"c":1}}}'
    changes = BodyChanges({"reasoning": {"x": {"y": 1}}})
    assert json.loads(body_for(read_body(raw, V1_RESPONSES), V1_RESPONSES, "m", changes)) == {
        "model": "m",
        "reasoning": {"x": {"c": 1, "y": 1}},
    }


def test_a_change_is_not_merged_into_what_is_no_json() -> None:
    raw = b'{"model":"m","options":{"a" 1}}'
    body = read_body(raw, CHAT)
    assert body_for(body, CHAT, "m", BodyChanges({"options": {"b": 1}})) == raw
    assert b'{"b":1}' in body_for(body, CHAT, "m", BodyChanges({}, {"options": {"b": 1}}))


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


@pytest.mark.parametrize("role", ["SYSTEM", "\\u0073ystem", "Developer"])
@pytest.mark.parametrize("key", ["role", "ROLE", "\\u0072ole"])
def test_a_system_prompt_is_one_however_it_is_spelled(role: str, key: str) -> None:
    raw = (
        f'{{"model": "m", "messages": [{{"role": "user", "{key}": "{role}", "Content": "old"}}, 1]}}'.encode()
    )
    body = read_body(raw, CHAT)
    added = json.loads(body_for(body, CHAT, "m", BodyChanges(system="new")))["messages"]
    assert (added[0]["content"], "Content" in added[0], added[1]) == ("new\n\nold", False, 1)
    replaced = json.loads(body_for(body, CHAT, "m", BodyChanges(system="new", system_mode="replace")))
    assert replaced["messages"] == [{"role": "system", "content": "new"}, 1]


ROLES = st.sampled_from(["system", "user", "developer", "assistant", None])
CONTENTS = st.none() | st.text(max_size=5) | st.lists(st.just(BLOCK), max_size=2) | st.integers()
MESSAGES = st.lists(
    st.fixed_dictionaries({}, optional={"role": ROLES, "content": CONTENTS, "x": values}) | values, max_size=6
)


def with_system(messages: list[Any], text: str, mode: str) -> list[Any]:
    """What becomes of messages, said plainly."""

    def is_system(message: Any) -> bool:
        return isinstance(message, dict) and message.get("role") in ("system", "developer")

    new = {"role": "system", "content": text}
    if mode == "replace":
        return [new, *(one for one in messages if not is_system(one))]
    first = next((at for at, one in enumerate(messages) if is_system(one)), None)
    if first is None:
        return [new, *messages]
    old = messages[first].get("content")
    if not old and not isinstance(old, int):
        joined: Any = text
    elif isinstance(old, str):
        joined = f"{text}\n\n{old}" if mode == "prepend" else f"{old}\n\n{text}"
    elif isinstance(old, list):
        block = {"type": "text", "text": text}
        joined = [block, *old] if mode == "prepend" else [*old, block]
    else:
        joined = old
    return [*messages[:first], {**messages[first], "content": joined}, *messages[first + 1 :]]


@given(
    MESSAGES, st.text(max_size=9), st.sampled_from(["prepend", "append", "replace"]), st.none() | st.just(1)
)
def test_messages_become_what_they_should(messages: Any, text: str, mode: Any, indent: int | None) -> None:
    raw = json.dumps({"model": "m", "messages": messages}, indent=indent).encode()
    changes = BodyChanges(system=text, system_mode=mode)
    for body in (read_body(raw, CHAT), run(reading([raw + b" " * SMALL_BYTES], CHAT, 10**9))):
        pieces = run(rewriting(body, CHAT, "m", changes))
        assert json.loads(b"".join(pieces))["messages"] == with_system(messages, text, mode)


@pytest.mark.parametrize("messages", ["[1 2]", "[1,]", "[nul]", '["]",[}{}]'])
def test_messages_that_are_no_json_are_left_to_the_server(messages: str) -> None:
    raw = f'{{"model":"m","messages":{messages}}}'.encode()
    body = read_body(raw, CHAT)
    assert body_for(body, CHAT, "m", BodyChanges(system="new", system_mode="replace")) == raw


def test_a_default_may_be_a_system_prompt_of_any_kind() -> None:
    changes = BodyChanges({"system": {"a": 1}}, system="new")
    assert sent({"system": {"b": 2}}, changes, route=GENERATE) == {"system": {"b": 2, "a": 1}}
    changes = BodyChanges({"messages": {"a": 1}}, system="new")
    assert sent({"messages": {}}, changes) == {"messages": {"a": 1}}


def test_a_prompt_of_any_size_is_added_to_without_being_read() -> None:
    text = "x\u00e9" * SMALL_BYTES
    for mode, joined in (("prepend", f"new\n\n{text}"), ("append", f"{text}\n\nnew")):
        for document in ({"system": text}, {"messages": [USER, {"role": "system", "content": text}]}):
            route = GENERATE if "system" in document else CHAT
            body = run(reading([bytes_of({"model": "m", **document})], route, 10**9))
            pieces = run(rewriting(body, route, "m", BodyChanges(system="new", system_mode=mode)))  # type: ignore[arg-type]
            assert len(pieces) == 3
            changed = json.loads(b"".join(pieces))
            assert joined in (changed.get("system"), changed.get("messages", [USER])[-1]["content"])


def test_a_system_prompt_is_put_among_a_bounded_number_of_messages() -> None:
    changes = BodyChanges(system="new", system_mode="replace")
    raw = b'{"model":"m","messages":[%b{}]}' % (b"{}," * 65_535)
    body = run(reading([raw], CHAT, 10**9))
    assert b"".join(run(rewriting(body, CHAT, "m", changes))).count(b"{}") == 65_536
    body = run(reading([raw.replace(b"[", b"[1,")], CHAT, 10**9))
    with pytest.raises(BadBodyError, match="among 65536 messages at most"):
        run(rewriting(body, CHAT, "m", changes))


def test_a_large_body_is_rewritten_in_steps_of_bounded_size() -> None:
    raw = b'{"model":"m","messages":[%b1]}' % (b'{"role":"user","content":"hello"},' * 60_000)
    body = run(reading([raw], CHAT, 10**9))
    steps = rewriting(body, CHAT, "m", BodyChanges(system="new", system_mode="replace"))
    assert sum(1 for _ in steps) > 100


@pytest.mark.parametrize(
    ("twice", "together"),
    [
        (b'"options":{"a":1},"options":{"b":2}', {"a": 1, "b": 2}),
        (b'"options":{"a":1},"options":{"a":2}', {"a": 2}),
        (b'"options":{ "a":1 } , "Options" : {}', {"a": 1}),
        (b'"options":{},"options":{"b":[{}]}', {"b": [{}]}),
        (b'"options":{"a":1},"options":null', None),
        (b'"options":null,"options":{"b":2}', {"b": 2}),
        (b'"options":{"a":1},"options":"x"', "x"),
        (b'"options":{"a":"\\"options\\""}', {"a": '"options"'}),
    ],
)
@pytest.mark.parametrize("filler", [b"", b',"prompt":"%b"' % (b"x" * SMALL_BYTES)], ids=["small", "large"])
@pytest.mark.parametrize("changes", [UNCHANGED, BodyChanges(think=True)], ids=["renamed", "changed"])
def test_options_that_are_given_twice_add_up_as_for_the_server(
    twice: bytes, together: object, filler: bytes, changes: BodyChanges
) -> None:
    raw = b'{"model":"role",%b%b}' % (twice, filler)
    body = run(reading([raw], CHAT, 2**30))
    pieces = run(rewriting(body, CHAT, "m", changes)) if filler else [body_for(body, CHAT, "m", changes)]
    assert json.loads(b"".join(pieces))["options"] == together


def test_an_override_counts_over_options_that_are_given_twice() -> None:
    raw = b'{"model":"role","options":{"num_ctx":1,"a":1},"options":{"num_ctx":2,"b":2}}'
    changes = BodyChanges(overrides={"options": {"num_ctx": 4096}})
    found = json.loads(body_for(read_body(raw, CHAT), CHAT, "m", changes))
    assert found["options"] == {"num_ctx": 4096, "a": 1, "b": 2}


# --- parameters of a model ------------------------------------------------------------------------

PARAMETERS = BodyChanges(parameters=Parameters(0.5, 4096, 99))


@pytest.mark.parametrize(
    ("path", "document", "added"),
    [
        (b"/api/chat", {}, {"options": {"temperature": 0.5, "num_ctx": 4096, "num_predict": 99}}),
        (
            b"/api/generate",
            {"options": {"num_ctx": 1, "seed": 2}},
            {"options": {"num_ctx": 1, "seed": 2, "temperature": 0.5, "num_predict": 99}},
        ),
        (b"/v1/chat/completions", {}, {"temperature": 0.5, "max_tokens": 99}),
        (b"/v1/chat/completions", {"max_completion_tokens": 5}, {"temperature": 0.5}),
        (b"/v1/chat/completions", {"max_completion_tokens": None}, {"temperature": 0.5, "max_tokens": 99}),
        (b"/v1/completions", {"temperature": 0}, {"max_tokens": 99}),
        (b"/v1/messages", {"max_tokens": 5}, {"temperature": 0.5}),
        (b"/v1/responses", {}, {"temperature": 0.5, "max_output_tokens": 99}),
        (b"/api/embed", {}, {}),
    ],
)
def test_parameters_have_the_names_of_the_route_and_count_where_nothing_is_said(
    path: bytes, document: dict[str, Any], added: dict[str, Any]
) -> None:
    said = sent(document, PARAMETERS, route=INFERENCE[path])
    assert said == {**document, **added}


def test_null_says_nothing_and_what_is_no_object_is_left_to_the_server() -> None:
    facts = {"temperature": 0.5, "num_ctx": 4096, "num_predict": 99}
    assert sent({"options": None}, PARAMETERS)["options"] == facts
    assert sent({"options": {"num_ctx": None, "seed": None}}, PARAMETERS)["options"] == {
        **facts,
        "seed": None,
    }
    assert sent({"options": []}, PARAMETERS)["options"] == []
    body = {"temperature": None, "max_tokens": None}
    found = sent(body, PARAMETERS, route=INFERENCE[b"/v1/chat/completions"])
    assert (found["temperature"], found["max_tokens"]) == (0.5, 99)
    defaults = BodyChanges(defaults={"options": {"num_ctx": 1}}, parameters=Parameters(None, 4096))
    assert sent({"options": {"seed": 1}}, defaults)["options"] == {"seed": 1, "num_ctx": 1}


def test_only_what_is_stated_is_added_and_defaults_come_first() -> None:
    some = BodyChanges(defaults={"options": {"temperature": 1}}, parameters=Parameters(0.5))
    assert sent({}, some) == {"options": {"temperature": 1}}
    none = BodyChanges(think=False, parameters=Parameters(None, 4096))
    assert "options" not in sent({}, none, route=INFERENCE[b"/v1/responses"])
