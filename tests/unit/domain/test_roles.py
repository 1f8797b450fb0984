from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.models import model_key
from manager.domain.roles import (
    BUILT_IN_ROLES,
    BodyChanges,
    Policy,
    RequestKind,
    Role,
    RoutingSettings,
    has_optional_thinking,
    merged,
    role_contradictions,
)

GPU_OF: dict[str, bool | None] = {"cpu": False, "gpu0": True, "nas": None}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.sampled_from("abc"), JSON, max_size=3)


def role(name: str = "output", kind: RequestKind = RequestKind.GENERATE, **values: object) -> Role:
    return replace(Role(name, kind), **values)  # type: ignore[arg-type]


def said(*roles: Role) -> list[tuple[str, str, str]]:
    return list(role_contradictions({one.name: one for one in roles}, GPU_OF, {}))


# --- contradictions -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", Policy)
def test_a_role_without_a_target_never_contradicts_its_policy(policy: Policy) -> None:
    assert said(role(policy=policy)) == []


@pytest.mark.parametrize("target", GPU_OF)
def test_only_what_is_known_to_be_on_the_cpu_is_for_the_cpu_only(target: str) -> None:
    assert said(role(target=target), role("control", target=target, policy=Policy.PREFER_GPU)) == []
    found = said(role(target=target, policy=Policy.CPU_ONLY))
    assert [one[:2] for one in found] == ([] if target == "cpu" else [("output", "target")])
    assert all(text.endswith("which policy cpu_only asks for; expected cpu") for _, _, text in found)


@pytest.mark.parametrize("kind", RequestKind)
def test_a_role_that_takes_runs_only_does_not_transcribe(kind: RequestKind) -> None:
    assert said(role(kind=kind)) == []
    refused = [("output", "mode", "runs take no transcriptions; expected sync")]
    assert said(role(kind=kind, mode="async")) == (refused if kind is RequestKind.TRANSCRIBE else [])


def test_where_nothing_is_on_the_cpu_only_auto_is_left() -> None:
    wrong = role(target="gpu0", policy=Policy.CPU_ONLY)
    ((_, _, text),) = role_contradictions({"output": wrong}, {"gpu0": True}, {})
    assert text.endswith("; expected auto")


def test_a_target_must_be_an_instance() -> None:
    ((name, field, text),) = said(role(target="gone", policy=Policy.CPU_ONLY))
    assert (name, field, text) == (
        "output",
        "target",
        "'gone' is no instance; expected cpu, gpu0, nas or auto",
    )


SLOTS = {"cpu": 2, "gpu0": 3}


def reserving(*roles: Role) -> list[tuple[str, str, str]]:
    return list(role_contradictions({one.name: one for one in roles}, GPU_OF, SLOTS))


def test_instances_of_a_role_exist_and_have_its_target_and_its_warm_model() -> None:
    assert said(role(instances=("cpu", "nas"), target="nas", keep_warm=("cpu",))) == []
    found = said(role(instances=("cpu", "gone"), target="nas", keep_warm=("gpu0", "away")))
    assert found == [
        ("output", "instances", "'gone' is no instance; expected cpu, gpu0, nas"),
        ("output", "keep_warm", "'away' is no instance; expected cpu, gpu0, nas"),
        ("output", "target", "'nas' is none of its instances; expected cpu, gone or auto"),
        ("output", "keep_warm", "'gpu0' is none of its instances; expected cpu, gone"),
        ("output", "keep_warm", "'away' is none of its instances; expected cpu, gone"),
    ]


def test_a_model_is_kept_warm_only_where_its_name_is_not_denied() -> None:
    denied = {"cpu": ("*:32b", "tiny"), "nas": ()}

    def found(model: str | None, *places: str) -> list[tuple[str, str, str]]:
        one = role(model=model, keep_warm=places)
        return list(role_contradictions({"output": one}, GPU_OF, {}, denied))

    assert found("qwen3:32b", "cpu", "nas") == [
        (
            "output",
            "keep_warm",
            "cpu must not run 'qwen3:32b' (deny_models *:32b); expected another instance, or another model",
        )
    ]
    assert [text.partition(";")[0] for _, _, text in found("tiny:latest", "cpu", "gpu0")] == [
        "cpu must not run 'tiny:latest' (deny_models tiny)"
    ]
    assert found("qwen3:8b", "cpu") == found(None, "cpu") == found("qwen3:32b", "nas") == []


def test_slots_are_reserved_only_where_there_are_as_many() -> None:
    assert reserving(role(instances=("cpu", "gpu0"), reserved=2)) == []
    assert reserving(role(reserved=1)) == [
        ("output", "reserved", "1 slots on no instance; name them in `instances` of the role")
    ]
    assert reserving(role(instances=("nas",), reserved=1)) == [
        ("output", "reserved", "nas has no slots; set instances.nas.slots first")
    ]
    two = role(instances=("cpu", "gpu0"), reserved=1), role("control", instances=("cpu",), reserved=2)
    message = "3 slots of cpu are reserved by roles together, and it has 2; expected at most 1"
    assert reserving(*two) == [("control", "reserved", message)]


def test_an_attempt_has_the_time_of_its_place_and_the_last_one_repeats() -> None:
    timed = role(attempt_timeouts_s=(45, 60))
    assert [timed.timeout_s(place) for place in range(4)] == [45, 60, 60, 60]
    assert role().timeout_s(0) is None


def test_a_fallback_is_another_role_of_the_same_kind() -> None:
    embed = role("embedding", RequestKind.EMBED)
    found = said(role(fallbacks=("output", "gone", "embedding", "control")), role("control"), embed)
    assert [(name, field) for name, field, _ in found] == [("output", "fallbacks")] * 3
    assert [text.partition(";")[0] for _, _, text in found] == [
        "a role cannot fall back to itself",
        "'gone' is no role",
        "'embedding' does embed, and 'output' generate",
    ]


@pytest.mark.parametrize(
    ("one", "other", "fits"),
    [("a", "a:latest", True), ("a", None, True), (None, "a", True), ("a", "b", False)],
)
def test_vectors_of_two_models_are_never_mixed(one: str | None, other: str | None, fits: bool) -> None:
    pair = [role(model=one, fallbacks=("second",)), role("second", model=other)]
    assert said(*pair) == []
    found = said(*(replace(each, kind=RequestKind.EMBED) for each in pair))
    assert [each[:2] for each in found] == ([] if fits else [("output", "fallbacks")])


def test_roles_may_fall_back_to_each_other() -> None:
    assert said(role(fallbacks=("control",)), role("control", fallbacks=("output",))) == []


# --- changes of bodies ----------------------------------------------------------------------------


def test_the_role_wins_over_the_model_key_by_key() -> None:
    settings = RoutingSettings(
        roles={
            "output": role(
                changes=BodyChanges({"a": {"x": 1}}, {"b": 1}, system="of the role", system_mode="append")
            )
        },
        models={
            "m:latest": BodyChanges(
                {"a": {"x": 2, "y": 2}}, {"b": 2, "c": 2}, system="of the model", think=True
            )
        },
    )
    assert settings.changes_for("M", "output") == BodyChanges(
        {"a": {"x": 1, "y": 2}}, {"b": 1, "c": 2}, "of the role", "append", think=True
    )
    assert settings.changes_for("m:latest", None) == settings.models["m:latest"]
    assert settings.changes_for("other", "output") == settings.roles["output"].changes


@pytest.mark.parametrize("mine", [True, False, None])
@pytest.mark.parametrize("other", [True, False, None])
@pytest.mark.parametrize(("model", "usual"), [("qwen3:8b", False), ("tiny", None)])
def test_the_role_decides_about_thinking_before_the_model_and_the_model_before_its_name(
    mine: bool | None, other: bool | None, model: str, usual: bool | None
) -> None:
    settings = RoutingSettings(
        roles={"output": role(changes=BodyChanges(think=mine))},
        models={model_key(model): BodyChanges(think=other)},
    )
    expected = mine if mine is not None else other if other is not None else usual
    assert settings.changes_for(model, "output").think is expected
    assert settings.changes_for(model, None).think is (other if other is not None else usual)


@pytest.mark.parametrize(
    ("capabilities", "think"),
    [(None, False), (["completion", "thinking"], False), (["completion"], None), ([], None)],
)
def test_what_cannot_think_is_not_told_to_be_quiet(
    capabilities: list[str] | None, think: bool | None
) -> None:
    settings = RoutingSettings(roles={"output": role(changes=BodyChanges(think=True))})
    assert settings.changes_for("qwen3:8b", None, capabilities).think is think
    assert settings.changes_for("qwen3:8b", "output", capabilities).think is True
    assert settings.changes_for("tiny", None, ["thinking"]).think is None


def test_nothing_is_changed_unless_somebody_said_so() -> None:
    settings = RoutingSettings(roles={"output": role()})
    for name in ("output", "gone", None):
        assert settings.changes_for("m", name).empty
    assert not BodyChanges(think=False).empty
    assert not BodyChanges(system="").empty


@pytest.mark.parametrize(
    ("model", "thinks"),
    [
        ("qwen3", True),
        ("Qwen3:8b", True),
        ("qwen3:0.6b", True),
        ("qwen3:14b-q8_0", True),
        ("qwen3:32b-fp16", True),
        ("qwen3:4b-q4_K_M", True),
        ("qwen3:30b-a3b-q4_K_M", True),
        ("qwen3:235b-a22b-fp16", True),
        ("someone/qwen3:8b", True),
        ("hf.co/someone/Qwen3-8B-GGUF", True),
        ("hf.co/Qwen/Qwen3-4B-GGUF:Q4_K_M", True),
        ("hf.co/unsloth/Qwen3-30B-A3B-128K-GGUF:UD-Q4_K_XL", True),
        ("hf.co/unsloth/Qwen3-1.7B-GGUF:BF16", True),
        ("registry.ollama.ai/library/qwen3:latest", True),
        # Always think.
        ("qwen3:4b", False),
        ("qwen3:30b", False),
        ("qwen3:30b-a3b", False),
        ("qwen3:235b", False),
        ("qwen3:4b-thinking", False),
        ("qwen3:4b-thinking-2507", False),
        ("qwen3:4b-thinking-2507-q4_K_M", False),
        ("qwen3:30b-a3b-thinking-2507-q8_0", False),
        ("qwen3:235b-a22b-thinking-2507", False),
        ("hf.co/unsloth/Qwen3-4B-Thinking-2507-GGUF:Q4_K_M", False),
        ("qwen3-vl:8b-thinking", False),
        ("qwen3-next:80b-a3b-thinking", False),
        # Never think.
        ("qwen3:4b-instruct", False),
        ("qwen3:4b-instruct-2507-fp16", False),
        ("hf.co/Qwen/Qwen3-30B-A3B-Instruct-2507-GGUF", False),
        ("hf.co/Qwen/Qwen3-8B-Base-GGUF", False),
        ("qwen3-coder:30b", False),
        ("qwen3-embedding:8b", False),
        ("hf.co/Qwen/Qwen3-Embedding-8B-GGUF", False),
        ("qwen3-vl:8b", False),
        # Nobody knows.
        ("qwen3:mine", False),
        ("qwen3.5:9b", False),
        ("my-qwen3:8b", False),
        ("qwen2.5-coder:7b", False),
        ("qwen3-like/llama3", False),
    ],
)
def test_only_builds_of_qwen3_that_can_be_quiet_are_kept_from_thinking(model: str, thinks: bool) -> None:
    assert has_optional_thinking(model) is thinks
    settings = RoutingSettings(roles={"output": role(changes=BodyChanges(think=True))})
    assert settings.changes_for(model, None).think is (False if thinks else None)
    assert settings.changes_for(model, "output").think is True


@given(OBJECTS, OBJECTS)
def test_merging_keeps_everything_that_is_not_said_anew(
    below: dict[str, object], above: dict[str, object]
) -> None:
    result = merged(below, above)
    assert set(result) == set(below) | set(above)
    for key, value in result.items():
        if key not in above:
            assert value == below[key]
        elif not (isinstance(above[key], dict) and isinstance(below.get(key), dict)):
            assert value == above[key]
    assert merged(result, above) == result


def test_four_roles_generate_and_one_embeds() -> None:
    assert [name for name, kind in BUILT_IN_ROLES.items() if kind is RequestKind.EMBED] == ["embedding"]
    assert list(BUILT_IN_ROLES) == ["thinking", "control", "output", "tool_selector", "embedding"]


def test_the_roles_that_keep_their_model_warm_on_an_instance_have_a_model() -> None:
    roles = [
        Role("a", RequestKind.GENERATE, "tiny", keep_warm=("one", "two")),
        Role("b", RequestKind.GENERATE, None, keep_warm=("one",)),
        Role("c", RequestKind.EMBED, "minilm", keep_warm=("one",)),
    ]
    settings = RoutingSettings({role.name: role for role in roles})
    found = {name: [role.name for role in settings.kept_on(name)] for name in ("one", "two", "three")}
    assert found == {"one": ["a", "c"], "two": ["a"], "three": []}
